from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from qcompile.calib.collect import Statistics
from qcompile.calib.observers import Histogram, Observer
from qcompile.core import numerics
from qcompile.core.plan import Role
from qcompile.core.target import OpKind, OpRule, Target
from qcompile.passes.allocate_bits import FEWEST_ROWS, allocate_bits, place

Build = Callable[..., Any]
NOT_ABSORBED = "not absorbed by the operator in front of it"
INTEGER, FLOAT, WEIGHT_ONLY = ("integer", ""), "float", "weight_only"


@pytest.fixture
def w() -> np.ndarray:
    return np.random.default_rng(1).standard_normal((4, 3, 3, 3)).astype(np.float32)


@pytest.fixture
def m() -> np.ndarray:
    return np.random.default_rng(2).standard_normal((8, 8)).astype(np.float32)


def image(body: str, outputs: str = "float[1,4,6,6] y") -> str:
    return f"(float[1,3,6,6] x) => ({outputs}) {{ [conv] c = Conv <pads = [1,1,1,1]> (x, w) {body} }}"


def rows(body: str, inputs: str = "float[1,8] x", outputs: str = "float[1,8] y") -> str:
    return f"({inputs}) => ({outputs}) {{ {body} }}"


def test_a_conv_and_the_relu_behind_it(w: np.ndarray, model_of: Build, quantized: Build) -> None:
    result = quantized(model_of(image("[relu] y = Relu (c)"), w=w))
    assert result.ops == {"conv": INTEGER, "relu": ("integer", "absorbed by Conv 'conv'")}
    assert result.placement.activations == ("x", "y")
    assert set(result.plan.tensors) == {"x", "y", "w"}
    assert result.plan.ops["conv"].output == "y"
    assert result.plan.tensors["y"].zero_point == (0,)


@pytest.mark.parametrize(("low", "high", "absorbed"), [(0, 6, True), (0, 1, True), (-1, 1, False)])
def test_a_clip_behind_a_conv(
    low: float, high: float, absorbed: bool, w: np.ndarray, model_of: Build, quantized: Build
) -> None:
    bounds = {"low": np.float32(low), "high": np.float32(high)}
    result = quantized(model_of(image("[clip] y = Clip (c, low, high)"), w=w, **bounds))
    if absorbed:
        assert result.ops["clip"] == ("integer", "absorbed by Conv 'conv'")
        assert result.placement.activations == ("x", "y")
    else:
        assert result.ops["clip"] == (FLOAT, NOT_ABSORBED)
        assert result.placement.activations == ("x", "c")


def test_a_relu_whose_conv_has_a_second_reader_stays(w: np.ndarray, model_of: Build, quantized: Build) -> None:
    text = image("[relu] y = Relu (c) [tanh] z = Tanh (c)", "float[1,4,6,6] y, float[1,4,6,6] z")
    result = quantized(model_of(text, w=w))
    assert result.ops == {
        "conv": INTEGER, "relu": (FLOAT, NOT_ABSORBED), "tanh": (FLOAT, "cpu has no integer Tanh"),
    }  # fmt: skip
    assert result.placement.activations == ("x", "c")


def test_a_relu_whose_conv_is_a_graph_output_stays(w: np.ndarray, model_of: Build, quantized: Build) -> None:
    result = quantized(model_of(image("[relu] y = Relu (c)", "float[1,4,6,6] y, float[1,4,6,6] c"), w=w))
    assert result.plan.ops["conv"].output == "c" and result.ops["relu"][0] == FLOAT


def test_gemm_and_matmul_leave_in_float(m: np.ndarray, model_of: Build, quantized: Build) -> None:
    result = quantized(model_of(rows("[mm] t = MatMul (x, v) [gemm] y = Gemm (t, m)"), v=m, m=m.T.copy()))
    assert result.ops == {"mm": INTEGER, "gemm": INTEGER}
    assert [result.plan.ops[name].output for name in ("mm", "gemm")] == ["", ""]
    assert result.placement.activations == ("x", "t")


