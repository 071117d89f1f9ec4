"""Choose what is rotated, and by which matrices: from what the readers in integers would lose with each."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompile.calib.data import Dataset, Sample
from qcompile.calib.rotations import STEPS, Reading, Scheme, choose, measure_rows, normalized
from qcompile.calib.rotations import noise as noise_of
from qcompile.core import numerics
from qcompile.core.contract import Refusal, Track
from qcompile.core.orthogonal import Orthogonal
from qcompile.core.plan import Precision
from qcompile.core.rotation import InputRotation, Place, Rotation, Site
from qcompile.passes.patterns import NormKind
from qcompile.passes.place import Wish
from qcompile.passes.rotate_inputs import obstacle, rotated_products
from qcompile.passes.rotated_inputs import RotatedInput, rotated_inputs, weights_by_input
from qcompile.passes.rotations import StreamSite, ValueSite, rotatable
from qcompile.passes.structure import input_of, name_of, node_name

#: Noise that must be left of what there is without a rotation: 1 dB less.
WORTH = 0.8
#: The most columns of weights that a reader is judged by.
COLUMNS = 256
#: The most tensors behind one place that its matrices are judged by, evenly spread from the first to the last.
READINGS = 8
#: How many Hadamard matrices are tried.
SEEDS = 4
#: Neighbouring channels that a product at run time mixes: the first of these that divides all.
BLOCKS = (32, 16)
#: Which part of the noise that all products would save is tried to be saved, with all of them and with fewer.
SHARES = (1.0, 0.9, 0.5)
#: Why such a product is not in integers, whatever is asked of operators of its type.
ROTATES = "it rotates what the operator behind it reads as codes"


@dataclass(frozen=True)
class RotationPlan:
    """What is to be rotated, and why the rest is not.

    Parameters
    ----------
    rotations : tuple of Rotation
    refusals : tuple of Refusal
        Places that cannot be rotated, and those that would gain nothing.
    noise : mapping of Place to mapping of str to float
        Noise over signal of the readers of each place, without a rotation and with the best of each kind.
    """

    rotations: tuple[Rotation, ...]
    refusals: tuple[Refusal, ...]
    noise: Mapping[Place, Mapping[str, float]]


def plan_rotations(
    model: ir.Model,
    integers: Collection[str],
    data: Dataset,
    track: Track[Sample],
    *,
    scheme: Scheme | None = None,
    sites: Collection[Site] = (Site.STREAM, Site.VALUES),
    seed: int = 0,
    steps: int = STEPS,
) -> RotationPlan:
    """Choose a matrix for each place where one lowers the noise of what reads it in integers by 1 dB or more.

    Parameters
    ----------
    model : onnx_ir.Model
        Canonical; it stays as it is.
    integers : collection of str
        Names of the nodes that will run in integers.
    data : Dataset
        What is measured on.
    track : callable
        Shows progress.
    scheme : Scheme, optional
        How they are quantized.
    sites : collection of Site
        What may be rotated.
    seed : int
        Of the first matrix.
    steps : int
        Of learning; with 0 nothing is learned.
    """
    found = rotatable(model.graph)
    every: list[StreamSite | ValueSite] = [*found.streams, *found.values]
    wanted = [site for site in every if site.place.site in sites]
    inputs = {site.place: rotated_inputs(site, integers) for site in wanted}
    axes = {name_of(part.value): part.axis for parts in inputs.values() for part in parts}
    rows = measure_rows(model, axes, data, track) if axes else {}
    chosen, refusals, noise = list[Rotation](), list(found.refusals), dict[Place, Mapping[str, float]]()
    for site in wanted:
        result = _choose(site, inputs[site.place], rows, scheme or Scheme(), seed, steps)
        if isinstance(result, Refusal):
            refusals.append(result)
            continue
        rotation, noise[site.place] = result
        if min(list(noise[site.place].values())[1:]) < WORTH * noise[site.place]["none"]:
            chosen.append(rotation)
        else:
            refusals.append(_useless(site.place, noise[site.place]))
    return RotationPlan(tuple(chosen), tuple(refusals), noise)


def _choose(
    site: StreamSite | ValueSite,
    inputs: tuple[RotatedInput, ...],
    rows: Mapping[str, npt.NDArray[np.float32]],
    scheme: Scheme,
    seed: int,
    steps: int,
) -> tuple[Rotation, dict[str, float]] | Refusal:
    place = site.place
    measured = [part for part in inputs if name_of(part.value) in rows]
    some = np.linspace(0, len(measured) - 1, min(READINGS, len(measured))).astype(np.int64)
    readings = [_reading(measured[at], rows[name_of(measured[at].value)]) for at in some]
    if not readings:
        return Refusal(place.node, "it is not rotated: nothing reads it in integers")
    seeds = range(seed, seed + SEEDS)
    matrix, noise = choose(readings, place.width, scheme, keeps_ones=place.keeps_ones, seeds=seeds, steps=steps)
    return Rotation(place, (matrix,)), noise


def _reading(part: RotatedInput, rows: npt.NDArray[np.float32]) -> Reading:
    """Return what the readers of a tensor see, and some columns of their weights."""
    wide, norm = rows.astype(np.float64), part.norm
    if norm is not None:
        wide = normalized(wide, norm.kind is NormKind.LAYER, norm.epsilon)
        wide = wide if part.shift is None else wide + part.shift
    return Reading(wide[:, part.channels], _some_columns(part.weights()))


def _some_columns(weights: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    some = np.linspace(0, weights.shape[1] - 1, min(COLUMNS, weights.shape[1])).astype(np.int64)
    return weights[:, some]


def _useless(place: Place, noise: Mapping[str, float]) -> Refusal:
    without, best = (numerics.decibel(1.0, value) for value in (noise["none"], min(list(noise.values())[1:])))
    fact = f"what reads it in integers is at {without:.1f} dB, and at {best:.1f} dB with the best that was tried"
    return Refusal(place.node, f"it is not rotated: {fact}")


def input_operators(model: ir.Model, integers: Collection[str]) -> list[ir.Node]:
    """Return the operators in integers that alone read their input, which a product could rotate."""
    nodes = [node for node in model.graph if node_name(node) in integers and not obstacle(node)]
    return [node for node in nodes if _block(node)]


def _block(node: ir.Node) -> int:
    shape = input_of(node, 0).shape
    assert shape is not None and isinstance(shape[-1], int), "`obstacle` has seen to that"
    return next((block for block in BLOCKS if shape[-1] % block == 0), 0)


def plan_inputs(
    model: ir.Model, operators: Collection[ir.Node], data: Dataset, track: Track[Sample]
) -> tuple[tuple[InputRotation, ...], ...]:
    """Choose a product for each operator whose noise it makes less by 1 dB or more, those that save most first.

    Whether that is worth the time is not asked here: a few tokens that are a thousand times the others hide what all
    others gain, so only the outputs tell.

    Parameters
    ----------
    model : onnx_ir.Model
    operators : collection of onnx_ir.Node
        Its `input_operators`.
    data : Dataset
        What is measured on.
    track : callable
        Shows progress.

    Returns
    -------
    tuple of tuple of InputRotation
        As many of them as save each of `SHARES` of the noise that all save, without repeats.
    """
    rows = measure_rows(model, {name_of(input_of(node, 0)): -1 for node in operators}, data, track)
    found = list[tuple[float, InputRotation]]()
    for seed, node in enumerate(operators):
        name = name_of(input_of(node, 0))
        if name in rows:
            matrix = Orthogonal.spreading(_block(node), seed, block=_block(node))
            reading = [Reading(rows[name].astype(np.float64), _some_columns(weights_by_input(node)))]
            without, rotated = (noise_of(reading, r, Scheme()) for r in (np.eye(matrix.width), matrix.matrix()))
            if rotated <= WORTH * without:
                found.append((without - rotated, InputRotation(node_name(node), matrix)))
    found.sort(key=lambda one: -one[0])
    saved = np.cumsum([saving for saving, _ in found])
    counts = {int(np.searchsorted(saved, share * saved[-1])) + 1 for share in SHARES} if found else set()
    return tuple(tuple(rotation for _, rotation in found[:count]) for count in sorted(counts, reverse=True))


def kept_in_float(inputs: Collection[InputRotation], model: ir.Model) -> dict[str, Wish]:
    """Return what to wish for so that products in front of operators stay in float: what they make is quantized."""
    return {name: Wish(Precision.FLOAT, ROTATES) for name in rotated_products(inputs, model.graph)}
