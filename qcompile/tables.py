"""Tables of the terminal: how they look; those of artifacts with several lengths or in segments, and of a screening."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table

from qcompile.screening import Screened


def new_table(title: str, *columns: str) -> Table:
    """Return a table without rows."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, overflow="fold", justify="left" if index == 0 else "default")
    return table


def lengths_table(lengths: Mapping[str, Any]) -> Table:
    """Show each length with the samples that ran at it, and of these the least SQNR of an output."""
    padding = lengths["padding"]
    title = "lengths, and no others" if padding is None else f"lengths, shorter ones padded under '{padding['mask']}'"
    table = new_table(title, "length", "samples", "SQNR, dB")
    for size in map(str, lengths["sizes"]):
        told = lengths["fidelity"].get(size, {"samples": 0, "outputs": {}})
        ratios = [one["sqnr"] for one in told["outputs"].values() if not one["exact"] and one["sqnr"] is not None]
        table.add_row(size, str(told["samples"]), f"{min(ratios):.1f}" if ratios else "")
    return table


def segments_table(segments: Sequence[Mapping[str, Any]]) -> Table:
    """Show who runs each segment, its part of the work, and what forced one of ONNX Runtime."""
    table = new_table("segments, in the order in which they run", "", "runs on", "operators", "work", "forced by")
    for index, segment in enumerate(segments):
        forced = "; ".join(f"{one['node']} {one['reason']}" for one in segment["forced_by"][:2])
        more = len(segment["forced_by"]) - 2
        said = f"{forced}, and {more} more" if more > 0 else forced
        table.add_row(str(index), segment["runs_on"], str(segment["operators"]), f"{segment['share']:.1%}", said)
    return table


def screening_table(found: Screened) -> Table:
    """Show what was looked at: the tensor with most weights at edges, noise of grids, and answers of the artifact."""
    table = new_table(f"{found.output}, screened", "", "seen", "of")
    if found.edges:
        first = min(found.edges, key=lambda one: one.chance)
        name = first.tensor.replace("[", r"\[")
        table.add_row(f"'{name}', by the grid {first.grid}", f"{first.at_edges} weights at edges", str(first.weights))
    for one in found.shifts:
        most = f"{max(one.shifted):.1f} dB at most with {len(one.shifted)} shifted"
        table.add_row(f"the grid {one.grid}", f"{one.noise:.1f} dB of noise", most)
    for each in found.answers:
        seen = f"{each.other} other answers, {each.noise:.1f} dB of noise"
        table.add_row(f"the artifact, canaries {each.canaries}", seen, f"{each.agreed} that all agree on")
    return table
