"""The grids that weights are rounded to: how many weights lie at edges, and grids that are shifted against them.

Weights of a network that nobody trained for it lie anywhere between two codes. Those that were trained within the
interval of a code, and pushed against its ends, lie at its ends.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import scipy.special

from qcompile.core import numerics
from qcompile.core.plan import QuantPlan, Role, TensorQuant
from qcompile.passes import structure

#: How near to the edge of its interval a weight is at the edge, in steps, on either side.
EDGE = 0.02
#: The share of weights at edges that is taken for chance: of an even distribution, 2 · EDGE are, and half as many more
#: where it is not quite even.
EVEN = 3.0 * EDGE
#: Chance of a false alarm over all tensors and grids, if no more weights than that are at edges.
ALPHA = 1e-3
#: Grids that are looked at: the plan's own, and the one that most quantizers use.
PLANNED, ABSMAX = "of the plan", "by the largest weight of each channel"

FloatArray = npt.NDArray[np.floating[Any]]
#: Names, scales and how else they are quantized, of all weights.
Grid = Sequence[tuple[str, npt.NDArray[np.float32], TensorQuant]]


@dataclass(frozen=True)
class Edges:
    """How many weights of a tensor lie at the edges of what has one code.

    Parameters
    ----------
    tensor, grid : str
    weights, at_edges : int
    chance : float
        That so many are, or more, where `EVEN` of them is to be expected.
    unusual : bool
        Whether that is less than chance allows, with all tensors and grids together.
    """

    tensor: str
    grid: str
    weights: int
    at_edges: int
    chance: float
    unusual: bool = False


def chance_of(found: int, count: int, share: float) -> float:
    """Return how likely so many of a count are, or more, where each is with a probability of `share`."""
    return float(scipy.special.bdtrc(found - 1, count, share)) if found else 1.0


def weights_of(model: ir.Model, plan: QuantPlan) -> list[tuple[ir.Value, TensorQuant]]:
    """Return the weights that have free codes; those that are packed have no grid of even steps."""
    return [(model.graph.initializers[name], quant) for name, quant in sorted(plan.tensors.items())
            if quant.role is Role.WEIGHT and not quant.block_size and name in model.graph.initializers]  # fmt: skip


def array_of(value: ir.Value) -> FloatArray:
    """Return a weight's numbers."""
    array = structure.constant(value)
    assert array is not None
    return array


def steps_of(value: ir.Value, scales: npt.NDArray[np.float32], quant: TensorQuant) -> FloatArray:
    """Return scales in a shape that broadcasts with a weight."""
    return numerics.along_axis(scales, quant.axis, len(array_of(value).shape))


def grids_of(model: ir.Model, plan: QuantPlan) -> Mapping[str, Grid]:
    """Return names and scales of all weights, by grid."""
    found: dict[str, list[tuple[str, npt.NDArray[np.float32], TensorQuant]]] = {PLANNED: [], ABSMAX: []}
    for value, quant in weights_of(model, plan):
        array, name = np.abs(array_of(value)), structure.name_of(value)
        others = None if quant.axis is None else tuple(a for a in range(array.ndim) if a != quant.axis)
        found[PLANNED].append((name, quant.scales, quant))
        absmax = np.max(array, axis=others).reshape(-1)
        found[ABSMAX].append((name, numerics.symmetric_scale(absmax, quant.dtype), quant))
    return found


def edges_of(model: ir.Model, plan: QuantPlan) -> Iterator[Edges]:
    """Count the weights at edges, by tensor and grid."""
    for grid, entries in grids_of(model, plan).items():
        for name, scales, quant in entries:
            value = model.graph.initializers[name]
            codes = array_of(value).astype(np.float64) / steps_of(value, scales, quant)
            # The largest weights are what the scale is made of, and zeros are of pruning.
            free = codes[(np.abs(codes) < numerics.code_range(quant.dtype, symmetric=True)[1] - 0.5) & (codes != 0.0)]
            at = int(np.count_nonzero(np.abs(free - np.rint(free)) > 0.5 - EDGE))
            yield Edges(name, grid, free.size, at, chance_of(at, free.size, EVEN))


def judged(edges: Sequence[Edges]) -> list[Edges]:
    """Mark what is unusual, by Holm's procedure over all tests (Holm 1979)."""
    order = sorted(range(len(edges)), key=lambda index: edges[index].chance)
    found = list(edges)
    for rank, index in enumerate(order):
        if edges[index].chance > ALPHA / (len(edges) - rank):
            break
        found[index] = replace(edges[index], unusual=True)
    return found


def rounded(model: ir.Model, grid: Grid, random: np.random.Generator | None) -> ir.Model:
    """Return a copy with weights rounded to a grid, or to one that is shifted for each channel by a part of a step."""
    copy = model.clone()
    for name, scales, quant in grid:
        value = copy.graph.initializers[name]
        array, most = array_of(value), numerics.code_range(quant.dtype, symmetric=True)[1]
        shift = np.zeros(scales.size) if random is None else random.random(scales.size) - 0.5
        steps, shifts = (steps_of(value, each, quant) for each in (scales, shift.astype(np.float32)))
        codes = np.clip(np.rint(array / steps + shifts), -most, most) - shifts
        value.const_value = ir.tensor((codes * steps).astype(array.dtype), name=name)
    return copy
