"""What is behind the sums of a linear kernel where floats come of them: any kernel with int32 sums calls it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from qcompile.backends.tvm.native import builder
from qcompile.backends.tvm.schedules.vectors import Processor
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
