"""Sums of products on aarch64: sixteen codes of each pixel are in a register, and products take a part of it.

`sdot` adds four products to each of four sums of one pixel; `smmla` eight to each of four sums, of two pixels and two
channels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from qcompile.backends.tvm.emit import Function
from qcompile.backends.tvm.native import builder
from qcompile.backends.tvm.schedules import linear
from qcompile.backends.tvm.schedules import x86_nibbles as nibbles
from qcompile.backends.tvm.schedules.aarch64 import MATRIX, NEON, REGISTER
from qcompile.backends.tvm.schedules.linear import Linear, Tile
from qcompile.backends.tvm.schedules.vectors import FOUR, Processor, load, nested
from qcompile.backends.tvm.schedules.x86_cycles import tiles_of

#: Codes of a row that `smmla` multiplies.
EIGHT = 8


def choose_tile(shape: Linear, processor: Processor) -> Tile:
    """Return the tile that takes fewest instructions, of those whose sums, codes and one weight have registers."""
    vectors = -(-shape.outputs // processor.lanes)
    # What has no instruction wants registers for its products.
    room = processor.registers - (1 if processor.instruction else 4)
    tiles = [
        Tile(rows, columns, count)
        for count in (1, 2, 4)
        if count <= vectors or count == 1
        for columns in range(1, min(shape.columns, room) + 1)
        for rows in range(1, min(shape.rows, room) + 1)
        if (rows == 1 or columns == shape.columns)
        and rows * columns * (count + 1) + 2 + 2 * count * shape.nibbles <= room
    ]
    ways = (_of_dots, _of_matrices) if processor.instruction == MATRIX else (_of_dots,)

    def least(tile: Tile) -> tuple[float, int, int]:
        return min(_instructions(shape, tile, vectors, way) for way in ways), tile.vectors, tile.columns

    return min(tiles, key=least)


def multiplies_matrices(shape: Linear, tile: Tile, processor: Processor) -> bool:
    """Tell whether products of matrices take fewer instructions; they waste what pieces lack to eight codes."""
    if processor.instruction != MATRIX:
        return False
    vectors = -(-shape.outputs // processor.lanes)
    return _instructions(shape, tile, vectors, _of_matrices) < _instructions(shape, tile, vectors, _of_dots)


#: Instructions of one vector behind its sums, and of one tile around them.
EPILOGUE, AROUND = 6, 12
#: What one instruction of a sum that waits for the one before it takes: sums are added to in turns of so many.
LATENCY = 4


def _of_dots(shape: Linear, pixels: int, count: int) -> float:
    """Return the instructions of a tile's sums."""
    pieces = shape.depth // shape.quads
    loads = pieces * -(-shape.quads // FOUR)
    return shape.depth * (max(pixels * count, LATENCY) + count) + loads * pixels


def _of_matrices(shape: Linear, pixels: int, count: int) -> float:
    """Return the instructions of a tile's sums: two pixels share them, and each register of codes is made of two."""
    pieces, even = shape.depth // shape.quads, pixels + pixels % 2
    loads, octets = pieces * -(-shape.quads // FOUR), pieces * octets_of(shape)
    return octets * (max(even * count, LATENCY) + 2 * count) + loads * 2 * even + even * count


def _instructions(shape: Linear, tile: Tile, vectors: int, counted: Callable[[Linear, int, int], float]) -> float:
    total = 0.0
    for times, rows, columns, count in tiles_of(shape, tile, vectors):
        pixels = rows * columns
        total += times * (counted(shape, pixels, count) + EPILOGUE * pixels * count + AROUND)
    return total


def octets_of(shape: Linear) -> int:
    """Return groups of eight codes in a piece."""
    return -(-shape.length // EIGHT)


def pack(
    shape: Linear,
    tile: Tile,
    processor: Processor,
    weights: npt.NDArray[np.int8],
    numbers: tuple[npt.NDArray[Any], ...],
) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.int32]]:
    """Return weights and the table in the order in which they are read; see `linear.pack`.

    Where matrices are multiplied, weights are [block][tap][eight codes][vector][lane][code].
    """
    packed, table = linear.pack(shape, tile, processor, weights, numbers)
    if not multiplies_matrices(shape, tile, processor):
        return packed, table
    lanes, vectors = processor.lanes, -(-shape.outputs // processor.lanes)
    room = [(0, vectors * lanes - shape.outputs), (0, 0), (0, octets_of(shape) * EIGHT - shape.length)]
    wide = np.pad(weights, room).reshape(vectors, lanes, weights.shape[1], octets_of(shape), EIGHT)
    parts, first = [], 0
    for count in linear.widths(vectors, tile.vectors):
        parts.append(wide[first : first + count].transpose(2, 3, 0, 1, 4).reshape(-1))
        first += count
    return np.concatenate(parts), table


def linear_kernel(name: str, shape: Linear, tile: Tile, processor: Processor) -> Function:
    """Return the function. Arguments: input, weights, channels, table where codes are looked up, output."""
    kind = MatrixEmitter if multiplies_matrices(shape, tile, processor) else DotEmitter
    return linear.linear_kernel(name, shape, tile, processor, kind)


def nibbles_kernel(name: str, shape: Linear, tile: Tile, processor: Processor) -> Function:
    """Return the function for weights of four bits, by dot products."""
    return linear.linear_kernel(name, shape, tile, processor, NibbleEmitter)


def dots(shape: Linear, tile: Tile, processor: Processor, buffers: Mapping[str, Any]) -> None:
    """Emit a kernel's statements, by dot products."""
    linear.emit(shape, tile, processor, buffers, DotEmitter)


class DotEmitter(linear.Emitter):
    """Builds the loops of one kernel of dot products."""

    #: Groups of four codes whose weights are read at once.
    together: ClassVar[int] = 1

    @property
    def depth(self) -> int:
        """Vectors of stored weights that a sum has for each of its channels' vectors."""
        return self.shape.depth

    def weights(self, start: Any, quad: Any, quads: int, vector: tuple[int, int]) -> list[Any]:
        """Return the weights of some groups of four for one vector of a block, which has so many."""
        step, (v, count) = self.processor.lanes * FOUR, vector
        return [builder().bind(load(self.buffers["weights"], start + ((quad + q) * count + v) * step, step))
                for q in range(quads)]  # fmt: skip

    def before(self, index: Any) -> Any:
        """Return the vectors of stored weights in front of a piece."""
        return index * self.shape.quads

    def accumulate(self, first: Any, count: int, origin: tuple[Any, Any], pixels: list[tuple[int, int]]) -> Any:
        """Emit the sums of one tile and return where they are."""
        shape, ir = self.shape, builder()
        lanes, step = self.processor.lanes, self.processor.lanes * FOUR
        sums = self.started(first, count, pixels)
        source = origin[0] * shape.row_step + origin[1] * shape.column_step
        start = first * (self.depth * step)

        def products(offset: Any, quad: Any, quads: int) -> None:
            places = [offset + i * shape.row_step + j * shape.column_step for i, j in pixels]
            # What is read beyond a piece is multiplied by nothing.
            codes = [ir.bind(ir.reinterpret("int32x4", load(self.buffers["input"], at, REGISTER))) for at in places]
            for some in range(0, quads, self.together):
                groups = min(self.together, quads - some)
                weights = [self.weights(start, quad + some, groups, (v, count)) for v in range(count)]
                for q in range(groups):
                    for p in range(len(pixels)):
                        four = ir.reinterpret("int8x16", ir.Shuffle([codes[p]], [some + q] * FOUR))
                        for v in range(count):
                            place = ir.ramp((p * count + v) * lanes, 1, lanes)
                            made = self.processor.dot(sums[place], four, weights[v][q], shape.saturates)
                            ir.buffer_store(sums, made, [place])

        whole, rest = divmod(shape.quads, FOUR)

        def piece(offset: Any, index: Any) -> None:
            before = self.before(index)
            if whole:
                nested([(whole, REGISTER)], offset, lambda at, i: products(at, before + i * FOUR, FOUR))
            if rest:
                products(offset + whole * REGISTER, before + whole * FOUR, rest)

        nested(shape.taps, source, piece)
        return sums


class NibbleEmitter(DotEmitter):
    """Builds the loops of one kernel of dot products with weights of four bits; see `x86_nibbles.py`."""

    together: ClassVar[int] = 2

    @property
    def depth(self) -> int:
        """Vectors of stored weights that a sum has for each of its channels' vectors: of two groups each."""
        return nibbles.halved(self.shape).depth

    def weights(self, start: Any, quad: Any, quads: int, vector: tuple[int, int]) -> list[Any]:
        """Return the weights of two groups of four, or one; `quad` is even."""
        step, (v, count) = self.processor.lanes * FOUR, vector
        at = start + (builder().truncdiv(quad, 2) * count + v) * step
        return list(nibbles.unpacked(builder().bind(load(self.buffers["weights"], at, step)), step))[:quads]

    def before(self, index: Any) -> Any:
        """Return twice the vectors of stored weights in front of a piece."""
        return index * (self.shape.quads + self.shape.quads % 2)


class MatrixEmitter(linear.Emitter):
    """Builds the loops of one kernel of products of matrices: two pixels by two channels."""

    def accumulate(self, first: Any, count: int, origin: tuple[Any, Any], pixels: list[tuple[int, int]]) -> Any:
        """Emit the sums of one tile and return where they are."""
        shape, ir, octets = self.shape, builder(), octets_of(self.shape)
        # Where pixels are odd, the last one is a pair with itself.
        even = [*pixels, pixels[-1]] if len(pixels) % 2 else pixels
        pairs, step = list(zip(even[::2], even[1::2], strict=True)), self.processor.lanes * EIGHT
        sums = self.paired(first, count, len(pairs))
        source = origin[0] * shape.row_step + origin[1] * shape.column_step
        start = first * (shape.depth // shape.quads * octets * step)

        def products(offset: Any, octet: Any, some: int) -> None:
            codes = [self.codes([offset + i * shape.row_step + j * shape.column_step for i, j in pair], some)
                     for pair in pairs]  # fmt: skip
            for o in range(some):
                for part in range(2 * count):
                    at = start + (octet + o) * (count * step) + part * REGISTER
                    weights = ir.bind(load(self.buffers["weights"], at, REGISTER))
                    for p in range(len(pairs)):
                        place = ir.ramp((p * 2 * count + part) * FOUR, 1, FOUR)
                        name, given = f"{NEON}.smmla.v4i32.v16i8", (sums[place], codes[p][o], weights)
                        ir.buffer_store(sums, ir.call_llvm_pure_intrin("int32x4", name, *given), [place])

        whole, rest = divmod(octets, 2)

        def piece(offset: Any, index: Any) -> None:
            if whole:
                nested([(whole, REGISTER)], offset, lambda at, i: products(at, index * octets + i * 2, 2))
            if rest:
                products(offset + whole * REGISTER, index * octets + whole * 2, 1)

        nested(shape.taps, source, piece)
        return self.apart(sums, count, len(pixels))

    def paired(self, first: Any, count: int, pairs: int) -> Any:
        """Return where the sums of a tile are: of two channels and both pixels of each pair. They begin as biases."""
        ir = builder()
        sums = ir.alloc_buffer((pairs * count * 2 * FOUR,), "int32", scope="local")
        for v in range(count):
            bias = ir.bind(self.scaling.bias(first + v))
            for half in range(2):
                both = ir.Shuffle([bias], [2 * half, 2 * half + 1] * 2)
                for p in range(pairs):
                    ir.buffer_store(sums, both, [ir.ramp((p * 2 * count + 2 * v + half) * FOUR, 1, FOUR)])
        return sums

    def codes(self, places: list[Any], some: int) -> list[Any]:
        """Return eight codes of both pixels, and the next eight."""
        ir = builder()
        two = [ir.bind(ir.reinterpret("int64x2", load(self.buffers["input"], at, REGISTER))) for at in places]
        return [ir.bind(ir.reinterpret(f"int8x{REGISTER}", ir.Shuffle(two, [o, 2 + o]))) for o in range(some)]

    def apart(self, sums: Any, count: int, pixels: int) -> Any:
        """Return where the sums are, pixel by pixel."""
        ir = builder()
        found = ir.alloc_buffer((pixels * count * FOUR,), "int32", scope="local")
        for p in range(pixels):
            for v in range(count):
                at = (p // 2 * 2 * count + 2 * v) * FOUR
                halves = [ir.reinterpret("int64x2", load(sums, at + half * FOUR, FOUR)) for half in range(2)]
                whole = ir.reinterpret("int32x4", ir.Shuffle(halves, [p % 2, 2 + p % 2]))
                ir.buffer_store(found, whole, [ir.ramp((p * count + v) * FOUR, 1, FOUR)])
        return found
