"""Fold factors and shifts per channel into the linear operator beside them."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompile.core.contract import Effect
from qcompile.passes import structure
from qcompile.passes.canonicalize.editing import add_constant, bypass, only_reader, remove_unused, rounded
from qcompile.passes.patterns.norms import norms

Array = npt.NDArray[Any]
LINEAR = ("Conv", "ConvTranspose", "Gemm", "MatMul")
AFFINE = ("Mul", "Div", "Add", "Sub")


@dataclass(frozen=True)
class FoldAffine(ir.passes.InPlacePass):
    """Take Mul, Div, Add and Sub by constants per channel into weights and bias.

    BatchNormalization often arrives as such arithmetic. Behind the operator, y·f + s is w·f and b·f + s. In front of it
    a factor folds into the weights of its input channel; a shift folds into the bias only where no zero padding stands
    beside it, which would have to become the shift itself.

    γ and β of a normalization stay in front of what reads them: a runtime makes one kernel of a norm only with them,
    and smoothing has nowhere else to divide by.
    """

    effect: ClassVar[Effect] = Effect.CLOSE

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite the main graph in place."""
        modified, kept = False, {node for norm in norms(model.graph) for node in norm.nodes}
        for node in list(model.graph):
            if structure.is_standard(node, *LINEAR) and _weights(node) is not None:
                while _fold_behind(node) or _fold_past_bias(node) or _fold_in_front(node, kept):
                    modified = True
        modified |= remove_unused(model)
        return ir.passes.PassResult(model, modified)


@dataclass(frozen=True)
class Affine:
    """x ↦ x·factor + shift, each an array that broadcasts; None where there is nothing of it."""

    source: ir.Value
    factor: Array | None
    shift: Array | None


def _affine(node: ir.Node) -> Affine | None:
    """Read a node as an affine map of its one input that is no constant."""
    if not structure.is_standard(node, *AFFINE):
        return None
    constants = [structure.constant(value) for value in node.inputs]
    index = 0 if constants[1] is not None else 1
    source, number = node.inputs[index], constants[1 - index]
    if source is None or number is None or constants[index] is not None or number.dtype.kind != "f":
        return None
    wide = number.astype(np.float64)
    if node.op_type == "Mul":
        return Affine(source, wide, None)
    if node.op_type == "Add":
        return Affine(source, None, wide)
    if node.op_type == "Div":
        return Affine(source, 1.0 / wide, None) if index == 0 and np.all(wide) else None
    return Affine(source, None, -wide) if index == 0 else Affine(source, np.full((), -1.0), wide)


def _weights(node: ir.Node) -> Array | None:
    """Return the constant weights of an operator if nobody else reads them and its arithmetic is plain."""
    value = node.inputs[1]
    weights = structure.constant(value)
    if weights is None or value is None or weights.dtype.kind != "f" or len(value.uses()) != 1:
        return None
    if node.op_type == "MatMul":
        return weights if weights.ndim == 2 else None
    if node.op_type == "Gemm" and _scaled(node):
        return None
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is not None and (structure.constant(bias) is None or len(bias.shape or ()) != 1):
        return None
    return weights


def _scaled(gemm: ir.Node) -> bool:
    return any(gemm.attributes.get_float(name, 1.0) != 1.0 for name in ("alpha", "beta"))


def _outputs(node: ir.Node, weights: Array) -> int:
    """Return the number of output channels."""
    length = int(weights.shape[structure.weight_axis(node)])
    return length * node.attributes.get_int("group", 1) if node.op_type == "ConvTranspose" else length


def _per_channel(number: Array | None, channels: int, axis: int, rank: int) -> Array | None:
    """Return a constant as one number per channel if it broadcasts along nothing else, and does not raise the rank."""
    if number is None or number.ndim > rank:
        return None
    shape = (1,) * (rank - number.ndim) + number.shape
    if any(length != 1 for index, length in enumerate(shape) if index != axis) or shape[axis] not in (1, channels):
        return None
    return np.broadcast_to(number.reshape(-1), (channels,))


