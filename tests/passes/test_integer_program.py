"""The integer program against brute force, its ties, its bounds, and the greedy allocation beside it."""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest

from qcompile.passes import integer_program
from qcompile.passes.greedy import greedy
from qcompile.passes.integer_program import Candidate, InfeasibleError, Pair, allocate, least

Choice = tuple[int, ...]


@dataclass(frozen=True)
class Problem:
    tensors: list[list[Candidate]]
    pairs: list[Pair]
    budgets: list[float]
    minimize: int | None
    most_loss: float

    @property
    def limits(self) -> tuple[float, ...]:
        return (self.most_loss, *self.budgets)

    @property
    def objective(self) -> int:
        return 0 if self.minimize is None else self.minimize + 1

    def totals(self, choice: Choice) -> tuple[float, ...]:
        """Return loss and costs, each sum rounded once."""
        terms = [[tensor[at].loss, *tensor[at].costs] for tensor, at in zip(self.tensors, choice, strict=True)]
        for pair in self.pairs:
            at = choice[pair.first], choice[pair.second]
            costs = np.zeros(len(self.budgets)) if pair.costs is None else pair.costs[:, *at]
            terms.append([float(pair.loss[at]), *map(float, costs)])
        return tuple(map(math.fsum, zip(*terms, strict=True)))

    def all(self) -> list[tuple[tuple[float, ...], Choice]]:
        return [(self.totals(c), c) for c in itertools.product(*(range(len(tensor)) for tensor in self.tensors))]

    def holds(self, totals: Sequence[float], besides: int | None = None) -> bool:
        return all(t <= limit for m, (t, limit) in enumerate(zip(totals, self.limits, strict=True)) if m != besides)

    def best(self) -> tuple[tuple[float, ...], Choice] | None:
        """Return the first in lexicographic order of all that hold the limits, by trying all."""
        held = [found for found in self.all() if self.holds(found[0])]
        return min(held, key=lambda found: (found[0][self.objective], *found), default=None)


def costs_of_a_kind(kind: int, generator: np.random.Generator, shape: tuple[int, ...], part: float = 1.0) -> np.ndarray:
    """Return bytes, microseconds of one decimal, or fractions."""
    if kind == 0:
        return generator.integers(100, int(1e9 * part), shape).astype(float)
    return np.round(generator.uniform(0, 50 * part, shape), 1) if kind == 1 else generator.uniform(0, part, shape)


def random_problem(seed: int) -> Problem:
    """Return up to 8 tensors of up to 4 candidates and up to 3 budgets; pairs in every second, both directions."""
    generator = np.random.default_rng(seed)
    kinds = generator.integers(0, 3, generator.integers(1, 4))
    tensors = []
    for size in generator.integers(1, 5, generator.integers(1, 9)):
        loss = 10.0 ** (generator.uniform(-9, 3, size) if generator.random() < 0.5 else generator.uniform(-4, -1, size))
        costs = np.stack([costs_of_a_kind(kind, generator, (size,)) for kind in kinds])
        tensors.append([Candidate(float(lost), tuple(map(float, c))) for lost, c in zip(loss, costs.T, strict=True)])
    pairs = []
    for first, second in itertools.permutations(range(len(tensors)), 2) if seed % 2 else ():
        if generator.random() < 0.25:
            shape = (len(tensors[first]), len(tensors[second]))
            costs = np.stack([costs_of_a_kind(kind, generator, shape, 0.01) for kind in kinds])
            pairs.append(
                Pair(first, second, generator.normal(0, 0.01, shape), costs if generator.random() < 0.5 else None)
            )
    problem = Problem(tensors, pairs, [math.inf] * len(kinds), None, math.inf)
    # Budgets are what some choice comes to, exactly, sometimes not the same choice: then they may be impossible.
    known = problem.all()
    one, other = (known[int(generator.integers(len(known)))][0] for _ in range(2))
    budgets = [(one if generator.random() < 0.8 else other)[k + 1] for k in range(len(kinds))]
    if generator.random() < 0.5:
        return Problem(tensors, pairs, budgets, None, math.inf)
    minimize = int(generator.integers(len(kinds)))
    budgets[minimize] = math.inf
    return Problem(tensors, pairs, budgets, minimize, one[0])


