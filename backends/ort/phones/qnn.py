"""The rules of Qualcomm's provider (QNN, its HTP backend), as onnxruntime documents them."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qcompile.backends.ort.phones.qnn_forms import FIXED, MOVERS
from qcompile.backends.ort.phones.rules import bias_in_steps, known_shapes, same_codes, supported, without_subgraphs
from qcompile.backends.ort.phones.units import Codes, Rule, Unit
from qcompile.passes import structure

PAGE = "onnxruntime.ai/docs/execution-providers/QNN-ExecutionProvider.html"
TOOL = "onnxruntime.quantization.execution_providers.qnn"
ACTIVATIONS = ("uint8", "uint16")
#: What MatMul multiplies by what on HTP.
PRODUCTS = (("uint8", "uint8"), ("uint8", "uint16"), ("uint16", "uint8"))
#: Axis of the scales of weights that may have one per channel.
CHANNELS = {"Conv": 0, "ConvTranspose": 1}
#: What the page lists, Q and DQ apart; its remarks.
OPERATORS = {
    **dict.fromkeys((
        "Abs", "Add", "And", "ArgMax", "ArgMin", "Asin", "Atan", "AveragePool", "BatchNormalization", "Cast", "Clip",
        "Concat", "Conv", "ConvTranspose", "Cos", "DepthToSpace", "Div", "Elu", "Equal", "Exp", "Expand", "Flatten",
        "Floor", "Gather", "Gelu", "Gemm", "GlobalAveragePool", "Greater", "GreaterOrEqual", "GridSample", "HardSwish",
        "InstanceNormalization", "LRN", "LayerNormalization", "LeakyRelu", "Less", "LessOrEqual", "Log", "LogSoftmax",
        "LpNormalization", "MatMul", "Max", "MaxPool", "Min", "Mul", "Neg", "Not", "Or", "PRelu", "Pad", "Pow",
        "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd", "ReduceSum", "Relu", "Reshape", "Resize", "Round",
        "Sigmoid", "Sign", "Sin", "Slice", "Softmax", "SpaceToDepth", "Split", "Sqrt", "Squeeze", "Sub", "Tanh",
        "Tile", "TopK", "Transpose", "Unsqueeze", "Where",
    ), ""),
    "HardSigmoid": "since onnxruntime 1.19",
}  # fmt: skip


def _whole(unit: Unit) -> str:
    """HTP computes on codes: all floats that an operator reads and leaves are in them."""
    for value, codes in zip(unit.node.inputs, unit.inputs, strict=True):
        setting = unit.node.op_type in ("Clip", "Pad", "Resize") and value is not unit.node.inputs[0]
        if codes is None and not setting and _is_float(value):
            return f"it reads '{structure.name_of(value)}' in float" if value is not None else ""
    for value, codes in zip(unit.node.outputs, unit.outputs, strict=True):
        if codes is None and _is_float(value):
            return f"it leaves '{structure.name_of(value)}' in float"
    return ""


def _is_float(value: ir.Value | None) -> bool:
    return value is not None and value.dtype is not None and value.dtype.is_floating_point()


def _activations(unit: Unit) -> str:
    for codes in (*(one for one in unit.inputs if one is not None and one.constant is None), *unit.outputs):
        if codes is not None and codes.dtype not in ACTIVATIONS:
            return f"an activation is {codes.dtype}"
        if codes is not None and codes.scale.size != 1:
            return "an activation has more than one scale"
    return ""


def _weights(unit: Unit) -> str:
    for index, codes in enumerate(unit.inputs):
        if codes is None or codes.constant is None or codes.dtype == "int32":
            continue
        if codes.dtype not in ("uint8", "int8", "uint16"):
            return f"constants are {codes.dtype}"
        if codes.scale.size == 1:
            continue
        if index != structure.WEIGHT_INPUT or CHANNELS.get(unit.node.op_type) != codes.axis:
            return f"a {unit.node.op_type} takes one scale for all of a constant"
        if codes.dtype != "int8" or codes.zero_point.any():
            return "weights with a scale per channel are not int8 around zero"
    return ""


def _products(unit: Unit) -> str:
    operands = [codes.dtype for codes in unit.inputs[:2] if codes is not None]
    if unit.node.op_type != "MatMul" or len(operands) != 2 or tuple(operands) in PRODUCTS:
        return ""
    return f"it multiplies {operands[0]} by {operands[1]}"


def _fixed(unit: Unit) -> str:
    left: Codes | None = unit.outputs[0] if unit.outputs else None
    if unit.node.op_type not in FIXED or left is None or left.dtype != "uint16":
        return ""
    scale, zero_point = FIXED[unit.node.op_type]
    right = np.float32(scale) == left.scale[0] and zero_point == left.zero_point[0]
    return "" if right else f"its result of 16 bits is not in steps of {scale:.4g} around {zero_point}"


def _indices(unit: Unit) -> str:
    known = structure.constant(unit.node.inputs[1]) if unit.node.op_type == "Gather" else None
    return "its indices are negative" if known is not None and known.size and known.min() < 0 else ""


RULES = (
    supported(OPERATORS, "QNN", PAGE),
    without_subgraphs(PAGE),
    known_shapes(PAGE),
    Rule("all in codes", PAGE, _whole),
    Rule("activations", PAGE, _activations),
    Rule("weights", TOOL, _weights),
    Rule("products", PAGE, _products),
    bias_in_steps(TOOL),
    Rule("fixed ranges", TOOL, _fixed),
    same_codes(MOVERS, "onnxruntime.quantization.operators.direct_q8"),
    Rule("indices", PAGE, _indices),
)