@pytest.mark.parametrize(
    ("text", "weights", "reason"),
    [
        (rows("[n] y = MatMul (x, v)", "float[1,8] x, float[8,8] v"), "", "both operands are activations"),
        (rows("[n] y = Gemm (x, v)", "float[1,8] x, float[8,8] v"), "", "its weights are not constant"),
        (rows("[n] y = MatMul (x, m)", "double[1,8] x", "double[1,8] y"), "f8", "its weights are double, not float32"),
        (rows("[n] y = MatMul (x, m)", "float[2,1,8] x", "float[2,1,8] y"), "3d", "its weights have 3 axes"),
        (rows("[n] t = MatMul (k, m) y = Add (x, t)"), "k", "it computes on constants only"),
        (
            rows("[n] y = Gemm <transA = 1> (x, m)", "float[8,1] x"),
            "m",
            "Gemm with transA or alpha has no integer kernel",
        ),
        (rows("[n] y = Gemm <alpha = 0.5> (x, m)"), "m", "Gemm with transA or alpha has no integer kernel"),
        (rows("[n] y = Gemm <beta = 0.5> (x, m, b)"), "b", "Gemm with beta has no integer kernel"),
        (rows("[n] y = Gemm (x, m, v)", "float[1,8] x, float[8] v"), "m", "its bias is not a constant per channel"),
        (rows("[n] y = Gemm (x, m, one)"), "one", "its bias is not a constant per channel"),
        (rows("[n] y = Softmax (x)"), "", "cpu has no integer Softmax"),
        (rows("[n] y = Add (x, x)"), "", "not between integer operators"),
        (rows("[n] y = Flatten (x)"), "", "not between integer operators"),
    ],
)
def test_why_an_operator_stays_in_float(
    text: str, weights: str, reason: str, m: np.ndarray, model_of: Build, decided: Build
) -> None:
    parameters = {
        "": {},
        "m": {"m": m},
        "f8": {"m": m.astype(np.float64)},
        "3d": {"m": np.stack([m, m])},
        "k": {"m": m, "k": m[:1]},
        "b": {"m": m, "b": m[0]},
        "one": {"m": m, "one": np.ones(1, np.float32)},
    }[weights]
    assert decided(model_of(text, **parameters))["n"] == (FLOAT, reason)


def test_a_target_may_leave_small_operators_in_float(
    m: np.ndarray, eager: Target, model_of: Build, decided: Build
) -> None:
    text = rows("[small] t = MatMul (x, m) [large] y = MatMul (t, n)", outputs="float[1,9] y")
    model = model_of(text, m=m, n=np.ones((8, 9), np.float32))
    target = replace(eager, ops={"MatMul": replace(eager.ops["MatMul"], fewest_weights=65)})
    ops = decided(model, target)
    assert ops == {"small": (FLOAT, "its 64 weights are too few to gain from integers"), "large": INTEGER}


def test_a_gemm_without_bias_may_have_any_beta(m: np.ndarray, model_of: Build, decided: Build) -> None:
    assert decided(model_of(rows("[n] y = Gemm <beta = 0.5> (x, m)"), m=m))["n"] == INTEGER


def test_weights_that_a_caller_may_replace_are_not_constant(m: np.ndarray, model_of: Build, decided: Build) -> None:
    model = model_of(rows("[n] y = Gemm (x, m)", "float[1,8] x, float[8,8] m"), m=m)
    assert decided(model)["n"] == (FLOAT, "its weights are an input with a default, which a caller may replace")


def test_an_operator_of_another_domain_stays(m: np.ndarray, proto_of: Build, decided: Build) -> None:
    model = ir.from_proto(proto_of(rows("[n] y = MatMul (x, m)"), m=m))
    model.opset_imports["com.example"] = 1
    model.graph[0].domain = "com.example"
    model.graph[0].outputs[0].dtype = ir.DataType.FLOAT
    assert decided(model)["n"] == (FLOAT, "cpu has no integer MatMul")


def test_inside_a_subgraph_operators_stay(m: np.ndarray, model_of: Build, decided: Build) -> None:
    text = """(bool b, float[1,8] x) => (float[1,8] y) {
        [if] y = If (b) <then_branch = t () => (float[1,8] p) { [inner] p = MatMul (x, m) },
                         else_branch = e () => (float[1,8] q) { [add] q = Add (x, x) }>
    }"""
    assert decided(model_of(text, m=m)) == {
        "if": (FLOAT, "cpu has no integer If"),
        "inner": (FLOAT, "it stands inside a subgraph"),
        "add": (FLOAT, "it stands inside a subgraph"),
    }


@pytest.mark.parametrize("kind", ["MatMul", "Conv", "Gemm"])
def test_weights_alone(kind: str, w: np.ndarray, m: np.ndarray, model_of: Build, quantized: Build) -> None:
    model = model_of(image("y = Relu (c)"), w=w) if kind == "Conv" else model_of(rows(f"[conv] y = {kind} (x, m)"), m=m)
    result = quantized(model, activations=False)
    assert result.ops["conv"] == (WEIGHT_ONLY, "activations stay in float")
    assert result.placement.activations == ()
    assert {quant.role for quant in result.plan.tensors.values()} == {Role.WEIGHT}


