"""Lower what multiplies by constant weights: Conv, Gemm, MatMul."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompile.backends.integer.bounds import LARGEST, largest_sums, require_no_wrap
from qcompile.backends.integer.float_operations import Dequantize, FloatDense
from qcompile.backends.integer.lower_windows import require_map, window_of
from qcompile.backends.integer.operations import Conv, Dense, Requantize
from qcompile.backends.integer.values import (
    FLOAT,
    Codes,
    Factors,
    Grid,
    Pending,
    Writer,
    as_map,
    channels_last,
    fixed_point,
    refuse,
    shape_of,
)
from qcompile.core import numerics
from qcompile.passes import structure

QUANTIZE_IT = "quantize its weights to int8 or int4, symmetric"
SIGNED = {"uint8": 128, "uint4": 8}


@dataclass(frozen=True, eq=False)
class Weights:
    """Constant weights as codes.

    Parameters
    ----------
    codes : ndarray of int8
    scale : ndarray of float64, shape (channels,) or ()
    axis : int
        Of the channels that have a scale each.
    bits : int
    """

    codes: npt.NDArray[np.int8]
    scale: npt.NDArray[np.float64]
    axis: int
    bits: int

    def per(self, channels: int) -> npt.NDArray[np.float64]:
        """Return a scale per channel."""
        return np.broadcast_to(self.scale.reshape(-1), (channels,)).astype(np.float64)


def read_weights(node: ir.Node, axis: int) -> Weights:
    """Return a linear operator's weights, whose scales may go along the axis of its output channels alone."""
    dequantize = structure.produced_by(node.inputs[structure.WEIGHT_INPUT], "DequantizeLinear")
    codes = structure.constant(dequantize.inputs[0]) if dequantize is not None else None
    if dequantize is None or codes is None:
        refuse(node, "its weights are float or no constants", QUANTIZE_IT)
    scale = structure.constant(dequantize.inputs[1])
    if scale is None or dequantize.attributes.get_int("block_size", 0) != 0:
        refuse(node, "its weights have a scale per block", QUANTIZE_IT)
    if scale.size > 1 and dequantize.attributes.get_int("axis", 1) % codes.ndim != axis:
        refuse(node, "the scales of its weights do not follow its output channels", QUANTIZE_IT)
    kind = str(codes.dtype)
    zero_point = structure.constant(dequantize.inputs[2]) if len(dequantize.inputs) > 2 else None
    zeros = np.zeros(1, np.int64) if zero_point is None else zero_point.astype(np.int64)
    wide = codes.astype(np.int64) - (numerics.along_axis(zeros.reshape(-1), axis, codes.ndim) if zeros.size > 1
                                     else zeros.reshape(()))  # fmt: skip
    if kind not in ("int8", "uint8", "int4", "uint4") or wide.min(initial=0) < -128 or wide.max(initial=0) > 127:
        refuse(node, f"its {kind} weights less their zero point do not fit int8", QUANTIZE_IT)
    narrow = kind in ("int4", "uint4") and wide.min(initial=0) >= -8 and wide.max(initial=0) <= 7
    return Weights(wide.astype(np.int8), scale.astype(np.float64), axis, 4 if narrow else 8)


def real_of(value: ir.Value | None, node: ir.Node) -> npt.NDArray[np.float64] | None:
    """Return a constant operand as it is, or dequantized; None where there is none."""
    if value is None:
        return None
    if (array := structure.constant(value)) is not None:
        return array.astype(np.float64)
    dequantize = structure.produced_by(value, "DequantizeLinear")
    codes = structure.constant(dequantize.inputs[0]) if dequantize is not None else None
    scale = structure.constant(dequantize.inputs[1]) if dequantize is not None else None
    if dequantize is None or codes is None or scale is None:
        refuse(node, f"reads '{value.name}', which is no constant", "export the model with its constants folded")
    zero_point = structure.constant(dequantize.inputs[2]) if len(dequantize.inputs) > 2 else None
    offset = 0 if zero_point is None else zero_point.astype(np.int64)
    return (codes.astype(np.int64) - offset).astype(np.float64) * scale.astype(np.float64)


