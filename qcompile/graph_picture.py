"""A picture of a compiled graph, in SVG: operators in layers from the inputs down, to be coloured by a style sheet.

Layers are by the longest path, operators within one by where what they read stands (Sugiyama, Tagawa and Toda 1981, in
its plainest form). Each operator's element carries its precision as a class, its name as `data-op`, and as `--bad` how
much of what a colour can show is lost, from 0 to 100.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from xml.sax.saxutils import escape, quoteattr

import networkx as nx

#: Of an operator's box, and how far the next one's begins from its own.
WIDTH, HEIGHT, ACROSS, DOWN = 112, 22, 124, 40
#: Letters that a box has room for.
LETTERS = 15
#: In dB: what is as bad as a colour shows, and what is as good.
WORST, BEST = 5.0, 50.0

Operator = Mapping[str, Any]


def draw_graph(operators: Sequence[Operator]) -> str:
    """Return an SVG.

    Parameters
    ----------
    operators : sequence of mapping
        As report.json has them, in the order in which they run.
    """
    graph = nx.DiGraph()
    graph.add_nodes_from(op["name"] for op in operators)
    graph.add_edges_from((before, op["name"]) for op in operators for before in op["after"])
    places = _places(graph)
    width = max((x for x, _ in places.values()), default=0.0) + WIDTH + 10
    height = max((y for _, y in places.values()), default=0.0) + HEIGHT + 10
    edges = [_edge(places[before], places[after]) for before, after in graph.edges]
    boxes = [_box(op, places[op["name"]]) for op in operators]
    size = f'viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" height="{height:.0f}"'
    return "\n".join([f'<svg class="graph precision" {size}>', *edges, *boxes, "</svg>"])


def _places(graph: Any) -> dict[str, tuple[float, float]]:
    """Return the upper left corner of each operator's box."""
    layers = _layers(graph)
    across: dict[str, float] = {}
    for layer in layers:
        wished = {name: _mean([across[before] for before in graph.predecessors(name) if before in across])
                  for name in layer}  # fmt: skip
        ordered = sorted(layer, key=lambda name: (wished[name], name))
        start = _mean(list(wished.values())) - (len(ordered) - 1) / 2
        across |= {name: start + index for index, name in enumerate(ordered)}
    left = min(across.values(), default=0.0)
    return {name: (5 + (across[name] - left) * ACROSS, 5.0 + depth * DOWN)
            for depth, layer in enumerate(layers) for name in layer}  # fmt: skip


def _layers(graph: Any) -> list[list[str]]:
    depth: dict[str, int] = {}
    for name in nx.topological_sort(graph):
        depth[name] = 1 + max((depth[before] for before in graph.predecessors(name)), default=-1)
    for name in graph:  # what reads no operator stands just above its first reader
        if not graph.in_degree(name) and graph.out_degree(name):
            depth[name] = min(depth[after] for after in graph.successors(name)) - 1
    layers: list[list[str]] = [[] for _ in range(1 + max(depth.values(), default=-1))]
    for name in graph:
        layers[depth[name]].append(name)
    return layers


def _mean(numbers: Sequence[float]) -> float:
    return sum(numbers) / len(numbers) if numbers else 0.0


def _edge(start: tuple[float, float], end: tuple[float, float]) -> str:
    x, y, to_x, to_y = start[0] + WIDTH / 2, start[1] + HEIGHT, end[0] + WIDTH / 2, end[1]
    # What passes by other layers swings out, or it would lie behind the boxes of those.
    out = WIDTH * 0.7 if to_y - y > DOWN and abs(to_x - x) < WIDTH / 2 else 0.0
    bend = (to_y - y) / 2
    bends = f"{x + out:.0f} {y + bend:.0f} {to_x + out:.0f} {to_y - bend:.0f}"
    return f'<path d="M{x:.0f} {y:.0f}C{bends} {to_x:.0f} {to_y:.0f}"/>'


def _box(op: Operator, place: tuple[float, float]) -> str:
    bits = f" {op['weight_bits']:g}b" if op["weight_bits"] is not None else ""
    words = op["op_type"][: LETTERS - len(bits)] + bits
    lost = "none" if op["sqnr"] is None else "some"
    bad = 0.0 if op["sqnr"] is None else 100.0 * min(1.0, max(0.0, (BEST - op["sqnr"]) / (BEST - WORST)))
    return (
        f'<g class="op {op["precision"]} {lost}" data-op={quoteattr(op["name"])} style="--bad:{bad:.0f}" '
        f'transform="translate({place[0]:.0f} {place[1]:.0f})" tabindex="0"><title>{escape(op["name"])}</title>'
        f'<rect width="{WIDTH}" height="{HEIGHT}" rx="4"/>'
        f'<text x="{WIDTH // 2}" y="15">{escape(words)}</text></g>'
    )
