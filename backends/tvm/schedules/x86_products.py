"""Products of two activations: the second one is packed as weights are, when it is known."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from qcompile.backends.tvm.emit import Function
from qcompile.backends.tvm.native import builder, function
from qcompile.backends.tvm.schedules.vectors import FOUR, Processor, all_lanes, blocks, load, places
from qcompile.backends.tvm.schedules.x86 import OFFSET
from qcompile.backends.tvm.schedules.x86_linear import Linear, Tile, order, widths


@dataclass(frozen=True)
class Packed:
    """How a matrix of codes is packed for a kernel of `x86_linear`.

    Parameters
    ----------
    shape : Linear
    tile : Tile
    deep, wide : int
        Bytes from one code to the next down the sums, and from one output to the next.
    zero_point : int
        Of the other matrix, as it is stored.
    numbers : tuple of int
        Multiplier and shift of all outputs, or a scale's bits and 0.
    """

    shape: Linear
    tile: Tile
    deep: int
    wide: int
    zero_point: int
    numbers: tuple[int, int]

    def vectors(self, processor: Processor) -> int:
        """Return how many registers outputs take."""
        return -(-self.shape.outputs // processor.lanes)

    def weight_bytes(self, processor: Processor) -> int:
        """Return the bytes of the packed matrix."""
        return self.vectors(processor) * processor.lanes * FOUR * self.shape.quads

    def nbytes(self, processor: Processor) -> int:
        """Return the bytes of matrix and table."""
        return self.weight_bytes(processor) + 3 * 4 * self.vectors(processor) * processor.lanes


def tables(packed: Packed, processor: Processor) -> npt.NDArray[np.int32]:
    """Return by lane of all vectors: the output, -1 where there is none; its place; and steps from four to four."""
    lanes, count = processor.lanes, packed.vectors(processor)
    channels = order(packed.shape, packed.tile, processor)
    place, step, first = [], [], 0
    for width in widths(count, packed.tile.vectors):
        base = first * lanes * FOUR * packed.shape.quads
        for lane in range(width * lanes):
            place.append(base + lane * FOUR)
            step.append(width * lanes * FOUR)
        first += width
    there = np.where(channels < packed.shape.outputs, channels, -1)
    return np.stack([there, np.array(place), np.array(step)]).astype(np.int32)


def pack_kernel(name: str, packed: Packed, processor: Processor) -> Function:
    """Return what packs a matrix, with its table. Arguments: input, tables, weights, channels."""
    lanes, shape = processor.lanes, packed.shape
    total = packed.vectors(processor) * lanes
    flip = 0x80808080 - (1 << 32)

    def body(buffers: Any) -> None:
        ir = builder()
        source, given, target = buffers["input"], buffers["tables"], buffers["weights"]

        def one(n: Any, q: Any, count: int) -> None:
            """Pack four codes of one output, of which `count` are there."""
            at = given[n] * packed.wide + q * (FOUR * packed.deep)
            if packed.deep == 1 and count == FOUR:
                four = ir.reinterpret("int32", load(source, at, FOUR)) ^ ir.int32(flip)
            else:
                four = ir.int32(0)
                for k in range(count):
                    code = ir.cast(source[at + k * packed.deep] ^ ir.uint8(OFFSET), "int32")
                    four = four | (code << ir.int32(8 * k))
            there = ir.Select(given[n] < ir.int32(0), ir.int32(0), four)
            start = given[total + n] + q * given[2 * total + n]
            ir.buffer_store(target, ir.reinterpret(f"int8x{FOUR}", there), [places(start, FOUR)])

        full, rest = divmod(shape.length, FOUR)
        if full:
            with ir.grid(full, total) as (q, n):
                one(n, q, FOUR)
        if rest:
            with ir.serial(0, total) as n:
                one(n, full, rest)
        first = 0
        for width in widths(packed.vectors(processor), packed.tile.vectors):
            _sums(buffers, packed, processor, first, width)
            first += width
        for row, number in enumerate(packed.numbers, start=1):
            with ir.serial(0, total // lanes) as v:
                ir.buffer_store(buffers["channels"], all_lanes(number, "int32", lanes),
                                [places(row * total + v * lanes, lanes)])  # fmt: skip

    return function(name, {"input": "uint8", "tables": "int32", "weights": "int8", "channels": "int32"}, body)


def _sums(buffers: Any, packed: Packed, processor: Processor, first: int, width: int) -> None:
    """Emit the biases of one block: less its sums times the other matrix's zero point."""
    ir, lanes, quads = builder(), processor.lanes, packed.shape.quads
    base, line = first * lanes * FOUR * quads, lanes * FOUR
    ones = all_lanes(1, "uint8", line)
    sums = ir.alloc_buffer((lanes,), "int32", scope="local")

    def vector(v: Any, _: int) -> None:
        ir.buffer_store(sums, all_lanes(0, "int32", lanes), [places(0, lanes)])
        with ir.serial(0, quads) as q:
            four = load(buffers["weights"], base + (q * width + v) * line, line)
            ir.buffer_store(sums, processor.dot(load(sums, 0, lanes), ones, four, False), [places(0, lanes)])
        bias = load(sums, 0, lanes) * all_lanes(-packed.zero_point, "int32", lanes)
        ir.buffer_store(buffers["channels"], bias, [places((first + v) * lanes, lanes)])

    blocks(width, 1, vector)
