from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from qcompile.calib.collect import Statistics
from qcompile.calib.map_losses import Clip
from qcompile.calib.observers import Histogram, Observer
from qcompile.core import halves, numerics, packing
from qcompile.core.plan import Precision, QuantPlan, Role
from qcompile.core.target import OpKind, OpRule, Target
from qcompile.passes.allocate_bits import HEADROOM, allocate_bits, round_to_codes
from qcompile.passes.canonicalize.infer_shapes import InferShapes
from qcompile.passes.place import Wish, place

Build = Callable[..., Any]
INTEGER, FLOAT = ("integer", ""), "float"


def image(body: str, outputs: str = "float[1,4,6,6] y") -> str:
    return f"(float[1,3,6,6] x) => ({outputs}) {{ [conv] c = Conv <pads = [1,1,1,1]> (x, w) {body} }}"


def rows(body: str, inputs: str = "float[1,8] x", outputs: str = "float[1,8] y") -> str:
    return f"({inputs}) => ({outputs}) {{ {body} }}"


@pytest.mark.parametrize(
    ("op", "shape", "axis"),
    [("MatMul (x, m)", (8, 8), 1), ("Gemm (x, m)", (8, 8), 1), ("Gemm <transB = 1> (x, m)", (8, 8), 0)],
)
def test_weights_have_a_scale_per_output_channel(
    op: str, shape: tuple[int, int], axis: int, m: np.ndarray, model_of: Build, quantized: Build
) -> None:
    quant = quantized(model_of(rows(f"y = {op}"), m=m)).plan.tensors["m"]
    assert (quant.role, quant.dtype, quant.axis, set(quant.zero_point)) == (Role.WEIGHT, "int8", axis, {0})
    expected = np.abs(m).max(axis=1 - axis) / np.float64(127)
    np.testing.assert_array_equal(quant.scales, expected.astype(np.float32))


def test_scales_of_many_channels_have_eleven_digits(model_of: Build, quantized: Build) -> None:
    weights = np.random.default_rng(0).normal(size=(8, halves.FEWEST)).astype(np.float32)
    text = f"(float[1,8] x) => (float[1,{halves.FEWEST}] y) {{ y = MatMul (x, m) }}"
    quant = quantized(model_of(text, m=weights)).plan.tensors["m"]
    finest = (np.abs(weights).max(axis=0) / np.float64(127)).astype(np.float32)
    assert halves.packed(quant.scales) is not None and halves.packed(finest) is None
    assert np.all(quant.scales >= finest) and np.all(quant.scales <= finest * (1.0 + 2.0**-10))


def test_a_target_may_want_one_scale(m: np.ndarray, eager: Target, model_of: Build, quantized: Build) -> None:
    quant = quantized(model_of(rows("y = MatMul (x, m)"), m=m), replace(eager, per_channel=False)).plan.tensors["m"]
    assert quant.axis is None
    np.testing.assert_array_equal(quant.scales, [np.float32(np.abs(m).max() / np.float64(127))])


def test_a_single_channel_is_per_tensor(model_of: Build, quantized: Build) -> None:
    text = "(float[1,8] x) => (float[1,1] y) { y = MatMul (x, m) }"
    quant = quantized(model_of(text, m=np.arange(8, dtype=np.float32).reshape(8, 1))).plan.tensors["m"]
    assert quant.axis is None and quant.scale == (float(np.float32(7 / 127)),)


def test_ranges_come_from_the_statistics_and_the_observer(
    m: np.ndarray, eager: Target, model_of: Build, decided: Build
) -> None:
    model = model_of(rows("a = Exp (x) y = MatMul (a, m)"), m=m)
    decided(model)
    placement = place(model, eager, weights=True, activations=True)
    histogram = Histogram()
    histogram.add(np.append(np.random.default_rng(0).standard_normal(50_000), 500).astype(np.float32))
    statistics = Statistics({"a": histogram}, 1)
    scales = {}
    for observer in sorted(set(Observer) - {Observer.DYNAMIC}):
        (scales[observer],) = allocate_bits(model, placement, statistics, eager, {"a": observer}).tensors["a"].scale
    expected, _ = numerics.affine_scale(np.float64([histogram.low]), np.float64([500]), "uint8")
    assert scales[Observer.MINMAX] == expected[0]
    assert scales[Observer.PERCENTILE] < scales[Observer.MINMAX] / 10
    assert scales[Observer.MSE] <= scales[Observer.MINMAX]


