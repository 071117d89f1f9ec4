"""Names, types and shapes of what InsertQdq writes, which other tools and the report's readers go by."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from qcompile.core import runtime
from qcompile.core.plan import OpPlan, Precision, QuantPlan, Role, TensorQuant
from qcompile.passes.canonicalize.infer_shapes import InferShapes
from qcompile.passes.insert_qdq import InsertQdq, QdqWriter
from qcompile.passes.round_weights import RoundWeights

Build = Callable[..., Any]

INTEGER, STORED = Precision.INTEGER, Precision.WEIGHT_ONLY
STEP = TensorQuant(Role.ACTIVATION, "uint8", (0.5,), (7,))
EACH_RUN = TensorQuant(Role.ACTIVATION, "uint8", (), ())
CHANNELS = TensorQuant(Role.WEIGHT, "int8", (0.25, 0.5, 1.0, 2.0), (0, 0, 0, 0), 1)

CONV = "(float[1,3,6,6] x) => (float[1,4,6,6] y) { [conv] c = Conv <pads = [1,1,1,1]> (x, w, b) y = Relu (c) }"
MATMUL = "(float[2,3,8] x) => (float[2,3,4] y) { [mm] y = MatMul (x, w) }"
LOOKUP = "(int64[1,5] i) => (float[1,5,4] y) { [look] g = Gather (t, i) [neg] y = Neg (g) }"


def array(*shape: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(11).standard_normal(shape).astype(np.float32)


def inserted(model: ir.Model, tensors: dict[str, TensorQuant], **precisions: Precision) -> ir.Model:
    InferShapes()(model)
    ops = {node.name: OpPlan(node.op_type, precisions.get(node.name or "", Precision.FLOAT)) for node in model.graph}
    InsertQdq(QuantPlan(tensors, ops))(model)
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    return model


def told(model: ir.Model) -> dict[str, tuple[Any, Any]]:
    """Return type and shape of each value that a node writes, as the model has them."""
    return {value.name: (value.dtype, value.shape) for node in model.graph for value in node.outputs if value.name}


def inferred(model: ir.Model) -> dict[str, tuple[Any, Any]]:
    """Return the same from onnx's own inference, which sees nothing but inputs and weights."""
    proto = ir.to_proto(model)
    del proto.graph.value_info[:]
    return told(ir.from_proto(onnx.shape_inference.infer_shapes(proto, strict_mode=True, data_prop=True)))


def conv(model_of: Build, quantized: Build) -> ir.Model:
    return quantized(model_of(CONV, 21, w=array(4, 3, 3, 3), b=array(4))).model  # type: ignore[no-any-return]


def matmul(model_of: Build, quantized: Build) -> ir.Model:
    tensors = {"x": EACH_RUN, "w": CHANNELS}
    return inserted(model_of(MATMUL, 21, w=array(8, 4)), tensors, mm=INTEGER)


def lookup(model_of: Build, quantized: Build) -> ir.Model:
    model = model_of(LOOKUP, 21, t=array(30, 4))
    return inserted(quantized(model).float_model, {"t": CHANNELS}, look=STORED)


@pytest.mark.parametrize("made", [conv, matmul, lookup])
def test_types_and_shapes_are_those_that_onnx_infers(made: Build, model_of: Build, quantized: Build) -> None:
    model = made(model_of, quantized)
    assert told(model) == inferred(model)
    assert all(shape is not None for _, shape in told(model).values())


def test_names_of_what_stands_around_a_conv(model_of: Build, quantized: Build) -> None:
    model = conv(model_of, quantized)
    assert {node.name: node.outputs[0].name for node in model.graph if node.op_type.endswith("Linear")} == {
        "x_quantized_QuantizeLinear": "x_quantized",
        "x_dequantized_DequantizeLinear": "x_dequantized",
        "w_dequantized_DequantizeLinear": "w_dequantized",
        "conv_bias_dequantized_DequantizeLinear": "conv_bias_dequantized",
        "y_quantized_QuantizeLinear": "y_quantized",
        "y_dequantized_DequantizeLinear": "y",  # the model's output keeps its name
    }


