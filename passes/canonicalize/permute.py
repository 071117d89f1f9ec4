"""Operators that can work on permuted axes, and what has to change in them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import onnx_ir as ir

from qcompile.passes import structure
from qcompile.passes.canonicalize.editing import add_constant, tensor_of

Permutation = tuple[int, ...]
#: Reads of a node's inputs beyond these are parameters rather than tensors of the layout.
UNARY = (
    "Relu", "LeakyRelu", "Sigmoid", "Tanh", "Clip", "HardSigmoid", "HardSwish", "Elu", "Selu", "Softplus", "Softsign",
    "Exp", "Log", "Sqrt", "Neg", "Abs", "Erf", "Gelu", "Mish", "Cast", "Identity", "Reciprocal", "Floor", "Ceil", "Not",
)  # fmt: skip
BROADCAST = (
    "Add",
    "Sub",
    "Mul",
    "Div",
    "Pow",
    "Min",
    "Max",
    "PRelu",
    "Where",
    "Sum",
    "Mean",
    "Equal",
    "Less",
    "Greater",
)
REDUCTIONS = ("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL1", "ReduceL2")


def movable(node: ir.Node) -> bool:
    """Tell whether a node can work in another layout; all its tensors have one known rank then."""
    if not structure.is_standard(node, *MOVABLE) or any(value.shape is None for value in node.outputs):
        return False
    rank = len(node.outputs[0].shape or ())
    if rank < 2 or not _tensors_fit(node, rank):
        return False
    if node.op_type in REDUCTIONS:
        return bool(node.attributes.get_int("keepdims", 1)) and tensor_of(_at(node, 1)) is not None
    if node.op_type == "Pad":
        return tensor_of(_at(node, 1)) is not None and _at(node, 3) is None
    return node.op_type != "Slice" or all(tensor_of(value) is not None for value in node.inputs[1:4])


def _at(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if index < len(node.inputs) else None


def _tensors_fit(node: ir.Node, rank: int) -> bool:
    """Tell whether what is no constant has the node's rank, or is a number."""
    count = len(node.inputs) if node.op_type in (*BROADCAST, "Concat") else 1
    for value in node.inputs[:count]:
        if value is None or value.shape is None:
            return False
        if structure.constant_tensor(value) is not None:
            if len(value.shape) > rank or (node.op_type not in BROADCAST and node.op_type != "Concat"):
                return False
        elif len(value.shape) != rank and len(value.shape) != 0:
            return False
    tensors = [value for value in node.inputs[:count] if structure.constant_tensor(value) is None]
    return any(len(value.shape or ()) == rank for value in tensors if value is not None)


def absorb(node: ir.Node, p: Permutation) -> bool:
    """Tell whether a node can read a value before Tₚ, with other attributes, and have the same result."""
    if not structure.is_standard(node, *ABSORBING) or node.attributes.get_int("keepdims", 1) != 0:
        return False
    axes = tensor_of(_at(node, 1))
    if not axes:
        return False
    # What is left must come in the same order.
    reduced = {p[axis] for axis in axes}
    left = [axis for axis in p if axis not in reduced]
    return left == sorted(left)


def permute(graph: ir.Graph, node: ir.Node, p: Permutation, rules: Mapping[str, Rule]) -> None:
    """Change a node of f(Tₚ x) = Tₚ f'(x) from f to f'; an absorbing one from f(Tₚ x) to f'(x)."""
    rules[node.op_type](graph, node, p)


Rule = Callable[[ir.Graph, ir.Node, Permutation], None]


def _nothing(graph: ir.Graph, node: ir.Node, p: Permutation) -> None:
    pass


def _constants(graph: ir.Graph, node: ir.Node, p: Permutation) -> None:
    back = np.argsort(p)
    for index, value in enumerate(node.inputs):
        array = structure.constant(value)
        if value is None or array is None or (array.size == 1 and array.ndim < 2):
            continue
        full = array.reshape((1,) * (len(p) - array.ndim) + array.shape)
        name = f"{value.name}_of_{node.outputs[0].name}"
        node.replace_input_with(index, add_constant(graph, name, np.ascontiguousarray(full.transpose(back))))


def _axis(default: int) -> Rule:
    def rule(graph: ir.Graph, node: ir.Node, p: Permutation) -> None:
        node.attributes["axis"] = ir.AttrInt64("axis", p[node.attributes.get_int("axis", default)])

    return rule


def _concat(graph: ir.Graph, node: ir.Node, p: Permutation) -> None:
    _constants(graph, node, p)
    _axis(0)(graph, node, p)


def _axes_at(place: int) -> Rule:
    def rule(graph: ir.Graph, node: ir.Node, p: Permutation) -> None:
        value = node.inputs[place] if place < len(node.inputs) else None
        axes = tensor_of(value)
        assert value is not None and axes is not None
        name = f"{value.name}_of_{node.outputs[0].name}"
        node.replace_input_with(place, add_constant(graph, name, np.array([p[axis] for axis in axes], np.int64)))

    return rule


def _slice(graph: ir.Graph, node: ir.Node, p: Permutation) -> None:
    if _at(node, 3) is None:
        axes = np.arange(len(tensor_of(node.inputs[1]) or ()), dtype=np.int64)
        node.resize_inputs(max(4, len(node.inputs)))
        node.replace_input_with(3, add_constant(graph, f"{node.outputs[0].name}_axes", axes))
    _axes_at(3)(graph, node, p)


def _pad(graph: ir.Graph, node: ir.Node, p: Permutation) -> None:
    value, pads = node.inputs[1], np.array(tensor_of(node.inputs[1]), np.int64).reshape(2, -1)
    assert value is not None
    name = f"{value.name}_of_{node.outputs[0].name}"
    node.replace_input_with(1, add_constant(graph, name, pads[:, np.argsort(p)].reshape(-1)))


MOVABLE: dict[str, Rule] = {
    **dict.fromkeys(UNARY, _nothing),
    **dict.fromkeys(BROADCAST, _constants),
    **dict.fromkeys(REDUCTIONS, _axes_at(1)),
    "Concat": _concat,
    "Softmax": _axis(-1),
    "LogSoftmax": _axis(-1),
    "Split": _axis(0),
    "Slice": _slice,
    "Pad": _pad,
}
ABSORBING: dict[str, Rule] = dict.fromkeys(REDUCTIONS, _axes_at(1))
