"""The forms in which a QDQ model is written for ONNX Runtime, and what its optimizer makes of them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx.parser
import onnx.shape_inference
import onnx_ir as ir
import pytest

from qcompile.backends.ort.legalize import RULES, legalize
from qcompile.backends.ort.legalize.drop_bounds import DropBounds
from qcompile.backends.ort.legalize.drop_inferable import DropInferable
from qcompile.backends.ort.legalize.hide_skip_add import HideSkipAdd
from qcompile.backends.ort.legalize.keep_float_convs import KeepFloatConvs
from qcompile.backends.ort.legalize.sink_factors import SinkFactors
from qcompile.backends.ort.legalize.unpack_biases import UnpackBiases
from qcompile.core import model as models
from qcompile.core import runtime

Build = Callable[..., Any]

#: A MatMul on codes with a bias behind it; what stands around it is filled in.
MATMUL = """<ir_version: 10, opset_import: ["" : 21]> f (float[1,T,4] x) => (float[1,T,3] y{outputs})
    <float s = {{0.02}}, uint8 z = {{7}}, float[3] t = {{0.1, 0.2, 0.3}}, int8[3] o = {{0, 0, 0}},
     int8[4,3] w = {{1, -2, 3, 4, 5, -6, 7, 8, 9, -10, 11, 12}}, float[{bias}] b = {{{numbers}}}> {{
    q = QuantizeLinear (x, s, z) a = DequantizeLinear (q, s, z) c = DequantizeLinear <axis = 1> (w, t, o)
    m = MatMul (a, c) y = Add (m, b) }}"""


def parsed(text: str) -> ir.Model:
    model = ir.from_proto(onnx.parser.parse_model(text))
    for index, node in enumerate(model.graph):
        node.name = f"n{index}"
    return model


def types(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def same(before: ir.Model, after: ir.Model, x: Any, tolerance: float = 0.0) -> None:
    expected, found = (runtime.Session(model, optimize=False).run({"x": x}) for model in (before, after))
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=0, atol=tolerance)


def matmul(bias: str = "3", numbers: str = "1, 2, 3", outputs: str = "") -> ir.Model:
    return parsed(MATMUL.format(bias=bias, numbers=numbers, outputs=outputs))


@pytest.mark.parametrize("rule", RULES[:-1])
def test_a_model_in_float_is_left_alone(rule: Any, model_of: Build) -> None:
    weights = {"w": np.eye(4, dtype=np.float32), "b": np.ones(4, np.float32)}
    model = model_of("(float[1,2,4] x) => (float[1,2,4] y) { m = MatMul (x, w) y = Add (m, b) }", **weights)
    before = models.serialize(model)
    assert not rule(model).modified
    assert models.serialize(model) == before


def test_a_bias_goes_into_the_integer_matmul(random: np.random.Generator) -> None:
    model = matmul()
    legal = legalize(model)
    assert types(legal) == ["QuantizeLinear", "MatMulIntegerToFloat"]
    assert legal.graph[1].name == "n3"  # the MatMul's: the report looks for it
    same(model, legal, random.normal(size=(1, 5, 4)).astype(np.float32), 1e-5)
    assert models.serialize(legalize(legal)) == models.serialize(legal)


@pytest.mark.parametrize("other", [{"bias": "1", "numbers": "1"}, {"bias": "1,1,3"}, {"outputs": ", float[1,T,3] m"}])
def test_a_bias_that_is_not_the_matmuls_alone_stays_beside_it(other: Any, random: np.random.Generator) -> None:
    model = matmul(**other)
    legal = legalize(model)
    assert types(legal) == ["QuantizeLinear", "MatMulIntegerToFloat", "Add"]
    same(model, legal, random.normal(size=(1, 5, 4)).astype(np.float32), 1e-5)


def test_a_product_whose_shape_is_asked_for_keeps_its_bias_beside_it(random: np.random.Generator) -> None:
    text = MATMUL.format(bias="3", numbers="1, 2, 3", outputs=", int64[3] n").replace(
        "y = Add", "n = Shape (m) y = Add"
    )
    model = parsed(text)
    legal = legalize(model)
    assert types(legal) == ["QuantizeLinear", "MatMulIntegerToFloat", "Shape", "Add"]
    same(model, legal, random.normal(size=(1, 5, 4)).astype(np.float32), 1e-5)


def test_a_matmul_whose_result_is_quantized_is_left_to_the_runtime() -> None:
    text = MATMUL.format(bias="3", numbers="1, 2, 3", outputs="")
    text = text.replace("float[1,T,3] y", "uint8[1,T,3] y").replace("y = Add (m, b)", "y = QuantizeLinear (m, s, z)")
    assert "MatMul" in types(legalize(parsed(text)))


def test_hard_swish_of_four_operators_is_taken_into_the_float_conv_in_front_of_it(
    tmp_path: Path, random: np.random.Generator
) -> None:
    text = """<ir_version: 10, opset_import: ["" : 21]> f (float[1,16,6,6] x) => (float[1,16,6,6] y)
        <float three = {3}, float low = {0}, float high = {6}> {
        c = Conv (x, w) a = Add (c, three) l = Clip (a, low, high) m = Mul (c, l) y = Div (m, high) }"""
    proto = onnx.parser.parse_model(text)
    weights = random.normal(size=(16, 16, 1, 1)).astype(np.float32)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(weights, "w"))
    model = ir.from_proto(onnx.shape_inference.infer_shapes(proto))
    legal = legalize(model)
    assert types(legal) == ["Conv", "HardSwish"]
    same(model, legal, random.normal(size=(1, 16, 6, 6)).astype(np.float32), 1e-5)
    models.save(legal, tmp_path / "m.onnx")
    assert "HardSwish" not in {node.op_type for node in runtime.optimized_nodes(tmp_path / "m.onnx")}


SINK = """<ir_version: 10, opset_import: ["" : 21]> f (float[2,4] x) => (float[2,4] y{outputs})
    <float two = {{{factor}}}, float s = {{0.05}}, uint8 z = {{9}}> {{
    m = Mul ({order}) q = QuantizeLinear (m, s, z) y = DequantizeLinear (q, s, z) }}"""


@pytest.mark.parametrize("order", ["x, two", "two, x"])
def test_a_factor_goes_into_the_scale_of_what_quantizes_it(order: str, random: np.random.Generator) -> None:
    model = parsed(SINK.format(order=order, factor="2", outputs=""))
    legal = model.clone()
    assert SinkFactors()(legal).modified
    assert types(legal) == ["QuantizeLinear", "DequantizeLinear"]
    same(model, legal, random.normal(size=(2, 4)).astype(np.float32))
    assert not SinkFactors()(legal).modified


@pytest.mark.parametrize("other", [{"factor": "-2"}, {"factor": "1e38"}, {"outputs": ", float[2,4] m"}])
def test_a_factor_stays_where_no_scale_can_take_it(other: Any) -> None:
    fields = {"order": "x, two", "factor": "2", "outputs": ""} | other
    assert not SinkFactors()(parsed(SINK.format(**fields))).modified


def test_a_factor_goes_into_the_scale_of_weights(random: np.random.Generator) -> None:
    text = """<ir_version: 10, opset_import: ["" : 21]> f (float[1,2,3,3] x) => (float[1,2,3,3] y)
        <float six = {6}, float[2] t = {0.1, 0.2}, int8[2] o = {0, 0}, int8[2,2,1,1] w = {1, -2, 3, 4}> {
        m = Mul (x, six) c = DequantizeLinear <axis = 0> (w, t, o) y = Conv (m, c) }"""
    model = parsed(text)
    legal = model.clone()
    assert SinkFactors()(legal).modified and types(legal) == ["DequantizeLinear", "Conv"]
    same(model, legal, random.normal(size=(1, 2, 3, 3)).astype(np.float32), 1e-4)


BESIDE = """<ir_version: 10, opset_import: ["" : 21]> f (float[1,2,4] x)
    => (float[1,2,4] y, float[1,2,4] p, float[1,2,2] r)
    <float two = {2}, float s = {0.05}, uint8 z = {9}, float[4] v = {1, 2, 3, 4}, int64[2] i = {0, 3},
     float[1,2,2] w = {1, 2, 3, 4}> {
    m = Mul (x, two) q = QuantizeLinear (m, s, z) y = DequantizeLinear (q, s, z) p = Mul (m, v)
    g = Gather <axis = -1> (m, i) r = MatMul (g, w) }"""


def test_a_factor_goes_into_constants_beside_the_quantizer(random: np.random.Generator) -> None:
    model = parsed(BESIDE)
    legal = model.clone()
    assert SinkFactors()(legal).modified
    assert types(legal) == ["QuantizeLinear", "DequantizeLinear", "Mul", "Gather", "MatMul"]
    same(model, legal, random.normal(size=(1, 2, 4)).astype(np.float32), 1e-6)


@pytest.mark.parametrize(
    "other", [("i = {0, 3}", "i = {0, 3}, float k = {2}", "p = Mul (m, v)", "p = Mul (m, m)"),
              ("float[1,2,2] r)", "float[1,2,2] r, float[1,2,2] g)")],
)  # fmt: skip
def test_a_factor_stays_where_one_reader_has_no_constant_for_it(other: tuple[str, ...]) -> None:
    text = BESIDE
    for old, new in zip(other[::2], other[1::2], strict=True):
        text = text.replace(old, new)
    assert not SinkFactors()(parsed(text)).modified


BOUNDS = """<ir_version: 10, opset_import: ["" : 21]> f (float[2,4] x) => (float[2,4] y{outputs})
    <float[4] top = {{3.4e38, {high}, 3.4e38, 3.4e38}}, float[4] low = {{-3.4e38, {low}, -3.4e38, -3.4e38}},
     float s = {{0.05}}, uint8 z = {{9}}> {{
    a = Min (x, top) b = Max (a, low) q = QuantizeLinear (b, s, z) y = DequantizeLinear (q, s, z) }}"""


def test_bounds_that_a_quantizer_has_anyway_are_dropped(random: np.random.Generator) -> None:
    model = parsed(BOUNDS.format(high="12.3", low="-0.45", outputs=""))
    legal = model.clone()
    assert DropBounds()(legal).modified and types(legal) == ["QuantizeLinear", "DequantizeLinear"]
    same(model, legal, (20 * random.normal(size=(2, 4))).astype(np.float32))
    assert not DropBounds()(legal).modified


@pytest.mark.parametrize(
    ("fields", "left"),
    [
        ({"high": "12.2", "low": "-0.45"}, ["Min", "QuantizeLinear", "DequantizeLinear"]),
        ({"high": "12.3", "low": "-0.40"}, ["Min", "Max", "QuantizeLinear", "DequantizeLinear"]),
        ({"outputs": ", float[2,4] b"}, ["Min", "Max", "QuantizeLinear", "DequantizeLinear"]),
        ({"outputs": ", float[2,4] a"}, ["Min", "QuantizeLinear", "DequantizeLinear"]),
    ],
)
def test_bounds_that_matter_stay(fields: dict[str, str], left: list[str]) -> None:
    model = parsed(BOUNDS.format(**({"high": "12.3", "low": "-0.45", "outputs": ""} | fields)))
    DropBounds()(model)
    assert sorted(set(types(model))) == sorted(set(left))


def test_a_residual_add_in_front_of_a_norm_is_not_fused_with_it(tmp_path: Path) -> None:
    """The runtime's kernel for both takes three times as long as the two."""
    text = """<ir_version: 10, opset_import: ["" : 21]> f (float[1,T,8] x) => (float[1,T,8] y)
        <float[8] g = {1,1,1,1,1,1,1,1}, float[8] b = {0,0,0,0,0,0,0,0}> {
        e = Exp (x) a = Add (e, x) y = LayerNormalization (a, g, b) }"""
    model = parsed(text)

    def executed(candidate: ir.Model) -> set[str]:
        models.save(candidate, tmp_path / "m.onnx")
        return {node.op_type for node in runtime.optimized_nodes(tmp_path / "m.onnx")}

    assert "SkipLayerNormalization" in executed(model)
    legal = legalize(model)
    assert executed(legal) == {"Exp", "Sum", "LayerNormalization"}
    same(model, legal, np.linspace(-1, 1, 24, dtype=np.float32).reshape(1, 3, 8))


