"""Models quantized for a target that has integers alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from qcompile.calib.collect import collect
from qcompile.calib.data import Dataset, input_specs
from qcompile.calib.observers import Observer
from qcompile.core import runtime
from qcompile.core.target import Target
from qcompile.passes.allocate_bits import allocate_bits
from qcompile.passes.canonicalize import Canonicalize
from qcompile.passes.insert_qdq import InsertQdq
from qcompile.passes.place import place

Samples = Sequence[dict[str, np.ndarray[Any, np.dtype[Any]]]]


@pytest.fixture(scope="session")
def integer_target() -> Target:
    """Return a target whose every operator is an integer one."""
    return Target.from_toml(Path(__file__).parent / "integer.toml")


@pytest.fixture(scope="session")
def quantize(integer_target: Target) -> Callable[[ir.Model, Samples], ir.Model]:
    """Return what quantizes a model with ranges that just hold what the samples have."""
    return lambda model, samples: quantized(model, integer_target, samples)


def quantized(model: ir.Model, target: Target, samples: Samples) -> ir.Model:
    Canonicalize(target.opset)(model)
    data = Dataset("samples", lambda: samples, input_specs(model))
    placement = place(model, target, True, True)
    statistics = collect(model, placement.activations, data, lambda items, total, what: items)
    plan = allocate_bits(model, placement, statistics, target, dict.fromkeys(placement.activations, Observer.MINMAX))
    result = model.clone()
    InsertQdq(plan)(result)
    return result


def random_samples(model: ir.Model, count: int) -> Samples:
    return [dict(runtime.synthetic_feeds(model, seed)) for seed in range(count)]
