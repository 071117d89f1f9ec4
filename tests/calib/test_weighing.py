from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import onnx_ir as ir
import pytest

from qcompile.calib import weighing
from qcompile.calib.data import Dataset, input_specs
from qcompile.calib.weighing import affordable, weights_alone, whole_models
from qcompile.calib.workers import Workers


def track(items: Iterable, count: int, what: str) -> Iterable:
    return items


def dataset(model: ir.Model, samples: list[dict[str, np.ndarray]]) -> Dataset:
    return Dataset("test", lambda: iter(samples), input_specs(model))


def test_weights_are_weighed_one_operator_at_a_time(
    model_of: Callable[..., ir.Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = np.random.default_rng(0)
    arrays = {name: generator.normal(size=(8, 8)).astype(np.float32) for name in "wv"}
    text = "(float[4,8] x) => (float[4,8] y, float[4,8] z) { [one] y = MatMul (x, w) [two] z = MatMul (x, v) }"
    model, rounded = model_of(text, 21, **arrays), model_of(text, 21, **arrays)
    rounded.graph.initializers["v"].const_value = ir.tensor(1.5 * arrays["v"], name="v")
    data = dataset(model, [{"x": generator.normal(size=(4, 8)).astype(np.float32)} for _ in range(4)])
    found = weights_alone(model, rounded, {"one": ["w"], "two": ["v"]}, data, track, Workers(2))
    assert found == {"one": 0.0, "two": pytest.approx(0.25)}
    assert weights_alone(model, rounded, {}, data, track, Workers(2)) == {}
    monkeypatch.setattr(weighing, "ALONE", 1.0)
    assert weights_alone(model, rounded, {"one": ["w"]}, data, track, Workers(2)) == {}


def test_whole_models_are_run_one_after_the_other_within_their_work(
    model_of: Callable[..., ir.Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = np.random.default_rng(1)
    weights = generator.normal(size=(8, 8)).astype(np.float32)
    text = "(float[4,8] x) => (float[4,8] y) { a = MatMul (x, w) y = Softmax (a) }"
    model = model_of(text, 21, w=weights)
    data = dataset(model, [{"x": generator.normal(size=(4, 8)).astype(np.float32)} for _ in range(3)])
    others = (model_of(text, 21, w=factor * weights) for factor in (1.0, 1.5, np.float32(0.9)))
    # In front of the Softmax, where noise over signal is the square of what the factor is off by.
    assert whole_models(model, others, 3, data, track) == [0.0, pytest.approx(0.25), pytest.approx(0.01, rel=1e-5)]
    assert affordable(model, 100, data)
    monkeypatch.setattr(weighing, "TOGETHER", 3 * 4.0 * 8 * 8 * 4)
    monkeypatch.setattr(weighing, "ALONE", 1.0)
    assert not affordable(model, 1, data)
    # Three samples of four models: not all of them fit, so that none is run, not even made.
    untouched = iter([model])
    assert whole_models(model, untouched, 4, data, track) == [] and list(untouched) == [model]


def test_scores_that_are_codes_are_compared_in_front_of_the_softmax_too(model_of: Callable[..., ir.Model]) -> None:
    """Values in front of it have other names there, which must not pass for an output without noise."""
    generator = np.random.default_rng(2)
    weights = generator.normal(size=(8, 8)).astype(np.float32)
    text = "(float[4,8] x) => (float[4,8] y) { a = MatMul (x, w) y = Softmax (a) }"
    codes = """(float[4,8] x) => (float[4,8] y) { a = MatMul (x, w) q = QuantizeLinear (a, s, z)
        b = DequantizeLinear (q, s, z) c = Softmax (b) p = QuantizeLinear (c, t, l) y = DequantizeLinear (p, t, l) }"""
    model = model_of(text, 21, w=weights)
    data = dataset(model, [{"x": generator.normal(size=(4, 8)).astype(np.float32)} for _ in range(3)])
    grid = {"z": np.int8(0), "t": np.float32(1 / 256), "l": np.int8(-128)}
    others = (model_of(codes, 21, w=weights, s=np.float32(step), **grid) for step in (0.1, 1.0))
    fine, coarse = whole_models(model, others, 2, data, track)
    assert 1e-5 < fine < 1e-3 and 0.005 < coarse < 0.05