def test_a_shift_in_front_of_a_norm_stays_an_add() -> None:
    text = """<ir_version: 10, opset_import: ["" : 21]> f (float[1,T,2] x) => (float[1,T,2] y)
        <float[2] g = {1, 1}, float[2] c = {1, 2}> { a = Add (x, c) y = LayerNormalization (a, g) }"""
    assert not HideSkipAdd()(parsed(text)).modified


#: A value in codes that is moved, and read by what is within an If.
CAPTURED = """<ir_version: 10, opset_import: ["" : 21]> f (float[1,4,5,5] x, bool flag) => (float[M,N,O,P] y)
    <float s = {{0.02}}, uint8 z = {{128}}, int64[1] b = {{1}}, int64[1] e = {{9}}, int64[1] a = {{2}},
     int64[1] t = {{1}}> {{
    q = QuantizeLinear (x, s, z) d = DequantizeLinear (q, s, z) m = Slice (d, b, e, a, t) {more}
    y = If (flag) <then_branch = g () => (float[1,4,4,5] u) {{ u = Relu ({read}) }},
                   else_branch = h () => (float[1,4,4,5] v) {{ v = Neg ({read}) }}> }}"""


@pytest.mark.parametrize(("more", "read"), [("", "m"), ("r = Transpose <perm = [0, 1, 2, 3]> (m)", "r")])
def test_what_a_subgraph_reads_of_codes_is_not_moved_in_front_of_it(tmp_path: Path, more: str, read: str) -> None:
    """The runtime's optimizer would write beyond the inputs of the If; seen in another process, since it may end it."""
    model = parsed(CAPTURED.format(more=more, read=read))
    legal = legalize(model)
    models.save(legal, tmp_path / "m.onnx")
    feeds = {"x": np.linspace(-3, 3, 100, dtype=np.float32).reshape(1, 4, 5, 5)}
    for flag in (True, False):
        given = {**feeds, "flag": np.array(flag)}
        plain = runtime.Session(model, optimize=False).run(given)["y"]
        np.save(tmp_path / "x.npy", feeds["x"])
        script = (
            "import sys, numpy, onnxruntime as o; s = o.InferenceSession(sys.argv[1]);"
            "y = s.run(None, {'x': numpy.load(sys.argv[2]), 'flag': numpy.array(sys.argv[3] == 'True')})[0];"
            "numpy.save(sys.argv[4], y)"
        )
        words = [str(tmp_path / "m.onnx"), str(tmp_path / "x.npy"), str(flag), str(tmp_path / "y.npy")]
        done = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        np.testing.assert_array_equal(np.load(tmp_path / "y.npy"), plain)
    assert types(legal).count("QuantizeLinear") == 2


