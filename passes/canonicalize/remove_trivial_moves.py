"""Remove moves of data that move nothing, and join those that follow one another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from qcompile.core.contract import Effect
from qcompile.passes import structure
from qcompile.passes.canonicalize.editing import add_constant, bypass, only_reader, remove_unused, tensor_of
from qcompile.passes.canonicalize.shape_contents import declared_axes

#: Of one operand these give that operand.
OF_ONE = ("Concat", "Sum", "Mean", "Max", "Min")


@dataclass(frozen=True)
class RemoveTrivialMoves(ir.passes.InPlacePass):
    """Drop a Slice of everything, a Pad of nothing, an Expand to the shape that is there; join nested Slice and Concat.

    A Slice of a Slice along other axes is one Slice; a Concat that only another Concat along the same axis reads is a
    part of that.
    """

    effect: ClassVar[Effect] = Effect.EXACT

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite the main graph in place."""
        modified = False
        for node in list(model.graph):
            if node.graph is None or not node.inputs or node.inputs[0] is None:
                continue
            if _moves_nothing(node):
                modified |= bypass(node, node.inputs[0])
            elif structure.is_standard(node, "Slice"):
                modified |= _join_slices(model.graph, node)
            elif structure.is_standard(node, "Concat"):
                modified |= _join_concats(node)
        modified |= remove_unused(model)
        return ir.passes.PassResult(model, modified)


def _moves_nothing(node: ir.Node) -> bool:
    if structure.is_standard(node, *OF_ONE):
        return len(node.inputs) == 1
    if structure.is_standard(node, "Split"):
        return len(node.outputs) == 1
    if structure.is_standard(node, "Pad"):
        return _all(node, 1, 0)
    if structure.is_standard(node, "Tile"):
        return _all(node, 1, 1)
    if structure.is_standard(node, "Expand"):
        return _expands_nothing(node)
    return structure.is_standard(node, "Slice") and _keeps_everything(node)


def _all(node: ir.Node, index: int, number: int) -> bool:
    numbers = tensor_of(node.inputs[index])
    return numbers is not None and all(element == number for element in numbers)


def _expands_nothing(node: ir.Node) -> bool:
    wanted, axes = tensor_of(node.inputs[1]), declared_axes(node.inputs[0]) if node.inputs[0] is not None else None
    if wanted is None or axes is None or len(wanted) > len(axes):
        return False
    return all(length in (1, axis) for length, axis in zip(wanted[::-1], axes[::-1], strict=False))


def _slices(node: ir.Node) -> dict[int, tuple[int, int, int]] | None:
    """Return start, end and step by axis, counted from the front, or None if they are not constants."""
    value = node.inputs[0]
    axes = declared_axes(value) if value is not None else None
    starts, ends = (tensor_of(given) for given in node.inputs[1:3])
    if axes is None or starts is None or ends is None:
        return None
    sliced, steps = (
        tensor_of(node.inputs[index]) if index < len(node.inputs) and node.inputs[index] is not None else default
        for index, default in ((3, list(range(len(starts)))), (4, [1] * len(starts)))
    )
    if sliced is None or steps is None:
        return None
    return {
        axis % len(axes): (start, end, step) for axis, start, end, step in zip(sliced, starts, ends, steps, strict=True)
    }


def _keeps_everything(node: ir.Node) -> bool:
    slices = _slices(node)
    axes = declared_axes(node.inputs[0]) if node.inputs[0] is not None else None
    if slices is None or axes is None:
        return False
    for axis, (start, end, step) in slices.items():
        length = axes[axis]
        # Exporters write the largest integers where they mean the end; no axis is so long.
        enough = end >= (length if isinstance(length, int) else 2**31 - 1)
        if start != 0 or step != 1 or not enough:
            return False
    return True


def _join_slices(graph: ir.Graph, node: ir.Node) -> bool:
    value = node.inputs[0]
    first = value.producer() if value is not None and only_reader(value) is node else None
    if first is None or not structure.is_standard(first, "Slice") or first.inputs[0] is None:
        return False
    inner, outer = _slices(first), _slices(node)
    if inner is None or outer is None or set(inner) & set(outer):
        return False
    joined = inner | outer
    columns: list[Any] = [*zip(*joined.values(), strict=True)]
    starts, ends, steps = columns
    node.resize_inputs(5)
    node.replace_input_with(0, first.inputs[0])
    for index, (what, numbers) in enumerate(
        {"starts": starts, "ends": ends, "axes": list(joined), "steps": steps}.items(), start=1
    ):
        name = f"{node.outputs[0].name}_{what}"
        node.replace_input_with(index, add_constant(graph, name, np.array(numbers, np.int64)))
    return True


def _axis(node: ir.Node) -> int | None:
    axis, shape = node.attributes.get_int("axis", 0), node.outputs[0].shape
    return axis if axis >= 0 else None if shape is None else axis + len(shape)


def _join_concats(node: ir.Node) -> bool:
    parts: list[ir.Value | None] = []
    for value in node.inputs:
        inner = value.producer() if value is not None and only_reader(value) is node else None
        joins = inner is not None and structure.is_standard(inner, "Concat") and _axis(inner) is not None
        parts.extend(inner.inputs if joins and inner is not None and _axis(inner) == _axis(node) else [value])
    if len(parts) == len(node.inputs):
        return False
    node.resize_inputs(len(parts))
    for index, value in enumerate(parts):
        node.replace_input_with(index, value)
    return True
