"""Sums of products by the tiles of AMX: one instruction multiplies sixteen rows of 64 codes by 64 x 16 weights.

A row of a tile of codes is what one output sees: neighbouring outputs are read at their step in memory, tap by tap, so
that a convolution gathers no patches here either. Eight tiles are sums, codes and weights; sums go through memory to
the registers in which `linear` makes codes of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from qcompile.backends.tvm.emit import Function, load_tvm
from qcompile.backends.tvm.native import builder, function
from qcompile.backends.tvm.schedules import linear, x86_cycles
from qcompile.backends.tvm.schedules import x86_nibbles as nibbles
from qcompile.backends.tvm.schedules.vectors import (
    COLUMNS,
    FOUR,
    OUTPUTS,
    ROWS,
    SPAN,
    Processor,
    Span,
    blocks,
    fetch,
    load,
    nested,
    places,
    within,
)
from qcompile.backends.tvm.schedules.x86 import LINE

#: Tiles that there are, rows of each (a row of codes has as many fours), and vectors that are made codes at once.
TILES, HIGH, AT_ONCE = 8, 16, 8
#: A product of tiles takes a cycle for each row, and no less than these. Cycles that reading a row of a tile takes, and
#: one that is in two lines of the cache, that storing one takes, and giving tiles another size.
FEWEST, READ, READ_SPLIT, STORED, CONFIGURED = 8, 0.55, 1.4, 1.0, 170
#: Outputs of a channel from which on tiles may pay, and bytes on the stack for weights that were of four bits.
FEW, ROOM = 5, 1 << 16
#: Cycles that one vector of codes takes behind its sum, and those of a block beside it.
EPILOGUE, AROUND = 8, 45


@dataclass(frozen=True)
class Block(linear.Tile):
    """Sums that tiles hold at once: see `Tile`; outputs of a row are split evenly into as few tiles as hold them.

    Parameters
    ----------
    quads : int
        Groups of four codes in a row of a tile of codes.
    """

    quads: int

    def heights(self, columns: int) -> list[int]:
        """Return how many neighbouring outputs each tile of codes has."""
        count = -(-columns // HIGH)
        return [columns // count + (index < columns % count) for index in range(count)]


def choose_block(shape: linear.Linear, processor: Processor) -> Block | None:
    """Return the block that is expected to take fewest cycles, or None where vectors are expected to take fewer."""
    vectors = -(-shape.outputs // processor.lanes)
    pieces = -(-shape.quads // HIGH)
    quads = -(-shape.quads // pieces) if pieces <= HIGH else HIGH
    quads += quads % 2 * shape.nibbles  # two lines of weights are one of nibbles
    depth = shape.depth // shape.quads * -(-shape.quads // quads) * quads
    found = [
        Block(rows, columns, count, quads)
        for count in (1, 2, 4)
        if count <= vectors or count == 1
        for across in (1, 2, 3)
        for columns in sorted({min(across * HIGH, shape.columns), _even(shape.columns, across * HIGH)})
        for rows in range(1, min(shape.rows, 3) + 1)
        if _fits(rows * -(-columns // HIGH), count) and (not shape.nibbles or depth * count * LINE <= ROOM)
    ]
    if not found or shape.rows * shape.columns < FEW:
        return None
    best = min(found, key=lambda block: (cycles(shape, block, vectors), block.vectors, block.columns))
    registers = x86_cycles.choose_tile(shape, processor)
    return best if cycles(shape, best, vectors) < x86_cycles.cycles(shape, registers, vectors) else None


def _even(count: int, most: int) -> int:
    """Return the size of equal parts, the last of which may be less, of at most so many."""
    return -(-count // -(-count // most))


def _fits(codes: int, vectors: int) -> bool:
    return codes * vectors + codes + 1 <= TILES and codes * vectors <= FOUR


def cycles(shape: linear.Linear, block: Block, vectors: int) -> float:
    """Return what so many vectors of channels are expected to take."""
    steps = (*(step for _, step in shape.taps), shape.row_step, shape.column_step, block.quads * FOUR)
    read = READ if all(step % LINE == 0 for step in steps) else READ_SPLIT
    products = shape.depth / shape.quads * -(-shape.quads // block.quads)
    total = 0.0
    for count, (rows, columns), times in _regions(shape, block, vectors):
        heights = block.heights(columns) * rows
        products_of_tiles = count * sum(max(FEWEST, height) for height in heights)
        reads = read * sum(heights) + READ * count * block.quads
        sums = count * sum(heights)
        each = products * max(products_of_tiles, reads) + sums * (STORED + EPILOGUE) + AROUND
        total += CONFIGURED + times * each
    return total


def _regions(shape: linear.Linear, block: Block, vectors: int) -> Iterator[tuple[int, tuple[int, int], int]]:
    """Yield vectors, rows and columns of blocks that are alike, and how many of them there are."""
    counts = linear.widths(vectors, block.vectors)
    for count in dict.fromkeys(counts):
        for down, rows in x86_cycles.parts(shape.rows, block.rows):
            for across, columns in x86_cycles.parts(shape.columns, block.columns):
                yield count, (rows, columns), counts.count(count) * down * across


def pack(
    shape: linear.Linear,
    block: Block,
    processor: Processor,
    weights: npt.NDArray[np.int8],
    numbers: tuple[npt.NDArray[Any], ...],
) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.int32]]:
    """Return weights and the table of `linear.pack`, for pieces of whole tiles; of two lines of nibbles one."""
    packed, table = linear.pack(whole(shape, block), block, processor, weights, numbers)
    if shape.nibbles:
        packed = nibbles.halves(packed.reshape(-1, 2, LINE)).reshape(-1)
    return packed, table


def whole(shape: linear.Linear, block: Block) -> linear.Linear:
    """Return a shape with pieces of whole tiles: what is read beyond a piece is multiplied by zero."""
    return replace(shape, length=-(-shape.quads // block.quads) * block.quads * FOUR)


def tiles_kernel(name: str, shape: linear.Linear, block: Block, processor: Processor) -> Function:
    """Return the function. Arguments: input, weights, channels, table where codes are looked up, output."""

    def body(buffers: Any) -> None:
        emit(whole(shape, block), block, processor, buffers)

    given = linear.arguments(shape.looked_up, processor, shape.reals is not None)
    return function(name, given, body, SPAN if shape.shared else ())


def emit(shape: linear.Linear, block: Block, processor: Processor, buffers: Mapping[str, Any]) -> None:
    """Emit the statements of a kernel, of pieces of whole tiles."""
    _Emitter(shape, block, processor, buffers).all()


class _Emitter(linear.Emitter):
    """Builds the loops of one kernel: sums by tiles, what is behind them as `linear` does it."""

    def __init__(self, shape: linear.Linear, block: Block, processor: Processor, buffers: Any) -> None:
        super().__init__(shape, block, processor, buffers)
        ir = builder()
        self.tiles = block
        # Elements as wide as a line are at whole lines.
        lines = ir.alloc_buffer((FOUR * HIGH,), f"int32x{processor.lanes}", scope="local")
        self.sums = ir.decl_buffer((FOUR * HIGH * processor.lanes,), "int32", data=lines.data, scope="local")
        self.sizes = ir.alloc_buffer((LINE // 8,), "uint64", scope="local")
        self.room: Any = None
        if shape.nibbles:
            lines = ir.alloc_buffer((shape.depth * block.vectors,), f"int8x{LINE}", scope="local")
            self.room = ir.decl_buffer((shape.depth * block.vectors * LINE,), "int8", data=lines.data, scope="local")

    def all(self) -> None:
        """Emit everything, blocks that are alike together: tiles have one size as long as possible."""
        shape, lanes, step = self.shape, self.processor.lanes, self.tiles.vectors
        counts = linear.widths(-(-shape.outputs // lanes), step)
        for count in dict.fromkeys(counts):
            index = counts.index(count)
            channels = _Steps(sum(counts[:index]), count, counts.count(count), index)
            for rows in _spans(shape.rows, self.tiles.rows):
                for columns in _spans(shape.columns, self.tiles.columns):
                    self.configure(count, self.tiles.heights(columns.step) * rows.step)
                    self.region(channels, rows, columns)
        tile("tilerelease")

    def region(self, channels: _Steps, rows: _Steps, columns: _Steps) -> None:
        """Emit blocks of one size."""
        count, lanes = channels.step, self.processor.lanes

        def channel(v: Any, left: int) -> None:
            if self.shape.nibbles:
                self.unpack(v, count)

            def outputs(i: Any, j: Any) -> None:
                turn = (i - rows.first) // rows.step * columns.count + (j - columns.first) // columns.step
                self.outputs((v, count, left), (i, j), (rows.step, columns.step), (turn, rows.count * columns.count))

            rows.emit(lambda i: columns.emit(lambda j: outputs(i, j), self.span(COLUMNS)), self.span(ROWS))

        # Channels that end within a vector stand for themselves: what is stored of them is less.
        ends = channels.first + count * channels.count
        full = channels.count - (ends * lanes > self.shape.outputs)
        replace(channels, count=full).emit(lambda v: channel(v, count * lanes), self.span(OUTPUTS))
        if full < channels.count:
            last = ends - count
            left = self.shape.outputs - last * lanes
            within(self.span(OUTPUTS), channels.index + full, lambda: channel(last, left))

    def unpack(self, first: Any, count: int) -> None:
        """Emit what makes a block's weights of bytes of nibbles."""
        ir = builder()
        with ir.serial(0, self.shape.depth * count // 2) as line:
            stored = load(self.buffers["weights"], first * (self.shape.depth * LINE // 2) + line * LINE, LINE)
            for half, weights in enumerate(nibbles.unpacked(ir.bind(stored), LINE)):
                ir.buffer_store(self.room, weights, [places((2 * line + half) * LINE, LINE)])

    def configure(self, count: int, heights: list[int]) -> None:
        """Emit what gives tiles their sizes: sums first, then codes, then weights."""
        ir, quads = builder(), self.tiles.quads
        shapes = [(height, LINE) for height in heights for _ in range(count)]
        shapes += [(height, FOUR * quads) for height in heights]
        shapes += [(quads, LINE)] * (TILES - len(shapes))
        wanted = np.zeros(LINE, np.uint8)
        wanted[0] = 1
        wanted[16 : 16 + 2 * TILES].view("<u2")[:] = [width for _, width in shapes]
        wanted[48 : 48 + TILES] = [height for height, _ in shapes]
        for index, number in enumerate(wanted.view("<u8")):
            ir.buffer_store(self.sizes, load_tvm().tirx.const(int(number), "uint64"), [index])
        tile("ldtilecfg", ir.address_of(self.sizes[0]))

    def outputs(
        self, channels: tuple[Any, int, int], origin: tuple[Any, Any], extent: tuple[int, int], turn: tuple[Any, int]
    ) -> None:
        """Emit one block: its channels, where it starts, what it has, and which it is of how many with these."""
        ir, lanes = builder(), self.processor.lanes
        first, count, _ = channels
        heights = self.tiles.heights(extent[1])
        tiles = [(i, sum(heights[:at]), height) for i in range(extent[0]) for at, height in enumerate(heights)]
        self.multiply(first, count, origin, tiles, turn)
        for number, (i, start, _) in enumerate(tiles):
            for v in range(count):
                target = ir.address_of(self.sums[((i * extent[1] + start) * count + v) * lanes])
                tile("tilestored64", number * count + v, target, ir.int64(count * lanes * FOUR))

        def pixels(i: Any, j: Any, many: int) -> None:
            where, begin = (origin[0] + i, origin[1] + j), (i * extent[1] + j) * count * lanes
            self.finish(self.sums, channels, where, [(0, at) for at in range(many)], begin)

        blocks(extent[0], 1, lambda i, _: blocks(extent[1], AT_ONCE // count, lambda j, many: pixels(i, j, many)))

    def multiply(
        self, first: Any, count: int, origin: tuple[Any, Any], seen: list[tuple[int, int, int]], turn: tuple[Any, int]
    ) -> None:
        """Emit the sums of one block, from biases on; each fetches its share of the next channels' weights."""
        ir, shape, lanes = builder(), self.shape, self.processor.lanes
        tiles, quads = len(seen), self.tiles.quads
        codes, weights = tiles * count, tiles * count + tiles
        for number in range(tiles):
            for v in range(count):
                bias = ir.address_of(self.buffers["channels"][(first + v) * lanes])
                tile("tileloadd64", number * count + v, bias, ir.int64(0))
        start = first * (shape.depth * LINE)
        matrix, begin = (self.room, 0) if shape.nibbles else (self.buffers["weights"], start)
        lines = quads * count
        share = -(-lines // turn[1]) if self.fetches(count) and not shape.nibbles else 0
        ahead = start + (shape.depth * count + turn[0] * share) * LINE

        def products(offset: Any, index: Any) -> None:
            for line in range(share):
                fetch(self.buffers["weights"], ahead + (index * lines + line) * LINE)
            for number, (i, column, _) in enumerate(seen):
                at = self.buffers["input"][offset + i * shape.row_step + column * shape.column_step]
                tile("tileloadd64", codes + number, ir.address_of(at), ir.int64(shape.column_step))
            for v in range(count):
                number = weights + v % (TILES - weights)
                read = matrix[begin + (index * lines + v) * LINE]
                tile("tileloadd64", number, ir.address_of(read), ir.int64(count * LINE))
                for each in range(tiles):
                    tile("tdpbusd", each * count + v, codes + each, number)

        source = origin[0] * shape.row_step + origin[1] * shape.column_step
        nested([*shape.taps, (shape.quads // quads, quads * FOUR)], source, products)


def tile(instruction: str, *arguments: Any) -> None:
    """Emit an instruction on tiles, which are named by their numbers."""
    ir, tirx = builder(), load_tvm().tirx
    given = [tirx.const(each, "int8") if isinstance(each, int) else each for each in arguments]
    ir.evaluate(ir.call_llvm_intrin("void", f"llvm.x86.{instruction}", *given))


@dataclass(frozen=True)
class _Steps:
    """Some iterations of a loop: where the first begins, from one to the next, how many, and which the first is."""

    first: int
    step: int
    count: int
    index: int = 0

    def emit(self, emit: Callable[[Any], None], span: Span | None) -> None:
        """Emit them, of a loop that threads share only those of the span."""
        ir = builder()
        if span is not None and self.count:
            start, end = ir.max(span[0] - self.index, 0), ir.min(span[1] - self.index, self.count)
            with ir.serial(start, end) as number:
                emit(self.first + number * self.step)
        elif self.count:
            blocks(self.count * self.step, self.step, lambda at, _: emit(self.first + at))


def _spans(count: int, step: int) -> list[_Steps]:
    """Return the parts of a count that are of one size each."""
    whole, rest = divmod(count, step)
    return [_Steps(0, step, whole)] * bool(whole) + [_Steps(whole * step, rest, 1, whole)] * bool(rest)
