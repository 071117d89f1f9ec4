"""Rotary position embeddings (Su et al. 2021): pairs of channels turned by an angle that grows with the position."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import onnx_ir as ir

from qcompile.passes.index_maps import MOVES, Labels, labels, moved
from qcompile.passes.structure import constant_tensor, input_of, is_shared, is_standard, only_reader, produced_by


@dataclass(frozen=True, eq=False)
class Rope:
    """Pairs of channels of the last axis, turned: (x₁ cos - x₂ sin, x₂ cos + x₁ sin).

    Attributes
    ----------
    source, result
        What is read and what is made, of one shape, the head's channels last.
    cos, sin
        What is multiplied by; that cos² + sin² = 1 is not looked at.
    interleaved
        Pairs are neighbours (0, 1), (2, 3), ...; else they stand half a head apart, (0, n/2), (1, n/2 + 1), ...
    nodes
        All of its nodes.
    shared
        What stands between the nodes is read by others too, so that the nodes cannot be replaced.
    """

    source: ir.Value
    result: ir.Value
    cos: ir.Value
    sin: ir.Value
    interleaved: bool
    nodes: tuple[ir.Node, ...]
    shared: bool = False


def ropes(graph: ir.Graph) -> tuple[Rope, ...]:
    """Find every rotary embedding, in the order of the graph."""
    found = []
    for node in graph:
        rope = None
        if is_standard(node, "Add"):
            rope = _turned_whole(node)
        elif is_standard(node, "Concat") and len(node.inputs) == 2:
            rope = _turned_in_parts(node)
        elif is_standard(node, "RotaryEmbedding"):
            rope = _fused(node)
        if rope is not None:
            found.append(rope)
    return tuple(found)


def _fused(node: ir.Node) -> Rope | None:
    if node.attributes.get_int("rotary_embedding_dim", 0):
        return None  # only a part of the channels is turned
    interleaved = bool(node.attributes.get_int("interleaved", 0))
    return Rope(input_of(node, 0), node.outputs[0], input_of(node, 1), input_of(node, 2), interleaved, (node,))


def _pairings(count: int) -> dict[bool, Labels]:
    """Return the channels of each pair, [2, n/2], numbered from 1; the key tells whether they are interleaved."""
    numbers = np.arange(1, count + 1)
    return {True: numbers.reshape(-1, 2).T, False: numbers.reshape(2, -1)}


def _turned_whole(add: ir.Node) -> Rope | None:
    """Match x · cos + turned(x) · sin, where turned(x) has the pairs swapped and one of each negated."""
    left, right = (produced_by(value, "Mul") for value in add.inputs)
    if left is None or right is None or left is right:
        return None
    for straight, crossed in ((left, right), (right, left)):
        for i, j in product((0, 1), repeat=2):
            turned, source = input_of(crossed, i), input_of(straight, j)
            if produced_by(turned, "Concat", "Reshape", "Flatten") is None or constant_tensor(source) is not None:
                continue
            nodes: list[ir.Node] = []
            numbers = _signed(turned, source, nodes)
            interleaved = None if numbers is None else _pairing(numbers)
            if interleaved is not None:
                every = (*reversed(nodes), straight, crossed, add)
                cos, sin, result = input_of(straight, 1 - j), input_of(crossed, 1 - i), add.outputs[0]
                return Rope(source, result, cos, sin, interleaved, every, is_shared(every, result))
    return None


def _pairing(numbers: Labels) -> bool | None:
    """Tell whether channels are swapped with their neighbours (True) or across halves (False); None if neither."""
    flat = numbers.reshape(-1, numbers.shape[-1])
    if flat.shape[-1] % 2 or not (flat == flat[0]).all():
        return None
    for interleaved, (first, second) in _pairings(flat.shape[-1]).items():
        expected = np.empty(flat.shape[-1], np.int64)
        expected[first - 1], expected[second - 1] = -second, first
        if (flat[0] == expected).all() or (flat[0] == -expected).all():
            return interleaved
    return None


def _signed(value: ir.Value, source: ir.Value, nodes: list[ir.Node], depth: int = 0) -> Labels | None:
    """Follow the source's channels, numbered from 1, to a value with their signs; collect the nodes between."""
    if value is source:
        numbers = labels(source, -1)
        return None if numbers is None else numbers + 1
    node = produced_by(value, "Neg", "Concat", *MOVES)
    if node is None or depth > 8:
        return None
    parts = [
        _signed(part, source, nodes, depth + 1)
        for part in (node.inputs if node.op_type == "Concat" else node.inputs[:1])
        if part
    ]
    if node not in nodes:
        nodes.append(node)
    known = [part for part in parts if part is not None]
    if len(known) < len(parts) or not known:
        return None
    if node.op_type == "Neg":
        return -known[0]
    if node.op_type == "Concat":
        return np.concatenate(known, node.attributes.get_int("axis", 0))
    results = moved(node, known[0])
    return None if results is None else results[value.index() or 0]