#: An integer Conv with its bias, and the same bias read by an operator in float where that is filled in.
CONV = """<ir_version: 10, opset_import: ["" : 21]> f (float[1,2,3,3] x) => (float[1,2,3,3] y{outputs})
    <float s = {{0.02}}, uint8 z = {{128}}, float r = {{0.05}}, float[2] t = {{0.01, 0.02}}, int8[2] o = {{0, 0}},
     int8[2,2,1,1] w = {{10, -20, 30, 40}}, float[2] u = {{0.0002, 0.0004}}, int32[2] v = {{0, {shift}}},
     int32[2] b = {{1000, -2000}}> {{
    q = QuantizeLinear (x, s, z) a = DequantizeLinear (q, s, z) c = DequantizeLinear <axis = 0> (w, t, o)
    d = DequantizeLinear <axis = 0> (b, u, v) m = Conv (a, c, d)
    p = QuantizeLinear (m, r, z) y = DequantizeLinear (p, r, z) {more} }}"""


def test_the_bias_of_an_integer_conv_is_stored_without_scales(tmp_path: Path, random: np.random.Generator) -> None:
    model = parsed(CONV.format(outputs="", shift="0", more=""))
    legal = model.clone()
    assert UnpackBiases()(legal).modified
    assert types(legal).count("DequantizeLinear") == types(model).count("DequantizeLinear") - 1
    same(model, legal, random.normal(size=(1, 2, 3, 3)).astype(np.float32), 1e-6)
    models.save(legalize(model), tmp_path / "m.onnx")
    assert "QLinearConv" in {node.op_type for node in runtime.optimized_nodes(tmp_path / "m.onnx")}


