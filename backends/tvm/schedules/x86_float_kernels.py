"""Kernels of operations in float: element by element, along rows, over axes, and lookups of rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from qcompile.backends.integer.expressions import Expression
from qcompile.backends.tvm.emit import Function
from qcompile.backends.tvm.native import builder, function
from qcompile.backends.tvm.schedules.vectors import (
    COLUMNS,
    ROWS,
    SPAN,
    Processor,
    Span,
    blocks,
    load,
    places,
    span_of,
    within,
)
from qcompile.backends.tvm.schedules.x86_floats import Stored, Vectors

#: Sums that go on beside one another, so that none waits for the one in front.
BESIDE = 4
LEAST = float(np.finfo(np.float32).min)
#: What softmax takes for the logarithm of nothing: a share of it is no denormal yet, of which each takes 150 cycles.
FAINT = -70.0


@dataclass(frozen=True)
class Read:
    """An expression over stored values, along the axes of loops.

    Parameters
    ----------
    extents : tuple of int
    leaves : tuple of Stored
    expression : tuple
    shared : str
        The loop that threads share: `vectors.ROWS`, the outermost one, `vectors.COLUMNS`, that of vectors, or none.
    """

    extents: tuple[int, ...]
    leaves: tuple[Stored, ...]
    expression: Expression
    shared: str = ""

    @property
    def outer(self) -> list[int]:
        """The axes that loops go over, from the outermost, but for the last one."""
        return [axis for axis, extent in enumerate(self.extents[:-1]) if extent > 1]

    @property
    def numbers(self) -> Sequence[str]:
        """What a kernel takes beside pointers."""
        return SPAN if self.shared else ()

    def span(self, buffers: Any, loop: str) -> Span | None:
        """Return the iterations of a loop that are to be done, if threads share it."""
        return span_of(buffers, self.shared == loop)

    def arguments(self, **more: str) -> dict[str, str]:
        """Return what a kernel takes, and of which type."""
        return {f"leaf{index}": leaf.dtype for index, leaf in enumerate(self.leaves)} | more

    def value(self, vectors: Vectors, buffers: Any, starts: Sequence[Any], at: Any) -> Any:
        """Emit the expression `at` elements behind where the last axis starts."""

        def leaf(index: int) -> Any:
            stored = self.leaves[index]
            return vectors.read(buffers[f"leaf{index}"], stored, starts[index] + at * stored.steps[-1])

        return vectors.evaluate(self.expression, leaf)


def _rows(read: Read, buffers: Any, output: Stored, emit: Callable[[list[Any]], None]) -> None:
    """Emit loops over all axes but the last: `emit` takes where each leaf begins there, and the output."""
    ir, stored = builder(), (*read.leaves, output)

    def loops(axes: list[int], starts: list[Any], span: Span | None) -> None:
        if not axes:
            emit(starts)
            return
        with ir.serial(*(span or (0, read.extents[axes[0]]))) as index:
            here = [start + index * each.steps[axes[0]] for start, each in zip(starts, stored, strict=True)]
            loops(axes[1:], here, None)

    loops(read.outer, [0] * len(stored), read.span(buffers, ROWS))


def _by_vectors(count: int, lanes: int, emit: Callable[[Any, int], None], span: Span | None = None) -> None:
    full = count // lanes
    blocks(full, 1, lambda i, _: emit(i * lanes, lanes), span)
    if count % lanes:
        within(span, full, lambda: emit(full * lanes, count % lanes))


def pointwise_kernel(name: str, read: Read, output: Stored, processor: Processor) -> Function:
    """Return the expression's values. Arguments: leaves, output."""
    vectors = Vectors(processor.lanes)

    def body(buffers: Any) -> None:
        def row(starts: list[Any]) -> None:
            def part(at: Any, count: int) -> None:
                value = read.value(vectors, buffers, starts[:-1], at)
                vectors.write(buffers["output"], output, starts[-1] + at * output.steps[-1], value, count)

            _by_vectors(read.extents[-1], processor.lanes, part, read.span(buffers, COLUMNS))

        _rows(read, buffers, output, row)

    return function(name, read.arguments(output=output.dtype), body, read.numbers)


