"""Codes of four bits: what is written for them, and that the runtime executes what it would have executed anyway."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx.parser
import onnx_ir as ir
import pytest

from qcompile.backends.ort.legalize.pack_weights import PackWeights
from qcompile.backends.ort.tensorrt_rules import activations_per_tensor
from qcompile.core import model as models
from qcompile.core import packing, runtime

Build = Callable[..., Any]

MATMUL = """(float[2,{k}] x) => (float[2,{n}] y) {{
    q = QuantizeLinear (x, s, z) a = DequantizeLinear (q, s, z)
    c = DequantizeLinear <axis = 1> (w, t, o) y = MatMul (a, c) }}"""
CONV = """(float[1,{c},6,6] x) => (float[1,{n},6,6] y) {{
    q = QuantizeLinear (x, s, z) a = DequantizeLinear (q, s, z) c = DequantizeLinear <axis = 0> (w, t, o)
    d = Conv <pads = [1, 1, 1, 1]> (a, c) e = QuantizeLinear (d, s, z) y = DequantizeLinear (e, s, z) }}"""
GATHER = """(int64[3] x) => (float[3,{n}] y) {{
    g = Gather (w, x) y = DequantizeLinear <axis = 1> (g, t, o) }}"""


def packed(shape: tuple[int, ...], axis: int, random: np.random.Generator) -> np.ndarray:
    scaled = random.normal(size=shape).astype(np.float32) * 35
    return packing.pack_codes(scaled, packing.multiples(scaled, axis))


def build(model_of: Build, text: str, codes: np.ndarray, channels: int, opset: int = 21) -> ir.Model:
    model: ir.Model = model_of(
        text,
        opset,
        w=codes,
        t=np.full(channels, 0.01, np.float32),
        o=np.zeros(channels, np.int8),
        s=np.float32(0.05),
        z=np.uint8(128),
    )
    return model


@pytest.fixture
def cases(model_of: Build, random: np.random.Generator) -> dict[str, ir.Model]:
    return {
        "MatMul": build(model_of, MATMUL.format(k=100, n=256), packed((100, 256), 1, random), 256),
        # 27 weights a channel: blocks of 14, and one zero that is taken off again.
        "Conv": build(model_of, CONV.format(c=3, n=512), packed((512, 3, 3, 3), 0, random), 512),
        "Gather": build(model_of, GATHER.format(n=64), packed((300, 64), 1, random), 64),
    }


def feeds(name: str, random: np.random.Generator) -> dict[str, np.ndarray]:
    shapes = {"MatMul": (2, 100), "Conv": (1, 3, 6, 6)}
    x = np.array([0, 7, 299]) if name == "Gather" else random.normal(size=shapes[name]).astype(np.float32)
    return {"x": x}


@pytest.mark.parametrize("name", ["MatMul", "Conv", "Gather"])
def test_products_are_stored_as_what_they_are_products_of(
    name: str, cases: dict[str, ir.Model], random: np.random.Generator, tmp_path: Path
) -> None:
    model, given = cases[name], feeds(name, random)
    written = PackWeights()(model.clone()).model
    stored = {value.const_value.dtype: value.const_value.size for value in written.graph.initializers.values()}
    codes = model.graph.initializers["w"].const_value.size
    assert codes <= stored[ir.DataType.INT4] <= 1.05 * codes
    assert models.initializer_bytes(written) < 0.65 * models.initializer_bytes(model)
    for optimize in (False, True):
        before, after = (runtime.Session(one, optimize=optimize).run(given) for one in (model, written))
        np.testing.assert_array_equal(after["y"], before["y"])
    kernels = []
    for index, one in enumerate((model, written)):
        models.save(one, tmp_path / f"{index}.onnx")
        kernels.append([node.op_type for node in runtime.optimized_nodes(tmp_path / f"{index}.onnx")])
    assert kernels[0] == kernels[1]
    assert not PackWeights()(written).modified


def test_what_two_operators_read_is_unpacked_once(model_of: Build, random: np.random.Generator) -> None:
    text = """(float[2,64] x) => (float[2,64] y, float[2,64] v) {
        c = DequantizeLinear <axis = 1> (w, t, o) y = MatMul (x, c)
        d = DequantizeLinear <axis = 1> (w, t, o) u = Relu (x) v = MatMul (u, d) }"""
    model = build(model_of, text, packed((64, 64), 1, random), 64)
    written = PackWeights()(model.clone()).model
    assert [node.op_type for node in written.graph].count("Mul") == 1
    x = {"x": random.normal(size=(2, 64)).astype(np.float32)}
    before, after = (runtime.Session(one, optimize=False).run(x) for one in (model, written))
    assert all(np.array_equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("case", ["free codes", "few", "older opset", "an output"])
def test_other_codes_stay(case: str, model_of: Build, random: np.random.Generator) -> None:
    shape = (packing.FEWEST // 64 - (case == "few"), 64)
    codes = packed(shape, 1, random)
    if case == "free codes":
        codes = random.integers(-127, 128, shape).astype(np.int8)
    text = MATMUL.format(k=shape[0], n=64)
    model = build(model_of, text, codes, 64, 19 if case == "older opset" else 21)
    if case == "an output":
        model.graph.outputs.append(model.graph.initializers["w"])
    assert not PackWeights()(model).modified
    assert model.graph.initializers["w"].dtype is ir.DataType.INT8


def test_zero_points_stay_where_they_are_known(model_of: Build, random: np.random.Generator) -> None:
    """As many zeros as a large vocabulary has words are products of something, too."""
    columns = packing.FEWEST
    codes = random.integers(-127, 128, (4, columns)).astype(np.int8)
    model = build(model_of, MATMUL.format(k=4, n=columns), codes, columns)
    assert not PackWeights()(model).modified
    assert not np.any(model.graph.initializers["o"].const_value.numpy())


def test_for_tensorrt_weights_are_constants_in_front_of_their_dequantize_linear(cases: dict[str, ir.Model]) -> None:
    """Behind nodes they would count as activations, which have one scale there."""
    for name in ("MatMul", "Conv"):
        assert not list(activations_per_tensor(cases[name]))
        assert not PackWeights(leave_dequantized=True)(cases[name]).modified
        assert list(activations_per_tensor(PackWeights()(cases[name].clone()).model))
    assert PackWeights(leave_dequantized=True)(cases["Gather"]).modified


def test_the_file_is_valid_onnx(cases: dict[str, ir.Model], tmp_path: Path) -> None:
    for name, model in cases.items():
        models.save(PackWeights()(model.clone()).model, tmp_path / f"{name}.onnx")
        onnx.checker.check_model(tmp_path / f"{name}.onnx", full_check=True)
