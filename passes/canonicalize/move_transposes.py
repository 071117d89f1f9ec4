"""Move Transposes through operators that do not care about the order of axes, until they meet and cancel."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from qcompile.core.contract import Effect
from qcompile.passes import structure
from qcompile.passes.canonicalize.editing import bypass, free_name, remove_unused
from qcompile.passes.canonicalize.permute import ABSORBING, MOVABLE, absorb, movable, permute

Permutation = tuple[int, ...]
#: Regions that were turned may join others; each round leaves fewer Transposes, and few rounds find any.
ROUNDS = 8


@dataclass(frozen=True)
class MoveTransposes(ir.passes.InPlacePass):
    """Turn whole regions of elementwise operators into the layout of what surrounds them.

    A network exported from a framework that keeps channels last has a Transpose in front of each Conv and one behind
    it. All operators between them that can work in either layout are taken together, and change it if fewer Transposes
    are left then; their constants are transposed here and now.
    """

    effect: ClassVar[Effect] = Effect.CLOSE

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite the main graph in place."""
        modified = _cancel(model.graph)
        for _ in range(ROUNDS):
            changed = False
            for region in list(_regions(model.graph)):
                changed |= _turn(model.graph, region)
            _cancel(model.graph)
            modified |= changed
            if not changed:
                break
        modified |= remove_unused(model)
        return ir.passes.PassResult(model, modified)


def permutation(node: ir.Node | None) -> Permutation | None:
    """Return the permutation of a Transpose, None for anything else."""
    if node is None or not structure.is_standard(node, "Transpose") or node.inputs[0] is None:
        return None
    source = node.inputs[0].shape if node.inputs[0].shape is not None else node.outputs[0].shape
    given = node.attributes.get_ints("perm", ())
    if not given:
        return None if source is None else tuple(range(len(source)))[::-1]
    return tuple(given)


def inverse(p: Permutation) -> Permutation:
    """Return the permutation that takes another one back."""
    return tuple(int(index) for index in np.argsort(p))


def _cancel(graph: ir.Graph) -> bool:
    """Join each Transpose with the Transpose in front of it, and remove those that move nothing."""
    modified = False
    for node in list(graph):
        outer = permutation(node)
        value = node.inputs[0] if outer is not None else None
        if outer is None or value is None:
            continue
        first = value.producer()
        inner = permutation(first)
        source = first.inputs[0] if first is not None and inner is not None else None
        if first is not None and inner is not None and source is not None and first.graph is graph:
            outer, value = tuple(inner[index] for index in outer), source
            node.replace_input_with(0, value)
            node.attributes["perm"] = ir.AttrInt64s("perm", outer)
            modified = True
            if not first.outputs[0].uses() and not first.outputs[0].is_graph_output():
                graph.remove(first, safe=True)
        if outer == tuple(range(len(outer))):
            modified |= bypass(node, value)
    return modified


def _regions(graph: ir.Graph) -> Iterator[list[ir.Node]]:
    """Yield the connected groups of movable nodes, each in the graph's order."""
    members = {node: index for index, node in enumerate(graph) if movable(node)}
    seen: set[ir.Node] = set()
    for start in members:
        if start in seen:
            continue
        group, stack = {start}, [start]
        while stack:
            node = stack.pop()
            for neighbour in (*_sources(node), *_readers(node)):
                if neighbour in members and neighbour not in group:
                    group.add(neighbour)
                    stack.append(neighbour)
        seen |= group
        yield sorted(group, key=members.__getitem__)


def _sources(node: ir.Node) -> list[ir.Node]:
    found = [value.producer() for value in node.inputs if value is not None]
    return [node for node in found if node is not None]


def _readers(node: ir.Node) -> list[ir.Node]:
    return [reader for value in node.outputs for reader in value.consumers()]


@dataclass(frozen=True)
class Border:
    """The values that enter and leave a region."""

    graph: ir.Graph
    inside: frozenset[ir.Node]
    entering: tuple[ir.Value, ...]
    leaving: tuple[ir.Value, ...]

    @classmethod
    def around(cls, graph: ir.Graph, region: Sequence[ir.Node]) -> Border:
        """Find the border of a region; constants and numbers cross it freely."""
        inside = frozenset(region)
        rank = len(region[0].outputs[0].shape or ())
        entering = {value: None for node in region for value in node.inputs
                    if value is not None and value.producer() not in inside and structure.constant_tensor(value) is None
                    and value.shape is not None and len(value.shape) == rank}  # fmt: skip
        leaving = [value for node in region for value in node.outputs
                   if value.is_graph_output() or any(reader not in inside for reader in value.consumers())]  # fmt: skip
        return cls(graph, inside, tuple(entering), tuple(leaving))

    def transposed(self, value: ir.Value, p: Permutation) -> ir.Node | None:
        """Return a Transpose by p outside that a region can read as well: none whose result is an output."""
        for reader in self.others(value):
            if permutation(reader) == p and reader.graph is self.graph and not reader.outputs[0].is_graph_output():
                return reader
        return None

    def others(self, value: ir.Value) -> list[ir.Node]:
        """Return the readers of a value that stand outside."""
        return [reader for reader in value.consumers() if reader not in self.inside]


