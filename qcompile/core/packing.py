"""Packing: codes of eight bits that take four and a quarter.

In a block of codes of one channel each is a four-bit number times a whole number that the block has in common, of four
bits as well (Zhang et al. 2023, "Dual Grained Quantization: Efficient Fine-Grained Quantization for LLM"). The codes
remain codes of eight bits with a scale per channel, so that every integer kernel takes them; only what is stored is
less.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from qcompile.core.numerics import FloatArray, IntArray, symmetric_scale

#: Codes that have a multiple in common.
BLOCK = 16
#: What is stored of a code, and of a block.
LOWEST, HIGHEST, MOST = -8, 7, 15
#: Fewer codes than this save less than what unpacks them takes in a file.
FEWEST = 4096
#: Bits of a packed weight, its part of the block's multiple included.
BITS = 4.0 + 4.0 / BLOCK

#: Blocks that are looked at before all of them: of codes that are free, one of these has no multiple.
GLANCE = 64

#: Which part of the codes on one side is within reach.
_REACH = HIGHEST * MOST / np.iinfo(np.int8).max


def packed_scale(absmax: npt.ArrayLike) -> npt.NDArray[np.float32]:
    """Return the scale by which the largest packed code reaches `absmax`."""
    return symmetric_scale(np.asarray(absmax, np.float64) / _REACH, "int8")


def block_length(count: int, size: int) -> int:
    """Return how long blocks of at most `size` are for so many codes: as alike as whole numbers allow."""
    return -(-count // -(-count // size))


def in_blocks(x: npt.NDArray[Any], axis: int | None, size: int) -> npt.NDArray[Any]:
    """Return a tensor as ``[channels, blocks, codes]``, with zeros at the end of each channel where they are needed.

    Parameters
    ----------
    x : ndarray
    axis : int or None
        Of the channels; None for a single one.
    size : int
        Codes of a block at most: blocks are as long as each other, as nearly as whole numbers allow.
    """
    channels = x.reshape(1, -1) if axis is None else np.moveaxis(x, axis, 0).reshape(x.shape[axis], -1)
    length = block_length(channels.shape[1], size)
    count = -(-channels.shape[1] // length)
    padded = np.pad(channels, ((0, 0), (0, count * length - channels.shape[1])))
    return padded.reshape(len(channels), count, length)


def from_blocks(blocks: npt.NDArray[Any], shape: tuple[int, ...], axis: int | None) -> npt.NDArray[Any]:
    """Turn what `in_blocks` returns into a tensor again."""
    first = 0 if axis is None else axis
    moved = (shape[first], *shape[:first], *shape[first + 1 :])
    count = int(np.prod(shape)) // (1 if axis is None else shape[first])
    flat = blocks.reshape(len(blocks), -1)[:, :count]
    return flat.reshape(shape) if axis is None else np.moveaxis(flat.reshape(moved), 0, first)


def multiples(scaled: FloatArray, axis: int | None, size: int = BLOCK) -> IntArray:
    """Return for each weight the multiple of its block that leaves the least squared error.

    Parameters
    ----------
    scaled : ndarray of float
        Weights over their scales.
    axis : int or None
        Of the scales.
    size : int
        Codes of a block.

    Returns
    -------
    ndarray of int8
        In the shape of `scaled`.
    """
    blocks = in_blocks(np.asarray(scaled, np.float32), axis, size)
    best = np.ones((*blocks.shape[:2], 1), np.int8)
    least = np.full(best.shape, np.inf)
    for multiple in range(1, MOST + 1):
        error = blocks - _on_grid(blocks, np.float32(multiple))
        squares = np.einsum("cbk,cbk->cb", error, error)[..., None]
        better = squares < least
        best[better], least = multiple, np.where(better, squares, least)
    return from_blocks(np.broadcast_to(best, blocks.shape), scaled.shape, axis)


def pack_codes(scaled: FloatArray, multiple: IntArray) -> npt.NDArray[np.int8]:
    """Round weights over their scales to packed codes, each a four-bit number times its multiple."""
    return _on_grid(np.asarray(scaled, np.float32), multiple.astype(np.float32)).astype(np.int8)


def unpacked(codes: npt.NDArray[np.int8], axis: int | None) -> tuple[IntArray, IntArray] | None:
    """Return four-bit numbers ``[channels, blocks, codes]`` and multiples ``[channels, blocks, 1]`` of that product.

    None where there are none. Which multiple a block has, where several would do, makes no difference.
    """
    blocks = in_blocks(codes, axis, BLOCK)
    flat = blocks.reshape(-1, blocks.shape[2])
    if (_common(flat[:GLANCE]) == 0).any() or not (found := _common(flat)).all():
        return None
    multiple = found.reshape(*blocks.shape[:2], 1)
    return blocks // multiple, multiple


def _common(blocks: npt.NDArray[np.int8]) -> npt.NDArray[np.int8]:
    """Return the largest multiple that all codes of a block have in common, and 0 where none does."""
    low, high = blocks.min(axis=1).astype(np.int16), blocks.max(axis=1).astype(np.int16)
    found = np.zeros(len(blocks), np.int8)
    for multiple in range(1, MOST + 1):
        fits = (low >= LOWEST * multiple) & (high <= HIGHEST * multiple)
        found[fits & ~(blocks % np.int8(multiple)).any(axis=1)] = multiple
    return found


def _on_grid(scaled: FloatArray, multiple: FloatArray | np.float32) -> FloatArray:
    return np.asarray(np.clip(np.rint(scaled / multiple), LOWEST, HIGHEST) * multiple)
