"""Collect: run the model once over the data and keep the statistics of the tensors that a pass asked for."""

from __future__ import annotations

import io
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompile.calib.data import Dataset, Sample
from qcompile.calib.observers import BINS, CHANNEL_BINS, Histogram
from qcompile.calib.workers import abreast
from qcompile.core import runtime
from qcompile.core.contract import Track
from qcompile.core.errors import DataError


@dataclass(frozen=True)
class Statistics:
    """What was seen of each tensor.

    Parameters
    ----------
    histograms : mapping of str to Histogram
        By value name.
    samples : int
        How many samples were run.
    """

    histograms: Mapping[str, Histogram] = field(default_factory=dict)
    samples: int = 0

    def to_bytes(self) -> bytes:
        """Return the statistics as an .npz archive, for the cache."""
        names = list(self.histograms)
        seen = [self.histograms[name] for name in names]
        buffer = io.BytesIO()
        np.savez(
            buffer,
            names=np.array(names, dtype=np.str_),
            samples=np.array(self.samples),
            ranges=np.array([(h.low, h.high, h.mean_low, h.mean_high) for h in seen], np.float64).reshape(-1, 4),
            bins=np.array([(h.exponent or 0, h.start, h.counts.size, h.arrays) for h in seen], np.int64).reshape(-1, 4),
            counts=np.concatenate([np.zeros(0, np.int64), *(h.counts for h in seen)]),
        )
        return buffer.getvalue()

    @classmethod
    def from_bytes(cls, content: bytes) -> Self:
        """Read what `to_bytes` wrote."""
        histograms, offset = {}, 0
        with np.load(io.BytesIO(content), allow_pickle=False) as archive:
            ranges, bins, counts = archive["ranges"], archive["bins"], archive["counts"]
            for index, name in enumerate(archive["names"]):
                exponent, start, size, arrays = map(int, bins[index])
                low, high, mean_low, mean_high = map(float, ranges[index])
                part = counts[offset : offset + size]
                histograms[str(name)] = Histogram(
                    BINS, low, high, mean_low, mean_high, arrays, exponent if size else None, start, part
                )
                offset += size
            return cls(histograms, int(archive["samples"]))


def collect(model: ir.Model, names: Sequence[str], data: Dataset, track: Track[Sample], threads: int = 1) -> Statistics:
    """Stream the data through the float model and count the values of the named tensors.

    Memory holds one sample's activations and one histogram per tensor, whatever the number of samples.

    Parameters
    ----------
    model : onnx_ir.Model
    names : sequence of str
        Values of the main graph, inputs included.
    data : Dataset
    track : callable
        Shows progress.
    threads : int
        Tensors that are counted at a time; changes no result.

    Raises
    ------
    DataError
        If a sample drives one of the tensors to NaN or infinity.
    """
    histograms = {name: Histogram() for name in names}
    for place, values in _values(model, names, data, track, threads):

        def count(name: str, place: str = place, values: runtime.Outputs = values) -> None:
            _count(histograms[name], values[name], name, place)

        deque(abreast(count, histograms, threads), 0)
    return Statistics(histograms, len(data))


def collect_channels(
    model: ir.Model, axes: Mapping[str, int], data: Dataset, track: Track[Sample]
) -> dict[str, list[Histogram]]:
    """Stream the data through the float model and count the values of each channel of the named tensors.

    A run of its own, for those who ask: it takes a histogram per channel, and time for each.

    Parameters
    ----------
    model : onnx_ir.Model
    axes : mapping of str to int
        The channel axis of each tensor, by value name; the axis' length must be the same in all samples.
    data : Dataset
    track : callable
        Shows progress.

    Returns
    -------
    dict of str to list of Histogram
        One histogram of at most `CHANNEL_BINS` per channel.

    Raises
    ------
    DataError
        If a sample drives one of the tensors to NaN or infinity.
    """
    found: dict[str, list[Histogram]] = {name: [] for name in axes}
    for place, values in _values(model, list(axes), data, track):
        for name, axis in axes.items():
            channels = np.moveaxis(values[name], axis, 0)
            found[name] = found[name] or [Histogram(CHANNEL_BINS) for _ in channels]
            for histogram, channel in zip(found[name], channels, strict=True):
                _count(histogram, channel, name, place)
    return found


@dataclass(frozen=True)
class ChannelSpread:
    """How far the channels of one tensor reach.

    Parameters
    ----------
    low, high : ndarray of float64, shape (channels,)
        The least and the greatest value of each.
    power : ndarray of float64, shape (channels,)
        The mean of its squares: over the elements of each sample, then over the samples.
    """

    low: npt.NDArray[np.float64]
    high: npt.NDArray[np.float64]
    power: npt.NDArray[np.float64]

    @property
    def absmax(self) -> npt.NDArray[np.float64]:
        """The largest absolute value of each channel, shape (channels,)."""
        return np.maximum(self.high, -self.low)


def collect_spread(
    model: ir.Model, axes: Mapping[str, int], data: Dataset, track: Track[Sample]
) -> dict[str, ChannelSpread]:
    """Stream the data through the float model and keep how far each channel of the named tensors reaches.

    Parameters
    ----------
    model : onnx_ir.Model
    axes : mapping of str to int
        The channel axis of each tensor, by value name; the axis' length must be the same in all samples.
    data : Dataset
    track : callable
        Shows progress.

    Raises
    ------
    DataError
        If a sample drives one of the tensors to NaN or infinity.
    """
    sums: dict[str, npt.NDArray[np.float64]] = {}
    for place, values in _values(model, list(axes), data, track):
        for name, axis in axes.items():
            channels = np.moveaxis(values[name], axis, 0)
            channels = channels.reshape(channels.shape[0], -1)
            if not channels.size:
                continue
            power = np.mean(np.square(channels, dtype=np.float64), axis=1)
            if not np.isfinite(power).all():
                raise _not_finite(name, place)
            seen = np.stack([channels.min(1), channels.max(1), power]).astype(np.float64)
            low, high, before = sums.get(name, seen * [[1.0], [1.0], [0.0]])
            sums[name] = np.stack([np.minimum(low, seen[0]), np.maximum(high, seen[1]), before + power])
    return {name: ChannelSpread(low, high, power / len(data)) for name, (low, high, power) in sums.items()}


def _values(
    model: ir.Model, names: Sequence[str], data: Dataset, track: Track[Sample], threads: int = 1
) -> Iterator[tuple[str, runtime.Outputs]]:
    """Yield each sample's place and the named values; with threads, the next ones run meanwhile."""
    session = runtime.Session(runtime.with_outputs(model, names), optimize=True)

    def run(feeds: Sample) -> runtime.Outputs:
        return {**feeds, **session.run(feeds)}

    for index, values in enumerate(abreast(run, track(data, len(data), "calibrating"), min(threads, 2))):
        yield f"{data.place}: sample {index}", values


def _count(histogram: Histogram, values: npt.NDArray[Any], name: str, place: str) -> None:
    try:
        histogram.add(values)
    except ValueError as error:
        raise _not_finite(name, place) from error


def _not_finite(name: str, place: str) -> DataError:
    fact = f"drives tensor '{name}' of the float model to a number that is not finite"
    return DataError(place, fact, "check its preprocessing")