class _Row:
    """A row of the expression's values that is gone over several times."""

    def __init__(self, width: int, lanes: int) -> None:
        self.width, self.lanes, self.vectors = width, lanes, Vectors(lanes)
        self.values = builder().alloc_buffer((-(-width // lanes) * lanes,), "float32", scope="local")

    def fold(self, start: float, term: Callable[[Any], Any], combine: Callable[[Any, Any], Any], rest: float) -> Any:
        """Return the terms of all vectors as one number; `rest` stands for lanes behind the row's end."""
        ir, lanes = builder(), self.lanes
        sums = ir.alloc_buffer((BESIDE * lanes,), "float32", scope="local")
        for k in range(BESIDE):
            ir.buffer_store(sums, self.vectors.number(start), [places(k * lanes, lanes)])

        def add(k: int, value: Any) -> None:
            at = places(k * lanes, lanes)
            ir.buffer_store(sums, combine(sums[at], value), [at])

        full = self.width // lanes

        def some(index: Any, count: int) -> None:
            for k in range(count):
                add(k, term((index + k) * lanes))

        blocks(full, BESIDE, some)
        if self.width % lanes:
            inside = ir.ramp(0, 1, lanes) < ir.broadcast(ir.int32(self.width % lanes), lanes)
            add(BESIDE - 1, ir.Select(inside, term(full * lanes), self.vectors.number(rest)))
        whole = [load(sums, k * lanes, lanes) for k in range(BESIDE)]
        return ir.bind(self.vectors.summed(combine(combine(whole[0], whole[1]), combine(whole[2], whole[3])), combine))

    def at(self, place: Any) -> Any:
        return load(self.values, place, self.lanes)

    def keep(self, place: Any, value: Any) -> Any:
        ir = builder()
        value = ir.bind(value)
        ir.buffer_store(self.values, value, [places(place, self.lanes)])
        return value


def normalize_kernel(
    name: str, read: Read, output: Stored, epsilon: float, centred: bool, processor: Processor
) -> Function:
    """Return rows normalized. Arguments: leaves, weight, bias, output."""
    lanes, width = processor.lanes, read.extents[-1]
    vectors = Vectors(lanes)

    def body(buffers: Any) -> None:
        ir = builder()
        row = _Row(width, lanes)
        mean = ir.alloc_buffer((lanes,), "float32", scope="local")

        def one(starts: list[Any]) -> None:
            def value(at: Any) -> Any:
                return row.keep(at, read.value(vectors, buffers, starts[:-1], at))

            total = row.fold(0.0, value, lambda a, b: a + b, 0.0)
            shift = total * ir.float32(1.0 / width if centred else 0.0)
            ir.buffer_store(mean, ir.broadcast(shift, lanes), [places(0, lanes)])

            def square(at: Any) -> Any:
                apart = ir.bind(row.at(at) - load(mean, 0, lanes))
                return apart * apart

            variance = row.fold(0.0, square, lambda a, b: a + b, 0.0) * ir.float32(1.0 / width)
            factor = ir.bind(ir.broadcast(ir.float32(1.0) / ir.sqrt(variance + ir.float32(epsilon)), lanes))

            def part(at: Any, count: int) -> None:
                apart = (row.at(at) - load(mean, 0, lanes)) * factor
                made = vectors.fma(apart, load(buffers["weight"], at, lanes), load(buffers["bias"], at, lanes))
                vectors.write(buffers["output"], output, starts[-1] + at * output.steps[-1], made, count)

            _by_vectors(width, lanes, part)

        _rows(read, buffers, output, one)

    given = read.arguments(weight="float32", bias="float32", output=output.dtype)
    return function(name, given, body, read.numbers)


def softmax_rows_kernel(name: str, read: Read, output: Stored, processor: Processor) -> Function:
    """Return the softmax of rows. Arguments: leaves, output."""
    lanes, width = processor.lanes, read.extents[-1]
    vectors = Vectors(lanes)

    def body(buffers: Any) -> None:
        ir = builder()
        row = _Row(width, lanes)

        def one(starts: list[Any]) -> None:
            def value(at: Any) -> Any:
                return row.keep(at, read.value(vectors, buffers, starts[:-1], at))

            peak = ir.bind(ir.broadcast(row.fold(LEAST, value, ir.max, LEAST), lanes))

            def power(at: Any) -> Any:
                return row.keep(at, vectors.exp(row.at(at) - peak, 0.0, FAINT))

            total = row.fold(0.0, power, lambda a, b: a + b, 0.0)
            factor = ir.bind(ir.broadcast(ir.float32(1.0) / total, lanes))

            def part(at: Any, count: int) -> None:
                made = row.at(at) * factor
                vectors.write(buffers["output"], output, starts[-1] + at * output.steps[-1], made, count)

            _by_vectors(width, lanes, part)

        _rows(read, buffers, output, one)

    return function(name, read.arguments(output=output.dtype), body, read.numbers)


def reduce_kernel(
    name: str, read: Read, axes: int, output: Stored, kind: str, factor: float, processor: Processor
) -> Function:
    """Return sums or maxima. Arguments: leaves, output.

    Vectors go along the last axis that is kept, where what is read lies in a row there, or else one by one.

    Parameters
    ----------
    axes : int
        How many axes, the last ones of `read`, are gone over.
    """
    kept, gone = read.extents[: len(read.extents) - axes], read.extents[len(read.extents) - axes :]
    lanes = reduced_lanes(read, axes, processor)
    vectors = Vectors(lanes)
    # Leaves as their rows along the kept axis have them.
    along = replace(read, extents=kept or (1,), leaves=tuple(_up_to(leaf, len(kept)) for leaf in read.leaves))

    def body(buffers: Any) -> None:
        ir = builder()
        sums = ir.alloc_buffer((lanes,), "float32", scope="local")

        def row(starts: list[Any]) -> None:
            def part(at: Any, count: int) -> None:
                ir.buffer_store(sums, vectors.number(LEAST if kind == "max" else 0.0), [places(0, lanes)])
                with ir.grid(*gone) as indices:
                    found = [indices] if len(gone) == 1 else list(indices)
                    inner = [
                        start + sum(i * step for i, step in zip(found, leaf.steps[len(kept) :], strict=True))
                        for start, leaf in zip(starts, read.leaves, strict=False)
                    ]
                    value = along.value(vectors, buffers, inner, at)
                    held = load(sums, 0, lanes)
                    ir.buffer_store(sums, ir.max(held, value) if kind == "max" else held + value, [places(0, lanes)])
                made = load(sums, 0, lanes) * vectors.number(factor)
                vectors.write(buffers["output"], output, starts[-1] + at * output.steps[-1], made, count)

            _by_vectors(along.extents[-1], lanes, part, read.span(buffers, COLUMNS))

        _rows(along, buffers, output, row)

    return function(name, read.arguments(output=output.dtype), body, read.numbers)


def reduced_lanes(read: Read, axes: int, processor: Processor) -> int:
    """Return how many neighbours are reduced at once."""
    last = len(read.extents) - axes - 1
    neighbours = last >= 0 and all(leaf.steps[last] in (0, 1) for leaf in read.leaves)
    return processor.lanes if neighbours else 1


def _up_to(leaf: Stored, count: int) -> Stored:
    return Stored(leaf.dtype, leaf.steps[:count] or (0,), leaf.scale, leaf.zero_point)


def rows_kernel(
    name: str, count: int, rows: int, width: int, dtype: str, processor: Processor, shared: bool
) -> Function:
    """Return rows of a table. Arguments: indices, table, scale, output."""
    lanes = processor.lanes
    vectors = Vectors(lanes)

    def body(buffers: Any) -> None:
        ir = builder()

        def row(t: Any, _: int) -> None:
            index = ir.max(ir.min(buffers["indices"][t], ir.int64(rows - 1)), ir.int64(0))
            start = ir.bind(ir.cast(index, "int32") * width)

            def part(at: Any, some: int) -> None:
                code = load(buffers["table"], start + at, lanes)
                real = code if dtype == "float32" else ir.cast(ir.cast(code, vectors.whole), vectors.kind)
                made = real * load(buffers["scale"], at, lanes)
                vectors.write(buffers["output"], Stored("float32", (1,)), t * width + at, made, some)

            _by_vectors(width, lanes, part)

        blocks(count, 1, row, span_of(buffers, shared))

    given = {"indices": "int64", "table": dtype, "scale": "float32", "output": "float32"}
    return function(name, given, body, SPAN if shared else ())


def move_kernel(
    name: str, extents: Sequence[int], source: Sequence[int], target: Sequence[int], dtype: str
) -> Function:
    """Return a copy of elements along axes with steps of their own. Arguments: input, output."""

    def body(buffers: Any) -> None:
        ir = builder()
        with ir.grid(*extents) as indices:
            axes = [indices] if len(extents) == 1 else list(indices)
            at = [sum(i * step for i, step in zip(axes, steps, strict=True)) for steps in (source, target)]
            ir.buffer_store(buffers["output"], buffers["input"][at[0]], [at[1]])

    return function(name, {"input": dtype, "output": dtype}, body)
