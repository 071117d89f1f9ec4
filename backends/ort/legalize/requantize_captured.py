"""Keep dequantized values that subgraphs read apart from operators that only move them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from qcompile.core.contract import Effect
from qcompile.passes import structure

#: Operators behind which ONNX Runtime repeats a DequantizeLinear that stands in front of them.
MOVES = frozenset({"MaxPool", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze"})


@dataclass(frozen=True)
class RequantizeCaptured(ir.passes.InPlacePass):
    """Quantize a moved value again, by the scale that it has anyway, where a subgraph of an If or a Loop reads it.

    ONNX Runtime repeats Q and DQ behind operators that move values, and rewrites the inputs of whoever reads them; what
    a subgraph reads is among nobody's inputs, and it writes beyond their end (1.32: with assertions the process ends).
    Behind a Q and DQ of the model's own it has nothing to repeat. The values lie on that grid already.
    """

    effect: ClassVar[Effect] = Effect.EXACT

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite in place."""
        modified = False
        for node in list(model.graph):
            if node.op_type in MOVES and (source := _dequantized(node)) is not None:
                value = node.outputs[0]
                captured = [use for use in value.uses() if use.node.graph is not model.graph]
                if captured:
                    again = _again(node, source)
                    for user, index in captured:
                        user.replace_input_with(index, again)
                    modified = True
        return ir.passes.PassResult(model, modified)


def _dequantized(node: ir.Node) -> ir.Node | None:
    """Return the DequantizeLinear whose values an operator moves, perhaps behind others that do."""
    while node.op_type in MOVES:
        found = node.inputs[0].producer() if node.inputs and node.inputs[0] is not None else None
        if found is None or not structure.is_standard(found, found.op_type):
            return None
        node = found
    return node if node.op_type == "DequantizeLinear" else None


def _again(node: ir.Node, source: ir.Node) -> ir.Value:
    """Return the values of a node, quantized and dequantized as at the source."""
    value = node.outputs[0]
    parameters = list(source.inputs[1:])
    codes = ir.node("QuantizeLinear", [value, *parameters], name=f"{value.name}_requantize")
    real = ir.node("DequantizeLinear", [codes.outputs[0], *parameters], name=f"{value.name}_redequantize")
    codes.outputs[0].name, real.outputs[0].name = f"{value.name}_requantized", f"{value.name}_redequantized"
    assert node.graph is not None
    node.graph.insert_after(node, [codes, real])
    return real.outputs[0]
