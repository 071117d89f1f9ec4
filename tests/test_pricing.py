"""What placements are priced at, and how a cost table decides."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from qcompile.backends.base import find_target
from qcompile.calib.sensitivity import Choice
from qcompile.core import runtime
from qcompile.core.costs import CostTable
from qcompile.core.plan import Precision
from qcompile.passes.canonicalize import Canonicalize
from qcompile.passes.place import Placement, Wish, place
from qcompile.pricing import Pricer, predict

Build = Callable[..., Any]
NETWORK = """(float[1,16,12,12] x) => (float[1,16,12,12] y) {
    [one] a = Conv <pads = [1, 1, 1, 1]> (x, w) [relu] r = Relu (a) [two] b = Conv <pads = [1, 1, 1, 1]> (r, v)
    [exp] e = Exp (b) [three] y = Conv <pads = [1, 1, 1, 1]> (e, u) }"""
CONVS = ["one", "two", "three"]


@pytest.fixture
def network(model_of: Build, random: np.random.Generator) -> ir.Model:
    weights = {name: (0.05 * random.normal(size=(16, 16, 3, 3))).astype(np.float32) for name in "wvu"}
    model: ir.Model = model_of(NETWORK, 21, **weights)
    Canonicalize(21)(model)
    return model


def table(**factors: float) -> CostTable:
    """Return the CPU's table with the times of some kernels multiplied."""
    target, _ = find_target("cpu")
    assert target.costs is not None
    entries = {
        key: {size: time * factors.get(key.partition("[")[0].partition("/")[0].replace(".", "_"), 1.0)
              for size, time in sizes.items()} for key, sizes in target.costs.entries.items()
    }  # fmt: skip
    return replace(target.costs, entries=entries)


def pricer(model: ir.Model, costs: CostTable) -> Pricer:
    target, backend = find_target("cpu")
    target = replace(target, costs=costs)

    def placed(wishes: Mapping[str, Wish]) -> Placement:
        return place(model, target, True, True, wishes)

    return Pricer(model, target, backend, [runtime.synthetic_feeds(model, 0)], placed)


def integers(model: ir.Model, costs: CostTable) -> list[str]:
    asked = pricer(model, costs)
    ops = asked.placed(asked.dear()).ops
    return [name for name in CONVS if ops[name].precision is Precision.INTEGER]


def test_kernels_that_become_free_are_used_and_kernels_that_become_dear_are_not(network: ir.Model) -> None:
    assert integers(network, table(QLinearConv=1e-3)) == CONVS
    assert integers(network, table(QLinearConv=1e3)) == []


def test_conversions_that_become_dear_keep_operators_in_float_that_would_gain(network: ir.Model) -> None:
    free = table(QLinearConv=1e-3, QuantizeLinear=1e-3, DequantizeLinear=1e-3)
    assert integers(network, free) == CONVS
    assert integers(network, table(QLinearConv=1e-3, QuantizeLinear=1e3, DequantizeLinear=1e3)) == []


def test_what_does_not_pay_keeps_integer_weights_and_says_why(network: ir.Model) -> None:
    wishes = pricer(network, table(QLinearConv=1e3)).dear()
    assert {wish.precision for wish in wishes.values()} == {Precision.WEIGHT_ONLY}
    assert all("integers do not pay: " in wish.reason and " 0 µs" not in wish.reason for wish in wishes.values())


def test_the_chosen_placement_is_no_dearer_than_all_or_nothing(network: ir.Model) -> None:
    asked = pricer(network, table(QLinearConv=3.0))
    everything = asked.placed({})
    nothing = asked.placed(dict.fromkeys(CONVS, Wish(Precision.WEIGHT_ONLY, "")))
    least = min(asked.latency(everything), asked.latency(nothing))
    assert asked.latency(asked.placed(asked.dear())) <= least * 1.001


def test_noise_is_spared_where_it_is_worth_the_time(network: ir.Model) -> None:
    asked = pricer(network, table(QLinearConv=0.3))
    values = {"e": 0.5, "x": 1e-5, "r": 1e-5}
    found = asked.spoiling(Choice({}, values, {}, 0.5), {})
    assert set(found) == {"three"} and found["three"].precision is Precision.WEIGHT_ONLY
    assert "its codes alone would leave 3.0 dB" in found["three"].reason
    assert asked.spoiling(Choice({}, dict.fromkeys(values, 1e-06), {}, 1e-5), {}) == {}


