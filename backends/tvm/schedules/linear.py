"""Sums of products: dense layers and convolutions, in tiles of registers, without gathering patches.

A window's row of codes lies in one piece where columns are not dilated: a convolution of 3x3 over C channels is three
sums over 3·C neighbours. Padding is in the map, as it is stored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from qcompile.backends.tvm.emit import Function
from qcompile.backends.tvm.native import builder, function
from qcompile.backends.tvm.schedules.vectors import (
    COLUMNS,
    FOUR,
    OUTPUTS,
    ROWS,
    SPAN,
    Processor,
    Rounding,
    Span,
    blocks,
    fetch,
    load,
    nested,
    span_of,
    store,
    within,
)
from qcompile.backends.tvm.schedules.x86_epilogues import Bounds, store_pixels


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
    looked_up : bool
        Whether codes go through a table at the end.
    saturates : bool
        See `Processor.saturates`.
    nibbles : bool
        Whether weights are stored in four bits; see `x86_nibbles.py`.
    shared : str
        The loop that threads share: `vectors.ROWS`, `vectors.COLUMNS`, `vectors.OUTPUTS`, or none.
    reals : tuple of float, optional
        Bounds of the floats that sums become in place of codes; then steps of the output are floats.
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
    looked_up: bool = False
    saturates: bool = False
    nibbles: bool = False
    shared: str = ""
    reals: Bounds | None = None

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


#: Outputs of a channel, and bytes of a block's weights, at which the next block's are fetched ahead.
FEW, MANY = 256, 4096


def widths(vectors: int, step: int) -> list[int]:
    """Return how many vectors each block of channels has: `step`, then what is left in powers of two."""
    whole, rest = divmod(vectors, step)
    return [step] * whole + [count for count in (2, 1) if rest & count]


def order(shape: Linear, tile: Tile, processor: Processor) -> npt.NDArray[np.intp]:
    """Return which channel each lane of each vector has, so that `Processor.joined` puts them in a row.

    Four neighbours of each vector of a block stand behind one another, then the next four. Floats need none of that.
    """
    lanes, found, first = processor.lanes, [], 0
    if shape.reals is not None:
        return np.arange(-(-shape.outputs // lanes) * lanes)
    for count in widths(-(-shape.outputs // lanes), tile.vectors):
        lane, vector = np.arange(lanes), np.arange(count)[:, None]
        found.append((first + lane // FOUR * (FOUR * count) + FOUR * vector + lane % FOUR).reshape(-1))
        first += count * lanes
    return np.concatenate(found)


def pack(
    shape: Linear,
    tile: Tile,
    processor: Processor,
    weights: npt.NDArray[np.int8],
    numbers: tuple[npt.NDArray[Any], ...],
) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.int32]]:
    """Return weights, and the table of biases, multipliers and shifts, in the order in which they are read.

    Parameters
    ----------
    weights : ndarray of int8, shape (outputs, taps, length or less)
        What is not there is zero.
    numbers : tuple of ndarray, shape (outputs,)
        Biases, multipliers and shifts; where floats come out, biases and scales as the bits of int32.

    Returns
    -------
    ndarray of int8
        [block][tap][four codes][vector][lane][code].
    ndarray of int32
    """
    lanes, places = processor.lanes, order(shape, tile, processor)
    room = [(0, places.size - shape.outputs), (0, 0), (0, shape.quads * FOUR - weights.shape[2])]
    wide = np.pad(weights, room)[places].reshape(-1, lanes, weights.shape[1], shape.quads, FOUR)
    parts, first = [], 0
    for count in widths(len(wide), tile.vectors):
        parts.append(wide[first : first + count].transpose(2, 3, 0, 1, 4).reshape(-1))
        first += count
    permuted = tuple(np.pad(array, room[0], mode="edge")[places] for array in numbers)
    if shape.reals is not None:
        return np.concatenate(parts), np.stack([array.astype(np.int32) for array in permuted])
    return np.concatenate(parts), scaling_table(processor, permuted, shape.rounding)


def scaling_table(
    processor: Processor, numbers: tuple[npt.NDArray[Any], ...], rounding: Rounding
) -> npt.NDArray[np.int32]:
    """Return numbers per lane as kernels read them, shape (3, lanes of all vectors).

    Rows are: biases; multipliers; shifts. These are ordered and counted as `Processor.scaling_rows` has it.

    Parameters
    ----------
    processor : Processor
    numbers : tuple of ndarray, shape (lanes of all vectors,)
        Biases, multipliers and shifts.
    rounding : Rounding
    """
    bias, multiplier, shift = (array.astype(np.int64) for array in numbers)
    return np.stack([bias, *processor.scaling_rows(multiplier, shift, rounding.high_word)]).astype(np.int32)


class Scaling:
    """Reads a table of `scaling_table`."""

    def __init__(self, processor: Processor, channels: Any, outputs: int) -> None:
        self.lanes, self.channels = processor.lanes, channels
        self.width = -(-outputs // processor.lanes) * processor.lanes

    def bias(self, vector: Any) -> Any:
        """Return a vector's biases."""
        return load(self.channels, vector * self.lanes, self.lanes)

    def of(self, vector: Any) -> Any:
        """Return what `Processor.scaled` reads a vector's multipliers and shifts with."""
        half = self.lanes // 2

        def read(kind: str, odd: int | None) -> Any:
            start = (1 if kind in ("multiplier", "scale") else 2) * self.width + vector * self.lanes
            return (
                load(self.channels, start, self.lanes) if odd is None else load(self.channels, start + odd * half, half)
            )

        return read


