"""Moments: what BatchNormalization tells of the values behind it, and of the input in front of the first one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

Array = npt.NDArray[np.float64]

#: Standard deviations that a channel behind a BatchNormalization reaches to either side. Nagel et al. take 6; real
#: activations have longer tails, and clipping them costs more than a coarser step (docs/data.md has figures).
REACH = 8.0
#: The same for an input of the model: pixels and features end where their type does.
INPUT_REACH = 3.5
#: Correlations of neighbours and of channels that an input is tried to have.
NEIGHBOURS, CHANNELS = (0.0, 0.5, 0.8, 0.9, 0.95, 0.99), (0.0, 0.5, 0.9, 0.99)
#: Scatter of log variance over the filters beyond which an input's moments are not believed, and the fewest filters.
SCATTER, FEWEST = 1.0, 4
#: Numbers that are brought to moments at once.
BLOCK = 1 << 22
#: Operators in front of a first Conv that only move elements.
_MOVES = frozenset({"Flatten", "Identity", "Pad", "Reshape", "Squeeze", "Transpose", "Unsqueeze"})


@dataclass(frozen=True)
class Moments:
    """Mean and standard deviation of a value, and how far it reaches.

    Parameters
    ----------
    mean, deviation : ndarray of float64, shape (channels,) or (1,)
    reach : float
        In standard deviations, to either side of the mean.
    """

    mean: Array
    deviation: Array
    reach: float

    def drawn(self, noise: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Return standard normal noise of any shape as values with these moments, where these are one for all."""
        inside = np.clip(noise, -self.reach, self.reach)
        return np.asarray(inside * self.deviation + self.mean, noise.dtype)

    def bring(self, arrays: Sequence[npt.NDArray[Any]], generator: np.random.Generator) -> None:
        """Give these moments to values, in place: shifted and scaled, and the outermost moved to the reach.

        Parameters
        ----------
        arrays : sequence of ndarray
            One a sample, all of one shape, contiguous. Channels are on axis 1; one channel is all values together.
        generator : numpy.random.Generator
            For channels that have no variance to scale: these become noise.
        """
        channels = self.mean.size
        block = max(1, BLOCK * channels // max(1, sum(array.size for array in arrays)))
        rows = [array.reshape(1, -1) if channels == 1 else np.moveaxis(array, 1, 0) for array in arrays]
        for start in range(0, channels, block):
            part = slice(start, start + block)
            flat = np.concatenate([row[part].reshape(len(row[part]), -1) for row in rows], axis=1, dtype=np.float64)
            _standardize(flat, self.reach, generator)
            flat *= self.deviation[part, None]
            flat += self.mean[part, None]
            for row, brought in zip(rows, np.split(flat, len(rows), axis=1), strict=True):
                row[part] = brought.reshape(row[part].shape)


def _standardize(flat: Array, reach: float, generator: np.random.Generator) -> None:
    """Bring rows to mean 0 and variance 1 in place, and their outermost values to the reach."""
    mean, deviation = flat.mean(axis=1, keepdims=True), flat.std(axis=1, keepdims=True)
    constant = (deviation <= 1e-6 * np.abs(mean) + float(np.finfo(np.float32).tiny))[:, 0]
    flat -= mean
    deviation[constant] = 1.0
    flat /= deviation
    flat[constant] = generator.standard_normal((int(constant.sum()), flat.shape[1]))
    np.clip(flat, -reach, reach, out=flat)
    rows = np.arange(flat.shape[0])
    flat[rows, flat.argmin(axis=1)] = -reach
    flat[rows, flat.argmax(axis=1)] = reach


def known_moments(model: ir.Model) -> dict[str, Moments]:
    """Return the moments of each BatchNormalization's result, and of the inputs that can be told from the first one.

    Parameters
    ----------
    model : onnx_ir.Model
        As it came in: canonicalization folds the normalizations away, but their results keep their names.

    Returns
    -------
    dict of str to Moments
        By value name. Those of a normalization have one number per channel, those of an input one in all.
    """
    known: dict[str, Moments] = {}
    for node in model.graph:
        if node.op_type != "BatchNormalization" or node.domain not in ("", "ai.onnx"):
            continue
        if node.attributes.get_int("training_mode", 0) or not node.attributes.get_int("spatial", 1):
            continue
        scale, shift = _constant(node.inputs[1]), _constant(node.inputs[2])
        if scale is None or shift is None or node.outputs[0].name is None:
            continue
        known[node.outputs[0].name] = Moments(shift, np.abs(scale), REACH)
        source, moments = _input_moments(node)
        if source is not None and moments is not None and source.name is not None:
            known.setdefault(source.name, moments)
    return known


def _input_moments(norm: ir.Node) -> tuple[ir.Value | None, Moments | None]:
    """Tell from a normalization behind a Conv that reads an input of the model what this input is like."""
    conv = None if norm.inputs[0] is None else norm.inputs[0].producer()
    if conv is None or conv.op_type != "Conv" or conv.attributes.get_int("group", 1) != 1:
        return None, None
    source = conv.inputs[0]
    while source is not None and (move := source.producer()) is not None and move.op_type in _MOVES:
        source = move.inputs[0]
    if source is None or not source.is_graph_input():
        return None, None
    weight, mean, variance = (_constant(value) for value in (conv.inputs[1], norm.inputs[3], norm.inputs[4]))
    bias = _constant(conv.inputs[2]) if len(conv.inputs) > 2 and conv.inputs[2] is not None else np.zeros(1)
    if weight is None or mean is None or variance is None or bias is None:
        return None, None
    return source, estimate(weight, mean - bias, variance)


def estimate(weight: Array, mean: Array, variance: Array) -> Moments | None:
    """Estimate mean and standard deviation of what goes into a Conv from those of what comes out of it.

    The mean of a filter's result is the input's times the sum of its weights, which least squares solves. Its variance
    is the input's times wᵀRw; the correlation R that leaves the least scatter over the filters, of some that fall off
    with the distance of two elements, stands for the true one: pictures and spectra are anything but white.

    Parameters
    ----------
    weight : ndarray, shape (filters, channels, ...)
    mean, variance : ndarray, shape (filters,)
        Of the result without bias.

    Returns
    -------
    Moments or None
        One mean and deviation for all channels; None where the filters do not agree.
    """
    filters = weight.reshape(*weight.shape[:2], -1)
    energy = np.square(filters).sum(axis=(1, 2))
    alive = (variance > 1e-3 * variance.max(initial=0.0)) & (energy > 1e-6 * energy.max(initial=0.0))
    if np.count_nonzero(alive) < FEWEST:
        return None
    filters, mean, variance = filters[alive], mean[alive], variance[alive]
    sums = filters.sum(axis=(1, 2))
    if not np.any(sums):
        return None
    centre = np.sum(sums * mean / variance) / np.sum(sums * sums / variance)
    positions = np.array(list(np.ndindex(*weight.shape[2:])), np.float64).reshape(filters.shape[2], -1)
    distance = np.sqrt(np.square(positions[:, None] - positions[None]).sum(axis=-1))
    fits = []
    for neighbours, channels in product(NEIGHBOURS, CHANNELS):
        correlation = np.where(distance > 0.0, neighbours**distance, 1.0)
        apart = np.einsum("fcp,pq,fcq->f", filters, correlation, filters)
        joined = np.einsum("fp,pq,fq->f", filters.sum(axis=1), correlation, filters.sum(axis=1))
        gain = (1.0 - channels) * apart + channels * joined
        logarithm = np.log(variance / np.maximum(gain, 1e-9 * energy.max()))
        fits.append((float(logarithm.std()), float(np.exp(np.median(logarithm) / 2.0))))
    scatter, deviation = min(fits)
    if not scatter <= SCATTER or not np.isfinite([centre, deviation]).all():
        return None
    return Moments(np.array([centre]), np.array([deviation]), INPUT_REACH)


def _constant(value: ir.Value | None) -> Array | None:
    """Return an array that no caller can replace, whether an initializer or a Constant's, also behind Identity."""
    while value is not None and (node := value.producer()) is not None and node.op_type == "Identity":
        value = node.inputs[0]
    if value is None or value.is_graph_input():
        return None
    tensor = ir.convenience.get_const_tensor(value)
    return None if tensor is None else tensor.numpy().astype(np.float64)
