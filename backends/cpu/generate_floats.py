"""From operations in float, and products of two activations, to kernels and their calls."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from qcompile.backends.cpu import generate_blocks
from qcompile.backends.cpu.layer_forms import product_form
from qcompile.backends.cpu.layout import packed_bytes, strides
from qcompile.backends.cpu.network import Argument, Network, row_major
from qcompile.backends.integer import float_operations as ops
from qcompile.backends.integer.program import Operation
from qcompile.backends.tvm.schedules import linear, shares
from qcompile.backends.tvm.schedules import x86_float_kernels as kernels
from qcompile.backends.tvm.schedules import x86_products as products
from qcompile.backends.tvm.schedules.vectors import FOLDED, Processor, Rounding, high_word
from qcompile.backends.tvm.schedules.x86 import X86
from qcompile.backends.tvm.schedules.x86_float_kernels import Read
from qcompile.backends.tvm.schedules.x86_floats import Stored

Array = npt.NDArray[Any]
#: Floats behind a constant that a kernel may read, and do nothing with.
BEHIND = 16
#: Cycles that storing a vector takes, and what a norm and a softmax make of one.
STORED, NORMALIZED, EXPONENTS = 5.0, 6.0, 12.0


def scaling(step: Any) -> tuple[Array, Array]:
    """Return multipliers and shifts, or scales as the bits of int32 and nothing."""
    if isinstance(step, ops.Dequantize):
        return step.scale.view(np.int32), np.zeros_like(step.scale, np.int32)
    return step.multiplier, step.shift


def _steps(axes: Sequence[int | None], of: Sequence[int]) -> tuple[int, ...]:
    return tuple(0 if axis is None else of[axis] for axis in axes)


def _constant(network: Network, values: Array) -> Argument:
    return network.constant(np.asarray(values, np.float32).reshape(-1), 4 * BEHIND)


def _leaves(network: Network, operation: ops.FloatOperation) -> tuple[list[Stored], list[Argument]]:
    """Return how an expression's inputs are stored, and where."""
    found, places = [], []
    for leaf in operation.leaves:
        if leaf.values is not None:
            found.append(Stored("float32", _steps(leaf.axes, row_major(leaf.values.shape))))
            places.append(_constant(network, leaf.values))
            continue
        tensor = network.tensor(operation.inputs[leaf.source])
        steps = _steps(leaf.axes, strides(network.layout, tensor))
        processor = network.processor
        codes = (processor.codes, steps, leaf.scale, leaf.zero_point + processor.offset)
        found.append(Stored(*codes) if tensor.is_codes else Stored(tensor.dtype, steps))
        places.append(network.at(tensor.name))
    return found, places


def _output(network: Network, name: str) -> Stored:
    tensor = network.tensor(name)
    steps = strides(network.layout, tensor)
    if tensor.is_codes:
        return Stored(network.processor.codes, steps, tensor.scale, tensor.zero_point + network.processor.offset)
    return Stored(tensor.dtype, steps)


def _joined(extents: Sequence[int], stored: Sequence[Stored], fixed: int = 0) -> tuple[tuple[int, ...], list[Stored]]:
    """Return loops with axes joined that all go through as one, but for the last `fixed` ones."""
    axes = [(extent, [each.steps[axis] for each in stored]) for axis, extent in enumerate(extents)]
    outer, last = axes[: len(axes) - fixed], axes[len(axes) - fixed :]
    found: list[tuple[int, list[int]]] = []
    for extent, steps in (axis for axis in outer if axis[0] > 1):
        if found and all(a == extent * b for a, b in zip(found[-1][1], steps, strict=True)):
            found[-1] = found[-1][0] * extent, steps
        else:
            found.append((extent, steps))
    found = [*(found or ([] if last else [(1, [0] * len(stored))])), *last]
    made = [
        Stored(each.dtype, tuple(steps[place] for _, steps in found), each.scale, each.zero_point)
        for place, each in enumerate(stored)
    ]
    return tuple(extent for extent, _ in found), made


def _read(network: Network, operation: ops.FloatOperation, fixed: int) -> tuple[Read, Stored, list[Argument]]:
    """Return what an operation reads, what it writes, and where both are."""
    leaves, places = _leaves(network, operation)
    output = _output(network, operation.output)
    extents, stored = _joined(network.tensor(operation.output).shape, [*leaves, output], fixed)
    places.append(network.at(operation.output))
    return Read(extents, tuple(stored[:-1]), operation.expression), stored[-1], places


