"""Lower products and sums with constants per channel: a depthwise convolution of one tap."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompile.backends.integer.bounds import require_no_wrap
from qcompile.backends.integer.lower_linear import requantize
from qcompile.backends.integer.operations import Conv, Window
from qcompile.backends.integer.values import Codes, Grid, Pending, Writer, refuse, shape_of
from qcompile.passes import structure

#: Code of every weight, but for the sign: the factor is in the scale, and the bias has steps this much finer.
WEIGHT = 64


def is_affine(node: ir.Node) -> bool:
    """Tell whether a node is a product or sum of an activation and a constant of several numbers."""
    if structure.is_standard(node, "BatchNormalization"):
        return True
    return structure.is_standard(node, "Add", "Sub", "Mul", "Div") and any(
        constant is not None and constant.size > 1 for constant in map(structure.constant, node.inputs)
    )


def lower_affine(writer: Writer, node: ir.Node, inputs: list[Codes]) -> Pending:
    """Lower x · factor + term, with numbers that differ along one axis."""
    x = writer.plain(inputs[0], node)
    if x.shape != shape_of(node.outputs[0]):
        refuse(node, f"makes {shape_of(node.outputs[0])} of {x.shape}", "give the constant the activation's shape")
    axis, factor, term = _batch_norm(node, x) if node.op_type == "BatchNormalization" else _constants(node, x)
    order = (*(other for other in x.order if other != axis), axis)
    x = writer.arranged(x, order)
    channels = x.shape[axis]
    is_map = len(x.shape) == 4 and x.stored[0] == 1
    shape = x.stored if is_map else (1, math.prod(x.stored[:-1]), 1, channels)
    source = writer.viewed(x.tensor, shape)
    # A channel times nothing is its term alone, in steps of whatever size.
    scale = np.where(factor == 0.0, 1.0, np.abs(factor)) / WEIGHT * np.float64(x.grid.scale)
    weights = (np.sign(factor) * WEIGHT).astype(np.int8).reshape(channels, 1, 1, 1)
    steps = np.rint(term / scale)
    if np.abs(steps).max(initial=0.0) >= 2.0**31:
        channel = int(np.abs(steps).argmax())
        refuse(node, f"the constant of channel {channel} is beyond int32 in its steps", "fold it into its neighbour")
    bias = steps.astype(np.int64) - x.grid.zero_point * weights.astype(np.int64).reshape(-1)
    require_no_wrap(node, weights.reshape(channels, 1), bias, x.grid)

    def finish(grid: Grid, low: int, high: int, name: str) -> str:
        output = writer.add_tensor(name, shape, grid)
        step = requantize(scale / grid.scale, grid, low, high, node)
        window = Window((1, 1), outside=x.grid.zero_point)
        operands = (source,), output, weights, bias.astype(np.int32), step, window, channels
        return writer.viewed(writer.write(Conv(node.name or name, *operands)), x.stored)

    return Pending(node, x.shape, order, finish)


Numbers = npt.NDArray[np.float64]


def _constants(node: ir.Node, x: Codes) -> tuple[int, Numbers, Numbers]:
    """Return the axis along which a constant operand differs, and factor and term per index of it."""
    place = next(index for index, value in enumerate(node.inputs) if structure.constant(value) is not None)
    constant = structure.constant(node.inputs[place])
    assert constant is not None
    if place == 0 and node.op_type == "Div":
        refuse(node, "divides by an activation", "only a division by constants has an integer form")
    whole = constant.reshape((1,) * (len(x.shape) - constant.ndim) + constant.shape).astype(np.float64)
    long = [axis for axis, length in enumerate(whole.shape) if length != 1]
    if len(long) != 1:
        refuse(node, f"has a constant of shape {constant.shape}", "only a number per channel has an integer form")
    numbers = whole.reshape(-1)
    ones, zeros = np.ones_like(numbers), np.zeros_like(numbers)
    if node.op_type == "Mul":
        return long[0], numbers, zeros
    if node.op_type == "Div":
        if not np.all(numbers):
            refuse(node, "divides by zero", "correct its constant")
        return long[0], 1.0 / numbers, zeros
    if node.op_type == "Sub":
        return (long[0], ones, -numbers) if place == 1 else (long[0], -ones, numbers)
    return long[0], ones, numbers


def _batch_norm(node: ir.Node, x: Codes) -> tuple[int, Numbers, Numbers]:
    """Return the same for a BatchNormalization that keeps its statistics."""
    found = [structure.constant(value) for value in node.inputs[1:5]]
    if node.attributes.get_int("training_mode", 0) or len(x.shape) < 2:
        refuse(node, "learns its statistics", "export the model for inference")
    constants = [array.astype(np.float64) for array in found if array is not None]
    if len(constants) != 4:
        refuse(node, "has statistics that are no constants", "export the model for inference")
    scale, bias, mean, variance = constants
    factor = scale / np.sqrt(variance + node.attributes.get_float("epsilon", 1e-5))
    return 1, factor, bias - mean * factor
