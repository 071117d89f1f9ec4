"""Products of two activations: of codes by tensor cores, and of floats."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from qcompile.backends.cuda.floats import Kernel, Tensors, bits, function, joined, row_major
from qcompile.backends.cuda.linear import HIGH, REAL, ending, form_of
from qcompile.backends.integer import float_operations as ops
from qcompile.backends.integer.program import Operation
from qcompile.backends.tvm.definitions import HIGH_WORD
from qcompile.core.errors import TargetError

#: Tiles of tensor cores: rows, columns, warps down and across.
LARGE, SMALL = (64, 64, 2, 2), (32, 32, 2, 1)
#: Outputs of a block of floats, by threads of 16 x 16.
SIDE, THREADS = 64, 256
Steps = tuple[int, ...]


def _steps(operation: ops.MatMul | ops.FloatMatMul, tensors: Tensors) -> list[Steps]:
    """Return of a, b and the result how many elements are from one to the next along (batch..., rows, columns)."""
    found = []
    for axes, name in zip(operation.axes, (*operation.inputs, operation.output), strict=True):
        own = row_major(tensors[name].shape)
        found.append(tuple(0 if axis is None else own[axis] for axis in axes))
    return found


def _numbers(operation: ops.MatMul | ops.FloatMatMul, tensors: Tensors) -> tuple[list[int], int, list[Steps]]:
    """Return the fields of `Product` up to its zero points, how many products there are, and steps.

    Raises
    ------
    TargetError
        If there are more than three axes of products that do not go through as fewer.
    """
    *batch, m, k, n = operation.extents
    steps = _steps(operation, tensors)
    extents, along = joined(batch, [each[:-2] for each in steps])
    if len(extents) > 3:
        fact = f"multiplies along {len(extents)} axes, and kernels for CUDA devices know three"
        raise TargetError(operation.name, fact, "reshape two of them into one")
    extents = [*[1] * (3 - len(extents)), *extents]
    along = [[*[0] * (3 - len(each)), *each] for each in along]
    (a_row, _), b, (c_row, _) = (each[-2:] for each in steps)
    sizes = [tensors[name].size for name in (*operation.inputs, operation.output)]
    numbers = [m, k, n, a_row, *b, c_row, *sizes, *extents[1:], *(step for each in along for step in each)]
    return numbers, math.prod(extents), steps


def _widest(counts: Sequence[int]) -> int:
    """Return how many codes are read at once, where all of these are multiples of it."""
    common = math.gcd(*counts)
    return next(width for width in (16, 4, 1) if common % width == 0)


def _matmul(operation: ops.MatMul, tensors: Tensors) -> list[Kernel]:
    numbers, count, (a, b, _) = _numbers(operation, tensors)
    m, k, n = operation.extents[-3:]
    step, form = operation.requantize, form_of(operation.requantize)
    turned = b[-2] != 1
    sizes = [tensors[name].size for name in operation.inputs]
    wide_a = _widest([k, *a[:-1], sizes[0]])
    wide_b = min(4, _widest([n, *b[:-1], sizes[1]])) if turned else _widest([k, *b[:-2], b[-1], sizes[1]])
    if isinstance(step, ops.Dequantize):
        factor = bits(float(step.scale[0])), 0
    else:
        factor = int(step.multiplier[0]), int(step.shift[0]) - (HIGH_WORD if form == HIGH else 0)
    tile = LARGE if min(m, n) > SMALL[0] else SMALL
    numbers += [operation.zero_point, *factor, *ending(step, form)]
    shape = ", ".join(map(str, (*tile, wide_a, wide_b, "true" if turned else "false", form)))
    grid = -(-m // tile[0]) * -(-n // tile[1]), count
    kind = "float" if form == REAL else "int8_t"
    text = _text(32 * tile[2] * tile[3], "int8_t", kind, f"product<{shape}>")
    arguments = (*operation.inputs, operation.output)
    return [Kernel("product", text, arguments, grid, 32 * tile[2] * tile[3], tuple(numbers))]


def _float_matmul(operation: ops.FloatMatMul, tensors: Tensors) -> list[Kernel]:
    numbers, count, _ = _numbers(operation, tensors)
    m, n = operation.extents[-3], operation.extents[-1]
    numbers += [0, bits(operation.scale), 0, 0, bits(operation.low), bits(operation.high)]
    side = SIDE if min(m, n) > 16 else 16
    grid = -(-m // side) * -(-n // side), count
    text = _text(THREADS, "float", "float", f"float_product<{side}>")
    return [Kernel("product", text, (*operation.inputs, operation.output), grid, THREADS, tuple(numbers))]


def _text(threads: int, taken: str, given: str, call: str) -> str:
    parameters = [f"const {taken} *a", f"const {taken} *b", f"{given} *output", "const Product shape"]
    return function(threads, parameters, [f"{call}(a, b, output, shape);"])


GENERATORS: Mapping[type[Operation], Callable[[Any, Tensors], list[Kernel]]] = {
    ops.FloatMatMul: _float_matmul,
    ops.MatMul: _matmul,
}