def _turn(graph: ir.Graph, region: list[ir.Node]) -> bool:
    """Bring a region into the layout that leaves the fewest Transposes, if that is fewer than now."""
    # An earlier region may have removed or joined Transposes at this one's border, never its nodes.
    border = Border.around(graph, region)
    rank = len(region[0].outputs[0].shape or ())
    ways = {p: None for value in border.entering if (p := permutation(value.producer())) and len(p) == rank}
    ways |= {inverse(q): None for value in border.leaving for reader in border.others(value)
             if (q := permutation(reader)) and len(q) == rank}  # fmt: skip
    gains = {p: _gain(border, p) for p in ways}
    best = max(gains, key=lambda p: gains[p], default=None)
    if best is None or gains[best] < 0 or (gains[best] == 0 and not _frees_pad(region, border, best)):
        return False
    _rewrite(graph, region, border, best)
    return True


def _gain(border: Border, p: Permutation) -> int:
    """Return how many Transposes go if a region works on inputs that are not yet transposed by p."""
    gain = 0
    for value in border.entering:
        q = permutation(value.producer())
        alone = not value.is_graph_output() and not border.others(value)
        gain += (q is not None and alone) - (q != p)
        gain += q is None and border.transposed(value, inverse(p)) is not None
    for value in border.leaving:
        kinds = [permutation(reader) for reader in border.others(value)]
        stays = value.is_graph_output() or any(
            kind is None and not absorb(reader, p) for kind, reader in zip(kinds, border.others(value), strict=True)
        )
        gain += kinds.count(inverse(p)) - stays
    return gain


def _frees_pad(region: list[ir.Node], border: Border, p: Permutation) -> bool:
    """Tell whether this is a Pad that comes to stand right in front of its Convs, which take it in."""
    if len(region) != 1 or not structure.is_standard(region[0], "Pad") or region[0].outputs[0].is_graph_output():
        return False
    transposes = structure.readers(region[0].outputs[0])
    if any(permutation(node) != inverse(p) or node.outputs[0].is_graph_output() for node in transposes):
        return False
    readers = [reader for node in transposes for reader in structure.readers(node.outputs[0])]
    return all(structure.is_standard(reader, "Conv") for reader in readers)


def _rewrite(graph: ir.Graph, region: list[ir.Node], border: Border, p: Permutation) -> None:
    """Write x ↦ region(Tₚ x) as Tₚ region'(x)."""
    back = inverse(p)
    sources = {value: _untransposed(graph, border, value, p) for value in border.entering}
    absorbing = {reader for value in border.leaving for reader in border.others(value) if absorb(reader, p)}
    for reader in absorbing:
        permute(graph, reader, p, ABSORBING)
    for node in region:
        for index, value in enumerate(node.inputs):
            if value in sources:
                node.replace_input_with(index, sources[value])
        permute(graph, node, p, MOVABLE)
        for value in node.outputs:
            if value.shape is not None:
                value.shape = ir.Shape([value.shape[index] for index in back])
    for value in border.leaving:
        _transpose_result(graph, border, value, p, absorbing)
    for value in sources:
        # Nobody's Transpose would pass for one that a region could read, and the region would turn back for it.
        producer = value.producer()
        if permutation(producer) and producer is not None and not value.uses() and not value.is_graph_output():
            graph.remove(producer, safe=True)


def _untransposed(graph: ir.Graph, border: Border, value: ir.Value, p: Permutation) -> ir.Value:
    """Return the value that p makes `value` of; Transposes that are there already serve."""
    producer, back = value.producer(), inverse(p)
    if producer is not None and permutation(producer) == p:
        assert producer.inputs[0] is not None
        return producer.inputs[0]
    reader = border.transposed(value, back)
    if reader is not None:
        _hoist(graph, reader, value)
        return reader.outputs[0]
    return _transposed(graph, value, back, after=producer)


def _hoist(graph: ir.Graph, node: ir.Node, value: ir.Value) -> None:
    """Move a node right behind what it reads."""
    graph.remove(node)
    _insert(graph, node, value.producer())


def _insert(graph: ir.Graph, node: ir.Node, after: ir.Node | None) -> None:
    if after is not None and after.graph is graph:
        graph.insert_after(after, node)
    else:
        graph.insert_before(graph[0], node)


def _transposed(graph: ir.Graph, value: ir.Value, p: Permutation, after: ir.Node | None) -> ir.Value:
    name = free_name(graph, f"{value.name}_transposed")
    node = ir.node("Transpose", [value], {"perm": list(p)}, name=name)
    result = node.outputs[0]
    result.name, result.type = name, value.type
    if value.shape is not None:
        result.shape = ir.Shape([value.shape[index] for index in p])
    _insert(graph, node, after)
    return result


def _transpose_result(
    graph: ir.Graph, border: Border, value: ir.Value, p: Permutation, absorbing: Collection[ir.Node]
) -> None:
    """Give the readers outside what they read before: the result transposed by p; Transposes among them cancel."""
    outside = [use for use in value.uses() if use.node not in border.inside and use.node not in absorbing]
    if not outside and not value.is_graph_output():
        return
    copy = _transposed(graph, value, p, after=value.producer())
    if value.is_graph_output():
        copy.name, value.name = value.name, free_name(graph, f"{value.name}_before")
        graph.outputs[graph.outputs.index(value)] = copy
    for use in outside:
        use.node.replace_input_with(use.idx, copy)
