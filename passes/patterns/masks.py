"""The input that tells which positions of a sequence count: an attention's mask."""

from __future__ import annotations

import onnx_ir as ir

from qcompile.passes import structure

#: What a mask goes through on its way to the scores: every element for itself, or moved.
ELEMENTWISE = (
    "Add", "And", "Cast", "Clip", "Concat", "Div", "Equal", "Expand", "Flatten", "Greater", "GreaterOrEqual",
    "Identity", "Less", "LessOrEqual", "Max", "Min", "Mul", "Neg", "Not", "Or", "Reshape", "Slice", "Squeeze", "Sub",
    "Tile", "Transpose", "Unsqueeze", "Where",
)  # fmt: skip
#: What puts a mask onto scores.
MASKING = ("Add", "Min", "Sub", "Where")
#: What may stand between that and the Softmax.
BETWEEN = ("Cast", "Clip", "Div", "Identity", "Max", "Mul", "Reshape", "Squeeze", "Transpose", "Unsqueeze", *MASKING)


def attention_mask(graph: ir.Graph) -> ir.Value | None:
    """Return the one input that masks every Softmax of a graph, or None.

    A mask is an input of which, with constants, something is made element by element that is added to scores or chooses
    among them. Whether it really keeps positions out is for running the model to tell.
    """
    inputs = [value for value in graph.inputs if not value.is_initializer()]
    made_of: dict[ir.Value, ir.Value] = {value: value for value in inputs}
    fixed: set[ir.Value] = set()
    for node in graph:
        read = [value for value in node.inputs if value is not None and structure.constant_tensor(value) is None]
        moving = [value for value in read if value not in fixed]
        if not moving or structure.is_standard(node, "Shape", "Size"):
            fixed.update(node.outputs)
        elif structure.is_standard(node, *ELEMENTWISE):
            sources = {made_of.get(value) for value in moving}
            if len(sources) == 1 and (source := sources.pop()) is not None:
                made_of.update(dict.fromkeys(node.outputs, source))
    found = [_masks(structure.input_of(node, 0), made_of) for node in graph if structure.is_standard(node, "Softmax")]
    common = set.intersection(*found) if found else set()
    return common.pop() if len(common) == 1 and len(inputs) > 1 else None


def _masks(scores: ir.Value, made_of: dict[ir.Value, ir.Value]) -> set[ir.Value]:
    """Return the inputs that mask what goes into a Softmax."""
    node = scores.producer()
    if node is None or not structure.is_standard(node, *BETWEEN):
        return set()
    found = set()
    for value in node.inputs:
        if value is None:
            continue
        if structure.is_standard(node, *MASKING) and value in made_of:
            found.add(made_of[value])
        elif value not in made_of:
            found |= _masks(value, made_of)
    return found
