"""Move Transposes through operators that do not care about the order of axes, until they meet and cancel."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from qcompile.core.contract import Effect
from qcompile.passes import structure
from qcompile.passes.canonicalize.editing import bypass, free_name, remove_unused
from qcompile.passes.canonicalize.permute import ABSORBING, MOVABLE, absorb, movable, permute

Permutation = tuple[int, ...]


@dataclass(frozen=True)
class MoveTransposes(ir.passes.InPlacePass):
    """Turn whole regions of elementwise operators into the layout of what surrounds them.

    A network exported from a framework that keeps channels last has a Transpose in front of each Conv and one behind
    it. All operators between them that can work in either layout are taken together, and change it if fewer Transposes
    are left then; their constants are transposed here and now.

    A settled graph has one Transpose for each pair of a value and a permutation in which somebody reads it, so the
    number left by a turn is known before it. Every turn lowers that number, or keeps it and brings one more Pad in
    front of its Convs: the rule ends, and where it ends no turn does either, for a second application as for the first.
    """

    effect: ClassVar[Effect] = Effect.CLOSE

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite the main graph in place."""
        # Readers that nobody reads would count as readers.
        modified = remove_unused(model)
        modified |= settle(model.graph)
        while _turn_one(model.graph):
            settle(model.graph)
            modified = True
        modified |= remove_unused(model)
        return ir.passes.PassResult(model, modified)


def permutation(node: ir.Node | None, graph: ir.Graph) -> Permutation | None:
    """Return the permutation of a Transpose that stands in a graph itself, None for anything else."""
    if node is None or node.graph is not graph or not structure.is_standard(node, "Transpose"):
        return None
    if node.inputs[0] is None:
        return None
    source = node.inputs[0].shape if node.inputs[0].shape is not None else node.outputs[0].shape
    given = node.attributes.get_ints("perm", ())
    if not given:
        return None if source is None else tuple(range(len(source)))[::-1]
    return tuple(given)


def inverse(p: Permutation) -> Permutation:
    """Return the permutation that takes another one back."""
    return tuple(int(index) for index in np.argsort(p))


def chain(first: Permutation, *others: Permutation) -> Permutation:
    """Return the permutation of Transposes in a row, the first one first."""
    for p in others:
        first = tuple(first[index] for index in p)
    return first


def is_identity(p: Permutation) -> bool:
    """Tell whether a permutation moves nothing."""
    return p == tuple(range(len(p)))


def settle(graph: ir.Graph) -> bool:
    """Leave one Transpose for each value and permutation that is read, and tell whether anything changed.

    Transposes in a row are joined, equal ones shared; those that move nothing, that a reduction can do without, or that
    nobody reads are removed.
    """
    modified = False
    shared: dict[tuple[ir.Value, Permutation], ir.Value] = {}
    for node in list(graph):
        p, source = permutation(node, graph), node.inputs[0] if node.inputs else None
        if p is None or source is None:
            continue
        # Those in front are settled.
        first = source.producer()
        if first is not None and (inner := permutation(first, graph)) and first.inputs[0] is not None:
            p, source = chain(inner, p), first.inputs[0]
            node.replace_input_with(0, source)
            node.attributes["perm"] = ir.AttrInt64s("perm", p)
            modified = True
        if is_identity(p):
            modified |= bypass(node, source)
        elif (source, p) in shared:
            modified |= bypass(node, shared[source, p])
        else:
            shared[source, p] = node.outputs[0]
    for node in reversed(list(graph)):
        if p := permutation(node, graph):
            modified |= _do_without(graph, node, p)
    return modified


def _do_without(graph: ir.Graph, node: ir.Node, p: Permutation) -> bool:
    """Let reductions read what a Transpose reads, if they can; remove it if nobody is left."""
    value = node.outputs[0]
    found = [use.node for use in value.uses() if use.idx == 0 and absorb(use.node, p)]
    for reader in found:
        permute(graph, reader, p, ABSORBING)
        reader.replace_input_with(0, node.inputs[0])
    unread = not value.uses() and not value.is_graph_output()
    if unread:
        graph.remove(node, safe=True)
    return bool(found) or unread