def test_a_dynamic_range_needs_no_statistics_and_is_given_where_the_kernel_takes_one(
    m: np.ndarray, eager: Target, model_of: Build, decided: Build
) -> None:
    text = rows("a = Exp (x) t = MatMul (a, m) g = Gemm (t, m) s = Softmax (g) y = MatMul (s, m)")
    model = model_of(text, m=m)
    decided(model)
    placement = place(model, eager, weights=True, activations=True)
    assert placement.dynamic == {"a", "s"} and set(placement.activations) == {"a", "t", "s"}
    histogram = Histogram()
    histogram.add(np.float32([-1, 1]))
    observers = dict.fromkeys(placement.activations, Observer.DYNAMIC)
    tensors = allocate_bits(model, placement, Statistics({"t": histogram}, 1), eager, observers).tensors
    assert [name for name, quant in tensors.items() if quant.is_dynamic] == ["a", "s"]
    measured = allocate_bits(model, placement, Statistics({"t": histogram}, 1), eager,
                             {**observers, "t": Observer.MINMAX}).tensors  # fmt: skip
    assert measured == tensors


def test_a_recurrent_operator_stores_both_its_weights_by_gate_and_unit(model_of: Build, quantized: Build) -> None:
    generator = np.random.default_rng(5)
    weights = {name: generator.normal(size=(1, 16, 4)).astype(np.float32) for name in ("w", "r")}
    text = "(float[3,2,4] x) => (float[3,1,2,4] y) { [lstm] y = LSTM <hidden_size = 4> (x, w, r) }"
    result = quantized(model_of(text, **weights))
    assert result.ops == {"lstm": ("weight_only", "cpu runs it in float")}
    assert {name: (quant.axis, len(quant.scale)) for name, quant in result.plan.tensors.items()} == {
        "w": (1, 16), "r": (1, 16),
    }  # fmt: skip
    kept = quantized(model_of(text, **weights), wishes={"lstm": Wish(Precision.FLOAT, "asked")})
    assert not kept.plan.tensors
    open_weights = text.replace("(float[3,2,4] x)", "(float[3,2,4] x, float[1,16,4] w)")
    given = quantized(model_of(open_weights, r=weights["r"]))
    assert given.ops == {"lstm": ("weight_only", "cpu runs it in float")} and set(given.plan.tensors) == {"r"}
    both = quantized(model_of(open_weights.replace("[1,16,4] w)", "[1,16,4] w, float[1,16,4] r)")))
    assert both.ops == {"lstm": ("float", "its weights are no float32 constants")}


def test_a_table_that_is_sliced_is_stored_by_column(model_of: Build, quantized: Build, random: Any) -> None:
    text = "(float[1,4,8] x) => (float[1,4,8] y) { [cut] p = Slice (t, zero, n, one) y = Add (x, p) }"
    constants = {
        "t": random.normal(size=(1, 16, 8)).astype(np.float32),
        "zero": np.int64([0]),
        "n": np.int64([4]),
        "one": np.int64([1]),
    }
    result = quantized(model_of(text, 21, **constants))
    assert result.ops["cut"] == ("weight_only", "cpu runs it in float")
    assert {name: (q.axis, len(q.scale)) for name, q in result.plan.tensors.items()} == {"t": (2, 8)}
    shared = text.replace("y = Add (x, p)", "s = Add (x, p) r = ReduceSum (t) y = Add (s, r)")
    assert quantized(model_of(shared, 21, **constants)).ops["cut"] == (
        "float", "its constants are read by another operator too",
    )  # fmt: skip


