"""Rotate what a linear operator reads, where nothing in front of it can take the rotation in: by a product at run time.

QuaRot and SpinQuant call this R4. One Hadamard matrix of b channels serves every b neighbours, n·b
multiply-accumulates for a token instead of n²; its inverse goes into the weights. Unlike `rotate.py` this adds nodes,
so it is for whoever has weighed what they cost.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from qcompile.core.contract import Effect, Refusal, Rewritten
from qcompile.core.orthogonal import Orthogonal
from qcompile.core.rotation import InputRotation
from qcompile.passes.canonicalize.editing import add_constant, free_name
from qcompile.passes.fold_matrix import multiply_inputs
from qcompile.passes.patterns import projection_at
from qcompile.passes.structure import input_of, is_float32, is_standard, node_name, only_reader


@dataclass(frozen=True)
class RotateInputs(ir.passes.InPlacePass):
    """Put products in front of linear operators and their inverse into the weights.

    Parameters
    ----------
    rotations : tuple of InputRotation
    """

    rotations: tuple[InputRotation, ...]
    effect: ClassVar[Effect] = Effect.CLOSE

    def requires(self, model: ir.Model) -> None:
        """Refuse rotations of another graph."""
        known = {node.name for node in model.graph}
        if missing := sorted({rotation.node for rotation in self.rotations} - known):
            raise ir.passes.PreconditionError(f"a rotation names node '{missing[0]}', which the graph does not have")

    def call(self, model: ir.Model) -> Rewritten:
        """Rewrite in place; operators that cannot be treated so are refusals."""
        nodes, before = {node_name(node): node for node in model.graph}, len(model.graph)
        refusals = []
        for rotation in self.rotations:
            node = nodes[rotation.node]
            if reason := obstacle(node) or _misfit(node, rotation.matrix.width):
                refusals.append(Refusal(rotation.node, f"what it reads is not rotated: {reason}"))
            else:
                _rotate(model.graph, node, rotation.matrix)
        added = len(model.graph) - before
        notes = (f"rotation added {added} nodes in front of linear operators",) if added else ()
        return Rewritten(model, bool(added), tuple(refusals), notes)


def obstacle(node: ir.Node) -> str:
    """Return why what an operator reads cannot be rotated in front of it alone, or nothing."""
    if not is_standard(node, "MatMul", "Gemm") or projection_at(node) is None:
        return "it is no product with constant weights"
    value = input_of(node, 0)
    if not is_float32(value) or value.shape is None or not isinstance(value.shape[-1], int):
        return "how many channels it reads, or of which type, is not known"
    return "" if only_reader(value) is node else "others read the same"


def rotated_products(rotations: Iterable[InputRotation], graph: ir.Graph) -> tuple[str, ...]:
    """Return the products that were added, which are to stay in float: what they make is to be quantized, not before.

    Parameters
    ----------
    rotations : iterable of InputRotation
    graph : onnx_ir.Graph
        What `RotateInputs` made.
    """
    wanted = {rotation.node for rotation in rotations}
    found = []
    for node in graph:
        if node_name(node) in wanted:
            source = input_of(node, 0).producer()
            if source is not None and is_standard(source, "Reshape"):
                source = input_of(source, 0).producer()
            if source is not None and is_standard(source, "MatMul"):
                found.append(node_name(source))
    return tuple(found)


def _misfit(node: ir.Node, block: int) -> str:
    width = _width(node)
    return f"a matrix of {block} channels does not divide {width}" if width % block else ""


def _width(node: ir.Node) -> int:
    shape = input_of(node, 0).shape
    assert shape is not None and isinstance(shape[-1], int), "`obstacle` has seen to that"
    return shape[-1]


def _rotate(graph: ir.Graph, node: ir.Node, matrix: Orthogonal) -> None:
    value, width, r = input_of(node, 0), _width(node), matrix.matrix()
    outer = list(value.shape or ())[:-1]
    weights = add_constant(graph, f"{node.name}_rotation", r.astype(np.float32))
    product = ir.node("MatMul", [value, weights], name=f"{node.name}_rotated")
    added, blocks = [product], width // len(r)
    if blocks > 1:
        split = _reshape(graph, value, f"{node.name}_split", [*outer, blocks, len(r)], len(outer))
        product.replace_input_with(0, split.outputs[0])
        joined = _reshape(graph, product.outputs[0], f"{node.name}_joined", [*outer, width], len(outer))
        added = [split, product, joined]
    _typed(graph, product, split.outputs[0].shape if blocks > 1 else value.shape)
    graph.insert_before(node, added)
    node.replace_input_with(0, added[-1].outputs[0])
    multiply_inputs(node, np.asarray(np.kron(np.eye(blocks), r.T), np.float64))


def _reshape(graph: ir.Graph, value: ir.Value, name: str, shape: list[Any], kept: int) -> ir.Node:
    """Return a Reshape that keeps so many leading axes, whatever their lengths."""
    numbers = np.array([0] * kept + shape[kept:], np.int64)
    node = ir.node("Reshape", [value, add_constant(graph, f"{name}_shape", numbers)], name=name)
    _typed(graph, node, ir.Shape(shape))
    return node


def _typed(graph: ir.Graph, node: ir.Node, shape: ir.Shape | None) -> None:
    result = node.outputs[0]
    node.name = result.name = free_name(graph, node_name(node))
    result.type, result.shape = ir.TensorType(ir.DataType.FLOAT), shape