@pytest.mark.parametrize("other", [{"shift": "3"}, {"outputs": ", float[2] d"}, {"more": "e = Exp (d)"}])
def test_a_bias_that_is_more_than_that_keeps_its_scales(other: Any) -> None:
    fields = {"outputs": "", "shift": "0", "more": ""} | other
    assert not UnpackBiases()(parsed(CONV.format(**fields))).modified


def test_what_the_runtime_infers_is_not_written(random: np.random.Generator) -> None:
    model = matmul()
    model.graph[0].metadata_props["note"] = "x"
    model.graph[3].outputs[0].type, model.graph[3].outputs[0].shape = (
        ir.TensorType(ir.DataType.FLOAT),
        ir.Shape([1, None, 3]),
    )
    slim = model.clone()
    DropInferable()(slim)
    assert [node.name for node in slim.graph] == ["", "", "", "n3", "n4"]
    assert not ir.to_proto(slim).graph.value_info and slim.graph.outputs[0].shape is not None
    same(model, slim, random.normal(size=(1, 5, 4)).astype(np.float32))


def test_where_others_have_codes_a_product_in_float_keeps_its_activation(
    random: np.random.Generator, tmp_path: Path
) -> None:
    text = """<ir_version: 10, opset_import: ["" : 21]> f (float[2,5,4] x) => (float[2,5,3] y, float[2,5,4] v)
        <float t = {0.5}, uint8 o = {9}> { w = DequantizeLinear <axis = 1> (q, s, z) y = MatMul (x, w)
        c = QuantizeLinear (x, t, o) v = DequantizeLinear (c, t, o) }"""
    proto = onnx.parser.parse_model(text)
    arrays = {"q": random.integers(-127, 128, (4, 3)).astype(np.int8), "z": np.zeros(3, np.int8),
              "s": random.uniform(0.01, 0.02, 3).astype(np.float32)}  # fmt: skip
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in arrays.items())
    model = ir.from_proto(proto)
    for index, node in enumerate(model.graph):
        node.name = f"n{index}"
    models.save(model, tmp_path / "as_is.onnx")
    assert "MatMulNBits" in [node.op_type for node in runtime.optimized_nodes(tmp_path / "as_is.onnx")]
    models.save(legalize(model), tmp_path / "m.onnx")
    kernels = [node.op_type for node in runtime.optimized_nodes(tmp_path / "m.onnx")]
    assert "MatMul" in kernels and "MatMulNBits" not in kernels
    same(model, legalize(model), random.normal(size=(2, 5, 4)).astype(np.float32), 1e-6)