def linear_kernel(
    name: str, shape: Linear, tile: Tile, processor: Processor, kind: type[Emitter] | None = None
) -> Function:
    """Return the function. Arguments: input, weights, channels, table where codes are looked up, output."""

    def body(buffers: Any) -> None:
        emit(shape, tile, processor, buffers, kind)

    return function(
        name, arguments(shape.looked_up, processor, shape.reals is not None), body, SPAN if shape.shared else ()
    )


def emit(
    shape: Linear, tile: Tile, processor: Processor, buffers: Mapping[str, Any], kind: type[Emitter] | None = None
) -> None:
    """Emit a kernel's statements."""
    emitter, lanes = (kind or Emitter)(shape, tile, processor, buffers), processor.lanes
    counts = widths(-(-shape.outputs // lanes), tile.vectors)
    # A block with lanes that no channel has stands for itself: what it stores is less.
    alike = counts.count(tile.vectors) - (len(set(counts)) == 1 and shape.outputs % lanes > 0)
    whole, span = alike * tile.vectors, emitter.span(OUTPUTS)
    blocks(whole, tile.vectors, lambda first, count: emitter.block(first, count, count * lanes), span)
    for index, count in list(enumerate(counts))[alike:]:
        first = sum(counts[:index])
        left = min(shape.outputs - first * lanes, count * lanes)
        within(span, index, partial(emitter.block, first, count, left))


def arguments(looked_up: bool, processor: Processor, reals: bool = False) -> dict[str, str]:
    """Return what a kernel with weights takes, and of which type."""
    codes = processor.codes
    table = {"table": codes} if looked_up else {}
    return {"input": codes, "weights": "int8", "channels": "int32", **table, "output": "float32" if reals else codes}


class Emitter:
    """Builds the loops of one kernel."""

    def __init__(self, shape: Linear, tile: Tile, processor: Processor, buffers: Any) -> None:
        self.shape, self.tile, self.processor, self.buffers = shape, tile, processor, buffers
        self.scaling = Scaling(processor, buffers["channels"], shape.outputs)

    def block(self, first: Any, count: int, left: int) -> None:
        """Emit a block of channels, of which `left` are there: all rows and columns."""

        def row(y: Any, rows: int) -> None:
            def column(x: Any, columns: int) -> None:
                pixels = [(i, j) for i in range(rows) for j in range(columns)]
                sums = self.accumulate(first, count, (y, x), pixels)
                self.finish(sums, (first, count, left), (y, x), pixels)

            blocks(self.shape.columns, self.tile.columns, column, self.span(COLUMNS))

        blocks(self.shape.rows, self.tile.rows, row, self.span(ROWS))

    def span(self, loop: str) -> Span | None:
        """Return the iterations of a loop that are to be done, if threads share it."""
        return span_of(self.buffers, self.shape.shared == loop)

    def started(self, first: Any, count: int, pixels: list[tuple[int, int]]) -> Any:
        """Return where the sums of one tile are, which begin as biases."""
        ir, lanes = builder(), self.processor.lanes
        sums = ir.alloc_buffer((len(pixels) * count * lanes,), "int32", scope="local")
        for p in range(len(pixels)):
            for v in range(count):
                ir.buffer_store(sums, self.scaling.bias(first + v), [ir.ramp((p * count + v) * lanes, 1, lanes)])
        return sums

    def accumulate(self, first: Any, count: int, origin: tuple[Any, Any], pixels: list[tuple[int, int]]) -> Any:
        """Emit the sums of one tile and return where they are."""
        ir = builder()
        shape, lanes, step = self.shape, self.processor.lanes, self.processor.lanes * FOUR
        sums = self.started(first, count, pixels)
        source = origin[0] * shape.row_step + origin[1] * shape.column_step
        start = first * (shape.depth * step)

        def products(offset: Any, index: Any) -> None:
            weights = [
                ir.bind(load(self.buffers["weights"], start + (index * count + v) * step, step)) for v in range(count)
            ]
            for v in range(count if self.fetches(count) else 0):
                fetch(self.buffers["weights"], start + (shape.depth * count + index * count + v) * step)
            for p, (i, j) in enumerate(pixels):
                at = offset + i * shape.row_step + j * shape.column_step
                four = ir.reinterpret("int32", load(self.buffers["input"], at, FOUR))
                codes = ir.bind(ir.reinterpret(f"{self.processor.codes}x{step}", ir.broadcast(four, lanes)))
                for v in range(count):
                    place = ir.ramp((p * count + v) * lanes, 1, lanes)
                    ir.buffer_store(sums, self.processor.dot(sums[place], codes, weights[v], shape.saturates), [place])

        nested([*shape.taps, (shape.quads, FOUR)], source, products)
        return sums

    def fetches(self, count: int) -> bool:
        """Tell whether the next block's weights are fetched ahead: where there are many, and few outputs to wait.

        One output alone takes them as fast as they come anyway.
        """
        shape = self.shape
        return 1 < shape.rows * shape.columns <= FEW and shape.depth * count * self.processor.lanes * FOUR >= MANY

    def finish(
        self,
        sums: Any,
        block: tuple[Any, int, int],
        origin: tuple[Any, Any],
        pixels: list[tuple[int, int]],
        begin: Any = 0,
    ) -> None:
        """Emit what is behind the sums, which `begin` in their buffer: as many pixels at once as make four vectors."""
        shape, lanes = self.shape, self.processor.lanes
        first, count, left = block
        if shape.reals is not None:
            store_pixels(self, (sums, begin), block, origin, pixels)
            return
        together = FOUR // count
        for start in range(0, len(pixels), together):
            some = list(enumerate(pixels))[start : start + together]
            four = [
                self.processor.scaled(
                    load(sums, begin + (p * count + v) * lanes, lanes),
                    self.scaling.of(first + v),
                    shape.rounding,
                )
                for p, _ in some
                for v in range(count)
            ]
            four += four[-1:] * (FOUR - len(four))
            codes = self.in_order(self.processor.joined(four, shape.rounding.low, shape.rounding.high), count)
            if shape.looked_up:
                codes = builder().bind(self.processor.looked_up(codes, FOUR * lanes, self.buffers["table"]))
            whole = together > 1 and left == count * lanes == shape.output_column == shape.outputs
            parts = [(codes, FOUR * lanes, FOUR * lanes)]
            if not (whole and len(some) == together and len({i for _, (i, _) in some}) == 1):
                parts = [(self.part(codes, p, count), count * lanes, left) for p in range(len(some))]
            for (part, size, stored), (_, (i, j)) in zip(parts, some, strict=False):
                at = (origin[0] + i) * shape.output_row + (origin[1] + j) * shape.output_column + first * lanes
                store(self.buffers["output"], at, part, size, stored)

    def in_order(self, codes: Any, count: int) -> Any:
        """Return joined vectors of `count` each, pixel by pixel."""
        if count == FOUR:
            return codes
        lanes = self.processor.lanes
        places = [
            quarter * FOUR * FOUR + (p * count + v) * FOUR + e
            for p in range(FOUR // count) for quarter in range(lanes // FOUR) for v in range(count) for e in range(FOUR)
        ]  # fmt: skip
        return builder().bind(builder().Shuffle([codes], places))

    def part(self, codes: Any, pixel: int, count: int) -> Any:
        """Return one pixel's codes."""
        if count == FOUR:
            return codes
        size = count * self.processor.lanes
        return builder().Shuffle([codes], list(range(pixel * size, (pixel + 1) * size)))