def solve(problem: Problem) -> integer_program.Allocation:
    return allocate(
        problem.tensors, problem.budgets, problem.pairs, minimize=problem.minimize, most_loss=problem.most_loss
    )


@pytest.mark.parametrize("group", range(8))
def test_equals_brute_force(group: int) -> None:
    impossible = 0
    for seed in range(group * 25, group * 25 + 25):
        problem = random_problem(seed)
        best = problem.best()
        if best is None:
            impossible += 1
            with pytest.raises(InfeasibleError) as raised:
                solve(problem)
            measure = 0 if raised.value.index is None else raised.value.index + 1
            rest = [totals[measure] for totals, _ in problem.all() if problem.holds(totals, besides=measure)]
            assert raised.value.least == min(rest) > problem.limits[measure]
            continue
        found = solve(problem)
        assert found.choice == best[1], seed
        assert (found.loss, *found.costs) == best[0], seed
        assert found.gap <= 1e-8, seed
    assert impossible < 25


def test_some_random_problems_are_impossible_and_most_are_not() -> None:
    impossible = sum(random_problem(seed).best() is None for seed in range(200))
    assert 0 < impossible < 50


def test_nothing_to_choose() -> None:
    assert allocate([], [1.0]).choice == ()
    assert allocate([[Candidate(2.0, (3.0,))]], [3.0]).choice == (0,)


def test_a_larger_budget_never_loses_more() -> None:
    generator = np.random.default_rng(5)
    tensors = [
        [Candidate(float(s) * 4.0**-bits, (float(size * bits),)) for bits in (2, 3, 4, 6, 8)]
        for s, size in zip(10.0 ** generator.uniform(-4, 0, 20), generator.integers(10, 10**6, 20), strict=True)
    ]
    low = least(tensors, [0.0], 0)
    losses = [allocate(tensors, [low * part]).loss for part in np.linspace(1.0, 4.0, 25)]
    assert losses == sorted(losses, reverse=True)
    assert losses[0] > losses[-1]


def test_a_budget_is_held_to_the_last_bit() -> None:
    # A byte of 2^40 is less than what HiGHS lets a scaled row be broken by.
    most = 2.0**40
    tensors = [
        [Candidate(1.0, (0.0,)), Candidate(0.0, (most / 2,))],
        [Candidate(0.5, (0.0,)), Candidate(0.0, (most / 2 + 1,))],
    ]
    assert allocate(tensors, [most + 1]).choice == (1, 1)
    assert allocate(tensors, [most]).choice == (1, 0)
    # 0.1 + 0.2 is above 0.3.
    tensors = [[Candidate(1.0, (0.0,)), Candidate(0.0, (0.1,))], [Candidate(1.0, (0.0,)), Candidate(0.0, (0.2,))]]
    assert allocate(tensors, [0.3]).choice == (1, 0)
    assert allocate(tensors, [math.fsum((0.1, 0.2))]).choice == (1, 1)


def test_many_choices_that_break_a_budget_by_a_bit() -> None:
    # Any eight of sixteen are above 0.8 by rounding alone, far more than are cut off one by one.
    generator = np.random.default_rng(0)
    eighth = math.nextafter(0.1, 1.0)
    tensors = [[Candidate(float(lost), (0.0,)), Candidate(0.0, (eighth,))] for lost in generator.uniform(1, 2, 16)]
    found = allocate(tensors, [0.8])
    assert sum(found.choice) == 7
    assert found.costs[0] <= 0.8
    lost = sorted(tensor[0].loss for tensor in tensors)
    assert found.loss == pytest.approx(sum(lost[:9]), rel=1e-12)


