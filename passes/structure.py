"""What the passes ask of a graph: constants, readers, weights and the activations behind an operator.

Queries only; nothing here changes a graph, and recognised patterns stay decomposed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Any

import numpy.typing as npt
import onnx_ir as ir

from qcompile.core.target import OpKind

#: Where the constant weights of a linear operator stand among its inputs.
WEIGHT_INPUT = 1
BIAS_INPUT = 2
#: Operators whose third input is a bias that is added to the accumulator.
BIASED_OPS = frozenset({"Conv", "ConvTranspose", "Gemm"})
#: Operators whose weights are [directions, gates · hidden, inputs].
RECURRENT_OPS = frozenset({"LSTM", "GRU", "RNN"})


def constant(value: ir.Value | None) -> npt.NDArray[Any] | None:
    """Return a value's array if it is an initializer that no caller can replace, else None."""
    tensor = constant_tensor(value)
    return None if tensor is None else tensor.numpy()


def constant_tensor(value: ir.Value | None) -> ir.TensorProtocol | None:
    """Return a value's tensor, its bytes unread, if it is an initializer that no caller can replace, else None."""
    if value is None or not value.is_initializer() or value.is_graph_input():
        return None
    return value.const_value


def is_standard(node: ir.Node, *op_types: str) -> bool:
    """Tell whether a node is one of these operators of the default domain."""
    return node.domain in ("", "ai.onnx") and node.op_type in op_types


def is_linear(node: ir.Node) -> bool:
    """Tell whether a node multiplies an activation by constant weights."""
    return is_standard(node, "MatMul", *BIASED_OPS) and constant_tensor(node.inputs[WEIGHT_INPUT]) is not None


def is_float32(value: ir.Value | None) -> bool:
    """Tell whether a value is known to be float32."""
    return value is not None and value.dtype is ir.DataType.FLOAT


def name_of(value: ir.Value) -> str:
    """Return a value's name; every value has one after canonicalization."""
    assert value.name is not None
    return value.name


def node_name(node: ir.Node) -> str:
    """Return a node's name; every node has one after canonicalization."""
    assert node.name is not None
    return node.name


def readers(value: ir.Value) -> list[ir.Node]:
    """Return the nodes that read a value, each once, nodes inside subgraphs included."""
    return list(dict.fromkeys(value.consumers()))


def data_readers(value: ir.Value) -> list[ir.Node]:
    """Return the nodes that read what a value holds, not only its shape; each once."""
    return [node for node in readers(value) if not is_standard(node, "Shape", "Size")]


def only_reader(value: ir.Value) -> ir.Node | None:
    """Return the one node of the same graph that reads what a value holds, else None."""
    nodes = data_readers(value)
    if len(nodes) != 1 or value.is_graph_output():
        return None
    producer = value.producer()
    return nodes[0] if producer is None or nodes[0].graph is producer.graph else None


def produced_by(value: ir.Value | None, *op_types: str) -> ir.Node | None:
    """Return the node behind a value if it is one of these operators of the default domain, else None."""
    node = None if value is None else value.producer()
    return node if node is not None and is_standard(node, *op_types) else None


def input_of(node: ir.Node, index: int) -> ir.Value:
    """Return an input that the operator requires."""
    value = node.inputs[index]
    assert value is not None
    return value


def other_input(node: ir.Node, value: ir.Value) -> ir.Value | None:
    """Return the other one of a node's two inputs, None if the node does not have two or does not read the value."""
    if len(node.inputs) != 2 or value not in node.inputs:
        return None
    return node.inputs[1] if node.inputs[0] is value else node.inputs[0]


def is_shared(nodes: Collection[ir.Node], result: ir.Value) -> bool:
    """Tell whether what stands between a pattern's nodes, but for its result, is read elsewhere too."""
    for node in nodes:
        for value in node.outputs:
            if value is result:
                continue
            if value.is_graph_output() or any(reader not in nodes for reader in data_readers(value)):
                return True
    return False


def activation_inputs(node: ir.Node) -> Iterator[ir.Value]:
    """Yield the float32 inputs of a node that are no constants."""
    for value in node.inputs:
        if value is not None and is_float32(value) and constant_tensor(value) is None:
            yield value


def weight_axis(node: ir.Node) -> int:
    """Return the axis of a linear operator's weights that counts its output channels.

    Conv has [M, C/group, ...], ConvTranspose [C, M/group, ...], Gemm [K, N] or transposed [N, K], MatMul [..., K, N].
    """
    if node.op_type == "Gemm":
        return 0 if node.attributes.get_int("transB", 0) else 1
    if node.op_type == "MatMul":
        weight = node.inputs[WEIGHT_INPUT]
        return 1 if weight is None or weight.shape is None else max(0, len(weight.shape) - 1)
    return {"Conv": 0, "ConvTranspose": 1}[node.op_type]


def stored_weights(node: ir.Node, kind: OpKind) -> list[tuple[ir.Value, int]]:
    """Return the constant operands of a node that can be stored as integers, each with the axis of its scales.

    Of a linear operator that is its weights, by output channel; of a recurrent one what it multiplies inputs and state
    by, by gate and unit; of a lookup its table, and of others what has several axes, by the last of these.
    """
    recurrent = node.op_type in RECURRENT_OPS
    everything = (1, 2) if recurrent else range(len(node.inputs))
    linear = kind in (OpKind.LINEAR, OpKind.PACKED)
    places = {OpKind.LOOKUP: (0,), OpKind.STORED: everything}.get(kind, (WEIGHT_INPUT,) if linear else ())
    found = []
    for value in (node.inputs[index] for index in places):
        tensor = constant_tensor(value)
        if value is None or tensor is None or (kind is OpKind.STORED and not _is_matrix(tensor)):
            continue
        last = len(tensor.shape) - 1
        found.append((value, weight_axis(node) if linear else 1 if recurrent else last))
    return found


def _is_matrix(tensor: ir.TensorProtocol) -> bool:
    """Tell whether a constant has several axes of float32."""
    return tensor.dtype is ir.DataType.FLOAT and len(tensor.shape) > 1


def residual_branch(node: ir.Node, is_integer: Callable[[ir.Node], bool]) -> ir.Value | None:
    """Return what an Add adds to the result of an integer Conv that nobody else reads; None where it does not."""
    if not is_standard(node, "Add") or len(set(node.inputs)) != 2 or len(list(activation_inputs(node))) != 2:
        return None
    for value, other in ((node.inputs[0], node.inputs[1]), (node.inputs[1], node.inputs[0])):
        made = produced_by(value, "Conv")
        if made is not None and value is not None and is_integer(made) and only_reader(value) is node:
            return other
    return None


def absorbed_activation(node: ir.Node, kinds: Collection[str]) -> ir.Node | None:
    """Return the activation behind a node that an integer kernel can absorb by saturating, or None.

    Saturation at the lowest code is a Relu only if that code stands for zero, so a Clip must start at zero; and the
    value before the activation must have no other reader.
    """
    if len(node.outputs) != 1 or node.outputs[0].is_graph_output():
        return None
    behind = readers(node.outputs[0])
    if len(behind) != 1 or behind[0].graph is not node.graph or not is_standard(behind[0], *kinds):
        return None
    activation = behind[0]
    if activation.op_type == "Clip":
        low = constant(activation.inputs[1] if len(activation.inputs) > 1 else None)
        if low is None or low.size != 1 or float(low.reshape(())) != 0.0:
            return None
        if len(activation.inputs) > 2 and activation.inputs[2] is not None:
            high = constant(activation.inputs[2])
            if high is None or high.size != 1 or float(high.reshape(())) <= 0.0:
                return None
    return activation
