"""Products of two activations: the second one is packed as weights are, when it is known, and multiplied at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qcompile.backends.tvm.emit import Function
from qcompile.backends.tvm.native import EXTENT, builder, function
from qcompile.backends.tvm.schedules.linear import Linear, Tile, widths
from qcompile.backends.tvm.schedules.vectors import (
    FOUR,
    SPAN,
    Processor,
    all_lanes,
    blocks,
    load,
    places,
    span_of,
)

#: Codes of one row that are turned at once, groups of four by groups of four.
PIECE = 16


@dataclass(frozen=True)
class Packed:
    """How a matrix of codes is packed for a kernel of `linear`.

    Parameters
    ----------
    shape : Linear
        As the kernel has it: what its sums have beyond `length` is multiplied by zero.
    tile : Tile
    length : int
        Codes that a sum has.
    deep, wide : int
        Bytes from one code to the next down the sums, and from one output to the next: one of them is 1.
    zero_point : int
        Of the other matrix, as it is stored.
    numbers : tuple of int
        Multiplier and shift of all outputs, or a scale's bits and 0.
    """

    shape: Linear
    tile: Tile
    length: int
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


@dataclass(frozen=True)
class Batch:
    """Products of the same shape.

    Parameters
    ----------
    extents : tuple of int
    steps : tuple of tuple of int
        Along each axis: elements of the first matrix, of the second one, and of the output.
    room : int
        Bytes that one second matrix is packed into.
    shared : bool
        Whether threads share them.
    """

    extents: tuple[int, ...]
    steps: tuple[tuple[int, int, int], ...]
    room: int
    shared: bool = False

    @property
    def count(self) -> int:
        """How many there are."""
        return math.prod(self.extents)

    def starts(self, index: Any) -> list[Any]:
        """Return where one of them begins in each matrix."""
        ir, found, inner = builder(), [0, 0, 0], self.count
        for extent, steps in zip(self.extents, self.steps, strict=True):
            inner //= extent
            at = ir.truncmod(ir.truncdiv(index, inner), extent)
            found = [start + at * step for start, step in zip(found, steps, strict=True)]
        return found


def product_kernel(
    name: str, packed: Packed, batch: Batch, processor: Processor, multiply: Callable[..., None]
) -> Function:
    """Return the function. Arguments: both matrices, room to pack into, output.

    Parameters
    ----------
    multiply : callable
        Emits a dense layer for a shape, tile, processor and buffers: `linear.emit` or one like it.
    """
    codes = processor.codes
    made = codes if packed.shape.reals is None else "float32"

    def body(buffers: Any) -> None:
        ir, span = builder(), span_of(buffers, batch.shared)
        # Each thread packs where its first product does, which is no other one's.
        room = ir.bind(span[0] * batch.room) if span else 0
        table = room + packed.weight_bytes(processor)
        with ir.serial(*(span or (0, batch.count))) as index:
            first, second, output = batch.starts(index)
            given = {
                "input": from_place(buffers["a"], first, codes),
                "second": from_place(buffers["b"], second, codes),
                "weights": from_place(buffers["room"], room, "int8"),
                "channels": from_place(buffers["room"], table, "int32"),
                "output": from_place(buffers["output"], output, made),
            }
            _Packing(packed, processor, given).all()
            multiply(packed.shape, packed.tile, processor, given)

    given = {"a": codes, "b": codes, "room": "int8", "output": made}
    return function(name, given, body, SPAN if batch.shared else ())


def from_place(buffer: Any, at: Any, dtype: str) -> Any:
    """Return what begins at one element of a buffer."""
    ir = builder()
    return ir.decl_buffer((EXTENT,), dtype, data=ir.bind(ir.address_of(buffer[at])))


class _Packing:
    """Emits what packs a matrix, with its table."""

    def __init__(self, packed: Packed, processor: Processor, buffers: Mapping[str, Any]) -> None:
        self.packed, self.processor, self.buffers = packed, processor, buffers
        self.lanes, self.line = processor.lanes, processor.lanes * FOUR

    def all(self) -> None:
        """Emit everything."""
        packed, outputs, lanes = self.packed, self.packed.shape.outputs, self.lanes
        counts = widths(packed.vectors(self.processor), packed.tile.vectors)
        # A block with lanes that no channel has stands for itself.
        alike = counts.count(packed.tile.vectors) - (len(set(counts)) == 1 and outputs % lanes > 0)
        step = packed.tile.vectors
        blocks(alike * step, step, lambda first, count: self.block(first, count, count * lanes))
        for index, count in list(enumerate(counts))[alike:]:
            first = sum(counts[:index])
            self.block(first, count, min(outputs - first * lanes, count * lanes))
        self.numbers()

    def numbers(self) -> None:
        """Emit multipliers and shifts, the same of all outputs."""
        total = self.packed.vectors(self.processor) * self.lanes
        for row, number in enumerate(self.packed.numbers, start=1):
            value = all_lanes(number, "int32", self.lanes)
            with builder().serial(0, total // self.lanes) as vector:
                self.keep("channels", row * total + vector * self.lanes, value)

    def keep(self, name: str, at: Any, value: Any) -> None:
        """Emit a store of a vector."""
        size = self.line if name == "weights" else self.lanes
        builder().buffer_store(self.buffers[name], value, [places(at, size)])

    def block(self, first: Any, count: int, left: int) -> None:
        """Emit a block of channels, of which `left` are there."""
        start = first * (self.line * self.packed.shape.quads)
        source = first * self.lanes * self.packed.wide
        (self.turned if self.packed.deep == 1 else self.beside)(source, start, count, left)
        for q in range(-(-self.packed.length // FOUR), self.packed.shape.quads):
            for v in range(count):
                self.keep("weights", start + (q * count + v) * self.line, all_lanes(0, "int8", self.line))
        self.sums(first, start, count)

    def channels(self, vector: int, count: int) -> list[int]:
        """Return the channels of a block that one of its vectors has; see `linear.order`."""
        if self.packed.shape.reals is not None:
            return [vector * self.lanes + lane for lane in range(self.lanes)]
        return [lane // FOUR * (FOUR * count) + FOUR * vector + lane % FOUR for lane in range(self.lanes)]

    def turned(self, source: Any, start: Any, count: int, left: int) -> None:
        """Emit a block whose sums go along what lies side by side: four groups of each output become lanes."""
        full, rest = divmod(self.packed.length, PIECE)

        def piece(index: Any, codes: int) -> None:
            at = start + index * (FOUR * count * self.line)
            for v in range(count):
                # One output's codes below those of its neighbours in fours, for each four of the vector.
                rows = self.channels(v, count)
                four = [self.read(source + index * PIECE, rows[lane::FOUR], left) for lane in range(FOUR)]
                for group, lanes in enumerate(self.turn(four)[: -(-codes // FOUR)]):
                    self.keep("weights", at + (group * count + v) * self.line, self.signed(lanes, codes - FOUR * group))

        blocks(full, 1, lambda index, _: piece(index, PIECE))
        if rest:
            piece(full, rest)

    def read(self, source: Any, channels: Sequence[int], left: int) -> Any:
        """Return sixteen codes of each of some channels; for what is not there the last one stands."""
        ir = builder()
        parts = [load(self.buffers["second"], source + min(channel, left - 1) * self.packed.wide, PIECE)
                 for channel in channels]  # fmt: skip
        whole = parts[0] if len(parts) == 1 else ir.Shuffle(parts, list(range(PIECE * len(parts))))
        return ir.bind(ir.reinterpret(f"int32x{self.lanes}", whole))

    def turn(self, four: Sequence[Any]) -> list[Any]:
        """Return four vectors in which lane 4 i + j of the k-th is lane 4 i + k of the j-th that are given."""
        ir, lanes = builder(), self.lanes

        def pick(a: Any, b: Any, order: Sequence[int]) -> Any:
            index = [base + (place % FOUR) + (lanes if place >= FOUR else 0)
                     for base in range(0, lanes, FOUR) for place in order]  # fmt: skip
            return ir.bind(ir.Shuffle([a, b], index))

        low, high = [0, 4, 1, 5], [2, 6, 3, 7]
        halves = [(pick(four[0], four[1], order), pick(four[2], four[3], order)) for order in (low, high)]
        return [pick(*half, order) for half in halves for order in ([0, 1, 4, 5], [2, 3, 6, 7])]

    def signed(self, stored: Any, codes: int = FOUR) -> Any:
        """Return groups of four codes as weights have them; the last of a group may be none."""
        ir = builder()
        flip = 0x80808080 - (1 << 32) if self.processor.offset else 0
        value = ir.reinterpret(f"int32x{self.lanes}", stored)
        value = value ^ all_lanes(flip, "int32", self.lanes) if flip else value
        if codes < FOUR:
            value = value & all_lanes((1 << 8 * codes) - 1, "int32", self.lanes)
        return ir.reinterpret(f"int8x{self.line}", value)

    def beside(self, source: Any, start: Any, count: int, left: int) -> None:
        """Emit a block whose outputs lie side by side: four rows are put together code by code."""
        del left  # what is read behind the last output is nobody's
        ir, size = builder(), count * self.lanes
        full, rest = divmod(self.packed.length, FOUR)

        def group(index: Any, codes: int) -> None:
            at = source + index * (FOUR * self.packed.deep)
            rows = [ir.bind(load(self.buffers["second"], at + min(row, codes - 1) * self.packed.deep, size))
                    for row in range(FOUR)]  # fmt: skip
            for v in range(count):
                order = [row * size + channel for channel in self.channels(v, count) for row in range(FOUR)]
                made = self.signed(ir.Shuffle(rows, order), codes)
                self.keep("weights", start + (index * count + v) * self.line, made)

        blocks(full, 1, lambda index, _: group(index, FOUR))
        if rest:
            group(full, rest)

    def sums(self, first: Any, start: Any, count: int) -> None:
        """Emit the biases of a block: less its sums times the other matrix's zero point."""
        ir, lanes, line, quads = builder(), self.lanes, self.line, self.packed.shape.quads
        if self.packed.zero_point == 0:
            for v in range(count):
                self.keep("channels", (first + v) * lanes, all_lanes(0, "int32", lanes))
            return
        ones = all_lanes(1, self.processor.codes, line)
        sums = ir.alloc_buffer((count * lanes,), "int32", scope="local")
        for v in range(count):
            ir.buffer_store(sums, all_lanes(0, "int32", lanes), [places(v * lanes, lanes)])
        with ir.serial(0, quads) as q:
            for v in range(count):
                four = load(self.buffers["weights"], start + (q * count + v) * line, line)
                made = self.processor.dot(load(sums, v * lanes, lanes), ones, four, False)
                ir.buffer_store(sums, made, [places(v * lanes, lanes)])
        for v in range(count):
            bias = load(sums, v * lanes, lanes) * all_lanes(-self.packed.zero_point, "int32", lanes)
            self.keep("channels", (first + v) * lanes, bias)


def numbers(processor: Processor, multiplier: int, shift: int, high_word: bool) -> tuple[int, int]:
    """Return a multiplier and a shift as tables have them."""
    lanes = processor.lanes
    same = np.full(lanes, multiplier, np.int64), np.full(lanes, shift, np.int64)
    rows = processor.scaling_rows(*same, high_word)
    return int(rows[0][0]), int(rows[1][0])