def test_of_equal_losses_the_cheapest_in_the_first_budget_then_the_second() -> None:
    ways = [
        Candidate(1.0, (4.0, 4.0)),
        Candidate(0.0, (5.0, 9.0)),
        Candidate(0.0, (5.0, 7.0)),
        Candidate(0.0, (6.0, 1.0)),
    ]
    assert allocate([ways], [9.0, 9.0]).choice == (2,)
    # One of the two can have no loss; which costs the same bytes, and not the same time.
    first = [Candidate(1.0, (0.0, 0.0)), Candidate(0.0, (5.0, 3.0))]
    second = [Candidate(1.0, (0.0, 0.0)), Candidate(0.0, (5.0, 2.0))]
    assert allocate([first, second], [5.0, 9.0]).choice == (0, 1)
    assert allocate([second, first], [5.0, 9.0]).choice == (1, 0)


def test_of_equal_costs_the_least_loss() -> None:
    tensors = [[Candidate(1.0, (5.0,)), Candidate(0.5, (5.0,)), Candidate(0.1, (6.0,))]] * 3
    assert allocate(tensors, [math.inf], minimize=0).choice == (1, 1, 1)


def test_of_equal_choices_the_lowest_indices() -> None:
    ways = [Candidate(0.0, (1.0,)), Candidate(1.0, (0.0,))]
    assert allocate([ways] * 30, [10.0]).choice == (0,) * 10 + (1,) * 20
    # The same sums from tensors that are not alike, which no rule of order sees.
    unlike = [[Candidate(0.0, (1.0,)), Candidate(1.0, (0.0,)), Candidate(float(at), (5.0,))] for at in range(2, 14)]
    pairs = [Pair(at, at + 1, np.zeros((3, 3))) for at in range(11)]
    assert allocate(unlike, [4.0], pairs).choice == (0,) * 4 + (1,) * 8


def test_a_difference_is_not_a_tie() -> None:
    little = 1e-7
    first = [Candidate(1.0, (0.0,)), Candidate(little, (9.0,))]
    second = [Candidate(1.0, (0.0,)), Candidate(0.0, (10.0,))]
    assert allocate([first, second], [10.0]).choice == (0, 1)


def test_small_losses_count_beside_large_ones() -> None:
    large = [[Candidate(1e3, (0.0,)), Candidate(1.0, (1e6,))]]
    small = [[Candidate(1e-9 * (at + 1), (0.0,)), Candidate(0.0, (1.0,))] for at in range(6)]
    assert allocate([*large, *small], [1e6 + 2]).choice == (1, 0, 0, 0, 0, 1, 1)


def test_pairs_decide_where_losses_alone_do_not() -> None:
    ways = [Candidate(1.0, (0.0,)), Candidate(0.0, (1.0,))]
    meet = Pair(2, 1, np.array([[-0.5, 0.0], [0.0, 0.0]]))
    assert allocate([ways] * 3, [1.0], [meet]).choice == (1, 0, 0)
    convert = Pair(0, 1, np.zeros((2, 2)), np.array([[[0.0, 5.0], [5.0, 0.0]]]))
    assert allocate([ways] * 3, [2.0], [convert]).choice == (1, 1, 0)


def test_dominated_candidates_stay_where_a_pair_may_favour_them() -> None:
    tensors = [[Candidate(0.0, (0.0,)), Candidate(0.1, (1.0,))], [Candidate(0.0, (0.0,))]]
    favours = Pair(0, 1, np.array([[1.0], [0.0]]))
    assert allocate(tensors, [5.0]).choice == (0, 0)
    assert allocate(tensors, [5.0], [favours]).choice == (1, 0)


def test_impossible_budgets_say_what_is_reachable() -> None:
    tensors = [[Candidate(0.0, (8.0, 1.0)), Candidate(1.0, (4.0, 2.0))]] * 3
    with pytest.raises(InfeasibleError, match="budget 0 cannot be less than 12") as raised:
        allocate(tensors, [10.0, 99.0])
    assert (raised.value.index, raised.value.least) == (0, 12.0)
    with pytest.raises(InfeasibleError) as raised:  # Each can be met; both together cannot.
        allocate(tensors, [12.0, 5.0])
    assert (raised.value.index, raised.value.least) == (1, 6.0)
    with pytest.raises(InfeasibleError, match="the loss") as raised:
        allocate(tensors, [20.0, 99.0], minimize=1, most_loss=0.9)
    assert (raised.value.index, raised.value.least) == (None, 1.0)
    assert least(tensors, [0.0, 5.0], 0) == 16.0


