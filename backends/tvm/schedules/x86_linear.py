"""Sums of products: dense layers and convolutions, in tiles of registers, without gathering patches.

A window's row of codes lies in one piece where columns are not dilated: a convolution of 3x3 over C channels is three
sums over 3·C neighbours. Padding is in the map, as it is stored.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from qcompile.backends.tvm.emit import Function
from qcompile.backends.tvm.native import builder, function
from qcompile.backends.tvm.schedules.x86 import (
    FOUR,
    Processor,
    Rounding,
    blocks,
    load,
    nested,
    requantize,
    store,
)


@dataclass(frozen=True)
class Linear:
    """The shape of a kernel. Steps are bytes.

    Parameters
    ----------
    rows, columns, outputs : int
        Of the output.
    taps : tuple of (int, int)
        How many pieces of a window there are, and from one to the next: an outer and an inner loop.
    length : int
        Codes of a piece; what is beyond them up to a multiple of four is multiplied by zero.
    row_step, column_step : int
        From what one output row, or column, sees to what the next one does.
    output_row, output_column : int
        From one output row, or column, to the next.
    rounding : Rounding
    """

    rows: int
    columns: int
    outputs: int
    taps: tuple[tuple[int, int], ...]
    length: int
    row_step: int
    column_step: int
    output_row: int
    output_column: int
    rounding: Rounding

    @property
    def quads(self) -> int:
        """Groups of four codes in a piece."""
        return -(-self.length // FOUR)

    @property
    def depth(self) -> int:
        """Groups of four codes in a sum."""
        return self.quads * int(np.prod([extent for extent, _ in self.taps], dtype=np.int64))


@dataclass(frozen=True)
class Tile:
    """Sums that are held in registers at once.

    Parameters
    ----------
    rows, columns : int
        Of the output.
    vectors : int
        Registers of channels.
    """

    rows: int
    columns: int
    vectors: int


def choose_tile(shape: Linear, processor: Processor) -> Tile:
    """Return the tile that is expected to take fewest cycles."""
    vectors = -(-shape.outputs // processor.lanes)
    room = processor.registers - 1
    tiles = [
        Tile(rows, columns, count)
        for count in range(1, min(vectors, 4) + 1)
        for columns in range(1, min(shape.columns, room) + 1)
        for rows in range(1, min(shape.rows, room) + 1)
        if (rows == 1 or columns == shape.columns) and rows * columns * count + count + 1 <= room
    ]
    return min(tiles, key=lambda tile: (_cycles(shape, tile, vectors), tile.vectors, tile.columns))


#: Cycles until a sum can be added to again, and what one vector of codes takes behind its sum.
LATENCY, EPILOGUE = 5, 8


def _cycles(shape: Linear, tile: Tile, vectors: int) -> float:
    def parts(count: int, step: int) -> list[tuple[int, int]]:
        whole, rest = divmod(count, step)
        return [(whole, step)] * bool(whole) + [(1, rest)] * bool(rest)

    total = 0.0
    for (i, rows), (j, columns), (k, count) in (
        (row, column, block)
        for row in parts(shape.rows, tile.rows)
        for column in parts(shape.columns, tile.columns)
        for block in parts(vectors, tile.vectors)
    ):
        sums = rows * columns * count
        each = max(sums / 2, (rows * columns + count) / 2, LATENCY)
        total += i * j * k * (shape.depth * each + EPILOGUE * sums + 10)
    return total


def pack(shape: Linear, tile: Tile, processor: Processor, weights: npt.NDArray[np.int8]) -> npt.NDArray[np.int8]:
    """Return weights in the order in which they are read: [block][tap][four codes][vector][lane][code].

    Parameters
    ----------
    weights : ndarray of int8, shape (outputs, taps, length)
    """
    lanes = processor.lanes
    vectors = -(-shape.outputs // lanes)
    room = [(0, vectors * lanes - shape.outputs), (0, 0), (0, shape.quads * FOUR - shape.length)]
    wide = np.pad(weights, room).reshape(vectors, lanes, weights.shape[1], shape.quads, FOUR)
    parts = [wide[at : at + tile.vectors] for at in range(0, vectors, tile.vectors)]
    return np.concatenate([part.transpose(2, 3, 0, 1, 4).reshape(-1) for part in parts])


def scaling_table(
    processor: Processor, outputs: int, bias: npt.NDArray[Any], multiplier: npt.NDArray[Any], shift: npt.NDArray[Any]
) -> npt.NDArray[np.int32]:
    """Return numbers per channel as kernels read them, shape (6, vectors · lanes).

    Rows are: biases; multipliers of each vector's even lanes, then its odd ones; shifts, alike; shifts - 32, or 0.
    """
    lanes = processor.lanes
    width = -(-outputs // lanes) * lanes
    columns = [np.resize(np.broadcast_to(array, (outputs,)), outputs).astype(np.int64) for array in (multiplier, shift)]
    rows = [np.pad(bias.astype(np.int64), (0, width - outputs))]
    for column in columns:
        wide = np.pad(column, (0, width - outputs), mode="edge").reshape(-1, lanes // 2, 2)
        rows.append(wide.transpose(0, 2, 1).reshape(-1))
    rows.append(np.pad(np.maximum(columns[1] - 32, 0), (0, width - outputs), mode="edge"))
    return np.stack(rows).astype(np.int32)


class Scaling:
    """Reads a table of `scaling_table`."""

    def __init__(self, processor: Processor, channels: Any, outputs: int) -> None:
        self.lanes, self.channels = processor.lanes, channels
        self.width = -(-outputs // processor.lanes) * processor.lanes

    def bias(self, vector: Any) -> Any:
        """Return a vector's biases."""
        return load(self.channels, vector * self.lanes, self.lanes)

    def of(self, vector: Any) -> Any:
        """Return what `x86.requantize` reads a vector's multipliers and shifts with."""
        half = self.lanes // 2

        def read(kind: str, odd: int | None) -> Any:
            row = {"multiplier": 1, "shift": 2, "places": 3}[kind]
            start = row * self.width + vector * self.lanes
            return load(
                self.channels, start if odd is None else start + odd * half, half if odd is not None else 2 * half
            )

        return read