def test_wide_weights_only_where_all_that_read_them_are_wide(m: np.ndarray, model_of: Build, quantized: Build) -> None:
    text, wide = rows("[a] t = MatMul (x, m) [b] y = MatMul (t, m)"), Wish(Precision.WEIGHT_ONLY, "asked", wide=True)
    assert quantized(model_of(text, 21, m=m), wishes={"a": wide}).plan.tensors["m"].dtype == "int8"
    both = quantized(model_of(text, 21, m=m), wishes={"a": wide, "b": wide})
    assert both.plan.tensors["m"].dtype == "int16"
    error = np.abs(both.plan.tensors["m"].dequantize(both.plan.tensors["m"].quantize(m)) - m)
    assert error.max() <= np.abs(m).max() / 32767 / 2 * 1.01


def test_without_a_wider_type_weights_stay_float(
    m: np.ndarray, eager: Target, model_of: Build, quantized: Build
) -> None:
    wide = {"a": Wish(Precision.WEIGHT_ONLY, "asked", wide=True)}
    narrow = replace(eager, wide_weight_dtype="")
    result = quantized(model_of(rows("[a] y = MatMul (x, m)"), m=m), narrow, wishes=wide)
    assert result.ops == {"a": ("float", "asked")} and not result.plan.tensors


def test_weights_shared_by_two_operators_along_one_axis(m: np.ndarray, model_of: Build, quantized: Build) -> None:
    result = quantized(model_of(rows("[a] t = MatMul (x, m) [b] y = MatMul (t, m)"), m=m))
    assert result.ops == {"a": INTEGER, "b": INTEGER}
    assert result.plan.tensors["m"].axis == 1


def test_weights_shared_along_two_axes_serve_the_first(m: np.ndarray, model_of: Build, quantized: Build) -> None:
    result = quantized(model_of(rows("[a] t = Gemm (x, m) [b] y = Gemm <transB = 1> (t, m)"), m=m))
    assert result.ops == {"a": INTEGER, "b": (FLOAT, "weights 'm' are shared along another axis")}
    assert result.plan.tensors["m"].axis == 1


def bias_codes(result: Any, node: str) -> np.ndarray:
    array: np.ndarray = result.model.graph.initializers[f"{node}_bias_quantized"].const_value.numpy()
    return array


def test_a_bias_fits_int32_whatever_the_weights(w: np.ndarray, model_of: Build, quantized: Build) -> None:
    text = image("y = Relu (c)").replace("(x, w)", "(x, w, b)")
    w[1] *= np.float32(1e-12)
    b = np.float32([0.5, 3.0, -2.0, 1.0])
    result = quantized(model_of(text, w=w, b=b))
    codes = bias_codes(result, "conv")
    assert np.abs(codes.astype(np.int64)).max() < 2**31 - 1
    quant = result.plan.tensors["w"]
    step = np.float64(result.plan.tensors["x"].scale[0]) * quant.scales
    assert np.all(np.abs(codes * step - b) <= step / 2 + 1e-7 * np.abs(b))
    untouched = np.abs(w).reshape(4, -1).max(axis=1) / np.float64(127)
    np.testing.assert_array_equal(quant.scales[[0, 2, 3]], untouched.astype(np.float32)[[0, 2, 3]])


def test_one_scale_for_all_channels_has_room_for_every_bias(
    w: np.ndarray, eager: Target, model_of: Build, quantized: Build
) -> None:
    text = image("y = Relu (c)").replace("(x, w)", "(x, w, b)")
    model = model_of(text, w=w * np.float32(1e-12), b=np.float32([0.5, 3.0, -2.0, 1.0]))
    codes = bias_codes(quantized(model, replace(eager, per_channel=False)), "conv").astype(np.int64)
    assert np.abs(codes).max() == pytest.approx(2**30, rel=1e-3)


