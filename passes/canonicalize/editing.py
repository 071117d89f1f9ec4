"""The few edits that all rules share: a constant more, an operator less."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnx_ir.passes.common as common_passes

from qcompile.core import scratch
from qcompile.passes import structure


def add_constant(graph: ir.Graph, name: str, array: npt.NDArray[Any]) -> ir.Value:
    """Return a new initializer of a graph; its name is made to differ from those that are taken."""
    name = free_name(graph, name)
    value = ir.Value(name=name, const_value=scratch.tensor(array, name))
    value.type, value.shape = ir.TensorType(value.const_value.dtype), ir.Shape(array.shape)  # type: ignore[union-attr]
    graph.register_initializer(value)
    return value


def rounded(exact: npt.NDArray[Any], dtype: npt.DTypeLike) -> npt.NDArray[Any] | None:
    """Return numbers in the type of a constant, or None if they overflow it or sink below its normal numbers.

    The error is held against the largest of them: trained weights hold a few that are next to nothing anyway.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        array = exact.astype(dtype)
        error = np.max(np.abs(array.astype(np.float64) - exact), initial=0.0)
    peak = np.max(np.abs(exact), initial=0.0)
    return array if error <= np.finfo(array.dtype).eps * peak else None


def free_name(graph: ir.Graph, name: str) -> str:
    """Return a name that no value of a graph has, this one if it is free."""
    values = (*graph.inputs, *graph.initializers.values(), *(value for node in graph for value in node.outputs))
    taken = {value.name for value in values}
    while name in taken:
        name += "_"
    return name


def only_reader(value: ir.Value | None) -> ir.Node | None:
    """Return the node that alone reads a value, once and in the graph of the value's own producer, or None."""
    if value is None or value.is_graph_output() or len(uses := list(value.uses())) != 1:
        return None
    producer, reader = value.producer(), uses[0].node
    return reader if producer is None or producer.graph is reader.graph else None


def bypass(node: ir.Node, source: ir.Value) -> bool:
    """Let the readers of a node's first result read `source` instead, remove the node, and tell if anything changed.

    An Identity stays where it gives a second name to what has to keep its own: an input, a constant, a value of an
    outer graph, or another output. (A loop whose body has one value as two outputs makes ONNX Runtime read freed
    memory.)
    """
    copy, graph = node.outputs[0], node.graph
    assert isinstance(graph, ir.Graph)
    if copy.is_graph_output():
        producer = source.producer()
        if source.is_graph_output() or producer is None or producer.graph is not graph:
            modified = bool(copy.uses())
            for use in list(copy.uses()):
                use.node.replace_input_with(use.idx, source)
            if not structure.is_standard(node, "Identity"):
                replace(node, ir.node("Identity", [source]))
                modified = True
            return modified
        # The interface keeps what it declares.
        source.name, copy.name = copy.name, None
        source.type = copy.type if copy.type is not None else source.type
        source.shape = copy.shape if copy.shape is not None else source.shape
    ir.convenience.replace_all_uses_with(copy, source, replace_graph_outputs=True)
    graph.remove(node, safe=True)
    return True


def replace(node: ir.Node, *new: ir.Node) -> None:
    """Put nodes in the place of one; the last has the same results, by name, type and shape, and the node's name."""
    graph = node.graph
    assert isinstance(graph, ir.Graph)
    new[-1].name = node.name
    ir.convenience.replace_nodes_and_values(graph, node, [node], new, node.outputs, new[-1].outputs)


def tensor_of(value: ir.Value | None, dtype: type[Any] | None = None) -> list[Any] | None:
    """Return a constant vector or number as a list, or None."""
    array = structure.constant(value)
    if array is None or array.ndim > 1:
        return None
    numbers: list[Any] = (array if dtype is None else array.astype(dtype)).reshape(-1).tolist()
    return numbers


def remove_unused(model: ir.Model) -> bool:
    """Remove what nobody reads, and tell whether anything was.

    What stands in the branches of a removed If still counts as a reader of the values around it; onnx-ir's pass would
    keep those until the model is copied.
    """
    modified = False
    while True:
        modified |= bool(common_passes.RemoveUnusedNodesPass()(model).modified)
        if not _forget_removed(model):
            return modified


def _forget_removed(model: ir.Model) -> bool:
    """Take the uses back that removed nodes make of values, and tell whether there were any."""
    present = set(model.graph.all_nodes())
    left = []
    for graph in (model.graph, *model.graph.subgraphs()):
        values = (*graph.inputs, *graph.initializers.values(), *(value for node in graph for value in node.outputs))
        left += [use for value in values for use in value.uses() if use.node not in present]
    for use in left:
        use.node.replace_input_with(use.idx, None)
    return bool(left)
