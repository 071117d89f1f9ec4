"""Work: how much arithmetic a sample takes, node by node, so that what is measured can be bounded without a clock.

A bound in seconds would make the result depend on the machine; one in operations does not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
import onnx_ir as ir

from qcompile.calib.data import Sample
from qcompile.calib.sections import cuttable
from qcompile.core import runtime

#: Multiply-accumulates that take as long as one element of an operator that has none: it is memory that takes time.
PER_ELEMENT = 16

_SHAPE = "qcompile.shape/"


@dataclass(frozen=True)
class Cost:
    """What one sample takes.

    Parameters
    ----------
    work : tuple of int
        For each node of the main graph, in its order, about how many multiply-accumulates. Operators without any count
        `PER_ELEMENT` for each element they write; nodes of subgraphs count nothing.
    peak_bytes : int
        Largest sum of the tensors that are alive between two nodes, inputs and outputs included.
    """

    work: tuple[int, ...]
    peak_bytes: int

    @classmethod
    def of(cls, model: ir.Model, feeds: Sample) -> Self:
        """Reckon a model's cost by the shapes of one sample.

        Parameters
        ----------
        model : onnx_ir.Model
            Topologically sorted.
        feeds : Sample
        """
        shapes = value_shapes(model, feeds)
        return cls(tuple(_node_work(node, shapes) for node in model.graph), _peak_bytes(model.graph, shapes))

    @property
    def total(self) -> int:
        """Multiply-accumulates of all nodes, 1 at least."""
        return max(1, sum(self.work))


def multiply_accumulates(model: ir.Model, feeds: Sample) -> dict[str, int]:
    """Return, by node name, the multiply-accumulates of the nodes that have some, by the shapes of one sample.

    Parameters
    ----------
    model : onnx_ir.Model
        Topologically sorted, its nodes named.
    feeds : Sample
    """
    shapes = value_shapes(model, feeds)
    counts = {str(node.name): _products(node, shapes) for node in model.graph}
    return {name: count for name, count in counts.items() if count}


def value_shapes(model: ir.Model, feeds: Sample) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of the main graph for one sample, by a run that gives out the shapes alone.

    Parameters
    ----------
    model : onnx_ir.Model
        Topologically sorted.
    feeds : Sample
    """
    copy = model.clone()
    # What has no type behind an operator of another domain is a tensor, unless the graph deals in sequences.
    known = cuttable(model)
    values = [value for node in copy.graph for value in node.outputs
              if value.name and (isinstance(value.type, ir.TensorType) or (value.type is None and known))]  # fmt: skip
    # The runtime tells no shape of codes of four bits: codes have that of the value that they were made of.
    asked = [ir.node("Shape", [_whole(value)], outputs=[ir.val(_SHAPE + str(value.name), ir.DataType.INT64)])
             for value in values]  # fmt: skip
    copy.graph.extend(asked)
    outputs = list(copy.graph.outputs)
    copy.graph.outputs[:] = [*outputs, *(node.outputs[0] for node in asked)]
    for node in asked:
        node.outputs[0].shape = ir.Shape([None])
    found = runtime.Session(copy, optimize=False).run(feeds)
    shapes = {name: array.shape for name, array in feeds.items()}
    shapes |= {name: tuple(value.const_value.shape.numpy()) for name, value in model.graph.initializers.items()
               if value.const_value is not None}  # fmt: skip
    return shapes | {name.removeprefix(_SHAPE): tuple(map(int, shape)) for name, shape in found.items()
                     if name.startswith(_SHAPE)}  # fmt: skip


def _whole(value: ir.Value) -> ir.Value:
    """Return what codes were made of; another value itself."""
    node = value.producer()
    source = node.inputs[0] if node is not None and node.op_type == "QuantizeLinear" else None
    return value if source is None else source


def _node_work(node: ir.Node, shapes: dict[str, tuple[int, ...]]) -> int:
    products = _products(node, shapes)
    return PER_ELEMENT * _written(node, shapes) if products is None else products


def _written(node: ir.Node, shapes: dict[str, tuple[int, ...]]) -> int:
    return sum(_elements(shapes.get(str(value.name), ())) for value in node.outputs)


def _products(node: ir.Node, shapes: dict[str, tuple[int, ...]]) -> int | None:
    """Return a node's multiply-accumulates, None where that is not what it does."""
    read = [shapes.get(str(value.name), ()) if value is not None else () for value in node.inputs]
    written = _written(node, shapes)
    if node.op_type == "Conv" and len(read[1]) > 1:
        return written * _elements(read[1][1:])
    if node.op_type == "ConvTranspose" and len(read[1]) > 1:
        return _elements(read[0]) * _elements(read[1][1:])
    if node.op_type in ("MatMul", "Gemm") and read[0]:
        transposed = node.op_type == "Gemm" and node.attributes.get_int("transA", 0) != 0
        return written * (read[0][0] if transposed else read[0][-1])
    if node.op_type in ("LSTM", "GRU", "RNN") and read[0]:
        return read[0][0] * read[0][1] * (_elements(read[1]) + _elements(read[2]))
    return None


def _peak_bytes(graph: ir.Graph, shapes: dict[str, tuple[int, ...]]) -> int:
    nodes = list(graph)
    index = {node: position for position, node in enumerate(nodes)}
    born = {value: index[node] for node in nodes for value in node.outputs}
    change = np.zeros(len(nodes) + 2, np.int64)
    for value in (*graph.inputs, *born):
        if value.is_initializer():
            continue
        positions = [len(nodes)] if value.is_graph_output() else [born.get(value, -1)]
        # A reader inside a subgraph stands nowhere among these nodes: such a value lives to the end.
        positions += [index.get(node, len(nodes)) for node in value.consumers()]
        size = _elements(shapes.get(str(value.name), ())) * (value.dtype.itemsize if value.dtype is not None else 4)
        change[born.get(value, -1) + 1] += size
        change[max(positions) + 1] -= size
    return int(np.cumsum(change).max())


def _elements(shape: tuple[int, ...]) -> int:
    return int(np.prod(shape, dtype=np.int64))
