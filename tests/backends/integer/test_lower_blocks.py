"""What multiplies floats is lowered with a scale per block, and what has no such form is refused by name."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import onnx.helper
import onnx.numpy_helper
import onnx_ir as ir
import pytest
from island_models import FLOATS, agree, model_of

from qcompile.backends.integer import float_operations as ops
from qcompile.backends.integer.lower import lower
from qcompile.core import packing
from qcompile.core.errors import TargetError

#: Activations are rounded to eight bits, by blocks: of what comes out, about this much is lost.
CLOSE = 0.03


def graph_of(codes, scale, op="MatMul", zero=None, weights=None, bias=None, behind=(), shape=(1, 5, 48), **attributes):
    """Return a model of one layer whose input is in float; `weights` are attributes of its DequantizeLinear."""
    arrays = {"w": codes, "s": scale} | ({"z": zero} if zero is not None else {})
    arrays |= {"b": bias} if bias is not None else {}
    dequantize = onnx.helper.make_node(
        "DequantizeLinear", list(arrays)[: 2 + (zero is not None)], ["dw"], **weights or {}
    )
    layer = onnx.helper.make_node(op, ["x", "dw", *(["b"] if bias is not None else [])], ["m"], **attributes)
    last = behind[-1].output[0] if behind else "m"
    outputs = codes.shape[0] if attributes.get("transB") else codes.shape[1]
    graph = onnx.helper.make_graph(
        [dequantize, layer, *behind], "g",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, shape)],
        [onnx.helper.make_tensor_value_info(last, onnx.TensorProto.FLOAT, (*shape[:-1], outputs))],
        [onnx.numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )  # fmt: skip
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)
    return onnx.shape_inference.infer_shapes(model, strict_mode=True)


def feeds(shape=(1, 5, 48)):
    return {"x": np.random.default_rng(1).normal(size=shape).astype(np.float32)}


def layer_of(program):
    (operation,) = program.operations
    assert isinstance(operation, ops.BlockDense)
    return operation


RANDOM = np.random.default_rng(0)
CODES = RANDOM.integers(-127, 128, (48, 20)).astype(np.int8)
FAR = np.full((3, 20), -120, np.int8)
SCALES = RANDOM.uniform(0.01, 0.02, 20).astype(np.float32)


def test_codes_with_a_scale_per_channel_have_blocks_of_activations():
    layer = layer_of(agree(graph_of(CODES, SCALES, weights={"axis": 1}), feeds(), CLOSE))
    assert (layer.bits, layer.block, layer.scale.shape) == (8, 48, (20, 1))
    long = RANDOM.integers(-127, 128, (300, 20)).astype(np.int8)
    model = graph_of(long, SCALES, weights={"axis": 1}, shape=(1, 5, 300))
    layer = layer_of(agree(model, feeds((1, 5, 300)), CLOSE))
    assert (layer.block, layer.scale.shape) == (128, (20, 3))


def test_a_scale_of_all_and_one_per_channel_of_four_bits():
    narrow = (CODES // 16).astype(ml_dtypes.int4)
    for scale, given in ((np.float32(0.02), {}), (SCALES, {"axis": 1})):
        assert layer_of(agree(graph_of(narrow, scale, weights=given), feeds(), CLOSE)).bits == 4


@pytest.mark.parametrize("zero", [None, 3])
@pytest.mark.parametrize("kind", [ml_dtypes.int4, ml_dtypes.uint4, np.int8])
def test_scales_by_blocks_of_inputs_are_taken_as_they_are(kind, zero):
    info = ml_dtypes.iinfo(kind) if kind is not np.int8 else np.iinfo(np.int8)
    codes = RANDOM.integers(max(info.min, -100), info.max + 1, (48, 20)).astype(kind)
    scale = RANDOM.uniform(0.01, 0.02, (3, 20)).astype(np.float32)
    zeros = None if zero is None else np.full((3, 20), zero).astype(kind)
    layer = layer_of(agree(graph_of(codes, scale, zero=zeros, weights={"axis": 0, "block_size": 16}), feeds(), CLOSE))
    assert layer.block == 16 and layer.scale.shape == (20, 3)
    assert layer.bits == (4 if kind is ml_dtypes.int4 and zero is None else 8)
    # Eleven bits of them are stored, in sixteen.
    np.testing.assert_array_equal(layer.scale, scale.T.astype(np.float16).astype(np.float32))


def test_packed_codes_are_four_bits_with_a_scale_per_block():
    numbers = RANDOM.integers(-8, 8, (20, 3, 16))
    multiples = RANDOM.integers(4, 16, (20, 3, 1))
    codes = np.clip(numbers * multiples, -127, 127)
    codes[:, :, 0] = 7 * multiples[..., 0]
    packed = packing.from_blocks(codes, (48, 20), 1).astype(np.int8)
    assert packing.unpacked(packed, 1) is not None
    layer = layer_of(agree(graph_of(packed, SCALES, weights={"axis": 1}), feeds(), CLOSE))
    assert (layer.bits, layer.block, layer.scale.shape) == (4, 16, (20, 3))


def test_a_gemm_with_a_bias_and_a_relu():
    bias = RANDOM.normal(size=20).astype(np.float32)
    relu = onnx.helper.make_node("Relu", ["m"], ["y"])
    model = graph_of(
        np.ascontiguousarray(CODES.T), SCALES, "Gemm", weights={"axis": 0}, bias=bias, behind=[relu], shape=(5, 48),
        transB=1, alpha=0.5, beta=2.0,
    )  # fmt: skip
    layer = layer_of(agree(model, feeds((5, 48)), CLOSE))
    np.testing.assert_array_equal(layer.bias, bias * 2)
    assert layer.low == 0.0


def test_a_bias_and_a_factor_behind_a_layer_are_part_of_it():
    bias, half = RANDOM.normal(size=20).astype(np.float32), np.float32(0.5)
    behind = [onnx.helper.make_node("Add", ["m", "c"], ["n"]), onnx.helper.make_node("Mul", ["n", "h"], ["y"])]
    model = graph_of(CODES, SCALES, weights={"axis": 1}, behind=behind)
    model.graph.initializer.extend([onnx.numpy_helper.from_array(bias, "c"), onnx.numpy_helper.from_array(half, "h")])
    layer = layer_of(agree(model, feeds(), CLOSE))
    np.testing.assert_allclose(layer.bias, bias / 2, rtol=1e-6)


def test_scales_beyond_sixteen_bits_stay_in_thirty_two():
    layer = layer_of(agree(graph_of(CODES, SCALES * np.float32(1e-5), weights={"axis": 1}), feeds(), CLOSE))
    np.testing.assert_array_equal(layer.scale[:, 0], SCALES * np.float32(1e-5))


@pytest.mark.parametrize(
    ("given", "fact"),
    [({"weights": {"axis": 1, "block_size": 10}, "scale": (48, 2)}, "along its outputs"),
     ({"weights": {"axis": 0, "block_size": 16}, "scale": (3, 20), "zero": FAR}, "fit int8"),
     ({"weights": {"axis": 0}, "scale": (48,)}, "follow its output channels")],
)  # fmt: skip
def test_other_scales_are_refused(given, fact):
    scale = np.full(given["scale"], 0.01, np.float32)
    model = graph_of(CODES, scale, zero=given.get("zero"), weights=given["weights"])
    with pytest.raises(TargetError, match=rf"MatMul.*{fact}"):
        lower(ir.from_proto(model), FLOATS)


def test_blocks_whose_sums_float32_does_not_hold_are_refused():
    codes = np.ones((2048, 3), np.int8)
    model = graph_of(codes, np.ones((1, 3), np.float32), weights={"axis": 0, "block_size": 2048}, shape=(1, 2, 2048))
    with pytest.raises(TargetError, match="blocks of 2048 inputs"):
        lower(ir.from_proto(model), FLOATS)


def test_two_activations_in_float_are_multiplied_where_they_are():
    body = """
        h = Constant<value_ints = [1, 4, 2, 4]>()
        r = Reshape(x, h)  q = Transpose<perm = [0, 2, 1, 3]>(r)  k = Transpose<perm = [0, 2, 3, 1]>(r)
        s = MatMul(q, k)  p = Softmax<axis = -1>(s)  c = MatMul(p, q)  t = Transpose<perm = [0, 2, 1, 3]>(c)
        f = Constant<value_ints = [1, 4, 8]>()  y = Reshape(t, f)
    """
    body = body.replace("h = Constant<value_ints = [1, 4, 2, 4]>()", "").replace(
        "f = Constant<value_ints = [1, 4, 8]>()", ""
    )
    model = model_of(body, h=np.array([1, 4, 2, 4]), f=np.array([1, 4, 8]))
    program = agree(model, {"x": RANDOM.normal(size=(1, 4, 8)).astype(np.float32)}, 1e-5)
    made = [type(operation).__name__ for operation in program.operations]
    assert made.count("FloatMatMul") == 2 and "Transpose" not in made