def test_weights_that_are_only_stored_come_back_where_their_codes_cost_more_than_they_save(network: ir.Model) -> None:
    asked = pricer(network, table())
    wishes = {"one": Wish(Precision.WEIGHT_ONLY, "dear"), "two": Wish(Precision.FLOAT, "asked"),
              "exp": Wish(Precision.WEIGHT_ONLY, "dear")}  # fmt: skip
    assert asked.weights == {"one": ("w",), "two": ("v",), "three": ("u",)}
    # With one byte of four more, a third of the weights is worth a sixtieth of float's time, or 0.33 % of noise.
    assert asked.spoilt(wishes, {"one": 0.003}) == {}
    found = asked.spoilt(wishes, {"one": 0.1})
    assert set(found) == {"one"} and found["one"].wide
    assert found["one"].reason == "dear; codes of its weights would leave 10.0 dB at the outputs"


def test_weights_that_spoil_the_outputs_take_their_operator_out_of_integers(network: ir.Model) -> None:
    asked = pricer(network, table(QLinearConv=1e-3, QuantizeLinear=1e-3, DequantizeLinear=1e-3))
    found = asked.spoiling(Choice({}, {"e": 1e-5, "x": 1e-5, "r": 1e-5}, {}, 0.2), {}, {"two": 0.5})
    assert set(found) == {"two"} and found["two"].precision is Precision.WEIGHT_ONLY and found["two"].wide
    assert found["two"].reason == "codes of its weights would leave 3.0 dB at the outputs"
    # What is spared for its codes keeps integer weights, unless these spoil as much.
    found = asked.spoiling(Choice({}, {"e": 0.5, "x": 1e-5, "r": 1e-5}, {}, 0.5), {}, {"three": 0.3})
    assert found["three"].wide and "codes of its weights" in found["three"].reason


def test_float_weights_are_worth_their_bytes(network: ir.Model) -> None:
    asked = pricer(network, table())
    stored, back = ({"one": Wish(precision, "")} for precision in (Precision.WEIGHT_ONLY, Precision.FLOAT))
    choice = Choice({}, {}, {}, 0.01)
    # A third of the weights: in codes a quarter of the bytes, and a scale per channel.
    assert asked.worth(back, choice) - asked.worth(stored, choice) == pytest.approx(0.05, abs=0.002)


def test_a_range_of_each_run_is_priced_and_flips_with_the_table(model_of: Build, random: np.random.Generator) -> None:
    text = "(float[1,64,384] x) => (float[1,64,384] y) { e = Exp (x) [mm] y = MatMul (e, w) }"
    model = model_of(text, 21, w=random.normal(size=(384, 384)).astype(np.float32))
    Canonicalize(21)(model)
    free, as_it_is, dear = (pricer(model, table(DynamicQuantizeMatMul=factor)) for factor in (1e-3, 1.0, 1e2))
    prices = [asked.dynamic(asked.placed({}))["e"] for asked in (free, as_it_is, dear)]
    assert prices[0] == 0.0 and prices[1] < 0.1 < 1.0 < prices[2]
    without = replace(
        find_target("cpu")[0], ops={"MatMul": replace(find_target("cpu")[0].ops["MatMul"], dynamic=False)}
    )
    assert not place(model, without, True, True).dynamic


def test_where_all_codes_are_noise_everything_is_in_float(network: ir.Model) -> None:
    asked = pricer(network, table(QLinearConv=0.3))
    found = asked.spoiling(Choice({}, {}, {}, float("inf")), {})
    assert set(found) == set(CONVS) and all("codes everywhere" in wish.reason for wish in found.values())


def test_a_prediction_needs_a_table(network: ir.Model) -> None:
    _, backend = find_target("cpu")
    samples = [runtime.synthetic_feeds(network, 0)]
    assert predict(None, backend, network, network, samples) is None
    same = predict(table(), backend, network, network, samples)
    assert same is not None and same.ratio == pytest.approx(1.0, abs=0.3) and same.reference > 0
