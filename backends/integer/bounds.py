"""The proof that no accumulator wraps, from real weights and the codes that can arrive."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompile.backends.integer.values import Grid, refuse

LARGEST = 2**31 - 1


def largest_sums(weights: npt.NDArray[Any], bias: npt.NDArray[Any], low: int, high: int) -> npt.NDArray[np.int64]:
    """Return what an accumulator's magnitude stays below per channel, whatever the order of its terms.

    Parameters
    ----------
    weights : ndarray of int, shape (channels, terms)
    bias : ndarray of int, shape (channels,)
    low, high : int
        The codes that can arrive.

    Returns
    -------
    ndarray of int64, shape (channels,)
        |bias| + Σ |weight| · max(|low|, |high|): every partial sum is within it, so kernels may add in any order.
    """
    total = np.abs(weights.astype(np.int64)).sum(axis=1) * max(abs(low), abs(high))
    return np.asarray(np.abs(bias.astype(np.int64)) + total, np.int64)


def require_no_wrap(node: ir.Node, weights: npt.NDArray[Any], bias: npt.NDArray[Any], grid: Grid) -> None:
    """Refuse an operator with an accumulator that int32 might not hold.

    Raises
    ------
    TargetError
        With the channel.
    """
    sums = largest_sums(weights, bias, grid.low, grid.high)
    if sums.size and int(sums.max()) > LARGEST:
        channel = int(sums.argmax())
        fact = f"the accumulator of output channel {channel} can reach {int(sums[channel])}, beyond int32"
        refuse(node, fact, "quantize its input to 8 bits, or split it")
