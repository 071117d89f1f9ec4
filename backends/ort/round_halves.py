"""What a device computes in float16, by a processor: every result in float32, then rounded to float16.

ONNX Runtime's CPU provider has few kernels of float16. It computes the others in float32 and drops the rounding between
two of them, so that what overflows on a device would not overflow there.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from qcompile.backends.ort.half_values import HALF, SINGLE
from qcompile.backends.ort.kernel_table import schema_of
from qcompile.core import model as models
from qcompile.core import scratch
from qcompile.passes import structure

#: Results that are among the operands, or one of a few numbers: there is nothing to round.
EXACT = frozenset({
    "Concat", "Expand", "Flatten", "Gather", "GatherElements", "GatherND", "Identity", "Max", "MaxPool", "Min", "Neg",
    "Pad", "Relu", "Reshape", "Slice", "Split", "Squeeze", "Tile", "Transpose", "Unsqueeze", "Where",
})  # fmt: skip


def rounded(model: ir.Model) -> ir.Model:
    """Return a model that computes in float32 and rounds each result that was float16.

    Parameters
    ----------
    model : onnx_ir.Model
        Topologically sorted; types of inner values need not be known. Inputs and outputs keep theirs.
    """
    copy = model.clone()
    half = _halves(copy)
    for value in list(copy.graph.initializers.values()):
        if value in half and value.const_value is not None:
            value.const_value = scratch.tensor(value.const_value.numpy().astype(np.float32), value.name)
            value.type = ir.TensorType(SINGLE)
    for value in copy.graph.inputs:
        if value in half and value.const_value is None and value.uses():
            _widen(copy.graph, value, list(value.uses()))
    for node in list(copy.graph):
        for value in node.outputs:
            if value in half:
                _round(copy.graph, node, value)
    copy.graph.sort()
    return copy


def _halves(model: ir.Model) -> set[ir.Value]:
    """Return the values of the main graph that are float16."""
    half = {value for value in (*model.graph.inputs, *model.graph.initializers.values())
            if (value.dtype if value.const_value is None else value.const_value.dtype) is HALF}  # fmt: skip
    opset = models.opset(model)
    for node in model.graph:
        half.update(_half_outputs(node, half, opset))
    return half


def _half_outputs(node: ir.Node, half: set[ir.Value], opset: int) -> list[ir.Value]:
    if structure.is_standard(node, "Cast"):
        return [node.outputs[0]] if node.attributes.get_int("to", 0) == HALF else []
    if structure.is_standard(node, "ConstantOfShape"):
        value = node.attributes.get("value")
        return [node.outputs[0]] if value is not None and value.as_tensor().dtype is HALF else []
    schema = schema_of(node.op_type, opset) if node.domain in ("", "ai.onnx") else None
    if schema is None:
        # Contrib operators that qcompile writes have their activations' type.
        return [value for value in node.outputs[:1] if node.inputs and node.inputs[0] in half]
    last = len(schema.inputs) - 1
    types = {schema.inputs[min(index, last)].type_str for index, value in enumerate(node.inputs) if value in half}
    outputs = schema.outputs
    return [value for index, value in enumerate(node.outputs)
            if outputs[min(index, len(outputs) - 1)].type_str in types]  # fmt: skip


def _widen(graph: ir.Graph, value: ir.Value, uses: Sequence[tuple[ir.Node, int]]) -> None:
    """Give readers of a float16 value its float32 one."""
    cast = ir.node("Cast", [value], {"to": int(SINGLE)}, name=f"{value.name}_widened")
    cast.outputs[0].name = f"{value.name}_widened"
    for node, index in uses:
        node.replace_input_with(index, cast.outputs[0])
    graph.append(cast)


def _round(graph: ir.Graph, node: ir.Node, value: ir.Value) -> None:
    uses = list(value.uses())
    if structure.is_standard(node, "Cast"):
        if uses:
            _widen(graph, value, uses)
        return
    if node.op_type == "ConstantOfShape":
        array = node.attributes["value"].as_tensor().numpy().astype(np.float32)
        node.attributes["value"] = ir.AttrTensor("value", ir.tensor(array))
    value.type = None
    if structure.is_standard(node, *EXACT):
        return
    half = ir.node("Cast", [value], {"to": int(HALF)}, name=f"{value.name}_rounded")
    half.outputs[0].name = f"{value.name}_rounded"
    graph.append(half)
    _widen(graph, half.outputs[0], uses)