@pytest.mark.parametrize(
    ("dtype", "shape", "kernel"),
    [("int16", (4, 3), "MatMul"), ("int8", (2, 4, 3), "MatMul"), ("int8", (4, 3), "MatMulNBits")],
)
def test_weights_that_no_kernel_reads_are_unpacked_at_load(
    dtype: str, shape: tuple[int, ...], kernel: str, random: np.random.Generator, tmp_path: Path
) -> None:
    most = np.iinfo(dtype).max
    text = '<ir_version: 10, opset_import: ["" : 21]> f (float[2,5,4] x) => (float[2,5,3] y) { y = MatMul (x, w) }'
    proto = onnx.parser.parse_model(
        text.replace("{ y", f"{{ w = DequantizeLinear <axis = {len(shape) - 1}> (q, s, z) y")
    )
    arrays = {"q": random.integers(-most, most, shape).astype(dtype), "z": np.zeros(3, dtype),
              "s": (random.uniform(1, 2, 3) / most).astype(np.float32)}  # fmt: skip
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in arrays.items())
    model = ir.from_proto(proto)
    for index, node in enumerate(model.graph):
        node.name = f"n{index}"
    legal = legalize(model)
    same(model, legal, random.normal(size=(2, 5, 4)).astype(np.float32), 0.02 if kernel == "MatMulNBits" else 1e-6)
    models.save(legal, tmp_path / "m.onnx")
    assert [node.op_type for node in runtime.optimized_nodes(tmp_path / "m.onnx")] == [kernel]


