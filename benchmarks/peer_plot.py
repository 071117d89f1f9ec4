"""A scatter of fidelity over latency for one model, as SVG and PNG, the same bytes for the same figures."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from peer_page import numbers
from peer_results import FASTER, MORE_FAITHFUL, OURS, Result, Row

#: One colour and one mark per peer, told apart without colours too (Okabe and Ito's palette).
MARKS = {
    OURS: ("*", "#000000"),
    "onnxruntime": ("o", "#0072b2"),
    "nncf": ("s", "#d55e00"),
    "quark": ("^", "#009e73"),
    "onnxsim": ("D", "#cc79a7"),
}
#: Where a text may stand, in points from its mark, from the best place to the last; at the right edge, only before it.
PLACES = [(5, -3), (5, 3), (5, -9), (-5, -3), (-5, 3), (-5, -9), (3, 8), (3, -14), (-3, 8), (-3, -14)]
PLACES += [(14, 11), (14, -17), (-14, 11), (-14, -17), (3, 17), (3, -23)]
ASIDE = [(-6, -3), (-6, 5), (-6, -11), (-6, 13), (-6, -19)]
Place = tuple[float, float]
#: Ratios that the axis names, and where it ends: what is slower stands at its end with its ratio.
TICKS, SLOWEST = (0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.2, 1.4, 1.7, 2.0, 2.4), 2.4


def scatter(result: Result, folder: Path) -> None:
    """Write NAME.svg and NAME.png."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    # A white ground of its own, so that a dark page shows what a light one does; names in hashes and no date, so that
    # the bytes depend on the figures alone.
    style: Any = {"svg.hashsalt": result.model, "font.size": 9.0, "font.family": "DejaVu Sans"}
    with pyplot.rc_context(style):
        figure, axes = pyplot.subplots(figsize=(8.8, 5.0), layout="constrained", facecolor="white")
        rows = [row for row in result.rows if row.latency is not None]
        draw(axes, result, rows)
        decorate(axes, result, rows)
        figure.savefig(folder / f"{result.model}.svg", metadata={"Date": None})
        figure.savefig(folder / f"{result.model}.png", dpi=110, metadata={"Software": None})
        pyplot.close(figure)


def height(row: Row, rows: Iterable[Row]) -> float:
    """Return where a row stands: nothing below 0 dB is worth room, and what is exact stands on top."""
    top = max((other.sqnr for other in rows if other.sqnr is not None), default=40.0)
    return top + 5.0 if row.sqnr is None else max(row.sqnr, 0.0)


def place(row: Row) -> float:
    """Return where a row stands on the axis of latency."""
    return min(row.ratio, SLOWEST)


def name(result: Result, row: Row) -> str:
    """Return what is written beside a row's mark: nothing beside the default's star."""
    if row is result.ours:
        return ""
    number, ratio = numbers(result)[row.name], row.ratio
    return number if ratio <= SLOWEST else f"{number}: {ratio:.1f}x"


def draw(axes: Any, result: Result, rows: list[Row]) -> None:
    """Draw the marks, and shade where a setting would be both faster and more faithful than qcompile."""
    for peer in dict.fromkeys(row.peer for row in rows):
        mark, colour = MARKS.get(peer, ("o", "#555555"))
        of_peer = [row for row in rows if row.peer == peer]
        axes.scatter(
            [place(row) for row in of_peer],
            [height(row, rows) for row in of_peer],
            s=220 if peer == OURS else 36,
            marker=mark,
            color=colour,
            label=peer,
            zorder=4 if peer == OURS else 3,
        )
    ours = result.ours
    if ours.latency is not None:
        left, low = FASTER * ours.ratio, height(ours, rows) + MORE_FAITHFUL
        axes.fill_between([0.01, left], low, 1e3, color="#f0e442", alpha=0.25, linewidth=0, zorder=0)


def decorate(axes: Any, result: Result, rows: list[Row]) -> None:
    """Set axes, labels and legend."""
    xs, ys = [*(place(row) for row in rows), 1.0], [height(row, rows) for row in rows]
    axes.set_xscale("log")
    axes.set_xlim(min(xs) / 1.12, max(xs) * 1.18)
    axes.set_ylim(-1.5, max(ys, default=1.0) * 1.08 + 1.0)
    shown = [tick for tick in TICKS if min(xs) / 1.12 <= tick <= max(xs) * 1.18]
    axes.set_xticks(shown, [f"{tick:g}" for tick in shown])
    axes.set_xticks([], minor=True)
    axes.axvline(1.0, color="#999999", linewidth=0.8, zorder=1)
    axes.grid(alpha=0.25, zorder=0)
    axes.set_xlabel("latency over float's (left is faster)")
    axes.set_ylabel("SQNR, dB (up is nearer to float)")
    axes.set_title(f"{result.model}: shaded is both faster and more faithful than qcompile's default")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    label(axes, [(place(row), height(row, rows), name(result, row)) for row in rows])


def label(axes: Any, points: list[tuple[float, float, str]]) -> None:
    """Write each text beside its mark, where it hides no other mark and no other text, if there is such a place."""
    axes.figure.canvas.draw()
    marks = [axes.transData.transform((x, y)) * 72 / axes.figure.dpi for x, y, _ in points]
    taken = [(float(left), float(low)) for left, low in marks]
    for (x, y, text), (left, low) in zip(points, list(taken), strict=True):
        if not text:
            continue
        width = 4.5 * len(text)

        def centre(offset: tuple[int, int], left: float = left, low: float = low, width: float = width) -> Place:
            return left + offset[0] + (width / 2 if offset[0] > 0 else -width / 2), low + offset[1] + 3

        def room(offset: tuple[int, int], own: Place = (left, low), width: float = width) -> float:
            at = centre(offset)
            others = (other for other in taken if other != own)
            away = (max(abs(at[0] - x) / (width + 2), abs(at[1] - y) / 8) for x, y in others)
            return min(away, default=9.0)

        places = ASIDE if ":" in text else PLACES
        chosen = next((offset for offset in places if room(offset) > 1), max(places, key=room))
        taken.append(centre(chosen))
        side = "left" if chosen[0] > 0 else "right"
        axes.annotate(text, (x, y), chosen, textcoords="offset points", fontsize=7, ha=side)
