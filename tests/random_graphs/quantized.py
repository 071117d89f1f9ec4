"""Models quantized for a target that has integers alone."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

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


@functools.cache
def integer_target() -> Target:
    """Return a target whose every operator is an integer one."""
    return Target.from_toml(Path(__file__).parent / "integer.toml")


def quantized(model: ir.Model, samples: Samples) -> ir.Model:
    """Quantize a model, which is made canonical, with ranges that just hold what the samples have."""
    target = integer_target()
    Canonicalize(target.opset)(model)
    data = Dataset("samples", lambda: samples, input_specs(model))
    placement = place(model, target, True, True)
    statistics = collect(model, placement.activations, data, lambda items, total, what: items)
    plan = allocate_bits(model, placement, statistics, target, dict.fromkeys(placement.activations, Observer.MINMAX))
    result = model.clone()
    InsertQdq(plan)(result)
    return result


def random_samples(model: ir.Model, count: int) -> Samples:
    """Return random inputs, the same for the same model."""
    return [dict(runtime.synthetic_feeds(model, seed)) for seed in range(count)]
