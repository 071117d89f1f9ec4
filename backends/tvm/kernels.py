"""The kernels of an operation: C, what it takes, and the constants in the order in which the C reads them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from qcompile.backends.integer import operations as ops
from qcompile.backends.integer.program import Operation, Tensor
from qcompile.backends.tvm import define_elementwise as elementwise
from qcompile.backends.tvm import define_maps as maps
from qcompile.backends.tvm import definitions
from qcompile.backends.tvm.definitions import Convolution
from qcompile.backends.tvm.emit import Function, emit_c, load_tvm
from qcompile.backends.tvm.schedules import cortex_m

#: What stands for a kernel's name in its C.
PLACEHOLDER = "qc_kernel"
Array = npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class Kernel:
    """A generated function.

    Parameters
    ----------
    source : str
        Its C, named `PLACEHOLDER`; equal for operations that differ in constants only.
    arguments : tuple of str
        What it takes, in order: ``input``, ``other``, ``weights``, ``channels``, ``table``, ``output``, ``y`` (the row
        of the output), ``count`` (of codes).
    constants : mapping of str to ndarray
        Of ``weights``, ``channels`` and ``table``.
    input_offset, output_offset : int
        Codes from the start of what it is given: a row, or the whole.
    by_row : bool
        Whether it computes one row of the output: ``output`` is that row.
    input_row : bool
        Whether ``input`` is the row of the input that has the output's number.
    input_rows : tuple of int
        By row of the output the input's row, where ``input`` is that one.
    """

    source: str
    arguments: tuple[str, ...]
    constants: Mapping[str, Array] = field(default_factory=dict)
    input_offset: int = 0
    output_offset: int = 0
    by_row: bool = False
    input_row: bool = False
    input_rows: tuple[int, ...] = ()


def kernels(operation: Operation, tensors: Mapping[str, Tensor], flat: bool) -> list[Kernel]:
    """Return the functions that compute an operation, which run one behind the other (row by row where they do rows).

    Parameters
    ----------
    operation : Operation
        Neither `Strips` nor a `View`, nor a `Concat`, which only copies.
    tensors : mapping of str to Tensor
    flat : bool
        Whether a pointwise convolution may take the map for one long row: where its output overlaps its input, pixels
        of two rows must not be computed at once.
    """
    return GENERATORS[type(operation)](operation, tensors, flat)


def _convolution(operation: Any, tensors: Mapping[str, Tensor], flat: bool) -> list[Kernel]:
    source, target = tensors[operation.inputs[0]], tensors[operation.output]
    if isinstance(operation, ops.Dense):
        shape = definitions.dense(operation, source, target)
    else:
        shape = definitions.convolution(operation, source, target)
    whole = shape.pointwise and flat and isinstance(operation, ops.Conv)
    shape = shape.flat() if whole else shape
    table = definitions.channel_table(operation.bias, operation.requantize)
    constants = {"weights": _packed(shape, operation.weights), "channels": table}
    found, arguments = [], ("input", "weights", "channels", "output")
    halves = packed(operation, tensors)
    for first, part in cortex_m.parts(shape):
        offset = first * shape.channels if part.pointwise else 0
        found.append(
            Kernel(
                _source(_scheduled(part), halves), (*arguments, *([] if part.pointwise else ["y"])), constants, offset,
                first * shape.outputs, by_row=not whole, input_row=shape.pointwise and not whole,
            )
        )  # fmt: skip
    return found


def _scheduled(shape: Convolution) -> Function:
    if shape.groups == 1:
        return cortex_m.schedule_convolution(shape)
    if cortex_m.in_groups(shape):
        return cortex_m.schedule_depthwise(shape)
    return cortex_m.schedule_grouped(shape)


def _packed(shape: Convolution, weights: Array) -> Array:
    """Return weights in the order in which the kernel reads them."""
    rows = weights.reshape(len(weights), -1)
    if cortex_m.in_groups(shape):
        return np.ascontiguousarray(rows.reshape(-1, cortex_m.GROUP, shape.taps).transpose(0, 2, 1))
    return np.ascontiguousarray(rows)


def _source(function: Function, halves: frozenset[str] = frozenset()) -> str:
    return emit_c({PLACEHOLDER: function}, halves)


def packed(operation: Operation, tensors: Mapping[str, Tensor]) -> frozenset[str]:
    """Return which arguments of an operation's kernel have two codes a byte."""
    named = {**dict(zip(("input", "other"), operation.inputs, strict=False)), "output": operation.output}
    return frozenset(argument for argument, name in named.items() if tensors[name].bits == 4)