def test_neither_weights_nor_activations(w: np.ndarray, model_of: Build, quantized: Build) -> None:
    result = quantized(model_of(image("y = Relu (c)"), w=w), weights=False)
    assert result.ops["conv"] == (FLOAT, "weights stay in float as asked")
    assert result.plan.tensors == {}


def test_a_target_without_weight_only_kernels(w: np.ndarray, eager: Target, model_of: Build, decided: Build) -> None:
    target = replace(eager, ops={"Conv": OpRule(OpKind.LINEAR)})
    assert decided(model_of(image("y = Relu (c)"), w=w), target, activations=False)["conv"][0] == FLOAT


RESIDUAL = image(
    """[relu] r = Relu (c)
    [second] d = Conv <pads = [1,1,1,1]> (r, v)
    [add] a = Add (r, d)
    [last] s = Relu (a)
    [third] y = Conv <pads = [1,1,1,1]> (s, v)"""
)


def test_an_add_between_integer_operators_is_taken_in(w: np.ndarray, model_of: Build, quantized: Build) -> None:
    v = np.random.default_rng(3).standard_normal((4, 4, 3, 3)).astype(np.float32)
    result = quantized(model_of(RESIDUAL, w=w, v=v))
    assert result.ops == {
        "conv": INTEGER, "relu": ("integer", "absorbed by Conv 'conv'"), "second": INTEGER, "add": INTEGER,
        "last": ("integer", "absorbed by Add 'add'"), "third": INTEGER,
    }  # fmt: skip
    assert result.plan.ops["add"].output == "s"
    assert result.placement.activations == ("x", "r", "d", "s", "y")


def test_an_add_that_no_integer_operator_reads_is_given_back(w: np.ndarray, model_of: Build, quantized: Build) -> None:
    v = np.random.default_rng(3).standard_normal((4, 4, 3, 3)).astype(np.float32)
    text = RESIDUAL.replace("[third] y = Conv <pads = [1,1,1,1]> (s, v)", "[soft] y = Softmax (s)")
    result = quantized(model_of(text, w=w, v=v))
    assert result.ops["add"] == (FLOAT, "no integer operator reads its result")
    assert result.ops["last"] == (FLOAT, NOT_ABSORBED)
    assert result.ops["second"] == INTEGER


def test_a_chain_that_ends_in_float_is_given_back_to_its_start(w: np.ndarray, model_of: Build, decided: Build) -> None:
    text = image("[a] a = MaxPool <kernel_shape = [2,2]> (c) [b] b = GlobalAveragePool (a) [s] y = Softmax (b)")
    ops = decided(model_of(text.replace("float[1,4,6,6] y", "float[1,4,1,1] y"), w=w))
    assert ops["a"] == ops["b"] == (FLOAT, "no integer operator reads its result")


def test_an_add_with_one_float_side_stays(w: np.ndarray, model_of: Build, decided: Build) -> None:
    text = image("[soft] s = Softmax (c) [add] a = Add (c, s) y = Conv <pads = [1,1,1,1]> (a, v)")
    v = np.ones((4, 4, 3, 3), np.float32)
    assert decided(model_of(text, w=w, v=v))["add"] == (FLOAT, "not between integer operators")


def test_an_add_of_a_constant_stays(w: np.ndarray, model_of: Build, decided: Build) -> None:
    text = image("[add] a = Add (c, k) y = Conv <pads = [1,1,1,1]> (a, v)")
    v, k = np.ones((4, 4, 3, 3), np.float32), np.ones((1, 4, 1, 1), np.float32)
    assert decided(model_of(text, w=w, v=v, k=k))["add"] == (FLOAT, "not between integer operators")


def test_operators_that_move_codes_share_the_scale_of_their_input(
    w: np.ndarray, m: np.ndarray, model_of: Build, quantized: Build
) -> None:
    text = image(
        """[relu] r = Relu (c)
        [pool] p = MaxPool <kernel_shape = [5,5]> (r)
        [turn] t = Transpose <perm = [0,2,3,1]> (p)
        [flat] f = Flatten (t)
        [gemm] y = Gemm (f, m)""",
        "float[1,8] y",
    )
    result = quantized(model_of(text, w=w, m=np.random.default_rng(0).standard_normal((16, 8)).astype(np.float32)))
    assert {name: ops[0] for name, ops in result.ops.items()} == dict.fromkeys(result.ops, "integer")
    assert result.placement.same_scale == {"p": "r", "t": "r", "f": "r"}
    assert result.placement.activations == ("x", "r")
    assert result.plan.tensors["p"] is result.plan.tensors["r"] is result.plan.tensors["f"]


