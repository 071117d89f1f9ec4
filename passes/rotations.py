"""Where channels can be rotated, and what takes the rotation in and back: proven from the graph, or why not.

Rotating residual streams, and values within each head, is due to QuaRot (Ashkboos et al. 2024) and SpinQuant (Liu et
al. 2024), whose R1 and R2 these are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompile.core.contract import Refusal
from qcompile.core.rotation import Place, Site
from qcompile.passes.channels import is_fixed, is_table, linked
from qcompile.passes.fold_matrix import has_computed_bias, takes_shift
from qcompile.passes.index_maps import MOVES
from qcompile.passes.patterns import Attention, Norm, NormKind, Patterns, projection_at, recognise
from qcompile.passes.streams import Segment, Stream, StreamKind, residual_streams
from qcompile.passes.structure import (
    constant,
    constant_tensor,
    data_readers,
    input_of,
    is_float32,
    is_standard,
    name_of,
    node_name,
)


@dataclass(frozen=True, eq=False)
class NormReaders:
    """The operators that read a norm's result, and how its β is taken in.

    Attributes
    ----------
    norm
        A norm that reads a stream.
    readers
        Projections that read its result, moved or not.
    absorbs
        β goes into their biases; else it stays in the norm, rotated and divided by γ.
    """

    norm: Norm
    readers: tuple[ir.Node, ...]
    absorbs: bool


@dataclass(frozen=True, eq=False)
class StreamSite:
    """A residual stream that can be rotated.

    Attributes
    ----------
    place
        How it is named.
    segment
        Its values, writers and readers.
    norms
        The norms that read it, and what reads these.
    constants
        Constants that are written into it: the node and input that read one, and the axis of the channels there.
    """

    place: Place
    segment: Segment
    norms: tuple[NormReaders, ...]
    constants: tuple[tuple[ir.Node, int, int], ...]

    @property
    def written_by(self) -> tuple[ir.Node, ...]:
        """Return the linear operators and the tables that write it."""
        return tuple(_writing(self.segment))


@dataclass(frozen=True, eq=False)
class ValueSite:
    """The values of an attention, which can be rotated within each head.

    Attributes
    ----------
    place
        How it is named.
    attention
        The attention.
    columns
        Integers `[kv_heads, head_dim]`: the channels of each head in what the projection of the values makes.
    rows
        By head of values, integers `[query heads that share it, head_dim]`: the same channels in what the output
        operator reads.
    """

    place: Place
    attention: Attention
    columns: npt.NDArray[np.int64]
    rows: tuple[npt.NDArray[np.int64], ...]


@dataclass(frozen=True, eq=False)
class Rotatable:
    """All places of a graph that can be rotated without another node, and why others cannot."""

    streams: tuple[StreamSite, ...]
    values: tuple[ValueSite, ...]
    refusals: tuple[Refusal, ...]

    @property
    def places(self) -> tuple[Place, ...]:
        """Return the places by name."""
        return (*(site.place for site in self.streams), *(site.place for site in self.values))


def rotatable(graph: ir.Graph, patterns: Patterns | None = None) -> Rotatable:
    """Find every residual stream and every attention of a canonical graph, and prove for each that it can be rotated.

    Parameters
    ----------
    graph
        A canonical one, with shapes; it stays as it is.
    patterns
        What `recognise` found in it, if that is at hand.
    """
    patterns = patterns or recognise(graph)
    streams, values, refusals = list[StreamSite](), list[ValueSite](), list[Refusal]()
    for stream in residual_streams(graph, patterns):
        for segment in stream.segments:
            try:
                streams.append(_stream(graph, stream, segment))
            except _HinderedError as reason:
                refusals.append(Refusal(reason.node, f"the residual stream it belongs to is not rotated: {reason}"))
    for attention in patterns.attentions:
        try:
            values.append(_values(attention))
        except _HinderedError as reason:
            refusals.append(Refusal(reason.node, f"the values of its attention are not rotated: {reason}"))
    return Rotatable(tuple(streams), tuple(values), tuple(refusals))


class _HinderedError(Exception):
    """Why a place cannot be rotated."""

    def __init__(self, node: ir.Node | str, reason: str) -> None:
        super().__init__(reason)
        self.node = node if isinstance(node, str) else node_name(node)


def _stream(graph: ir.Graph, stream: Stream, segment: Segment) -> StreamSite:
    if segment.obstacles:
        first, others = segment.obstacles[0], len(segment.obstacles) - 1
        why = "each norm writes into what the next sum reads, so γ is on the way" if _is_post_norm(stream) else ""
        more = f", and {others} more" if others else ""
        raise _HinderedError(first.node, (why or first.reason) + ("" if why else more))
    foreign = [node for node in _linear(segment) if node.graph is not graph]
    if foreign:
        raise _HinderedError(foreign[0], "what reads it stands in a subgraph")
    for node in _linear(segment):
        _require_plain(node)
    norms = tuple(_norm_readers(graph, norm) for norm in segment.norms)
    constants = tuple(place for value in segment.writers if is_fixed(value) for place in _written(segment, value))
    keeps_ones = any(norm.kind is NormKind.LAYER for norm in segment.norms)
    place = Place(Site.STREAM, node_name(segment.sums[0]), segment.width, keeps_ones=keeps_ones)
    return StreamSite(place, segment, norms, constants)


def _is_post_norm(stream: Stream) -> bool:
    return stream.kind is StreamKind.POST_NORM


def _linear(segment: Segment) -> list[ir.Node]:
    """Return the operators that write a segment, and those that read it."""
    return [*_writing(segment), *(reader for reader in segment.readers if isinstance(reader, ir.Node))]


def _writing(segment: Segment) -> list[ir.Node]:
    return [node for value in segment.writers if (node := value.producer()) is not None and not is_fixed(value)]


def _require_plain(node: ir.Node) -> None:
    """Refuse what cannot take a matrix into its weights."""
    if not is_float32(node.outputs[0]):
        raise _HinderedError(node, f"{node.op_type} is not known to compute in float32")
    if has_computed_bias(node):
        raise _HinderedError(node, f"the bias of {node.op_type} is not one number per channel")


def _norm_readers(graph: ir.Graph, norm: Norm) -> NormReaders:
    """Prove that γ and a rotation of a norm's result can be taken in by what reads it."""
    first = norm.nodes[0]
    if norm.shared:
        raise _HinderedError(first, "what stands inside of a norm is read by others")
    if any(node.graph is not graph for node in norm.nodes):
        raise _HinderedError(first, "a norm of it stands in a subgraph")
    width = (norm.source.shape or ())[norm.axes[0]]
    for value in (norm.gamma, norm.beta):
        if value is not None and not _is_vector(value, norm.axes[0], width):
            raise _HinderedError(first, "γ or β of a norm is not one number per channel")
    readers, keeps_shift = _reached(graph, norm.result, norm.axes[0])
    if not readers:
        raise _HinderedError(first, "no operator reads a norm of it")
    for node in readers:
        _require_plain(node)
    absorbs = keeps_shift and all(_takes_shift(node) for node in readers)
    if norm.beta is not None and not absorbs and norm.gamma is not None:
        gamma, beta = constant(norm.gamma), constant(norm.beta)
        assert gamma is not None and beta is not None
        if np.any((gamma.reshape(-1) == 0) & (beta.reshape(-1) != 0)):
            raise _HinderedError(first, "γ of a norm is zero where β is not, and no bias behind it can take β in")
    return NormReaders(norm, readers, absorbs)


