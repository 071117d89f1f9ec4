"""The largest value of each tensor over the samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import onnx_ir as ir

from qcompile.calib.data import Dataset, Sample, input_specs
from qcompile.calib.reach import SAMPLES, collect_reach

Build = Callable[..., ir.Model]
TEXT = "(float[2,3] x) => (float[2,3] y) { a = Neg (x) b = Mul (a, k) y = Add (b, x) }"


def data(model: ir.Model, samples: list[np.ndarray]) -> Dataset:
    return Dataset("data", lambda: [{"x": sample} for sample in samples], input_specs(model))


def untracked(items: Any, total: int, what: str) -> Iterator[Sample]:
    return iter(items)


def test_it_is_that_of_all_samples_inputs_included(model_of: Build, random: np.random.Generator) -> None:
    model = model_of(TEXT, k=np.float32(3.0))
    samples = [random.standard_normal((2, 3)).astype(np.float32) for _ in range(5)]
    found = collect_reach(model, ["x", "a", "b", "y"], data(model, samples), untracked)
    largest = float(np.max(np.abs(samples)))
    np.testing.assert_allclose(
        [found[name] for name in "xaby"], [largest, largest, 3 * largest, 2 * largest], rtol=1e-6
    )


def test_infinities_count_and_what_is_no_number_does_not(model_of: Build) -> None:
    model = model_of("(float[2,2] x) => (float[2,2] y) { y = Log (x) }")
    for sample, largest in (([[-1, 1], [1, np.e]], 1.0), ([[0, 1], [1, -1]], np.inf), ([[-1, -1], [-1, -1]], 0.0)):
        found = collect_reach(model, ["y"], data(model, [np.array(sample, np.float32)]), untracked)
        assert found["y"] == largest or abs(found["y"] - largest) < 1e-6


def test_the_first_samples_are_enough(model_of: Build) -> None:
    model = model_of(TEXT, k=np.float32(1.0))
    samples = [np.full((2, 3), index, np.float32) for index in range(SAMPLES + 5)]
    assert collect_reach(model, ["a"], data(model, samples), untracked) == {"a": SAMPLES - 1.0}
