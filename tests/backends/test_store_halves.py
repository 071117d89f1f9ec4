"""Scales and biases in sixteen bits: what is written, and that the runtime executes what it would have anyway."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from qcompile.backends.ort.legalize.join_matmul_bias import JoinMatMulBias
from qcompile.backends.ort.legalize.store_halves import StoreHalves
from qcompile.core import execution, halves, runtime

Build = Callable[..., ir.Model]

CONV = """(float[1,3,6,6] x) => (float[1,{n},6,6] y) {{
    q = QuantizeLinear (x, s, z) a = DequantizeLinear (q, s, z) c = DequantizeLinear <axis = 0> (w, t, o)
    d = Conv <pads = [1, 1, 1, 1]> (a, c, b) e = QuantizeLinear (d, s, z) y = DequantizeLinear (e, s, z) }}"""
MATMUL = """(float[2,16] x) => (float[2,{n}] y) {{
    q = QuantizeLinear (x, s, z) a = DequantizeLinear (q, s, z)
    c = DequantizeLinear <axis = 1> (w, t, o) m = MatMul (a, c) y = Add (m, b) }}"""
FLOAT = "(float[1,3,6,6] x) => (float[1,{n},6,6] y) {{ y = Conv <pads = [1, 1, 1, 1]> (x, w, b) }}"


def build(model_of: Build, text: str, shape: tuple[int, ...], random: np.random.Generator, **given: Any) -> ir.Model:
    channels = max(shape)
    weights = random.integers(-127, 128, shape).astype(np.int8)
    scales = halves.above(random.uniform(1e-3, 2e-3, channels))
    constants = {"w": weights, "t": scales, "o": np.zeros(channels, np.int8), "s": np.float32(0.05),
                 "z": np.uint8(128), "b": random.normal(size=channels).astype(np.float32)}  # fmt: skip
    return model_of(text.format(n=channels), opset=21, **{**constants, **given})


def run(model: ir.Model, x: np.ndarray) -> np.ndarray:
    return runtime.Session(model).run({"x": x})["y"]


def kernels(model: ir.Model, x: np.ndarray) -> list[str]:
    return [kernel.op_type for kernel in execution.execute(model, [{"x": x}])[0]]


@pytest.mark.parametrize(("text", "shape", "inputs"), [
    (CONV, (256, 3, 3, 3), (1, 3, 6, 6)),
    (MATMUL, (16, 256), (2, 16)),
])  # fmt: skip
def test_scales_and_biases_are_halves_and_the_kernels_are_the_same(
    model_of: Build, random: np.random.Generator, text: str, shape: tuple[int, ...], inputs: tuple[int, ...]
) -> None:
    model = build(model_of, text, shape, random)
    JoinMatMulBias()(model)
    x = random.normal(size=inputs).astype(np.float32)
    expected, executed = run(model, x), kernels(model, x)
    bias = np.asarray(model.graph.initializers["b"].const_value)
    assert StoreHalves()(model).modified
    stored = model.graph.initializers
    assert {"t_half", "b_half"} <= set(stored) and not {"t", "b"} & set(stored)
    types = {str(tensor.dtype) for name in ("t_half", "b_half") if (tensor := stored[name].const_value) is not None}
    assert types == {"FLOAT16"}
    assert kernels(model, x) == executed and any("Integer" in op or op == "QLinearConv" for op in executed)
    # The bias alone moves: by less than a step of the codes that leave, or by what a half lacks.
    step = 0.05 if text == CONV else 0.0
    assert np.max(np.abs(run(model, x) - expected)) <= step + np.max(np.abs(bias)) * 2.0**-11
    assert not StoreHalves()(model).modified


def test_scales_alone_change_nothing(model_of: Build, random: np.random.Generator) -> None:
    model = build(model_of, MATMUL, (16, 256), random, b=halves.nearest(random.normal(size=256)))
    x = random.normal(size=(2, 16)).astype(np.float32)
    expected = run(model, x)
    assert StoreHalves()(model).modified
    assert np.array_equal(run(model, x), expected)


def test_a_power_of_two_makes_room(model_of: Build, random: np.random.Generator) -> None:
    scales = halves.above(np.geomspace(1e-7, 1e-3, 256))
    model = build(model_of, MATMUL, (16, 256), random, t=scales)
    x = random.normal(size=(2, 16)).astype(np.float32)
    expected = run(model, x)
    assert StoreHalves()(model).modified and "t_power" in model.graph.initializers
    assert np.array_equal(run(model, x), expected)


def test_what_is_read_in_float_keeps_its_digits(model_of: Build, random: np.random.Generator) -> None:
    constants = {"w": random.normal(size=(256, 3, 3, 3)).astype(np.float32)}
    constants["b"] = random.normal(size=256).astype(np.float32)
    model = model_of(FLOAT.format(n=256), opset=21, **constants)
    assert not StoreHalves()(model).modified


@pytest.mark.parametrize("text", [CONV, MATMUL])
def test_few_numbers_are_left_alone(model_of: Build, random: np.random.Generator, text: str) -> None:
    shape = (halves.FEWEST // 2, 3, 3, 3) if text == CONV else (16, halves.FEWEST // 2)
    model = build(model_of, text, shape, random)
    assert not StoreHalves()(model).modified


def test_a_value_that_goes_out_as_well_is_left_alone(model_of: Build, random: np.random.Generator) -> None:
    model = build(model_of, MATMUL, (16, 256), random)
    model.graph.outputs.append(model.graph.initializers["t"])
    StoreHalves()(model)
    assert "t" in model.graph.initializers


def test_scales_with_more_digits_are_left_alone(model_of: Build, random: np.random.Generator) -> None:
    scales = random.uniform(1e-3, 2e-3, 256).astype(np.float32)
    model = build(model_of, MATMUL, (16, 256), random, t=scales)
    JoinMatMulBias()(model)
    StoreHalves()(model)
    assert "t" in model.graph.initializers and "b_half" in model.graph.initializers


def test_a_bias_that_others_read_too_keeps_its_digits(model_of: Build, random: np.random.Generator) -> None:
    text = MATMUL.replace("=> (float[2,{n}] y)", "=> (float[2,{n}] y, float[{n}] u)").replace("}}", " u = Neg (b) }}")
    model = build(model_of, text, (16, 256), random)
    JoinMatMulBias()(model)
    StoreHalves()(model)
    assert "b" in model.graph.initializers
