"""Write Reshape, Flatten, Squeeze and Unsqueeze in a row as one Reshape, and drop those that change nothing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from qcompile.core.contract import Effect
from qcompile.passes import structure
from qcompile.passes.canonicalize.editing import add_constant, bypass, remove_unused, replace
from qcompile.passes.canonicalize.fold_shapes import spelled
from qcompile.passes.canonicalize.shape_contents import declared_axes

VIEWS = ("Reshape", "Flatten", "Squeeze", "Unsqueeze")


@dataclass(frozen=True)
class MergeViews(ir.passes.InPlacePass):
    """Join operators that only look at the same elements in another shape.

    Open axes stay open where one Reshape can say so: with 0 for an axis that stays in its place, and one -1.
    """

    effect: ClassVar[Effect] = Effect.EXACT

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite the main graph in place."""
        graph, modified = model.graph, False
        for node in list(graph):
            if not structure.is_standard(node, *VIEWS):
                continue
            value = node.inputs[0]
            assert value is not None
            sources = list(_origins(value, graph))[::-1]
            after = declared_axes(node.outputs[0])
            same = [source for source in (*sources, value) if after == declared_axes(source)]
            if same and after is not None and None not in after:
                modified |= bypass(node, same[0])
                continue
            for source in sources:
                if (shape := _spelled(node, source)) is not None:
                    constant = add_constant(graph, f"{node.outputs[0].name}_shape", np.array(shape, np.int64))
                    replace(node, ir.node("Reshape", [source, constant]))
                    modified = True
                    break
        modified |= remove_unused(model)
        return ir.passes.PassResult(model, modified)


def _origins(value: ir.Value, graph: ir.Graph) -> Iterator[ir.Value]:
    """Yield what a value is a view of, and what that is a view of, until something is computed."""
    source: ir.Value | None = value
    while source is not None and (producer := source.producer()) is not None:
        source = producer.inputs[0] if producer.graph is graph and _is_view(producer) else None
        if source is not None:
            yield source


def _is_view(node: ir.Node) -> bool:
    if not structure.is_standard(node, "Transpose"):
        return structure.is_standard(node, *VIEWS)
    axes = declared_axes(node.inputs[0]) if node.inputs[0] is not None else None
    if axes is None:
        return False
    # Axes of length 1 may go anywhere; the others must keep their order.
    order = [index for index in node.attributes.get_ints("perm", ()) or range(len(axes))[::-1] if axes[index] != 1]
    return order == sorted(order)


def _spelled(node: ir.Node, source: ir.Value) -> list[int] | None:
    axes = declared_axes(node.outputs[0])
    if axes is None or 0 in axes:
        return None
    return spelled(axes, declared_axes(source))