FLOAT_CONV = """<ir_version: 10, opset_import: ["" : 21]> f (float[1,4,9,9] x) => (uint8[1,4,N,M] y)
    <float s = {0.02}, uint8 z = {128}, float t = {0.02}, uint8 o = {0}, float lo = {0}, float hi = {4}> {
    q = QuantizeLinear (x, s, z) d = DequantizeLinear (q, s, z) c = Conv <strides = [2, 2]> (d, w, b)
    BEHIND y = QuantizeLinear (r, t, o) }"""


def float_conv(behind: str, random: np.random.Generator) -> ir.Model:
    """Build a Conv with float weights between Q/DQ pairs, one channel of which reaches a hundred times the others."""
    text = FLOAT_CONV if behind else FLOAT_CONV.replace("(r, t, o)", "(c, t, o)")
    proto = onnx.parser.parse_model(text.replace("BEHIND", behind))
    weights = random.normal(size=(4, 4, 3, 3)).astype(np.float32)
    weights[1:] *= 0.01
    arrays = {"w": weights, "b": np.float32([0, 1, 2, 3])}
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in arrays.items())
    model = ir.from_proto(proto)
    for index, node in enumerate(model.graph):
        node.name = f"n{index}"
    return model


@pytest.mark.parametrize("behind", ["", "r = Relu (c)", "r = Clip (c, lo, hi)", "r = Clip (c, lo)"])
def test_a_float_conv_between_codes_stays_in_float(behind: str, random: np.random.Generator) -> None:
    model = float_conv(behind, random)
    x = random.normal(size=(1, 4, 9, 9)).astype(np.float32)
    expected = runtime.Session(model, optimize=False).run({"x": x})["y"].astype(int)
    # What this rule is there for: left alone, the runtime gives the weights one scale for all channels.
    alone = runtime.Session(model).run({"x": x})["y"].astype(int)
    assert np.abs(alone - expected).max() > 1
    legal = legalize(model)
    assert ("com.microsoft", "FusedConv") in [(node.domain, node.op_type) for node in legal.graph]
    found = runtime.Session(legal).run({"x": x})["y"].astype(int)
    assert np.abs(found - expected).max() <= 1
    assert not KeepFloatConvs()(legal).modified


def test_convs_that_are_to_be_integers_or_leave_in_float_stay_as_they_are(random: np.random.Generator) -> None:
    assert not KeepFloatConvs()(parsed(CONV.format(outputs="", shift="0", more=""))).modified
    floats = float_conv("r = Exp (c)", random)
    assert not KeepFloatConvs()(floats).modified
    shared = float_conv("r = Relu (c) e = Exp (c)", random)
    assert not KeepFloatConvs()(shared).modified
