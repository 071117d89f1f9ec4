"""Latency of two models side by side on this machine."""

from __future__ import annotations

import platform
import re
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qcompile.core.runtime import Feeds

#: Seconds that a comparison may take, warm-up included, and the rounds that bound it on either side.
BUDGET = 1.5
FEWEST, MOST = 5, 200


@dataclass(frozen=True)
class Latency:
    """Medians of interleaved runs, in milliseconds.

    Parameters
    ----------
    reference_ms, candidate_ms : float
    rounds : int
        How often each ran.
    """

    reference_ms: float
    candidate_ms: float
    rounds: int

    @property
    def ratio(self) -> float:
        """Candidate over reference: below 1 is faster."""
        return self.candidate_ms / self.reference_ms


def interleave(reference: Callable[[Feeds], Any], candidate: Callable[[Feeds], Any], feeds: Sequence[Feeds]) -> Latency:
    """Time two models alternately on the same inputs, so that what else the machine does falls on both alike."""
    times: tuple[list[float], list[float]] = ([], [])
    start = time.perf_counter()
    for model in (reference, candidate, reference, candidate):
        model(feeds[0])
    for round_ in range(MOST):
        if round_ >= FEWEST and time.perf_counter() - start > BUDGET:
            break
        sample = feeds[round_ % len(feeds)]
        # Whoever runs second finds the caches warm with the same input: take turns.
        for index in (0, 1) if round_ % 2 else (1, 0):
            began = time.perf_counter()
            (reference, candidate)[index](sample)
            times[index].append(time.perf_counter() - began)
    return Latency(1e3 * statistics.median(times[0]), 1e3 * statistics.median(times[1]), len(times[0]))


#: What kernels for integers are written for, the newest first, as the system names it and as people do.
INSTRUCTIONS = {
    "amx_int8": "AMX-INT8", "avx512_vnni": "AVX512-VNNI", "avx_vnni": "AVX-VNNI", "avx512bw": "AVX512", "avx2": "AVX2",
    "i8mm": "I8MM", "asimddp": "DOTPROD", "asimd": "NEON",
}  # fmt: skip


def instructions() -> str:
    """Return the processor's newest instructions for products of integers, as far as the system tells."""
    try:
        lines = re.findall(r"^(?:flags|Features)\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        lines = []
    flags = {flag for line in lines for flag in line.split()}
    return next((name for flag, name in INSTRUCTIONS.items() if flag in flags), "")


def processor() -> str:
    """Return the processor's name, as far as the system tells."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
