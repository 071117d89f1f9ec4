"""Products of two activations in float: sums in registers, from the first product on, each rounded once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qcompile.backends.tvm.emit import Function
from qcompile.backends.tvm.native import builder, function
from qcompile.backends.tvm.schedules.linear import widths
from qcompile.backends.tvm.schedules.vectors import FOUR, SPAN, Processor, blocks, load, places, span_of
from qcompile.backends.tvm.schedules.x86_floats import Stored, Vectors
from qcompile.backends.tvm.schedules.x86_products import Batch, from_place

#: Rows and vectors of a tile of sums.
HIGH, WIDE = 4, 4


@dataclass(frozen=True)
class FloatProduct:
    """The shape of a product. Steps are elements.

    Parameters
    ----------
    m, k, n : int
    row : int
        From one row of the first matrix to the next; its own codes lie side by side.
    deep, wide : int
        From one element of the second matrix to the next down the sums, and to the next output: one of them is 1.
    output_row : int
    scale : float
    bounds : tuple of float
        Of the results.
    """

    m: int
    k: int
    n: int
    row: int
    deep: int
    wide: int
    output_row: int
    scale: float
    bounds: tuple[float, float]


def room(k: int, n: int) -> int:
    """Return the bytes that a second matrix takes with its outputs side by side, in whole vectors of 64 bytes."""
    return 64 * -(-n // 16) * k


def float_product_kernel(name: str, shape: FloatProduct, batch: Batch, processor: Processor) -> Function:
    """Return the function. Arguments: both matrices, room to turn the second one in, output."""
    lanes = processor.lanes

    def body(buffers: Any) -> None:
        ir, span = builder(), span_of(buffers, batch.shared)
        turned = ir.bind(span[0] * batch.room) if span else 0
        with ir.serial(*(span or (0, batch.count))) as index:
            first, second, output = batch.starts(index)
            a, b = from_place(buffers["a"], first, "float32"), from_place(buffers["b"], second, "float32")
            made, deep = from_place(buffers["output"], output, "float32"), shape.deep
            if shape.wide != 1:
                deep, target = batch.room // 4 // shape.k, from_place(buffers["room"], turned, "float32")
                _turn(b, target, shape, deep)
                b = target
            _multiply(a, b, made, shape, deep, lanes)

    given = {"a": "float32", "b": "float32", "room": "int8", "output": "float32"}
    return function(name, given, body, SPAN if batch.shared else ())


def _turn(source: Any, target: Any, shape: FloatProduct, deep: int) -> None:
    """Emit a copy with outputs side by side."""
    ir = builder()
    with ir.grid(shape.n, shape.k) as (n, k):
        ir.buffer_store(target, source[n * shape.wide + k * shape.deep], [k * deep + n])


def _multiply(a: Any, b: Any, output: Any, shape: FloatProduct, deep: int, lanes: int) -> None:
    counts = widths(-(-shape.n // lanes), WIDE)
    for index, count in enumerate(counts):
        first = sum(counts[:index]) * lanes
        blocks(shape.m, HIGH, lambda y, high, first=first, count=count: _tile(  # type: ignore[misc]
            (a, b, output), shape, deep, lanes, (y, high, first, count)))  # fmt: skip


def _tile(
    matrices: tuple[Any, Any, Any], shape: FloatProduct, deep: int, lanes: int, which: tuple[Any, int, int, int]
) -> None:
    """Emit the sums of some rows and vectors of outputs; what is read behind the last output is nobody's."""
    ir, (a, b, output), (y, high, first, count), floats = builder(), matrices, which, Vectors(lanes)
    sums = ir.alloc_buffer((high * count * lanes,), "float32", scope="local")
    for at in range(high * count):
        ir.buffer_store(sums, floats.number(0.0), [places(at * lanes, lanes)])
    with ir.serial(0, shape.k) as k:
        seconds = [ir.bind(load(b, k * deep + first + v * lanes, lanes)) for v in range(count)]
        for r in range(high):
            one = ir.bind(ir.broadcast(a[(y + r) * shape.row + k], lanes))
            for v in range(count):
                place = places((r * count + v) * lanes, lanes)
                ir.buffer_store(sums, floats.fma(one, seconds[v], sums[place]), [place])
    low, highest = shape.bounds
    for r in range(high):
        for v in range(count):
            made = load(sums, (r * count + v) * lanes, lanes) * floats.number(shape.scale)
            made = ir.max(made, floats.number(low)) if low > float("-inf") else made
            made = ir.min(made, floats.number(highest)) if highest < float("inf") else made
            at, size = (y + r) * shape.output_row + first + v * lanes, min(lanes, shape.n - first - v * lanes)
            floats.write(output, Stored("float32", (1,)), at, made, size)


def cycles(shape: FloatProduct, processor: Processor) -> float:
    """Return what one product is expected to take."""
    vectors = -(-shape.n // processor.lanes)
    turned = shape.k * shape.n * (shape.wide != 1)
    return shape.m * vectors * (shape.k / 2 + FOUR) + turned
