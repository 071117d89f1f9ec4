"""Write shapes that a graph computes as constants: numbers where they are known, 0 and -1 where axes stay open."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from qcompile.core.contract import Effect
from qcompile.passes import structure
from qcompile.passes.canonicalize.editing import add_constant, remove_unused
from qcompile.passes.canonicalize.shape_contents import INTEGERS, RULES, Known, declared_axes, study
from qcompile.passes.canonicalize.trace_axes import Axes, Element


@dataclass(frozen=True)
class FoldShapes(ir.passes.InPlacePass):
    """Replace Shape → Gather → Concat → Reshape by a Reshape to a constant, and what is computed from known axes.

    Open axes stay open: Reshape copies an axis for 0 and works one out for -1, and Expand leaves one alone for 1.
    Two axes of the same name are taken for equally long, as ONNX defines it.
    """

    effect: ClassVar[Effect] = Effect.EXACT

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite the main graph in place; branches and bodies keep their shapes."""
        graph = model.graph
        known = study(graph)
        modified = False
        for node in graph:
            shape = None
            if structure.is_standard(node, "Reshape"):
                shape = _reshape(node, known)
            elif structure.is_standard(node, "Expand"):
                shape = _expand(node, known)
            if shape is not None:
                node.replace_input_with(1, _constant(graph, node, 1, shape))
                modified = True
            for index, value in enumerate(node.inputs):
                modified |= _settle(graph, node, index, value, known)
        modified |= remove_unused(model)
        modified |= _annotate(known.axes)
        return ir.passes.PassResult(model, modified)


def _annotate(axes: Mapping[ir.Value, Axes]) -> bool:
    """Note the axes that were found; outputs keep what the model declares."""
    modified = False
    for value, found in axes.items():
        if not value.is_graph_output() and declared_axes(value) != found:
            value.shape = ir.Shape(found)
            modified = True
    return modified


def _settle(graph: ir.Graph, node: ir.Node, index: int, value: ir.Value | None, known: Known) -> bool:
    """Let a node read a constant where all numbers of a computed shape are known."""
    content = known.numbers.get(value) if value is not None else None
    # What itself computes shapes needs no constants: it disappears with its readers.
    if value is None or content is None or content.numbers is None or value.dtype not in INTEGERS:
        return False
    if (
        structure.is_standard(node, *RULES)
        and node.outputs[0] in known.numbers
        and not node.outputs[0].is_graph_output()
    ):
        return False
    array = np.array(content.numbers, value.dtype.numpy())
    node.replace_input_with(
        index, add_constant(graph, f"{value.name}_known", array.reshape(() if content.scalar else -1))
    )
    return True


def _constant(graph: ir.Graph, node: ir.Node, index: int, numbers: Sequence[int]) -> ir.Value:
    value = node.inputs[index]
    assert value is not None
    return add_constant(graph, f"{value.name}_of_{node.outputs[0].name}", np.array(numbers, np.int64))


def _reshape(node: ir.Node, known: Known) -> list[int] | None:
    """Return the shape as constants, or None if it is one already or two axes stay unknown."""
    content = known.content_of(node.inputs[1])
    if content is None or structure.constant_tensor(node.inputs[1]) is not None:
        return None
    if node.attributes.get_int("allowzero", 0):
        return None
    return spelled(content.elements, known.axes_of(node.inputs[0]))


def spelled(wanted: Sequence[Element], axes: Sequence[Element] | None) -> list[int] | None:
    """Write a shape as the constant of a Reshape of something with these axes, or None if one -1 is not enough."""
    numbers = []
    for index, element in enumerate(wanted):
        if isinstance(element, int):
            numbers.append(element)
        else:
            copied = element is not None and axes is not None and index < len(axes) and axes[index] == element
            numbers.append(0 if copied else -1)
    # Zero elements leave nothing to work an axis out from.
    return numbers if numbers.count(-1) <= 1 else None


def _expand(node: ir.Node, known: Known) -> list[int] | None:
    """Return a constant that expands alike: 1 where an axis is to have the length that it has."""
    content, axes = known.content_of(node.inputs[1]), known.axes_of(node.inputs[0])
    if content is None or axes is None or structure.constant_tensor(node.inputs[1]) is not None:
        return None
    own: Axes = (*((1,) * (len(content.elements) - len(axes))), *axes)
    own = own[len(own) - len(content.elements) :]
    numbers = []
    for element, axis in zip(content.elements, own, strict=True):
        if isinstance(element, int):
            numbers.append(element)
        elif element is not None and element == axis:
            numbers.append(1)
        else:
            return None
    return numbers
