"""From the operations of an integer program to kernels and their calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from qcompile.backends.cpu import generate_floats as floats
from qcompile.backends.cpu.layer_forms import packed_form
from qcompile.backends.cpu.layout import extents, strides
from qcompile.backends.cpu.network import Argument, Network, collapsed
from qcompile.backends.integer import operations as ops
from qcompile.backends.integer.float_operations import Dequantize, FloatDense
from qcompile.backends.integer.program import Operation
from qcompile.backends.tvm.schedules import codes, depthwise, linear, shares, windows
from qcompile.backends.tvm.schedules import x86_float_kernels as float_kernels
from qcompile.backends.tvm.schedules import x86_nibbles as nibbles
from qcompile.backends.tvm.schedules.vectors import FOLDED, Rounding, high_word
from qcompile.core.errors import OperatorError

Array = npt.NDArray[Any]
#: Elements that kernels know.
TYPES = ("int8", "float32", "int64")


def generate(made: Network) -> Network:
    """Return a network with the kernels of its program.

    Raises
    ------
    TargetError
        If an operation has no kernel, naming it.
    """
    for port in made.layout.program.inputs:
        made.surround(port.tensor, port.name, apart=False)
    for operation in made.layout.program.operations:
        if not isinstance(operation, ops.View):
            _require(made, operation)
            made.surround(operation.output, operation.name)
            GENERATORS[type(operation)](made, operation)
    return made


def _require(network: Network, operation: Operation) -> None:
    for name in (*operation.inputs, operation.output):
        if network.tensor(name).dtype not in TYPES:
            fact = f"has {network.tensor(name).dtype} activations, for which there is no kernel yet"
            raise OperatorError("operator", operation.name, fact, "leave its activations at 8 bits")
    if type(operation) not in GENERATORS:
        fact = f"{type(operation).__name__} has no kernel for this processor yet"
        raise OperatorError("operator", operation.name, fact, "choose --target cpu")


def finishing(network: Network, step: ops.Requantize | Dequantize) -> dict[str, Any]:
    """Return what a linear kernel's shape says of how sums end: rounding, or bounds of floats."""
    if isinstance(step, Dequantize):
        return {"rounding": Rounding(False, 0, 0, 0), "reals": (step.low, step.high)}
    return {"rounding": rounding(network, step)}


def rounding(network: Network, requantize: ops.Requantize) -> Rounding:
    """Return the rounding of stored codes."""
    offset = network.processor.offset
    numbers = (requantize.zero_point + offset, requantize.low + offset, requantize.high + offset)
    high = high_word(requantize.shift.tolist())
    return Rounding(high, *numbers, folded=high and int(requantize.shift.max()) <= 32 + FOLDED)


def _stored_bias(network: Network, bias: Array, weights: Array) -> Array:
    """Return biases for sums over stored codes: where these are 128 above, biases are 128 · Σ weights less."""
    sums: Array = bias.astype(np.int64) - network.processor.offset * weights.reshape(len(weights), -1).astype(
        np.int64
    ).sum(axis=1)
    return sums


def _conv(network: Network, operation: ops.Conv) -> None:
    source, target = (network.tensor(name) for name in (operation.inputs[0], operation.output))
    if operation.groups == source.shape[3] == target.shape[3] > 1:
        _depthwise(network, operation)
        return
    here, there = (network.layout.places[tensor.name] for tensor in (source, target))
    rows, columns, outputs = extents(target)
    window = operation.window
    (height, width), (down, beside) = window.size, window.dilations
    fewer = source.shape[3] // operation.groups
    joined = operation.groups == 1 and (beside == 1 or width == 1)
    taps = ((height, down * here.row), (1 if joined else width, beside * here.column))
    shape = linear.Linear(
        rows, columns, outputs // operation.groups, taps, width * fewer if joined else fewer,
        window.strides[0] * here.row, window.strides[1] * here.column, there.row, there.column,
        rounding(network, operation.requantize),
    )  # fmt: skip
    whole = window.strides == (1, 1) and here.row == columns * here.column and there.row == columns * there.column
    if window.size == (1, 1) and whole:
        shape = replace(shape, rows=1, columns=rows * columns)
    weights = operation.weights.reshape(outputs, -1, shape.length)
    for group in range(operation.groups):
        channels = slice(group * shape.outputs, (group + 1) * shape.outputs)
        places = (group * fewer, group * shape.outputs)
        _linear(network, operation, shape, (weights[channels], channels), places)


