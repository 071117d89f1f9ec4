"""Probe: what the installed runtime makes of models on this machine, and what its kernels take."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import onnx_ir as ir

from qcompile.backends.ort.legalize import legalize
from qcompile.core import runtime
from qcompile.core.costs import OVERHEAD
from qcompile.core.execution import Kernel, execute

#: Seconds that timing one model may take, and the runs that bound it on either side.
BUDGET, FEWEST, MOST = 2.0, 6, 300


def executed(model: ir.Model, samples: Sequence[runtime.Feeds]) -> list[list[Kernel]]:
    """Return for each sample the kernels that the runtime executes for a quantized model, written as for a user."""
    return execute(legalize(model), samples)


def timed(model: ir.Model, samples: Sequence[runtime.Feeds]) -> list[list[Kernel]]:
    """Run a model, written as for a user, and return its kernels with times that add up to those of undisturbed runs.

    Timing single nodes takes time as well, which undisturbed runs in turn with the others tell.
    """
    legal = legalize(model)
    session = runtime.Session(legal)
    began = time.perf_counter()
    for feeds in samples:
        session.run(feeds)
    once = time.perf_counter() - began
    times: list[list[float]] = []

    def undisturbed(feeds: runtime.Feeds) -> None:
        start = time.perf_counter()
        session.run(feeds)
        times.append([1e6 * (time.perf_counter() - start)])

    rounds = int(min(MOST, max(FEWEST, BUDGET / (2.0 * once))))
    kernels = execute(legal, samples, rounds, undisturbed)
    # Rounds by samples, without the first round and the slowest quarter, as for the single kernels.
    runs = np.sort(np.reshape(times, (rounds + 1, len(samples)))[1:], axis=0)
    whole = runs[: max(1, rounds - rounds // 4)].mean(axis=0)
    return [_without_timing(found, float(total)) for found, total in zip(kernels, whole, strict=True)]


def _without_timing(kernels: Sequence[Kernel], total: float) -> list[Kernel]:
    """Take what timing takes off each kernel alike, so that together they take `total` microseconds."""
    excess = (sum(kernel.microseconds for kernel in kernels) - total) / max(1, len(kernels))
    return [replace(kernel, microseconds=max(OVERHEAD, kernel.microseconds - max(0.0, excess))) for kernel in kernels]
