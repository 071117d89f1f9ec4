"""Weight scaling: by which factors the channels of inputs are divided, so that weights of few bits lose least.

X · W = (X / s) · (s · W), where X stays in float: only s · W is rounded. Weights of channels that carry much are made
large, so that they get the finer part of their grid (Lin et al. 2024, "AWQ: Activation-aware Weight Quantization for
LLM Compression and Acceleration", equation 5). What an operator loses follows from its weights and the second moments
G = E[xᵀx] of what it reads: tr(Δᵀ G Δ), with Δ what rounding leaves of W.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

from qcompile.calib.collect import ChannelSpread
from qcompile.calib.rounding import Operator, SecondMoments
from qcompile.calib.smoothing import STEPS, Numbers, by_class, rounded_log2
from qcompile.core import packing

#: How much of a channel's magnitude goes into its factor; 0 is no factors.
ALPHAS = tuple(step / 10 for step in range(11))
#: The most columns of weights that an operator is judged by, evenly spread.
COLUMNS = 256


@dataclass(frozen=True, eq=False)
class PackedReader:
    """A linear operator whose weights are to be packed, four bits and what a block has in common.

    Parameters
    ----------
    weights : ndarray of float64, shape (groups, depth, columns)
        Some columns of what rows are multiplied by.
    classes : ndarray of int, shape (groups, depth)
        Which factor multiplies each row; 0 is none, and -c divides by the factor of c.
    moments : ndarray of float64, shape (groups, depth, depth)
        Of what it reads.
    """

    weights: Numbers
    classes: npt.NDArray[np.int64]
    moments: Numbers

    @classmethod
    def of(cls, operator: Operator, moments: SecondMoments, classes: npt.NDArray[np.int64]) -> Self:
        """Return a reader with some of an operator's columns.

        Parameters
        ----------
        operator : Operator
        moments : SecondMoments
        classes : ndarray of int
            Which factor each of its weights takes; broadcasts with them.
        """
        value = operator.node.inputs[1]
        assert value is not None and value.const_value is not None
        weights = operator.matrix(value.const_value.numpy().astype(np.float64))
        rows = operator.matrix(np.broadcast_to(classes, operator.shape).astype(np.float64))[..., 0]
        some = np.linspace(0, weights.shape[2] - 1, min(COLUMNS, weights.shape[2])).astype(np.int64)
        return cls(weights[..., some], rows.astype(np.int64), moments.matrices)

    def noise(self, log2: Numbers) -> float:
        """Return noise over signal of what it makes, with factors of 2 to the power of `log2`.

        Weights are rounded to nearest, with a scale for each column.

        Parameters
        ----------
        log2 : ndarray, shape (number of factors + 1,)
            By class.
        """
        factors = by_class(np.exp2(log2), self.classes)[..., None]
        scaled = (self.weights * factors).astype(np.float32)
        absmax = np.abs(scaled).max(axis=1, keepdims=True)
        steps = packing.packed_scale(absmax)
        rows = np.moveaxis(scaled / steps, 1, 2)
        flat = rows.reshape(-1, rows.shape[2])
        codes = packing.pack_codes(flat, packing.multiples(flat, 0)).reshape(rows.shape)
        held = np.moveaxis(codes.astype(np.float32), 2, 1) * steps / factors
        signal = self._power(self.weights)
        return self._power(held - self.weights) / signal if signal > 0.0 else 0.0

    def _power(self, weights: Numbers) -> float:
        return float(np.sum(weights * (self.moments @ weights)))


def magnitude_log2(parts: Sequence[tuple[ChannelSpread, npt.NDArray[np.int64]]], alpha: float) -> Numbers:
    """Return each class's root mean square to the power of α, as powers of 2 by eighths.

    Parameters
    ----------
    parts : sequence of (ChannelSpread, ndarray of int)
        What operators read, and the class of each of its channels.
    alpha : float

    Returns
    -------
    ndarray of float64, shape (number of factors + 1,)
        The first is 0, for channels that are not scaled, and so is that of dead channels. What all have in common
        changes nothing and is taken out.
    """
    count = max(int(np.abs(classes).max()) for _, classes in parts) + 1
    power, seen = np.zeros(2 * count), np.zeros(2 * count)
    for spread, classes in parts:
        np.add.at(power, classes, spread.power)
        np.add.at(seen, classes, 1.0)
    classes = np.arange(count)
    asked = power > 0.0
    wish = np.zeros(power.size)
    wish[asked] = alpha / 2.0 * np.log2(power[asked] / seen[asked])
    alive = (asked[classes] | asked[-classes]) & (classes > 0)
    # A factor that is asked for on both sides of a product is the mean of what each asks.
    log2 = np.where(alive, (wish[classes] - wish[-classes]) / np.maximum(1, asked[classes] + 1 * asked[-classes]), 0.0)
    if alive.any():
        log2[alive] -= np.median(log2[alive])
    return rounded_log2(log2, STEPS)
