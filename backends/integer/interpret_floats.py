"""Float operations in NumPy, in float32: what they compute, not which bits come of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from qcompile.backends.integer import float_operations as ops
from qcompile.backends.integer.expressions import FloatArray, evaluate
from qcompile.backends.integer.program import Operation, Tensor
from qcompile.core import numerics

Array = npt.NDArray[Any]


def along(array: Array, axes: tuple[int | None, ...]) -> Array:
    """Return an array with its axes where the loops have them, of one element where they do not."""
    kept = [axis for axis in axes if axis is not None]
    rest = [axis for axis in range(array.ndim) if axis not in kept]
    moved = array.transpose([*kept, *rest])
    lengths = iter(moved.shape)
    return moved.reshape([1 if axis is None else next(lengths) for axis in axes])


def _read(operation: ops.FloatOperation, inputs: list[Array], shape: tuple[int, ...]) -> FloatArray:
    leaves = []
    for leaf in operation.leaves:
        if leaf.values is not None:
            leaves.append(along(leaf.values, leaf.axes))
            continue
        array = inputs[leaf.source]
        real = (array.astype(np.int64) - leaf.zero_point).astype(np.float32) if array.dtype.kind == "i" else array
        leaves.append(along(real * np.float32(leaf.scale), leaf.axes))
    return np.asarray(np.broadcast_to(evaluate(operation.expression, leaves), shape), np.float32)


def _written(real: FloatArray, output: Tensor) -> Array:
    if not output.is_codes:
        return real
    return numerics.quantize(real, np.asarray(np.float32(output.scale)), np.array(output.zero_point), output.dtype)


def _pointwise(operation: ops.Pointwise, inputs: list[Array], output: Tensor) -> Array:
    return _written(_read(operation, inputs, output.shape), output)


def _normalize(operation: ops.Normalize, inputs: list[Array], output: Tensor) -> Array:
    x = _read(operation, inputs, output.shape)
    if operation.centred:
        x = x - x.mean(axis=-1, keepdims=True)
    deviation = np.sqrt((x * x).mean(axis=-1, keepdims=True) + np.float32(operation.epsilon))
    return _written(np.asarray(x / deviation * operation.weight + operation.bias, np.float32), output)


def _softmax(operation: ops.FloatSoftmax, inputs: list[Array], output: Tensor) -> Array:
    x = _read(operation, inputs, output.shape)
    powers = np.exp(x - np.maximum(x.max(axis=-1, keepdims=True), np.finfo(np.float32).min))
    return _written(np.asarray(powers / powers.sum(axis=-1, keepdims=True), np.float32), output)


def _reduce(operation: ops.Reduce, inputs: list[Array], output: Tensor) -> Array:
    x = _read(operation, inputs, (*output.shape, *operation.extents)).reshape(*output.shape, -1)
    result = x.max(axis=-1) if operation.kind == "max" else x.sum(axis=-1) * np.float32(operation.factor)
    return _written(np.asarray(result, np.float32), output)


def _gather(operation: ops.Gather, inputs: list[Array], output: Tensor) -> Array:
    del output
    rows = operation.table[np.clip(inputs[0], 0, len(operation.table) - 1)]
    return np.asarray(rows.astype(np.float32) * operation.scale, np.float32)


def _matmul(operation: ops.MatMul, inputs: list[Array], output: Tensor) -> Array:
    # Below 2^53, so that float64's product is exact.
    a, b = (along(array, axes).astype(np.float64) for array, axes in zip(inputs, operation.axes[:2], strict=True))
    sums = np.rint((a - operation.zero_point) @ b).astype(np.int64)
    return _placed(finished(sums, operation.requantize), operation.axes[2], output)


def fused(a: FloatArray, b: FloatArray, c: FloatArray) -> FloatArray:
    """Return a · b + c in float32, rounded once.

    The product is exact in float64. What the sum's rounding there lost makes its last bit odd, which is as good as all
    bits behind it to the rounding that follows (Boldo and Melquiond 2008, "Emulation of FMA and Correctly Rounded
    Sums").
    """
    product, summand = np.float64(a) * np.float64(b), np.float64(c)
    total = product + summand
    part = total - product
    lost = (product - (total - part)) + (summand - part)
    even = (total.view(np.int64) & 1) == 0
    odd = np.nextafter(total, np.where(lost > 0.0, np.inf, -np.inf))
    return np.asarray(np.where((lost != 0.0) & even, odd, total), np.float32)


def _block_dense(operation: ops.BlockDense, inputs: list[Array], output: Tensor) -> Array:
    length, block = operation.weights.shape[1], operation.block
    x = inputs[0].reshape(-1, length)
    y = np.broadcast_to(operation.bias, (len(x), len(operation.weights)))
    for index, start in enumerate(range(0, length, block)):
        part = x[:, start : start + block]
        peak = np.abs(part).max(axis=1, keepdims=True)
        there = peak >= np.float32(ops.LEAST_PEAK)
        divisor = np.where(there, peak, np.float32(1.0))
        step = np.where(there, divisor / np.float32(127.0), np.float32(0.0))
        inverse = np.where(there, np.float32(127.0) / divisor, np.float32(0.0))
        codes = np.rint(np.clip(part * inverse, np.float32(-127.0), np.float32(127.0)))
        sums = codes.astype(np.float64) @ operation.weights[:, start : start + block].T.astype(np.float64)
        y = fused(sums.astype(np.float32), step * operation.scale[:, index], y)
    return np.clip(y, np.float32(operation.low), np.float32(operation.high)).reshape(output.shape)


def _half_dense(operation: ops.HalfDense, inputs: list[Array], output: Tensor) -> Array:
    length = operation.weights.shape[1]
    scale = np.repeat(operation.scale.astype(np.float64), operation.block, axis=1)[:, :length]
    y = inputs[0].reshape(-1, length).astype(np.float64) @ (operation.weights * scale).T + operation.bias
    return np.clip(y.astype(np.float32), np.float32(operation.low), np.float32(operation.high)).reshape(output.shape)


def _float_matmul(operation: ops.FloatMatMul, inputs: list[Array], output: Tensor) -> Array:
    a, b = (along(array, axes) for array, axes in zip(inputs, operation.axes[:2], strict=True))
    y = np.zeros((), np.float32)
    for k in range(operation.extents[-2]):
        y = fused(a[..., k, np.newaxis], b[..., k, np.newaxis, :], y)
    made = np.clip(y * np.float32(operation.scale), np.float32(operation.low), np.float32(operation.high))
    return _placed(made, operation.axes[2], output)


def _placed(made: Array, axes: tuple[int | None, ...], output: Tensor) -> Array:
    """Return a product's results as they are stored."""
    places = [axis for axis in axes if axis is not None]
    return made.transpose(np.argsort(places)).reshape(output.shape)


def finished(sums: Array, step: Any) -> Array:
    """Return what comes of accumulators: codes, or floats."""
    if isinstance(step, ops.Dequantize):
        bounds = np.float32(step.low), np.float32(step.high)
        return np.asarray(np.clip(sums.astype(np.float32) * step.scale, *bounds), np.float32)
    codes: Array = numerics.requantize(sums, step.multiplier, step.shift, step.zero_point, step.low, step.high)
    return codes


KERNELS: Mapping[type[Operation], Callable[[Any, list[Array], Tensor], Array]] = {
    ops.BlockDense: _block_dense,
    ops.FloatMatMul: _float_matmul,
    ops.FloatSoftmax: _softmax,
    ops.Gather: _gather,
    ops.HalfDense: _half_dense,
    ops.MatMul: _matmul,
    ops.Normalize: _normalize,
    ops.Pointwise: _pointwise,
    ops.Reduce: _reduce,
}
