"""What distributions.json says of tensors is what their values are."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcompile.calib.observers import Histogram
from qcompile.core.plan import QuantPlan, Role, TensorQuant
from qcompile.distributions import BARS, distributions


def model_with(values: np.ndarray) -> ir.Model:
    weight = ir.Value(name="w", const_value=ir.tensor(values, name="w"))
    return ir.Model(ir.Graph([], [], nodes=[], initializers=[weight], opset_imports={"": 21}), ir_version=10)


def plan_with(name: str, quant: TensorQuant) -> QuantPlan:
    return QuantPlan({name: quant}, {})


@given(st.integers(1, 5000), st.floats(-3, 3), st.floats(1e-3, 1e3), st.integers(0, 2**32 - 1))
def test_an_activation(count: int, centre: float, spread: float, seed: int) -> None:
    values = (np.random.default_rng(seed).normal(centre, 1, count) * spread).astype(np.float32)
    seen = Histogram()
    seen.add(values)
    scale = float(np.float32(spread / 100))
    plan = plan_with("x", TensorQuant(Role.ACTIVATION, "uint8", (scale,), (128,)))
    one = distributions(model_with(np.zeros(1, np.float32)), plan, {"x": seen})["tensors"]["x"]
    assert sum(one["counts"]) == count and len(one["counts"]) <= BARS + 1
    low, high = one["low"], one["low"] + one["width"] * len(one["counts"])
    slack = 1e-5 * max(abs(low), abs(high))
    assert low - slack <= values.min() and values.max() <= high + slack
    assert one["range"] == pytest.approx([-128 * scale, 127 * scale])
    outside = np.mean((values < (-128.5 * scale)) | (values > 127.5 * scale))
    # The histogram knows a value to a bin: those at the edge may be on either side.
    edge = np.mean(np.abs(np.abs(values + scale / 2) - 128 * scale) <= seen.width)
    assert abs(one["outside"] - outside) <= edge + 1e-5


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_a_weight_in_units_of_what_its_codes_reach(dtype: str) -> None:
    values = np.random.default_rng(0).normal(size=(16, 40)).astype(np.float32)
    top = {"int8": 127, "int4": 7}[dtype]
    scales = tuple(float(s) for s in (np.abs(values).max(1) / top).astype(np.float32))
    quant = TensorQuant(Role.WEIGHT, dtype, scales, (0,) * 16, axis=0)
    one = distributions(model_with(values), plan_with("w", quant), {})["tensors"]["w"]
    assert sum(one["counts"]) == values.size and one["outside"] == 0.0
    assert one["low"] == pytest.approx(-1.0, rel=1e-5)
    clipped = TensorQuant(Role.WEIGHT, dtype, tuple(0.5 * s for s in scales), (0,) * 16, axis=0)
    half = distributions(model_with(values), plan_with("w", clipped), {})["tensors"]["w"]
    relative = np.abs(values) / (0.5 * np.array(scales)[:, None] * top)
    assert half["outside"] == pytest.approx(np.mean(relative > 1 + 0.5 / top), abs=1e-4) and half["outside"] > 0


def test_a_range_of_each_run_is_none() -> None:
    seen = Histogram()
    seen.add(np.arange(10, dtype=np.float32))
    plan = plan_with("x", TensorQuant(Role.ACTIVATION, "uint8", (), ()))
    one = distributions(model_with(np.zeros(1, np.float32)), plan, {"x": seen})["tensors"]["x"]
    assert one["range"] is None and one["outside"] is None