def requantize(ratio: npt.NDArray[np.float64], grid: Grid, low: int, high: int, node: ir.Node) -> Requantize:
    """Return the step from accumulators to codes of a grid.

    Parameters
    ----------
    ratio : ndarray of float, shape (channels,) or (1,)
        What one step of the accumulator is in steps of the grid.
    grid : Grid
    low, high : int
    node : onnx_ir.Node
        For which a ratio that no fixed-point number holds is refused.
    """
    return Requantize(*fixed_point(ratio, node), grid.zero_point, low, high)


def _bias(node: ir.Node, channels: int, steps: npt.NDArray[np.float64], factor: float = 1.0) -> npt.NDArray[np.int64]:
    """Return an operator's own bias in steps of its accumulator, shape (channels,)."""
    value = node.inputs[structure.BIAS_INPUT] if len(node.inputs) > structure.BIAS_INPUT else None
    real = real_of(value, node)
    if real is None:
        return np.zeros(channels, np.int64)
    codes = np.rint(np.broadcast_to(real.reshape(-1), (channels,)) * factor / steps)
    if np.abs(codes).max(initial=0.0) >= 2.0**31:
        channel = int(np.abs(codes).argmax())
        refuse(node, f"the bias of channel {channel} is beyond int32 in its steps", "keep its weights' scales larger")
    return codes.astype(np.int64)


def lower_conv(writer: Writer, node: ir.Node, inputs: list[Codes]) -> Pending:
    """Lower a convolution over one or two axes."""
    x = writer.plain(inputs[0], node)
    weights = read_weights(node, 0)
    require_map(node, x)
    kernel = weights.codes if len(x.shape) == 4 else weights.codes[..., np.newaxis]
    kernel = np.ascontiguousarray(kernel.transpose(0, 2, 3, 1))
    x = writer.arranged(x, channels_last(len(x.shape)))
    source = writer.viewed(x.tensor, as_map(x.stored))
    shape = shape_of(node.outputs[0])
    order = channels_last(len(shape))
    window = window_of(node, (kernel.shape[1], kernel.shape[2]), x.shape[2:], shape[2:], x.grid.zero_point)
    groups = node.attributes.get_int("group", 1)
    scale = weights.per(len(kernel)) * np.float64(x.grid.scale)
    bias = _bias(node, len(kernel), scale) - x.grid.zero_point * kernel.astype(np.int64).sum((1, 2, 3))
    require_no_wrap(node, kernel.reshape(len(kernel), -1), bias, x.grid)

    def finish(grid: Grid, low: int, high: int, name: str) -> str:
        stored = tuple(shape[axis] for axis in order)
        output = writer.add_tensor(name, as_map(stored), grid)
        step = requantize(scale / grid.scale, grid, low, high, node)
        narrow = bias.astype(np.int32)
        writer.write(Conv(node.name or name, (source,), output, kernel, narrow, step, window, groups, weights.bits))
        return writer.viewed(output, stored)

    return Pending(node, shape, order, finish)


def lower_gemm(writer: Writer, node: ir.Node, inputs: list[Codes]) -> Pending:
    """Lower a Gemm whose second matrix is constant."""
    if node.attributes.get_int("transA", 0):
        refuse(node, "transposes its first matrix", "put a Transpose in front of it")
    transposed = node.attributes.get_int("transB", 0)
    weights = read_weights(node, 0 if transposed else 1)
    matrix = weights.codes if transposed else weights.codes.T
    alpha, beta = node.attributes.get_float("alpha", 1.0), node.attributes.get_float("beta", 1.0)
    return _dense(writer, node, inputs[0], matrix, weights, alpha, beta)


