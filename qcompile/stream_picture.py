"""A picture of a model's residual streams: what writes into each, where it is summed, what reads it, in SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from xml.sax.saxutils import escape

#: Pixels: between two rows, from the edge to the line of a stream, and where its segments' lines stand apart.
ROW, SIDE, APART = 18, 420, 14
#: Letters of a name that are shown; the end tells more than the beginning.
LETTERS = 52
_STYLE = "text{font:12px sans-serif}.title{font-weight:bold}.against{fill:#b00020}.line{stroke:#345;stroke-width:4}"


def draw_streams(title: str, streams: Sequence[Mapping[str, Any]]) -> str:
    """Return an SVG with one stream below the other: writers to the left of its line, readers to the right.

    Parameters
    ----------
    title : str
    streams : sequence of mapping
        Rows as `inspection.stream_members` has them.
    """
    parts, y = [_text(10, ROW, title, "title")], 2 * ROW
    for stream in streams:
        y += ROW
        parts.append(_text(10, y, f"{stream['kind']}, {stream['width']} channels", "title"))
        y += ROW
        drawn, y = _stream(stream["segments"], y)
        parts += drawn
    if not streams:
        parts.append(_text(10, y, "no residual streams: nothing is summed with what passes by"))
        y += ROW
    size = f'width="{2 * SIDE}" height="{y + ROW}"'
    return "\n".join(
        [f'<svg xmlns="http://www.w3.org/2000/svg" {size}>', f"<style>{_STYLE}</style>", *parts, "</svg>\n"]
    )


def _stream(segments: Sequence[Mapping[str, Any]], y: int) -> tuple[list[str], int]:
    """Return what is drawn of a stream from a height on, and the height below it."""
    parts = []
    for index, segment in enumerate(segments):
        x, top = SIDE + (index % 2) * APART, y
        for member in segment["members"]:
            parts += _member(member, x, y)
            y += ROW
        line = f'<line class="line" x1="{x}" y1="{top - ROW // 2}" x2="{x}" y2="{y - ROW // 2}"/>'
        parts.append(line)
        for refusal in segment["obstacles"]:
            parts.append(_text(x + 12, y, f"{_short(refusal['node'])}: {refusal['reason']}", "against"))
            y += ROW
    return parts, y


def _member(member: Mapping[str, str], x: int, y: int) -> list[str]:
    """Return a writer, a sum or a reader: an arrow to the line, a dot on it, or an arrow from it."""
    name, middle = f"{_short(member['name'])} ({member['what']})", y - ROW // 4
    if member["role"] == "sum":
        return [f'<circle cx="{x}" cy="{middle}" r="6" fill="#345"/>', _text(x + 12, y, name)]
    if member["role"] == "writer":
        return [_arrow(x - 40, x - 2, middle), _text(x - 46, y, name, "", "end")]
    return [_arrow(x + 2, x + 40, middle), _text(x + 46, y, name)]


def _arrow(start: int, end: int, y: int) -> str:
    tip = f"{end},{y} {end - 6},{y - 3} {end - 6},{y + 3}"
    return f'<line x1="{start}" y1="{y}" x2="{end}" y2="{y}" stroke="#888"/><polygon points="{tip}" fill="#888"/>'


def _text(x: int, y: int, text: str, kind: str = "", anchor: str = "start") -> str:
    return f'<text class="{kind}" x="{x}" y="{y}" text-anchor="{anchor}">{escape(text)}</text>'


def _short(name: str) -> str:
    return name if len(name) <= LETTERS else f"…{name[1 - LETTERS :]}"
