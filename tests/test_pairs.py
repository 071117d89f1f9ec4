"""Pairs of weights: what two lose together, how that bears on a choice, and what is said of it."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qcompile import allocation, unasked_bits, weight_losses
from qcompile.allocation import Program
from qcompile.calib.data import Dataset, input_specs
from qcompile.calib.workers import Workers
from qcompile.core import packing
from qcompile.core.numerics import symmetric_scale
from qcompile.core.plan import QuantPlan, Role, TensorQuant
from qcompile.weight_losses import EIGHT, FOUR, in_four, measure_losses, measure_pairs, neighbours, tempered

NAMES = ("u", "v", "w")


def test_neighbours_are_those_that_follow():
    assert neighbours("abcd", 1) == [("a", "b"), ("b", "c"), ("c", "d")]
    assert neighbours("abcd", 8) == list(itertools.combinations("abcd", 2))
    assert neighbours("a", 3) == []


@pytest.fixture
def sums(model_of, random) -> tuple[ir.Model, dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Three products that are added up, whose errors therefore meet."""
    weights = {name: random.normal(size=(64, 64)).astype(np.float32) for name in NAMES}
    text = """(float[4,64] x) => (float[4,64] y) {
        a = MatMul (x, u) b = MatMul (x, v) c = MatMul (x, w) d = Add (a, b) y = Add (d, c) }"""
    return model_of(text, 21, **weights), weights, {"x": random.normal(size=(8, 4, 64)).astype(np.float32)}


def job_of(model: ir.Model, feeds: dict[str, np.ndarray]) -> Any:
    samples = [{name: array[at] for name, array in feeds.items()} for at in range(8)]
    data = Dataset("test", lambda: iter(samples), input_specs(model))
    track = lambda items, count, what: items  # noqa: E731
    return SimpleNamespace(evidence=SimpleNamespace(calibration=data), track=track, workers=Workers(1))


def plan_of(model: ir.Model, bits: Any) -> QuantPlan:
    tensors = {}
    for name in NAMES:
        absmax = np.abs(model.graph.initializers[name].const_value.numpy()).max(axis=0)
        four = bits.get(name) == FOUR
        scale = packing.packed_scale(absmax) if four else symmetric_scale(absmax, "int8")
        numbers = tuple(map(float, scale))
        tensors[name] = TensorQuant(Role.WEIGHT, "int8", numbers, (0,) * 64, 1, packing.BLOCK if four else 0)
    return QuantPlan(tensors, {})


def test_a_pair_is_twice_what_the_errors_of_both_have_in_common(sums):
    model, weights, feeds = sums
    planned = lambda bits: plan_of(model, bits)  # noqa: E731
    codes: Any = lambda: {EIGHT: {}, FOUR: {}}  # noqa: E731
    job = job_of(model, feeds)
    losses = measure_losses(job, model, planned, codes)
    found = measure_pairs(job, model, planned, codes, losses, 1)
    assert list(found) == [("u", "v"), ("v", "w")]
    # The two samples that are held out, in float64.
    x, plan = feeds["x"][6:].astype(np.float64), planned(dict.fromkeys(NAMES, FOUR))
    signal = sum(float(((x @ array) ** 2).sum()) for array in [sum(map(np.float64, weights.values()))])
    error = {name: x @ (quant.dequantize(quant.quantize(weights[name])) - np.float64(weights[name]))
             for name, quant in plan.tensors.items()}  # fmt: skip
    for (a, b), loss in found.items():
        expected = 2.0 * float((error[a] * error[b]).sum()) / signal
        assert loss == pytest.approx(expected, rel=1e-3, abs=1e-6 * losses[a][FOUR]) and abs(expected) > 1e-6
    assert {name: of[FOUR] for name, of in losses.items()} == pytest.approx(
        {name: float((array**2).sum()) / signal for name, array in error.items()}, rel=1e-3
    )


def test_pairs_are_of_the_samples_that_single_weights_are_of(sums, monkeypatch):
    model, _, feeds = sums
    seen = list[int]()
    whole = weight_losses.weights_alone

    def counted(*words: Any, **more: Any) -> Any:
        seen.append(more.get("shared") or len(words[2]))
        return whole(*words, **more)

    monkeypatch.setattr(weight_losses, "weights_alone", counted)
    planned, codes = (lambda bits: plan_of(model, bits)), (lambda: {EIGHT: {}, FOUR: {}})
    losses = measure_losses(job_of(model, feeds), model, planned, codes)
    measure_pairs(job_of(model, feeds), model, planned, codes, losses, 2)
    assert seen == [3, 3, 3]


def test_where_single_weights_were_not_run_pairs_are_not_either(sums, monkeypatch):
    model, _, feeds = sums
    monkeypatch.setattr(weight_losses, "affordable", lambda *words: False)
    planned, codes = (lambda bits: plan_of(model, bits)), (lambda: pytest.fail("nothing needs codes"))
    assert measure_pairs(job_of(model, feeds), model, planned, codes, {}, 2) == {}


