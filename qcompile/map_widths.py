"""Activations in four bits, where a device's memory asks for them: what each loses is measured, the backend chooses.

A map in four bits loses far more than one in eight, so nothing has four as long as eight fit, in strips if need be. The
range is chosen anew for four bits. docs/allocation.md has the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import onnx_ir as ir

from qcompile.backends.base import Backend
from qcompile.calib.map_losses import Clip, MapLosses
from qcompile.calib.observers import Observer
from qcompile.calib.weighing import whole_models
from qcompile.compensation import HELD_OUT
from qcompile.core import numerics
from qcompile.core.errors import UsageError
from qcompile.core.plan import QuantPlan, TensorQuant
from qcompile.core.target import Target
from qcompile.job import Job
from qcompile.options import Options
from qcompile.passes.allocate_bits import HALVES
from qcompile.passes.insert_qdq import InsertQdq, quantized_name
from qcompile.passes.place import Placement

#: Parts of a range that are tried: to hold every value costs most of fifteen steps.
PARTS = (0.8, 0.65, 0.5, 0.4)
#: What ranges for four bits are chosen among, if the options leave the observer open.
CLIPS = (Clip(Observer.MSE), Clip(Observer.ENTROPY), *(Clip(Observer.MINMAX, part) for part in PARTS))

#: What returns the plan with activations in four bits, by how their ranges are chosen.
Narrowing = Callable[[Mapping[str, Clip]], QuantPlan]


def bounded(target: Target) -> bool:
    """Tell whether a device's memory is bounded, and its activations have half as many bits as well."""
    bounds = (target.settings.get(key) for key in ("max_sram", "board"))
    return target.activation_dtype in HALVES and any(bound is not None for bound in bounds)


def ties(placement: Placement) -> dict[str, str]:
    """Return the activation that each value of the QDQ model is; those of one scale have their bits together."""
    names = {name: name for name in placement.activations} | dict(placement.same_scale)
    return names | {quantized_name(name): source for name, source in names.items()}


def clips(options: Options) -> tuple[Clip, ...]:
    """Return the ranges to choose among: with an observer that the options name, that one's and parts of it."""
    if options.observer == "auto":
        return CLIPS
    return tuple(Clip(Observer(options.observer), part) for part in (1.0, *PARTS))


def measure(
    job: Job, canonical: ir.Model, names: Sequence[str], tied: Mapping[str, str], planned: Narrowing
) -> MapLosses:
    """Run the quantized model with one activation after the other in four bits, on samples held out.

    Parameters
    ----------
    job : Job
    canonical : onnx_ir.Model
    names : sequence of str
        Activations.
    tied : mapping of str to str
        As of `ties`.
    planned : callable

    Returns
    -------
    MapLosses
        Empty where that would take too long.
    """
    tries = [(name, clip) for name in names for clip in clips(job.options)]
    _, others = job.evidence.calibration.split(HELD_OUT)
    # Ranges take long to find: they are found once for all, and each trial has those of one activation.
    eight = planned({})
    four = {each: planned(dict.fromkeys(names, each)).tensors for each in dict.fromkeys(each for _, each in tries)}
    models = (InsertQdq(plan)(canonical.clone()).model
              for plan in (eight, *(_with_one(eight, four[each], name, tied) for name, each in tries)))  # fmt: skip
    found = whole_models(canonical, models, 1 + len(tries), others, job.track)
    narrow: dict[str, dict[Clip, float]] = {}
    for (name, clip), noise in zip(tries, found[1:], strict=False):
        narrow.setdefault(name, {})[clip] = noise
    return MapLosses(found[0], narrow) if found else MapLosses()


def _with_one(plan: QuantPlan, narrow: Mapping[str, TensorQuant], name: str, tied: Mapping[str, str]) -> QuantPlan:
    """Return a plan with one activation, and what has its scale, as another plan has it."""
    own = {other: narrow[other] for other in plan.tensors if tied.get(other) == name}
    return replace(plan, tensors={**plan.tensors, **own})


def narrowed(
    canonical: ir.Model, losses: MapLosses, target: Target, backend: Backend, tied: Mapping[str, str],
    planned: Narrowing,
) -> tuple[dict[str, Clip], dict[str, Any]]:  # fmt: skip
    """Choose the activations in four bits with which a model fits a device and loses least.

    Parameters
    ----------
    canonical : onnx_ir.Model
    losses : MapLosses
    target : Target
        With the device's memory.
    backend : Backend
    tied : mapping of str to str
        As of `ties`.
    planned : callable

    Returns
    -------
    dict of str to Clip
        Empty where eight bits fit.
    dict of str to object
        What there is to say of it, JSON-ready; empty then.

    Raises
    ------
    BudgetError
        If nothing fits.
    UsageError
        If what activations lose was not measured.
    """
    quantized = InsertQdq(planned({}))(canonical.clone()).model
    able = backend.narrowable(quantized, target, tied)
    if not able:
        return {}, {}
    if missing := sorted(set(able) - set(losses.narrow)):
        fact = f"has no measurement of what '{missing[0]}' loses in four bits, which this memory needs"
        raise UsageError("calibration", fact, "calibrate again, on data, with --max-sram, or allow more memory")
    best = {name: losses.best(name) for name in able}
    chosen = backend.narrowed(quantized, target, tied, {name: loss for name, (_, loss) in best.items()})
    expected = losses.noise + sum(best[name][1] for name in chosen)
    told = {
        "bits": dict.fromkeys(chosen, 4),
        "sqnr": _decibel(expected),
        "sqnr_of_eight": _decibel(losses.noise),
    }  # fmt: skip
    return {name: best[name][0] for name in chosen}, told


def _decibel(noise: float) -> float | None:
    return round(numerics.decibel(1.0, noise), 2) if noise > 0.0 else None
