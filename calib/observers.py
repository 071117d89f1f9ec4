"""Observers: what is kept of the values of one tensor, and the range that quantization makes of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from functools import lru_cache, partial
from typing import Any

import numpy as np
import numpy.typing as npt

from qcompile.core import numerics

#: Bins of a histogram. Widths are powers of two, so at least half of the bins are used: with 256 codes over them, a bin
#: is a quarter of a step or finer.
BINS = 2048
#: Where each channel has one of its own, a bin is a code or finer.
CHANNEL_BINS = 512
#: Elements that are counted at once.
PIECE = 1 << 16
#: Share of the values that the percentile observer keeps inside the range.
PERCENTILE = 0.9999

FloatArray = npt.NDArray[np.float64]


class Observer(StrEnum):
    """How a range is chosen from what was seen."""

    MINMAX = "minmax"
    DYNAMIC = "dynamic"
    MOVING_AVERAGE = "moving-average"
    PERCENTILE = "percentile"
    ENTROPY = "entropy"
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
    low, high : float
        The least and the greatest value seen.
    mean_low, mean_high : float
        The means, over the arrays that were added, of each one's least and greatest value.
    arrays : int
        How many arrays were added, empty ones aside.
    exponent : int or None
        The e above; None before anything was seen.
    start : int
        The k of the first bin.
    counts : ndarray of int64, shape (at most `bins`,)
    """

    bins: int = BINS
    low: float = np.inf
    high: float = -np.inf
    mean_low: float = 0.0
    mean_high: float = 0.0
    arrays: int = 0
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
        self.arrays += 1
        self.mean_low += (low - self.mean_low) / self.arrays
        self.mean_high += (high - self.mean_high) / self.arrays
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
        # In pieces that stay in the processor's cache.
        for start in range(0, flat.size, PIECE):
            codes = np.multiply(flat[start : start + PIECE], 2.0**-exponent, dtype=np.float64)
            np.subtract(np.floor(codes, out=codes), first, out=codes)
            counts += np.bincount(codes.astype(np.int64), minlength=counts.size)
        self.exponent, self.start, self.counts = exponent, first, counts

    def mirrored(self) -> Histogram:
        """Return the counts of x and of -x together: what ranges around zero are chosen by."""
        if self.exponent is None:
            return self
        first, last, exponent = self.start, self.start + self.counts.size - 1, self.exponent
        edge = max(last, -first - 1)
        counts = np.zeros(2 * (edge + 1), np.int64)
        counts[first + edge + 1 : last + edge + 2] += self.counts
        counts[edge - last : edge - first + 1] += self.counts[::-1]
        while counts.size > self.bins:  # on either side of zero, neighbours become one
            counts = np.pad(counts, (edge + 1) % 2)
            counts, exponent = counts.reshape(-1, 2).sum(axis=1), exponent + 1
            edge = counts.size // 2 - 1
        reach, mean = max(abs(self.low), abs(self.high)), max(abs(self.mean_low), abs(self.mean_high))
        return Histogram(self.bins, -reach, reach, -mean, mean, self.arrays, exponent, -edge - 1, counts)

    @property
    def width(self) -> float:
        """Width of a bin."""
        return 0.0 if self.exponent is None else float(2.0**self.exponent)

    @property
    def centres(self) -> FloatArray:
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
        ``minmax`` takes all that was seen, as does ``dynamic`` where a range cannot be taken when the model runs.
        ``moving-average`` takes the mean of each sample's extremes (the moving average of Jacob et al. 2018, section
        3.1, with equal weights, so that the order of the samples means nothing). ``percentile`` leaves out the
        outermost 0.01 %. ``entropy`` takes the range whose codes tell most of the distribution (least Kullback-Leibler
        divergence; Migacz 2017, "8-bit inference with TensorRT"). ``mse`` takes the one with the least expected squared
        error.
    dtype : str
        The integer type that the codes will have.
    """
    if not histogram.counts.size or histogram.exponent is None:
        return 0.0, 0.0
    ends = np.array([histogram.low, histogram.high, histogram.mean_low, histogram.mean_high])
    place = (histogram.exponent, histogram.start)
    return _chosen(observer, dtype, ends.tobytes(), place, histogram.counts.tobytes())


@lru_cache(maxsize=1024)
def _chosen(observer: Observer, dtype: str, ends: bytes, place: tuple[int, int], counts: bytes) -> tuple[float, float]:
    """Return a range once for histograms of the same content: each plan that is tried asks for all of them again."""
    low, high, mean_low, mean_high = np.frombuffer(ends).tolist()
    bins = np.frombuffer(counts, np.int64)
    seen = Histogram(bins.size, low, high, mean_low, mean_high, exponent=place[0], start=place[1], counts=bins)
    return _CHOICES[observer](seen, dtype)


def expected_error(histogram: Histogram, low: float, high: float, dtype: str) -> float:
    """Return the squared error of quantization, summed over all that was seen, if [low, high] becomes the codes."""
    (error,) = _errors(histogram, np.array([low]), np.array([high]), dtype)
    return error


def _minmax(histogram: Histogram, dtype: str) -> tuple[float, float]:
    return histogram.low, histogram.high


def _moving_average(histogram: Histogram, dtype: str) -> tuple[float, float]:
    return histogram.mean_low, histogram.mean_high


def _percentile(histogram: Histogram, dtype: str) -> tuple[float, float]:
    """Cut (1 - p) / 2 of the values off each end, to the bin's outer edge."""
    cumulative = np.cumsum(histogram.counts)
    outside = (1.0 - PERCENTILE) / 2.0 * float(cumulative[-1])
    first = int(np.searchsorted(cumulative, outside, side="right"))
    last = int(np.searchsorted(cumulative, float(cumulative[-1]) - outside, side="left"))
    low = (histogram.start + first) * histogram.width
    high = (histogram.start + last + 1) * histogram.width
    return max(low, histogram.low), min(high, histogram.high)