FORMS = hnp.arrays(np.float64, (6, 6), elements=st.floats(-2.0, 2.0))


@given(FORMS, st.integers(1, 5))
def test_no_choice_of_tempered_pairs_loses_less_than_nothing(form, window):
    alone = {str(at): float(form[at, at]) ** 2 for at in range(6)}
    pairs = {(a, b): float(form[int(a), int(b)]) for a, b in neighbours(sorted(alone), window)}
    found = tempered(alone, pairs)
    assert list(found) == list(pairs)
    for chosen in itertools.product((0, 1), repeat=6):
        four = {str(at) for at in range(6) if chosen[at]}
        loss = sum(alone[name] for name in four) + sum(of for pair, of in found.items() if four.issuperset(pair))
        assert loss >= -1e-9
    most = {(a, b): 2.0 * float(abs(form[int(a), int(a)] * form[int(b), int(b)])) for a, b in pairs}
    factors = [found[pair] / loss for pair, loss in pairs.items() if 1e-6 < abs(loss) < most[pair]]
    assert all(0.0 < factor <= 1.0 for factor in factors) and factors == pytest.approx(factors[:1] * len(factors))


def test_pairs_that_can_be_are_left_as_they_are():
    alone, pairs = {"a": 1.0, "b": 4.0, "c": 0.0}, {("a", "b"): -3.9, ("b", "c"): 0.5}
    assert tempered(alone, pairs) == {("a", "b"): -3.9, ("b", "c"): 0.0}
    # 1 + 4 - 5 would be less than nothing for others than 0 and 1; at -4 both errors are one another's opposite.
    assert tempered(alone, {("a", "b"): -5.0})["a", "b"] == pytest.approx(-4.0)


#: By weight: how many numbers it has, and what it loses in four bits. Alone c loses least for what it saves; a and b
#: save as much, and together lose less than that.
WEIGHTS = {"a": (20_000, 0.0101), "b": (23_000, 0.0099), "c": (40_000, 0.0195)}


@pytest.fixture
def program(monkeypatch):
    monkeypatch.setattr(unasked_bits, "written_bytes", lambda model, plan, backend: size(plan))

    def build(pairs: Any, tried: Any = ()) -> Program:
        backend: Any = None
        model = ir.Model(ir.Graph([], [], nodes=[]), ir_version=10)
        losses = {name: {EIGHT: 0.0, FOUR: loss} for name, (_, loss) in WEIGHTS.items()}
        numbers = {name: count for name, (count, _) in WEIGHTS.items()}
        return Program(model, numbers, losses, 0.001, lambda bits: bits, backend, dict(tried), pairs)  # type: ignore

    return build


def size(bits: Any) -> int:
    packed = {name: count * packing.BITS / 8.0 + allocation.UNPACKING for name, (count, _) in WEIGHTS.items()}
    return int(sum(packed[name] if bits.get(name) == FOUR else count for name, (count, _) in WEIGHTS.items()))


BUDGET = size({"c": FOUR})


def test_errors_that_cancel_make_another_choice_and_the_report_says_so(program):
    alone = program({}).within(BUDGET)
    assert in_four(alone.bits) == {"c"} and alone.as_json()["pairs"] is None
    best = program({("a", "b"): -0.005, ("b", "c"): 0.001}).within(BUDGET)
    assert in_four(best.bits) == {"a", "b"} and best.noise == pytest.approx(0.001 + 0.0101 + 0.0099 - 0.005)
    assert best.as_json()["pairs"] == {"measured": 2, "changed": ["a", "b", "c"], "sqnr_without": alone.sqnr}
    assert best.gap == 0.0


def test_what_is_chosen_without_pairs_is_run_beside_it_and_wins_where_it_loses_less(program):
    tried = {frozenset("ab"): 0.03, frozenset("c"): 0.02}
    found = program({("a", "b"): -0.005}, tried)
    assert frozenset("c") in map(frozenset, (in_four(one.bits) for one in found.proposals(BUDGET)))
    best = found.within(BUDGET)
    assert in_four(best.bits) == {"c"} and best.as_json()["pairs"]["changed"] == []
    assert best.gap == pytest.approx((0.0195 - 0.015) / 0.0195)


def test_the_other_questions_count_pairs_too(program):
    pairs = {("a", "b"): -0.005}
    whole = sum(count for count, _ in WEIGHTS.values())
    # 18 dB leave room for a and b together, but not for c or any other two.
    smallest = program(pairs).faithful(17.4)
    assert in_four(smallest.bits) == {"a", "b"} and in_four(program({}).faithful(17.4).bits) != {"a", "b"}
    assert smallest.as_json()["pairs"]["changed"]
    assert program(pairs).worthwhile(whole).without_pairs == program({}).worthwhile(whole)
    assert {"ab"} <= {"".join(sorted(in_four(one.bits))) for one in program(pairs).front(9)}