def lower_matmul(writer: Writer, node: ir.Node, inputs: list[Codes]) -> Pending:
    """Lower a MatMul whose second matrix is constant."""
    if len(inputs) > 1:
        refuse(node, "multiplies two activations", "only a MatMul by constant weights has an integer form")
    value = node.inputs[structure.WEIGHT_INPUT]
    rank = len(shape_of(value)) if value is not None else 0
    if rank != 2:
        refuse(node, f"has weights of rank {rank}", "only a matrix of weights has an integer form")
    weights = read_weights(node, 1)
    return _dense(writer, node, inputs[0], weights.codes.T, weights)


def _dense(
    writer: Writer,
    node: ir.Node,
    value: Codes,
    matrix: npt.NDArray[np.int8],
    weights: Weights,
    alpha: float = 1.0,
    beta: float = 1.0,
) -> Pending:
    x, matrix = rows_of(writer, writer.plain(value, node), matrix)
    shape = (*x.shape[:-1], len(matrix))
    scale = weights.per(len(matrix)) * np.float64(x.grid.scale) * alpha
    if np.any(scale <= 0.0):
        refuse(node, "has an alpha that is not positive", "fold it into the weights")
    codes = np.ascontiguousarray(matrix)
    bias = _bias(node, len(matrix), scale, beta) - x.grid.zero_point * codes.astype(np.int64).sum(1)
    require_no_wrap(node, codes, bias, x.grid)

    def pending(scale: npt.NDArray[np.float64], bias: npt.NDArray[np.int64]) -> Pending:
        stored, narrow = tuple(shape[axis] for axis in x.order), bias.astype(np.int32)

        def finish(grid: Grid, low: int, high: int, name: str) -> str:
            output = writer.add_tensor(name, stored, grid)
            step = requantize(scale / grid.scale, grid, low, high, node)
            return writer.write(Dense(node.name or name, (x.tensor,), output, codes, narrow, step, weights.bits))

        def finish_real(low: float, high: float, name: str) -> str:
            output = writer.add_tensor(name, stored, FLOAT)
            step = Dequantize(scale.astype(np.float32), low, high)
            return writer.write(FloatDense(node.name or name, (x.tensor,), output, codes, narrow, step, weights.bits))

        def affine(factor: Factors, summand: Factors) -> Pending | None:
            """Fold a factor into the scale and a summand into the bias, where both hold them."""
            if factor.size not in (1, len(codes)) or summand.size not in (1, len(codes)) or factor.min() <= 0.0:
                return None
            scaled = scale * factor.reshape(-1)
            more = np.rint(summand.reshape(-1) / scaled) + bias
            sums = largest_sums(codes, more, x.grid.low, x.grid.high)
            return pending(scaled, more.astype(np.int64)) if sums.max(initial=0) <= LARGEST else None

        return Pending(node, shape, x.order, finish, finish_real=finish_real, affine=affine)

    return pending(scale, bias)


def rows_of(writer: Writer, x: Codes, matrix: npt.NDArray[np.int8]) -> tuple[Codes, npt.NDArray[np.int8]]:
    """Return a value with its last axis stored last, and weights in the order in which a map is stored."""
    if x.map is not None:
        places = np.arange(matrix.shape[1]).reshape(x.map.shape).transpose(x.map.order).ravel()
        matrix = matrix[:, places]
    rank = len(x.shape)
    if not moves_last(x):
        x = writer.arranged(x, tuple(range(rank)))
    elif x.order[-1] != rank - 1:
        x = writer.arranged(x, (*(axis for axis in x.order if axis != rank - 1), rank - 1))
    return x, matrix


def moves_last(x: Codes) -> bool:
    """Tell whether a value's last axis is stored last, but for axes of one element."""
    behind = x.order[x.place_of(-1) + 1 :]
    return all(x.shape[axis] == 1 for axis in behind)