@dataclass(frozen=True)
class Region:
    """Connected operators that can work in another layout, in the graph's order."""

    graph: ir.Graph
    nodes: Sequence[ir.Node]

    @cached_property
    def inside(self) -> frozenset[ir.Node]:
        """The operators, to ask whether one is among them."""
        return frozenset(self.nodes)

    @cached_property
    def rank(self) -> int:
        """The number of axes of all their tensors."""
        return len(self.nodes[0].outputs[0].shape or ())

    @cached_property
    def entering(self) -> tuple[ir.Value, ...]:
        """The values that enter; constants and numbers cross the border freely."""
        return tuple({value: None for node in self.nodes for value in node.inputs
                      if value is not None and value.producer() not in self.inside
                      and structure.constant_tensor(value) is None
                      and value.shape is not None and len(value.shape) == self.rank})  # fmt: skip

    @cached_property
    def results(self) -> tuple[ir.Value, ...]:
        """What the operators compute."""
        return tuple(value for node in self.nodes for value in node.outputs)

    @cached_property
    def reads(self) -> tuple[tuple[ir.Value, Permutation, ir.Node | None], ...]:
        """Who reads what enters and what is computed, in which permutation; None stands for the graph's outputs."""
        producers = [(value, value.producer()) for value in self.entering]
        sources = [first.inputs[0] if first is not None and permutation(first, self.graph) else value
                   for value, first in producers]  # fmt: skip
        values = dict.fromkeys((*sources, *self.results))
        return tuple((value, *read) for value in values if value is not None for read in self._readers(value))

    def _readers(self, source: ir.Value) -> Iterator[tuple[Permutation, ir.Node | None]]:
        views = [(source, tuple(range(self.rank)))] if structure.constant_tensor(source) is None else []
        views += [(node.outputs[0], p) for node in structure.readers(source) if (p := permutation(node, self.graph))]
        for view, p in views:
            if view.is_graph_output():
                yield p, None
            yield from ((p, node) for node in structure.readers(view) if not permutation(node, self.graph))

    def layouts(self) -> list[Permutation]:
        """Return the permutations in front of the region, and those that Transposes behind it take back."""
        found = [p if node in self.inside else inverse(p) for _, p, node in self.reads if not is_identity(p)]
        return list(dict.fromkeys(found))

    def gain(self, p: Permutation) -> int:
        """Return how many Transposes go if the region works on inputs that are not yet transposed by p."""
        before = {(value, q) for value, q, _ in self.reads}
        after = {(value, self._turned(value, q, node, p)) for value, q, node in self.reads}
        return sum(not is_identity(q) for _, q in before) - sum(not is_identity(q) for _, q in after)

    def _turned(self, value: ir.Value, q: Permutation, reader: ir.Node | None, p: Permutation) -> Permutation:
        """Return the permutation in which a value is read when the region has been turned."""
        own = value.producer() in self.inside
        q = chain(p, q) if own else q
        if reader in self.inside:
            return chain(q, inverse(p))
        return tuple(range(self.rank)) if own and reader is not None and absorb(reader, q) else q

    def frees_pad(self, p: Permutation) -> bool:
        """Tell whether this is a Pad that comes to stand right in front of its Convs, which take it in."""
        behind = [(q, node) for value, q, node in self.reads if value.producer() in self.inside]
        return (
            len(self.nodes) == 1
            and structure.is_standard(self.nodes[0], "Pad")
            and all(q == inverse(p) and node is not None and structure.is_standard(node, "Conv") for q, node in behind)
        )


def regions(graph: ir.Graph) -> Iterator[Region]:
    """Yield the connected groups of movable nodes."""
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
        yield Region(graph, sorted(group, key=members.__getitem__))


def _sources(node: ir.Node) -> list[ir.Node]:
    found = [value.producer() for value in node.inputs if value is not None]
    return [node for node in found if node is not None]


def _readers(node: ir.Node) -> list[ir.Node]:
    return [reader for value in node.outputs for reader in value.consumers()]


def _turn_one(graph: ir.Graph) -> bool:
    """Turn the first region that gains by it into its best layout, and tell whether there was one."""
    for region in regions(graph):
        gains = {p: (region.gain(p), region.frees_pad(p)) for p in region.layouts()}
        best = max(gains, key=lambda p: gains[p], default=None)
        if best is not None and gains[best] > (0, False):
            turn(region, best)
            return True
    return False


def turn(region: Region, p: Permutation) -> None:
    """Write x ↦ region(x) as Tₚ region'(Tₚ⁻¹ x)."""
    graph, back = region.graph, inverse(p)
    leaving = [
        value
        for value in region.results
        if value.is_graph_output() or any(reader not in region.inside for reader in value.consumers())
    ]
    sources = {value: _transposed(graph, value, back) for value in region.entering}
    for node in region.nodes:
        for index, value in enumerate(node.inputs):
            if value in sources:
                node.replace_input_with(index, sources[value])
        permute(graph, node, p, MOVABLE)
        for value in node.outputs:
            if value.shape is not None:
                value.shape = ir.Shape([value.shape[index] for index in back])
    for value in leaving:
        _transpose_result(region, value, p)


def _transposed(graph: ir.Graph, value: ir.Value, p: Permutation) -> ir.Value:
    name = free_name(graph, f"{value.name}_transposed")
    node = ir.node("Transpose", [value], {"perm": list(p)}, name=name)
    result = node.outputs[0]
    result.name, result.type = name, value.type
    if value.shape is not None:
        result.shape = ir.Shape([value.shape[index] for index in p])
    producer = value.producer()
    if producer is not None:
        graph.insert_after(producer, node)
    else:
        graph.insert_before(graph[0], node)
    return result


def _transpose_result(region: Region, value: ir.Value, p: Permutation) -> None:
    """Give the readers outside what they read before: the result transposed by p."""
    graph, outside = region.graph, [use for use in value.uses() if use.node not in region.inside]
    copy = _transposed(graph, value, p)
    if value.is_graph_output():
        copy.name, value.name = value.name, free_name(graph, f"{value.name}_before")
        graph.outputs[graph.outputs.index(value)] = copy
    for use in outside:
        use.node.replace_input_with(use.idx, copy)