def _is_vector(value: ir.Value, axis: int, width: object) -> bool:
    shape = tuple(value.shape or ())
    return (
        -axis <= len(shape)
        and shape[axis] == width
        and all(length == 1 for at, length in enumerate(shape) if at - len(shape) != axis)
    )


def _takes_shift(node: ir.Node) -> bool:
    projection = projection_at(node)
    return projection is not None and takes_shift(node, projection.bias)


#: What a constant of each channel passes unchanged.
_KEEPS_SHIFT = frozenset({*MOVES, "Cast", "Dropout", "Identity", "ReduceMean"})


def _reached(graph: ir.Graph, value: ir.Value, axis: int) -> tuple[tuple[ir.Node, ...], bool]:
    """Return the projections that read a value's channels, moved or not, and whether a constant of them arrives so."""
    edge, seen, found, keeps_shift = [(value, axis)], {value}, dict[ir.Node, None](), True
    while edge:
        value, axis = edge.pop()
        if value.is_graph_output():
            raise _HinderedError(
                value.producer() or name_of(value), "what a norm makes of it is an output of the model"
            )
        for node in data_readers(value):
            if node.graph is not graph:
                raise _HinderedError(node, "what reads a norm of it stands in a subgraph")
            projection = projection_at(node)
            if projection is not None and node.inputs[0] is value and axis == projection.axis:
                found[node] = None
                continue
            ends = [] if is_standard(node, "Add", "Sub", "Concat") else linked(node, value, axis)
            if not ends:
                raise _HinderedError(node, f"{node.op_type} reads a norm of it")
            keeps_shift &= is_standard(node, *_KEEPS_SHIFT)
            edge += [(end, at) for end, at in ends if end not in seen]
            seen |= {end for end, _ in ends}
    return tuple(found), keeps_shift


