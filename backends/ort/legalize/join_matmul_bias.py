"""Write an integer MatMul with the bias behind it as the one kernel that ONNX Runtime has for both."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir
import onnx_ir.passes.common as common_passes

from qcompile.core.contract import Effect
from qcompile.passes import structure

DOMAIN = "com.microsoft"


@dataclass(frozen=True)
class JoinMatMulBias(ir.passes.InPlacePass):
    """Turn DequantizeLinear, DequantizeLinear → MatMul (→ Add of a bias) into MatMulIntegerToFloat.

    ONNX Runtime does so by itself, but leaves the bias to an Add, which passes over the result once more; and with
    static shapes it first makes a float Gemm of MatMul and Add, whose weights are then dequantized in every run
    (MiniLM-L6 takes 3.2 times float's time).
    """

    effect: ClassVar[Effect] = Effect.CLOSE

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite in place."""
        modified = False
        for node in list(model.graph):
            if structure.is_standard(node, "MatMul") and _on_codes(node):
                _join(model.graph, node)
                modified = True
        if modified:
            model.opset_imports[DOMAIN] = 1
        common_passes.RemoveUnusedNodesPass()(model)
        return ir.passes.PassResult(model, modified)


def _on_codes(node: ir.Node) -> bool:
    """Tell whether a MatMul reads an activation's codes and constant weights', and leaves in float."""
    activation, weights = (structure.produced_by(value, "DequantizeLinear") for value in node.inputs)
    if activation is None or weights is None or len(activation.inputs) < 3 or len(weights.inputs) < 3:
        return False
    codes = structure.constant_tensor(weights.inputs[0])
    if codes is None or len(codes.shape) != 2 or codes.dtype is not ir.DataType.INT8:
        return False
    axis = weights.attributes.get_int("axis", 1)
    by_column = axis in (1, -1) and weights.attributes.get_int("block_size", 0) == 0
    readers = structure.readers(node.outputs[0])
    requantized = readers and all(structure.is_standard(reader, "QuantizeLinear") for reader in readers)
    return _has_one_scale(activation) and by_column and not requantized


def _has_one_scale(activation: ir.Node) -> bool:
    """Tell whether a DequantizeLinear gives an activation of one scale: a constant, or that of each run's values."""
    if structure.produced_by(activation.inputs[0], "DynamicQuantizeLinear") is not None:
        return True
    scale, zero_point = structure.constant(activation.inputs[1]), structure.constant_tensor(activation.inputs[2])
    if structure.constant_tensor(activation.inputs[0]) is not None or scale is None or zero_point is None:
        return False
    return scale.size == 1 and zero_point.dtype in (ir.DataType.UINT8, ir.DataType.INT8)


def _join(graph: ir.Graph, node: ir.Node) -> None:
    activation, weights = (structure.produced_by(value, "DequantizeLinear") for value in node.inputs)
    assert activation is not None and weights is not None
    last, bias = node, None
    add = structure.only_reader(node.outputs[0])
    # One that asks for the product's shape would be left without it.
    if add is not None and structure.is_standard(add, "Add") and len(structure.readers(node.outputs[0])) == 1:
        bias = _bias(add, node, weights.inputs[0])
        last = add if bias is not None else node
    operands = [activation.inputs[0], weights.inputs[0], activation.inputs[1], weights.inputs[1],
                activation.inputs[2], weights.inputs[2], bias]  # fmt: skip
    new = ir.node("MatMulIntegerToFloat", operands[: 7 if bias is not None else 6], domain=DOMAIN, name=node.name)
    old = [node] if last is node else [node, last]
    ir.convenience.replace_nodes_and_values(graph, last, old, [new], last.outputs, new.outputs)


def _bias(add: ir.Node, node: ir.Node, weights: ir.Value | None) -> ir.Value | None:
    """Return what an Add puts on top of a MatMul if it is one number per column."""
    value = structure.other_input(add, node.outputs[0])
    bias, codes = structure.constant_tensor(value), structure.constant_tensor(weights)
    if value is None or bias is None or codes is None or bias.dtype is not ir.DataType.FLOAT:
        return None
    return value if tuple(bias.shape) == (codes.shape[1],) else None
