"""Halves: numbers of 32 bits that are stored in 16, times one power of two for all of them.

A float16 has eleven significant bits and little range (IEEE 754-2008, binary16). Steps and biases need no more digits
than that, but span more range: the power of two, which moves the largest of them to the top, makes room.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Single = npt.NDArray[np.float32]

#: Fewer numbers save less than what unpacks them takes in a file.
FEWEST = 128
#: The exponent that the largest number gets, as `numpy.frexp` tells it. One more is there for what is rounded up.
TOP = 15
#: Powers of two beyond this, up or down, are near the end of what float32 holds.
FARTHEST = 100


def nearest(values: npt.NDArray[Any]) -> Single:
    """Return the nearest numbers that `packed` can hold.

    Parameters
    ----------
    values : ndarray of float, finite

    Returns
    -------
    ndarray of float32
        Off by 2^-11 of each at most, or by 2^-39 of the largest.
    """
    power = _power(values)
    rounded = np.ldexp(np.float64(values), power).astype(np.float16)
    return np.asarray(np.ldexp(np.float64(rounded), -power), np.float32)


def above(values: npt.NDArray[Any]) -> Single:
    """Return the least numbers of eleven significant bits that are not below `values`, which are positive.

    Parameters
    ----------
    values : ndarray of float, finite
    """
    mantissa, exponent = np.frexp(np.float64(values))
    return np.asarray(np.ldexp(np.ceil(np.ldexp(mantissa, 11)), exponent - 11), np.float32)


def packed(values: Single) -> tuple[npt.NDArray[np.float16], int] | None:
    """Return halves and the power p with values = halves · 2^p, exactly; None where there are none.

    Parameters
    ----------
    values : ndarray of float32
    """
    power = _power(values)
    for tried in (0, power, power + 1):
        with np.errstate(over="ignore", invalid="ignore"):
            found = np.ldexp(np.float64(values), tried).astype(np.float16)
            same = np.array_equal(np.ldexp(np.float64(found), -tried), values)
        if same and abs(tried) <= FARTHEST and np.all(np.isfinite(found)):
            return found, -tried
    return None


def _power(values: npt.NDArray[Any]) -> int:
    """Return the power of two that moves the largest of some numbers to the top of what float16 holds."""
    return TOP - int(np.frexp(np.max(np.abs(values), initial=0.0))[1])