@pytest.mark.parametrize("size", [0.0, 1e-40, 1e-37])
def test_the_bias_of_a_dead_channel_keeps_its_digits(
    size: float, w: np.ndarray, model_of: Build, quantized: Build
) -> None:
    # Folding a normalization whose gain is zero leaves such channels: all that they compute is their bias.
    text = image("y = Relu (c)").replace("(x, w)", "(x, w, b)")
    w[2] = size
    b = np.float32([0.5, 3.0, 0.0123, 0.0])
    result = quantized(model_of(text, w=w, b=b))
    step = np.float64(result.plan.tensors["x"].scale[0]) * result.plan.tensors["w"].scales
    assert bias_codes(result, "conv")[2] * step[2] == pytest.approx(0.0123, rel=1e-5)


def test_a_dead_channel_without_bias(w: np.ndarray, model_of: Build, quantized: Build) -> None:
    text = image("y = Relu (c)").replace("(x, w)", "(x, w, b)")
    w[2] = 0
    result = quantized(model_of(text, w=w, b=np.float32([0.5, 3.0, 0.0, 1.0])))
    assert bias_codes(result, "conv")[2] == 0
    assert np.all(np.isfinite(1 / result.plan.tensors["w"].scales))


def test_weights_shared_by_two_operators_leave_room_for_both_biases(
    w: np.ndarray, model_of: Build, quantized: Build
) -> None:
    text = """(float[1,3,6,6] x) => (float[1,4,6,6] y, float[1,4,6,6] z) {
        [a] c = Conv <pads = [1,1,1,1]> (x, w, large)
        [b] d = Conv <pads = [1,1,1,1]> (x, w, small)
        y = Relu (c)
        z = Relu (d)
    }"""
    biases = {"large": np.float32([1, 2, 3, 4]), "small": np.float32([1, 2, 3, 4]) / 1000}
    result = quantized(model_of(text, w=w * np.float32(1e-12), **biases))
    for node in "ab":
        assert np.abs(bias_codes(result, node).astype(np.int64)).min() > 0
        assert np.abs(bias_codes(result, node).astype(np.int64)).max() < 2**31 - 1


@pytest.mark.parametrize(("high", "expected"), [(3.0, 6.0), (30.0, 30.0 + HEADROOM), (60.0, 60.0)])
def test_scores_have_room_above_those_that_were_seen(
    high: float, expected: float, m: np.ndarray, eager: Target, model_of: Build
) -> None:
    low = -6.0 if expected == 6.0 else -50.0
    model = model_of(rows("[gemm] s = Gemm (x, m) [softmax] y = Softmax (s)"), m=m)
    InferShapes()(model)
    rules = {**eager.ops, "Gemm": OpRule(OpKind.LINEAR), "Softmax": OpRule(OpKind.ELEMENTWISE)}
    target = replace(eager, ops=rules, integer_only=True)
    placement = place(model, target, True, True)
    seen = Statistics({name: histogram_of(low, high) for name in placement.activations})
    observers = dict.fromkeys(placement.activations, Observer.MINMAX)
    tensors = allocate_bits(model, placement, seen, target, observers).tensors
    assert tensors["s"].scale[0] == np.float32((expected - low) / 255)
    assert tensors["y"].scale[0] == tensors["x"].scale[0] == np.float32((high - low) / 255)
    floats = allocate_bits(model, placement, seen, replace(target, integer_only=False), observers).tensors
    assert floats["s"].scale[0] == np.float32((high - low) / 255)


def histogram_of(low: float, high: float) -> Histogram:
    histogram = Histogram()
    histogram.add(np.array([low, 0.0, high], np.float32))
    return histogram


def test_an_activation_has_four_bits_where_it_is_asked_for(
    model_of: Build, quantized: Build, eager: Target, m: np.ndarray
) -> None:
    text = rows("a = MatMul (x, m) b = Relu (a) y = MatMul (b, m)")
    found = quantized(model_of(text, m=m))
    model, plan = found.float_model, found.plan
    target = replace(eager, activation_dtype="int8")
    histogram = Histogram()
    histogram.add(np.append(np.linspace(0.0, 1.0, 10_000), 40.0).astype(np.float32))
    statistics = Statistics(dict.fromkeys(found.placement.activations, histogram), 1)
    wide = dict.fromkeys(found.placement.activations, Observer.MINMAX)
    name = found.placement.activations[0]
    eight = allocate_bits(model, found.placement, statistics, target, wide).tensors
    four = allocate_bits(model, found.placement, statistics, target, wide, narrow={name: Clip(Observer.MSE)}).tensors
    assert (eight[name].dtype, four[name].dtype, four[name].zero_point, four[name].bits) == ("int8", "int4", (-8,), 4)
    # The range is chosen anew: fifteen steps up to one value far away would leave all others two codes.
    assert four[name].scale[0] * 15 < 40.0 / 2 < eight[name].scale[0] * 255
    assert {other for other in eight if eight[other] != four[other]} == {name}
    assert plan.tensors.keys() == four.keys()