@dataclass(frozen=True)
class _Half:
    """a · b ± c · d."""

    node: ir.Node
    products: tuple[ir.Node, ir.Node]

    def terms(self) -> Iterator[tuple[tuple[ir.Value, ir.Value], tuple[ir.Value, ir.Value]]]:
        """Yield the factors of both products, each in both orders."""
        (a, b), (c, d) = ((input_of(node, 0), input_of(node, 1)) for node in self.products)
        yield from product(((a, b), (b, a)), ((c, d), (d, c)))


def _half(value: ir.Value | None, op_type: str) -> _Half | None:
    node = produced_by(value, op_type)
    left, right = (None, None) if node is None else (produced_by(part, "Mul") for part in node.inputs)
    return None if node is None or left is None or right is None else _Half(node, (left, right))


def _turned_in_parts(concat: ir.Node) -> Rope | None:
    """Match (x₁ cos - x₂ sin, x₂ cos + x₁ sin) joined at half a head, or stacked and flattened."""
    stacking = [produced_by(value, "Unsqueeze", "Reshape") for value in concat.inputs]
    stacked = [node for node in stacking if node is not None]
    parts = [node.inputs[0] for node in stacked] if len(stacked) == 2 else list(concat.inputs)
    last = concat.outputs[0]
    axis = concat.attributes.get_int("axis", 0)
    if axis not in (-1, (len(last.shape) if last.shape is not None else 0) - 1):
        return None
    lower, upper = _half(parts[0], "Sub"), _half(parts[1], "Add")
    if lower is None or upper is None:
        return None
    flat = only_reader(last) if len(stacked) == 2 else concat
    if flat is None or not is_standard(flat, "Concat", "Flatten", "Reshape"):
        return None
    for (x1, cos), (x2, sin) in lower.terms():
        if not _crossed(upper, x1, x2, cos, sin):
            continue
        halves = _halves(x1, x2)
        if halves is not None and halves[2] == (len(stacked) == 2):
            source, moves, interleaved = halves
            ends = dict.fromkeys([*stacked, concat, flat])
            every = (*moves, *lower.products, lower.node, *upper.products, upper.node, *ends)
            return Rope(source, flat.outputs[0], cos, sin, interleaved, every, is_shared(every, flat.outputs[0]))
    return None


def _crossed(upper: _Half, x1: ir.Value, x2: ir.Value, cos: ir.Value, sin: ir.Value) -> bool:
    """Tell whether the sum is x₂ cos + x₁ sin."""
    wanted = {frozenset((x2, cos)), frozenset((x1, sin))}
    return {frozenset((input_of(node, 0), input_of(node, 1))) for node in upper.products} == wanted


def _halves(x1: ir.Value, x2: ir.Value) -> tuple[ir.Value, Sequence[ir.Node], bool] | None:
    """Find what two values are the halves of: the source, the nodes between, and whether they are interleaved."""
    source: ir.Value | None = x1
    for _ in range(6):
        node = produced_by(source, *MOVES)
        if node is None:
            return None
        source = input_of(node, 0)
        nodes: list[ir.Node] = []
        found = [_signed(half, source, nodes) for half in (x1, x2)]
        rows = [_row(half) for half in found if half is not None]
        if len(rows) == 2 and rows[0].size == rows[1].size > 0:
            for interleaved, expected in _pairings(2 * rows[0].size).items():
                if np.array_equal(rows, expected) and source.shape is not None and source.shape[-1] == expected.size:
                    return source, tuple(nodes), interleaved
    return None


def _row(numbers: Labels) -> Labels:
    """Return the numbers along the last axis, or the last but one if that is one long; none if they differ by place."""
    numbers = numbers[..., 0] if numbers.shape[-1] == 1 and numbers.ndim > 1 else numbers
    flat = numbers.reshape(-1, numbers.shape[-1])
    return flat[0] if (flat == flat[0]).all() else flat[0, :0]
