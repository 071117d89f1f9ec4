"""The rules of the XNNPACK provider, as onnxruntime documents them and as its sources have them."""

from __future__ import annotations

import onnx_ir as ir

from qcompile.backends.ort.phones.rules import bias_in_steps, is_folded, is_open, same_codes, supported
from qcompile.backends.ort.phones.units import Rule, Unit

PAGE = "onnxruntime.ai/docs/execution-providers/Xnnpack-ExecutionProvider.html"
SOURCE = "onnxruntime/core/providers/xnnpack"
#: Operators on images: two axes beside batch and channels.
IMAGES = ("AveragePool", "Conv", "ConvTranspose", "MaxPool")
OPERATORS = {
    "AveragePool": "2-D", "Conv": "2-D, constant weights and bias", "ConvTranspose": "2-D, constant weights and bias",
    "Gemm": "2-D, float", "MatMul": "2-D, float", "MaxPool": "2-D", "Resize": "bilinear", "Softmax": "last axis",
}  # fmt: skip
#: Types of activation and weights that a convolution multiplies; it has no u8 by s8.
PRODUCTS = (("int8", "int8"), ("uint8", "uint8"))
#: Rank of an image with batch and channels.
IMAGE_RANK = 4


def _images(unit: Unit) -> str:
    value = unit.node.inputs[0]
    if unit.node.op_type not in IMAGES or value is None:
        return ""
    if value.shape is None or len(value.shape) != IMAGE_RANK:
        return "it is not 2-D"
    sides = ir.Value(shape=ir.Shape(list(value.shape)[1:]))
    return "channels, height or width are open" if is_open(sides) else ""


def _matrices(unit: Unit) -> str:
    if unit.node.op_type not in ("Gemm", "MatMul"):
        return ""
    if unit.is_quantized:
        return f"it has {unit.node.op_type} in float alone"
    values = [value for value in unit.node.inputs if value is not None]
    if any(value.shape is None or len(value.shape) > 2 for value in values):
        return "an operand has more than two axes"
    return "" if all(is_folded(value) for value in values[1:]) else "its second operand is not constant"


def _constants(unit: Unit) -> str:
    if unit.node.op_type not in ("Conv", "ConvTranspose"):
        return ""
    for value, codes in list(zip(unit.node.inputs, unit.inputs, strict=True))[1:]:
        known = value is None or is_folded(value) or (codes is not None and codes.constant is not None)
        if not known:
            return "its weights or its bias are not constant"
    return ""


def _products(unit: Unit) -> str:
    if unit.node.op_type != "Conv" or not unit.is_quantized:
        return ""
    activation, weights, left = unit.inputs[0], unit.inputs[1], unit.outputs[0]
    if activation is None or weights is None or left is None:
        return "input, weights or result are in float and the others in codes"
    if (activation.dtype, weights.dtype) not in PRODUCTS or left.dtype != activation.dtype:
        return f"it multiplies {activation.dtype} by {weights.dtype} into {left.dtype}"
    if weights.scale.size > 1 and (weights.dtype != "int8" or weights.zero_point.any() or weights.axis != 0):
        return "weights with a scale per channel are not int8 around zero"
    return ""


def _padding(unit: Unit) -> str:
    padding = unit.node.attributes.get_string("auto_pad", "NOTSET")
    if unit.node.op_type in IMAGES and "pads" not in unit.node.attributes and padding == "SAME_LOWER":
        return "SAME_LOWER is no padding of its"
    return ""


def _pools(unit: Unit) -> str:
    node = unit.node
    if node.op_type not in ("AveragePool", "MaxPool"):
        return ""
    if node.attributes.get_int("ceil_mode", 0):
        return "it rounds its size up"
    if len(node.outputs) > 1:
        return "it gives indices"
    one = all(length == 1 for length in node.attributes.get_ints("kernel_shape", (1, 1)))
    return "its window is 1x1" if one else ""


def _average(unit: Unit) -> str:
    if unit.node.op_type != "AveragePool":
        return ""
    if bool(unit.node.attributes.get_int("count_include_pad", 0)) != unit.is_quantized:
        return "in codes padding counts, in float it does not"
    others = [codes for codes in unit.inputs if codes is not None and codes.dtype != "uint8"]
    return f"its codes are {others[0].dtype}" if others else ""


def _softmax(unit: Unit) -> str:
    node = unit.node
    if node.op_type != "Softmax":
        return ""
    rank = len(node.inputs[0].shape) if node.inputs[0] is not None and node.inputs[0].shape is not None else 0
    if node.attributes.get_int("axis", -1) not in (-1, rank - 1):
        return "it is not along the last axis"
    return "its codes are not uint8 in steps of 1/256" if unit.is_quantized else ""


RULES = (
    supported(OPERATORS, "XNNPACK", PAGE),
    Rule("images", PAGE, _images),
    Rule("matrices", PAGE, _matrices),
    Rule("constants", PAGE, _constants),
    Rule("products", f"{SOURCE}/nn/conv_base.cc", _products),
    bias_in_steps(f"{SOURCE}/nn/conv_base.cc"),
    Rule("padding", f"{SOURCE}/detail/utils.cc", _padding),
    Rule("pools", f"{SOURCE}/nn/average_pool.cc", _pools),
    Rule("average", f"{SOURCE}/nn/average_pool.cc", _average),
    Rule("softmax", f"{SOURCE}/math/softmax.cc", _softmax),
    same_codes(frozenset({"MaxPool"}), f"{SOURCE}/nn/max_pool.cc"),
)