def _shared(read: Read, processor: Processor, more: float, whole: bool = False) -> tuple[Read, int]:
    """Return what is read with the loop that threads share, and its iterations.

    Parameters
    ----------
    more : float
        Cycles of a vector beside its expression's.
    whole : bool
        Whether rows stay whole.
    """
    *outer, last = read.extents
    each = shares.of_expression(read.expression) + more
    loop, iterations = shares.of_floats(outer, -(-last // processor.lanes), each, whole)
    return replace(read, shared=loop), iterations


def _pointwise(network: Network, operation: ops.Pointwise) -> None:
    read, output, places = _read(network, operation, 0)
    read, iterations = _shared(read, network.processor, STORED)
    network.add(kernels.pointwise_kernel, (read, output, network.processor), places, operation.name, iterations)


def _normalize(network: Network, operation: ops.Normalize) -> None:
    read, output, places = _read(network, operation, 1)
    read, iterations = _shared(read, network.processor, STORED + NORMALIZED, True)
    numbers = [_constant(network, array) for array in (operation.weight, operation.bias)]
    arguments = (read, output, operation.epsilon, operation.centred, network.processor)
    network.add(kernels.normalize_kernel, arguments, [*places[:-1], *numbers, places[-1]], operation.name, iterations)


def _softmax(network: Network, operation: ops.FloatSoftmax) -> None:
    read, output, places = _read(network, operation, 1)
    read, iterations = _shared(read, network.processor, STORED + EXPONENTS, True)
    network.add(kernels.softmax_rows_kernel, (read, output, network.processor), places, operation.name, iterations)


def _reduce(network: Network, operation: ops.Reduce) -> None:
    leaves, places = _leaves(network, operation)
    output = _output(network, operation.output)
    shape = network.tensor(operation.output).shape
    gone = len(operation.extents)
    ended = Stored(output.dtype, output.steps or (1,), output.scale, output.zero_point)
    read = Read((*shape, *operation.extents), tuple(leaves), operation.expression)
    lanes = kernels.reduced_lanes(read, gone, network.processor)
    *outer, last = shape or (1,)
    each = math.prod(operation.extents) * (shares.of_expression(operation.expression) + 1)
    loop, iterations = shares.of_floats(outer, -(-last // lanes), each)
    arguments = (replace(read, shared=loop), gone, ended, operation.kind, operation.factor, network.processor)
    given = [*places, network.at(operation.output)]
    network.add(kernels.reduce_kernel, arguments, given, operation.name, iterations)


def _gather(network: Network, operation: ops.Gather) -> None:
    table, indices = operation.table, network.tensor(operation.inputs[0])
    given = [
        network.at(indices.name), network.constant(table, BEHIND * table.itemsize), _constant(network, operation.scale),
        network.at(operation.output),
    ]  # fmt: skip
    _, iterations = shares.of_floats((indices.size,), -(-table.shape[1] // network.processor.lanes), STORED, True)
    arguments = (indices.size, *table.shape, str(table.dtype), network.processor, iterations > 0)
    network.add(kernels.rows_kernel, arguments, given, operation.name, iterations)


def _matmul(network: Network, operation: ops.MatMul) -> None:
    *batch, m, k, n = operation.extents
    names = (*operation.inputs, operation.output)
    # Axes of a, b and the output as (batch, rows, columns).
    steps = [_steps(axes, strides(network.layout, network.tensor(name)))
             for axes, name in zip(operation.axes, names, strict=True)]  # fmt: skip
    processor, step = network.processor, operation.requantize
    rounding, reals = Rounding(False, 0, 0, 0), None
    multiplier, shift = (int(array[0]) for array in scaling(step))
    if isinstance(step, ops.Dequantize):
        reals = step.low, step.high
    else:
        offset, high = processor.offset, high_word(step.shift.tolist())
        folded = high and shift <= 32 + FOLDED
        rounding = Rounding(high, step.zero_point + offset, step.low + offset, step.high + offset, folded)
        multiplier, shift = products.numbers(processor, multiplier, shift, high)
    shape = linear.Linear(
        1, m, n, ((1, 0), (1, 0)), k, 0, steps[0][-2], 0, steps[2][-2], rounding,
        saturates=isinstance(processor, X86) and not processor.instruction, reals=reals,
    )  # fmt: skip
    multiply, whole, tile, cycles = product_form(shape, processor)
    zero_point = operation.zero_point + processor.offset
    packed = products.Packed(whole, tile, k, steps[1][-2], steps[1][-1], zero_point, (multiplier, shift))
    along = tuple(zip(*(side[:-2] for side in steps), strict=True))
    each = products.Batch(tuple(batch), along, packed_bytes(operation))
    iterations = shares.of_products(shape, each.count, cycles)
    places = [network.at(names[0]), network.at(names[1]), ("workspace", network.layout.scratch), network.at(names[2])]
    arguments = (packed, replace(each, shared=iterations > 0), processor, multiply)
    kernel = network.add(products.product_kernel, arguments, places, operation.name, iterations)
    network.tiles[kernel] = tile


GENERATORS: Mapping[type[Operation], Callable[[Network, Any], None]] = {
    **generate_blocks.GENERATORS,
    ops.FloatSoftmax: _softmax,
    ops.Gather: _gather,
    ops.MatMul: _matmul,
    ops.Normalize: _normalize,
    ops.Pointwise: _pointwise,
    ops.Reduce: _reduce,
}
