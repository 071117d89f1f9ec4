from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx_ir as ir
import pytest
from conftest import proto_from_text
from hypothesis import given
from hypothesis import strategies as st

from qcompile.calib import rounding
from qcompile.calib.data import Dataset, Sample, input_specs
from qcompile.calib.rounding import Operator, SecondMoments, damped, gptq, round_weights, second_moments
from qcompile.core import model as models
from qcompile.core import packing, runtime
from qcompile.core.plan import Role, TensorQuant
from qcompile.pipeline import untracked

BYTE = (-127, 127)


def quant(count: int, axis: int | None, scale: float = 0.05) -> TensorQuant:
    return TensorQuant(Role.WEIGHT, "int8", (float(np.float32(scale)),) * count, (0,) * count, axis)


def correlated(generator: np.random.Generator, rows: int, width: int) -> np.ndarray:
    return generator.normal(size=(rows, max(1, width // 3))) @ generator.normal(size=(max(1, width // 3), width))


def one_by_one(weights: np.ndarray, step: np.ndarray, damped: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Round by optimal brain surgery: a fresh inverse for what is left after each row (Frantar et al., section 3)."""
    left, codes, free = weights / step, np.zeros_like(weights), list(order)
    while free:
        row, inverse = free[0], np.linalg.inv(damped[np.ix_(free, free)])
        codes[row] = np.clip(np.rint(left[row]), -127, 127)
        left[free] -= np.outer(inverse[0] / inverse[0, 0], left[row] - codes[row])
        free = free[1:]
    return codes


@given(st.integers(1, 9), st.integers(1, 4), st.integers(0, 2**32 - 1))
def test_it_is_optimal_brain_surgery_row_by_row(n: int, m: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    weights, step = generator.normal(size=(n, m)), generator.uniform(0.01, 0.2, m)
    rows = correlated(generator, 20, n)
    moments = rows.T @ rows / 20
    order = np.argsort(-moments.diagonal(), kind="stable")
    trusted = moments + rounding.DAMPING * moments.diagonal().mean() * np.eye(n)
    np.testing.assert_allclose(damped(moments), trusted)
    np.testing.assert_array_equal(gptq(weights, step, trusted, BYTE), one_by_one(weights, step, trusted, order))


@given(st.integers(1, 300), st.integers(0, 2**32 - 1))
def test_rows_that_have_nothing_in_common_are_rounded_to_nearest(n: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    weights, step = generator.normal(size=(n, 3)), np.array([0.01, 0.02, 0.04])
    found = gptq(weights, step, np.diag(generator.uniform(0.1, 5.0, n)), BYTE)
    np.testing.assert_array_equal(found, np.clip(np.rint(weights / step), -127, 127))


def test_what_is_computed_changes_less_and_blocks_do_not_show(
    monkeypatch: pytest.MonkeyPatch, random: np.random.Generator
) -> None:
    weights, step, rows = random.normal(size=(96, 8)), np.full(8, 0.3), correlated(random, 500, 96)
    moments = rows.T @ rows / len(rows)

    def error(codes: np.ndarray) -> float:
        return float(np.square(rows @ (codes * step - weights)).sum())

    monkeypatch.setattr(rounding, "BLOCK", 7)
    narrow = gptq(weights, step, damped(moments), BYTE)
    monkeypatch.undo()
    whole = gptq(weights, step, damped(moments), BYTE)
    np.testing.assert_array_equal(narrow, whole)
    assert error(whole) < 0.5 * error(np.rint(weights / step))


def test_packed_codes_stay_packed_and_compute_more_nearly_the_same(random: np.random.Generator) -> None:
    weights, rows = random.normal(size=(64, 48)).astype(np.float32), correlated(random, 500, 64)
    scale = packing.packed_scale(np.abs(weights).max(axis=0))
    packed = TensorQuant(Role.WEIGHT, "int8", tuple(map(float, scale)), (0,) * 48, 1, packing.BLOCK)
    model = ir.from_proto(proto_from_text("(float[1,64] x) => (float[1,48] y) { y = MatMul (x, w) }", w=weights))
    (node,) = model.graph
    moments = SecondMoments((rows.T @ rows / len(rows))[None], len(rows))
    codes = round_weights(Operator(node, packed), moments)
    assert codes.dtype == np.int8 and packing.unpacked(codes, 1) is not None

    def error(found: np.ndarray) -> float:
        return float(np.square(rows @ (packed.dequantize(found) - weights)).sum())

    assert error(codes) < 0.5 * error(packed.quantize(weights))


def test_packed_codes_trust_few_rows_less(random: np.random.Generator) -> None:
    """What two rows have in common is chance: codes come nearer to those of rows that have nothing in common."""
    weights, rows = random.normal(size=(64, 48)).astype(np.float32), correlated(random, 500, 64)
    scale = packing.packed_scale(np.abs(weights).max(axis=0))
    packed = TensorQuant(Role.WEIGHT, "int8", tuple(map(float, scale)), (0,) * 48, 1, packing.BLOCK)
    model = ir.from_proto(proto_from_text("(float[1,64] x) => (float[1,48] y) { y = MatMul (x, w) }", w=weights))
    operator = Operator(next(iter(model.graph)), packed)

    def lost(count: int) -> float:
        codes = round_weights(operator, SecondMoments((rows.T @ rows / len(rows))[None], count))
        return float(np.square(packed.dequantize(codes) - weights).sum())

    assert lost(1) < lost(64) < lost(4096)


def test_a_dead_input_leaves_codes_to_nearest() -> None:
    weights = np.array([[0.26], [0.74]])
    np.testing.assert_array_equal(gptq(weights, np.array([0.5]), damped(np.zeros((2, 2))), BYTE), [[1.0], [1.0]])


CONV = "y = Conv <group = {g}, strides = [2, 1], dilations = [1, 2], pads = [1, 0, 2, 1]> (x, w)"
CASES = {
    "conv": ("(float[2,4,7,9] x) => (float[N,M,H,W] y) { [n] " + CONV.format(g=1) + " }", (6, 4, 3, 2), 0),
    "grouped": ("(float[2,4,7,9] x) => (float[N,M,H,W] y) { [n] " + CONV.format(g=2) + " }", (6, 2, 3, 2), 0),
    "depthwise": ("(float[2,4,7,9] x) => (float[N,M,H,W] y) { [n] " + CONV.format(g=4) + " }", (4, 1, 3, 2), 0),
    "1d": ("(float[1,4,9] x) => (float[N,M,W] y) { [n] y = Conv <strides = [2]> (x, w) }", (5, 4, 3), 0),
    "matmul": ("(float[2,5,4] x) => (float[2,5,3] y) { [n] y = MatMul (x, w) }", (4, 3), 1),
    "gemm": ("(float[5,4] x) => (float[5,3] y) { [n] y = Gemm (x, w) }", (4, 3), 1),
    "transposed": ("(float[5,4] x) => (float[5,3] y) { [n] y = Gemm <transB = 1> (x, w) }", (3, 4), 0),
}


def case(name: str, random: np.random.Generator) -> tuple[ir.Model, Operator, np.ndarray]:
    text, shape, axis = CASES[name]
    weights = random.normal(size=shape).astype(np.float32)
    model = models.from_proto(proto_from_text(text, 21, w=weights))
    return model, Operator(next(iter(model.graph)), quant(shape[axis], axis)), weights


@pytest.mark.parametrize("name", CASES)
def test_rows_times_weights_are_what_the_operator_computes(name: str, random: np.random.Generator) -> None:
    model, operator, weights = case(name, random)
    feeds = runtime.synthetic_feeds(model, 0)
    y = runtime.Session(model, optimize=False).run(feeds)["y"]
    channels = np.moveaxis(y, 1 if name in ("conv", "grouped", "depthwise", "1d") else -1, -1)
    positions = np.arange(channels[..., 0].size)
    products = operator.rows(feeds["x"], y.shape, positions) @ operator.matrix(weights.astype(np.float64))
    expected = channels.reshape(len(positions), operator.groups, -1).transpose(1, 0, 2)
    np.testing.assert_allclose(products, expected, atol=1e-5)
    np.testing.assert_array_equal(operator.weights(operator.matrix(weights)), weights)


@pytest.mark.parametrize("name", CASES)
def test_moments_are_of_weighted_rows_and_codes_have_the_weights_shape(name: str, random: np.random.Generator) -> None:
    model, operator, weights = case(name, random)
    samples = [runtime.synthetic_feeds(model, seed) for seed in range(3)]
    data = Dataset("synthetic", lambda: samples, input_specs(model))
    ((found, moments),) = second_moments(model, [operator], data, untracked)
    matrices = moments.matrices
    assert found is operator and matrices.shape == (operator.groups, operator.depth, operator.depth)
    np.testing.assert_allclose(matrices, matrices.transpose(0, 2, 1))
    assert (np.linalg.eigvalsh(matrices) > -1e-9).all()
    positions = runtime.Session(model, optimize=False).run(samples[0])["y"].size // len(operator.quant.scales)
    assert moments.rows == 3 * positions
    codes = round_weights(operator, moments)
    assert codes.dtype == np.int8 and codes.shape == weights.shape
    # One step of its scale at most lies between a weight and its code, but for what is made up for.
    assert np.abs(codes * np.float32(0.05) - weights).max() < 0.3


def test_threads_change_no_moment(random: np.random.Generator) -> None:
    text = "(float[6,4] x) => (float[6,2] y) { [a] t = MatMul (x, v) [b] y = MatMul (t, w) }"
    v, w = (random.normal(size=shape).astype(np.float32) for shape in ((4, 4), (4, 2)))
    model = models.from_proto(proto_from_text(text, 21, v=v, w=w))
    operators = [Operator(node, quant(c, 1)) for node, c in zip(model.graph, (4, 2), strict=True)]
    data = Dataset("four", lambda: [runtime.synthetic_feeds(model, seed) for seed in range(4)], input_specs(model))
    alone, abreast = (dict(second_moments(model, operators, data, untracked, threads)) for threads in (1, 3))
    for operator in operators:
        np.testing.assert_array_equal(alone[operator].matrices, abreast[operator].matrices)


def test_moments_that_do_not_fit_together_are_measured_apart(
    monkeypatch: pytest.MonkeyPatch, random: np.random.Generator
) -> None:
    text = "(float[6,4] x) => (float[6,2] y) { [a] t = MatMul (x, v) [b] y = MatMul (t, w) }"
    v, w = (random.normal(size=shape).astype(np.float32) for shape in ((4, 4), (4, 2)))
    model = models.from_proto(proto_from_text(text, 21, v=v, w=w))
    operators = [Operator(node, quant(c, 1)) for node, c in zip(model.graph, (4, 2), strict=True)]
    data = Dataset("synthetic", lambda: [runtime.synthetic_feeds(model, 0)], input_specs(model))
    together = dict(second_moments(model, operators, data, untracked))
    monkeypatch.setattr(rounding, "MEMORY", 1)
    apart = dict(second_moments(model, operators, data, untracked))
    for operator in operators:
        np.testing.assert_array_equal(together[operator].matrices, apart[operator].matrices)


def test_fewer_samples_are_run_where_batches_are_many(
    monkeypatch: pytest.MonkeyPatch, random: np.random.Generator
) -> None:
    """What the runs take together is bounded, not what each batch does."""
    text = "(float[6,4] x) => (float[6,2] y) { [a] t = MatMul (x, v) [b] y = MatMul (t, w) }"
    v, w = (random.normal(size=shape).astype(np.float32) for shape in ((4, 4), (4, 2)))
    model = models.from_proto(proto_from_text(text, 21, v=v, w=w))
    operators = [Operator(node, quant(c, 1)) for node, c in zip(model.graph, (4, 2), strict=True)]
    data = Dataset("eight", lambda: [runtime.synthetic_feeds(model, seed) for seed in range(8)], input_specs(model))
    runs: list[int] = []

    def counted(samples: Iterable[Sample], count: int, text: str) -> Iterable[Sample]:
        runs.append(count)
        return samples

    monkeypatch.setattr(rounding, "WORK", 4 * (6 * 4 * 4 + 6 * 4 * 2))
    list(second_moments(model, operators, data, counted))
    monkeypatch.setattr(rounding, "MEMORY", 1)
    list(second_moments(model, operators, data, counted))
    assert runs == [4, 2, 2]
