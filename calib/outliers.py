"""Outliers: channels that stretch a tensor's range, and what a scale per channel would gain.

A tensor has one scale at run time, and its largest channel sets it. How much the others lose tells where moving scale
between a producer and its readers pays (Xiao et al. 2023, "SmoothQuant", section 3).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from qcompile.calib.observers import Histogram, Observer, expected_error, value_range
from qcompile.core import numerics


@dataclass(frozen=True)
class Outliers:
    """One tensor's channels.

    Parameters
    ----------
    channels : int
    worst : int
        The channel with the largest value.
    ratio : float
        Its largest absolute value over the channels' median one; infinite where most channels are zero.
    per_tensor, per_channel : float
        SQNR in dB of the tensor itself, quantized with one scale or with one per channel, nothing cut off.
    """

    channels: int
    worst: int
    ratio: float
    per_tensor: float
    per_channel: float


def outliers(histograms: Sequence[Histogram], dtype: str) -> Outliers:
    """Compare the channels of one tensor.

    Parameters
    ----------
    histograms : sequence of Histogram
        One per channel, as `collect.collect_channels` returns them.
    dtype : str
        Integer type of the codes.
    """
    absmax = np.array([max(abs(h.low), abs(h.high)) if h.counts.size else 0.0 for h in histograms])
    signal = sum(float(np.dot(h.counts, np.square(h.centres))) for h in histograms)
    ranges = [value_range(h, Observer.MINMAX, dtype) for h in histograms]
    low, high = min(low for low, _ in ranges), max(high for _, high in ranges)
    whole = sum(expected_error(h, low, high, dtype) for h in histograms)
    each = sum(expected_error(h, *bounds, dtype) for h, bounds in zip(histograms, ranges, strict=True))
    median = float(np.median(absmax))
    return Outliers(
        channels=len(histograms),
        worst=int(absmax.argmax()),
        ratio=float(absmax.max()) / median if median else float("inf"),
        per_tensor=numerics.decibel(signal, whole) if signal else float("inf"),
        per_channel=numerics.decibel(signal, each) if signal else float("inf"),
    )
