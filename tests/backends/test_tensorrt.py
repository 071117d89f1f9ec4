"""TensorRT's rules, each with a graph that breaks it, and the rewrites that make artifacts follow them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from conftest import proto_from_text

from qcompile.backends.base import find_target
from qcompile.backends.ort import tensorrt_rules as rules
from qcompile.backends.ort.legalize.four_bit_blocks import FourBitBlocks
from qcompile.backends.ort.legalize.tensorrt_placement import (
    DequantizeTables,
    FloatBiases,
    FreeResiduals,
    QuantizeConcats,
)
from qcompile.backends.ort.legalize.unpack_weights import UnpackWeightsAtLoad
from qcompile.core import packing, runtime
from qcompile.passes.canonicalize import Canonicalize

Build = Callable[..., ir.Model]
S, Z = np.float32(0.05), np.int8(0)
#: Parameters of 3x3 convolutions between four channels, as codes.
CONV = {
    "w": np.ones((4, 4, 3, 3), np.int8),
    "t": np.full(4, 0.01, np.float32),
    "o": np.zeros(4, np.int8),
    "s": S,
    "z": Z,
}
QUANTIZED = """q = QuantizeLinear (x, s, z) a = DequantizeLinear (q, s, z) v = DequantizeLinear <axis = 0> (w, t, o)
    c = Conv <pads = [1, 1, 1, 1]> (a, v)"""


def graph(nodes: str, **given: Any) -> ir.Model:
    """Build a model around one convolution, its values typed and its nodes named."""
    model = ir.from_proto(
        proto_from_text(f"(float[1,4,8,8] x) => (float[1,4,8,8] y) {{ {nodes} }}", 21, **CONV | given)
    )
    for name in set(model.graph.initializers):
        if not model.graph.initializers[name].uses():
            del model.graph.initializers[name]
    ir.passes.common.ShapeInferencePass()(model)
    for index, node in enumerate(model.graph):
        node.name = f"node_{index}"
    return model


def broken(model: ir.Model) -> set[str]:
    return {one.rule for one in (*rules.violations(model, rules.MUST), *rules.violations(model, rules.SHOULD))}


def test_a_convolution_on_codes_breaks_none() -> None:
    assert broken(graph(f"{QUANTIZED} y = Relu (c)")) == set()


PAIR = "r = QuantizeLinear ({0}, s, z) y = DequantizeLinear (r, s, z)"
COMPUTED = f"m = ReduceMax <keepdims = 0> (x) n = Abs (m) {QUANTIZED.replace('x, s', 'x, n')} y = Relu (c)"
BIAS = QUANTIZED.replace("(a, v)", "(a, v, b)").replace("c =", "b = DequantizeLinear <axis = 0> (i, u, k) c =")
BIASES = {"i": np.arange(4, dtype=np.int32), "u": np.full(4, S), "k": np.zeros(4, np.int32)}
INPUT = "q = QuantizeLinear (x, s, z) a = DequantizeLinear (q, s, z)"
HALVES = "h = Slice (x, b0, b2, b1) g = Slice (x, b2, b4, b1) j = Concat <axis = 1> (h, g)"
CUTS = {"b0": np.array([0]), "b1": np.array([1]), "b2": np.array([2]), "b4": np.array([4])}
FLOATS = {"f": np.ones((4, 4, 3, 3), np.float32)}


@pytest.mark.parametrize(
    ("rule", "nodes", "given"),
    [
        ("symmetric", f"{QUANTIZED} y = Relu (c)", {"z": np.int8(3)}),
        ("one scale for activations", f"{QUANTIZED} y = Relu (c)", {"s": np.full(4, S), "z": np.zeros(4, np.int8)}),
        ("scales by output channel", f"{QUANTIZED.replace('<axis = 0>', '<axis = 1>')} y = Relu (c)", {}),
        ("constant scales", COMPUTED, {}),
        ("constant scales", f"{QUANTIZED} y = Relu (c)", {"s": np.float32(0.0)}),
        ("float biases", f"{BIAS} y = Relu (c)", BIASES),
        ("codes between Q and DQ", "q = QuantizeLinear (x, s, z) r = Neg (q) y = DequantizeLinear (r, s, z)", {}),
        ("both operands", f"{INPUT} y = Conv <pads = [1, 1, 1, 1]> (a, f)", FLOATS),
        ("both operands", f"{QUANTIZED.replace('(a, v)', '(x, v)')} y = Relu (c)", {}),
        ("known operators", "q, p, n = DynamicQuantizeLinear (x) y = DequantizeLinear (q, p, n)", {}),
        ("free results", f"{QUANTIZED} {PAIR.format('c').replace('y =', 'd =')} y = Relu (d)", {}),
        ("quantized residuals", f"{QUANTIZED} e = Add (c, x) {PAIR.format('e')}", {}),
        ("one scale of a Concat", f"{HALVES} {PAIR.format('j')}", CUTS),
    ],
)
def test_each_rule_names_what_breaks_it(rule: str, nodes: str, given: dict[str, Any]) -> None:
    assert rule in broken(graph(nodes, **given))


def test_unsigned_codes_break_a_rule() -> None:
    text = f"{QUANTIZED} y = Relu (c)"
    assert broken(graph(text, z=np.uint8(0))) == {"signed codes"}


@pytest.mark.parametrize(
    ("nodes", "block", "fine"),
    [
        ("v = DequantizeLinear <axis = 0, block_size = 16> (w4, t4) y = MatMul (x, v)", True, True),
        ("v = DequantizeLinear <axis = 1> (w4, t4) y = MatMul (x, v)", False, False),
        ("v = DequantizeLinear <axis = 1, block_size = 16> (w4, u4) y = MatMul (x, v)", True, False),
        ("v = DequantizeLinear <axis = 1, block_size = 16> (w4, u4) y = Gemm <transB = 1> (x, v)", True, True),
        ("v = DequantizeLinear <axis = 0, block_size = 16> (w4, t4) y = Add (x, v)", True, False),
    ],
)
def test_four_bits_are_for_weights_of_products(model_of: Build, nodes: str, block: bool, fine: bool) -> None:
    import ml_dtypes

    text = f"(float[32,32] x) => (float[32,32] y) {{ {nodes} }}"
    scale = np.full((2, 32) if block else 32, S)
    model = model_of(text, 21, w4=np.ones((32, 32), np.int8), t4=scale, u4=np.full((32, 2), S))
    codes = model.graph.initializers["w4"]
    codes.const_value = ir.tensor(np.ones((32, 32), ml_dtypes.int4), name="w4")
    codes.dtype = ir.DataType.INT4
    ir.passes.common.ShapeInferencePass()(model)
    assert ("four bits for weights" in broken(model)) is not fine


def test_scales_per_channel_need_their_opset() -> None:
    model = graph(f"{QUANTIZED} y = Relu (c)")
    model.graph.opset_imports[""] = 12
    assert broken(model) == {"opset"}


def test_biases_become_floats(random: np.random.Generator) -> None:
    model = graph(f"{BIAS} y = Relu (c)", **BIASES)
    x = random.standard_normal((1, 4, 8, 8)).astype(np.float32)
    before = runtime.Session(model, optimize=False).run({"x": x})["y"]
    assert FloatBiases()(model).modified and broken(model) == set()
    assert not FloatBiases()(model).modified
    np.testing.assert_allclose(runtime.Session(model, optimize=False).run({"x": x})["y"], before, rtol=1e-5, atol=1e-5)


RESIDUAL = f"""{QUANTIZED} r = QuantizeLinear (c, s, z) d = DequantizeLinear (r, s, z)
    e = Add (d, a) y = Relu (e)"""


def test_a_sum_takes_the_product_as_it_is(random: np.random.Generator) -> None:
    model = graph(RESIDUAL)
    x = random.standard_normal((1, 4, 8, 8)).astype(np.float32)
    assert FreeResiduals()(model).modified
    add = next(node for node in model.graph if node.op_type == "Add")
    assert [value.producer().op_type for value in add.inputs] == ["Conv", "DequantizeLinear"]
    assert not FreeResiduals()(model).modified
    plain = graph(f"{QUANTIZED} e = Add (c, a) y = Relu (e)")
    expected = runtime.Session(plain, optimize=False).run({"x": x})["y"]
    np.testing.assert_array_equal(runtime.Session(model, optimize=False).run({"x": x})["y"], expected)


@pytest.mark.parametrize("more", ["g = Neg (c) y = Sum (e, g)", "g = Neg (d) y = Sum (e, g)"])
def test_a_product_that_others_read_keeps_its_codes(more: str) -> None:
    assert not FreeResiduals()(graph(RESIDUAL.replace("y = Relu (e)", more))).modified


CONCAT = """q = QuantizeLinear (x, s, z) a = DequantizeLinear (q, s, z)
    v = DequantizeLinear <axis = 0> (w, t, o) c = Conv <pads = [1, 1, 1, 1]> (a, v) n = Relu (c) m = Neg (c)
    j = Concat <axis = 1> (n, m) i = QuantizeLinear (j, s, z) k = DequantizeLinear (i, s, z)
    y = Slice (k, b0, b4, b1)"""


def test_operands_of_a_concat_get_its_scale_and_nothing_moves(random: np.random.Generator) -> None:
    model = graph(CONCAT, **CUTS)
    x = random.standard_normal((1, 4, 8, 8)).astype(np.float32)
    before = runtime.Session(model, optimize=False).run({"x": x})["y"]
    assert "one scale of a Concat" in broken(model) and QuantizeConcats()(model).modified
    assert broken(model) == set() and not QuantizeConcats()(model).modified
    np.testing.assert_array_equal(runtime.Session(model, optimize=False).run({"x": x})["y"], before)


def test_a_concat_that_others_read_in_float_stays() -> None:
    assert not QuantizeConcats()(graph(CONCAT.replace("y = Slice (k,", "l = Neg (j) y = Slice (l,"), **CUTS)).modified


def test_the_target_knows_no_zero_points() -> None:
    target, backend = find_target("cuda:tensorrt")
    assert (target.symmetric, target.activation_dtype, target.per_channel) == (True, "int8", True)
    model = Canonicalize(21, {})(graph("y = Relu (x)")).model
    assert backend.halvable(next(iter(model.graph)), target)


@pytest.mark.parametrize("transposed", [False, True])
def test_packed_weights_of_float_products_are_int4_in_blocks(transposed: bool, random: np.random.Generator) -> None:
    weights = random.standard_normal((64, 128)).astype(np.float32)
    scale = packing.packed_scale(np.abs(weights).max(axis=0))
    codes = packing.pack_codes(weights / scale, packing.multiples(weights / scale, 1))
    op, axis = ("Gemm <transB = 1> (x, w)", 0) if transposed else ("MatMul (x, w)", 1)
    text = f"(float[2,64] x) => (float[2,128] y) {{ w = DequantizeLinear <axis = {axis}> (q, s, z) y = {op} }}"
    given = {"s": scale, "z": np.zeros(128, np.int8)}
    model = ir.from_proto(proto_from_text(text, 21, q=codes.T if transposed else codes, **given))
    ir.passes.common.ShapeInferencePass()(model)
    x = random.standard_normal((2, 64)).astype(np.float32)
    before = runtime.Session(model, optimize=False).run({"x": x})["y"]
    assert FourBitBlocks()(model).modified and broken(model) == set()
    assert not FourBitBlocks()(model).modified
    node = next(node for node in model.graph if node.op_type == "DequantizeLinear")
    assert node.inputs[0].const_value.dtype is ir.DataType.INT4
    after = runtime.Session(model, optimize=False).run({"x": x})["y"]
    np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-5)


def test_products_of_codes_and_ordinary_codes_stay(random: np.random.Generator) -> None:
    text = """(float[2,64] x) => (float[2,128] y) { q = QuantizeLinear (x, p, o) a = DequantizeLinear (q, p, o)
        w = DequantizeLinear <axis = 1> (c, s, z) y = MatMul (a, w) }"""
    weights = random.standard_normal((64, 128)).astype(np.float32)
    scale = packing.packed_scale(np.abs(weights).max(axis=0))
    codes = packing.pack_codes(weights / scale, packing.multiples(weights / scale, 1))
    given = {"s": scale, "z": np.zeros(128, np.int8), "p": S, "o": Z}
    assert not FourBitBlocks()(ir.from_proto(proto_from_text(text, 21, c=codes, **given))).modified
    free = random.integers(-127, 128, (64, 128)).astype(np.int8)
    plain = text.replace("MatMul (a, w)", "MatMul (x, w)")
    assert not FourBitBlocks()(ir.from_proto(proto_from_text(plain, 21, c=free, **given))).modified


@pytest.mark.parametrize(("axis", "done"), [(0, True), (1, False)])
def test_tables_are_dequantized_in_front_of_the_lookup(axis: int, done: bool, random: np.random.Generator) -> None:
    text = f"""(int64[3] i) => (float[n,m] y) {{
        r = Gather <axis = {axis}> (q, i) y = DequantizeLinear <axis = 1> (r, s, z) }}"""
    scale = random.uniform(0.01, 0.1, 6 if axis == 0 else 3).astype(np.float32)
    codes = random.integers(-127, 128, (8, 6)).astype(np.int8)
    model = ir.from_proto(proto_from_text(text, 21, q=codes, s=scale, z=np.zeros(scale.size, np.int8)))
    ir.passes.common.ShapeInferencePass()(model)
    feeds = {"i": np.array([1, 0, 5])}
    before = runtime.Session(model, optimize=False).run(feeds)["y"]
    assert DequantizeTables()(model).modified is done and not DequantizeTables()(model).modified
    assert ("one scale for activations" in broken(model)) is not done
    np.testing.assert_array_equal(runtime.Session(model, optimize=False).run(feeds)["y"], before)


def test_weights_that_a_convolution_in_float_shares_with_one_on_codes_are_unpacked_for_it_alone(
    random: np.random.Generator,
) -> None:
    floats = "f = Conv <pads = [1, 1, 1, 1]> (x, v) y = Sub (d, f)"
    model = graph(f"{QUANTIZED} k = QuantizeLinear (c, s, z) d = DequantizeLinear (k, s, z) {floats}")
    assert broken(model) == {"both operands"}
    x, before = {"x": random.normal(size=(1, 4, 8, 8)).astype(np.float32)}, model.clone()
    # Elsewhere codes stay for all: kernels of processors know weights alone.
    assert not UnpackWeightsAtLoad()(model.clone()).modified
    assert UnpackWeightsAtLoad(leave_float=True)(model).modified and broken(model) == set()
    assert sum(value.dtype is ir.DataType.INT8 and value.shape == [4, 4, 3, 3]
               for value in model.graph.initializers.values()) == 1  # fmt: skip
    old, new = (runtime.Session(one).run(x)["y"] for one in (before, model))
    np.testing.assert_allclose(new, old, atol=1e-5 * np.abs(old).max())
    assert not UnpackWeightsAtLoad(leave_float=True)(model).modified
