"""Allocate by an integer program: the candidate of each tensor that loses least under budgets, with a proven bound.

A multiple-choice knapsack with as many budgets as wanted, and pair terms as in CLADO (Deng et al. 2023, arXiv
2307.05657), solved by HiGHS through `scipy.optimize.milp`. docs/allocation.md has the formulation.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

import numpy as np

from qcompile.passes.candidates import LOSS, Allocation, Array, Candidate, InfeasibleError, Pair, measures
from qcompile.passes.greedy import descend
from qcompile.passes.multiple_choice import Program, Relaxation

__all__ = ["Allocation", "Candidate", "InfeasibleError", "Pair", "allocate", "least"]

#: An optimum below this part of what its scale was made for is searched again with a scale of its own.
ZOOM = 0.1


def allocate(
    tensors: Sequence[Sequence[Candidate]],
    budgets: Sequence[float],
    pairs: Sequence[Pair] = (),
    seconds: float = 60.0,
    minimize: int | None = None,
    most_loss: float = math.inf,
) -> Allocation:
    """Choose one candidate for each tensor.

    Of choices that are equal in what is minimized, the one is taken that has least loss, then least of the first
    cost, the second, and so on, then the lowest indices of candidates, tensor by tensor.

    Parameters
    ----------
    tensors : sequence of sequence of Candidate
        By tensor, its candidates.
    budgets : sequence of float
        The most of each cost; infinity is no budget. Sums are held to it to the last bit.
    pairs : sequence of Pair
        What tensors do together.
    seconds : float
        When the search ends with the best choice it has; where it takes less, the result depends on the numbers alone.
    minimize : int or None
        The cost that is made least; None is the loss.
    most_loss : float
        The most of the loss.

    Raises
    ------
    InfeasibleError
        No choice holds the bounds.
    TimeoutError
        None was found in time.
    ValueError
        Numbers that are not finite, shapes that do not fit.
    """
    found, limits = measures(tensors, len(budgets), pairs), _limits(budgets, most_loss)
    if not tensors:
        return found.allocation((), 0.0, minimize)
    program, deadline = Program(found), time.monotonic() + seconds
    objective = LOSS if minimize is None else minimize + 1
    answer = _optimum(program, objective, limits, descend(found, objective, limits), deadline)
    if answer is None:
        _explain(program, limits, deadline)
    choice = _untie(program, objective, limits, answer, deadline) if answer.proven else answer.choice
    return found.allocation(choice, program.base[objective] + answer.bound, minimize)


def least(
    tensors: Sequence[Sequence[Candidate]],
    budgets: Sequence[float],
    index: int | None,
    pairs: Sequence[Pair] = (),
    most_loss: float = math.inf,
    seconds: float = 60.0,
) -> float:
    """Return the least that can be reached of a cost (None: of the loss) under the other bounds.

    Parameters and errors are those of `allocate`; what the budget of this index is makes no difference.
    """
    others = [math.inf if k == index else budget for k, budget in enumerate(budgets)]
    most = math.inf if index is None else most_loss
    return allocate(tensors, others, pairs, seconds, index, most).objective


def _limits(budgets: Sequence[float], most_loss: float) -> tuple[float, ...]:
    limits = (float(most_loss), *map(float, budgets))
    if any(math.isnan(limit) for limit in limits):
        raise ValueError("a budget is not a number")
    return limits


@dataclass(frozen=True, eq=False)
class _Optimum:
    """A choice, a bound of the objective above its base, whether that is final, and the floors of a relaxation."""

    choice: tuple[int, ...]
    bound: float
    proven: bool
    floors: Array


def _optimum(
    program: Program, objective: int, limits: Sequence[float], start: tuple[int, ...] | None, deadline: float
) -> _Optimum | None:
    """Search with ever finer scales until the objective is a good part of its scale; None where bounds cannot hold.

    Losses span twelve powers of ten, and HiGHS's tolerances are absolute: a bound on the objective, from the choice
    in hand, removes what is too large to matter, and the rest is scaled anew.
    """
    relaxation = program.relax(program.coefficients[objective], limits)
    if relaxation is None:
        return None
    within, floors = list(limits), relaxation.floors
    bound = max(0.0, float(floors.min()))
    best = _better(program, objective, limits, start, relaxation)
    while True:
        if best is not None:
            within[objective] = min(within[objective], program.found.totals(best)[objective])
        allowed = program.allowed(within) & (floors <= program.slack(objective, within[objective]))
        try:
            answer = program.search(program.coefficients[objective], within, limits, deadline, allowed)
        except TimeoutError:
            if best is None:
                raise
            return _Optimum(best, bound, False, floors)
        if answer is None:
            return None if best is None else _Optimum(best, bound, False, floors)
        best, bound = answer.choice, max(bound, answer.bound)
        excess = program.found.totals(best)[objective] - program.base[objective]
        if not answer.proven or excess >= ZOOM * answer.scale or excess <= program.rounding(objective):
            return _Optimum(best, bound, answer.proven, floors)


def _better(
    program: Program, objective: int, limits: Sequence[float], start: tuple[int, ...] | None, relaxation: Relaxation
) -> tuple[int, ...] | None:
    """Return the better of a choice and the one nearest to the solution in fractions, made to hold the limits."""
    nearest = relaxation.nearest
    repaired = None if nearest is None else descend(program.found, objective, limits, nearest)
    known = [choice for choice in (start, repaired) if choice is not None]
    return min(known, key=lambda choice: program.found.totals(choice)[objective], default=None)


def _untie(
    program: Program, objective: int, limits: Sequence[float], optimum: _Optimum, deadline: float
) -> tuple[int, ...]:
    """Return the first, in lexicographic order, of all choices that are equal in the objective.

    Each measure in turn becomes least while those before it stay; it ends where the choice is shown to be the only
    one, mostly at once. Where time ends, the best until then is returned.
    """
    held, best = list(limits), optimum.choice
    try:
        for measure in (objective, *(other for other in range(program.found.count) if other != objective)):
            if measure != objective:
                better = _optimum(program, measure, held, best, deadline)
                if better is None or not better.proven:
                    return best
                best = better.choice
            held[measure] = min(held[measure], program.ceiling(measure, best))
            allowed = program.allowed(held) & (optimum.floors <= program.slack(objective, held[objective]))
            if program.search(np.zeros(program.columns), held, limits, deadline, allowed, best) is None:
                return best
        return _lowest(program, held, limits, best, deadline)
    except TimeoutError:
        return best


def _lowest(
    program: Program, held: Sequence[float], limits: Sequence[float], best: tuple[int, ...], deadline: float
) -> tuple[int, ...]:
    """Return the choice of lowest indices within bounds: a few tensors at a time, as the digits of one number."""
    allowed = program.allowed(held)
    for digits in program.digits(allowed):
        weights = program.numbered(digits)
        answer = program.search(weights, held, limits, deadline, allowed)
        if answer is None or not answer.proven:
            return best
        best = answer.choice
        for tensor in digits:
            allowed[program.block(tensor)] = False
            allowed[program.block(tensor)[best[tensor]]] = True
    return best


def _explain(program: Program, limits: Sequence[float], deadline: float) -> NoReturn:
    """Raise what is wrong with bounds that no choice holds.

    Of the bounds that can be met by moving one alone, the one that has to move by the least part is named; where
    none is, the first that those before it leave no room for.
    """
    bounded = [measure for measure, limit in enumerate(limits) if limit < math.inf]
    reachable = dict[int, float]()
    for measure in bounded:
        others = [math.inf if other == measure else limit for other, limit in enumerate(limits)]
        answer = _optimum(program, measure, others, None, deadline)
        if answer is not None:
            reachable[measure] = program.found.totals(answer.choice)[measure]
    if reachable:
        part = {m: (value - limits[m]) / max(abs(limits[m]), math.ulp(0.0)) for m, value in reachable.items()}
        measure = min(part, key=lambda m: part[m])
        raise InfeasibleError(_index(measure), reachable[measure])
    before = [math.inf] * len(limits)
    for measure in bounded:
        answer = _optimum(program, measure, before, None, deadline)
        assert answer is not None, "the bounds before this one hold together"
        value = program.found.totals(answer.choice)[measure]
        if value > limits[measure]:
            raise InfeasibleError(_index(measure), value)
        before[measure] = limits[measure]
    raise AssertionError("bounds that hold together were said not to")


def _index(measure: int) -> int | None:
    return None if measure == LOSS else measure - 1
