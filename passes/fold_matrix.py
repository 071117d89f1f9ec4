"""Multiply the channels of linear operators, tables and constants by a matrix, which goes into their numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompile.core.orthogonal import Matrix
from qcompile.passes.canonicalize.editing import add_constant
from qcompile.passes.channels import is_table
from qcompile.passes.structure import BIAS_INPUT, WEIGHT_INPUT, constant, constant_tensor, is_standard, weight_axis

Array = npt.NDArray[Any]


def multiply_outputs(node: ir.Node, matrix: Matrix) -> None:
    """Let an operator make y M of what it makes: y = x W + b becomes x (W M) + b M; a table's rows become row · M.

    Parameters
    ----------
    node : onnx_ir.Node
        What `projection_at` or `is_table` knows, with a constant bias if any.
    matrix : ndarray `[n, n]`
        M, over its output channels.
    """
    at = 0 if is_table(node) else WEIGHT_INPUT
    _replace(node, at, _multiplied(_array(node, at), matrix, -1 if is_table(node) else weight_axis(node)))
    if (bias := own_bias(node)) is not None:
        whole = np.broadcast_to(bias.reshape(-1), (len(matrix),))
        _replace(node, BIAS_INPUT, whole @ matrix)


def multiply_inputs(node: ir.Node, matrix: Matrix) -> None:
    """Let an operator read x M where it read x, without noticing: x W becomes x (M⁻¹ W) with the inverse given.

    Parameters
    ----------
    node : onnx_ir.Node
        What `projection_at` knows.
    matrix : ndarray `[n, n]`
        M⁻¹, over its input channels, which it multiplies from the left; Rᵀ of a rotation, Rᵀ diag(γ) behind a norm.
    """
    weights = _array(node, WEIGHT_INPUT)
    _replace(node, WEIGHT_INPUT, _multiplied(weights, matrix.T, _input_axis(node)))


def multiply_constant(node: ir.Node, index: int, axis: int, matrix: Matrix) -> None:
    """Multiply the channels of a constant that a node reads, at an axis counted from the last; other readers keep it.

    A constant with one number for all channels gets one of each.
    """
    array = _array(node, index)
    shape = (1,) * (-axis - array.ndim) + array.shape
    shape = tuple(len(matrix) if at - len(shape) == axis else length for at, length in enumerate(shape))
    _replace(node, index, _multiplied(np.broadcast_to(array, shape), matrix, axis))


def response(node: ir.Node, shift: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return what a constant input `[n]` at every place adds to each output channel of an operator without padding."""
    weights = np.moveaxis(_array(node, WEIGHT_INPUT).astype(np.float64), (_input_axis(node), weight_axis(node)), (0, 1))
    scale = node.attributes.get_float("alpha", 1.0) if node.op_type == "Gemm" else 1.0
    added: npt.NDArray[np.float64] = scale * shift @ weights.reshape(*weights.shape[:2], -1).sum(axis=2)
    return added


def takes_shift(node: ir.Node, bias: ir.Node | None) -> bool:
    """Tell whether what a constant input adds can go into an operator's bias, or into the Add of one behind it."""
    if node.op_type == "Conv":
        unpadded = not any(node.attributes.get_ints("pads", ()))
        return unpadded and node.attributes.get_string("auto_pad", "NOTSET") in ("NOTSET", "VALID")
    return node.op_type == "Gemm" or bias is not None


def add_shift(node: ir.Node, bias: ir.Node | None, shift: npt.NDArray[np.float64]) -> None:
    """Add one number per output channel to what an operator makes; see `takes_shift`.

    Parameters
    ----------
    node : onnx_ir.Node
    bias : onnx_ir.Node or None
        The Add of a constant behind a MatMul.
    shift : ndarray `[n]`
    """
    if node.op_type == "MatMul":
        assert bias is not None
        index = next(i for i, value in enumerate(bias.inputs) if constant_tensor(value) is not None)
        _replace(bias, index, _array(bias, index).astype(np.float64) + shift)
        return
    # Gemm counts its bias β times.
    shift = shift / (node.attributes.get_float("beta", 1.0) if node.op_type == "Gemm" else 1.0)
    old = own_bias(node)
    if old is None:
        node.resize_inputs(BIAS_INPUT + 1)
    total = shift if old is None else np.broadcast_to(old.reshape(-1), shift.shape) + shift
    _put(node, BIAS_INPUT, f"{node.outputs[0].name}_bias", total.astype(_array(node, WEIGHT_INPUT).dtype))


def own_bias(node: ir.Node) -> Array | None:
    """Return the constant bias of a Gemm or Conv."""
    biased = is_standard(node, "Conv", "Gemm") and len(node.inputs) > BIAS_INPUT
    return constant(node.inputs[BIAS_INPUT]) if biased else None


def has_computed_bias(node: ir.Node) -> bool:
    """Tell whether the third input of a Gemm or Conv is no constant with at most one number per channel."""
    if not is_standard(node, "Conv", "Gemm") or len(node.inputs) <= BIAS_INPUT or node.inputs[BIAS_INPUT] is None:
        return False
    bias = own_bias(node)
    return bias is None or any(length != 1 for length in bias.shape[:-1]) or node.attributes.get_float("beta", 1.0) == 0


def _input_axis(node: ir.Node) -> int:
    return 1 if node.op_type == "Conv" else 1 - weight_axis(node)


def _multiplied(array: Array, matrix: Matrix, axis: int) -> Array:
    """Return the array with its vectors along an axis multiplied from the right."""
    product: Array = np.moveaxis(np.moveaxis(array, axis, -1) @ matrix, -1, axis)
    return product


def _array(node: ir.Node, index: int) -> Array:
    array = constant(node.inputs[index])
    assert array is not None
    return array


def _replace(node: ir.Node, index: int, array: Array) -> None:
    """Let a node read other numbers of the same type; others that read the old constant keep it."""
    value = node.inputs[index]
    assert value is not None
    _put(node, index, f"{value.name}_rotated", array.astype(_array(node, index).dtype))


def _put(node: ir.Node, index: int, name: str, array: Array) -> None:
    assert isinstance(node.graph, ir.Graph)
    node.replace_input_with(index, add_constant(node.graph, name, np.ascontiguousarray(array)))
