"""Which tensors must not share a scale, because their ranges have nothing in common."""

from __future__ import annotations

import onnx_ir as ir

from qcompile.calib.collect import Statistics
from qcompile.core.plan import Precision
from qcompile.passes import structure
from qcompile.passes.place import Placement, Wish

#: Ranges that differ by more than this leave the narrower one four of eight bits in the other's steps.
MOST_APART = 16.0


def unlike_ranges(model: ir.Model, placement: Placement, statistics: Statistics) -> dict[str, Wish]:
    """Return what to wish for so that no integer Concat joins tensors whose ranges differ by orders of magnitude.

    A detector's boxes lie within hundreds and its scores within one: in the steps of the boxes all scores are zero, and
    an error that is measured over both says nothing of that.

    Parameters
    ----------
    model : onnx_ir.Model
    placement : Placement
    statistics : Statistics
        Of the placement's activations.
    """
    found = {}
    for node in model.graph:
        name = structure.node_name(node)
        if not structure.is_standard(node, "Concat") or placement.ops[name].precision is not Precision.INTEGER:
            continue
        widths = []
        for value in structure.activation_inputs(node):
            source = placement.same_scale.get(structure.name_of(value), structure.name_of(value))
            seen = statistics.histograms.get(source)
            if seen is not None and seen.high > seen.low:
                widths.append(max(seen.high, 0.0) - min(seen.low, 0.0))
        if len(widths) > 1 and max(widths) > MOST_APART * min(widths):
            apart = f"{max(widths) / min(widths):.3g}"
            reason = f"the ranges of what it joins differ {apart}-fold: in one scale the narrower would be lost"
            found[name] = Wish(Precision.WEIGHT_ONLY, reason)
    return found
