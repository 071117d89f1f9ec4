"""Codes that were chosen for what operators compute, held to that: nearest ones must not be better at it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from qcompile.calib.rounding import DAMPING, MANY, Operator, SecondMoments, damped
from qcompile.core.numerics import FloatArray, IntArray
from qcompile.passes import structure

#: Output channels that are looked at: each is rounded by itself, and a few tell of all.
CHANNELS = 16


def is_nearer(operator: Operator, moments: SecondMoments, codes: IntArray) -> bool:
    """Tell whether an operator's results are nearer to float's with chosen codes than with the nearest, or as near.

    The error is E[|x(W - Ŵ)|²], by the moments that the codes were chosen by, over at most `CHANNELS` output channels
    of each group.

    Parameters
    ----------
    operator : Operator
    moments : SecondMoments
    codes : ndarray of int
        In the weights' shape.
    """
    quant = operator.quant
    weights = structure.constant(operator.node.inputs[structure.WEIGHT_INPUT])
    assert weights is not None
    damping = operator.depth / max(1, moments.rows) if quant.bits < MANY else DAMPING
    matrices = [damped(h + operator.step**2 / 12.0 * np.eye(operator.depth), damping) for h in moments.matrices]
    chosen, nearest = (_error(operator, quant.dequantize(each), weights, matrices)
                       for each in (codes, quant.quantize(weights)))  # fmt: skip
    return chosen <= nearest


def _error(operator: Operator, rounded: FloatArray, weights: FloatArray, matrices: Sequence[FloatArray]) -> float:
    groups = operator.matrix(weights.astype(np.float64) - rounded)
    kept = np.unique(np.linspace(0, groups.shape[2] - 1, CHANNELS).astype(np.int64))
    return sum(float(np.sum(apart[:, kept] * (h @ apart[:, kept]))) for apart, h in zip(groups, matrices, strict=True))
