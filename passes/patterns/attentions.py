"""Scaled dot-product attention (Vaswani et al. 2017); heads may share keys and values (Ainslie et al. 2023)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from qcompile.core.contract import Refusal
from qcompile.passes.index_maps import MOVES, Labels, moved, scalar
from qcompile.passes.patterns.norms import Norm
from qcompile.passes.patterns.projections import Projection, Trace, projection_at
from qcompile.passes.patterns.ropes import Rope
from qcompile.passes.structure import (
    constant_tensor,
    data_readers,
    input_of,
    is_standard,
    node_name,
    only_reader,
)


@dataclass(frozen=True, eq=False)
class Operand:
    """Queries, keys or values, and where they come from.

    Attributes
    ----------
    value
        What the MatMul reads.
    projection
        The linear operator whose channels these are; None if they come from elsewhere, such as a cache.
    channels
        Integers `[heads, head_dim]`: which channel of the projection's result stands at each place, by **query** head,
        so that keys and values that several query heads share appear several times. None without a projection.
    norm, rope
        Between the projection and the value, or None.
    nodes
        What stands between the projection and the value.
    """

    value: ir.Value
    projection: Projection | None
    channels: Labels | None
    norm: Norm | None
    rope: Rope | None
    nodes: tuple[ir.Node, ...]


@dataclass(frozen=True, eq=False)
class Attention:
    """softmax(scale · Q Kᵀ + masks) V.

    Attributes
    ----------
    query, key, value
        The operands.
    heads, kv_heads, head_dim
        How many query heads, how many heads of keys and values, and the channels of each query.
    scale
        The product of every factor between the projections and the softmax.
    masks
        What is added to the scores, and conditions that replace some.
    scores, softmax, mix
        The nodes of Q Kᵀ, of the softmax, and of the product with V.
    output
        The linear operator that reads all heads side by side, or None.
    output_channels
        Integers `[heads · head_dim]` of V: which (head · head_dim + place) each input channel of `output` is, or None.
    nodes
        All of its nodes without the projections.
    """

    query: Operand
    key: Operand
    value: Operand
    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    masks: tuple[ir.Value, ...]
    scores: ir.Node
    softmax: ir.Node
    mix: ir.Node
    output: Projection | None
    output_channels: Labels | None
    nodes: tuple[ir.Node, ...]

    @property
    def rope(self) -> Rope | None:
        """Return the rotary embedding of the queries, if both queries and keys have one."""
        return self.query.rope if self.key.rope is not None else None


def attentions(
    graph: ir.Graph, norms: Sequence[Norm], ropes: Sequence[Rope]
) -> tuple[tuple[Attention, ...], tuple[Refusal, ...]]:
    """Find every attention, in the order of the graph, and say why what looks like one is none.

    A softmax over the last axis whose result a MatMul multiplies with an activation looks like one.
    """
    by_norm = {norm.result: norm for norm in norms}
    by_rope = {rope.result: rope for rope in ropes}
    found, refusals = [], []
    for node in graph:
        if is_standard(node, "Attention"):
            refusals.append(Refusal(node_name(node), "the fused Attention operator is not looked into"))
        if not is_standard(node, "Softmax"):
            continue
        attention = _attention(node, by_norm, by_rope)
        if isinstance(attention, Attention):
            found.append(attention)
        elif attention is not None:
            refusals.append(Refusal(node_name(node), attention))
    return tuple(found), tuple(refusals)


@dataclass
class _Scores:
    """The way from a softmax back to the product of queries and keys."""

    product: ir.Node | None = None
    factor: float = 1.0
    masks: list[ir.Value] = field(default_factory=list)
    nodes: list[ir.Node] = field(default_factory=list)
    reason: str = "its scores are no product of two activations"

    def back(self, value: ir.Value | None, depth: int = 0) -> bool:
        """Follow scales, masks and reshapes back; tell whether a MatMul of two activations was reached."""
        node = None if value is None else value.producer()
        if node is None or value is None or depth > 12:
            return False
        if is_standard(node, "Einsum"):
            self.reason = "its scores come from an Einsum, which is not looked into"
        if is_standard(node, "MatMul"):
            if any(constant_tensor(x) is not None for x in node.inputs):
                return False
            self.product = node
            return True
        reached = self._step(node, depth)
        if reached:
            self.nodes.append(node)
        return reached

    def _step(self, node: ir.Node, depth: int) -> bool:
        first = node.inputs[0] if node.inputs else None
        if is_standard(node, "Cast", "Identity") or (is_standard(node, "Flatten", "Reshape") and _keeps_last(node)):
            return self.back(first, depth + 1)
        if is_standard(node, "Mul", "Div"):
            for i in (0, 1) if node.op_type == "Mul" else (1,):
                number = scalar(node.inputs[i])
                if number and self.back(node.inputs[1 - i], depth + 1):
                    self.factor *= number if node.op_type == "Mul" else 1 / number
                    return True
            return False
        if is_standard(node, "Add", "Where"):
            branches = [x for x in node.inputs[-2:] if x is not None]
            for branch, other in (branches, reversed(branches)):
                if self.back(branch, depth + 1):
                    self.masks.append(other if node.op_type == "Add" else input_of(node, 0))
                    return True
        return False


def _keeps_last(node: ir.Node) -> bool:
    """Tell whether a Reshape or Flatten leaves the last axis whole."""
    before, after = input_of(node, 0), node.outputs[0]
    if node.op_type == "Flatten" and before.shape is not None:
        return node.attributes.get_int("axis", 1) in (-1, len(before.shape) - 1)
    if before.shape is not None and after.shape is not None and len(before.shape) and len(after.shape):
        last = before.shape[-1], after.shape[-1]
        if last[0] == last[1] and (isinstance(last[0], int) or last[0].value is not None):
            return True
    # A Reshape back to the shape of what was flattened, as the opset converter writes it around Softmax.
    shape = node.inputs[1].producer() if len(node.inputs) > 1 and node.inputs[1] is not None else None
    softmax = before.producer()
    flat = softmax.inputs[0].producer() if softmax is not None and softmax.inputs and softmax.inputs[0] else None
    return (
        shape is not None
        and flat is not None
        and is_standard(shape, "Shape")
        and is_standard(flat, "Flatten")
        and shape.inputs[0] is flat.inputs[0]
    )


def _mixes(value: ir.Value, nodes: tuple[ir.Node, ...] = ()) -> Iterator[tuple[ir.Node, bool, tuple[ir.Node, ...]]]:
    """Yield each MatMul or Einsum that reads the weights, whether they are transposed there, and the nodes between."""
    for node in data_readers(value):
        if is_standard(node, "Einsum"):
            yield node, False, nodes
        elif is_standard(node, "MatMul"):
            last = nodes[-1] if nodes else None
            transposed = last is not None and is_standard(last, "Transpose")
            if node.inputs[int(transposed)] is value and constant_tensor(node.inputs[1 - int(transposed)]) is None:
                yield node, transposed, nodes
        elif len(nodes) < 4 and (
            is_standard(node, "Cast", "Dropout", "Identity")
            or (is_standard(node, "Reshape") and _keeps_last(node))
            or (is_standard(node, "Where") and value in node.inputs[1:] and _is_number_or(node, value))
            or (is_standard(node, "Transpose") and _swaps_last(node))
        ):
            yield from _mixes(node.outputs[0], (*nodes, node))


def _is_number_or(where: ir.Node, value: ir.Value) -> bool:
    """Tell whether a Where puts a number in place of some weights, as exporters do against rows that are all masked."""
    other = where.inputs[1] if where.inputs[2] is value else where.inputs[2]
    return scalar(other) == 0.0


def _swaps_last(node: ir.Node) -> bool:
    perm = list(node.attributes.get_ints("perm", ()))
    rank = len(perm)
    return rank >= 2 and perm == [*range(rank - 2), rank - 1, rank - 2]


def _attention(
    softmax: ir.Node, norms: Mapping[ir.Value, Norm], ropes: Mapping[ir.Value, Rope]
) -> Attention | str | None:
    """Return the attention around a softmax, or why it is none; None if nothing is to be said."""
    mix, transposed, between = next(_mixes(softmax.outputs[0]), (None, False, ()))
    if mix is None:
        return None
    scores = _Scores()
    reached = scores.back(softmax.inputs[0])
    if mix.op_type == "Einsum":
        return "its weights go into an Einsum, which is not looked into"
    if not _over_the_last(softmax):
        return "its softmax is not over the last axis"
    if not reached or scores.product is None:
        return scores.reason
    values = (input_of(scores.product, 0), input_of(scores.product, 1), input_of(mix, 0 if transposed else 1))
    traces = [Trace(norms, ropes) for _ in values]
    heads = _heads(values, [trace.back(value) for trace, value in zip(traces, values, strict=True)], transposed)
    if isinstance(heads, str):
        return heads
    parts = [
        _operand(value, trace, channels) for value, trace, channels in zip(values, traces, heads.channels, strict=True)
    ]
    after, output, order = _merged(mix, heads, transposed)
    nodes = dict.fromkeys(node for part in parts for node in part.nodes)
    nodes |= dict.fromkeys([scores.product, *scores.nodes, softmax, *between, mix, *after])
    scale = scores.factor * traces[0].factor * traces[1].factor
    masks = tuple(scores.masks)
    return Attention(
        parts[0], parts[1], parts[2], heads.count, heads.shared, heads.size, scale, masks,
        scores.product, softmax, mix, output, order, tuple(nodes),
    )  # fmt: skip


def _over_the_last(softmax: ir.Node) -> bool:
    shape, axis = input_of(softmax, 0).shape, softmax.attributes.get_int("axis", -1)
    return axis == -1 or (shape is not None and axis == len(shape) - 1)


def _operand(value: ir.Value, trace: Trace, channels: Labels | None) -> Operand:
    projection = trace.projections[0] if channels is not None else None
    if projection is None:  # what was met on the way is no part of it
        return Operand(value, None, None, None, None, ())
    return Operand(value, projection, channels, trace.norm, trace.rope, tuple(trace.nodes))


def _rows(found: Labels) -> Labels | None:
    """Return the channels by head, `[..., head_dim]`, of `[..., tokens, head_dim]` if every token has the same."""
    if found.ndim < 2 or not (found == found[..., :1, :]).all():
        return None
    return found[..., 0, :]


@dataclass(frozen=True)
class _Heads:
    """The heads of an attention: their counts, and by operand the channels `[heads, head_dim]` if known."""

    count: int
    shared: int
    size: int
    channels: tuple[Labels | None, ...]
    #: Which head stands where on the leading axes of the product, None if the queries are not traced.
    places: Labels | None


def _heads(values: Sequence[ir.Value], maps: Sequence[Labels | None], transposed: bool) -> _Heads | str:
    """Count heads by the channels that the operands hold, else by the axes that the shapes show; else say why not."""
    upright = (True, False, not transposed)
    rows = [
        None if found is None else _rows(found if right else found.swapaxes(-1, -2))
        for found, right in zip(maps, upright, strict=True)
    ]
    if any(found is not None and row is None for found, row in zip(maps, rows, strict=True)):
        return "the channels of its heads do not stand on the axes that are multiplied"
    if rows[0] is None:
        return _heads_by_shape(values)
    try:
        leading = np.broadcast_shapes(*(row.shape[:-1] for row in rows if row is not None))
    except ValueError:
        return "the heads of its queries, keys and values do not fit one another"
    flat = [
        None if row is None else np.broadcast_to(row, (*leading, row.shape[-1])).reshape(-1, row.shape[-1])
        for row in rows
    ]
    return _heads_by_channel(flat, leading)


def _heads_by_channel(flat: Sequence[Labels | None], leading: tuple[int, ...]) -> _Heads | str:
    """Tell heads apart by the channels of their queries, in the order in which they stand."""
    assert flat[0] is not None
    _, first, places = np.unique(flat[0], axis=0, return_index=True, return_inverse=True)
    order = np.argsort(first)
    channels = tuple(None if row is None else row[first[order]] for row in flat)
    count, size = len(order), flat[0].shape[1]
    shared = {len(np.unique(row, axis=0)) for row in channels[1:] if row is not None} or {count}
    if len(shared) > 1 or count % max(shared):
        return "its keys and values have heads that its queries do not share evenly"
    if np.unique(flat[0]).size != count * size:
        return "its heads share channels"
    return _Heads(count, max(shared), size, channels, np.argsort(order)[places.reshape(-1)].reshape(leading))


def _heads_by_shape(values: Sequence[ir.Value]) -> _Heads | str:
    shapes = [list(value.shape) if value.shape is not None else [] for value in values]
    lengths = [shape[-3] if len(shape) > 3 else 1 for shape in shapes]
    heads, shared, size = lengths[0], lengths[1], shapes[0][-1] if shapes[0] else None
    if min(map(len, shapes)) < 3 or not (isinstance(heads, int) and isinstance(shared, int) and isinstance(size, int)):
        return "its heads are not known, for its queries come from no linear operator"
    return _Heads(heads, shared, size, (None, None, None), None)


def _merged(mix: ir.Node, heads: _Heads, transposed: bool) -> tuple[list[ir.Node], Projection | None, Labels | None]:
    """Follow the heads to the linear operator that reads them side by side, and their channels with them."""
    value, nodes, order = mix.outputs[0], list[ir.Node](), _mixed(mix, heads, transposed)
    while True:
        node = only_reader(value)
        if node is None:
            return nodes, None, None
        projection = projection_at(node)
        if projection is not None and node.inputs[0] is value:
            return nodes, projection, None if order is None else _side_by_side(order, projection.axis)
        if not is_standard(node, "Cast", "Dropout", "Identity", *MOVES) or len(nodes) > 8:
            return nodes, None, None
        if order is not None and is_standard(node, *MOVES):
            results = moved(node, order)
            order = None if results is None else results[0]
        nodes.append(node)
        value = node.outputs[0]


def _mixed(mix: ir.Node, heads: _Heads, transposed: bool) -> Labels | None:
    """Return what the product with V holds at each place, numbered head · head_dim + place."""
    value = heads.channels[2]
    tokens = mix.outputs[0].shape[-1 if transposed else -2] if mix.outputs[0].shape is not None else None
    if heads.places is None or value is None:
        return None
    size = value.shape[-1]
    numbers = heads.places[..., None, None] * size + np.arange(size)
    numbers = np.broadcast_to(numbers, (*heads.places.shape, tokens if isinstance(tokens, int) else 1, size))
    return numbers.swapaxes(-1, -2) if transposed else numbers


def _side_by_side(order: Labels, axis: int) -> Labels | None:
    if order.ndim < -axis:
        return None
    flat = np.moveaxis(order, axis, -1)
    flat = flat.reshape(-1, flat.shape[-1])
    return flat[0] if (flat == flat[0]).all() and math.prod(flat.shape) else None
