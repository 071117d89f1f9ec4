"""Operations on maps that have no weights, as TVM tensor expressions."""

from __future__ import annotations

from typing import Any

import numpy as np

from qcompile.backends.integer import operations as ops
from qcompile.backends.integer.program import Tensor
from qcompile.backends.tvm.define_elementwise import clipped
from qcompile.backends.tvm.definitions import high_word, requantized, within
from qcompile.backends.tvm.emit import Function, load_tvm


def _seen(window: ops.Window, source: Tensor, outside: int) -> tuple[Any, Any, list[Any], Any]:
    """Return the input, y, the window's two axes, and what pixel x sees there in channel c."""
    te = load_tvm().te
    y = te.var("y", "int32")
    codes = te.placeholder(source.shape[1:], source.array_dtype, name="input")
    i, j = (te.reduce_axis((0, size), name=name) for size, name in zip(window.size, "ij", strict=True))

    def code(x: Any, c: Any) -> Any:
        above = y * window.strides[0] + i * window.dilations[0] - window.pads[0]
        beside = x * window.strides[1] + j * window.dilations[1] - window.pads[1]
        margins = window.pads[0::2], window.pads[1::2]
        return within((above, beside), source.shape[1:3], margins, codes[above, beside, c], outside)

    return codes, y, [i, j], code


def define_average_pool(operation: ops.AveragePool, source: Tensor, target: Tensor) -> Function:
    """Return the requantized sum over a window. Arguments: input, output, y."""
    te = load_tvm().te
    codes, y, axes, seen = _seen(operation.window, source, operation.window.outside)
    requantize, numbers = operation.requantize, high_word(operation.requantize)
    acc = te.compute(target.shape[2:], lambda x, c: te.sum(seen(x, c).astype("int32"), axis=axes), name="acc")

    def code(x: Any, c: Any) -> Any:
        sums = (acc[x, c] + operation.bias, *numbers[1:])
        bounds = requantize.zero_point, requantize.low, requantize.high
        return requantized(numbers[0], sums, *bounds, target.array_dtype)

    return te.create_prim_func([codes, te.compute(acc.shape, code, name="output"), y])


def define_max_pool(operation: ops.MaxPool, source: Tensor, target: Tensor) -> Function:
    """Return the highest code of a window. Arguments: input, output, y."""
    te = load_tvm().te
    codes, y, axes, seen = _seen(operation.window, source, int(np.iinfo(source.array_dtype).min))
    acc = te.compute(target.shape[2:], lambda x, c: te.max(seen(x, c).astype("int32"), axis=axes), name="acc")
    bounds = operation.low, operation.high, target.array_dtype
    output = te.compute(acc.shape, lambda x, c: clipped(acc[x, c], *bounds), name="output")
    return te.create_prim_func([codes, output, y])


def define_resize(source: Tensor, target: Tensor) -> Function:
    """Return codes of the nearest pixels. Arguments: input (its row), table (columns), output."""
    te = load_tvm().te
    codes = te.placeholder(source.shape[2:], source.array_dtype, name="input")
    columns = te.placeholder((target.shape[2],), "int32", name="table")
    output = te.compute(target.shape[2:], lambda x, c: codes[columns[x], c], name="output")
    return te.create_prim_func([codes, columns, output])


def define_pad(operation: ops.Pad, source: Tensor, target: Tensor) -> Function:
    """Return the input within a margin. Arguments: input, output."""
    tvm = load_tvm()
    codes = tvm.te.placeholder(source.shape, source.array_dtype, name="input")

    def code(*place: Any) -> Any:
        moved = [at - before for at, before in zip(place, operation.before, strict=True)]
        inside = [at >= 0 for at, before in zip(moved, operation.before, strict=True) if before]
        inside += [at < n for at, n, after in zip(moved, source.shape, operation.after, strict=True) if after]
        outside = tvm.tirx.const(operation.code, source.array_dtype)
        return tvm.tirx.if_then_else(tvm.tirx.all(*inside), codes[tuple(moved)], outside) if inside else codes[place]

    return tvm.te.create_prim_func([codes, tvm.te.compute(target.shape, code, name="output")])


def define_slice(operation: ops.Slice, source: Tensor, target: Tensor) -> Function:
    """Return every so many-th code. Arguments: input, output."""
    te = load_tvm().te
    codes = te.placeholder(source.shape, source.array_dtype, name="input")

    def code(*place: Any) -> Any:
        numbers = zip(place, operation.starts, operation.steps, strict=True)
        return codes[tuple(at * step + start for at, start, step in numbers)]

    return te.create_prim_func([codes, te.compute(target.shape, code, name="output")])


def define_transpose(operation: ops.Transpose, source: Tensor, target: Tensor) -> Function:
    """Return the axes in another order. Arguments: input, output."""
    te = load_tvm().te
    codes = te.placeholder(source.shape, source.array_dtype, name="input")

    def code(*place: Any) -> Any:
        at = dict(zip(operation.axes, place, strict=True))
        return codes[tuple(at[axis] for axis in range(len(at)))]

    return te.create_prim_func([codes, te.compute(target.shape, code, name="output")])
