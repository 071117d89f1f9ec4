"""What ONNX Runtime makes of the models that are written for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from qcompile.backends.ort.lower import OrtBackend
from qcompile.calib.collect import collect
from qcompile.calib.data import Dataset, input_specs
from qcompile.calib.observers import Observer
from qcompile.core import model as models
from qcompile.core import runtime
from qcompile.core.plan import Precision
from qcompile.core.target import Target
from qcompile.passes.allocate_bits import allocate_bits
from qcompile.passes.canonicalize import Canonicalize
from qcompile.passes.insert_qdq import InsertQdq
from qcompile.passes.place import place

Build = Callable[..., Any]


def lowered(model: ir.Model, target: Target, folder: Path, activations: bool = True) -> Any:
    """Quantize with random data and lower; return what the backend says, and the plan."""
    Canonicalize(21)(model)
    samples = [runtime.synthetic_feeds(model, seed) for seed in range(4)]
    data = Dataset("random", lambda: samples, input_specs(model))
    placement = place(model, target, True, activations)
    statistics = collect(model, placement.activations, data, lambda items, total, what: items)
    plan = allocate_bits(model, placement, statistics, target, dict.fromkeys(placement.activations, Observer.MINMAX))
    quantized = model.clone()
    InsertQdq(plan)(quantized)
    return OrtBackend().lower(quantized, plan, target, folder), plan, quantized, samples


@pytest.fixture
def eager(cpu: Target) -> Target:
    return replace(cpu, ops={name: replace(rule, fewest_weights=0) for name, rule in cpu.ops.items()})


@pytest.mark.parametrize("length", ["4", "T"])
def test_a_matmul_with_a_bias_behind_it_stays_on_codes(
    length: str, model_of: Build, eager: Target, tmp_path: Path, random: np.random.Generator
) -> None:
    """With static shapes the runtime would make a Gemm of both, in float."""
    text = f"(float[1,{length},8] x) => (float[1,{length},6] y) {{ m = MatMul (x, w) y = Add (m, b) }}"
    weights = {"w": random.normal(size=(8, 6)).astype(np.float32), "b": random.normal(size=6).astype(np.float32)}
    found, _, _, _ = lowered(model_of(text, **weights), eager, tmp_path)
    assert list(found.kernels.values()) == ["MatMulIntegerToFloat"]
    assert found.refusals == ()


def test_a_matrix_times_weights_with_a_bias_is_an_integer_gemm(
    model_of: Build, eager: Target, tmp_path: Path, random: np.random.Generator
) -> None:
    weights = {"w": random.normal(size=(8, 6)).astype(np.float32), "b": random.normal(size=(1, 6)).astype(np.float32)}
    text = "(float[2,8] x) => (float[2,6] y) { m = MatMul (x, w) y = Add (m, b) }"
    found, _, _, _ = lowered(model_of(text, **weights), eager, tmp_path)
    assert list(found.kernels.values()) == ["QGemm"]


@pytest.mark.parametrize("behind", ["y = Exp (r)", "y = Gemm (r, v)"])
def test_a_gemm_with_a_relu_behind_it_stays_on_codes(
    behind: str, model_of: Build, eager: Target, tmp_path: Path, random: np.random.Generator
) -> None:
    """The runtime would make a float FusedGemm of both, unless the result is quantized."""
    text = f"(float[2,8] x) => (float[2,8] y) {{ a = Gemm (x, w, b) r = Relu (a) {behind} }}"
    weights = {"w": (8, 8), "b": (8,), "v": (8, 8)}
    arrays = {name: random.normal(size=shape).astype(np.float32) for name, shape in weights.items()}
    found, _, _, _ = lowered(model_of(text, **arrays), eager, tmp_path)
    assert set(found.kernels.values()) == {"QGemm"} and found.refusals == ()


def test_what_the_runtime_takes_in_by_itself_is_told(
    model_of: Build, eager: Target, tmp_path: Path, random: np.random.Generator
) -> None:
    """A Sigmoid between two integer operators is not in the plan, and runs on codes all the same."""
    text = "(float[1,4,6,6] x) => (float[1,4,6,6] y) { a = Conv (x, w) s = Sigmoid (a) y = Conv (s, v) }"
    weights = {name: random.normal(size=(4, 4, 1, 1)).astype(np.float32) for name in "wv"}
    found, plan, _, _ = lowered(model_of(text, **weights), eager, tmp_path)
    sigmoid = next(name for name, op in plan.ops.items() if op.op_type == "Sigmoid")
    assert plan.ops[sigmoid].precision is Precision.FLOAT
    assert found.kernels[sigmoid] == "QLinearSigmoid"


@pytest.mark.parametrize("attribute", ["ceil_mode = 1", "dilations = [2, 2]"])
def test_no_integer_kernel_is_called_for_a_pool_that_has_none(
    attribute: str, model_of: Build, eager: Target, tmp_path: Path, random: np.random.Generator
) -> None:
    text = f"""(float[1,4,7,7] x) => (float[1,4,A,B] y) {{
        a = Conv (x, w) p = AveragePool <kernel_shape = [2, 2], strides = [2, 2], {attribute}> (a) y = Conv (p, v) }}"""
    weights = {name: random.normal(size=(4, 4, 1, 1)).astype(np.float32) for name in "wv"}
    model = model_of(text, 19, **weights)
    found, plan, quantized, samples = lowered(model, eager, tmp_path)
    assert "pool" in plan.ops[list(plan.ops)[-1]].reason
    assert set(found.kernels.values()) == {"QLinearConv"}
    run = OrtBackend().open(tmp_path, found.files)
    for feeds in samples:
        expected = runtime.Session(quantized, optimize=False).run(feeds)["y"]
        np.testing.assert_allclose(run(feeds)["y"], expected, atol=1e-5)


def test_weights_of_float_operators_are_unpacked_when_the_model_is_loaded(
    model_of: Build, eager: Target, tmp_path: Path, random: np.random.Generator
) -> None:
    text = "(float[1,4,6,6] x) => (float[1,5,6,6] y) { y = Conv (x, w, b) }"
    weights = {"w": random.normal(size=(5, 4, 1, 1)).astype(np.float32), "b": random.normal(size=5).astype(np.float32)}
    _, _, quantized, samples = lowered(model_of(text, **weights), eager, tmp_path, activations=False)
    types = [node.op_type for node in models.load_written(tmp_path / "model.onnx").graph]
    assert types == ["Cast", "Mul", "Conv"]
    # What is executed is the float Conv alone, in whatever layout the runtime likes.
    executed = {node.op_type for node in runtime.optimized_nodes(tmp_path / "model.onnx")}
    assert not executed & {"Cast", "Mul", "DequantizeLinear"}
    for feeds in samples:
        expected = runtime.Session(quantized, optimize=False).run(feeds)["y"]
        found = runtime.Session(tmp_path / "model.onnx", optimize=False).run(feeds)["y"]
        np.testing.assert_array_equal(found, expected)
