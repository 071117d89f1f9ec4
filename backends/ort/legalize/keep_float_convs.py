"""Keep ONNX Runtime from quantizing the float weights of a Conv between Q/DQ pairs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from qcompile.backends.ort.legalize.unpack_weights import leaves_as_codes
from qcompile.core.contract import Effect
from qcompile.passes import structure

DOMAIN = "com.microsoft"


@dataclass(frozen=True)
class KeepFloatConvs(ir.passes.InPlacePass):
    """Write a float Conv that reads and leaves codes as FusedConv, with the activation behind it.

    Where float weights stand between a DequantizeLinear and a QuantizeLinear, ONNX Runtime's optimizer gives them int8
    codes with one scale for all (its WeightBiasQuantization), and runs an integer kernel that nobody asked for. It
    knows Conv only; FusedConv, which it makes of Conv itself further on, has the same kernels.
    """

    effect: ClassVar[Effect] = Effect.EXACT

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite in place."""
        modified = False
        for node in list(model.graph):
            if structure.is_standard(node, "Conv") and _would_be_quantized(node):
                _rewrite(model.graph, node)
                modified = True
        if modified:
            model.graph.opset_imports[DOMAIN] = 1
        return ir.passes.PassResult(model, modified)


def _would_be_quantized(node: ir.Node) -> bool:
    if structure.produced_by(node.inputs[structure.WEIGHT_INPUT], "DequantizeLinear") is not None:
        return False  # it is to compute in integers
    if structure.produced_by(node.inputs[0], "DequantizeLinear") is None:
        return False
    return structure.is_float32(node.inputs[structure.WEIGHT_INPUT]) and leaves_as_codes(node.outputs[0])


def _end(node: ir.Node) -> ir.Node:
    """Return the activation behind a Conv that FusedConv knows too, or the Conv itself."""
    reader = structure.only_reader(node.outputs[0])
    if reader is not None and (structure.is_standard(reader, "Relu") or _bounds(reader) is not None):
        return reader
    return node


def _bounds(node: ir.Node) -> list[float] | None:
    """Return the bounds of a Clip if both are constants."""
    if not structure.is_standard(node, "Clip") or len(node.inputs) != 3:
        return None
    found = [float(bound.reshape(())) for value in node.inputs[1:] if (bound := structure.constant(value)) is not None]
    return found if len(found) == 2 else None


def _rewrite(graph: ir.Graph, node: ir.Node) -> None:
    end = _end(node)
    attributes = dict(node.attributes)
    if end is not node:
        attributes["activation"] = ir.AttrString("activation", end.op_type)
        if (bounds := _bounds(end)) is not None:
            attributes["activation_params"] = ir.AttrFloat32s("activation_params", bounds)
    fused = ir.Node(DOMAIN, "FusedConv", node.inputs, attributes.values(), num_outputs=1, name=node.name)
    result, replaced = end.outputs[0], fused.outputs[0]
    nodes = [node] if end is node else [node, end]
    ir.convenience.replace_nodes_and_values(graph, end, nodes, [fused], [result], [replaced])
