"""The CUDA provider's route: products read codes, other weights are unpacked at load, and the table of its kernels."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from conftest import proto_from_text  # hypothesis wants no fixture of a function's scope
from hypothesis import given
from hypothesis import strategies as st

from qcompile.backends.base import find_target
from qcompile.backends.ort.half import Halve, float_values
from qcompile.backends.ort.kernel_table import cuda_kernels, placements
from qcompile.backends.ort.legalize import CUDA_RULES, legalize
from qcompile.backends.ort.legalize.block_matmuls import BlockMatMuls
from qcompile.core import model as models
from qcompile.core import packing, runtime
from qcompile.passes.canonicalize import Canonicalize

Build = Callable[..., ir.Model]
PRODUCT = "(float[2,{k}] x) => (float[2,{n}] y) {{ w = DequantizeLinear <axis = {axis}> (q, s, z) y = {op} }}"


def product(model_of: Build, codes: np.ndarray, scale: np.ndarray) -> ir.Model:
    k, n = codes.shape
    zero = np.zeros(scale.shape, np.int8)
    return model_of(PRODUCT.format(k=k, n=n, op="MatMul (x, w)", axis=1), 21, q=codes, s=scale, z=zero)


def counts(model: ir.Model) -> dict[str, int]:
    types = [node.op_type for node in model.graph]
    return {op_type: types.count(op_type) for op_type in types}


@given(st.integers(1, 5), st.integers(1, 12), st.booleans(), st.integers(0, 10**6))
def test_products_of_eight_bits_are_the_same_numbers(blocks: int, columns: int, transposed: bool, seed: int) -> None:
    random = np.random.default_rng(seed)
    codes = random.integers(-127, 128, (16 * blocks, columns)).astype(np.int8)
    scale = random.uniform(0.01, 0.1, columns).astype(np.float32)
    text = PRODUCT.format(
        k=16 * blocks, n=columns, axis=0 if transposed else 1,
        op="Gemm <transB = 1> (x, w, b)" if transposed else "MatMul (x, w)",
    )  # fmt: skip
    bias = random.standard_normal(columns).astype(np.float32)
    proto = proto_from_text(text, 21, q=codes.T if transposed else codes, s=scale, z=np.zeros(columns, np.int8), b=bias)
    model = models.from_proto(proto)
    x = random.standard_normal((2, 16 * blocks)).astype(np.float32)
    expected = x.astype(np.float64) @ (codes * scale.astype(np.float64)) + (bias if transposed else 0.0)
    assert BlockMatMuls()(model).modified and "MatMulNBits" in counts(model)
    np.testing.assert_allclose(runtime.Session(model).run({"x": x})["y"], expected, rtol=1e-4, atol=1e-3)


def test_four_bits_are_two_to_a_byte(model_of: Build, random: np.random.Generator) -> None:
    weights = random.standard_normal((256, 32)).astype(np.float32)
    scale = packing.packed_scale(np.abs(weights).max(axis=0))
    multiple = packing.multiples(weights / scale, 1)
    codes = packing.pack_codes(weights / scale, multiple)
    model = product(model_of, codes, scale)
    assert BlockMatMuls()(model).modified
    node = next(node for node in model.graph if node.op_type == "MatMulNBits")
    assert node.attributes.get_int("bits", 0) == 4 and node.attributes.get_int("block_size", 0) == packing.BLOCK
    stored = node.inputs[1].const_value
    assert stored.dtype is ir.DataType.UINT8 and stored.size == codes.size // 2
    x = random.standard_normal((2, 256)).astype(np.float32)
    expected = x.astype(np.float64) @ (codes * scale.astype(np.float64))
    np.testing.assert_allclose(runtime.Session(model).run({"x": x})["y"], expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("op", "axis", "rows"),
    [
        ("MatMul (x, w)", 1, 40),  # no whole blocks
        ("MatMul (x, w)", 0, 32),  # a scale per row of the weights
        ("Gemm <alpha = 2.0> (x, w, b)", 1, 32),
        ("MatMul (x, v)", 1, 32),
    ],
)
def test_other_products_stay(model_of: Build, op: str, axis: int, rows: int, random: np.random.Generator) -> None:
    codes = random.integers(-127, 128, (rows, rows)).astype(np.int8)
    text = PRODUCT.format(k=rows, n=rows, op=op, axis=axis)
    model = model_of(text, 21, q=codes, s=np.full(rows, 0.1, np.float32), z=np.zeros(rows, np.int8),
                     b=np.zeros(rows, np.float32), v=np.eye(rows, dtype=np.float32))  # fmt: skip
    assert not BlockMatMuls()(model).modified


def test_shifted_codes_and_scales_that_are_no_halves_stay(model_of: Build, random: np.random.Generator) -> None:
    codes = random.integers(-127, 128, (32, 8)).astype(np.int8)
    shifted = product(model_of, codes, np.full(8, 0.1, np.float32))
    shifted.graph.initializers["z"].const_value = ir.tensor(np.ones(8, np.int8), name="z")
    assert not BlockMatMuls()(shifted).modified
    tiny = product(model_of, codes, np.full(8, 1e-9, np.float32))
    tiny.graph.inputs[0].type = tiny.graph.outputs[0].type = ir.TensorType(ir.DataType.FLOAT16)
    assert not BlockMatMuls()(tiny).modified


def test_weights_that_two_products_read_are_stored_for_each(model_of: Build, random: np.random.Generator) -> None:
    text = """(float[2,16] x) => (float[2,16] a, float[2,16] y) {
        w = DequantizeLinear <axis = 1> (q, s, z) a = MatMul (x, w) y = MatMul (a, w) }"""
    codes = random.integers(-127, 128, (16, 16)).astype(np.int8)
    given = {"s": np.full(16, 0.01, np.float32), "z": np.zeros(16, np.int8)}
    model = model_of(text, 21, q=codes, **given)
    for index, node in enumerate(model.graph):
        node.name = f"node_{index}"
    x = random.standard_normal((2, 16)).astype(np.float32)
    expected = runtime.Session(model).run({"x": x})
    assert BlockMatMuls()(model).modified and counts(model) == {"MatMulNBits": 2}
    assert not BlockMatMuls()(model).modified
    for name, found in runtime.Session(model).run({"x": x}).items():
        np.testing.assert_allclose(found, expected[name], rtol=1e-4, atol=1e-4)


def test_weights_of_convolutions_are_folded_when_the_model_is_loaded(
    model_of: Build, random: np.random.Generator, tmp_path: Path
) -> None:
    text = """(float[1,3,8,8] x) => (float[1,16,8,8] y) {
        w = DequantizeLinear <axis = 0> (q, s, z) c = Conv <pads = [1, 1, 1, 1]> (x, w) y = Relu (c) }"""
    model = model_of(text, 21, q=random.integers(-127, 128, (16, 3, 3, 3)).astype(np.int8),
                     s=np.full(16, 0.01, np.float32), z=np.zeros(16, np.int8))  # fmt: skip
    model = Canonicalize(21, {})(model).model
    Halve(dict.fromkeys(float_values(model), 4.0))(model)
    models.save(legalize(model, CUDA_RULES), tmp_path / "model.onnx")
    written = onnx.load(tmp_path / "model.onnx")
    assert [t.data_type for t in written.graph.initializer if t.dims[1:] == [3, 3, 3]] == [onnx.TensorProto.INT8]
    graph = runtime.optimized(tmp_path / "model.onnx")
    assert {"DequantizeLinear", "Mul"}.isdisjoint(node.op_type for node in graph.node)
    assert [t.dims[:] for t in graph.initializer if t.data_type == onnx.TensorProto.INT8] == []


def test_the_table_is_that_of_a_real_runtime() -> None:
    table = cuda_kernels()
    assert table.provider == "CUDAExecutionProvider" and table.runtime.startswith("onnxruntime-gpu 1.")
    assert len(table.kernels) > 200 and "com.microsoft:MatMulNBits" in table.kernels
    assert not {"QLinearConv", "ConvInteger"} & set(table.kernels)


@pytest.mark.parametrize(
    ("text", "obstacle"),
    [
        ("(float16[2,8] x) => (float16[2,8] y) { y = Softmax (x) }", ""),
        ("(float16[2,8] x) => (float16[2,8] y) { y = Celu (x) }", "CUDAExecutionProvider has no Celu"),
        ("(uint8[2,8] x) => (uint8[2,8] y) { y = Relu (x) }", "CUDAExecutionProvider has no Relu of uint8"),
        ("(int32[2,8] x) => (int32[2,8] y) { y = MatMul (x, x) }", "CUDAExecutionProvider has no MatMul of int32"),
        ("(float16[2,8] x, float[1] s) => (float16[n,m] y) { y = Resize (x, , s) }", ""),
    ],
)
def test_a_node_that_no_kernel_takes_is_named(
    proto_of: Callable[..., onnx.ModelProto], text: str, obstacle: str
) -> None:
    model = ir.from_proto(proto_of(text, 21))
    assert cuda_kernels().obstacle(next(iter(model.graph)), 21) == obstacle


def test_what_falls_back_comes_first(proto_of: Callable[..., onnx.ModelProto]) -> None:
    text = """(float[2,8] x) => (float[2,8] y, float[4,4] z) {
        a = Relu (x) y = Celu (a) s = Shape (x) t = Div (s, two) u = Mul (t, t) v = Concat <axis = 0> (c, c)
        z = Reshape (a, v) }"""
    model = ir.from_proto(proto_of(text, 21, two=np.array([2, 2]), c=np.array([4])))
    model.graph.sort()
    for node in model.graph:
        if node.op_type in ("Shape", "Div", "Mul"):
            node.outputs[0].dtype = ir.DataType.INT64
    found = placements(model, 21, cuda_kernels())
    host = [one.op_type for one in found if one.host]
    assert sorted(host) == ["Celu", "Div", "Mul", "Shape"] and [one.op_type for one in found[: len(host)]] == host
    assert {one.op_type for one in found if not one.host} == {"Relu", "Reshape"}  # Concat is folded at load
    assert next(one.host for one in found if one.op_type == "Celu") == "CUDAExecutionProvider has no Celu"


def test_the_target_computes_no_codes() -> None:
    target, backend = find_target("cuda")
    assert (target.backend, target.activation_dtype, target.float_dtype) == (
        "ort",
        "",
        "float16",
    ) and backend.available()


def test_what_it_halves_follows_from_the_table(proto_of: Callable[..., Any]) -> None:
    target, backend = find_target("cuda")
    graph = ir.from_proto(proto_of("(float[2,8] x) => (float[2,8] y) { a = Celu (x) y = Relu (a) }", 21)).graph
    for value in (*graph.inputs, *(node.outputs[0] for node in graph)):
        value.dtype = ir.DataType.FLOAT
    assert {node.op_type: backend.halvable(node, target) for node in graph} == {"Celu": False, "Relu": True}
