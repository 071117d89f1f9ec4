"""Whether inputs may be padded to a length: where a mask keeps what is behind their end out of every output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompile import verify
from qcompile.calib.data import Dataset, Sample
from qcompile.core import numerics, runtime
from qcompile.core.errors import UsageError
from qcompile.core.lengths import Lengths, Padding
from qcompile.evidence import Evidence
from qcompile.job import Job
from qcompile.passes.patterns.masks import attention_mask

Array = npt.NDArray[Any]
#: Samples that it is tried on.
TRIED = 2


def require_fitting(job: Job, canonical: ir.Model) -> None:
    """Refuse what would not fit several lengths in the end, before the work.

    Raises
    ------
    UsageError
        If an input has other open axes.
    DataError
        If a sample that the artifact is to be evaluated on has a length that it cannot have.
    """
    lengths = job.options.lengths
    if lengths is None:
        return
    for value in canonical.graph.inputs:
        axes = lengths.axes(str(value.name))
        if any(not isinstance(size, int) and axis not in axes for axis, size in enumerate(value.shape or ())):
            fact = f"leaves input '{value.name}' with an open axis: {value.shape}"
            raise UsageError("--shape", fact, f"give its shape too, --shape {value.name}=...")
    mask = attention_mask(canonical.graph)
    expected = lengths if mask is None else replace(lengths, padding=Padding(str(mask.name)))
    require_samples(expected, job.evidence.evaluation)


def require_samples(lengths: Lengths, data: Dataset) -> None:
    """Refuse data with a sample of a length that an artifact cannot have.

    Raises
    ------
    DataError
        Naming the sample, and the lengths that there are.
    """
    for index, feeds in enumerate(data):
        place = f"{data.place}: sample {data.start + index}"
        lengths.require(lengths.of_sample(feeds, place), place)


def fitting(lengths: Lengths | None, evidence: Evidence) -> list[Sample]:
    """Return samples that an artifact can run, as it is timed on them."""
    if lengths is None:
        return evidence.samples
    found = [feeds for feeds in evidence.samples if lengths.holding(lengths.of_sample(feeds, "sample")) is not None]
    return found or list(islice(evidence.evaluation, 1))


def settled(job: Job, canonical: ir.Model, quantized: ir.Model) -> Lengths | None:
    """Return the lengths of an artifact, if it has several, with the way in which inputs are padded to them.

    Raises
    ------
    DataError
        If there is none, and a sample to evaluate on has none of the lengths.
    """
    if job.options.lengths is None:
        return None
    lengths = padded(canonical, quantized, job.options.lengths, job.evidence.samples)
    require_samples(lengths, job.evidence.evaluation)
    return lengths


def padded(model: ir.Model, quantized: ir.Model, lengths: Lengths, samples: Sequence[Sample]) -> Lengths:
    """Return lengths with the way in which inputs are padded to them, if there is one.

    Padding is right where the graph has an attention's mask, and running shows that what stands behind the end of
    inputs moves no output by a bit, neither of the float nor of the quantized model, and that the float model gives
    what it gives without padding, to within what a rewrite may move (`verify.CLOSE_BOUND`).

    Parameters
    ----------
    model : onnx_ir.Model
        In float.
    quantized : onnx_ir.Model
        With Q/DQ.
    lengths : Lengths
    samples : sequence of Sample
        Real inputs; of those that are as long as the longest length the last position is left out.
    """
    mask = attention_mask(model.graph)
    if mask is None or mask.name is None or not lengths.axes(mask.name):
        return lengths
    sessions = [runtime.Session(each, optimize=False) for each in (model, quantized)]
    found: Mapping[str, tuple[int, ...]] | None = None
    for sample in samples[:TRIED]:
        count = min(lengths.of_sample(sample, "calibration sample"), lengths.sizes[-1] - 1)
        if count < 1:
            return lengths
        short = {name: _first(array, lengths.axes(name), count) for name, array in sample.items()}
        longer = {size for size in lengths.sizes if size > count}
        for size in sorted({min(longer), max(longer)}):
            axes = _cut_axes(sessions, mask.name, lengths, short, (count, size))
            if axes is None or (found is not None and axes != found):
                return lengths
            found = axes
    return lengths if found is None else replace(lengths, padding=Padding(mask.name, found))


def _cut_axes(
    sessions: Sequence[runtime.Session], mask: str, lengths: Lengths, short: Sample, sizes: tuple[int, int]
) -> dict[str, tuple[int, ...]] | None:
    """Return the axes of outputs that are as long as inputs, if padding these changes nothing else."""
    count, size = sizes
    axes: dict[str, tuple[int, ...]] = {}
    for session, is_float in zip(sessions, (True, False), strict=True):
        plain = session.run(short)
        zeros, others = (session.run(_longer(short, lengths, mask, size, repeat)) for repeat in (False, True))
        for name, array in plain.items():
            pairs = list(zip(array.shape, zeros[name].shape, strict=True))
            if any(pair not in ((count, size), (pair[0], pair[0])) for pair in pairs):
                return None
            axes[name] = tuple(axis for axis, (before, after) in enumerate(pairs) if before != after)
            cut, other = (_first(made[name], axes[name], count) for made in (zeros, others))
            if not np.array_equal(cut, other):
                return None
            if is_float and not _same(array, cut):
                return None
    return axes


def _same(array: Array, cut: Array) -> bool:
    if array.dtype.kind != "f":
        return bool(np.array_equal(array, cut))
    return numerics.relative_error(array, cut) <= verify.CLOSE_BOUND[array.dtype.itemsize]


def _longer(short: Sample, lengths: Lengths, mask: str, size: int, repeat: bool) -> dict[str, Array]:
    """Return a sample padded to a length: with zeros, or with what the first positions hold, but for the mask."""
    made = {}
    for name, array in short.items():
        behind = [(0, size - extent if axis in lengths.axes(name) else 0) for axis, extent in enumerate(array.shape)]
        made[name] = np.pad(array, behind, mode="wrap" if repeat and name != mask else "constant")
    return made


def _first(array: Array, axes: Sequence[int], count: int) -> Array:
    kept = tuple(slice(count) if axis in axes else slice(None) for axis in range(array.ndim))
    return np.ascontiguousarray(array[kept])
