"""Which operators leave the channels of a tensor as they are, and where these stand behind them.

Along the channels they are linear with the same factor for each: what is done to the channels in front of them can be
done behind them instead.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qcompile.passes.index_maps import MOVES, evaluate, labels, moved, scalar
from qcompile.passes.structure import constant_tensor, input_of, is_standard

_SAME = frozenset({"Cast", "Dropout", "Identity", "Neg"})
_POOLS = frozenset({"AveragePool", "GlobalAveragePool"})
_REDUCES = frozenset({"ReduceMean", "ReduceSum"})


def linked(node: ir.Node, value: ir.Value, axis: int) -> list[tuple[ir.Value, int]]:
    """Return the values that a node makes one with one of its inputs or outputs, each with the axis of its channels.

    Parameters
    ----------
    node
        Any operator.
    value
        An input or an output of it.
    axis
        Where the value's channels are, counted from the last axis.

    Returns
    -------
    list
        Empty if the node does more to the channels than pass them on. Constants are left out: one constant added in two
        places does not make these one.
    """
    width = length(value, axis)
    if width is None:
        return []
    if is_standard(node, "Add", "Sub"):
        ends = [input_of(node, 0), input_of(node, 1), node.outputs[0]]
        fit = all(length(end, axis) == width for end in ends)
        return [(end, axis) for end in ends if end is not value and not is_fixed(end)] if fit else []
    if is_standard(node, "Concat"):
        shape, at = node.outputs[0].shape, node.attributes.get_int("axis", 0)
        if shape is None or (at if at < 0 else at - len(shape)) == axis:
            return []
        around = [end for end in (*node.inputs, *node.outputs) if end is not None and end is not value]
        return [(end, axis) for end in around if not is_fixed(end)]
    return _along(node, value, axis, width)


def _along(node: ir.Node, value: ir.Value, axis: int, width: int) -> list[tuple[ir.Value, int]]:
    """Do what `linked` does for an operator with one input of data."""
    data, results = _passed(node)
    if data is None:
        return []
    if value is data:
        moves = [(end, _moved_axis(node, data, end, axis, width)) for end in results]
        return [(end, at) for end, at in moves if at is not None]
    for at in range(-len(data.shape or ()), 0):
        if value in results and length(data, at) == width and _moved_axis(node, data, value, at, width) == axis:
            return [(data, at)]
    return []


def length(value: ir.Value, axis: int) -> int | None:
    """Return how many elements there are along an axis counted from the last: 1 in front of the first, None if open."""
    if value.shape is None:
        return None
    count = value.shape[axis] if -axis <= len(value.shape) else 1
    return count if isinstance(count, int) else None


def is_table(node: ir.Node) -> bool:
    """Tell whether a node looks up rows of a constant matrix."""
    if not is_standard(node, "Gather") or node.attributes.get_int("axis", 0) != 0:
        return False
    table, indices = constant_tensor(node.inputs[0]), node.inputs[1]
    return table is not None and len(table.shape) == 2 and constant_tensor(indices) is None


def is_fixed(value: ir.Value | None) -> bool:
    """Tell whether a value holds constants alone, whatever part of them the lengths of the inputs choose."""
    for _ in range(8):
        if constant_tensor(value) is not None:
            return True
        node = None if value is None else value.producer()
        if node is None or not is_standard(node, *MOVES, "Cast") or is_table(node):
            return False
        value = node.inputs[0]
    return False


def _passed(node: ir.Node) -> tuple[ir.Value | None, tuple[ir.Value, ...]]:
    """Return the input that an operator may pass on along its channels, and its outputs; None if there is none."""
    if is_standard(node, *_SAME, *_POOLS, *_REDUCES) or (is_standard(node, *MOVES) and not is_table(node)):
        return node.inputs[0], tuple(node.outputs[:1] if node.op_type == "Dropout" else node.outputs)
    if is_standard(node, "Mul", "Div"):
        data = input_of(node, 0)
        if node.op_type == "Mul" and (scalar(data) is not None or _is_narrow(data, input_of(node, 1))):
            data = input_of(node, 1)
        return data, (node.outputs[0],)
    return None, ()


def _is_narrow(value: ir.Value, beside: ir.Value) -> bool:
    """Tell whether a factor has fewer elements per position than the value beside it."""
    return length(value, -1) == 1 and length(beside, -1) != 1


def _moved_axis(node: ir.Node, data: ir.Value, result: ir.Value, axis: int, width: int) -> int | None:
    """Return where the channels of the data stand in a result, None if the operator does not leave them as they are."""
    if is_standard(node, *_SAME):
        return axis
    if is_standard(node, "Mul", "Div"):
        factor = node.inputs[1] if node.inputs[0] is data else node.inputs[0]
        return axis if factor is not None and length(factor, axis) == 1 else None
    if data.shape is None or result.shape is None:
        return None
    if is_standard(node, *_POOLS):
        return axis if axis == 1 - len(data.shape) else None
    if is_standard(node, *_REDUCES):
        return _reduced_axis(node, axis, len(data.shape))
    cut = is_standard(node, "Slice", "Split", "Expand", "Tile", "Gather")
    return (_cut_axis if cut else _shaped_axis)(node, data, result, axis, width)


def _reduced_axis(node: ir.Node, axis: int, rank: int) -> int | None:
    """Follow the channels through a mean or sum over other axes."""
    numbers = evaluate(node.inputs[1]) if len(node.inputs) > 1 else None
    gone = set() if numbers is None else {int(number) % rank for number in numbers.reshape(-1)}
    if not gone or axis + rank in gone:
        return None
    return axis if node.attributes.get_int("keepdims", 1) else axis + sum(1 for at in gone if at > axis + rank)


def _cut_axis(node: ir.Node, data: ir.Value, result: ir.Value, axis: int, width: int) -> int | None:
    """Follow the channels through what takes parts of other axes, or repeats them."""
    rank = len(data.shape or ())
    if is_standard(node, "Gather"):
        index = node.inputs[1].shape if node.inputs[1] is not None else None
        cut = node.attributes.get_int("axis", 0) % rank
        if index is None or cut == axis + rank:
            return None
        return axis if cut < axis + rank else axis + 1 - len(index)
    if is_standard(node, "Slice", "Split"):
        numbers = evaluate(node.inputs[3]) if node.op_type == "Slice" and len(node.inputs) > 3 else None
        first = [node.attributes.get_int("axis", 0)] if node.op_type == "Split" else list(range(rank))
        cut_axes = first if numbers is None else [int(number) for number in numbers.reshape(-1)]
        return None if any(cut % rank == axis + rank for cut in cut_axes) else axis
    return axis if length(result, axis) == width else None


def _shaped_axis(node: ir.Node, data: ir.Value, result: ir.Value, axis: int, width: int) -> int | None:
    """Follow the channels through Transpose, Reshape and the like by their labels."""
    numbers = labels(data, axis)
    results = None if numbers is None else moved(node, numbers)
    if results is None:
        return None
    array = results[0]
    for at in range(-array.ndim, 0):
        if array.shape[at] == width:
            expected = np.arange(width).reshape([-1] + [1] * (-at - 1))
            if (array == expected).all():
                return at
    return None
