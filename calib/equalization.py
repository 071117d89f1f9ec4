"""Equalization: factors of channels where operators have one scale for all their weights, those of all groups at once.

What cross-layer equalization chooses by the weights on both sides of a channel (Nagel et al. 2019, "Data-Free
Quantization", equation 11) is chosen here by the noise that all codes of all operators make. An operator whose input
channels are divided by s and whose output channels by t has the weights W_kj s_j / t_k, and, roundings being
independent, its results the noise

    g · ( D² · Σ_kj E[X_j²] (t_k / s_j)²  +  R² · Σ_kj W_kj² s_j² ),

D the step of its weights, R that of what it reads, both following from the largest of all channels, and g what noise of
its results comes to behind it. The logarithm of the sum over operators is convex in those of all factors: a geometric
program (Boyd et al. 2007, "A Tutorial on Geometric Programming"), solved with p-norms for the largest, p growing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.optimize

from qcompile.calib.smoothing import STEPS, Numbers, Reader, Scheme, rounded_log2

Labels = npt.NDArray[np.int64]

#: The p of the norms that stand for the largest, one after the other, and one by which they are the largest.
NORMS, LARGEST = (8.0, 32.0, 128.0), 1e5
#: Steps of the search with each.
ITERATIONS = 60


@dataclass(frozen=True, eq=False)
class Operator:
    """A linear operator in integers, and the factors of the channels that it reads and writes.

    Parameters
    ----------
    reader : Reader
        What it reads; its classes are numbers of factors among those of all groups.
    written : ndarray of int, shape (outputs,)
        Which factor divides what it writes; 0 is none, and -c multiplies by the factor of c.
    gain : float
        What noise over signal of its results comes to behind it.
    """

    reader: Reader
    written: Labels
    gain: float = 1.0

    @cached_property
    def _channels(self) -> Labels:
        """Which channel each column of its weights multiplies: `[1, columns]`, or of each output where they differ."""
        moved = np.moveaxis(self.reader.channels, self.reader.axis, 0)
        rows = moved.reshape(*moved.shape[:2])
        return rows[:1] if (rows == rows[:1]).all() else rows

    @cached_property
    def _weight(self) -> npt.NDArray[Any]:
        moved = np.moveaxis(self.reader.weight, self.reader.axis, 0)
        return moved.reshape(*moved.shape[:2], -1)

    @cached_property
    def _reach(self) -> npt.NDArray[np.float32]:
        """The logarithms of the largest absolute weights, `[outputs, columns]`."""
        with np.errstate(divide="ignore"):
            found: npt.NDArray[np.float32] = np.log(np.abs(self._weight).max(axis=2)).astype(np.float32)
        return found

    def noise(self, logs: Numbers, norm: float, scheme: Scheme) -> tuple[float, Numbers]:
        """Return what its noise comes to, and the derivatives by the logarithms of the factors.

        Parameters
        ----------
        logs : ndarray of float64, shape (number of factors + 1,)
            Natural logarithms of all factors, the first of which is 0.
        norm : float
            The p of the norm that stands for the largest.
        scheme : Scheme
        """
        read, written = _of(logs, self.reader.classes), _of(logs, self.written)
        scale = self.gain / self.reader.signal if self.reader.signal > 0.0 else 0.0
        first, by_read, by_written = self._of_weights(read, written, norm)
        second, by_values = self._of_values(read, norm)
        first, second = (scale * noise / _codes(dtype) ** 2
                         for noise, dtype in ((first, scheme.weight_dtype), (second, scheme.dtype)))  # fmt: skip
        slopes = np.zeros(logs.size)
        np.add.at(slopes, np.abs(self.reader.classes),
                  np.sign(self.reader.classes) * (first * by_read + second * by_values))  # fmt: skip
        np.add.at(slopes, np.abs(self.written), np.sign(self.written) * first * by_written)
        return first + second, slopes

    def _of_weights(self, read: Numbers, written: Numbers, norm: float) -> tuple[float, Numbers, Numbers]:
        """Return what rounding weights adds, and the derivatives of its logarithm by what it reads and writes."""
        channels = self._channels
        coded = self._reach + read[channels].astype(np.float32) - written[:, None].astype(np.float32)
        largest, parts = _norm(coded, norm)
        power = self.reader.spread.power[channels] * np.exp(-2.0 * read[channels])
        outputs = np.exp(2.0 * written)
        heard = outputs * power.sum(axis=1)
        total = max(float(heard.sum()), np.finfo(float).tiny)
        by_read, columns = np.zeros(read.size), parts.sum(axis=0, keepdims=True) if len(channels) == 1 else parts
        np.add.at(by_read, channels, 2.0 * columns)
        weights = outputs.sum() * power if len(channels) == 1 else outputs[:, None] * power
        np.add.at(by_read, channels, -2.0 * weights / total)
        noise = np.exp(2.0 * largest) * 4.0 * total * self._weight.shape[2]
        return float(noise), by_read, 2.0 * heard / total - 2.0 * parts.sum(axis=1)

    def _of_values(self, read: Numbers, norm: float) -> tuple[float, Numbers]:
        """Return what rounding what it reads adds, and the derivatives of its logarithm."""
        step, slopes = 0.0, np.zeros(read.size)
        for side in (self.reader.spread.high, -self.reader.spread.low):
            if side.max() > 0.0:
                with np.errstate(divide="ignore"):
                    largest, parts = _norm(np.log(np.maximum(side, 0.0)) - read, norm)
                step, slopes = step + np.exp(largest), slopes - np.exp(largest) * parts
        energy = self.reader.energy * np.exp(2.0 * read)
        total = max(float(energy.sum()), np.finfo(float).tiny)
        return step**2 * total, 2.0 * slopes / max(step, np.finfo(float).tiny) + 2.0 * energy / total


def equalized_log2(operators: Sequence[Operator], count: int, scheme: Scheme) -> Numbers:
    """Return the factors with which all operators together make least noise, by eighths.

    Parameters
    ----------
    operators : sequence of Operator
    count : int
        How many factors there are.
    scheme : Scheme

    Returns
    -------
    ndarray of float64, shape (count + 1,)
        Their logarithms, the first for what has none; 0 for all where nothing is better than the channels as they are.
    """

    def noise(logs: Numbers, norm: float) -> tuple[float, Numbers]:
        found = [operator.noise(logs, norm, scheme) for operator in operators]
        total, slopes = sum(one for one, _ in found), np.sum([each for _, each in found], axis=0)
        slopes[0] = 0.0
        return float(np.log(total)), slopes / total

    nothing = np.zeros(count + 1)
    operators = [operator for operator in operators if operator.reader.signal > 0.0]
    if not operators:
        return nothing
    logs = nothing
    for norm in NORMS:
        logs = scipy.optimize.minimize(
            noise, logs, (norm,), "L-BFGS-B", jac=True, options={"maxiter": ITERATIONS, "maxcor": 20}
        ).x
    found = rounded_log2(logs / np.log(2.0), STEPS)
    return found if noise(found * np.log(2.0), LARGEST)[0] < noise(nothing, LARGEST)[0] else nothing


def _of(logs: Numbers, classes: Labels) -> Numbers:
    return logs[np.abs(classes)] * np.sign(classes)


def _norm(logs: npt.NDArray[Any], norm: float) -> tuple[float, npt.NDArray[Any]]:
    """Return the logarithm of a p-norm of numbers given by theirs, and its derivatives by these."""
    top = float(logs.max())
    if top == -np.inf:
        return top, np.zeros(logs.shape)
    parts = np.exp(norm * (logs - np.asarray(top, logs.dtype)))
    total = float(parts.sum(dtype=np.float64))
    return top + float(np.log(total)) / norm, parts / total


def _codes(dtype: str) -> float:
    """Return how many steps a type's codes reach over."""
    limits = np.iinfo(dtype)
    return float(int(limits.max) - int(limits.min))
