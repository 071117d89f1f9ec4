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
    times = in_turns((reference, candidate), feeds)
    return Latency(statistics.median(times[0]), statistics.median(times[1]), len(times[0]))


def in_turns(
    models: Sequence[Callable[[Feeds], Any]],
    feeds: Sequence[Feeds],
    *,
    budget: float = BUDGET,
    most: int = MOST,
    settle: bool = False,
) -> list[list[float]]:
    """Time any number of models in rounds, each model once a round and all on the same input.

    Parameters
    ----------
    models : sequence of callables
    feeds : sequence of feeds
        One a round, again and again.
    budget : float
        Seconds after which no round begins, warm-up included; a few are timed whatever they take.
    most : int
        Rounds that bound it too.
    settle : bool
        Run each model once more before the run that is timed. Among two models that changes nothing; among thirty, all
        of them would be timed with what the others left in the caches: ResNet-8's int8 takes 0.81 of float's time then,
        and 0.67 beside float alone, or settled.

    Returns
    -------
    list of list of float
        Of each model, what it took in each round, in milliseconds.
    """
    times: list[list[float]] = [[] for _ in models]
    start = time.perf_counter()
    for model in (*models, *models):
        model(feeds[0])
    for round_ in range(most):
        if round_ >= FEWEST and time.perf_counter() - start > budget:
            break
        for index in _turns(len(models), round_):
            if settle:
                models[index](feeds[round_ % len(feeds)])
            began = time.perf_counter()
            models[index](feeds[round_ % len(feeds)])
            times[index].append(1e3 * (time.perf_counter() - began))
    return times


def _turns(count: int, round_: int) -> list[int]:
    """Return who runs when: whoever is not first finds the caches warm with the same input, so all take turns."""
    order = list(range(count)) if round_ % 2 else list(reversed(range(count)))
    first = round_ // 2 % count
    return order[first:] + order[:first]


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