def _entropy(histogram: Histogram, dtype: str) -> tuple[float, float]:
    return _search(histogram, partial(_divergences, histogram, dtype=dtype))


def _mse(histogram: Histogram, dtype: str) -> tuple[float, float]:
    return _search(histogram, partial(_errors, histogram, dtype=dtype))


def _search(histogram: Histogram, losses: Callable[[FloatArray, FloatArray], list[float]]) -> tuple[float, float]:
    """Shrink both ends together, then each alone, as long as the loss falls."""
    widest_low, widest_high = min(histogram.low, 0.0), max(histogram.high, 0.0)

    def least(lows: FloatArray, highs: FloatArray) -> tuple[float, float]:
        lows, highs = np.broadcast_arrays(lows, highs)
        _, low, high = min(zip(losses(lows, highs), lows.tolist(), highs.tolist(), strict=True))
        return low, high

    shrink = np.linspace(0.2, 1.0, 41)
    low, high = least(widest_low * shrink, widest_high * shrink)
    fine = np.linspace(0.9, 1.1, 21)
    for _ in range(2):
        low, high = least(np.maximum(low * fine, widest_low), np.array(high))
        low, high = least(np.array(low), np.minimum(high * fine, widest_high))
    return low, high


def _codes(centres: FloatArray, lows: FloatArray, highs: FloatArray, dtype: str) -> tuple[FloatArray, ...]:
    """Return the code that each bin gets by each range, shape (ranges, bins), with their scales and zero points."""
    scale, zero_point = numerics.affine_scale(lows, highs, dtype)
    steps, zeros = scale.astype(np.float64)[:, None], zero_point.astype(np.float64)[:, None]
    return np.clip(np.rint(centres / steps) + zeros, *numerics.code_range(dtype)), steps, zeros


def _errors(histogram: Histogram, lows: FloatArray, highs: FloatArray, dtype: str) -> list[float]:
    """Return for each range the squared error of quantization, summed over all that was seen."""
    centres, counts = histogram.centres, histogram.counts.astype(np.float64)
    codes, steps, zeros = _codes(centres, lows, highs, dtype)
    return [float(np.dot(counts, squares)) for squares in np.square(centres - (codes - zeros) * steps)]


def _divergences(histogram: Histogram, lows: FloatArray, highs: FloatArray, dtype: str) -> list[float]:
    """Return for each range KL(P‖Q), P the histogram with what saturates counted at the ends, Q what codes tell of it.

    A code says that a value was in one of its bins, each that ever held one being as likely as the next; what saturates
    is not among them, so Q lacks it, and a range that cuts much off tells badly of its ends.
    """
    centres, counts = histogram.centres, _without_zeros(histogram)
    codes, steps, zeros = _codes(centres, lows, highs, dtype)
    least, most = numerics.code_range(dtype)
    kept = (centres >= (least - zeros - 0.5) * steps) & (centres <= (most - zeros + 0.5) * steps)
    groups = (codes - least).astype(np.int64)
    return [_divergence(counts, group, np.flatnonzero(one)) for group, one in zip(groups, kept, strict=True)]


def _divergence(counts: FloatArray, group: npt.NDArray[np.int64], kept: npt.NDArray[np.int64]) -> float:
    if not kept.size:
        return np.inf
    first, last = int(kept[0]), int(kept[-1])
    inside, group = counts[first : last + 1], group[first : last + 1]
    p = inside.copy()
    p[0] += counts[:first].sum()
    p[-1] += counts[last + 1 :].sum()
    held = (p > 0).astype(np.float64)
    mass, spread = np.bincount(group, inside), np.bincount(group, held)
    q = np.divide(mass, spread, out=np.zeros_like(mass), where=spread > 0)[group] * held
    # Where only what saturates falls into a bin, Q knows nothing of it: half a count stands in for never.
    q = np.maximum(q, 0.5 * held)
    p, q = p[held > 0] / p.sum(), q[held > 0] / q.sum()
    return float(np.sum(p * np.log(p / q)))


def _without_zeros(histogram: Histogram) -> FloatArray:
    """Return the counts without the peak at zero: a code stands for it exactly, whatever the range."""
    counts, zero = histogram.counts.astype(np.float64), -histogram.start
    if 0 <= zero < counts.size and counts.size > 1:
        beside = counts[[index for index in (zero - 1, zero + 1) if 0 <= index < counts.size]]
        counts[zero] = min(counts[zero], beside.max())
    return counts


_CHOICES: dict[Observer, Callable[[Histogram, str], tuple[float, float]]] = {
    Observer.MINMAX: _minmax,
    Observer.DYNAMIC: _minmax,
    Observer.MOVING_AVERAGE: _moving_average,
    Observer.PERCENTILE: _percentile,
    Observer.ENTROPY: _entropy,
    Observer.MSE: _mse,
}
