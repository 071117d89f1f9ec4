"""How kernels store weights: bytes in order, two codes of four bits in a byte, or fours for 16-bit activations.

Rows that are not plain bytes end at a multiple of four bytes, with zeros.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any

import numpy as np
import numpy.typing as npt

Codes = npt.NDArray[Any]


class WeightForm(StrEnum):
    """How a row of weights is stored."""

    BYTES = "bytes"
    """One code a byte, in order."""
    NIBBLES = "nibbles"
    """Byte j has code j in its low four bits and code half + j in its high ones; a row has `half` bytes. A word at j
    then goes with the words of activations at j and half + j, whatever a processor loads at once."""
    FOURS = "fours"
    """One code a byte, in fours whose inner two the C swaps where SMLAD is (QC_FOUR): that one multiplies pairs of 16
    bits, and its SXTB16 takes every other byte."""


def row_bytes(form: WeightForm, count: int) -> int:
    """Return the bytes of a row of so many weights."""
    if form is WeightForm.NIBBLES:
        return 4 * -(-count // 8)
    return 4 * -(-count // 4) if form is WeightForm.FOURS else count


def stored(form: WeightForm, rows: Codes) -> Codes:
    """Return rows of weights as they are stored.

    Parameters
    ----------
    form : WeightForm
    rows : ndarray of int8, shape (rows, weights)
        From -8 to 7 where the form is `NIBBLES`.

    Returns
    -------
    ndarray of int8, shape (rows, bytes)
    """
    length = row_bytes(form, rows.shape[1])
    if form is not WeightForm.NIBBLES:
        return np.pad(rows, ((0, 0), (0, length - rows.shape[1])))
    low, high = np.split(np.pad(rows, ((0, 0), (0, 2 * length - rows.shape[1]))), 2, axis=1)
    return np.asarray((low & 0xF) | (high << 4), np.int8)


def stored_by_taps(form: WeightForm, groups: Codes) -> Codes:
    """Return a depthwise convolution's weights as they are stored: one row of all taps for each group of channels.

    Parameters
    ----------
    form : WeightForm
        `NIBBLES` here: byte c of pair t has tap 2t of channel c in its low four bits, and tap 2t + 1 in its high ones.
    groups : ndarray of int8, shape (groups, taps, channels)
    """
    if form is not WeightForm.NIBBLES:
        return np.asarray(groups.reshape(len(groups), -1))
    even = np.pad(groups, ((0, 0), (0, groups.shape[1] % 2), (0, 0)))
    packed = np.asarray((even[:, 0::2] & 0xF) | (even[:, 1::2] << 4), np.int8)
    return packed.reshape(len(groups), -1)
