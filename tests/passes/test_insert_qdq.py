from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from qcompile.core import model as models
from qcompile.core import numerics, runtime
from qcompile.core.plan import OpPlan, Precision, QuantPlan, Role, TensorQuant
from qcompile.core.target import Target
from qcompile.passes.canonicalize import Canonicalize
from qcompile.passes.insert_qdq import InsertQdq, dequantized_name, quantized_name

Build = Callable[..., Any]


def random_weights(**shapes: tuple[int, ...]) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(7)
    return {name: generator.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def types(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


CONV = "(float[1,3,6,6] x) => (float[1,4,6,6] y) { [conv] c = Conv <pads = [1,1,1,1]> (x, w, b) y = Relu (c) }"
SHAPES = {"w": (4, 3, 3, 3), "b": (4,)}

# name: text, weights, and the kernels that ONNX Runtime is to make of it
PATTERNS: dict[str, tuple[str, dict[str, tuple[int, ...]], list[str]]] = {
    "conv": (CONV, SHAPES, ["QLinearConv"]),
    "conv_without_bias": (CONV.replace(", b)", ")"), {"w": (4, 3, 3, 3)}, ["QLinearConv"]),
    "conv_without_relu": (CONV.replace("Relu", "Softmax"), SHAPES, ["QLinearConv", "Softmax"]),
    "conv_and_clip": (
        CONV.replace("Relu (c)", "Clip (c, low, high)"), SHAPES | {"low": (), "high": ()}, ["QLinearConv"],
    ),
    "conv_and_clip_from_minus_one": (
        CONV.replace("Relu (c)", "Clip (c, minus, high)"), SHAPES | {"minus": (), "high": ()}, ["QLinearConv", "Clip"],
    ),
    "depthwise": (
        CONV.replace("[1,3,6,6]", "[1,4,6,6]").replace("<pads", "<group = 4, pads"), SHAPES | {"w": (4, 1, 3, 3)},
        ["QLinearConv"],
    ),
    "gemm": ("(float[2,8] x) => (float[2,5] y) { y = Gemm (x, w, b) }", {"w": (8, 5), "b": (5,)}, ["QGemm"]),
    "gemm_transposed": (
        "(float[2,8] x) => (float[2,5] y) { y = Gemm <transB = 1> (x, w, b) }", {"w": (5, 8), "b": (5,)}, ["QGemm"],
    ),
    "matmul": (
        "(float[2,3,8] x) => (float[2,3,5] y) { y = MatMul (x, w) }", {"w": (8, 5)}, ["MatMulIntegerToFloat"],
    ),
    "add": (
        """(float[1,3,6,6] x) => (float[1,4,6,6] y) {
            c = Conv <pads = [1,1,1,1]> (x, w, b)
            r = Relu (c)
            d = Conv <pads = [1,1,1,1]> (r, v)
            a = Add (r, d)
            s = Relu (a)
            e = Conv <pads = [1,1,1,1]> (s, v)
            y = Relu (e)
        }""",
        SHAPES | {"v": (4, 4, 3, 3)},
        ["QLinearConv", "QLinearConv", "QLinearAdd", "QLinearConv"],
    ),
    "concat": (
        """(float[1,3,6,6] x) => (float[1,4,6,6] y) {
            c = Conv <pads = [1,1,1,1]> (x, w, b)
            d = Conv <pads = [1,1,1,1]> (x, w)
            a = Concat <axis = 1> (c, d)
            e = Conv <pads = [1,1,1,1]> (a, v)
            y = Relu (e)
        }""",
        SHAPES | {"v": (4, 8, 3, 3)},
        ["QLinearConv", "QLinearConv", "QLinearConcat", "QLinearConv"],
    ),
    "average_pool": (
        """(float[1,3,6,6] x) => (float[1,5] y) {
            c = Conv <pads = [1,1,1,1]> (x, w, b)
            r = Relu (c)
            p = AveragePool <kernel_shape = [2,2], strides = [2,2]> (r)
            f = Flatten (p)
            y = Gemm (f, v)
        }""",
        SHAPES | {"v": (36, 5)},
        ["QLinearConv", "QLinearAveragePool", "Flatten", "QGemm"],
    ),
    "global_average_pool": (
        """(float[1,3,8,8] x) => (float[1,5] y) {
            c = Conv <pads = [1,1,1,1]> (x, w, b)
            r = Relu (c)
            p = GlobalAveragePool (r)
            f = Flatten (p)
            y = Gemm (f, v)
        }""",
        SHAPES | {"v": (4, 5)},
        ["QLinearConv", "QLinearGlobalAveragePool", "Flatten", "QGemm"],
    ),
    "moved_codes": (
        """(float[1,3,6,6] x) => (float[1,5] y) {
            c = Conv <pads = [1,1,1,1]> (x, w, b)
            r = Relu (c)
            p = MaxPool <kernel_shape = [2,2], strides = [2,2]> (r)
            t = Transpose <perm = [0,2,3,1]> (p)
            f = Reshape (t, shape)
            y = Gemm (f, v)
        }""",
        SHAPES | {"v": (36, 5), "shape": (2,)},
        ["QLinearConv", "MaxPool", "Reshape", "QGemm"],
    ),
    "unsqueezed_codes": (
        """(float[2,8] x) => (float[2,5] y) {
            u = Unsqueeze (x, axis)
            s = Squeeze (u, axis)
            y = MatMul (s, w)
        }""",
        {"w": (8, 5), "axis": (1,)},
        ["Unsqueeze", "Squeeze", "MatMulIntegerToFloat"],
    ),
}  # fmt: skip


def pattern(name: str, model_of: Build) -> tuple[ir.Model, list[str]]:
    text, shapes, kernels = PATTERNS[name]
    weights = random_weights(**shapes)
    constants = {
        "low": np.float32(0), "high": np.float32(6), "minus": np.float32(-1), "shape": np.int64([1, -1]),
        "axis": np.int64([0]),
    }  # fmt: skip
    weights |= {key: value for key, value in constants.items() if key in weights}
    return model_of(text, 21, **weights), kernels


@pytest.mark.parametrize("name", sorted(set(PATTERNS) - {"conv_without_relu"}))  # Softmax is not exact
def test_unoptimized_it_computes_what_the_plan_says(
    name: str, model_of: Build, quantized: Build, as_emulated: Build
) -> None:
    as_emulated(quantized(pattern(name, model_of)[0], dyadic=True))


@pytest.mark.parametrize("name", PATTERNS)
def test_onnx_runtime_makes_integer_kernels_of_it(name: str, model_of: Build, quantized: Build, kernels: Build) -> None:
    model, expected = pattern(name, model_of)
    assert kernels(quantized(model).model) == sorted(expected)


@pytest.mark.parametrize("name", PATTERNS)
def test_integer_kernels_compute_what_the_plan_says(name: str, model_of: Build, quantized: Build) -> None:
    # With scales that are powers of two, requantization is exact too: every tie is a tie on both sides.
    result = quantized(pattern(name, model_of)[0], dyadic=True)
    plain, fast = (runtime.Session(result.model, optimize=optimize) for optimize in (False, True))
    for seed in range(10, 13):
        feeds = runtime.synthetic_feeds(result.float_model, seed)
        np.testing.assert_array_equal(fast.run(feeds)["y"], plain.run(feeds)["y"])


def test_the_graph_of_a_conv(model_of: Build, quantized: Build) -> None:
    result = quantized(model_of(CONV, **random_weights(**SHAPES)))
    model = result.model
    assert sorted(types(model)) == ["Conv", *["DequantizeLinear"] * 4, *["QuantizeLinear"] * 2, "Relu"]
    initializers = {name: value.const_value for name, value in model.graph.initializers.items()}
    assert set(initializers) == {
        "x_scale", "x_zero_point", "y_scale", "y_zero_point", "w_quantized", "w_scale", "w_zero_point",
        "conv_bias_quantized", "conv_bias_scale", "conv_bias_zero_point",
    }  # fmt: skip
    assert initializers["x_scale"].shape == () and initializers["x_zero_point"].dtype is ir.DataType.UINT8
    assert initializers["w_quantized"].dtype is ir.DataType.INT8 and initializers["w_scale"].shape == (4,)
    weights = initializers["w_quantized"].numpy()
    assert np.abs(weights.astype(int)).reshape(4, -1).max(axis=1).tolist() == [127] * 4


def test_the_bias_is_counted_in_steps_of_both_scales(model_of: Build, quantized: Build) -> None:
    result = quantized(model_of(CONV, **random_weights(**SHAPES)))
    bias = random_weights(**SHAPES)["b"]
    stored = {key: value.const_value.numpy() for key, value in result.model.graph.initializers.items()}
    step = result.plan.tensors["x"].scales * result.plan.tensors["w"].scales
    np.testing.assert_array_equal(stored["conv_bias_scale"], step)
    assert stored["conv_bias_quantized"].dtype == np.int32
    np.testing.assert_array_equal(stored["conv_bias_quantized"], np.rint(bias / step.astype(np.float64)))


def test_a_value_with_one_float_and_one_integer_reader(model_of: Build, quantized: Build, as_emulated: Build) -> None:
    text = """(float[2,8] x) => (float[2,5] y, float[2,8] z) {
        [abs] a = Abs (x) [mm] y = MatMul (a, w) [neg] z = Neg (a)
    }"""
    result = quantized(model_of(text, **random_weights(w=(8, 5))), dyadic=True)
    as_emulated(result)
    readers = {node.name: node.inputs[0].name for node in result.model.graph}
    assert readers["neg"] == "a", "the float reader keeps the float value"
    assert readers["mm"] == dequantized_name("a")


def test_a_float_reader_of_an_integer_kernel_sees_its_codes(
    model_of: Build, quantized: Build, as_emulated: Build, kernels: Build
) -> None:
    text = """(float[1,3,6,6] x) => (float[1,4,6,6] y, float[1,4,6,6] z) {
        c = Conv <pads = [1,1,1,1]> (x, w)
        [neg] z = Neg (c)
        d = Conv <pads = [1,1,1,1]> (c, v)
        y = Relu (d)
    }"""
    result = quantized(model_of(text, 21, **random_weights(w=(4, 3, 3, 3), v=(4, 4, 3, 3))), dyadic=True)
    as_emulated(result)
    assert {node.name: node.inputs[0].name for node in result.model.graph}["neg"] == dequantized_name("c")
    assert kernels(result.model) == ["Neg", "QLinearConv", "QLinearConv"]


def test_an_output_that_leaves_as_codes_keeps_its_name(model_of: Build, quantized: Build, as_emulated: Build) -> None:
    text = """(float[1,3,6,6] x) => (float[1,4,6,6] c, float[1,4,6,6] y) {
        c = Conv <pads = [1,1,1,1]> (x, w)
        d = Conv <pads = [1,1,1,1]> (c, v)
        y = Neg (d)
    }"""
    result = quantized(model_of(text, **random_weights(w=(4, 3, 3, 3), v=(4, 4, 3, 3))), dyadic=True)
    as_emulated(result)
    [output, _] = result.model.graph.outputs
    assert output.name == "c" and output.producer().op_type == "DequantizeLinear"


def test_an_output_in_float_that_an_integer_operator_reads(
    model_of: Build, quantized: Build, as_emulated: Build
) -> None:
    text = "(float[2,8] x) => (float[2,8] a, float[2,5] y) { a = Abs (x) y = MatMul (a, w) }"
    result = quantized(model_of(text, **random_weights(w=(8, 5))), dyadic=True)
    as_emulated(result)
    assert result.model.graph.outputs[0].producer().op_type == "Abs"


def test_weights_shared_by_two_operators_are_stored_once(model_of: Build, quantized: Build, as_emulated: Build) -> None:
    text = "(float[2,8] x) => (float[2,8] y) { a = MatMul (x, w) b = Abs (a) y = MatMul (b, w) }"
    result = quantized(model_of(text, **random_weights(w=(8, 8))), dyadic=True)
    as_emulated(result)
    stored = {name for name in result.model.graph.initializers if name.startswith("w")}
    assert stored == {"w_scale", "w_zero_point", "w_quantized"}
    [real] = {node.inputs[1] for node in result.model.graph if node.op_type == "MatMul"}
    assert real.name == dequantized_name("w") and len(real.uses()) == 2, "and dequantized once"


def test_weights_that_a_float_operator_reads_too_stay_for_it(
    model_of: Build, quantized: Build, as_emulated: Build
) -> None:
    text = "(float[2,8] x) => (float[2,8] y, float[8,8] z) { y = MatMul (x, w) z = Neg (w) }"
    result = quantized(model_of(text, **random_weights(w=(8, 8))), dyadic=True)
    as_emulated(result)
    assert {"w", "w_quantized"} <= set(result.model.graph.initializers)


def test_a_bias_shared_by_two_convs_is_counted_in_the_steps_of_each(
    model_of: Build, quantized: Build, as_emulated: Build
) -> None:
    text = """(float[1,3,6,6] x) => (float[1,4,6,6] y) {
        [one] c = Conv <pads = [1,1,1,1]> (x, w, b)
        r = Relu (c)
        [two] d = Conv <pads = [1,1,1,1]> (r, v, b)
        y = Relu (d)
    }"""
    weights = random_weights(w=(4, 3, 3, 3), v=(4, 4, 3, 3), b=(4,))
    weights["v"] *= 8
    result = quantized(model_of(text, **weights), dyadic=True)
    as_emulated(result)
    stored = {key: value.const_value.numpy() for key, value in result.model.graph.initializers.items()}
    assert "b" not in stored
    for name in ("one", "two"):
        real = stored[f"{name}_bias_quantized"] * stored[f"{name}_bias_scale"].astype(np.float64)
        assert np.all(np.abs(real - weights["b"]) <= stored[f"{name}_bias_scale"] / 2 + 1e-9)
    assert not np.array_equal(stored["one_bias_scale"], stored["two_bias_scale"])


def test_values_that_share_a_scale_have_equal_parameters(model_of: Build, quantized: Build) -> None:
    result = quantized(pattern("moved_codes", model_of)[0])
    stored = {key: value.const_value.numpy() for key, value in result.model.graph.initializers.items()}
    for name in "ptf":
        assert stored[f"{name}_scale"] == stored["r_scale"] and stored[f"{name}_zero_point"] == stored["r_zero_point"]


def table() -> np.ndarray:
    return random_weights(t=(300, 4))["t"]


def test_rows_are_dequantized_behind_the_lookup(model_of: Build, quantized: Build, as_emulated: Build) -> None:
    result = quantized(model_of("(int64[1,5] i) => (float[1,5,4] y) { g = Gather (t, i) y = Neg (g) }", 21, t=table()))
    assert types(result.model) == ["Gather", "DequantizeLinear", "Neg"]
    gather = result.model.graph[0]
    assert gather.inputs[0].name == quantized_name("t") and gather.outputs[0].dtype is ir.DataType.INT8
    assert models.initializer_bytes(result.model) < 300 * 4 + 100
    feeds = {"i": np.int64([[0, 7, 299, 7, 42]])}
    quant = result.plan.tensors["t"]
    expected = -quant.dequantize(quant.quantize(table()))[feeds["i"]]
    for optimize in (False, True):
        np.testing.assert_array_equal(runtime.Session(result.model, optimize=optimize).run(feeds)["y"], expected)


def test_a_lookup_that_is_the_output_keeps_its_name(model_of: Build, quantized: Build) -> None:
    result = quantized(model_of("(int64[1,5] i) => (float[1,5,4] y) { y = Gather (t, i) }", 21, t=table()))
    feeds = {"i": np.int64([[0, 7, 299, 7, 42]])}
    quant = result.plan.tensors["t"]
    expected = quant.dequantize(quant.quantize(table()))[feeds["i"]]
    np.testing.assert_array_equal(runtime.Session(result.model).run(feeds)["y"], expected)


def test_rows_that_an_integer_operator_reads(model_of: Build, quantized: Build) -> None:
    text = "(int64[1,5] i) => (float[1,5,6] y) { g = Gather (t, i) y = MatMul (g, w) }"
    result = quantized(model_of(text, 21, t=table(), **random_weights(w=(4, 6))))
    feeds = {"i": np.int64([[0, 1, 0, 1, 1]])}
    tensors = result.plan.tensors
    rows = tensors["t"].dequantize(tensors["t"].quantize(table()))[feeds["i"]]
    weight = tensors["w"].dequantize(tensors["w"].quantize(random_weights(w=(4, 6))["w"]))
    expected = tensors["g"].dequantize(tensors["g"].quantize(rows)) @ weight
    np.testing.assert_allclose(runtime.Session(result.model, optimize=False).run(feeds)["y"], expected, atol=1e-5)


@pytest.mark.parametrize("name", ["conv", "gemm_transposed", "matmul"])
def test_weights_alone_become_integers(name: str, model_of: Build, quantized: Build, as_emulated: Build) -> None:
    result = quantized(pattern(name, model_of)[0], activations=False, dyadic=True)
    assert "QuantizeLinear" not in types(result.model)
    assert types(result.model).count("DequantizeLinear") == 1
    assert models.initializer_bytes(result.model) < 0.6 * models.initializer_bytes(result.float_model)
    assert not [key for key in result.model.graph.initializers if "bias" in key], "a float operator keeps its bias"
    for seed in range(3):
        feeds = runtime.synthetic_feeds(result.float_model, seed)
        reference = result.float_model.clone()
        quant = result.plan.tensors["w"]
        value = reference.graph.initializers["w"]
        value.const_value = ir.tensor(quant.dequantize(quant.quantize(value.const_value.numpy())), name="w")
        expected = runtime.Session(reference, optimize=False).run(feeds)["y"]
        np.testing.assert_array_equal(runtime.Session(result.model, optimize=False).run(feeds)["y"], expected)


def test_names_that_are_taken_are_left_to_their_owners(model_of: Build, quantized: Build, as_emulated: Build) -> None:
    text = """(float[2,8] x, float[2,8] x_scale, float[2,8] x_dequantized) => (float[2,8] y) {
        w_scale = Add (x_scale, x_dequantized)
        x_quantized = Mul (w_scale, w_quantized)
        p = MatMul (x, w)
        q = MatMul (x_quantized, w)
        y = Add (p, q)
    }"""
    result = quantized(model_of(text, **random_weights(w=(8, 8), w_quantized=(2, 8))), dyadic=True)
    as_emulated(result)


STEP = TensorQuant(Role.ACTIVATION, "uint8", (1.0,), (0,))


def test_an_empty_plan_changes_nothing(model_of: Build) -> None:
    model = model_of("(float[2] x) => (float[2] y) { [neg] y = Neg (x) }")
    before = models.serialize(model)
    result = InsertQdq(QuantPlan({}, {"neg": OpPlan("Neg", Precision.FLOAT, "as asked")}))(model)
    assert not result.modified and models.serialize(model) == before


def test_a_plan_for_another_graph_is_refused(model_of: Build) -> None:
    model = model_of("(float[2] x) => (float[2] y) { [neg] y = Neg (x) }")
    plan = QuantPlan({}, {"neg": OpPlan("Neg", Precision.FLOAT), "ghost": OpPlan("Conv", Precision.INTEGER)})
    with pytest.raises(ir.passes.PreconditionError, match="the plan names node 'ghost', which the model does not have"):
        InsertQdq(plan)(model)


def test_a_plan_that_does_not_know_a_node_is_refused(model_of: Build) -> None:
    model = model_of("(float[2] x) => (float[2] y) { [neg] t = Neg (x) [exp] y = Exp (t) }")
    plan = QuantPlan({"t": STEP}, {"neg": OpPlan("Neg", Precision.FLOAT)})
    with pytest.raises(ir.passes.PreconditionError, match="the plan does not say what becomes of node 'exp'"):
        InsertQdq(plan)(model)


def test_a_plan_that_names_another_tensor_is_refused(model_of: Build) -> None:
    model = model_of("(float[2] x) => (float[2] y) { [neg] y = Neg (x) }")
    plan = QuantPlan(
        {"ghost": TensorQuant(Role.ACTIVATION, "uint8", (1.0,), (0,))}, {"neg": OpPlan("Neg", Precision.FLOAT)}
    )
    with pytest.raises(
        ir.passes.PreconditionError, match="the plan names tensor 'ghost', which the model does not have"
    ):
        InsertQdq(plan)(model)


def test_the_same_plan_gives_the_same_bytes(model_of: Build, quantized: Build) -> None:
    result = quantized(pattern("add", model_of)[0])
    again = result.float_model.clone()
    InsertQdq(QuantPlan.from_json(result.plan.to_json()))(again)
    assert models.serialize(again) == models.serialize(result.model)


def test_values_read_inside_a_subgraph_are_followed(model_of: Build, quantized: Build) -> None:
    text = """(bool b, float[1,3,6,6] x) => (float[1,4,6,6] y) {
        c = Conv <pads = [1,1,1,1]> (x, w)
        y = If (b) <then_branch = t () => (float[1,4,6,6] p) { [inner] p = Neg (c) },
                    else_branch = e () => (float[1,4,6,6] q) { q = Exp (c) }>
    }"""
    result = quantized(model_of(text, **random_weights(w=(4, 3, 3, 3))))
    inner = next(node for node in result.model.graph.all_nodes() if node.name == "inner")
    assert inner.inputs[0].name == dequantized_name("c")
    x = runtime.synthetic_feeds(result.float_model, 0)["x"]
    y = runtime.Session(result.model).run({"b": np.array(True), "x": x})["y"]
    assert len(np.unique(y)) <= 256


def test_sixteen_bits_pass_the_checker_and_run(eager: Target, model_of: Build, quantized: Build) -> None:
    target = replace(eager, activation_dtype="uint16")
    result = quantized(pattern("gemm", model_of)[0], target)
    feeds = runtime.synthetic_feeds(result.float_model, 0)
    expected = runtime.Session(result.float_model).run(feeds)["y"]
    got = runtime.Session(result.model, optimize=False).run(feeds)["y"]
    assert np.abs(got - expected).max() < 0.02 * np.abs(expected).max()


def test_a_real_model_becomes_integer_throughout(root: Path, quantized: Build, kernels: Build) -> None:
    model = models.load(root / "models" / "resnet8.onnx")
    Canonicalize(21)(model)
    result = quantized(model)
    executed = kernels(result.model)
    assert executed.count("QLinearConv") == 9 and executed.count("QLinearAdd") == 3 and executed.count("QGemm") == 1
    assert not {"Conv", "FusedConv", "Add", "Relu", "Gemm", "AveragePool"} & set(executed)


@pytest.mark.parametrize("readers", [1, 3])
def test_a_range_of_each_run_is_told_by_a_dynamic_quantize_linear(
    readers: int, model_of: Build, quantized: Build, kernels: Build
) -> None:
    """One operator alone gets a kernel that takes the range itself; several share the codes."""
    names = [f"w{index}" for index in range(readers)]
    nodes = " ".join(f"y{index} = MatMul (x, {name})" for index, name in enumerate(names))
    outputs = ", ".join(f"float[2,3,5] y{index}" for index in range(readers))
    weights = random_weights(**dict.fromkeys(names, (8, 5)))
    made = quantized(model_of(f"(float[2,3,8] x) => ({outputs}) {{ {nodes} }}", **weights))

    def with_range(quant: TensorQuant) -> ir.Model:
        plan = replace(made.plan, tensors={**made.plan.tensors, "x": quant})
        model: ir.Model = InsertQdq(plan)(made.float_model.clone()).model
        return model

    dynamic = with_range(TensorQuant(Role.ACTIVATION, "uint8", (), ()))
    x = np.random.default_rng(0).normal(size=(2, 3, 8)).astype(np.float32)
    for scale in (1.0, 1e-3, 50.0):
        low, high = float((scale * x).min()), float((scale * x).max())
        step, zero = numerics.affine_scale([low], [high], "uint8")
        fixed = with_range(TensorQuant(Role.ACTIVATION, "uint8", (float(step[0]),), (int(zero[0]),)))
        expected, found = (runtime.Session(model).run({"x": scale * x}) for model in (fixed, dynamic))
        for name, values in expected.items():
            np.testing.assert_allclose(found[name], values, rtol=1e-5, atol=1e-5 * float(np.abs(values).max()))
    executed = ["DynamicQuantizeMatMul"] if readers == 1 else ["DynamicQuantizeLinear", *["MatMulIntegerToFloat"] * 3]
    assert kernels(dynamic) == executed
