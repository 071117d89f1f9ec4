"""Reach: the largest |x| of each value over the data, for what has to fit a float type."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

import numpy as np
import onnx_ir as ir

from qcompile.calib.data import Dataset, Sample
from qcompile.core import runtime
from qcompile.core.contract import Track

#: Samples that are run at most: the largest value grows with the logarithm of their number at most, as a rule.
SAMPLES = 32


def collect_reach(model: ir.Model, names: Sequence[str], data: Dataset, track: Track[Sample]) -> dict[str, float]:
    """Stream samples through a model and keep the largest |x| of the named values.

    Infinities count (a mask has them on purpose), NaN does not.

    Parameters
    ----------
    model : onnx_ir.Model
    names : sequence of str
        Values of the main graph, inputs included.
    data : Dataset
        Its first `SAMPLES` are run.
    track : callable
        Shows progress.
    """
    session = runtime.Session(runtime.with_outputs(model, names), optimize=False)
    found = dict.fromkeys(names, 0.0)
    for feeds in track(islice(data, SAMPLES), min(SAMPLES, len(data)), "measuring ranges"):
        seen = {**feeds, **session.run(feeds)}
        for name in names:
            found[name] = max(found[name], _largest(np.asarray(seen[name])))
    return found


def _largest(array: np.ndarray[tuple[int, ...], np.dtype[np.float32]]) -> float:
    if not array.size:
        return 0.0
    with np.errstate(invalid="ignore"):
        return float(max(np.nanmax(array), -np.nanmin(array))) if not np.isnan(array).all() else 0.0
