"""Run an integer program in NumPy: the specification that every kernel is equal to, bit by bit, but for floats."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from qcompile.backends.integer import interpret_floats, storage
from qcompile.backends.integer import operations as ops
from qcompile.backends.integer.float_operations import FloatDense
from qcompile.backends.integer.program import Operation, Port, Program, Strips, Tensor
from qcompile.core import numerics

Array = npt.NDArray[np.integer[Any]]


def interpret(program: Program, inputs: Mapping[str, Array]) -> dict[str, Array]:
    """Return the outputs' codes for the inputs' codes.

    Parameters
    ----------
    program : Program
    inputs : mapping of str to ndarray
        By port name: codes as stored, of the tensor's shape and type; those of four bits one by one, as int8.

    Returns
    -------
    dict of str to ndarray
        By port name, as stored.
    """
    values = trace(program, inputs)
    return {port.name: values[port.tensor] for port in program.outputs}


def trace(program: Program, inputs: Mapping[str, Array]) -> dict[str, Array]:
    """Return the codes of every tensor for the inputs' codes; see `interpret`."""
    values: dict[str, Array] = {}
    for port in program.inputs:
        tensor, array = program.tensors[port.tensor], np.asarray(inputs[port.name])
        if array.shape != tensor.shape or str(array.dtype) != tensor.array_dtype:
            raise ValueError(f"{port.name}: {array.dtype}{array.shape} is not {tensor.dtype}{tensor.shape}")
        values[port.tensor] = array
    for operation in program.operations:
        parts = operation.operations if isinstance(operation, Strips) else (operation,)
        for part in parts:
            values[part.output] = run(part, [values[name] for name in part.inputs], program.tensors[part.output])
    return values


def run(operation: Operation, inputs: list[Array], output: Tensor) -> Array:
    """Return the codes that one operation makes, of the output's shape and type."""
    result = KERNELS[type(operation)](operation, inputs, output)
    return np.ascontiguousarray(result.reshape(output.shape)).astype(output.array_dtype)


def random_codes(program: Program, random: np.random.Generator) -> dict[str, Array]:
    """Return random codes for every input."""
    return {port.name: storage.random_codes(program.tensors[port.tensor], random) for port in program.inputs}


def quantize_input(program: Program, port: Port, real: npt.NDArray[Any]) -> Array:
    """Return the codes of an input as stored, from the model's own floats or codes."""
    tensor = program.tensors[port.tensor]
    if not tensor.is_codes:
        codes = np.asarray(real, tensor.dtype)
    elif real.dtype.kind == "f":
        scale, zero_point = np.asarray(np.float32(tensor.scale)), np.array(tensor.zero_point)
        codes = numerics.quantize(np.asarray(real, np.float32), scale, zero_point, tensor.dtype)
    else:
        codes = real.astype(np.int64) - _offset(port, tensor)
    codes = codes.astype(tensor.array_dtype)
    return np.ascontiguousarray(codes.reshape(port.shape).transpose(port.axes).reshape(tensor.shape))


def dequantize_output(program: Program, port: Port, codes: Array) -> npt.NDArray[np.float32]:
    """Return the floats that an output's codes stand for, of the model's shape."""
    tensor = program.tensors[port.tensor]
    ordered = codes.reshape([port.shape[axis] for axis in port.axes]).transpose(np.argsort(port.axes))
    if not tensor.is_codes:
        return np.asarray(ordered, np.float32)
    return numerics.dequantize(ordered, np.asarray(np.float32(tensor.scale)), np.array(tensor.zero_point))


def _offset(port: Port, tensor: Tensor) -> int:
    return 1 << (tensor.bits - 1) if port.unsigned else 0


_requantized = interpret_floats.finished


def windows_of(x: Array, window: ops.Window, outside: int) -> Array:
    """Return what each window sees, shape (rows, columns, window rows, window columns, channels).

    Parameters
    ----------
    x : ndarray, shape (1, H, W, C)
    window : Window
    outside : int
        What lies outside of the map.
    """
    top, left, bottom, right = window.pads
    padded = np.pad(x[0], ((top, bottom), (left, right), (0, 0)), constant_values=outside)
    reach = tuple((size - 1) * step + 1 for size, step in zip(window.size, window.dilations, strict=True))
    seen = np.lib.stride_tricks.sliding_window_view(padded, reach, axis=(0, 1))
    seen = seen[:: window.strides[0], :: window.strides[1], :, :: window.dilations[0], :: window.dilations[1]]
    return seen.transpose(0, 1, 3, 4, 2)


