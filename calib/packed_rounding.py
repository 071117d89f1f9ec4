"""Rounding to packed codes: what GPTQ leaves is settled by descent on the same error.

In a packed tensor (`core/packing.py`) a block of codes of one channel has a multiple in common, and steps are coarse:
there is more to come back to than eight bits leave. Both functions lessen tr(EᵀHE), E = codes - weights over their
scales, one column apart from the other.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import scipy.linalg

from qcompile.core import packing

FloatArray = npt.NDArray[np.float64]

#: How often each code is looked at again.
SWEEPS = 3
#: How often each block's multiple is.
FITS = 2
#: Rows whose moves are passed on at once to all others.
BLOCK = 128


def fit_multiples(
    codes: FloatArray,
    scaled: FloatArray,
    moments: FloatArray,
    limits: tuple[int, int],
    multiple: FloatArray,
    length: int,
) -> tuple[FloatArray, FloatArray]:
    """Give blocks of codes another multiple where what is computed comes nearer to float's by it.

    The multiple that leaves the least squared error of the weights is not the one that leaves the least of the result.
    Block after block, each multiple is tried: all other blocks as they are, the block's codes are rounded to it one
    after another as in GPTQ, whose squared errors e² add up to what the result is then off by.

    Parameters
    ----------
    codes : ndarray of float64, shape (n, m)
        To begin with.
    scaled : ndarray of float64, shape (n, m)
        Weights over their scales.
    moments : ndarray of float64, shape (n, n)
        Positive definite.
    limits : tuple of int
        The lowest and the highest four-bit number.
    multiple : ndarray of float64, shape (n, m)
        Of each code, to begin with.
    length : int
        Rows of a block.

    Returns
    -------
    codes, multiple : ndarray of float64, shape (n, m)
    """
    codes, multiple, slope = codes.copy(), multiple.copy(), moments @ (codes - scaled)
    for start in [*range(0, len(codes), length)] * FITS:
        rows = slice(start, min(start + length, len(codes)))
        near = moments[rows, rows]
        found, other = _fitted(codes[rows] - np.linalg.solve(near, slope[rows]), near, limits)
        move = found - codes[rows]
        gains = (move * (2.0 * slope[rows] + near @ move)).sum(axis=0) < 0.0
        move *= gains
        codes[rows] += move
        multiple[rows] = np.where(gains, other, multiple[rows])
        slope += moments[:, rows] @ move
    return codes, multiple


def _fitted(wanted: FloatArray, moments: FloatArray, limits: tuple[int, int]) -> tuple[FloatArray, FloatArray]:
    """Round one block by each multiple; return the codes of the best, and that multiple, column by column."""
    upper = factor_of_inverse(moments).astype(np.float32)
    grid = np.arange(1, packing.MOST + 1, dtype=np.float32)[:, None]
    left = np.repeat(wanted[None].astype(np.float32), packing.MOST, axis=0)
    codes, errors = np.empty_like(left), np.zeros((packing.MOST, wanted.shape[1]), np.float32)
    for row in range(len(wanted)):
        codes[:, row] = np.clip(np.rint(left[:, row] / grid), *limits) * grid
        error = (left[:, row] - codes[:, row]) / upper[row, row]
        errors += error * error
        left[:, row + 1 :] -= upper[row, row + 1 :, None] * error[:, None]
    best = errors.argmin(axis=0)
    return np.take_along_axis(codes, best[None, None], axis=0)[0].astype(np.float64), best + 1.0


def descend(
    codes: FloatArray, scaled: FloatArray, moments: FloatArray, limits: tuple[int, int], multiple: FloatArray
) -> FloatArray:
    """Move codes to their neighbours as long as what is computed comes nearer to float's by it.

    Coordinate descent on tr(EᵀHE), E = codes - weights: GPTQ never comes back to a row, and four bits leave it more to
    come back to than eight (the objective of Nagel et al. 2020, AdaRound, without its relaxation).

    Parameters
    ----------
    codes : ndarray of float64, shape (n, m)
        To begin with.
    scaled : ndarray of float64, shape (n, m)
        Weights over their scales.
    moments : ndarray of float64, shape (n, n)
    limits, multiple
        As of `gptq`.
    """
    codes, slope = codes.copy(), moments @ (codes - scaled)
    for _ in range(SWEEPS):
        for start in range(0, len(codes), BLOCK):
            rows = slice(start, min(start + BLOCK, len(codes)))
            moved, near, ahead = np.zeros_like(codes[rows]), moments[rows, rows], slope[rows].copy()
            for row in range(len(moved)):
                step = -np.sign(ahead[row]) * multiple[start + row]
                gains = step * (2.0 * ahead[row] + step * near[row, row]) < 0.0
                number = (codes[start + row] + step) / multiple[start + row]
                moved[row] = np.where(gains & (number >= limits[0]) & (number <= limits[1]), step, 0.0)
                ahead += np.outer(near[:, row], moved[row])
            codes[rows] += moved
            slope += moments[:, rows] @ moved
    return codes


def factor_of_inverse(matrix: FloatArray) -> FloatArray:
    """Return the upper U of H⁻¹ = Uᵀ U for a positive definite H.

    Of H = R Rᵀ with an upper R, which Cholesky's algorithm gives from the last row and column on, U is the inverse.
    Of several, shape (..., n, n), each gets its own.
    """
    if matrix.ndim > 2:
        return np.stack([factor_of_inverse(one) for one in matrix])
    lower = scipy.linalg.cholesky(matrix[::-1, ::-1], lower=True, check_finite=False)
    inverse, _ = scipy.linalg.lapack.dtrtri(lower[::-1, ::-1])
    return np.asarray(inverse)
