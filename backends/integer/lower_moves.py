"""Lower what moves codes: Reshape, Transpose, Concat, Slice, Split."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import onnx_ir as ir

from qcompile.backends.integer.operations import Concat, Slice
from qcompile.backends.integer.program import PLAIN
from qcompile.backends.integer.values import Codes, Grid, Pending, Writer, refuse, shape_of
from qcompile.passes import structure


def lower_reshape(writer: Writer, node: ir.Node, inputs: list[Codes]) -> Codes:
    """Lower a Reshape, Flatten, Squeeze or Unsqueeze: a view wherever the codes' order allows it."""
    x = inputs[0]
    shape = shape_of(node.outputs[0])
    if (order := order_behind(x.shape, shape, x.order)) is not None:
        result = replace(x, shape=shape, order=order)
        return replace(result, tensor=writer.viewed(x.tensor, result.stored))
    if len(shape) == 2 and shape[0] == 1:
        return Codes(writer.viewed(x.tensor, shape), shape, (0, 1), x.grid, x.levels, map=x)
    moved = writer.arranged(x, tuple(range(len(x.shape))))
    return replace(moved, tensor=writer.viewed(moved.tensor, shape), shape=shape, order=tuple(range(len(shape))))


def order_behind(before: Sequence[int], after: Sequence[int], order: Sequence[int]) -> tuple[int, ...] | None:
    """Return the order in which a reshaped value's axes are stored if no code moves, or None.

    Axes that become others together must be stored behind one another, as the model has them.

    Parameters
    ----------
    before, after : sequence of int
        The value's shapes in the model.
    order : sequence of int
        In which it is stored in front of the Reshape.
    """
    if 0 in before or 0 in after:
        return None
    groups = _groups(before, after)
    stored = [axis for axis in order if before[axis] != 1]
    starts: list[tuple[int, list[int]]] = []
    for old, new in groups:
        if not old:
            continue
        place = stored.index(old[0])
        if stored[place : place + len(old)] != old:
            return None
        starts.append((place, new))
    moved = [axis for _, new in sorted(starts, key=lambda start: start[0]) for axis in new]
    ones = [axis for axis in range(len(after)) if axis not in moved]
    # Axes of one element go to the front, where the batch stands.
    return (*ones, *moved)


