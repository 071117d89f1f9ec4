"""Observers: what is kept of the values of one tensor, and the range that quantization makes of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import numpy as np
import numpy.typing as npt

from qcompile.core import numerics

#: Bins of a histogram. Widths are powers of two, so at least half of the bins are used: with 256 codes over them, a bin
#: is a quarter of a step or finer.
BINS = 2048
#: Share of the values that the percentile observer keeps inside the range.
PERCENTILE = 0.9999


class Observer(StrEnum):
    """How a range is chosen from what was seen."""

    MINMAX = "minmax"
    PERCENTILE = "percentile"
    MSE = "mse"


@dataclass
class Histogram:
    """A histogram of bounded size over an unknown range, the same in whatever order the values come.

    Bins are ``[k·2^e, (k+1)·2^e)`` with an integer k. When the range outgrows the bins, neighbours are merged exactly
    and e grows by one, so that e is always the least that covers what was seen.

    Parameters
    ----------
    bins : int
        Most bins that are held.
    """

    bins: int = BINS
    low: float = np.inf
    high: float = -np.inf
    exponent: int | None = None
    start: int = 0
    counts: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))

    def add(self, values: npt.NDArray[Any]) -> None:
        """Count the values of an array of any shape.

        Raises
        ------
        ValueError
            If one of them is not finite.
        """
        if values.size == 0:
            return
        flat = np.asarray(values).reshape(-1)
        low, high = float(flat.min()), float(flat.max())
        if not (np.isfinite(low) and np.isfinite(high)):
            raise ValueError("not finite")
        self.low, self.high = min(self.low, low), max(self.high, high)
        exponent = self._least_exponent()
        if self.exponent is None:
            self.exponent = exponent
        first, last = self._index(self.low, exponent), self._index(self.high, exponent)
        counts = np.zeros(last - first + 1, np.int64)
        if self.counts.size:
            # Floor division nests: the bin of a bin is the bin that its values would have had.
            old = (self.start + np.arange(self.counts.size)) >> (exponent - self.exponent)
            np.add.at(counts, old - first, self.counts)
        # In float64, where the product is exact; in float32 a tiny negative value would vanish into the bin above zero.
        codes = np.floor(np.multiply(flat, 2.0**-exponent, dtype=np.float64))
        counts += np.bincount((codes - first).astype(np.int64), minlength=counts.size)
        self.exponent, self.start, self.counts = exponent, first, counts

    @property
    def width(self) -> float:
        """Width of a bin."""
        return 0.0 if self.exponent is None else float(2.0**self.exponent)

    @property
    def centres(self) -> npt.NDArray[np.float64]:
        """What each bin stands for: its middle, kept inside what was really seen."""
        middle = (self.start + np.arange(self.counts.size) + 0.5) * self.width
        return np.clip(middle, self.low, self.high)

    def _least_exponent(self) -> int:
        span = self.high - self.low
        peak = max(abs(self.low), abs(self.high))
        if peak == 0.0:
            return -126
        # At least as wide as the spacing of float32 numbers at the peak: finer bins would only be empty.
        exponent = int(np.floor(np.log2(peak))) - 23 if span == 0.0 else int(np.floor(np.log2(span / self.bins)))
        exponent = max(exponent, int(np.floor(np.log2(peak))) - 23, -126)
        while self._index(self.high, exponent) - self._index(self.low, exponent) >= self.bins:
            exponent += 1
        return exponent

    @staticmethod
    def _index(value: float, exponent: int) -> int:
        return int(np.floor(value / 2.0**exponent))


def value_range(histogram: Histogram, observer: Observer, dtype: str) -> tuple[float, float]:
    """Return the range [low, high] that is mapped onto the codes; values outside of it saturate.

    Parameters
    ----------
    histogram : Histogram
    observer : Observer
        ``minmax`` takes all that was seen; ``percentile`` leaves out the outermost 0.01 %; ``mse`` takes the range
        with the least expected squared error of quantization.
    dtype : str
        The integer type that the codes will have.
    """
    if not histogram.counts.size:
        return 0.0, 0.0
    return _CHOICES[observer](histogram, dtype)


def _minmax(histogram: Histogram, dtype: str) -> tuple[float, float]:
    return histogram.low, histogram.high


def _percentile(histogram: Histogram, dtype: str) -> tuple[float, float]:
    """Cut (1 - p) / 2 of the values off each end, to the bin's outer edge."""
    cumulative = np.cumsum(histogram.counts)
    outside = (1.0 - PERCENTILE) / 2.0 * float(cumulative[-1])
    first = int(np.searchsorted(cumulative, outside, side="right"))
    last = int(np.searchsorted(cumulative, float(cumulative[-1]) - outside, side="left"))
    low = (histogram.start + first) * histogram.width
    high = (histogram.start + last + 1) * histogram.width
    return max(low, histogram.low), min(high, histogram.high)


def _mse(histogram: Histogram, dtype: str) -> tuple[float, float]:
    """Shrink both ends together, then each alone, as long as the expected squared error falls."""
    low, high = min(histogram.low, 0.0), max(histogram.high, 0.0)
    shrink = np.linspace(0.2, 1.0, 81)
    _, low, high = min((_expected_error(histogram, low * f, high * f, dtype), low * f, high * f) for f in shrink[::-1])
    fine = np.linspace(0.8, 1.2, 41)
    widest_low, widest_high = min(histogram.low, 0.0), max(histogram.high, 0.0)
    for _ in range(2):
        lows = [max(low * f, widest_low) for f in fine]
        _, low = min((_expected_error(histogram, end, high, dtype), end) for end in lows)
        highs = [min(high * f, widest_high) for f in fine]
        _, high = min((_expected_error(histogram, low, end, dtype), end) for end in highs)
    return float(low), float(high)


def _expected_error(histogram: Histogram, low: float, high: float, dtype: str) -> float:
    scale, zero_point = numerics.affine_scale([low], [high], dtype)
    qmin, qmax = numerics.code_range(dtype)
    step, zero = float(scale[0]), int(zero_point[0])
    centres = histogram.centres
    codes = np.clip(np.rint(centres / step) + zero, qmin, qmax)
    return float(np.dot(histogram.counts, np.square(centres - (codes - zero) * step)))


_CHOICES: dict[Observer, Callable[[Histogram, str], tuple[float, float]]] = {
    Observer.MINMAX: _minmax,
    Observer.PERCENTILE: _percentile,
    Observer.MSE: _mse,
}