def test_budgets_that_no_single_one_saves() -> None:
    tensors = [[Candidate(0.0, (5.0, 5.0))]]
    with pytest.raises(InfeasibleError) as raised:
        allocate(tensors, [1.0, 2.0])
    assert (raised.value.index, raised.value.least) == (0, 5.0)


def hard_problem() -> tuple[list[list[Candidate]], list[Pair]]:
    generator = np.random.default_rng(1)
    tensors = [[Candidate(4.0**-b, (b * float(size),)) for b in range(5)] for size in generator.integers(50, 99, 40)]
    return tensors, [Pair(i, j, generator.normal(0, 0.1, (5, 5))) for i, j in itertools.combinations(range(40), 2)]


def test_no_time_gives_a_feasible_choice_and_a_bound() -> None:
    tensors, pairs = hard_problem()
    found = allocate(tensors, [6000.0], pairs, seconds=0.0)
    assert found.costs[0] <= 6000.0
    assert found.bound < found.loss
    assert found.gap == (found.loss - found.bound) / abs(found.loss) > 0
    assert greedy(tensors, [6000.0], pairs).loss >= found.loss  # type: ignore[union-attr]


def test_nothing_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    sys.stdout.write("before\n")
    generator = np.random.default_rng(1)
    tensors = [
        [Candidate(float(s) * 4.0**-b, (float(size * b), float(b * t))) for b in (2, 3, 4, 6, 8)]
        for s, size, t in zip(10.0 ** generator.uniform(-4, 0, 60), *generator.uniform(10, 10**6, (2, 60)), strict=True)
    ]
    allocate(tensors, [sum(tensor[1].costs[k] for tensor in tensors) for k in range(2)])
    sys.stdout.write("after\n")
    assert capfd.readouterr().out == "before\nafter\n"


def test_greedy_takes_the_cheapest_step_first() -> None:
    tensors = [
        [Candidate(0.0, (8.0,)), Candidate(1.0, (4.0,)), Candidate(1.5, (0.0,))],
        [Candidate(0.0, (8.0,)), Candidate(3.0, (0.0,))],
    ]
    found = greedy(tensors, [12.0])
    assert found is not None
    assert found.choice == (2, 0)  # 1.5 for 8 bytes rather than 1.0 for 4, and no way back.
    assert allocate(tensors, [12.0]).choice == (1, 0)
    assert found.bound == 0.0
    assert greedy(tensors, [-1.0]) is None


def test_greedy_holds_several_budgets() -> None:
    tensors = [[Candidate(0.0, (8.0, 1.0)), Candidate(1.0, (1.0, 5.0)), Candidate(2.0, (1.0, 1.0))]] * 2
    found = greedy(tensors, [9.0, 5.0])
    assert found is not None
    assert found.costs[0] <= 9.0 and found.costs[1] <= 5.0


@pytest.mark.parametrize(
    ("tensors", "pairs", "message"),
    [
        ([[]], [], "tensor 0 has no candidates"),
        ([[Candidate(0.0)]], [], "not one cost for each of 1 budgets"),
        ([[Candidate(math.nan, (1.0,))]], [], "tensor 0: a loss or cost is not finite"),
        ([[Candidate(0.0, (1.0,))]], [Pair(0, 0, np.zeros((1, 1)))], "these are not two tensors"),
        ([[Candidate(0.0, (1.0,))]], [Pair(0, 1, np.zeros((1, 1)))], "these are not two tensors"),
        ([[Candidate(0.0, (1.0,))]] * 2, [Pair(0, 1, np.zeros((2, 1)))], "do not fit"),
        ([[Candidate(0.0, (1.0,))]] * 2, [Pair(0, 1, np.full((1, 1), np.inf))], "not finite"),
    ],
)
def test_bad_numbers_are_refused(tensors: list[list[Candidate]], pairs: list[Pair], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        allocate(tensors, [1.0], pairs)


def test_a_budget_that_is_not_a_number_is_refused() -> None:
    with pytest.raises(ValueError, match="not a number"):
        allocate([[Candidate(0.0, (1.0,))]], [math.nan])