def _conv(operation: ops.Conv, inputs: list[Array], output: Tensor) -> Array:
    weights, groups = operation.weights, operation.groups
    seen = windows_of(inputs[0], operation.window, operation.window.outside)
    seen = seen[: output.shape[1], : output.shape[2]]
    rows, columns = seen.shape[:2]
    # Products and sums of codes are below 2^53: float64's matrix product is exact, and fast.
    parts = seen.reshape(rows * columns, -1, groups, seen.shape[-1] // groups).transpose(2, 0, 1, 3)
    flat = parts.reshape(groups, rows * columns, -1).astype(np.float64)
    matrix = weights.reshape(groups, len(weights) // groups, -1).transpose(0, 2, 1).astype(np.float64)
    sums = (flat @ matrix).transpose(1, 0, 2).reshape(rows, columns, len(weights)).astype(np.int64)
    return _requantized(sums + operation.bias, operation.requantize)


def _dense(operation: ops.Dense | FloatDense, inputs: list[Array], output: Tensor) -> Array:
    del output
    flat = inputs[0].reshape(-1, operation.weights.shape[1]).astype(np.float64)
    sums = (flat @ operation.weights.T.astype(np.float64)).astype(np.int64)
    return _requantized(sums + operation.bias, operation.requantize)


def _add(operation: ops.Add, inputs: list[Array], output: Tensor) -> Array:
    del output
    first, second = operation.multipliers
    total = inputs[0].astype(np.int64) * first + inputs[1].astype(np.int64) * second + operation.bias
    codes: Array = np.clip(total >> operation.shift, operation.low, operation.high)
    return codes


def _mul(operation: ops.Mul, inputs: list[Array], output: Tensor) -> Array:
    del output
    a, b = (value.astype(np.int64) - zero for value, zero in zip(inputs, operation.zero_points, strict=True))
    return _requantized(a * b, operation.requantize)


def _average_pool(operation: ops.AveragePool, inputs: list[Array], output: Tensor) -> Array:
    seen = windows_of(inputs[0], operation.window, operation.window.outside)[: output.shape[1], : output.shape[2]]
    return _requantized(seen.astype(np.int64).sum(axis=(2, 3)) + operation.bias, operation.requantize)


def _max_pool(operation: ops.MaxPool, inputs: list[Array], output: Tensor) -> Array:
    least = np.iinfo(inputs[0].dtype).min
    seen = windows_of(inputs[0], operation.window, int(least))[: output.shape[1], : output.shape[2]]
    codes: Array = np.clip(seen.max(axis=(2, 3)), operation.low, operation.high)
    return codes


def _lookup(operation: ops.Lookup, inputs: list[Array], output: Tensor) -> Array:
    del output
    codes: Array = operation.table[inputs[0].astype(np.int64) + 128]
    return codes


def _rescale(operation: ops.Rescale, inputs: list[Array], output: Tensor) -> Array:
    del output
    return _requantized(inputs[0].astype(np.int64) - operation.zero_point, operation.requantize)


def _softmax(operation: ops.Softmax, inputs: list[Array], output: Tensor) -> Array:
    del output
    x = inputs[0].astype(np.int64)
    powers = operation.table.astype(np.int64)[x.max(axis=-1, keepdims=True) - x]
    whole = powers.sum(axis=-1, keepdims=True) << operation.shift
    quotient: npt.NDArray[np.int64] = (powers * operation.factor + whole // 2) // whole
    codes: Array = np.clip(quotient + operation.zero_point, operation.low, operation.high)
    return codes


def _concat(operation: ops.Concat, inputs: list[Array], output: Tensor) -> Array:
    del output
    return np.concatenate(inputs, axis=operation.axis)


def _pad(operation: ops.Pad, inputs: list[Array], output: Tensor) -> Array:
    del output
    margins = list(zip(operation.before, operation.after, strict=True))
    return np.pad(inputs[0], margins, constant_values=operation.code)


def _slice(operation: ops.Slice, inputs: list[Array], output: Tensor) -> Array:
    parts = zip(operation.starts, operation.steps, output.shape, strict=True)
    cut: Array = inputs[0][tuple(slice(start, start + (count - 1) * step + 1, step) for start, step, count in parts)]
    return cut


def _resize(operation: ops.Resize, inputs: list[Array], output: Tensor) -> Array:
    del output
    return inputs[0][:, list(operation.rows)][:, :, list(operation.columns)]


def _view(operation: ops.View, inputs: list[Array], output: Tensor) -> Array:
    del operation, output
    return inputs[0]


def _transpose(operation: ops.Transpose, inputs: list[Array], output: Tensor) -> Array:
    del output
    return inputs[0].transpose(operation.axes)


KERNELS: Mapping[type[Operation], Callable[[Any, list[Array], Tensor], Array]] = {
    ops.Add: _add,
    ops.AveragePool: _average_pool,
    ops.Concat: _concat,
    ops.Conv: _conv,
    ops.Dense: _dense,
    ops.Lookup: _lookup,
    ops.MaxPool: _max_pool,
    ops.Mul: _mul,
    ops.Pad: _pad,
    ops.Rescale: _rescale,
    ops.Resize: _resize,
    ops.Slice: _slice,
    ops.Softmax: _softmax,
    ops.Transpose: _transpose,
    ops.View: _view,
    FloatDense: _dense,
    **interpret_floats.KERNELS,
}