def _elementwise(
    function: Function, arguments: tuple[str, ...], halves: frozenset[str] = frozenset(), **constants: Array
) -> list[Kernel]:
    return [Kernel(_source(function, halves), (*arguments, "output", "count"), constants)]


def _add(operation: ops.Add, tensors: Mapping[str, Tensor], flat: bool) -> list[Kernel]:
    del flat
    return _elementwise(elementwise.define_add(operation), ("input", "other"), packed(operation, tensors))


def _mul(operation: ops.Mul, tensors: Mapping[str, Tensor], flat: bool) -> list[Kernel]:
    del flat
    first, second = (tensors[name] for name in operation.inputs)
    channels = second.size if second.size != first.size else 0
    return _elementwise(elementwise.define_mul(operation, channels), ("input", "other"))


def _lookup(operation: ops.Lookup, tensors: Mapping[str, Tensor], flat: bool) -> list[Kernel]:
    del tensors, flat
    return _elementwise(elementwise.define_lookup(), ("input", "table"), table=operation.table)


def _softmax(operation: ops.Softmax, tensors: Mapping[str, Tensor], flat: bool) -> list[Kernel]:
    del flat
    schedule = load_tvm().s_tir.Schedule(elementwise.define_softmax(operation, tensors[operation.inputs[0]]))
    rows = schedule.get_loops(schedule.get_sblock("output"))[0]
    for name in ("total", "peak"):
        schedule.compute_at(schedule.get_sblock(name), rows, preserve_unit_loops=True)
    function = schedule.mod["main"]
    return [Kernel(_source(function), ("input", "table", "output"), {"table": operation.table})]


def _pool(operation: Any, tensors: Mapping[str, Tensor], flat: bool) -> list[Kernel]:
    del flat
    source, target = tensors[operation.inputs[0]], tensors[operation.output]
    average = isinstance(operation, ops.AveragePool)
    define: Any = maps.define_average_pool if average else maps.define_max_pool
    function = cortex_m.at_output(load_tvm().s_tir.Schedule(define(operation, source, target)))
    return [Kernel(_source(function, packed(operation, tensors)), ("input", "output", "y"), by_row=True)]


def _resize(operation: ops.Resize, tensors: Mapping[str, Tensor], flat: bool) -> list[Kernel]:
    del flat
    function = maps.define_resize(tensors[operation.inputs[0]], tensors[operation.output])
    columns = {"table": np.array(operation.columns, np.int32)}
    arguments = ("input", "table", "output")
    return [Kernel(_source(function), arguments, columns, by_row=True, input_rows=operation.rows)]


def _moved(define: Callable[[Any, Tensor, Tensor], Function]) -> Callable[..., list[Kernel]]:
    def generated(operation: Operation, tensors: Mapping[str, Tensor], flat: bool) -> list[Kernel]:
        del flat
        function = define(operation, tensors[operation.inputs[0]], tensors[operation.output])
        return [Kernel(_source(function), ("input", "output"))]

    return generated


GENERATORS: Mapping[type[Operation], Callable[[Any, Mapping[str, Tensor], bool], list[Kernel]]] = {
    ops.Add: _add,
    ops.AveragePool: _pool,
    ops.Conv: _convolution,
    ops.Dense: _convolution,
    ops.Lookup: _lookup,
    ops.MaxPool: _pool,
    ops.Mul: _mul,
    ops.Pad: _moved(maps.define_pad),
    ops.Resize: _resize,
    ops.Slice: _moved(maps.define_slice),
    ops.Softmax: _softmax,
    ops.Transpose: _moved(maps.define_transpose),
}
