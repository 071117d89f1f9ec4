"""Splitting: which outlier channels become several, and how far each of them reaches then.

`passes/split.py` has the maths, and what it takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

from qcompile.calib.collect import ChannelSpread
from qcompile.calib.smoothing import STEPS, Numbers, Reader, Scheme, worthwhile

#: What held-out values reach beyond those that were seen, and how much steeper a copy may be, by its logarithm.
ROOM, STEEPEST = 1.25, 3.0
#: Beyond this nothing is divided.
SMALLEST = 1e-9


@dataclass(frozen=True, eq=False)
class Pieces:
    """Channels that are split into several.

    Parameters
    ----------
    channels : ndarray of int, shape (copies,)
        A channel once for each further copy.
    log2 : ndarray of float64, shape (copies,)
        The logarithm of how much steeper that is.
    high : float
        What no channel exceeds then.
    """

    channels: npt.NDArray[np.int64]
    log2: Numbers
    high: float

    @classmethod
    def of(cls, high: Numbers, copies: int) -> Self:
        """Return the pieces of at most so many copies whose bound is least.

        Parameters
        ----------
        high : ndarray of float64, shape (channels,)
            The greatest value of each.
        copies : int
        """
        top = np.sort(high)[::-1][: copies + 1]
        ends = np.unique(np.float32(np.concatenate([top / parts for parts in range(1, copies + 2)])))
        for end in (float(end) for end in ends if end > 0.0):
            # A bound that is the quotient of a channel's own reach, rounded, holds it.
            more = np.maximum(np.ceil(high / end - 1e-6) - 1.0, 0.0)
            if more.sum() <= copies:
                covered = np.maximum((high - end) * ROOM, SMALLEST)
                steep = np.floor(np.log2(np.maximum(more * end / covered, 1.0)) * STEPS) / STEPS
                channels = np.repeat(np.arange(high.size), more.astype(np.int64))
                return cls(channels, np.minimum(steep, STEEPEST)[channels], end)
        return cls(np.empty(0, np.int64), np.empty(0), float(high.max()))

    def read_by(self, reader: Reader) -> Reader:
        """Return what an operator on matrices reads then, copies behind the channels that were there."""
        spread, count, rows = reader.spread, reader.classes.size, 1 - reader.axis
        order = np.concatenate([np.arange(count), self.channels])
        # All copies have the same weights, and lose together what the whole channel would.
        power = spread.power / (1.0 + np.bincount(self.channels, minlength=count))
        bounded = ChannelSpread(spread.low[order], np.minimum(spread.high, self.high)[order], power[order])
        shape = [-1 if at == rows else 1 for at in range(reader.weight.ndim)]
        steep = np.exp2(np.concatenate([np.zeros(count), self.log2])).astype(np.float32).reshape(shape)
        weight = np.take(reader.weight, order, rows) / steep
        return Reader(bounded, reader.classes[order], weight, reader.axis, np.arange(order.size).reshape(shape))


def pieces(readers: Sequence[Reader], scheme: Scheme) -> Pieces:
    """Return which channels are best split into several.

    As many copies more as make noise · (1 + 8 · share of the channels) least, a power of two or a thirty-second at
    most; none where that is no less than as it is.

    Parameters
    ----------
    readers : sequence of Reader
        That read the same tensor.
    scheme : Scheme
    """
    high = readers[0].spread.high

    def noise(copies: int) -> float:
        return scheme.noise([Pieces.of(high, copies).read_by(reader) for reader in readers], readers)

    return Pieces.of(high, worthwhile(noise, high.size))
