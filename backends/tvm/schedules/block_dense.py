"""Dense layers of floats by weights of four or eight bits with a scale for each block of their inputs.

Activations become codes first, row by row and block by block, so that four products are one instruction, as they are
between codes; weights are stored above zero, since one side of `vpdpbusd` has no sign, and sums start at what that adds
too much. A sum of a block becomes a float and is added to what the blocks in front of it gave.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from qcompile.backends.integer.float_operations import LEAST_PEAK
from qcompile.backends.tvm.emit import Function
from qcompile.backends.tvm.native import builder, function
from qcompile.backends.tvm.schedules import shares
from qcompile.backends.tvm.schedules import x86_nibbles as nibbles
from qcompile.backends.tvm.schedules.linear import Tile, widths
from qcompile.backends.tvm.schedules.vectors import (
    FOUR,
    OUTPUTS,
    ROWS,
    SPAN,
    Processor,
    all_lanes,
    blocks,
    load,
    places,
    span_of,
    within,
)
from qcompile.backends.tvm.schedules.x86_cycles import parts
from qcompile.backends.tvm.schedules.x86_floats import Stored, Vectors

#: Bytes that rows of codes are a multiple of, which leaves room for what is stored behind their end.
LINE = 64
#: Instructions of a sum that becomes a float; of weights that become two vectors; and groups of four that are unrolled.
ENDING, UNPACKED, UNROLLED = 5, 3, 8


@dataclass(frozen=True)
class Blocks:
    """The shape of a layer.

    Parameters
    ----------
    rows, length, outputs : int
        Rows of activations, inputs of each, and outputs.
    block : int
        Inputs that have a scale in common.
    nibbles : bool
        Whether weights have four bits, two to a byte.
    halves : bool
        Whether scales are stored as float16.
    bounds : tuple of float
        Of the results.
    shared : str
        The loop that threads share: `vectors.ROWS`, `vectors.OUTPUTS`, or none.
    """

    rows: int
    length: int
    outputs: int
    block: int
    nibbles: bool
    halves: bool
    bounds: tuple[float, float]
    shared: str = ""

    @property
    def count(self) -> int:
        """How many blocks there are."""
        return -(-self.length // self.block)

    @property
    def quads(self) -> int:
        """Groups of four codes of a block, an even number where two weights are a byte."""
        groups = -(-self.block // FOUR)
        return groups + groups % 2 * self.nibbles

    @property
    def row_bytes(self) -> int:
        """From one row of codes to the next."""
        return -(-(self.count * self.quads * FOUR + LINE) // LINE) * LINE

    def above(self, processor: Processor) -> int:
        """Return what a stored weight is above its own."""
        return nibbles.ABOVE if self.nibbles else processor.offset


def scratch_bytes(rows: int, length: int, block: int) -> int:
    """Return the bytes that a layer's codes take at most, with their steps and where their sums start."""
    shape = Blocks(rows, length, 1, block, True, False, (0.0, 0.0))
    return rows * (shape.row_bytes + 8 * shape.count)


def in_halves(scale: npt.NDArray[np.float32]) -> bool:
    """Tell whether sixteen bits hold all of some scales exactly."""
    with np.errstate(over="ignore"):
        return bool(np.array_equal(scale.astype(np.float16).astype(np.float32), scale))


