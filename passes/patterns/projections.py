"""Linear operators with constant weights, and the channels that reach other places from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from qcompile.passes.index_maps import MOVES, Labels, labels, moved, scalar
from qcompile.passes.patterns.norms import Norm
from qcompile.passes.patterns.ropes import Rope
from qcompile.passes.structure import constant_tensor, input_of, is_standard, only_reader, other_input, produced_by


@dataclass(frozen=True, eq=False)
class Projection:
    """A MatMul, Gemm or ungrouped Conv with constant weights, and the Add of its bias.

    Attributes
    ----------
    node
        The operator.
    bias
        The Add of a constant that stands alone behind it, or None; a Gemm or Conv may have a bias of its own too.
    result
        What comes out, biased.
    axis
        The axis of its channels, counted from the last: -1, or that of Conv.
    width
        How many channels come out.
    """

    node: ir.Node
    bias: ir.Node | None
    result: ir.Value
    axis: int
    width: int


def projection_at(node: ir.Node | None) -> Projection | None:
    """Return the projection whose operator a node is, with the Add of its bias, else None."""
    if node is None or not is_standard(node, "MatMul", "Gemm", "Conv"):
        return None
    weight, result = constant_tensor(node.inputs[1]), node.outputs[0]
    if weight is None or result.shape is None:
        return None
    if node.op_type == "Conv":
        whole = node.attributes.get_int("group", 1) == 1
    else:
        whole = len(weight.shape) == 2 and not node.attributes.get_int("transA", 0)
    if not whole:
        return None
    axis = 1 - len(result.shape) if node.op_type == "Conv" else -1
    width = result.shape[axis]
    if not isinstance(width, int):  # nobody inferred it
        return None
    add = only_reader(result)
    if add is not None and is_standard(add, "Add") and _is_bias(other_input(add, result), axis):
        return Projection(node, add, add.outputs[0], axis, width)
    return Projection(node, None, result, axis, width)


def projection_of(value: ir.Value | None) -> Projection | None:
    """Return the projection that a value is the biased result of, else None."""
    node = None if value is None else value.producer()
    if node is not None and is_standard(node, "Add"):
        behind = [produced_by(x, "MatMul", "Gemm", "Conv") for x in node.inputs]
        node = next((x for x in behind if x is not None), None)
    projection = projection_at(node)
    return projection if projection is not None and projection.result is value else None


def _is_bias(value: ir.Value | None, axis: int) -> bool:
    """Tell whether a constant is one number per channel."""
    tensor = constant_tensor(value)
    return tensor is not None and all(
        length == 1 or position == axis
        for position, length in zip(range(-len(tensor.shape), 0), tensor.shape, strict=True)
    )


@dataclass
class Trace:
    """What stands between a projection and a value that holds its channels, moved, scaled, normalized or turned.

    Attributes
    ----------
    norms, ropes
        The recognised ones of the graph, by result; their channels are followed through.
    """

    norms: Mapping[ir.Value, Norm]
    ropes: Mapping[ir.Value, Rope]
    projections: list[Projection] = field(default_factory=list)
    factor: float = 1.0
    norm: Norm | None = None
    rope: Rope | None = None
    nodes: dict[ir.Node, None] = field(default_factory=dict)
    seen: dict[ir.Value, Labels | None] = field(default_factory=dict)

    def back(self, value: ir.Value) -> Labels | None:
        """Return, at each place of a value, which channel of the projection stands there; None if that is not told.

        Numbers of several projections cannot be told apart, so there must be one.
        """
        if value not in self.seen:
            self.seen[value] = self._back(value)
        found = self.seen[value]
        return found if len({projection.node for projection in self.projections}) == 1 else None

    def _back(self, value: ir.Value) -> Labels | None:
        projection = projection_of(value)
        if projection is not None:
            self.projections.append(projection)
            return labels(projection.result, projection.axis)
        if (rope := self.ropes.get(value)) is not None:
            self.rope = rope
            self.nodes.update(dict.fromkeys(rope.nodes))
            return self.back(rope.source)
        if (norm := self.norms.get(value)) is not None:
            self.norm = norm
            self.nodes.update(dict.fromkeys(norm.nodes))
            return self.back(norm.source)
        node = value.producer()
        if node is None or len(self.nodes) > 64:
            return None
        self.nodes[node] = None
        return self._through(node, value)

    def _through(self, node: ir.Node, value: ir.Value) -> Labels | None:
        if is_standard(node, "Mul", "Div"):
            return self._scaled(node)
        if is_standard(node, "Cast", "Dropout", "Identity"):
            return self.back(input_of(node, 0))
        if is_standard(node, "Concat"):
            return self._joined(node)
        source = self.back(input_of(node, 0)) if is_standard(node, *MOVES) else None
        results = None if source is None else moved(node, source)
        return None if results is None else results[value.index() or 0]

    def _joined(self, node: ir.Node) -> Labels | None:
        before = self.factor
        parts = [self.back(x) for x in node.inputs if x is not None]
        known = [part for part in parts if part is not None]
        if len(known) < len(parts) or self.factor != before:  # the parts may be scaled differently
            return None
        try:
            return np.concatenate(known, node.attributes.get_int("axis", 0))
        except ValueError:  # lengths that the graph does not tell
            return None

    def _scaled(self, node: ir.Node) -> Labels | None:
        numbers = [scalar(x) for x in node.inputs]
        if numbers[1] is not None and numbers[1] != 0.0:
            self.factor *= numbers[1] if node.op_type == "Mul" else 1 / numbers[1]
            return self.back(input_of(node, 0))
        if numbers[0] is not None and node.op_type == "Mul":
            self.factor *= numbers[0]
            return self.back(input_of(node, 1))
        return None
