"""What a small constant keeps from zero, and float16 would not: behind it a quotient or a logarithm is no number."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from qcompile.passes import structure

#: By operator, the operand that zero is no number for, or after a Sqrt or Pow may be none for.
SINGULAR = {"Div": 1, "Log": 0, "Pow": 0, "Reciprocal": 0, "Sqrt": 0}
#: What moves a value, each of its numbers as it is.
MOVES = ("Expand", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze")


def singular_readers(graph: ir.Graph) -> Iterator[tuple[ir.Node, str]]:
    """Yield the nodes that must read a value in float32, each with the reason.

    What adds a positive constant keeps a value that is not negative above it, as a Max or a Clip does. Where float16
    has nothing but zero for that constant, what divides by the value or takes its logarithm has to read it as it is,
    whatever the largest one that was measured.

    Parameters
    ----------
    graph : onnx_ir.Graph
        Sorted.
    """
    floors: dict[ir.Value, float] = {}
    for node in graph:
        if (floor := _floor(node, floors)) is not None and np.float16(floor) == 0:
            floors[node.outputs[0]] = floor
        operand = SINGULAR.get(node.op_type) if structure.is_standard(node, *SINGULAR) else None
        value = node.inputs[operand] if operand is not None else None
        if value is not None and value in floors:
            yield node, f"'{value.name}' may be as small as {floors[value]:.3g}, which is zero in float16"


def _floor(node: ir.Node, floors: dict[ir.Value, float]) -> float | None:
    """Return what a node's result is no less than, where a positive constant says it."""
    if structure.is_standard(node, "Add", "Max"):
        return next(filter(None, map(_positive, node.inputs)), None)
    if structure.is_standard(node, "Clip"):
        return _positive(node.inputs[1]) if len(node.inputs) > 1 else None
    known = floors.get(structure.input_of(node, 0)) if structure.is_standard(node, "Sqrt", *MOVES) else None
    if known is None:
        return None
    return float(np.sqrt(known)) if node.op_type == "Sqrt" else known


def _positive(value: ir.Value | None) -> float | None:
    array = None if value is None else structure.constant(value)
    if array is None or array.dtype != np.float32 or not array.size or not (array > 0).all():
        return None
    return float(array.min())