def _dense(network: Network, operation: ops.Dense | FloatDense) -> None:
    source, target = (network.tensor(name) for name in (operation.inputs[0], operation.output))
    depth, outputs = operation.weights.shape[1], operation.weights.shape[0]
    positions = target.size // outputs
    there = network.layout.places[target.name]
    rows, columns = (positions, 1) if len(target.shape) != 4 else extents(target)[:2]
    if len(target.shape) != 4 or there.row == columns * outputs:
        rows, columns = 1, positions
    here = network.layout.places[source.name]
    shape = linear.Linear(
        rows,
        columns,
        outputs,
        ((1, 0), (1, 0)),
        depth,
        here.row,
        depth,
        there.row,
        outputs,
        **finishing(network, operation.requantize),
    )
    _linear(network, operation, shape, (operation.weights[:, None, :], slice(0, outputs)), (0, 0))


def _linear(
    network: Network, operation: Any, shape: linear.Linear, part: tuple[Array, slice], places: tuple[int, int]
) -> None:
    weights, channels = part
    even = np.pad(weights, [(0, 0), (0, 0), (0, shape.length % 2)])
    shape = replace(
        shape, looked_up=operation.output in network.layout.tables,
        saturates=network.processor.saturates(even),
    )  # fmt: skip
    processor = network.processor
    shape = replace(shape, nibbles=_in_nibbles(network, operation))
    scaling = [np.broadcast_to(n, operation.bias.shape)[channels] for n in floats.scaling(operation.requantize)]
    numbers = (_stored_bias(network, operation.bias[channels], weights), *scaling)
    layer = (operation.output, places)
    kernel, tile, cost, packed, table = packed_form(network, layer, shape, weights, numbers)
    loop, iterations = shares.of_linear(shape, tile, processor, cost)
    shape = replace(shape, shared=loop)
    first = places[1] * network.tensor(operation.output).bits // 8
    given = [
        network.at(operation.inputs[0], places[0]), network.constant(packed), network.constant(table),
        *_table(network, operation), network.at(operation.output, first),
    ]  # fmt: skip
    name = network.add(kernel, (shape, tile, processor), given, operation.name, iterations)
    network.tiles[name] = tile


def _in_nibbles(network: Network, operation: Any) -> bool:
    """Tell whether weights stay two to a byte, which kernels do whose sums become codes."""
    return bool(operation.bits == nibbles.BITS and not isinstance(operation, FloatDense))


def _windows(network: Network, operation: Any, numbers: Rounding) -> windows.Windows:
    source, target = (network.tensor(name) for name in (operation.inputs[0], operation.output))
    here, there = (network.layout.places[tensor.name] for tensor in (source, target))
    window = operation.window
    steps = (window.dilations[0] * here.row, window.dilations[1] * here.column)
    taps = ((window.size[0], steps[0]), (window.size[1], steps[1]))
    return windows.Windows(
        *extents(target),
        taps,
        window.strides[0] * here.row,
        window.strides[1] * here.column,
        there.row,
        there.column,
        numbers,
    )


def _depthwise(network: Network, operation: ops.Conv) -> None:
    shape, requantize = _windows(network, operation, rounding(network, operation.requantize)), operation.requantize
    weights = operation.weights[..., 0]
    bias = _stored_bias(network, operation.bias, weights)
    numbers = [np.broadcast_to(n, bias.shape) for n in (bias, requantize.multiplier, requantize.shift)]
    for first, count, lanes in depthwise.parts(shape.channels, network.processor.lanes):
        part = replace(shape, channels=count, looked_up=operation.output in network.layout.tables)
        narrow = network.processor.narrower(lanes)
        channels = slice(first, first + count)
        packed, table = depthwise.pack(part, narrow, weights[channels], tuple(n[channels] for n in numbers))
        loop, iterations = shares.of_depthwise(part, narrow)
        part = replace(part, saturates=narrow.saturates(packed), shared=loop)
        given = [
            network.at(operation.inputs[0], first), network.constant(packed), network.constant(table),
            *_table(network, operation), network.at(operation.output, first),
        ]  # fmt: skip
        network.add(depthwise.depthwise_kernel, (part, narrow), given, operation.name, iterations)


def _average(network: Network, operation: ops.AveragePool) -> None:
    shape = _windows(network, operation, rounding(network, operation.requantize))
    bias = np.full(network.processor.lanes, operation.bias - network.processor.offset * len(shape.offsets))
    table = _one_scaling(network, bias, operation.requantize)
    given = [network.at(operation.inputs[0]), table, network.at(operation.output)]
    _pool(network, windows.average_kernel, shape, given, operation.name)