def test_codes_are_moved_in_front_of_an_integer_operator(m: np.ndarray, model_of: Build, quantized: Build) -> None:
    text = rows("[turn] t = Transpose <perm = [1,0]> (x) [mm] y = MatMul (t, m)", "float[8,1] x")
    result = quantized(model_of(text, m=m))
    assert result.ops == {"turn": INTEGER, "mm": INTEGER}
    assert result.placement.same_scale == {"t": "x"} and result.placement.activations == ("x",)


@pytest.mark.parametrize(
    ("body", "outputs"),
    [
        ("[turn] t = Transpose <perm = [1,0]> (x) y = MatMul (t, m) z = Exp (t)", "float[1,8] y, float[1,8] z"),
        ("[turn] t = Transpose <perm = [1,0]> (x) y = MatMul (t, m)", "float[1,8] y, float[1,8] t"),
        ("[turn] t = Transpose <perm = [1,0]> (x) y = Exp (t)", "float[1,8] y"),
    ],
)
def test_codes_are_not_moved_where_somebody_wants_floats(
    body: str, outputs: str, m: np.ndarray, model_of: Build, decided: Build
) -> None:
    ops = decided(model_of(rows(body, "float[8,1] x", outputs), m=m))
    assert ops["turn"] == (FLOAT, "not between integer operators")


def test_activations_measured_are_those_that_integer_operators_read_or_write(
    m: np.ndarray, model_of: Build, quantized: Build
) -> None:
    result = quantized(model_of(rows("a = Exp (x) b = MatMul (a, m) c = Tanh (b) y = MatMul (c, m)"), m=m))
    assert result.placement.activations == ("a", "c")


def table(count: int, columns: int = 4) -> np.ndarray:
    return np.random.default_rng(4).standard_normal((count, columns)).astype(np.float32)


LOOKUP = "(int64[1,5] i) => (float[1,5,4] y) { [gather] g = Gather (t, i) y = Exp (g) }"


def test_a_large_table_is_stored_as_integers(model_of: Build, quantized: Build) -> None:
    result = quantized(model_of(LOOKUP, t=table(FEWEST_ROWS)))
    assert result.ops["gather"] == (WEIGHT_ONLY, "a table lookup: rows are dequantized")
    assert result.plan.tensors["t"].axis == 1 and len(result.plan.tensors["t"].scale) == 4


@pytest.mark.parametrize(
    ("text", "count", "reason"),
    [
        (LOOKUP, FEWEST_ROWS - 1, "its table is too small to be worth scales"),
        (
            LOOKUP.replace("(t, i)", "<axis = 1> (t, i)").replace("[1,5,4]", "[A,B,C]"),
            300,
            "its table is not float32 rows",
        ),
        (LOOKUP.replace("y = Exp (g)", "u = Exp (t) y = Exp (g)"), 300, "its table is read by another operator too"),
        (
            LOOKUP.replace("[1,5] i)", "[1,5] i, float[300,4] v)").replace("(t, i)", "(v, i)"),
            300,
            "it picks from an activation",
        ),
    ],
)
def test_tables_that_stay_in_float(text: str, count: int, reason: str, model_of: Build, decided: Build) -> None:
    assert decided(model_of(text, t=table(count)))["gather"] == (FLOAT, reason)


def test_a_table_of_integers_stays(model_of: Build, decided: Build) -> None:
    text = "(int64[5] i) => (int64[5,4] y) { [gather] y = Gather (t, i) }"
    ops = decided(model_of(text, t=table(300).astype(np.int64)))
    assert ops["gather"] == (FLOAT, "its table is not float32 rows")


def test_two_lookups_in_one_table_stay(model_of: Build, decided: Build) -> None:
    text = "(int64[5] i) => (float[5,4] y) { [a] g = Gather (t, i) [b] h = Gather (t, i) y = Add (g, h) }"
    ops = decided(model_of(text, t=table(300)))
    assert ops["a"] == ops["b"] == (FLOAT, "its table is read by another operator too")


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
    for observer in Observer:
        one = allocate_bits(model, placement, statistics, eager, observer).tensors["a"]
        assert one == allocate_bits(model, placement, statistics, eager, {"a": observer}).tensors["a"]
        scales[observer] = one.scale[0]
    expected, _ = numerics.affine_scale(np.float64([histogram.low]), np.float64([500]), "uint8")
    assert scales[Observer.MINMAX] == expected[0]
    assert scales[Observer.PERCENTILE] < scales[Observer.MINMAX] / 10
    assert scales[Observer.MSE] <= scales[Observer.MINMAX]


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
