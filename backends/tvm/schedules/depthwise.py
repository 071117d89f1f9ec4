"""Depthwise convolutions by dot products: four taps of a column are interleaved, channel by channel.

Rows of a window's column are four bytes of each channel then, as a dot product multiplies them. Neighbouring windows
share their columns, so that a column is interleaved once for all of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from qcompile.backends.tvm.emit import Function
from qcompile.backends.tvm.native import builder, function
from qcompile.backends.tvm.schedules.linear import Scaling, arguments, scaling_table
from qcompile.backends.tvm.schedules.vectors import (
    FOUR,
    OUTPUTS,
    ROWS,
    SPAN,
    Processor,
    all_lanes,
    blocks,
    load,
    span_of,
    store,
    within,
)
from qcompile.backends.tvm.schedules.windows import Windows

#: Registers for each output whose sums, four vectors, are held at once; half of them hold what is interleaved.
EACH = 8
#: Channels that lie together in a vector's 128 bits once four taps are interleaved.
LANE = 16


def parts(channels: int, lanes: int) -> Iterator[tuple[int, int, int]]:
    """Yield the first channel, how many there are, and the lanes of vectors for them: what is left is done by less."""
    wide = FOUR * lanes
    whole = channels // wide * wide
    if whole:
        yield 0, whole, lanes
    if left := channels - whole:
        yield whole, left, next(narrow for narrow in (4, 8, 16) if left <= FOUR * narrow)


def order(channels: int, lanes: int) -> npt.NDArray[np.intp]:
    """Return which channel each lane of each vector has, shape (blocks, 4, lanes)."""
    width = FOUR * lanes
    block = (np.arange(lanes) // FOUR * LANE + np.arange(lanes) % FOUR) + FOUR * np.arange(FOUR)[:, None]
    return np.arange(0, channels, width)[:, None, None] + block


def pack(
    shape: Windows, processor: Processor, weights: npt.NDArray[np.int8], numbers: tuple[npt.NDArray[Any], ...]
) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.int32]]:
    """Return weights and the table of biases, multipliers and shifts in the order in which they are read.

    Parameters
    ----------
    shape : Windows
    processor : Processor
    weights : ndarray of int8, shape (channels, rows, columns)
    numbers : tuple of ndarray, shape (channels,)
        Biases, multipliers and shifts.

    Returns
    -------
    ndarray of int8, shape (blocks, columns, rows / 4, 4, lanes, 4)
    ndarray of int32
    """
    places = order(shape.channels, processor.lanes)
    room, (_, rows, _) = places.size - shape.channels, weights.shape
    wide = np.pad(weights, [(0, room), (0, -rows % FOUR), (0, 0)])[places]
    split = wide.reshape(*places.shape, -1, FOUR, weights.shape[2]).transpose(0, 5, 3, 1, 2, 4)
    permuted = tuple(np.pad(array, (0, room), mode="edge")[places].reshape(-1) for array in numbers)
    return np.ascontiguousarray(split), scaling_table(processor, permuted, shape.rounding)


def interleaved(rows: list[Any], lanes: int) -> list[Any]:
    """Return four vectors of which each lane has one channel's codes of four rows."""

    def unpacked(one: Any, other: Any, unit: int, upper: bool) -> Any:
        half = LANE // unit // 2
        picked = [
            lane * LANE // unit + i + (half if upper else 0) for lane in range(lanes // FOUR) for i in range(half)
        ]
        width = FOUR * lanes
        places = [
            at
            for i in picked
            for at in (*range(i * unit, (i + 1) * unit), *range(width + i * unit, width + (i + 1) * unit))
        ]
        return builder().bind(builder().Shuffle([one, other], places))

    pairs = [[unpacked(rows[at], rows[at + 1], 1, upper) for at in (0, 2)] for upper in (False, True)]
    return [unpacked(pair[0], pair[1], 2, upper) for pair in pairs for upper in (False, True)]


def depthwise_kernel(name: str, shape: Windows, processor: Processor) -> Function:
    """Return a depthwise convolution. Arguments: input, weights, channels, table where codes are looked up, output."""
    width = FOUR * processor.lanes

    def body(buffers: Any) -> None:
        rows, outputs = (span_of(buffers, shape.shared == loop) for loop in (ROWS, OUTPUTS))

        def block(v: Any, left: int) -> None:
            emitter = _Emitter(shape, processor, buffers, v, left)
            held = processor.registers // EACH
            blocks(shape.rows, 1, lambda y, _: blocks(shape.columns, held, partial(emitter.columns, y)), rows)

        full, left = divmod(shape.channels, width)
        blocks(full, 1, lambda v, _: block(v, width), outputs)
        if left:
            within(outputs, full, lambda: block(full, left))

    return function(name, arguments(shape.looked_up, processor), body, SPAN if shape.shared else ())


class _Emitter:
    """Builds one block of channels."""

    def __init__(self, shape: Windows, processor: Processor, buffers: Any, block: Any, left: int) -> None:
        self.shape, self.processor, self.buffers, self.block, self.left = shape, processor, buffers, block, left
        self.width = FOUR * processor.lanes
        self.scaling = Scaling(processor, buffers["channels"], -(-shape.channels // self.width) * self.width)

    def columns(self, y: Any, x: Any, count: int) -> None:
        """Emit so many neighbouring outputs."""
        shape = self.shape
        (rows, _), (wide, column) = shape.taps
        sums = [[self.scaling.bias(self.block * FOUR + j) for j in range(FOUR)] for _ in range(count)]
        readers: dict[int, list[tuple[int, int]]] = {}
        for output in range(count):
            for tap in range(wide):
                readers.setdefault(output * shape.column_step + tap * column, []).append((output, tap))
        start = y * shape.row_step + x * shape.column_step + self.block * self.width
        for offset in sorted(readers):
            for group in range(-(-rows // FOUR)):
                self.accumulate(sums, start + offset, group, readers[offset])
        for output in range(count):
            codes = [self.processor.scaled(sums[output][j], self.scaling.of(self.block * FOUR + j), shape.rounding)
                     for j in range(FOUR)]  # fmt: skip
            whole = self.processor.joined(codes, shape.rounding.low, shape.rounding.high)
            if shape.looked_up:
                whole = builder().bind(
                    self.processor.looked_up(builder().bind(whole), self.width, self.buffers["table"])
                )
            at = y * shape.output_row + (x + output) * shape.output_column + self.block * self.width
            store(self.buffers["output"], at, whole, self.width, self.left)

    def accumulate(self, sums: list[list[Any]], at: Any, group: int, readers: list[tuple[int, int]]) -> None:
        """Emit the products of four rows of a column, for all outputs that see it."""
        ir, lanes = builder(), self.processor.lanes
        (rows, row), (wide, _) = self.shape.taps
        nothing = all_lanes(0, self.processor.codes, self.width)
        seen = [load(self.buffers["input"], at + i * row, self.width) if i < rows else nothing
                for i in range(group * FOUR, (group + 1) * FOUR)]  # fmt: skip
        codes = interleaved([ir.bind(each) for each in seen], lanes)
        groups = -(-rows // FOUR)
        for output, tap in readers:
            for j in range(FOUR):
                place = (((self.block * wide + tap) * groups + group) * FOUR + j) * self.width
                weights = load(self.buffers["weights"], place, self.width)
                made = self.processor.dot(sums[output][j], codes[j], weights, self.shape.saturates)
                sums[output][j] = ir.bind(made)