def test_names_of_a_range_of_each_run(model_of: Build, quantized: Build) -> None:
    model = matmul(model_of, quantized)
    [dynamic] = [node for node in model.graph if node.op_type == "DynamicQuantizeLinear"]
    assert [value.name for value in dynamic.outputs] == ["x_quantized", "x_scale", "x_zero_point"]
    assert [value.dtype for value in dynamic.outputs] == [ir.DataType.UINT8, ir.DataType.FLOAT, ir.DataType.UINT8]
    assert dynamic.name == "x_quantized_DynamicQuantizeLinear"


def test_names_that_a_range_of_each_run_would_have_are_left_to_their_owners(model_of: Build) -> None:
    text = """(float[2,3,8] x, float[2,3,4] x_scale, float[2,3,4] x_zero_point) => (float[2,3,4] y) {
        [mm] p = MatMul (x, w) q = Add (p, x_scale) y = Add (q, x_zero_point)
    }"""
    model = inserted(model_of(text, 21, w=array(8, 4)), {"x": EACH_RUN, "w": CHANNELS}, mm=INTEGER)
    [dynamic] = [node for node in model.graph if node.op_type == "DynamicQuantizeLinear"]
    assert [value.name for value in dynamic.outputs] == ["x_quantized", "x_scale_", "x_zero_point_"]


@pytest.mark.parametrize("optimize", [False, True])
def test_rows_of_a_table_with_a_scale_per_column(optimize: bool, model_of: Build, quantized: Build) -> None:
    table = array(30, 4)
    model = lookup(model_of, quantized)
    [behind] = [node for node in model.graph if node.op_type == "DequantizeLinear"]
    assert behind.attributes["axis"].as_int() == 2 and behind.outputs[0].name == "g_dequantized"
    feeds = {"i": np.int64([[0, 7, 29, 7, 12]])}
    codes = np.clip(np.rint(table / np.float32(CHANNELS.scale)), -127, 127)
    expected = -(codes * np.float32(CHANNELS.scale))[feeds["i"]]
    np.testing.assert_array_equal(runtime.Session(model, optimize=optimize).run(feeds)["y"], expected)


def test_rows_of_unknown_rank_are_dequantized_along_their_last_axis(model_of: Build) -> None:
    model = model_of(LOOKUP, 21, t=array(30, 4))
    ops = {"look": OpPlan("Gather", STORED), "neg": OpPlan("Neg", Precision.FLOAT)}
    InsertQdq(QuantPlan({"t": CHANNELS}, ops))(model)
    [behind] = [node for node in model.graph if node.op_type == "DequantizeLinear"]
    assert behind.attributes["axis"].as_int() == -1


def test_a_lookup_that_is_the_output_gives_its_codes_another_name(model_of: Build) -> None:
    text = "(int64[1,5] i) => (float[1,5,4] y, float[1,5,4] z) { [look] y = Gather (t, i) [neg] z = Neg (y) }"
    model = inserted(model_of(text, 21, t=array(30, 4)), {"t": CHANNELS}, look=STORED)
    gather, behind, neg = sorted(
        model.graph, key=lambda node: ("Gather", "DequantizeLinear", "Neg").index(node.op_type)
    )
    assert gather.outputs[0].name == "y_quantized" and behind.outputs[0].name == "y"
    assert [value.name for value in model.graph.outputs] == ["y", "z"] and neg.inputs[0].name == "y"


