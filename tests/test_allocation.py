"""Which choice a budget of bytes leads to: by what is expected, and by what came of those that were run."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import onnx_ir as ir
import pytest

from qcompile import Options, unasked_bits
from qcompile.allocation import UNPACKING, Program, Widths
from qcompile.core import packing
from qcompile.weight_losses import EIGHT, FOUR, Tried, in_four

#: By weight: how many numbers it has, and what it loses in four bits. Together a and b save what c does, and lose more
#: than c alone; step by step, they are cheaper for what they save.
WEIGHTS = {"a": (20_000, 0.0101), "b": (21_000, 0.0099), "c": (40_000, 0.0195), "d": (30_000, 0.9)}
NOISE, FIXED = 0.001, 1000.0


def size(bits: Mapping[str, int]) -> int:
    packed = {name: count * packing.BITS / 8.0 + UNPACKING for name, (count, _) in WEIGHTS.items()}
    sizes = (packed[name] if bits.get(name) == FOUR else count for name, (count, _) in WEIGHTS.items())
    return int(FIXED + sum(sizes))


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch):
    """Build the choice among these weights; a plan is just its bits."""
    monkeypatch.setattr(unasked_bits, "written_bytes", lambda model, plan, backend: size(plan))

    def build(tried: Tried | None = None) -> Program:
        backend: Any = None
        return Program(
            ir.Model(ir.Graph([], [], nodes=[]), ir_version=10),
            {name: count for name, (count, _) in WEIGHTS.items()},
            {name: {EIGHT: 0.0, FOUR: loss} for name, (_, loss) in WEIGHTS.items()},
            NOISE,
            lambda bits: bits,
            backend,
            tried or {},
        )

    return build


BUDGET = size({"c": FOUR})


def names(widths: Widths) -> set[str]:
    return set(in_four(widths.bits))


def test_the_program_comes_first_and_each_other_choice_once_within_the_budget(program):
    found = program().proposals(BUDGET)
    assert names(found[0]) == {"c"} and found[0].gap == 0.0
    assert len({in_four(one.bits) for one in found}) == len(found) > 1
    assert all(one.bytes <= BUDGET for one in found)
    # In the graph's order as many as are needed, and all but the first and the last.
    assert {"a", "b", "c"} in map(names, found) and {"b", "c"} in map(names, found)
    assert all(one.gap > 0.0 for one in found[1:])


def test_where_nothing_was_run_what_is_expected_decides(program):
    best = program().within(BUDGET)
    assert names(best) == {"c"} and best.tried == 0
    assert best.noise == pytest.approx(NOISE + WEIGHTS["c"][1])


def test_the_choice_that_loses_least_when_run_is_taken_and_keeps_its_gap(program):
    tried = {frozenset({"c"}): 0.03, frozenset({"b", "c"}): 0.02, frozenset({"a", "b", "c"}): 0.04}
    best = program(tried).within(BUDGET)
    assert names(best) == {"b", "c"} and (best.noise, best.tried) == (0.02, 3)
    expected = sum(WEIGHTS[name][1] for name in "bc")
    assert best.gap == pytest.approx((expected - WEIGHTS["c"][1]) / expected)


def test_of_choices_that_lose_the_same_it_is_the_program_s(program):
    tried = {frozenset({"b", "c"}): 0.03, frozenset({"c"}): 0.03}
    assert names(program(tried).within(BUDGET)) == {"c"}


def test_runs_for_another_budget_do_not_replace_the_program_s_choice(program):
    tried = {frozenset({"b", "c"}): 0.001}
    best = program(tried).within(BUDGET)
    assert names(best) == {"c"} and best.tried == 0


def test_a_file_that_is_larger_than_reckoned_takes_fewer_bits_but_not_all(monkeypatch):
    """Many choices of about the same size, each packed weight taking a little more than it is reckoned to."""
    counts = {f"w{at}": 5_000 + 13 * at for at in range(30)}
    reckoned = {name: count * packing.BITS / 8.0 + UNPACKING for name, count in counts.items()}

    def written(bits: Mapping[str, int]) -> int:
        return int(sum(reckoned[name] + 60 if bits.get(name) == FOUR else count for name, count in counts.items()))

    monkeypatch.setattr(unasked_bits, "written_bytes", lambda model, plan, backend: written(plan))
    model, backend = ir.Model(ir.Graph([], [], nodes=[]), ir_version=10), None
    losses = {name: {EIGHT: 0.0, FOUR: 1.0 + at % 7} for at, name in enumerate(counts)}
    planned: Any = dict
    many = Program(model, counts, losses, NOISE, planned, backend, {})  # type: ignore[arg-type]
    fewest = written(dict.fromkeys(counts, FOUR))
    for part in (0.1, 0.3, 0.5, 0.9):
        budget = fewest + part * (written({}) - fewest)
        best = many.proposals(budget)[0]
        # Never above it, and within what four weights take below it.
        assert budget - 4 * 2_500 <= best.bytes <= budget


def test_a_budget_that_all_weights_fit_has_one_choice(program):
    (only,) = [one for one in program().proposals(size({})) if not names(one)]
    assert only == program().proposals(size({}))[0]


@pytest.mark.parametrize(("four", "above"), [(0.2, True), (0.5, False)])
def test_four_bits_are_no_remedy_where_they_are_stored_as_eight(monkeypatch: pytest.MonkeyPatch, four, above):
    """A file is twice what a quarter is, and with four bits of the weight less than that, or as much."""
    whole = unasked_bits.LARGE
    sizes = {(): 0.5 * whole, ("w",): four * whole}
    monkeypatch.setattr(unasked_bits, "written_bytes", lambda model, plan, backend: sizes[tuple(plan)])
    monkeypatch.setattr(unasked_bits, "packable", lambda model, planned: {"w": 1})
    monkeypatch.setattr(unasked_bits, "takes_four", lambda model, planned: False)
    calibration, model, backend = SimpleNamespace(float_bytes=whole), None, None
    given: Any = (model, calibration, dict, backend, Options("cpu"))
    assert unasked_bits.above_a_quarter(*given) == above
    monkeypatch.setattr(unasked_bits, "takes_four", lambda model, planned: True)
    assert not unasked_bits.above_a_quarter(*given), "kernels take four bits as they are"