def _written(segment: Segment, value: ir.Value) -> Iterator[tuple[ir.Node, int, int]]:
    """Yield where a constant that is written into a stream, or what it is moved from, is read: node, input, axis."""
    uses = list(_uses(segment, value))
    inside = {node for node, _, _ in uses}
    axis, moved = uses[0][2], False
    while constant_tensor(value) is None:
        moved = True
        node = value.producer()
        assert node is not None, "a fixed value stands behind operators that move a constant"
        if any(reader not in inside for reader in data_readers(value)) or value.is_graph_output():
            raise _HinderedError(node, "a constant of it is moved for others too")
        before = [at for end, at in linked(node, value, axis) if end is node.inputs[0]]
        if not before:
            raise _HinderedError(node, "a constant of it comes from where its channels cannot be followed")
        value, axis, inside = input_of(node, 0), before[0], {node}
        last = node
    if moved:
        yield last, 0, axis
    else:
        yield from uses


def _uses(segment: Segment, value: ir.Value) -> Iterator[tuple[ir.Node, int, int]]:
    for use in value.uses():
        node = use.node
        axis = segment.axes.get(value, segment.axes.get(node.outputs[0]))
        if axis is not None and node.outputs[0] in segment.axes and projection_at(node) is None and not is_table(node):
            yield node, use.idx, axis


def _values(attention: Attention) -> ValueSite:
    """Prove that each head of the values can be rotated in its projection, and back in the output operator."""
    softmax, operand, output = attention.softmax, attention.value, attention.output
    if operand.projection is None or operand.channels is None:
        raise _HinderedError(softmax, "they come from no linear operator, or from several")
    if operand.norm is not None or operand.rope is not None:
        raise _HinderedError(softmax, "a norm or a rotary embedding stands on their way")
    if output is None or attention.output_channels is None:
        raise _HinderedError(softmax, "no linear operator reads all heads side by side")
    for node in (operand.projection.node, output.node):
        _require_plain(node)
    _require_alone(attention)
    heads = np.asarray(operand.channels, np.int64)
    columns, first = np.unique(heads, axis=0, return_index=True)
    columns = columns[np.argsort(first)]
    count, width = columns.shape
    if len(np.unique(columns)) != count * width:
        raise _HinderedError(softmax, "their heads share channels")
    order = np.asarray(attention.output_channels, np.int64)
    if sorted(order.tolist()) != list(range(heads.size)):
        raise _HinderedError(softmax, "the output operator does not read each of their channels once")
    rows = np.argsort(order).reshape(heads.shape)
    groups = tuple(rows[(heads == column).all(axis=1)] for column in columns)
    place = Place(Site.VALUES, node_name(softmax), width, copies=count)
    return ValueSite(place, attention, columns, groups)


def _require_alone(attention: Attention) -> None:
    """Refuse where others than the attention read its values, between their projection and the product."""
    operand = attention.value
    assert operand.projection is not None and operand.channels is not None
    known = {*attention.nodes, *((operand.projection.bias,) if operand.projection.bias else ())}
    for node in (operand.projection.node, *known):
        if node is operand.projection.node or node in operand.nodes or node is operand.projection.bias:
            _require_readers(node.outputs, known)
    mine = set(operand.channels.reshape(-1).tolist())
    for other in (attention.query, attention.key):
        same = other.projection is not None and other.projection.node is operand.projection.node
        if same and other.channels is not None and mine & set(other.channels.reshape(-1).tolist()):
            raise _HinderedError(attention.softmax, "its queries or keys are the same channels")


def _require_readers(values: Sequence[ir.Value], known: set[ir.Node]) -> None:
    for value in values:
        if value.is_graph_output():
            raise _HinderedError(value.producer() or name_of(value), "they are an output of the model")
        for reader in data_readers(value):
            if reader not in known:
                raise _HinderedError(reader, f"{reader.op_type} reads them too")