def test_an_output_that_leaves_as_codes_gives_its_float_value_another_name(model_of: Build) -> None:
    text = "(float[2,3,8] x) => (float[2,3,4] z, float[2,3,4] y) { [mm] y = MatMul (x, w) [neg] z = Neg (y) }"
    model = model_of(text, 21, w=array(8, 4))
    ops = {"mm": OpPlan("MatMul", INTEGER, output="y"), "neg": OpPlan("Neg", Precision.FLOAT)}
    InsertQdq(QuantPlan({"x": STEP, "w": CHANNELS, "y": STEP}, ops))(model)
    [product] = [node.outputs[0] for node in model.graph if node.op_type == "MatMul"]
    assert product.name == "y_float" and [value.name for value in model.graph.outputs] == ["z", "y"]
    told_by = {node.outputs[0].name: node for node in model.graph}
    assert told_by["y"].op_type == "DequantizeLinear" and told_by["z"].inputs[0].name == "y"


def test_a_scale_for_all_has_no_axis(model_of: Build) -> None:
    one = TensorQuant(Role.WEIGHT, "int8", (0.5,), (0,))
    product = inserted(model_of(MATMUL, 21, w=array(8, 4)), {"x": STEP, "w": one}, mm=INTEGER)
    rows = inserted(model_of(LOOKUP, 21, t=array(30, 4)), {"t": one}, look=STORED)
    for model in (product, rows):
        found = [node for node in model.graph if node.op_type == "DequantizeLinear"]
        assert found and not any("axis" in node.attributes for node in found)


def test_what_was_changed_is_told(model_of: Build) -> None:
    model = model_of(MATMUL, 21, w=array(8, 4))
    ops = {"mm": OpPlan("MatMul", STORED)}
    assert InsertQdq(QuantPlan({}, ops))(model).modified is False
    assert InsertQdq(QuantPlan({"w": CHANNELS}, ops))(model).modified is True


def test_other_codes_than_the_nearest(model_of: Build) -> None:
    codes = np.random.default_rng(3).integers(-127, 128, (8, 4)).astype(np.int8)
    model = model_of(MATMUL, 21, w=array(8, 4))
    InsertQdq(QuantPlan({"w": CHANNELS}, {"mm": OpPlan("MatMul", STORED)}), RoundWeights({"w_quantized": codes}))(model)
    np.testing.assert_array_equal(model.graph.initializers["w_quantized"].const_value.numpy(), codes, strict=True)


def test_what_is_stored_has_its_value_s_name_and_the_order_of_its_axes(model_of: Build) -> None:
    weights = np.asfortranarray(array(8, 4))
    model = inserted(model_of(MATMUL, 21, w=weights), {"x": STEP, "w": CHANNELS}, mm=INTEGER)
    for name, value in model.graph.initializers.items():
        assert value.const_value is not None and value.const_value.name == name
    stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in ir.to_proto(model).graph.initializer}
    expected = np.clip(np.rint(weights / np.float32(CHANNELS.scale)), -127, 127)
    np.testing.assert_array_equal(stored["w_quantized"], expected.astype(np.int8), strict=True)


@pytest.mark.parametrize("given", ["x, w", 'x, w, ""'])
def test_a_bias_is_written_where_there_was_none(given: str, model_of: Build) -> None:
    model = model_of(CONV.replace("x, w, b", "x, w"), 21, w=array(4, 3, 3, 3))
    quant = replace(CHANNELS, axis=0)
    inserted(model, {"x": STEP, "w": quant}, conv=INTEGER)
    [node] = [node for node in model.graph if node.op_type == "Conv"]
    if given.endswith('""'):
        node.resize_inputs(3)
    bias = np.float64([0.3, -1.0, 0.0, 7.77])
    QdqWriter(model.graph).write_bias(node, bias)
    model.graph.sort()
    real = node.inputs[2]
    assert len(node.inputs) == 3 and real is not None and real.name == "conv_bias_dequantized"
    step = np.float32(0.5) * np.float32(quant.scale)
    codes, scale, zero_point = (value.const_value.numpy() for value in real.producer().inputs)
    np.testing.assert_array_equal(codes, np.rint(bias / step).astype(np.int32), strict=True)
    np.testing.assert_array_equal(scale, step, strict=True)
    np.testing.assert_array_equal(zero_point, np.zeros(4, np.int32), strict=True)
    assert real.producer().attributes["axis"].as_int() == 0 and told(model) == inferred(model)
