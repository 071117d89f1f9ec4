"""How kernels are shared by threads: a thread's part is some of the iterations of one loop.

A kernel that is shared takes the first iteration and the one behind the last as its last two arguments, so that one
kernel serves any number of threads, and the thread's results are where they would be anyway.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

from qcompile.backends.integer.expressions import Expression
from qcompile.backends.tvm.schedules.linear import Linear, Tile, widths
from qcompile.backends.tvm.schedules.vectors import COLUMNS, FOUR, OUTPUTS, ROWS, Processor
from qcompile.backends.tvm.schedules.windows import Windows
from qcompile.backends.tvm.schedules.x86_cycles import EPILOGUE, cycles

#: Cycles from which on a kernel is shared; docs/targets/cpu-tvm.md has why.
WORTH = 4000
#: Numbers of threads that parts should be even for.
COMMON = (2, 4)
#: Bytes in a cycle that come from where another processor had them.
BYTES = 10
#: Cycles of what is more than an instruction on a vector of floats.
LONG = {"exp": 9.0, "erf": 10.0, "tanh": 20.0, "div": 12.0, "sqrt": 15.0}
#: Groups of four codes of an activation that are packed in a cycle.
PACKED = 2


def chosen(axes: Mapping[str, tuple[Sequence[float], int]]) -> tuple[str, int]:
    """Return the loop that is shared, and how many iterations it has; of none, where that is not worth it.

    Parameters
    ----------
    axes : mapping of str to (sequence of float, int)
        By loop, the cycles of each iteration, and the bytes that every thread reads then.
    """

    def longest(axis: str) -> float:
        costs, read = axes[axis]
        return sum(max(shared(costs, threads)) + read / BYTES for threads in COMMON)

    best = min(axes, key=longest)
    costs, _ = axes[best]
    worth = sum(costs) >= WORTH and len(costs) > 1
    return (best, len(costs)) if worth else ("", 0)


def shared(costs: Sequence[float], threads: int) -> list[float]:
    """Return what each thread's part takes."""
    ends = [len(costs) * thread // threads for thread in range(threads + 1)]
    return [sum(costs[first:last]) for first, last in pairwise(ends)]


def _steps(count: int, step: int) -> list[int]:
    whole, rest = divmod(count, step)
    return [step] * whole + [rest] * bool(rest)


def of_linear(
    shape: Linear, tile: Tile, processor: Processor, cycles: Callable[[Linear, Any, int], float] = cycles
) -> tuple[str, int]:
    """Return the loop of a dense layer or convolution, and its iterations."""
    vectors = -(-shape.outputs // processor.lanes)
    weights = vectors * processor.lanes * shape.depth * FOUR
    rows = [cycles(replace(shape, rows=rows), tile, vectors) for rows in _steps(shape.rows, tile.rows)]
    outputs = [cycles(shape, tile, count) for count in widths(vectors, tile.vectors)]
    axes = {ROWS: (rows, weights), OUTPUTS: (outputs, shape.rows * shape.row_step)}
    if shape.rows == 1:
        columns = _steps(shape.columns, tile.columns)
        axes[COLUMNS] = ([cycles(replace(shape, columns=count), tile, vectors) for count in columns], weights)
    return chosen(axes)


def of_depthwise(shape: Windows, processor: Processor) -> tuple[str, int]:
    """Return the loop of a depthwise convolution, and its iterations."""
    (rows, _), (columns, _) = shape.taps
    # Four rows of a column are interleaved by eight shuffles and multiplied by four products.
    each = -(-rows // FOUR) * columns * (8 + FOUR) / 2 + FOUR * EPILOGUE
    return _of_windows(shape, FOUR * processor.lanes, each)


def of_pool(shape: Windows, lanes: int) -> tuple[str, int]:
    """Return the loop of a pool by vectors of so many lanes, and its iterations."""
    return _of_windows(shape, lanes, len(shape.offsets) + EPILOGUE)


def _of_windows(shape: Windows, width: int, each: float) -> tuple[str, int]:
    blocks, line = -(-shape.channels // width), shape.columns * each
    seen = shape.rows * shape.row_step // max(shape.rows, 1)
    rows = ([line * blocks] * shape.rows, seen)
    return chosen({ROWS: rows, OUTPUTS: ([line * shape.rows] * blocks, 0)})


def of_floats(extents: Sequence[int], vectors: int, each: float, whole: bool = False) -> tuple[str, int]:
    """Return the loop of what goes by vectors over floats, and its iterations.

    Parameters
    ----------
    extents : sequence of int
        Of the loops around the vectors' one.
    vectors : int
        Of a row.
    each : float
        Cycles that one takes; see `of_expression`.
    whole : bool
        Whether rows stay whole, since something is known of all of one first.
    """
    axes: dict[str, tuple[Sequence[float], int]] = {}
    outer, rows = [extent for extent in extents if extent > 1], math.prod(extents)
    if outer:
        axes[ROWS] = [rows // outer[0] * vectors * each] * outer[0], 0
    if not whole:
        axes[COLUMNS] = [rows * each] * vectors, 0
    return chosen(axes) if axes else ("", 0)


def of_expression(expression: Expression) -> float:
    """Return the cycles that a vector of an expression's values takes, and its loads."""
    kind, *operands = expression
    if kind in ("leaf", "number"):
        return float(kind == "leaf")
    return LONG.get(kind, 1.0) + sum(map(of_expression, operands))


def of_products(shape: Linear, count: int, each: float) -> int:
    """Return the iterations of so many products of activations, each of which is packed where it is computed.

    Parameters
    ----------
    shape : Linear
    count : int
    each : float
        Cycles of one, without packing.
    """
    return count if count > 1 and count * (each + shape.depth * shape.outputs / PACKED) >= WORTH else 0


def of_codes(rows: int, width: int, lanes: int) -> int:
    """Return the iterations of what goes through codes one by one, in rows, or in vectors of the only one."""
    count = rows if rows > 1 else -(-width // lanes)
    return count if rows * -(-width // lanes) * 2 * EPILOGUE >= WORTH and count > 1 else 0
