"""Lower what works element by element: sums, products, and functions of one value as tables; and Softmax."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator

from qcompile.backends.integer.lower_linear import requantize
from qcompile.backends.integer.operations import Add, Mul, Softmax
from qcompile.backends.integer.values import Codes, FloatArray, Grid, Pending, Writer, refuse
from qcompile.passes import structure

#: Functions of one value, or of one value and numbers that are the same for all elements.
FUNCTIONS = frozenset({
    "Abs", "Add", "Ceil", "Celu", "Clip", "Cos", "Div", "Elu", "Erf", "Exp", "Floor", "Gelu", "HardSigmoid",
    "HardSwish", "LeakyRelu", "Log", "Max", "Min", "Mish", "Mul", "Neg", "Pow", "PRelu", "Reciprocal", "Relu", "Round",
    "Selu", "Sigmoid", "Sign", "Sin", "Softplus", "Softsign", "Sqrt", "Sub", "Tanh", "ThresholdedRelu",
})  # fmt: skip

#: Bits that an Add's multipliers may have at most in front of the point's place.
LARGEST_ADD_SHIFT = 30


def lower_function(writer: Writer, node: ir.Node, inputs: list[Codes], opset: int) -> Codes | Pending | None:
    """Return a function of one value as what its codes stand for then; None if it is of several values.

    Of 16-bit codes a Relu or Clip becomes bounds of a change of scale; others have too many codes for a table.
    """
    x = inputs[0]
    if any(other.tensor != x.tensor or other.order != x.order for other in inputs) or node.op_type not in FUNCTIONS:
        return None
    if x.grid.dtype != "int8":
        if x.grid.dtype == "int4":
            refuse(node, "is a function of int4 codes", "quantize its input to 8 bits")
        bounds = bounds_of(node)
        if bounds is None:
            refuse(node, "is a function of 16-bit codes", "quantize its input to 8 bits")
        return _bounded(writer, node, x).clipped(*bounds)
    levels = [x.grid.levels() if value.levels is None else value.levels for value in inputs]
    return replace(x, levels=_evaluated(node, levels, opset))


def _bounded(writer: Writer, node: ir.Node, x: Codes) -> Pending:
    """Return 16-bit codes that wait for a scale, and for bounds."""
    x = writer.settled(x)

    def finish(grid: Grid, low: int, high: int, name: str) -> str:
        return writer.rescaled(x, grid, name, node, (low, high)).tensor

    return Pending(node, x.shape, x.order, finish)


def _evaluated(node: ir.Node, levels: list[FloatArray], opset: int) -> FloatArray:
    """Run one node on all levels that its inputs have."""
    feeds: dict[str, FloatArray] = {}
    names: list[str] = []
    arriving = iter(levels)
    for index, value in enumerate(node.inputs):
        constant = structure.constant(value)
        names.append("" if value is None else f"i{index}")
        if value is None:
            continue
        if constant is None:
            feeds[f"i{index}"] = next(arriving)
        elif constant.size == 1:
            feeds[f"i{index}"] = constant.reshape(())
        else:
            refuse(node, f"has {constant.size} numbers, one per channel", "give all channels one number")
    proto = ir.to_proto(node)
    single = onnx.helper.make_node(node.op_type, names, ["y"])
    single.attribute.extend(proto.attribute)
    inputs = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in feeds]
    output = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)
    model = onnx.helper.make_model(onnx.helper.make_graph([single], "g", inputs, [output]),
                                   opset_imports=[onnx.helper.make_opsetid("", opset)])  # fmt: skip
    with np.errstate(all="ignore"):
        outputs: Any = ReferenceEvaluator(model).run(None, feeds)  # its annotation says a dict, and means a list
        result = np.asarray(outputs[0], np.float32)
    if not np.all(np.isfinite(result)):
        refuse(node, "is not finite for every code of its input", "put a Clip in front of it")
    return np.broadcast_to(result, (256,)).astype(np.float32)


def bounds_of(node: ir.Node) -> tuple[float, float] | None:
    """Return what a Relu or a Clip with constant bounds keeps a value between."""
    if node.op_type == "Relu":
        return 0.0, np.inf
    if node.op_type != "Clip":
        return None
    bounds = [-np.inf, np.inf]
    for index, value in enumerate(node.inputs[1:3]):
        if value is None:
            continue
        constant = structure.constant(value)
        if constant is None or constant.size != 1:
            return None
        bounds[index] = float(constant.reshape(()))
    return bounds[0], bounds[1]


def lower_add(writer: Writer, node: ir.Node, inputs: list[Codes]) -> Pending:
    """Lower a sum or difference of two activations of one shape."""
    a, b = _pair(writer, node, inputs)
    if a.shape != b.shape:
        refuse(node, f"joins shapes {a.shape} and {b.shape}", "only equal shapes have an integer form")
    sign = -1.0 if node.op_type == "Sub" else 1.0

    def finish(grid: Grid, low: int, high: int, name: str) -> str:
        output = writer.add_tensor(name, a.stored, grid)
        ratios = a.grid.scale / grid.scale, sign * b.grid.scale / grid.scale
        multipliers, bias, shift = _sum(node, ratios, (a.grid, b.grid), grid.zero_point)
        operands = (a.tensor, b.tensor)
        return writer.write(Add(node.name or name, operands, output, multipliers, bias, shift, low, high))

    return Pending(node, a.shape, a.order, finish)


def _sum(
    node: ir.Node, ratios: tuple[float, float], grids: tuple[Grid, Grid], zero_point: int
) -> tuple[tuple[int, int], int, int]:
    """Return multipliers, bias and the largest shift with which no sum leaves int32."""
    for shift in range(LARGEST_ADD_SHIFT, 0, -1):
        first, second = (round(math.ldexp(ratio, shift)) for ratio in ratios)
        bias = (zero_point << shift) + (1 << (shift - 1)) - grids[0].zero_point * first - grids[1].zero_point * second
        if abs(grids[0].low * first) + abs(grids[1].low * second) + abs(bias) < 2**31:
            return (first, second), bias, shift
    return refuse(node, "its scales are out of proportion", "calibrate its result with real data")


def lower_mul(writer: Writer, node: ir.Node, inputs: list[Codes]) -> Pending:
    """Lower a product of two activations, the second perhaps one number per channel."""
    a, b = _pair(writer, node, inputs)
    if math.prod(a.shape) < math.prod(b.shape):
        a, b = b, a
    if a.shape != b.shape and not _per_channel(a, b):
        refuse(node, f"joins shapes {a.shape} and {b.shape}", "only equal shapes, or a number per channel, are covered")
    _require_bytes(node, a, b)

    def finish(grid: Grid, low: int, high: int, name: str) -> str:
        output = writer.add_tensor(name, a.stored, grid)
        ratio = np.array([np.float64(a.grid.scale) * b.grid.scale / grid.scale])
        step = requantize(ratio, grid, low, high, node)
        zeros = (a.grid.zero_point, b.grid.zero_point)
        return writer.write(Mul(node.name or name, (a.tensor, b.tensor), output, zeros, step))

    return Pending(node, a.shape, a.order, finish)


def _pair(writer: Writer, node: ir.Node, inputs: list[Codes]) -> tuple[Codes, Codes]:
    """Return two activations whose axes are stored in the same order."""
    if len(inputs) != 2:
        refuse(node, "joins an activation and constants", "fold them into the operator in front of it")
    a, b = (writer.plain(value, node) for value in inputs)
    if len(a.shape) != len(b.shape):
        refuse(node, f"joins shapes {a.shape} and {b.shape}", "give both the same number of axes")
    swapped = False
    if math.prod(a.shape) < math.prod(b.shape):
        a, b = b, a
        swapped = True
    long = [axis for axis, length in enumerate(b.shape) if length != 1]
    # One number for all is one per channel of an axis of one element.
    long = long or [axis for axis, length in enumerate(a.shape) if length == 1][:1]
    if a.shape != b.shape and len(long) == 1:
        a = writer.arranged(a, (*(axis for axis in a.order if axis != long[0]), long[0]))
    b = writer.arranged(b, a.order)
    return (b, a) if swapped else (a, b)


def _per_channel(a: Codes, b: Codes) -> bool:
    """Tell whether `b` has one number for each index of the axis that `a` stores last."""
    return len(a.shape) == len(b.shape) and b.stored == (*(1 for _ in a.order[:-1]), a.stored[-1])


def _require_bytes(node: ir.Node, *values: Codes, narrow: bool = False) -> None:
    for value in values:
        if value.grid.dtype != "int8" and not (narrow and value.grid.dtype == "int4"):
            refuse(node, f"reads {value.grid.dtype} codes", "quantize its inputs to 8 bits")


def lower_softmax(writer: Writer, node: ir.Node, inputs: list[Codes]) -> Pending:
    """Lower a Softmax along one axis."""
    x = writer.narrowed(inputs[0], node)
    rank = len(x.shape)
    axis = node.attributes.get_int("axis", -1) % rank
    if x.order[-1] != axis:
        x = writer.arranged(x, (*(other for other in x.order if other != axis), axis))

    def finish(grid: Grid, low: int, high: int, name: str) -> str:
        output = writer.add_tensor(name, x.stored, grid)
        bits, shift, factor = _softmax_bits(node, x.shape[axis], grid.scale)
        table = np.rint(np.ldexp(np.exp(-np.arange(256) * np.float64(x.grid.scale)), bits)).astype(np.uint32)
        parameters = table, factor, shift, grid.zero_point, low, high
        return writer.write(Softmax(node.name or name, (x.tensor,), output, *parameters))

    return Pending(node, x.shape, x.order, finish, natural=Grid(1.0 / 256.0, -128))


def _softmax_bits(node: ir.Node, length: int, scale: float) -> tuple[int, int, int]:
    """Return bits of the table, shift and factor so that no number leaves uint32."""
    best = None
    for shift in range(9):
        factor = round(2**shift / scale)
        # table · factor + D / 2 and D = length · 2^(bits + shift), both below 2^32.
        bits = min(
            23, int(math.log2(2**32 / (factor + (length << shift) / 2 + 1))), 31 - shift - (length - 1).bit_length()
        )
        if factor and bits >= 10:
            # The error of factor and table together decides.
            error = abs(factor * scale / 2**shift - 1.0) + 2.0 ** -(bits + 1)
            best = min(best, (error, bits, shift, factor)) if best else (error, bits, shift, factor)
    if best is None:
        refuse(node, f"goes over {length} elements in steps of {scale:g}", "quantize its result in steps of 1/256")
    return best[1:]
