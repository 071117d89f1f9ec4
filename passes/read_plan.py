"""Read what a model computes on codes, if it was quantized before it came here (QAT, or another tool's Q/DQ)."""

from __future__ import annotations

import onnx_ir as ir

from qcompile.core.plan import OpPlan, Precision
from qcompile.core.target import OpKind, Target
from qcompile.passes import structure


def is_quantized(model: ir.Model) -> bool:
    """Tell whether a model holds Q/DQ pairs of its own."""
    return any(structure.is_standard(node, "QuantizeLinear", "DequantizeLinear") for node in model.graph.all_nodes())


def read_ops(model: ir.Model, target: Target) -> dict[str, OpPlan]:
    """Say which operators of a QDQ model compute on codes; its scales stay where they are, in the graph."""
    ops = {}
    for node in model.graph.all_nodes():
        if structure.is_standard(node, "QuantizeLinear", "DequantizeLinear"):
            continue
        rule = target.ops.get(node.op_type)
        computes = rule is not None and rule.kind in (OpKind.LINEAR, OpKind.ELEMENTWISE)
        floats = [value for value in node.inputs if structure.is_float32(value)]
        if computes and floats and all(_is_dequantized(value) for value in floats):
            ops[structure.node_name(node)] = OpPlan(node.op_type, Precision.INTEGER)
        else:
            ops[structure.node_name(node)] = OpPlan(node.op_type, Precision.FLOAT, "float in the model that came in")
    return ops


def _is_dequantized(value: ir.Value | None) -> bool:
    producer = value.producer() if value is not None else None
    return producer is not None and producer.op_type == "DequantizeLinear"
