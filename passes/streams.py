"""Residual streams: tensors that are one through sums, so that their channels can only be changed together.

A factor or a rotation of channels that is folded into one writer of a stream must be folded into all of them, and taken
back in every reader. What a stream is, who writes it and who reads it is proven here from the graph; so is why not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property

import networkx as nx
import onnx_ir as ir

from qcompile.core.contract import Refusal
from qcompile.passes.channels import is_fixed, is_table, length, linked
from qcompile.passes.patterns import Norm, Patterns, projection_at, recognise
from qcompile.passes.structure import constant_tensor, data_readers, input_of, is_standard, node_name


class StreamKind(StrEnum):
    """Where norms and activations stand.

    PRE_NORM: norms read it on the way to the operators of each branch. POST_NORM: each sum goes through a norm into the
    next. LINEAR: no norms, and nothing but linear operators around it, as in MobileNetV2. CONVOLUTIONAL: no norms.
    SUM: no value passes by, all branches of each sum are computed, such as behind a projected shortcut.
    """

    PRE_NORM = "pre-norm"
    POST_NORM = "post-norm"
    LINEAR = "linear bottleneck"
    CONVOLUTIONAL = "CNN residual"
    SUM = "sum of branches"


@dataclass(frozen=True, eq=False)
class Segment:
    """Values that sums and moves make one: what can be scaled or rotated by itself.

    Attributes
    ----------
    axes
        Every value of it, with the axis of its channels counted from the last.
    width
        How many channels.
    sums
        Its Adds and Subs of two values that both depend on what is fed.
    writers
        The values that come from outside: results of linear operators, rows of a table, constants, others.
    readers
        What reads it, norms first: a Norm, or the node of a linear operator.
    passes
        Whether a value reaches a sum past operators that read it too: a shortcut without weights.
    obstacles
        Writers and readers that are neither linear along the channels nor a norm over them. Norms that write are among
        these: a scale goes into their γ and β, a rotation does not.
    """

    axes: Mapping[ir.Value, int]
    width: int
    sums: tuple[ir.Node, ...]
    writers: tuple[ir.Value, ...]
    readers: tuple[Norm | ir.Node, ...]
    passes: bool
    obstacles: tuple[Refusal, ...]

    @property
    def norms(self) -> tuple[Norm, ...]:
        """Return the norms that read it."""
        return tuple(reader for reader in self.readers if isinstance(reader, Norm))


@dataclass(frozen=True, eq=False)
class Stream:
    """Segments one behind the other, with a norm or an activation between each two; most streams are one segment.

    Attributes
    ----------
    kind
        Where norms and activations stand.
    segments
        In the order of the graph.
    joints
        The norms, or the last nodes of activations, that read one segment and write another.
    """

    kind: StreamKind
    segments: tuple[Segment, ...]
    joints: tuple[Norm | ir.Node, ...]

    @property
    def width(self) -> int:
        """Return how many channels there are."""
        return self.segments[0].width

    @property
    def writers(self) -> tuple[ir.Value, ...]:
        """Return the writers of all segments."""
        return tuple(writer for segment in self.segments for writer in segment.writers)

    @property
    def readers(self) -> tuple[Norm | ir.Node, ...]:
        """Return the readers of all segments."""
        return tuple(reader for segment in self.segments for reader in segment.readers)

    @property
    def obstacles(self) -> tuple[Refusal, ...]:
        """Return what is neither linear nor a norm at its border: why no rotation of all channels can be folded."""
        return tuple(obstacle for segment in self.segments for obstacle in segment.obstacles)


def residual_streams(graph: ir.Graph, patterns: Patterns | None = None) -> tuple[Stream, ...]:
    """Find every component of values with a sum of two in it, in the order of the graph.

    Parameters
    ----------
    graph
        A canonical one, with shapes.
    patterns
        What `recognise` found in it, if that is at hand.
    """
    finder = _Finder(graph, patterns or recognise(graph))
    finder.spread()
    segments = [segment for values in finder.components() if (segment := finder.segment(values)) is not None]
    segments.sort(key=lambda segment: finder.order[segment.sums[0]])
    home = {value: i for i, segment in enumerate(segments) for value in segment.axes}
    joined: nx.Graph[int] = nx.Graph()
    joined.add_nodes_from(range(len(segments)))
    joints = []
    for source, result, what in finder.joints:
        ends = home.get(source), home.get(result)
        if ends[0] is None or ends[1] is None or ends[0] == ends[1]:
            continue
        # A norm between sums past which no value passes is the end of one stream, not the middle.
        if not isinstance(what, Norm) or all(segments[end].passes for end in ends if end is not None):
            joined.add_edge(*ends)
            joints.append((ends[1], what))
    streams = []
    for group in nx.connected_components(joined):
        inside = tuple(what for at, what in joints if at in group)
        streams.append(_stream(tuple(segments[i] for i in sorted(group)), inside))
    return tuple(streams)


def _stream(segments: tuple[Segment, ...], joints: tuple[Norm | ir.Node, ...]) -> Stream:
    if not any(segment.passes for segment in segments):
        kind = StreamKind.SUM
    elif any(isinstance(joint, Norm) for joint in joints):
        kind = StreamKind.POST_NORM
    elif any(segment.norms for segment in segments):
        kind = StreamKind.PRE_NORM
    else:
        hindered = joints or any(segment.obstacles for segment in segments)
        kind = StreamKind.CONVOLUTIONAL if hindered else StreamKind.LINEAR
    return Stream(kind, segments, joints)


#: Nonlinear functions of one element: they end a segment, and may start the next.
_ELEMENTWISE = frozenset(
    {"Celu", "Clip", "Elu", "Gelu", "HardSigmoid", "HardSwish", "LeakyRelu", "Mish", "PRelu", "Relu", "Selu", "Sigmoid",
     "Softplus", "Swish", "Tanh", "ThresholdedRelu"}
)  # fmt: skip


@dataclass
class _Finder:
    """The values of a graph, the axis of the channels of each, and which are one."""

    graph: ir.Graph
    patterns: Patterns
    axes: dict[ir.Value, int] = field(default_factory=dict)
    links: nx.Graph[ir.Value] = field(default_factory=nx.Graph)
    through: dict[ir.Node, None] = field(default_factory=dict)
    torn: set[ir.Value] = field(default_factory=set)

    @cached_property
    def order(self) -> dict[ir.Node, int]:
        """Where each node stands."""
        return {node: i for i, node in enumerate(self.graph)}

    @cached_property
    def inside(self) -> set[ir.Node]:
        """The nodes of patterns, which pass nothing on as they are."""
        found = self.patterns
        kinds = (found.norms, found.activations, found.ropes, found.attentions)
        groups = [pattern.nodes for patterns in kinds for pattern in patterns]
        return {node for nodes in groups for node in nodes}

    @cached_property
    def norm_of(self) -> dict[ir.Node, Norm]:
        """The norm that a node belongs to."""
        return {node: norm for norm in self.patterns.norms for node in norm.nodes}

    @cached_property
    def joints(self) -> list[tuple[ir.Value, ir.Value, Norm | ir.Node]]:
        """What may stand between two segments: source, result, and the norm or the last node of the activation."""
        found: list[tuple[ir.Value, ir.Value, Norm | ir.Node]] = []
        found += [(norm.source, norm.result, norm) for norm in self.patterns.norms]
        found += [(x.source, x.result, x.nodes[-1]) for x in self.patterns.activations]
        for node in self.graph:
            if is_standard(node, *_ELEMENTWISE) and node not in self.inside:
                found.append((input_of(node, 0), node.outputs[0], node))
        return found

    @cached_property
    def activated(self) -> set[ir.Value]:
        """The results of activations."""
        return {result for _, result, what in self.joints if not isinstance(what, Norm)}

    def spread(self) -> None:
        """Give channels an axis where they are made, then where they are read, and carry it to all that is linked."""
        for seeds in (self._made(), self._read()):
            self._carry([value for value, axis in seeds if value not in self.axes and self._mark(value, axis)])

    def _carry(self, edge: list[ir.Value]) -> None:
        while edge:
            value = edge.pop()
            if is_fixed(value):  # one constant added in two places does not make these one
                continue
            producer = value.producer()
            for node in (*data_readers(value), *(() if producer is None else (producer,))):
                if node in self.inside or node.graph is not self.graph:
                    continue
                for other, axis in linked(node, value, self.axes[value]):
                    self.through[node] = None
                    self.links.add_edge(value, other)
                    if self._mark(other, axis):
                        edge.append(other)

    def _mark(self, value: ir.Value, axis: int) -> bool:
        """Note the axis; tell whether it is news."""
        if value in self.axes:
            if self.axes[value] != axis:
                self.torn.add(value)
            return False
        self.axes[value] = axis
        return True

    def _made(self) -> Iterator[tuple[ir.Value, int]]:
        for norm in self.patterns.norms:
            if len(norm.axes) == 1:
                yield norm.result, norm.axes[0]
        for node in self.graph:
            if node not in self.inside and is_table(node):
                yield node.outputs[0], -1
            elif self._is_linear(node):
                yield node.outputs[0], _channel_axis(node, node.outputs[0])

    def _read(self) -> Iterator[tuple[ir.Value, int]]:
        for norm in self.patterns.norms:
            if len(norm.axes) == 1:
                yield norm.source, norm.axes[0]
        for node in self.graph:
            if self._is_linear(node):
                yield input_of(node, 0), _channel_axis(node, input_of(node, 0))

    def _is_linear(self, node: ir.Node) -> bool:
        """Tell whether a node is a linear operator with constant weights, grouped ones among them."""
        linear = is_standard(node, "Conv", "Gemm", "MatMul") and node not in self.inside
        return linear and constant_tensor(node.inputs[1]) is not None

    def components(self) -> Iterator[set[ir.Value]]:
        """Yield the values that are one."""
        yield from nx.connected_components(self.links)

    def segment(self, values: set[ir.Value]) -> Segment | None:
        """Return what a component is, None if nothing is summed in it."""
        through = [node for node in self.through if any(output in values for output in node.outputs)]
        sums = [node for node in through if is_standard(node, "Add", "Sub") and not any(map(is_fixed, node.inputs))]
        if not sums:
            return None
        sums.sort(key=self.order.__getitem__)
        inner = set(through)
        writers = [value for value in values if value.producer() not in inner]
        fixed = (value for node in through if is_standard(node, "Add", "Concat", "Sub") for value in node.inputs)
        writers += dict.fromkeys(value for value in fixed if value is not None and is_fixed(value))
        writers.sort(key=self._position)
        hinder = [Refusal(_label(value), reason) for value in writers if (reason := self._hinders_writing(value))]
        readers, against = self._readers(sorted(values, key=self._position), inner)
        width = length(sums[0].outputs[0], self.axes[sums[0].outputs[0]]) or 0
        axes, passes = {value: self.axes[value] for value in values}, self._passes(values, writers)
        obstacles = tuple(dict.fromkeys([*hinder, *against]))
        return Segment(axes, width, tuple(sums), tuple(writers), readers, passes, obstacles)

    def _position(self, value: ir.Value) -> tuple[int, str]:
        node = value.producer()
        return (-1 if node is None else self.order[node]), value.name or ""

    def _readers(self, values: list[ir.Value], inner: set[ir.Node]) -> tuple[tuple[Norm | ir.Node, ...], list[Refusal]]:
        """Return what reads values as they may be read, norms first, and what stands against the rest."""
        norms, linear, against = dict[Norm, None](), dict[ir.Node, None](), list[Refusal]()
        for value in values:
            if value.is_graph_output():
                against.append(Refusal(_label(value), "it is an output of the model"))
            if value in self.torn:
                against.append(Refusal(_label(value), "its channels are on several axes"))
            for node in data_readers(value):
                norm = self.norm_of.get(node)
                if node in inner:
                    continue
                if norm is not None and norm.source is value and norm.axes == (self.axes[value],):
                    norms[norm] = None
                elif self._reads_linearly(node, value):
                    linear[node] = None
                else:
                    against.append(Refusal(node_name(node), f"{_kind(node)} reads it"))
        return (*norms, *linear), against

    def _hinders_writing(self, value: ir.Value) -> str | None:
        if is_fixed(value):
            return None
        node = value.producer()
        if node is None:
            return "it is fed to the model"
        if projection_at(node) is not None or is_table(node):
            return None
        if node in self.norm_of:
            return "a norm writes into it"
        if value in self.activated:
            return "an activation writes into it"
        return f"{_kind(node)} writes into it"

    def _reads_linearly(self, node: ir.Node, value: ir.Value) -> bool:
        if node in self.inside or projection_at(node) is None or node.inputs[0] is not value:
            return False
        return self.axes[value] == _channel_axis(node, value)

    def _passes(self, values: set[ir.Value], writers: list[ir.Value]) -> bool:
        """Tell whether something that is written was computed from a value of the segment."""
        edge = [node for value in writers if (node := value.producer()) is not None]
        seen = set(edge)
        while edge:
            for value in edge.pop().inputs:
                if value is None:
                    continue
                if value in values and constant_tensor(value) is None:
                    return True
                node = value.producer()
                if node is not None and node not in seen:
                    seen.add(node)
                    edge.append(node)
        return False


def _channel_axis(node: ir.Node, value: ir.Value) -> int:
    """Return where a linear operator has the channels of what it reads or makes."""
    return 1 - len(value.shape or ()) if node.op_type == "Conv" else -1


def _kind(node: ir.Node) -> str:
    """Name an operator, with what keeps it from being linear over channels."""
    if is_standard(node, "Mul", "Div") and any(is_fixed(value) for value in node.inputs):
        return f"{node.op_type} by a constant of each channel"
    grouped = is_standard(node, "Conv") and node.attributes.get_int("group", 1) != 1
    return f"grouped {node.op_type}" if grouped else node.op_type


def _label(value: ir.Value) -> str:
    node = value.producer()
    return node_name(node) if node is not None else value.name or ""
