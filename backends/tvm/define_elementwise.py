"""Operations that go through codes one by one, as TVM tensor expressions: `count` of them."""

from __future__ import annotations

from typing import Any

from qcompile.backends.integer import operations as ops
from qcompile.backends.integer.program import Tensor
from qcompile.backends.tvm.definitions import high_word, requantized
from qcompile.backends.tvm.emit import Function, load_tvm


def _codes(**dtypes: str) -> list[Any]:
    """Return `count`, and placeholders of so many codes, by name their type."""
    te = load_tvm().te
    count = te.var("count", "int32")
    return [count, *(te.placeholder((count,), dtype, name=name) for name, dtype in dtypes.items())]


def clipped(value: Any, low: int, high: int, dtype: str = "int8") -> Any:
    """Return a code from low to high."""
    tirx = load_tvm().tirx
    bounds = tirx.const(low, "int32"), tirx.const(high, "int32")
    return tirx.call_pure_extern("int32", "qc_clip", value, *bounds).astype(dtype)


def define_add(operation: ops.Add, dtypes: tuple[str, str, str]) -> Function:
    """Return clip((a · m0 + b · m1 + bias) >> shift). Arguments: input, other, output, count."""
    tvm = load_tvm()
    count, first, second = _codes(input=dtypes[0], other=dtypes[1])
    m, n, bias, shift = (
        tvm.tirx.const(number, "int32") for number in (*operation.multipliers, operation.bias, operation.shift)
    )

    def code(i: Any) -> Any:
        total = first[i].astype("int32") * m + second[i].astype("int32") * n + bias
        return clipped(total >> shift, operation.low, operation.high, dtypes[2])

    output = tvm.te.compute((count,), code, name="output")
    return tvm.te.create_prim_func([first, second, output, count])


def define_mul(operation: ops.Mul, channels: int) -> Function:
    """Return (a - za) · (b - zb), requantized; b's `channels` values go round, 0 where it has a value for each of a's.

    Arguments: input, other, output, count.
    """
    tvm = load_tvm()
    count, first, second = _codes(input="int8", other="int8")
    if channels:
        second = tvm.te.placeholder((channels,), "int8", name="other")
    requantize, (za, zb) = operation.requantize, operation.zero_points
    numbers = high_word(requantize)

    def code(i: Any) -> Any:
        other = second[i % channels if channels else i]
        product = (first[i].astype("int32") - za) * (other.astype("int32") - zb)
        return requantized(numbers[0], (product, *numbers[1:]), requantize.zero_point, requantize.low, requantize.high)

    output = tvm.te.compute((count,), code, name="output")
    return tvm.te.create_prim_func([first, second, output, count])


def define_rescale(operation: ops.Rescale, dtypes: tuple[str, str]) -> Function:
    """Return code - zero point, requantized. Arguments: input, output, count."""
    te = load_tvm().te
    count, source = _codes(input=dtypes[0])
    requantize, numbers = operation.requantize, high_word(operation.requantize)

    def code(i: Any) -> Any:
        moved = (source[i].astype("int32") - operation.zero_point, *numbers[1:])
        bounds = requantize.zero_point, requantize.low, requantize.high
        return requantized(numbers[0], moved, *bounds, dtypes[1])

    return te.create_prim_func([source, te.compute((count,), code, name="output"), count])


def define_lookup(dtype: str) -> Function:
    """Return table[code + 128]. Arguments: input, table, output, count."""
    te = load_tvm().te
    count, source = _codes(input="int8")
    table = te.placeholder((256,), dtype, name="table")
    output = te.compute((count,), lambda i: table[source[i].astype("int32") + 128], name="output")
    return te.create_prim_func([source, table, output, count])


def define_softmax(operation: ops.Softmax, source: Tensor, target: Tensor) -> Function:
    """Return the softmax of each row of codes. Arguments: input, table, output."""
    tvm = load_tvm()
    te, tirx = tvm.te, tvm.tirx
    width = source.shape[-1]
    rows = source.size // width
    codes = te.placeholder((rows, width), "int8", name="input")
    table = te.placeholder((256,), "uint32", name="table")
    j, k = te.reduce_axis((0, width), name="j"), te.reduce_axis((0, width), name="k")
    peak = te.compute((rows,), lambda r: te.max(codes[r, j], axis=j), name="peak")

    def power(r: Any, c: Any) -> Any:
        return table[peak[r].astype("int32") - codes[r, c].astype("int32")]

    total = te.compute((rows,), lambda r: te.sum(power(r, k), axis=k), name="total")

    def code(r: Any, c: Any) -> Any:
        whole = total[r] << tirx.const(operation.shift, "uint32")
        scaled = power(r, c) * tirx.const(operation.factor, "uint32") + whole // tirx.const(2, "uint32")
        quotient = (scaled // whole).astype("int32") + operation.zero_point
        return clipped(quotient, operation.low, operation.high, target.array_dtype)

    output = te.compute((rows, width), code, name="output")
    return te.create_prim_func([codes, table, output])