def _pool(network: Network, kernel: Any, shape: windows.Windows, given: Sequence[Argument], operation: str) -> None:
    processor = network.processor
    loop, iterations = shares.of_pool(
        shape, processor.together if kernel is windows.maximum_kernel else processor.lanes
    )
    network.add(kernel, (replace(shape, shared=loop), network.processor), given, operation, iterations)


def _one_scaling(network: Network, bias: Array, requantize: ops.Requantize) -> Argument:
    lanes = network.processor.lanes
    numbers = (bias, *(np.broadcast_to(array, (lanes,)) for array in (requantize.multiplier, requantize.shift)))
    return network.constant(linear.scaling_table(network.processor, numbers, rounding(network, requantize)))


def _maximum(network: Network, operation: ops.MaxPool) -> None:
    offset = network.processor.offset
    shape = _windows(network, operation, Rounding(False, 0, operation.low + offset, operation.high + offset))
    given = [network.at(operation.inputs[0]), network.at(operation.output)]
    _pool(network, windows.maximum_kernel, shape, given, operation.name)


def _rows(network: Network, names: Sequence[str]) -> tuple[int, int, tuple[int, ...]]:
    """Return rows, codes of a row and each tensor's step; one row where all lie in one piece."""
    rows, columns, channels = extents(network.tensor(names[-1]))
    steps = tuple(network.layout.places[name].row for name in names)
    width = columns * channels
    if all(step == width for step in steps):
        return 1, rows * width, steps
    return rows, width, steps


def _add(network: Network, operation: ops.Add) -> None:
    names = (*operation.inputs, operation.output)
    bare = replace(operation, name="", inputs=(), output="")
    rows, width, steps = _rows(network, names)
    iterations = shares.of_codes(rows, width, network.processor.together)
    arguments = (bare, rows, width, steps, network.processor, iterations > 0)
    network.add(codes.add_kernel, arguments, [network.at(name) for name in names], operation.name, iterations)


def _mul(network: Network, operation: ops.Mul) -> None:
    first, second, target = (network.tensor(name) for name in (*operation.inputs, operation.output))
    places = [network.layout.places[tensor.name] for tensor in (first, second, target)]
    steps = [step for place in places for step in (place.row, place.column)]
    zeros = (operation.zero_points[0] + network.processor.offset, operation.zero_points[1] + network.processor.offset)
    shape = extents(target)
    if second.size != first.size:
        steps[2:4] = [0, 0]
    elif all(place.row == shape[1] * shape[2] for place in places):
        shape = (1, 1, target.size)
    table = _one_scaling(network, np.zeros(network.processor.lanes), operation.requantize)
    lanes, (rows, columns, channels) = network.processor.lanes, shape
    folded = (rows * columns, channels) if 1 in (rows, columns) else (rows, columns * channels)
    iterations = shares.of_codes(*folded, lanes)
    numbers = rounding(network, operation.requantize)
    arguments = (zeros, numbers, shape, tuple(steps), network.processor, iterations > 0)
    given = [network.at(first.name), network.at(second.name), table, network.at(target.name)]
    network.add(codes.mul_kernel, arguments, given, operation.name, iterations)


def _lookup(network: Network, operation: ops.Lookup) -> None:
    names = (operation.inputs[0], operation.output)
    given = [network.at(names[0]), network.constant(stored(network, operation)), network.at(names[1])]
    network.add(codes.lookup_kernel, (*_rows(network, names), network.processor), given, operation.name)


def _table(network: Network, operation: Operation) -> list[Argument]:
    """Return where the table is that an operation's codes go through, if there is one."""
    lookup = network.layout.tables.get(operation.output)
    return [network.constant(stored(network, lookup))] if lookup is not None else []


def stored(network: Network, operation: ops.Lookup) -> npt.NDArray[np.uint8]:
    """Return a table of stored codes, in the order of stored codes as bytes without a sign."""
    offset = network.processor.offset
    return np.roll(operation.table.astype(np.int16) + offset, offset - 128).astype(np.uint8)