def _rank(node: ir.Node, weights: Array) -> int | None:
    if node.op_type != "MatMul":
        return weights.ndim
    x = node.inputs[0]
    return len(x.shape) if x is not None and x.shape is not None and len(x.shape) > 1 else None


def _channel_axis(node: ir.Node, rank: int) -> int:
    return rank - 1 if node.op_type == "MatMul" else 1


def _fold_behind(node: ir.Node) -> bool:
    behind = only_reader(node.outputs[0])
    weights = _weights(node)
    affine = _affine(behind) if behind is not None else None
    rank = _rank(node, weights) if weights is not None else None
    if behind is None or affine is None or weights is None or rank is None:
        return False
    channels = _outputs(node, weights)
    factor, shift = (_per_channel(n, channels, _channel_axis(node, rank), rank) for n in (affine.factor, affine.shift))
    if (factor is None) != (affine.factor is None) or (shift is None) != (affine.shift is None):
        return False
    if shift is not None and node.op_type == "MatMul":
        return False
    new = weights if factor is None else weights * _spread(node, weights, factor)
    return _apply(node, new, _bias(node, channels) * (1.0 if factor is None else factor), shift, weights) and bypass(
        behind, node.outputs[0]
    )


def _fold_past_bias(matmul: ir.Node) -> bool:
    """Take a factor per channel behind the bias of a MatMul, such as a LayerScale, into both."""
    add, weights = only_reader(matmul.outputs[0]), _weights(matmul)
    behind = only_reader(add.outputs[0]) if add is not None else None
    if matmul.op_type != "MatMul" or add is None or behind is None or weights is None:
        return False
    bias, scale, rank = _affine(add), _affine(behind), _rank(matmul, weights)
    if bias is None or bias.factor is not None or scale is None or scale.factor is None or scale.shift is not None:
        return False
    channels = _outputs(matmul, weights)
    shift, factor = (_per_channel(n, channels, (rank or 0) - 1, rank or 0) for n in (bias.shift, scale.factor))
    index = next(i for i, value in enumerate(add.inputs) if value is not bias.source)
    constant = structure.constant(add.inputs[index])
    if shift is None or factor is None or constant is None or not structure.is_standard(add, "Add"):
        return False
    new, total = (
        rounded(weights * _spread(matmul, weights, factor), weights.dtype),
        rounded(shift * factor, constant.dtype),
    )
    if new is None or total is None:
        return False
    graph = matmul.graph
    assert isinstance(graph, ir.Graph)
    matmul.replace_input_with(1, add_constant(graph, f"{matmul.inputs[1].name}_folded", new))  # type: ignore[union-attr]
    add.replace_input_with(index, add_constant(graph, f"{add.outputs[0].name}_bias", total))
    return bypass(behind, add.outputs[0])