def linear_kernel(name: str, shape: Linear, tile: Tile, processor: Processor) -> Function:
    """Return the function. Arguments: input, weights, channels, output."""

    def body(buffers: Any) -> None:
        emitter = _Emitter(shape, tile, processor, buffers)
        vectors = -(-shape.outputs // processor.lanes)
        # A block with lanes that no channel has stands for itself: what it stores is less.
        full = vectors if shape.outputs % processor.lanes == 0 else (vectors - 1) // tile.vectors * tile.vectors
        blocks(full, tile.vectors, emitter.block)
        if full < vectors:
            emitter.block(full, vectors - full)

    return function(name, {"input": "uint8", "weights": "int8", "channels": "int32", "output": "uint8"}, body)


class _Emitter:
    """Builds the loops of one kernel."""

    def __init__(self, shape: Linear, tile: Tile, processor: Processor, buffers: Any) -> None:
        self.shape, self.tile, self.processor, self.buffers = shape, tile, processor, buffers
        self.scaling = Scaling(processor, buffers["channels"], shape.outputs)

    def block(self, first: Any, count: int) -> None:
        """Emit a block of channels: all rows and columns."""

        def row(y: Any, rows: int) -> None:
            blocks(
                self.shape.columns,
                self.tile.columns,
                lambda x, columns: self.accumulate(first, count, (y, rows), (x, columns)),
            )

        blocks(self.shape.rows, self.tile.rows, row)

    def accumulate(self, first: Any, count: int, rows: tuple[Any, int], columns: tuple[Any, int]) -> None:
        """Emit one tile."""
        ir = builder()
        shape, lanes, step = self.shape, self.processor.lanes, self.processor.lanes * FOUR
        pixels = [(i, j) for i in range(rows[1]) for j in range(columns[1])]
        sums = ir.alloc_buffer((len(pixels) * count * lanes,), "int32", scope="local")
        for p in range(len(pixels)):
            for v in range(count):
                ir.buffer_store(sums, self.scaling.bias(first + v), [ir.ramp((p * count + v) * lanes, 1, lanes)])
        source = rows[0] * shape.row_step + columns[0] * shape.column_step
        start = first * (shape.depth * step)

        def products(offset: Any, index: Any) -> None:
            weights = [
                ir.bind(load(self.buffers["weights"], start + (index * count + v) * step, step)) for v in range(count)
            ]
            for p, (i, j) in enumerate(pixels):
                at = offset + i * shape.row_step + j * shape.column_step
                four = ir.reinterpret("int32", load(self.buffers["input"], at, FOUR))
                codes = ir.bind(ir.reinterpret(f"uint8x{step}", ir.broadcast(four, lanes)))
                for v in range(count):
                    place = ir.ramp((p * count + v) * lanes, 1, lanes)
                    ir.buffer_store(sums, self.processor.dot(sums[place], codes, weights[v]), [place])

        nested([*shape.taps, (shape.quads, FOUR)], source, products)
        self.finish(sums, first, count, [(rows[0] + i, columns[0] + j) for i, j in pixels])

    def finish(self, sums: Any, first: Any, count: int, pixels: list[tuple[Any, Any]]) -> None:
        """Emit what is behind the sums."""
        shape, lanes = self.shape, self.processor.lanes
        for v in range(count):
            left = shape.outputs - (first + v) * lanes if isinstance(first, int) else lanes
            for p, (y, x) in enumerate(pixels):
                codes = requantize(
                    self.processor,
                    load(sums, (p * count + v) * lanes, lanes),
                    self.scaling.of(first + v),
                    shape.rounding,
                )
                at = y * shape.output_row + x * shape.output_column + (first + v) * lanes
                store(self.buffers["output"], at, codes, lanes, left)