def _softmax(network: Network, operation: ops.Softmax) -> None:
    target = network.tensor(operation.output)
    width, steps = (
        target.shape[-1],
        [strides(network.layout, network.tensor(name)) for name in (operation.inputs[0], operation.output)],
    )
    bare = replace(operation, name="", inputs=(), output="", table=np.zeros(0, np.uint32))
    rows, columns, _ = extents(target)
    powers = network.constant(operation.table)
    flat = all(len(step) != 4 or step[1] == columns * width for step in steps)
    for y in range(1 if flat else rows):
        count = rows * columns if flat else columns
        places = [network.at(name, y * step[1] if len(step) == 4 else 0)
                  for name, step in zip((operation.inputs[0], operation.output), steps, strict=True)]  # fmt: skip
        network.add(
            codes.softmax_kernel,
            (bare, count, width, (width, width), network.processor),
            [places[0], powers, places[1]],
            operation.name,
        )


def _gather(
    network: Network,
    operation: Operation,
    shape: Sequence[int],
    source: tuple[str, int, Sequence[int]],
    target: tuple[str, int, Sequence[int]],
) -> None:
    """Add a copy of elements along axes."""
    arguments = collapsed(shape, source[2], target[2])
    tensors = [network.tensor(source[0]), network.tensor(target[0])]
    given = [network.at(tensor.name, each[1] * (tensor.bits // 8))
             for tensor, each in zip(tensors, (source, target), strict=True)]  # fmt: skip
    if tensors[0].is_codes:
        network.add(codes.gather_kernel, arguments, given, operation.name)
    else:
        network.add(float_kernels.move_kernel, (*arguments, tensors[0].dtype), given, operation.name)


def _concat(network: Network, operation: ops.Concat) -> None:
    target = network.tensor(operation.output)
    steps, at = strides(network.layout, target), 0
    for name in operation.inputs:
        source = network.tensor(name)
        _gather(network, operation, source.shape, (name, 0, strides(network.layout, source)), (target.name, at, steps))
        at += source.shape[operation.axis] * steps[operation.axis]


def _pad(network: Network, operation: ops.Pad) -> None:
    source, target = (network.tensor(name) for name in (operation.inputs[0], operation.output))
    steps = strides(network.layout, target)
    rows, columns, channels = extents(target)
    place = network.layout.places[target.name]
    arguments = (rows, columns * channels, place.row, operation.code + network.processor.offset, network.processor)
    network.add(codes.fill_kernel, arguments, [network.at(target.name)], operation.name)
    start = sum(before * step for before, step in zip(operation.before, steps, strict=True))
    _gather(
        network, operation, source.shape, (source.name, 0, strides(network.layout, source)), (target.name, start, steps)
    )


def _slice(network: Network, operation: ops.Slice) -> None:
    source, target = (network.tensor(name) for name in (operation.inputs[0], operation.output))
    steps = strides(network.layout, source)
    start = sum(first * step for first, step in zip(operation.starts, steps, strict=True))
    taken = [each * step for each, step in zip(operation.steps, steps, strict=True)]
    _gather(
        network, operation, target.shape, (source.name, start, taken), (target.name, 0, strides(network.layout, target))
    )


def _transpose(network: Network, operation: ops.Transpose) -> None:
    source, target = (network.tensor(name) for name in (operation.inputs[0], operation.output))
    steps = strides(network.layout, source)
    taken = [steps[axis] for axis in operation.axes]
    _gather(
        network, operation, target.shape, (source.name, 0, taken), (target.name, 0, strides(network.layout, target))
    )


def _resize(network: Network, operation: ops.Resize) -> None:
    source, target = (network.tensor(name) for name in (operation.inputs[0], operation.output))
    here, there = (network.layout.places[tensor.name] for tensor in (source, target))
    places = [row * here.row for row in operation.rows] + [column * here.column for column in operation.columns]
    given = [network.at(source.name), network.constant(np.array(places, np.int32)), network.at(target.name)]
    network.add(codes.resize_kernel, (extents(target), (there.row, there.column)), given, operation.name)


GENERATORS: Mapping[type[Operation], Callable[[Network, Any], None]] = {
    ops.Add: _add,
    ops.AveragePool: _average,
    ops.Concat: _concat,
    ops.Conv: _conv,
    ops.Dense: _dense,
    ops.Lookup: _lookup,
    ops.MaxPool: _maximum,
    ops.Mul: _mul,
    ops.Pad: _pad,
    ops.Resize: _resize,
    ops.Slice: _slice,
    ops.Softmax: _softmax,
    ops.Transpose: _transpose,
    FloatDense: _dense,
    **floats.GENERATORS,
}
