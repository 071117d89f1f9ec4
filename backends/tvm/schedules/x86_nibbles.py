"""Sums of products with weights of four bits, two to a byte, which become bytes in registers.

A byte has a weight of one group of four codes in its low half and the one of the next group in its high half, 8 above
what they are. Layers of few outputs take as long as their weights take to come, which are half as many.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from qcompile.backends.tvm.emit import Function
from qcompile.backends.tvm.native import builder
from qcompile.backends.tvm.schedules import linear
from qcompile.backends.tvm.schedules.vectors import FOUR, Processor, all_lanes, fetch, load, nested

#: What a stored weight is above its own, and the bits of one.
ABOVE, BITS = 8, 4


def pack(
    shape: linear.Linear,
    tile: linear.Tile,
    processor: Processor,
    weights: npt.NDArray[np.int8],
    numbers: tuple[npt.NDArray[Any], ...],
) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.int32]]:
    """Return weights and the table of `linear.pack`, of which two groups of four codes are one.

    Parameters
    ----------
    weights : ndarray of int8, shape (outputs, taps, length)
        From -8 to 7.

    Returns
    -------
    ndarray of int8
        [block][tap][two groups][vector][lane][code].
    ndarray of int32
    """
    room = -(-shape.length // (2 * FOUR)) * 2 * FOUR - shape.length
    even = np.pad(weights, [(0, 0), (0, 0), (0, room)])
    stored = halves(even.reshape(*even.shape[:2], -1, 2, FOUR)).reshape(*even.shape[:2], -1)
    return linear.pack(halved(shape), tile, processor, stored, numbers)


def halves(pairs: npt.NDArray[np.int8]) -> npt.NDArray[np.int8]:
    """Return bytes of the weights that are pairs along the last axis but one.

    Parameters
    ----------
    pairs : ndarray of int8, shape (..., 2, weights)
        From -8 to 7.

    Returns
    -------
    ndarray of int8, shape (..., weights)
    """
    above = pairs.astype(np.uint8) + np.uint8(ABOVE)
    return (above[..., 0, :] | (above[..., 1, :] << BITS)).view(np.int8)


def halved(shape: linear.Linear) -> linear.Linear:
    """Return the shape that stored bytes have."""
    return replace(shape, length=-(-shape.quads // 2) * FOUR)


def nibbles_kernel(name: str, shape: linear.Linear, tile: linear.Tile, processor: Processor) -> Function:
    """Return the function. Arguments: input, weights, channels, table where codes are looked up, output."""
    return linear.linear_kernel(name, shape, tile, processor, Emitter)


def unpacked(stored: Any, lanes: int) -> tuple[Any, Any]:
    """Return the weights in the low halves of bytes, and those in the high ones."""
    ir, kind = builder(), f"int8x{lanes}"
    halves = ir.reinterpret(f"uint8x{lanes}", stored)
    low, high = halves & all_lanes((1 << BITS) - 1, "uint8", lanes), halves >> all_lanes(BITS, "uint8", lanes)
    above = all_lanes(ABOVE, "int8", lanes)
    return ir.bind(ir.reinterpret(kind, low) - above), ir.bind(ir.reinterpret(kind, high) - above)


class Emitter(linear.Emitter):
    """Builds the loops of one kernel."""

    def accumulate(self, first: Any, count: int, origin: tuple[Any, Any], pixels: list[tuple[int, int]]) -> Any:
        """Emit the sums of one tile and return where they are."""
        ir = builder()
        shape, lanes, step = self.shape, self.processor.lanes, self.processor.lanes * FOUR
        depth = halved(shape).depth
        sums = self.started(first, count, pixels)
        start = first * (depth * step)

        def products(offset: Any, index: Any) -> None:
            at = start + index * count * step
            weights = [
                unpacked(ir.bind(load(self.buffers["weights"], at + v * step, step)), step) for v in range(count)
            ]
            for v in range(count if self.fetches(count) else 0):
                fetch(self.buffers["weights"], at + (depth * count + v) * step)
            for half in (0, 1):
                for p, (i, j) in enumerate(pixels):
                    seen = offset + i * shape.row_step + j * shape.column_step + half * FOUR
                    four = ir.reinterpret("int32", load(self.buffers["input"], seen, FOUR))
                    codes = ir.bind(ir.reinterpret(f"uint8x{step}", ir.broadcast(four, lanes)))
                    for v in range(count):
                        place = ir.ramp((p * count + v) * lanes, 1, lanes)
                        ir.buffer_store(sums, self.processor.dot(sums[place], codes, weights[v][half], False), [place])

        source = origin[0] * shape.row_step + origin[1] * shape.column_step
        nested([*shape.taps, (-(-shape.quads // 2), 2 * FOUR)], source, products)
        return sums
