"""The rules of Apple's provider (CoreML, ML programs), as onnxruntime documents them."""

from __future__ import annotations

import onnx_ir as ir

from qcompile.backends.ort.phones.rules import is_folded, supported
from qcompile.backends.ort.phones.units import Rule, Unit

#: Shipped with onnxruntime, too: onnxruntime/tools/mobile_helpers/coreml_supported_mlprogram_ops.md.
PAGE = "onnxruntime.ai/docs/execution-providers/CoreML-ExecutionProvider.html"
OPERATORS = {
    **dict.fromkeys((
        "Add", "And", "ArgMax", "AveragePool", "Cast", "Ceil", "Clip", "Concat", "Conv", "ConvTranspose", "Cos",
        "DepthToSpace", "Div", "Elu", "Erf", "Exp", "GatherND", "Gelu", "Gemm", "GlobalAveragePool", "GlobalMaxPool",
        "GridSample", "GroupNormalization", "HardSigmoid", "Identity", "InstanceNormalization", "LayerNormalization",
        "LeakyRelu", "MatMul", "Max", "MaxPool", "Mul", "PRelu", "Reciprocal", "ReduceMax", "ReduceMean", "ReduceSum",
        "Relu", "Reshape", "Resize", "Round", "Shape", "Sigmoid", "Sin", "Slice", "Softmax", "Softplus", "Split",
        "Sqrt", "Squeeze", "Sub", "Tanh", "Tile", "Transpose", "Unsqueeze", "Where",
    ), ""),
    "Pow": "float32 alone",
}  # fmt: skip
#: Pools of two axes beside batch and channels.
POOLS = ("AveragePool", "GlobalAveragePool", "GlobalMaxPool", "MaxPool")
#: By operator, which inputs must be constants.
CONSTANTS = {"Conv": (2,), "ConvTranspose": (1, 2), "Gemm": (1,), "Slice": (1, 2, 3, 4), "Split": (1,)}
#: Axes of an image, and of a series, with batch and channels.
IMAGE, SERIES = 4, 3
FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16)


def _ranks(unit: Unit) -> str:
    value = unit.node.inputs[0] if unit.node.inputs else None
    rank = len(value.shape) if value is not None and value.shape is not None else None
    if unit.node.op_type in POOLS and rank != IMAGE:
        return "it is not 2-D"
    return "it is neither 1-D nor 2-D" if unit.node.op_type == "Conv" and rank not in (SERIES, IMAGE) else ""


def _constants(unit: Unit) -> str:
    for index in CONSTANTS.get(unit.node.op_type, ()):
        value = unit.node.inputs[index] if index < len(unit.node.inputs) else None
        if value is not None and not is_folded(value):
            return f"input {index} is not constant"
    return ""


def _types(unit: Unit) -> str:
    if unit.node.op_type == "Pow" and any(value is not None and value.dtype is ir.DataType.FLOAT16
                                          for value in unit.node.inputs):  # fmt: skip
        return "a Pow is of float32"
    if unit.node.op_type == "Where":
        branches = [value for value in unit.node.inputs[1:] if value is not None and value.dtype not in FLOATS]
        return "its branches are no floats" if branches else ""
    return ""


def _shifted(unit: Unit) -> str:
    if unit.node.op_type != "GatherND":
        return ""
    return "it has batch_dims" if unit.node.attributes.get_int("batch_dims", 0) else ""


def _transposed(unit: Unit) -> str:
    attributes = unit.node.attributes
    if unit.node.op_type != "ConvTranspose":
        return ""
    if attributes.get_string("auto_pad", "NOTSET").startswith("SAME"):
        return "its padding is SAME"
    if "output_shape" in attributes or any(attributes.get_ints("output_padding", ())):
        return "it says the shape of its result"
    return ""


RULES = (
    supported(OPERATORS, "CoreML", PAGE),
    Rule("ranks", PAGE, _ranks),
    Rule("constants", PAGE, _constants),
    Rule("types", PAGE, _types),
    Rule("batch_dims", PAGE, _shifted),
    Rule("transposed", PAGE, _transposed),
)