def test_codes_that_a_kernel_multiplies_by_lie_around_zero(eager: Target, model_of: Build) -> None:
    model = model_of("(float[2,4,4] x, float[2,4,4] u) => (float[2,4,4] y) { [product] y = MatMul (x, u) }")
    products = OpRule(OpKind.LINEAR, quantized_output=False, activations=True)
    target = replace(eager, ops={**eager.ops, "MatMul": products}, activation_dtype="int8", integer_only=True)
    placement = place(model, target, True, True)
    seen = Statistics({name: histogram_of(-1.0, 4.0) for name in placement.activations})
    tensors = allocate_bits(model, placement, seen, target, dict.fromkeys("xu", Observer.MINMAX)).tensors
    assert (tensors["u"].scale[0], tensors["u"].zero_point[0]) == (np.float32(4.0 / 127), 0)
    assert (tensors["x"].scale[0], tensors["x"].zero_point[0]) == (np.float32(5.0 / 255), -77)


def planned_in_four_bits(model: Any, target: Target, only_weights: bool = False) -> QuantPlan:
    InferShapes()(model)
    placement = place(model, target, True, not only_weights)
    data = Statistics({name: histogram_of(-1.0, 4.0) for name in placement.activations})
    return allocate_bits(
        model, placement, data, target, dict.fromkeys(placement.activations, Observer.MINMAX), {"m": 4}
    )


@pytest.mark.parametrize("only_weights", [True, False])
@pytest.mark.parametrize("narrow", ["", "int4"])
def test_weights_in_four_bits_are_packed_or_have_a_type(
    narrow: str, only_weights: bool, eager: Target, m: np.ndarray, model_of: Build
) -> None:
    """A type of four bits is for kernels: an operator in float takes what a block has in common into its scale."""
    model = model_of(rows("[a] y = MatMul (x, m)"), m=m)
    quant = planned_in_four_bits(model, replace(eager, narrow_weight_dtype=narrow), only_weights).tensors["m"]
    codes = quant.quantize(m)
    if narrow and not only_weights:
        assert (quant.dtype, quant.block_size, quant.bits) == ("int4", 0, 4.0)
        assert codes.min() >= -8 and codes.max() <= 7
    else:
        assert (quant.dtype, quant.block_size, quant.bits) == ("int8", packing.BLOCK, packing.BITS)
        column = codes[:, 0]
        assert any(all(c % n == 0 and -8 <= c // n <= 7 for c in column) for n in range(1, packing.MOST + 1))
    assert np.abs(quant.dequantize(codes) - m).max() < np.abs(m).max() / 7


def test_weights_as_their_codes_will_be(m: np.ndarray, model_of: Build, quantized: Build) -> None:
    result = quantized(model_of(rows("[a] t = MatMul (x, m) [b] y = MatMul (t, n)"), m=m, n=m[:, :8] * 3))
    before = result.float_model.graph.initializers["m"].const_value.numpy().copy()
    rounded = round_to_codes(result.float_model, result.plan)
    for name in ("m", "n"):
        quant, old = (result.plan.tensors[name], result.float_model.graph.initializers[name].const_value.numpy())
        found = rounded.graph.initializers[name].const_value.numpy()
        np.testing.assert_array_equal(found, quant.dequantize(quant.quantize(old)))
        assert not np.array_equal(found, old)
    np.testing.assert_array_equal(result.float_model.graph.initializers["m"].const_value.numpy(), before)
