"""A picture of a Pareto front: expected decibels over size, beside all weights in eight bits and all in four."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from qcompile.picture import Picture

#: The picture, and the room around the axes: left, right, above, below.
WIDTH, HEIGHT, ROOM = 640, 420, (60, 30, 50, 50)
#: Ticks of an axis, about.
TICKS = 6
FRONT, UNIFORM, CHOSEN, GRID = "#1f5fa8", "#777777", "#b00020", "#dddddd"


def draw(title: str, content: Mapping[str, Any]) -> Picture:
    """Draw what front.json holds.

    Parameters
    ----------
    title : str
    content : mapping
        As `Front.as_json` returns it. What loses nothing has no decibels, and no place in the picture.
    """
    rows = [*content["points"], *content["uniform"].values(), content["chosen"]]
    seen = [(row["size"], row["sqnr"]) for row in rows if row["sqnr"] is not None]
    across, up = (_Axis.around([place[axis] for place in seen]) for axis in (0, 1))
    picture = Picture(WIDTH, HEIGHT)
    _axes(picture, title, across, up)

    def at(row: Mapping[str, Any]) -> tuple[float, float]:
        return _x(across.part(row["size"])), _y(up.part(row["sqnr"]))

    points = [at(row) for row in content["points"] if row["sqnr"] is not None]
    for start, end in pairwise(points):
        picture.line(start, end, FRONT, 1.5)
    for place in points:
        picture.dot(place, 3.5, FRONT)
    marks = [(f"all in {bits} bits", row, UNIFORM) for bits, row in content["uniform"].items()]
    for name, row, colour in (*marks, ("chosen", content["chosen"], CHOSEN)):
        if row["sqnr"] is not None:
            x, y = at(row)
            picture.dot((x, y), 5.0, colour)
            # What lies below the front is free to its right, what lies above it to its left.
            side, anchor = (-9, "end") if x > WIDTH / 2 and colour == UNIFORM else (9, "start")
            picture.words((x + side, y - 8 if anchor == "end" else y + 18), name, anchor, colour)
    return picture


class _Axis:
    """An axis between two round numbers."""

    def __init__(self, low: float, high: float, step: float) -> None:
        self.low, self.high, self.step = low, high, step

    @classmethod
    def around(cls, numbers: list[float]) -> _Axis:
        low, high = (min(numbers), max(numbers)) if numbers else (0.0, 1.0)
        rough = max(high - low, 1e-2 * max(abs(high), 1e-2)) / TICKS
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(power * round_one for round_one in (1, 2, 5, 10) if power * round_one >= rough * 0.999)
        return cls(step * math.floor(low / step), step * (math.floor(high / step) + 1), step)

    @property
    def ticks(self) -> list[float]:
        return [self.low + index * self.step for index in range(round((self.high - self.low) / self.step) + 1)]

    def part(self, number: float) -> float:
        return (number - self.low) / (self.high - self.low)

    def name(self, tick: float) -> str:
        return f"{tick:.{max(0, -math.floor(math.log10(self.step)))}f}"


def _x(part: float) -> float:
    return ROOM[0] + part * (WIDTH - ROOM[0] - ROOM[1])


def _y(part: float) -> float:
    return HEIGHT - ROOM[3] - part * (HEIGHT - ROOM[2] - ROOM[3])


def _axes(picture: Picture, title: str, across: _Axis, up: _Axis) -> None:
    for tick in across.ticks:
        x = _x(across.part(tick))
        picture.line((x, _y(0.0)), (x, _y(1.0)), GRID)
        picture.words((x, _y(0.0) + 16), across.name(tick), "middle")
    for tick in up.ticks:
        y = _y(up.part(tick))
        picture.line((_x(0.0), y), (_x(1.0), y), GRID)
        picture.words((_x(0.0) - 8, y + 4), up.name(tick), "end")
    picture.words((ROOM[0], 22), title)
    picture.words((ROOM[0], 40), "expected SQNR, dB")
    picture.words((_x(1.0), HEIGHT - 12), "size, parts of float", "end")