def _spread(node: ir.Node, weights: Array, factor: Array) -> Array:
    """Shape one factor per output channel so that it multiplies the weights."""
    shape = [1] * weights.ndim
    axis = structure.weight_axis(node)
    shape[axis] = weights.shape[axis]
    if node.op_type != "ConvTranspose":
        return factor.reshape(shape)
    # Weights [C, M/group, ...]: rows of group g make its M/group output channels.
    group = node.attributes.get_int("group", 1)
    rows = np.repeat(factor.reshape(group, -1), weights.shape[0] // group, axis=0)
    return rows.reshape(*weights.shape[:2], *[1] * (weights.ndim - 2))


def _fold_in_front(node: ir.Node, kept: Collection[ir.Node]) -> bool:
    value, weights = node.inputs[0], _weights(node)
    producer = value.producer() if value is not None and only_reader(value) is node else None
    affine = _affine(producer) if producer is not None and producer not in kept else None
    if producer is None or affine is None or weights is None or (rank := _rank(node, weights)) is None:
        return False
    channels, axis = _inputs(node, weights), _channel_axis(node, rank)
    factor, shift = (_per_channel(n, channels, axis, rank) for n in (affine.factor, affine.shift))
    if (factor is None) != (affine.factor is None) or (shift is None) != (affine.shift is None):
        return False
    if not _reads_alike(node, affine.source, channels, axis, rank) or (shift is not None and not _takes_shift(node)):
        return False
    new = weights if factor is None else weights * _spread_inputs(node, weights, factor)
    outputs = _outputs(node, weights)
    moved = None if shift is None else _response(node, weights, shift)
    if not _apply(node, new, _bias(node, outputs), moved, weights):
        return False
    node.replace_input_with(0, affine.source)
    assert node.graph is not None
    node.graph.remove(producer, safe=True)  # as long as it stands it counts as a reader
    return True


def _reads_alike(node: ir.Node, source: ir.Value, channels: int, axis: int, rank: int) -> bool:
    """Tell whether an operator can read `source` itself: the constant must not be what gives it its shape."""
    if source.shape is None or len(source.shape) != rank or node.attributes.get_int("transA", 0) != 0:
        return False
    return bool(source.shape[axis] == channels)


def _inputs(node: ir.Node, weights: Array) -> int:
    """Return the number of input channels."""
    if node.op_type == "Conv":
        return int(weights.shape[1]) * node.attributes.get_int("group", 1)
    return int(weights.shape[1 if node.op_type == "Gemm" and structure.weight_axis(node) == 0 else 0])


def _spread_inputs(node: ir.Node, weights: Array, factor: Array) -> Array:
    """Shape one factor per input channel so that it multiplies the weights."""
    if node.op_type == "Conv":
        # Weights [M, C/group, ...]: rows of group g read its C/group input channels.
        group = node.attributes.get_int("group", 1)
        rows = np.repeat(factor.reshape(group, -1), weights.shape[0] // group, axis=0)
        return rows.reshape(*weights.shape[:2], *[1] * (weights.ndim - 2))
    axis = 1 - structure.weight_axis(node) if node.op_type == "Gemm" else 0
    return factor.reshape([-1 if index == axis else 1 for index in range(weights.ndim)])


def _takes_shift(node: ir.Node) -> bool:
    if node.op_type == "Conv":
        unpadded = not any(node.attributes.get_ints("pads", ()))
        return unpadded and node.attributes.get_string("auto_pad", "NOTSET") in ("NOTSET", "VALID")
    return node.op_type == "Gemm"


def _response(node: ir.Node, weights: Array, shift: Array) -> Array:
    """Return what a constant input per channel adds to each output channel."""
    wide = weights.astype(np.float64) * _spread_inputs(node, weights, shift)
    kept = structure.weight_axis(node)
    total: Array = wide.sum(axis=tuple(index for index in range(wide.ndim) if index != kept))
    return total


def _bias(node: ir.Node, channels: int) -> Array:
    array = structure.constant(node.inputs[2]) if len(node.inputs) > 2 and node.op_type != "MatMul" else None
    return np.zeros(channels) if array is None else np.broadcast_to(array.astype(np.float64), (channels,))


def _apply(node: ir.Node, weights: Array, bias: Array, shift: Array | None, old: Array) -> bool:
    """Give an operator new weights and bias, unless its type cannot hold them."""
    has_bias = node.op_type != "MatMul" and len(node.inputs) > 2 and node.inputs[2] is not None
    new, total = rounded(weights, old.dtype), rounded(bias if shift is None else bias + shift, old.dtype)
    if new is None or total is None:
        return False
    graph = node.graph
    assert isinstance(graph, ir.Graph)
    name = node.outputs[0].name
    if not np.array_equal(new, old):
        node.replace_input_with(1, add_constant(graph, f"{node.inputs[1].name}_folded", new))  # type: ignore[union-attr]
    if shift is not None or has_bias:
        if not has_bias:
            node.resize_inputs(3)
        node.replace_input_with(2, add_constant(graph, f"{name}_bias", total))
    return True
