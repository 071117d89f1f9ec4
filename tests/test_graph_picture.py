"""The picture of a graph: every operator has a box of its own, below all that it reads."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from itertools import combinations
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from qcompile.graph_picture import HEIGHT, WIDTH, draw_graph


def operator(index: int, after: list[int]) -> dict[str, Any]:
    return {
        "name": f"op<{index}>", "op_type": "Conv", "precision": "integer", "sqnr": 30.0, "weight_bits": 8,
        "after": [f"op<{each}>" for each in after],
    }  # fmt: skip


@st.composite
def graphs(draw: st.DrawFn) -> list[dict[str, Any]]:
    count = draw(st.integers(0, 12))
    return [
        operator(at, sorted(draw(st.sets(st.integers(0, at - 1), max_size=3))) if at else []) for at in range(count)
    ]


@given(graphs())
def test_boxes_lie_apart_and_below_what_they_read(operators: list[dict[str, Any]]) -> None:
    drawn = ElementTree.fromstring(draw_graph(operators))
    places = {}
    for box in drawn.iter("g"):
        x, y = box.attrib["transform"].removeprefix("translate(").rstrip(")").split(" ")
        places[box.attrib["data-op"]] = float(x), float(y)
    assert set(places) == {op["name"] for op in operators}
    for (x, y), (other_x, other_y) in combinations(places.values(), 2):
        assert abs(x - other_x) >= WIDTH or abs(y - other_y) >= HEIGHT
    for op in operators:
        assert all(places[before][1] < places[op["name"]][1] for before in op["after"])
    assert len(list(drawn.iter("path"))) == sum(len(op["after"]) for op in operators)
    _, _, width, height = map(float, drawn.attrib["viewBox"].split())
    assert all(x >= 0 and x + WIDTH <= width and y + HEIGHT <= height for x, y in places.values())


def test_colours_tell_what_is_lost() -> None:
    kinds = [operator(0, []) | {"sqnr": sqnr} for sqnr in (60.0, 27.5, 0.0, None)]
    drawn = [draw_graph([one]) for one in kinds]
    assert [text.split("--bad:")[1].split('"')[0] for text in drawn] == ["0", "50", "100", "0"]
    assert 'class="op integer none"' in drawn[3]
