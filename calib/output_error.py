"""Output errors: what noise at a model's outputs is to their signal, sample by sample."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from qcompile.core import runtime

#: Part of the mean signal that is added to every sample's, and the least noise over signal that makes a difference.
QUIET, EXACT = 1e-3, 1e-9
#: Neighbouring positions of a language model's outputs that count as a sample.
POSITIONS = 32


@dataclass
class OutputError:
    """Noise power over signal power at a model's outputs: the geometric mean over samples, summed over the outputs.

    Each sample counts alike. In a ratio of sums, one sample that loses an outlier would decide for all others, and
    which samples those are is chance.
    """

    signal: dict[str, list[float]] = field(default_factory=dict)
    noise: dict[str, list[float]] = field(default_factory=dict)

    def add(self, reference: runtime.Outputs, *candidates: runtime.Outputs) -> None:
        """Count one sample; the noise is the mean over repeats. Outputs that a candidate lacks are without noise."""
        for name, expected in reference.items():
            # A masked score is -inf in both; where the candidate alone is not finite, the error is infinite.
            finite = np.isfinite(expected)
            y = np.asarray(expected, np.float64)[finite]
            repeats = [np.asarray(candidate.get(name, expected), np.float64)[finite] for candidate in candidates]
            self.signal.setdefault(name, []).append(_power(y))
            self.noise.setdefault(name, []).append(sum(_power(y - repeat) for repeat in repeats) / len(repeats))

    def __add__(self, other: OutputError) -> OutputError:
        """Return the error over both's samples."""
        both = OutputError()
        for error in (self, other):
            for name in error.noise:
                both.signal.setdefault(name, []).extend(error.signal[name])
                both.noise.setdefault(name, []).extend(error.noise[name])
        return both

    @property
    def samples(self) -> int:
        """How many samples were counted."""
        return max(map(len, self.noise.values()), default=0)

    @property
    def value(self) -> float:
        """The error: 0 without noise, infinite where a candidate drives an output that is finite to infinity or NaN."""
        return sum((self._of(name) for name in self.noise), 0.0)

    @property
    def total(self) -> float:
        """The same as a ratio of sums: what the loudest samples lose counts most."""
        pairs = [(sum(noise), sum(self.signal[name])) for name, noise in self.noise.items()]
        return sum((noise / signal if signal > 0.0 and np.isfinite(noise) else np.inf)
                   for noise, signal in pairs if noise != 0.0)  # fmt: skip

    @property
    def decibels(self) -> npt.NDArray[np.float64]:
        """What each sample says of the SQNR: the mean is that of `value` in dB, the spread its uncertainty.

        For one output these are the samples' own ratios; for several, what each sample moves the sum by (the delta
        method). Only for a `value` that is finite and not 0.
        """
        logs = {name: self._logs(name) for name in self.noise if any(self.noise[name])}
        moved = sum(np.exp(log.mean()) * (log - log.mean()) for log in logs.values()) / self.value
        return np.asarray(-10.0 / np.log(10.0) * (np.log(self.value) + moved))

    def _of(self, name: str) -> float:
        noise, signal = np.array(self.noise[name]), np.array(self.signal[name])
        if not noise.any():
            return 0.0
        if not np.isfinite(noise).all() or not signal.any():
            return float("inf")
        return float(np.exp(np.mean(self._logs(name))))

    def relative(self, name: str) -> npt.NDArray[np.float64]:
        """Return each sample's noise over signal at an output. One that says nothing is judged by the others."""
        noise, signal = np.array(self.noise[name]), np.array(self.signal[name])
        if not signal.any():
            return np.where(noise == 0.0, 0.0, np.inf)
        return np.asarray(noise / (signal + QUIET * signal.mean()))

    def _logs(self, name: str) -> npt.NDArray[np.float64]:
        return np.asarray(np.log(np.maximum(self.relative(name), EXACT)))


def in_blocks(outputs: runtime.Outputs) -> Iterator[runtime.Outputs]:
    """Yield outputs `[batch, positions, ...]` in blocks of `POSITIONS` neighbours, as alike as whole numbers allow."""
    positions = min(array.shape[1] for array in outputs.values())
    count = max(1, round(positions / POSITIONS))
    parts = {name: np.array_split(array, count, axis=1) for name, array in outputs.items()}
    yield from ({name: split[at] for name, split in parts.items()} for at in range(count))


def _power(values: npt.NDArray[np.float64]) -> float:
    return float(np.mean(values * values)) if values.size else 0.0


def gain(error: OutputError, over: OutputError) -> tuple[float, float]:
    """Return by how many dB an error is less than another on the same samples, and that number's standard error.

    The samples are paired: what makes one hard for both does not count. Both errors must be finite and not 0; of a
    single sample, the standard error is infinite.
    """
    differences = error.decibels - over.decibels
    count = differences.size
    return float(differences.mean()), float(differences.std(ddof=1) / np.sqrt(count)) if count > 1 else float("inf")


def surely_less(error: OutputError, other: OutputError, times: float = 1.0) -> bool:
    """Tell whether an error is less than another by more than so many standard errors of the paired difference."""
    if not error.value < other.value:
        return False
    if error.value == 0.0 or not np.isfinite(other.value):
        return True
    better, uncertain = gain(error, over=other)
    return better > times * uncertain
