"""Factors for weights of four bits, and the noise that they are chosen by, against the definitions in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from conftest import proto_from_text
from hypothesis import given
from hypothesis import strategies as st

from qcompile.calib.collect import ChannelSpread
from qcompile.calib.rounding import Operator, SecondMoments
from qcompile.calib.weight_scaling import ALPHAS, PackedReader, magnitude_log2
from qcompile.core import model as models
from qcompile.core import packing
from qcompile.core.plan import Role, TensorQuant

seeds = st.integers(0, 2**32 - 1)
Array = np.ndarray[Any, np.dtype[Any]]


def product(weight: Array, kind: str) -> ir.Node:
    """Return an operator with constant weights [K, N]."""
    text = {
        "MatMul": f"(float[9,{len(weight)}] x) => (float[9,{weight.shape[1]}] y) {{ y = MatMul(x, w) }}",
        "Gemm": f"(float[9,{len(weight)}] x) => (float[9,{weight.shape[1]}] y) {{ y = Gemm<transB: int = 1>(x, w) }}",
        "Conv": f"(float[1,{len(weight)},3,3] x) => (float[1,{weight.shape[1]},3,3] y) {{ y = Conv(x, w) }}",
    }[kind]
    stored = {"MatMul": weight, "Gemm": weight.T, "Conv": weight.T[:, :, None, None]}[kind]
    model = models.from_proto(proto_from_text(text, 21, w=np.ascontiguousarray(stored, np.float32)))
    return next(iter(model.graph))


def packed(weight: Array) -> Array:
    """Return weights [K, N] as their codes hold them."""
    weight = weight.astype(np.float32)
    scale = packing.packed_scale(np.abs(weight).max(0))
    quant = TensorQuant(Role.WEIGHT, "int8", tuple(map(float, scale)), (0,) * scale.size, 1, packing.BLOCK)
    return quant.dequantize(quant.quantize(weight)).astype(np.float64)


@given(seeds, st.sampled_from(["MatMul", "Gemm", "Conv"]))
def test_noise_is_that_of_what_the_operator_makes(seed: int, kind: str) -> None:
    random = np.random.default_rng(seed)
    rows = random.normal(size=(50, 40)) * np.exp(random.normal(0, 1.5, 40))
    weight = random.normal(size=(40, 6)).astype(np.float32).astype(np.float64)
    node = product(weight, kind)
    moments = SecondMoments((rows.T @ rows / len(rows))[None], len(rows))
    channels = np.arange(1, 41).reshape({"MatMul": (40, 1), "Gemm": (1, 40), "Conv": (1, 40, 1, 1)}[kind])
    operator = Operator(node, TensorQuant(Role.WEIGHT, "int8", (1.0,), (0,)))
    log2 = np.r_[0.0, random.integers(-16, 17, 40) / 8]
    factors = np.exp2(log2[1:])[:, None]
    exact, found = rows @ weight, rows @ (packed(weight * factors) / factors)
    expected = np.sum((found - exact) ** 2) / np.sum(exact**2)
    reader = PackedReader.of(operator, moments, channels)
    assert reader.noise(log2) == pytest.approx(expected, rel=1e-3)
    reciprocal = PackedReader.of(operator, moments, -channels)
    assert reciprocal.noise(-log2) == pytest.approx(expected, rel=1e-3)


@given(seeds, st.sampled_from(ALPHAS))
def test_factors_are_magnitudes_to_the_power_of_alpha(seed: int, alpha: float) -> None:
    random = np.random.default_rng(seed)
    power = np.exp(random.normal(0, 3.0, 16))
    power[3] = 0.0
    spread = ChannelSpread(np.zeros(16), np.sqrt(power), power)
    log2 = magnitude_log2([(spread, np.arange(1, 17))], alpha)
    alive = power > 0
    exact = alpha * np.log2(np.sqrt(power[alive]))
    assert log2[0] == log2[4] == 0.0
    np.testing.assert_array_equal(8 * log2[1:][alive], np.rint(8 * (exact - np.median(exact))))


def test_loud_channels_gain_by_larger_weights(random: np.random.Generator) -> None:
    rows = random.normal(size=(200, 64))
    rows[:, ::16] *= 30.0
    weight = random.normal(size=(64, 32))
    operator = Operator(product(weight, "MatMul"), TensorQuant(Role.WEIGHT, "int8", (1.0,), (0,)))
    reader = PackedReader.of(operator, SecondMoments((rows.T @ rows)[None], 200), np.arange(1, 65)[:, None])
    spread = ChannelSpread(rows.min(0), rows.max(0), np.mean(rows**2, 0))
    noise = [reader.noise(magnitude_log2([(spread, np.arange(1, 65))], alpha)) for alpha in ALPHAS]
    best = int(np.argmin(noise))
    assert best > 0 and noise[best] < 0.7 * noise[0]
