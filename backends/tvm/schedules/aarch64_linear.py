"""Sums of products on aarch64: sixteen codes of each pixel are in a register, and products take a part of it."""

from __future__ import annotations

from typing import Any

from qcompile.backends.tvm.emit import Function
from qcompile.backends.tvm.native import builder
from qcompile.backends.tvm.schedules import x86_linear as linear
from qcompile.backends.tvm.schedules.aarch64 import REGISTER
from qcompile.backends.tvm.schedules.vectors import FOUR, Processor, load, nested
from qcompile.backends.tvm.schedules.x86_linear import Linear, Tile


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
        if (rows == 1 or columns == shape.columns) and rows * columns * (count + 1) + 2 <= room
    ]
    return min(tiles, key=lambda tile: (_instructions(shape, tile, vectors), tile.vectors, tile.columns))


#: Instructions of one vector behind its sums, and of one tile around them.
EPILOGUE, AROUND = 6, 12
#: What one instruction of a sum that waits for the one before it takes: sums are added to in turns of so many.
LATENCY = 4


def _instructions(shape: Linear, tile: Tile, vectors: int) -> float:
    def parts(count: int, step: int) -> list[tuple[int, int]]:
        whole, rest = divmod(count, step)
        return [(whole, step)] * bool(whole) + [(1, rest)] * bool(rest)

    loads = shape.depth / shape.quads * -(-shape.quads // FOUR)
    total = 0.0
    for (i, rows), (j, columns), (k, count) in (
        (row, column, block)
        for row in parts(shape.rows, tile.rows)
        for column in parts(shape.columns, tile.columns)
        for block in parts(vectors, tile.vectors)
    ):
        pixels = rows * columns
        products = max(pixels * count, LATENCY) + count
        total += i * j * k * (shape.depth * products + loads * pixels + EPILOGUE * pixels * count + AROUND)
    return total


def linear_kernel(name: str, shape: Linear, tile: Tile, processor: Processor) -> Function:
    """Return the function. Arguments: input, weights, channels, table where codes are looked up, output."""
    return linear.linear_kernel(name, shape, tile, processor, Emitter)


class Emitter(linear.Emitter):
    """Builds the loops of one kernel."""

    def accumulate(self, first: Any, count: int, origin: tuple[Any, Any], pixels: list[tuple[int, int]]) -> Any:
        """Emit the sums of one tile and return where they are."""
        shape, ir = self.shape, builder()
        lanes, step = self.processor.lanes, self.processor.lanes * FOUR
        sums = self.started(first, count, pixels)
        source = origin[0] * shape.row_step + origin[1] * shape.column_step
        start = first * (shape.depth * step)

        def products(offset: Any, quad: Any, quads: int) -> None:
            places = [offset + i * shape.row_step + j * shape.column_step for i, j in pixels]
            # What is read beyond a piece is multiplied by nothing.
            codes = [ir.bind(ir.reinterpret("int32x4", load(self.buffers["input"], at, REGISTER))) for at in places]
            for q in range(quads):
                weights = [
                    ir.bind(load(self.buffers["weights"], start + ((quad + q) * count + v) * step, step))
                    for v in range(count)
                ]
                for p in range(len(pixels)):
                    four = ir.reinterpret("int8x16", ir.Shuffle([codes[p]], [q] * FOUR))
                    for v in range(count):
                        place = ir.ramp((p * count + v) * lanes, 1, lanes)
                        made = self.processor.dot(sums[place], four, weights[v], shape.saturates)
                        ir.buffer_store(sums, made, [place])

        whole, rest = divmod(shape.quads, FOUR)

        def piece(offset: Any, index: Any) -> None:
            if whole:
                nested([(whole, REGISTER)], offset, lambda at, i: products(at, index * shape.quads + i * FOUR, FOUR))
            if rest:
                products(offset + whole * REGISTER, index * shape.quads + whole * FOUR, rest)

        nested(shape.taps, source, piece)
        return sums
