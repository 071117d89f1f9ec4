"""Why an operator's constant weights cannot be integers, whatever the target runs."""

from __future__ import annotations

import onnx_ir as ir

from qcompile.core.target import OpKind
from qcompile.passes import structure


def linear_obstacle(node: ir.Node) -> str:
    """Return why a linear operator cannot be quantized, or nothing."""
    weight = structure.constant_tensor(node.inputs[structure.WEIGHT_INPUT])
    if weight is None:
        return _activation_obstacle(node)
    if weight.dtype is not ir.DataType.FLOAT or not structure.is_float32(node.inputs[0]):
        return f"its weights are {weight.dtype.name.lower()}, not float32"
    if node.op_type == "MatMul" and len(weight.shape) < 2:
        return "its weights are a vector"
    if weight.size == 0 or structure.constant_tensor(node.inputs[0]) is not None:
        return "it computes on constants only"
    return _gemm_obstacle(node) or _bias_obstacle(node, weight)


def multiplies_activations(node: ir.Node) -> bool:
    """Tell whether a MatMul has no constant operand, in floats."""
    values = list(node.inputs)
    return node.op_type == "MatMul" and all(
        value is not None
        and structure.is_float32(value)
        and structure.constant_tensor(value) is None
        and not value.is_initializer()
        for value in values
    )


def integer_obstacle(node: ir.Node) -> str:
    """Return why a linear operator cannot compute in integers, though its weights can be stored so; or nothing."""
    weight = structure.constant_tensor(node.inputs[structure.WEIGHT_INPUT]) if node.op_type == "MatMul" else None
    return "" if weight is None or len(weight.shape) == 2 else f"its weights have {len(weight.shape)} axes"


def stored_obstacle(node: ir.Node, fewest: int) -> str:
    """Return why the constants that a node reads cannot be stored as integers, or nothing."""
    stored = structure.stored_weights(node, OpKind.STORED)
    if not stored:
        return "its weights are no float32 constants"
    if any(value.const_value is not None and value.const_value.size < fewest for value, _ in stored):
        return "its constants are too small to be worth scales"
    if any(reader is not node for value, _ in stored for reader in structure.readers(value)):
        return "its constants are read by another operator too"
    return ""


def _activation_obstacle(node: ir.Node) -> str:
    """Return what stands where a linear operator's constant weights should."""
    if structure.constant_tensor(node.inputs[0]) is not None:
        return "its constant is the first operand"
    value = node.inputs[structure.WEIGHT_INPUT]
    if value is not None and value.is_initializer():
        return "its weights are an input with a default, which a caller may replace"
    return "both operands are activations" if node.op_type == "MatMul" else "its weights are not constant"


def _gemm_obstacle(node: ir.Node) -> str:
    if node.op_type != "Gemm":
        return ""
    if node.attributes.get_int("transA", 0) or node.attributes.get_float("alpha", 1.0) != 1.0:
        return "Gemm with transA or alpha has no integer kernel"
    if len(node.inputs) > structure.BIAS_INPUT and node.attributes.get_float("beta", 1.0) != 1.0:
        return "Gemm with beta has no integer kernel"
    return ""


def _bias_obstacle(node: ir.Node, weight: ir.TensorProtocol) -> str:
    if node.op_type not in structure.BIASED_OPS or len(node.inputs) <= structure.BIAS_INPUT:
        return ""
    bias = node.inputs[structure.BIAS_INPUT]
    constant = structure.constant_tensor(bias)
    per_channel = constant is not None and tuple(constant.shape) == (weight.shape[structure.weight_axis(node)],)
    return "" if bias is None or per_channel else "its bias is not a constant per channel"


def lookup_obstacle(node: ir.Node, fewest_rows: int) -> str:
    """Return why a Gather's table cannot be stored as integers, or nothing."""
    table = structure.constant_tensor(node.inputs[0])
    if table is None:
        return "it picks from an activation"
    if table.dtype is not ir.DataType.FLOAT or len(table.shape) != 2 or node.attributes.get_int("axis", 0) != 0:
        return "its table is not float32 rows"
    if table.shape.numpy()[0] < fewest_rows:
        return "its table is too small to be worth scales"
    value = node.inputs[0]
    if value is not None and any(reader is not node for reader in structure.readers(value)):
        return "its table is read by another operator too"
    return ""