def _groups(before: Sequence[int], after: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Return the smallest sets of axes, those of one element left out, that become one another."""
    old = [axis for axis, length in enumerate(before) if length != 1]
    new = [axis for axis, length in enumerate(after) if length != 1]
    groups = []
    while old or new:
        left, right = [old.pop(0)] if old else [], [new.pop(0)] if new else []
        while (sizes := (math.prod(before[a] for a in left), math.prod(after[a] for a in right)))[0] != sizes[1]:
            if sizes[0] < sizes[1]:
                left.append(old.pop(0))
            else:
                right.append(new.pop(0))
        groups.append((left, right))
    return groups


def lower_transpose(_: Writer, node: ir.Node, inputs: list[Codes]) -> Codes:
    """Lower a Transpose, which moves nothing: what it changes is how the model counts the axes."""
    x = inputs[0]
    rank = len(x.shape)
    permutation = tuple(node.attributes.get_ints("perm", tuple(reversed(range(rank)))))
    shape = tuple(x.shape[axis] for axis in permutation)
    return replace(x, shape=shape, order=tuple(permutation.index(axis) for axis in x.order))


def lower_concat(writer: Writer, node: ir.Node, inputs: list[Codes]) -> Pending | Codes:
    """Lower a Concat; where its inputs' scales differ they take that of its result."""
    parts = [writer.plain(value, node) for value in inputs]
    parts = [writer.arranged(part, parts[0].order) for part in parts]
    shape = shape_of(node.outputs[0])
    axis = parts[0].place_of(node.attributes.get_int("axis", 0))
    order = parts[0].order

    def finish(grid: Grid, low: int, high: int, name: str) -> str:
        if (low, high) != bounds_of(grid):
            refuse(node, "has a Relu or Clip behind it", "put it in front of the Concat")
        joined = tuple(writer.on_grid(part, grid, f"{part.tensor}_{name}", node).tensor for part in parts)
        output = writer.add_tensor(name, tuple(shape[place] for place in order), grid)
        return writer.write(Concat(node.name or name, joined, output, axis))

    if len(parts) != len([value for value in node.inputs if value is not None]):
        refuse(node, "joins constants too", "keep constants out of the quantized part")
    if all(part.grid.same(parts[0].grid) for part in parts):
        grid = parts[0].grid
        return Codes(finish(grid, *bounds_of(grid), str(node.outputs[0].name)), shape, order, grid)
    if any(part.grid.dtype in PLAIN for part in parts):
        refuse(node, "joins floats and codes", "quantize all of its inputs, or none")
    return Pending(node, shape, order, finish)


def bounds_of(grid: Grid) -> tuple[int, int]:
    """Return the lowest and the highest code; floats have none."""
    return (0, 0) if grid.dtype in PLAIN else (grid.low, grid.high)


def lower_slice(writer: Writer, node: ir.Node, inputs: list[Codes]) -> Codes:
    """Lower a Slice that goes forward."""
    x = writer.plain(inputs[0], node)
    rank = len(x.shape)
    given = [structure.constant(value) for value in node.inputs[1:]]
    if any(array is None for array in given[:2]):
        refuse(node, "cuts where the data say", "export the model with constant bounds")
    numbers = [[int(number) for number in array.reshape(-1)] if array is not None else None for array in given]
    starts = numbers[0] or []
    axes = numbers[2] if len(numbers) > 2 and numbers[2] is not None else list(range(len(starts)))
    steps = numbers[3] if len(numbers) > 3 and numbers[3] is not None else [1] * len(starts)
    if min(steps, default=1) < 1:
        refuse(node, "goes backward", "only a Slice that goes forward has an integer form")
    first, pace = [0] * rank, [1] * rank
    for start, axis, step in zip(starts, axes, steps, strict=True):
        length = x.shape[axis % rank]
        place = x.place_of(axis)
        first[place], pace[place] = min(max(start + length if start < 0 else start, 0), length), step
    shape = shape_of(node.outputs[0])
    return _cut(writer, node, x, shape, first, pace, str(node.outputs[0].name))


def picks_one(node: ir.Node) -> bool:
    """Tell whether a Gather takes one place of an activation, which a constant names."""
    if not structure.is_standard(node, "Gather") or structure.constant_tensor(node.inputs[0]) is not None:
        return False
    index = structure.constant(node.inputs[1])
    return index is not None and index.size == 1


def lower_pick(writer: Writer, node: ir.Node, inputs: list[Codes]) -> Codes:
    """Lower a Gather of one place, which is a Slice and a view of it."""
    if not picks_one(node):
        refuse(node, "picks several places, or what is computed", "pick one that is constant, or split its input")
    x = writer.plain(inputs[0], node)
    index, axis = structure.constant(node.inputs[1]), node.attributes.get_int("axis", 0) % len(x.shape)
    assert index is not None
    first, shape = [0] * len(x.shape), list(x.shape)
    first[x.place_of(axis)], shape[axis] = int(index.reshape(-1)[0]) % x.shape[axis], 1
    name = str(node.outputs[0].name)
    part = _cut(writer, node, x, tuple(shape), first, [1] * len(shape), f"{name}_one")
    return lower_reshape(writer, node, [part])


def lower_split(writer: Writer, node: ir.Node, inputs: list[Codes]) -> list[Codes]:
    """Lower a Split, a Slice for each of its outputs."""
    x = writer.plain(inputs[0], node)
    place = x.place_of(node.attributes.get_int("axis", 0))
    start, parts = 0, []
    for value in node.outputs:
        shape = shape_of(value)
        first = [0] * len(shape)
        first[place] = start
        parts.append(_cut(writer, node, x, shape, first, [1] * len(shape), str(value.name)))
        start += shape[x.order[place]]
    return parts


def _cut(
    writer: Writer, node: ir.Node, x: Codes, shape: tuple[int, ...], first: list[int], pace: list[int], name: str
) -> Codes:
    result = replace(x, shape=shape)
    if 0 in shape:
        refuse(node, "leaves nothing over", "remove what reads it")
    output = writer.add_tensor(name, result.stored, x.grid)
    return replace(
        result, tensor=writer.write(Slice(node.name or name, (x.tensor,), output, tuple(first), tuple(pace)))
    )
