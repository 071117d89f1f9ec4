"""What is behind the sums of a linear kernel where floats come of them: any kernel with int32 sums calls it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from qcompile.backends.tvm.native import builder
from qcompile.backends.tvm.schedules.vectors import Processor, load
from qcompile.backends.tvm.schedules.x86_floats import Stored, Vectors

#: (lowest, highest) of the floats that come out.
Bounds = tuple[float, float]


def store_reals(
    processor: Processor, sums: Callable[[int], Any], scale: Callable[[int], Any], bounds: Bounds,
    output: tuple[Any, Any], vectors: int, left: int,
) -> None:  # fmt: skip
    """Emit sums · scale, between bounds, for neighbouring channels of one output position.

    Parameters
    ----------
    processor : Processor
    sums : callable
        Returns a vector's int32 sums, channels in their own order.
    scale : callable
        Returns a vector's scales: float32, as the bits of int32.
    bounds : tuple of float
    output : tuple
        The buffer of float32, and where the first channel stands.
    vectors : int
    left : int
        Channels that there are.
    """
    ir, floats = builder(), Vectors(processor.lanes)
    low, high = bounds
    for v in range(vectors):
        real = ir.cast(sums(v), floats.kind) * ir.reinterpret(floats.kind, scale(v))
        if low > float("-inf"):
            real = ir.max(real, floats.number(low))
        if high < float("inf"):
            real = ir.min(real, floats.number(high))
        count = min(processor.lanes, left - v * processor.lanes)
        if count > 0:
            floats.write(output[0], Stored("float32", (1,)), output[1] + v * processor.lanes, real, count)


def store_pixels(
    emitter: Any, sums: tuple[Any, Any], block: tuple[Any, int, int], origin: tuple[Any, Any],
    pixels: Sequence[tuple[int, int]],
) -> None:  # fmt: skip
    """Emit the floats of a tile of `linear`.

    Parameters
    ----------
    emitter : linear.Emitter
    sums : tuple
        Their buffer, and where they begin in it.
    block : tuple
        Its first vector, its vectors, and the channels that it has.
    origin, pixels : tuple and sequence of tuple of int
        Row and column of the tile, and of its pixels within.
    """
    shape, lanes, (first, count, left) = emitter.shape, emitter.processor.lanes, block
    for p, (i, j) in enumerate(pixels):
        at = (origin[0] + i) * shape.output_row + (origin[1] + j) * shape.output_column + first * lanes
        held = [load(sums[0], sums[1] + (p * count + v) * lanes, lanes) for v in range(count)]
        scales = [emitter.scaling.of(first + v)("scale", None) for v in range(count)]
        output = emitter.buffers["output"], at
        store_reals(emitter.processor, held.__getitem__, scales.__getitem__, shape.reals, output, count, left)