def choose_tile(shape: Blocks, processor: Processor, wide: int = 0) -> Tile:
    """Return the tile that takes fewest cycles, of those whose sums, in both forms, and weights have registers.

    Parameters
    ----------
    shape : Blocks
    processor : Processor
    wide : int
        How many vectors it has, where that is known.
    """
    vectors = -(-shape.outputs // processor.lanes)
    tiles = [
        Tile(rows, 1, count)
        for count in (1, 2, 4)
        if count == wide or (not wide and (count <= vectors or count == 1))
        for rows in range(1, min(shape.rows, 8) + 1)
        if 2 * rows * count + 2 * count + 1 <= processor.registers or rows == 1
    ]
    return min(tiles, key=lambda tile: (cycles(shape, tile, processor, vectors), tile.vectors))


def cycles(shape: Blocks, tile: Tile, processor: Processor, vectors: int) -> float:
    """Return what so many vectors of channels are expected to take."""
    dot, total = 1 if processor.instruction else 4, 0.0
    for times, count in parts(vectors, tile.vectors):
        for down, rows in parts(shape.rows, tile.rows):
            groups = shape.quads // 2 if shape.nibbles else shape.quads
            weights = groups * count * (1 + UNPACKED * shape.nibbles) + count
            products = shape.quads * max(rows * count * dot, 2)
            total += times * down * (shape.count * (weights + products + ENDING * rows * count) / 2 + 10)
    return total


def share(shape: Blocks, tile: Tile, processor: Processor) -> tuple[str, int]:
    """Return the loop that threads share, and its iterations."""
    vectors = -(-shape.outputs // processor.lanes)
    whole, counts = cycles(shape, tile, processor, vectors), widths(vectors, tile.vectors)
    rows = [rows * whole / shape.rows for times, rows in parts(shape.rows, tile.rows) for _ in range(times)]
    weights = shape.outputs * shape.length // (2 if shape.nibbles else 1)
    outputs = [count * whole / vectors for count in counts]
    return shares.chosen({ROWS: (rows, weights), OUTPUTS: (outputs, shape.rows * shape.row_bytes)})


def pack(
    shape: Blocks, tile: Tile, processor: Processor, weights: npt.NDArray[np.int8], scale: npt.NDArray[np.float32]
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[Any]]:
    """Return weights and scales in the order in which they are read.

    Parameters
    ----------
    weights : ndarray of int8, shape (outputs, length)
    scale : ndarray of float32, shape (outputs, blocks)

    Returns
    -------
    ndarray of uint8
        [block of channels][block][four codes, or two groups of four][vector][lane][code].
    ndarray of float16 or float32
        [block of channels][block][vector][lane].
    """
    lanes = processor.lanes
    room = -(-shape.outputs // lanes) * lanes - shape.outputs
    whole = np.pad(weights, [(0, room), (0, shape.count * shape.block - shape.length)])
    whole = whole.reshape(-1, shape.count, shape.block)
    whole = np.pad(whole, [(0, 0), (0, 0), (0, shape.quads * FOUR - shape.block)])
    if shape.nibbles:
        stored = nibbles.halves(whole.reshape(*whole.shape[:2], -1, 2, FOUR)).view(np.uint8)
    else:
        stored = (whole.astype(np.int16) + shape.above(processor)).astype(np.uint8).reshape(*whole.shape[:2], -1, FOUR)
    stored = stored.reshape(-1, lanes, *stored.shape[1:])
    scales = np.pad(scale, [(0, room), (0, 0)]).reshape(-1, lanes, shape.count)
    found, steps, first = [], [], 0
    for count in widths(len(stored), tile.vectors):
        found.append(stored[first : first + count].transpose(2, 3, 0, 1, 4).reshape(-1))
        steps.append(scales[first : first + count].transpose(2, 0, 1).reshape(-1))
        first += count
    return np.concatenate(found), np.concatenate(steps).astype(np.float16 if shape.halves else np.float32)


def blocks_kernel(name: str, shape: Blocks, processor: Processor, shared: bool) -> Function:
    """Return what makes codes of activations. Arguments: input, codes, their steps, where sums start."""
    vectors = Vectors(processor.lanes)

    def body(buffers: Any) -> None:
        def row(y: Any, _: int) -> None:
            full = shape.length // shape.block
            blocks(full, 1, lambda b, _: _block(buffers, shape, processor, vectors, (y, b, shape.block)))
            if rest := shape.length % shape.block:
                _block(buffers, shape, processor, vectors, (y, full, rest))

        blocks(shape.rows, 1, row, span_of(buffers, shared))

    given = {"input": "float32", "codes": "int8", "steps": "float32", "starts": "int32"}
    return function(name, given, body, SPAN if shared else ())


def _block(buffers: Any, shape: Blocks, processor: Processor, vectors: Vectors, which: tuple[Any, Any, int]) -> None:
    """Emit one block of a row: `which` has both, and how many activations it has."""
    ir, lanes, (y, b, count) = builder(), processor.lanes, which
    source, target = y * shape.length + b * shape.block, y * shape.row_bytes + b * (shape.quads * FOUR)
    full, zero, none = count // lanes, vectors.number(0.0), vectors.number(0, "int32")
    peak = ir.alloc_buffer((lanes,), "float32", scope="local")
    total = ir.alloc_buffer((lanes,), "int32", scope="local")
    whole = places(0, lanes)
    inside = ir.ramp(0, 1, lanes) < ir.broadcast(ir.int32(count % lanes), lanes)

    def higher(at: Any, _: int, there: Any = None) -> None:
        x = load(buffers["input"], source + at, lanes)
        x = ir.max(x, zero - x)
        ir.buffer_store(peak, ir.max(peak[whole], x if there is None else ir.Select(there, x, zero)), [whole])

    ir.buffer_store(peak, zero, [whole])
    blocks(full * lanes, lanes, higher)
    if count % lanes:
        higher(full * lanes, lanes, inside)
    at = y * shape.count + b
    factor = _factor(buffers, at, ir.bind(vectors.summed(peak[whole], ir.max)), lanes)

    def rounded(at: Any, _: int, there: Any = None) -> None:
        scaled = load(buffers["input"], source + at, lanes) * factor
        bounded = ir.max(ir.min(scaled, vectors.number(127.0)), vectors.number(-127.0))
        codes = ir.bind(ir.call_llvm_pure_intrin(vectors.whole, "llvm.lrint", bounded))
        keep(at, codes if there is None else ir.Select(there, codes, none))

    def keep(at: Any, codes: Any) -> None:
        ir.buffer_store(total, total[whole] + codes, [whole])
        ir.buffer_store(buffers["codes"], ir.cast(codes, f"int8x{lanes}"), [places(target + at, lanes)])

    ir.buffer_store(total, none, [whole])
    blocks(full * lanes, lanes, rounded)
    if count % lanes:
        rounded(full * lanes, lanes, inside)
    for behind in range(-(-count // lanes) * lanes, shape.quads * FOUR, lanes):
        keep(behind, none)
    ended = vectors.summed(total[whole], lambda a, b: a + b)
    ir.buffer_store(buffers["starts"], ended * ir.int32(-shape.above(processor)), [at])


def _factor(buffers: Any, at: Any, highest: Any, lanes: int) -> Any:
    """Emit the step of a block whose highest magnitude is known, and return what makes codes of activations."""
    ir = builder()
    there, most, nothing = highest >= ir.float32(LEAST_PEAK), ir.float32(127.0), ir.float32(0.0)
    ir.buffer_store(buffers["steps"], ir.Select(there, highest / most, nothing), [at])
    return ir.bind(ir.broadcast(ir.bind(ir.Select(there, most / highest, nothing)), lanes))


def dense_kernel(name: str, shape: Blocks, tile: Tile, processor: Processor) -> Function:
    """Return the layer's kernel. Arguments: codes, their steps, where sums start, weights, scales, bias, output."""

    def body(buffers: Any) -> None:
        emitter, lanes, span = _Emitter(shape, tile, processor, buffers), processor.lanes, span_of
        counts = widths(-(-shape.outputs // lanes), tile.vectors)
        # A block with lanes that no channel has stands for itself: what it stores is less.
        alike = counts.count(tile.vectors) - (len(set(counts)) == 1 and shape.outputs % lanes > 0)
        outputs = span(buffers, shape.shared == OUTPUTS)
        step = tile.vectors
        blocks(alike * step, step, lambda first, count: emitter.channels(first, count, count * lanes), outputs)
        for index, count in list(enumerate(counts))[alike:]:
            first = sum(counts[:index])
            left = min(shape.outputs - first * lanes, count * lanes)
            within(outputs, index, _later(emitter, first, count, left))

    scale = "float16" if shape.halves else "float32"
    given = {"codes": "int8", "steps": "float32", "starts": "int32", "weights": "uint8", "scale": scale,
             "bias": "float32", "output": "float32"}  # fmt: skip
    return function(name, given, body, SPAN if shape.shared else ())


def _later(emitter: _Emitter, first: int, count: int, left: int) -> Callable[[], None]:
    return lambda: emitter.channels(first, count, left)


class _Emitter:
    """Builds the loops of one kernel."""

    def __init__(self, shape: Blocks, tile: Tile, processor: Processor, buffers: Any) -> None:
        self.shape, self.tile, self.processor, self.buffers = shape, tile, processor, buffers
        self.lanes, self.line = processor.lanes, processor.lanes * FOUR
        self.groups = shape.quads // 2 if shape.nibbles else shape.quads

    def channels(self, first: Any, count: int, left: int) -> None:
        """Emit a block of channels, of which `left` are there."""
        span = span_of(self.buffers, self.shape.shared == ROWS)
        blocks(self.shape.rows, self.tile.rows, lambda y, rows: self.some((y, rows), (first, count), left), span)

    def some(self, rows: tuple[Any, int], channels: tuple[Any, int], left: int) -> None:
        """Emit the results of some rows and channels."""
        ir, lanes, (y, high), (first, count) = builder(), self.lanes, rows, channels
        results = ir.alloc_buffer((high * count * lanes,), "float32", scope="local")
        for r in range(high):
            for v in range(count):
                bias = load(self.buffers["bias"], (first + v) * lanes, lanes)
                ir.buffer_store(results, bias, [places((r * count + v) * lanes, lanes)])
        with ir.serial(0, self.shape.count) as b:
            self.block(rows, channels, b, results)
        floats, (low, highest) = Vectors(lanes), self.shape.bounds
        for r in range(high):
            for v in range(count):
                made = load(results, (r * count + v) * lanes, lanes)
                made = ir.max(made, floats.number(low)) if low > float("-inf") else made
                made = ir.min(made, floats.number(highest)) if highest < float("inf") else made
                at, size = (y + r) * self.shape.outputs + (first + v) * lanes, min(lanes, left - v * lanes)
                if size > 0:
                    floats.write(self.buffers["output"], Stored("float32", (1,)), at, made, size)

    def block(self, rows: tuple[Any, int], channels: tuple[Any, int], b: Any, results: Any) -> None:
        """Emit a block's sums and what they add to the results."""
        ir, lanes, (y, high), (first, count) = builder(), self.lanes, rows, channels
        sums = ir.alloc_buffer((high * count * lanes,), "int32", scope="local")
        for r in range(high):
            start = ir.broadcast(self.buffers["starts"][(y + r) * self.shape.count + b], lanes)
            for v in range(count):
                ir.buffer_store(sums, start, [places((r * count + v) * lanes, lanes)])
        blocks_in_front = first * self.shape.count + b * count
        weights = blocks_in_front * (self.groups * self.line)

        def group(g: Any) -> None:
            for v in range(count):
                stored = ir.bind(load(self.buffers["weights"], weights + (g * count + v) * self.line, self.line))
                for half, four in enumerate(self.unpacked(stored)):
                    self.products(rows, (v, count), (b, g, half), four, sums)

        if self.groups <= UNROLLED:
            for g in range(self.groups):
                group(g)
        else:
            with ir.serial(0, self.groups) as g:
                group(g)
        for v in range(count):
            scale = ir.bind(
                ir.cast(load(self.buffers["scale"], (blocks_in_front + v) * lanes, lanes), f"float32x{lanes}")
            )
            for r in range(high):
                at = places((r * count + v) * lanes, lanes)
                step = ir.broadcast(self.buffers["steps"][(y + r) * self.shape.count + b], lanes) * scale
                made = Vectors(lanes).fma(ir.cast(sums[at], f"float32x{lanes}"), step, results[at])
                ir.buffer_store(results, made, [at])

    def unpacked(self, stored: Any) -> list[Any]:
        """Return one group of weights, or two."""
        ir, kind = builder(), f"{self.processor.codes}x{self.line}"
        if not self.shape.nibbles:
            return [ir.reinterpret(kind, stored)]
        low = stored & all_lanes((1 << nibbles.BITS) - 1, "uint8", self.line)
        return [ir.bind(ir.reinterpret(kind, half)) for half in (low, stored >> all_lanes(4, "uint8", self.line))]

    def products(
        self, rows: tuple[Any, int], vector: tuple[int, int], group: tuple[Any, Any, int], weights: Any, sums: Any
    ) -> None:
        """Emit the products of four codes of each row with a vector of weights."""
        ir, (y, high), (v, count), (b, g, half) = builder(), rows, vector, group
        halves = 2 if self.shape.nibbles else 1
        for r in range(high):
            at = (y + r) * self.shape.row_bytes + (b * self.shape.quads + g * halves + half) * FOUR
            four = ir.reinterpret("int32", load(self.buffers["codes"], at, FOUR))
            codes = ir.bind(ir.reinterpret(f"int8x{self.line}", ir.broadcast(four, self.lanes)))
            place = places((r * count + v) * self.lanes, self.lanes)
            made = self.processor.dot(sums[place], weights, codes, not self.shape.nibbles)
            ir.buffer_store(sums, made, [place])
