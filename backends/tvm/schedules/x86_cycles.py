"""What kernels of vectors are expected to take, by counting instructions: the same on every machine."""

from __future__ import annotations

from collections.abc import Iterator

from qcompile.backends.tvm.schedules.linear import Linear, Tile
from qcompile.backends.tvm.schedules.vectors import Processor

#: Groups of four codes below which a sum is short, and registers that are left to others then.
SHORT, SPARED = 8, 8
#: Cycles until a sum can be added to again, and what one vector of codes takes behind its sum.
LATENCY, EPILOGUE = 5, 8
#: Instructions that a vector of weights takes to be of eight bits.
UNPACKED = 2.5


def choose_tile(shape: Linear, processor: Processor) -> Tile:
    """Return the tile that is expected to take fewest cycles."""
    vectors = -(-shape.outputs // processor.lanes)
    # A short sum is unrolled, and its weights want registers too.
    room = processor.registers - (SPARED if shape.depth < SHORT else 1)
    # Without the instruction, a product, sums of pairs and ones have registers; weights have two where they are split.
    room, each = (room, 1) if processor.instruction else (min(room, processor.registers - 3), 1 + shape.saturates)
    each += shape.nibbles
    tiles = [
        Tile(rows, columns, count)
        for count in (1, 2, 4)
        if count <= vectors or count == 1
        for columns in range(1, min(shape.columns, room) + 1)
        for rows in range(1, min(shape.rows, room) + 1)
        if (rows == 1 or columns == shape.columns) and rows * columns * count + count * each + 1 <= room
    ]
    return min(tiles, key=lambda tile: (cycles(shape, tile, vectors), tile.vectors, tile.columns))


def parts(count: int, step: int) -> list[tuple[int, int]]:
    """Return how many steps of which size make a count."""
    whole, rest = divmod(count, step)
    return [(whole, step)] * bool(whole) + [(1, rest)] * bool(rest)


def tiles_of(shape: Linear, tile: Tile, vectors: int) -> Iterator[tuple[int, int, int, int]]:
    """Yield how many tiles there are of each size, and its rows, columns and vectors."""
    for down, rows in parts(shape.rows, tile.rows):
        for across, columns in parts(shape.columns, tile.columns):
            for blocks, count in parts(vectors, tile.vectors):
                yield down * across * blocks, rows, columns, count


def cycles(shape: Linear, tile: Tile, vectors: int) -> float:
    """Return what so many vectors of channels are expected to take."""
    total = 0.0
    for times, rows, columns, count in tiles_of(shape, tile, vectors):
        sums = rows * columns * count
        each = max((sums + UNPACKED * count * shape.nibbles) / 2, (rows * columns + count) / 2, LATENCY)
        total += times * (shape.depth * each + EPILOGUE * sums + 10)
    return total
