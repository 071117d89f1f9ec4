"""What goes through codes one by one, or moves them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from qcompile.backends.integer import operations as ops
from qcompile.backends.tvm.emit import Function
from qcompile.backends.tvm.native import builder, function
from qcompile.backends.tvm.schedules.linear import Scaling
from qcompile.backends.tvm.schedules.vectors import (
    FOUR,
    SPAN,
    Processor,
    Rounding,
    Span,
    all_lanes,
    blocks,
    clipped,
    load,
    span_of,
    store,
    within,
)

#: Elements along the last axis that are written out one by one.
SHORT = 4
CODES = {"input": "uint8", "output": "uint8"}


def _by_vectors(count: int, lanes: int, emit: Callable[[Any, int], None], span: Span | None = None) -> None:
    """Emit loops over so many codes: `emit` takes the first, and how many are to be stored."""
    full = count // lanes
    blocks(full, 1, lambda i, _: emit(i * lanes, lanes), span)
    if count % lanes:
        within(span, full, lambda: emit(full * lanes, count % lanes))


def _by_rows(rows: int, row: Callable[[Any, Span | None], None], span: Span | None) -> None:
    """Emit rows: `row` takes which, and what threads share of it where it is the only one."""
    if rows == 1:
        row(0, span)
    else:
        blocks(rows, 1, lambda y, _: row(y, None), span)


def add_kernel(
    name: str,
    operation: ops.Add,
    rows: int,
    width: int,
    steps: Sequence[int],
    processor: Processor,
    shared: bool = False,
) -> Function:
    """Return a sum over rows of `width` codes. Arguments: input, other, output.

    Parameters
    ----------
    name : str
    operation : Add
    rows, width : int
    steps : sequence of int
        Bytes from one row to the next: of the first input, the second, the output.
    processor : Processor
    shared : bool
        Whether threads share rows, or vectors of the only one.
    """
    lanes = processor.together
    kind = f"int32x{lanes}"

    def body(buffers: Any) -> None:
        ir = builder()

        def row(y: Any, span: Span | None) -> None:
            def codes(at: Any, count: int) -> None:
                total = all_lanes(operation.bias, "int32", lanes)
                for key, step, multiplier in zip(("input", "other"), steps[:2], operation.multipliers, strict=True):
                    value = ir.cast(load(buffers[key], y * step + at, lanes), kind) - all_lanes(
                        processor.offset, "int32", lanes
                    )
                    total = total + value * all_lanes(multiplier, "int32", lanes)
                shifted = (total >> all_lanes(operation.shift, "int32", lanes)) + all_lanes(
                    processor.offset, "int32", lanes
                )
                low, high = operation.low + processor.offset, operation.high + processor.offset
                made = clipped(shifted, low, high, lanes, processor.codes)
                store(buffers["output"], y * steps[2] + at, made, lanes, count)

            _by_vectors(width, lanes, codes, span)

        _by_rows(rows, row, span_of(buffers, shared))

    kinds = dict.fromkeys(("input", "other", "output"), processor.codes)
    return function(name, kinds, body, SPAN if shared else ())


def mul_kernel(
    name: str,
    zero_points: tuple[int, int],
    rounding: Rounding,
    extents: Sequence[int],
    steps: Sequence[int],
    processor: Processor,
    shared: bool = False,
) -> Function:
    """Return a product. Arguments: input, other, channels (one vector's), output.

    Parameters
    ----------
    name : str
    zero_points : tuple of int
        Of the inputs, as they are stored.
    rounding : Rounding
    extents : sequence of int
        Rows, columns, channels.
    steps : sequence of int
        Bytes from one row to the next and from one column to the next: of the first input, the second, the output.
    processor : Processor
    shared : bool
        Whether threads share rows, or columns of the only one, or vectors of the only pixel.
    """
    lanes = processor.lanes
    kind = f"int32x{lanes}"
    rows, columns, channels = extents

    def body(buffers: Any) -> None:
        ir = builder()
        scaling = Scaling(processor, buffers["channels"], lanes)

        def pixel(y: Any, x: Any, span: Span | None = None) -> None:
            def codes(at: Any, count: int) -> None:
                values = []
                for key, place, zero in zip(("input", "other"), (0, 2), zero_points, strict=True):
                    code = load(buffers[key], y * steps[place] + x * steps[place + 1] + at, lanes)
                    values.append(ir.cast(code, kind) - all_lanes(zero, "int32", lanes))
                made = processor.requantize(values[0] * values[1], scaling.of(0), rounding)
                store(buffers["output"], y * steps[4] + x * steps[5] + at, made, lanes, count)

            _by_vectors(channels, lanes, codes, span)

        def row(y: Any, span: Span | None) -> None:
            pixel(y, 0, span) if columns == 1 else blocks(columns, 1, lambda x, _: pixel(y, x), span)

        _by_rows(rows, row, span_of(buffers, shared))

    kinds = {"input": processor.codes, "other": processor.codes, "channels": "int32", "output": processor.codes}
    return function(name, kinds, body, SPAN if shared else ())


def lookup_kernel(name: str, rows: int, width: int, steps: Sequence[int], processor: Processor) -> Function:
    """Return table[code], of codes as bytes without a sign. Arguments: input, table, output."""
    line = processor.line

    def vectors(buffers: Any) -> None:
        def row(y: Any, _: int) -> None:
            def codes(at: Any, count: int) -> None:
                made = processor.looked_up(load(buffers["input"], y * steps[0] + at, line), line, buffers["table"])
                store(buffers["output"], y * steps[1] + at, made, line, count)

            _by_vectors(width, line, codes)

        blocks(rows, 1, row)

    def body(buffers: Any) -> None:
        ir = builder()
        if line:
            vectors(buffers)
            return
        with ir.grid(rows, width) as (y, x):
            code = buffers["table"][ir.cast(buffers["input"][y * steps[0] + x], "int32")]
            ir.buffer_store(buffers["output"], code, [y * steps[1] + x])

    return function(name, {"input": "uint8", "table": "uint8", "output": "uint8"}, body)


def softmax_kernel(
    name: str, operation: ops.Softmax, rows: int, width: int, steps: Sequence[int], processor: Processor
) -> Function:
    """Return the softmax of each row. Arguments: input, powers, output."""

    def body(buffers: Any) -> None:
        ir = builder()
        peak = ir.alloc_buffer((1,), "int32", scope="local")
        total = ir.alloc_buffer((1,), "uint32", scope="local")

        def code(y: Any, x: Any) -> Any:
            return ir.cast(buffers["input"][y * steps[0] + x], "int32")

        def power(y: Any, x: Any) -> Any:
            return buffers["powers"][peak[0] - code(y, x)]

        def row(y: Any, _: int) -> None:
            ir.buffer_store(peak, ir.int32(processor.low), [0])
            with ir.serial(0, width) as x:
                ir.buffer_store(peak, ir.max(peak[0], code(y, x)), [0])
            ir.buffer_store(total, ir.uint32(0), [0])
            with ir.serial(0, width) as x:
                ir.buffer_store(total, total[0] + power(y, x), [0])
            ir.buffer_store(total, total[0] << ir.uint32(operation.shift), [0])
            with ir.serial(0, width) as x:
                scaled = power(y, x) * ir.uint32(operation.factor) + (total[0] >> ir.uint32(1))
                made = ir.cast(ir.truncdiv(scaled, total[0]), "int32") + ir.int32(
                    operation.zero_point + processor.offset
                )
                low, high = (ir.int32(bound + processor.offset) for bound in (operation.low, operation.high))
                stored = ir.cast(ir.max(ir.min(made, high), low), processor.codes)
                ir.buffer_store(buffers["output"], stored, [y * steps[1] + x])

        blocks(rows, 1, row)

    return function(name, {"input": processor.codes, "powers": "uint32", "output": processor.codes}, body)


def copy_kernel(name: str, rows: int, width: int, steps: Sequence[int], offset: int = 0) -> Function:
    """Return a copy of rows. Arguments: input, output.

    Parameters
    ----------
    name : str
    rows, width : int
    steps : sequence of int
        Bytes from one row to the next: of the input, the output.
    offset : int
        What stored codes are above the program's, where one of both is copied to the other: 0 or 128.
    """

    def body(buffers: Any) -> None:
        ir = builder()
        with ir.grid(rows, width) as (y, x):
            code = buffers["input"][y * steps[0] + x]
            ir.buffer_store(buffers["output"], code ^ ir.uint8(offset) if offset else code, [y * steps[1] + x])

    return function(name, CODES, body)


def fill_kernel(name: str, rows: int, width: int, step: int, code: int, processor: Processor) -> Function:
    """Return what fills rows with one stored code. Arguments: output."""
    lanes = FOUR * processor.lanes

    def body(buffers: Any) -> None:
        def row(y: Any, _: int) -> None:
            def codes(at: Any, count: int) -> None:
                store(buffers["output"], y * step + at, all_lanes(code, processor.codes, lanes), lanes, count)

            _by_vectors(width, lanes, codes)

        blocks(rows, 1, row)

    return function(name, {"output": processor.codes}, body)


def gather_kernel(name: str, extents: Sequence[int], source: Sequence[int], target: Sequence[int]) -> Function:
    """Return a copy along axes with steps of their own. Arguments: input, output.

    Parameters
    ----------
    name : str
    extents : sequence of int
        Of each axis of the output.
    source, target : sequence of int
        Bytes from one to the next along each axis.
    """

    def body(buffers: Any) -> None:
        ir = builder()
        with ir.grid(*extents) as places:
            axes = [places] if len(extents) == 1 else list(places)
            at = [sum(i * step for i, step in zip(axes, steps, strict=True)) for steps in (source, target)]
            ir.buffer_store(buffers["output"], buffers["input"][at[0]], [at[1]])

    return function(name, CODES, body)


def resize_kernel(name: str, extents: Sequence[int], steps: Sequence[int]) -> Function:
    """Return codes of the nearest pixels. Arguments: input, places (of rows, then of columns, in bytes), output."""
    rows, columns, channels = extents

    def body(buffers: Any) -> None:
        ir = builder()
        with ir.grid(rows, columns, channels) as (y, x, c):
            at = buffers["places"][y] + buffers["places"][rows + x] + c
            ir.buffer_store(buffers["output"], buffers["input"][at], [y * steps[0] + x * steps[1] + c])

    return function(name, {"input": "uint8", "places": "int32", "output": "uint8"}, body)


def quantize_kernel(
    name: str,
    extents: Sequence[int],
    source: Sequence[int],
    target: Sequence[int],
    scale: float,
    zero_point: int,
    processor: Processor,
) -> Function:
    """Return clip(round_half_even(x / scale) + zero_point) as stored codes. Arguments: input, output.

    Parameters
    ----------
    name : str
    extents : sequence of int
        Of each axis.
    source, target : sequence of int
        Floats, and bytes, from one to the next along each axis.
    scale : float
        A float32.
    zero_point : int
        Of stored codes.
    processor : Processor
    """

    def body(buffers: Any) -> None:
        ir = builder()

        def element(at: Sequence[Any]) -> None:
            rounded = ir.nearbyint(buffers["input"][at[0]] / ir.float32(scale)) + ir.float32(zero_point)
            code = ir.cast(ir.max(ir.min(rounded, ir.float32(processor.high)), ir.float32(processor.low)), "int32")
            ir.buffer_store(buffers["output"], ir.cast(code, processor.codes), [at[1]])

        _elements(extents, (source, target), element)

    return function(name, {"input": "float32", "output": processor.codes}, body)


def dequantize_kernel(
    name: str,
    extents: Sequence[int],
    source: Sequence[int],
    target: Sequence[int],
    scale: float,
    zero_point: int,
    processor: Processor,
) -> Function:
    """Return (code - zero_point) · scale. Arguments: input, output; see `quantize_kernel`."""

    def body(buffers: Any) -> None:
        ir = builder()

        def element(at: Sequence[Any]) -> None:
            above = ir.cast(buffers["input"][at[0]], "int32") - ir.int32(zero_point)
            ir.buffer_store(buffers["output"], ir.cast(above, "float32") * ir.float32(scale), [at[1]])

        _elements(extents, (source, target), element)

    return function(name, {"input": processor.codes, "output": "float32"}, body)


def _elements(extents: Sequence[int], steps: Sequence[Sequence[int]], emit: Callable[[Sequence[Any]], None]) -> None:
    """Emit loops over all axes, those of the last one at once where it is short: then neighbours become a vector."""
    ir = builder()
    *outer, last = extents
    short = last <= SHORT and bool(outer)
    looped = outer if short else list(extents)
    with ir.grid(*looped) as places:
        axes = [places] if len(looped) == 1 else list(places)
        starts = [sum(i * step for i, step in zip(axes, each, strict=False)) for each in steps]
        for k in range(last if short else 1):
            emit([start + k * each[-1] for start, each in zip(starts, steps, strict=True)])
