"""What weights lose at the outputs: those of one operator alone, and whole models beside one another."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy.typing as npt
import onnx_ir as ir

from qcompile.calib.data import Dataset, Sample
from qcompile.calib.output_error import OutputError
from qcompile.calib.sections import at_scores, cuttable, typed
from qcompile.calib.sensitivity import ALONE, FEWEST, SAMPLES, TOGETHER, spread
from qcompile.calib.work import Cost
from qcompile.calib.workers import Travelling, Workers
from qcompile.core import runtime
from qcompile.core.contract import Track


def weights_alone(
    model: ir.Model,
    rounded: ir.Model,
    weights: Mapping[str, Collection[str]],
    data: Dataset,
    track: Track[Any],
    workers: Workers,
    shared: int | None = None,
) -> dict[str, float]:
    """Return the noise over signal at the outputs with single operators' weights rounded, everything else in float.

    Where not even one sample can be run with each within `ALONE`, nothing is returned.

    Parameters
    ----------
    model : onnx_ir.Model
    rounded : onnx_ir.Model
        The same graph with the values that its weights will have.
    weights : mapping of str to collection of str
        By operator, the names of the initializers that are its weights.
    data : Dataset
        As many samples are run as `ALONE` allows.
    track : callable
        Shows progress.
    workers : Workers
        What runs trials; the result does not depend on it.
    shared : int, optional
        By how many runs of a sample `ALONE` is shared, in place of those that are asked for: of as many samples as
        these would have.
    """
    if not weights or not cuttable(model):
        return {}
    first = next(iter(data))
    scores, codes = typed(at_scores(model), first), rounded.graph.initializers
    cost, runs = Cost.of(scores, first), shared or len(weights)
    if cost.total * runs > ALONE:
        return {}
    samples = spread(data, cost.peak_bytes, min(SAMPLES, ALONE / max(1, cost.total) / runs))
    session = runtime.Session(scores)
    expected = [session.run(feeds) for feeds in samples]
    values = {operator: {name: _array(codes[name]) for name in names} for operator, names in weights.items()}
    given = Travelling(scores), samples, expected
    return workers.for_model(scores).each(_weighed, given, values, track, "weighing weights")


def _array(value: ir.Value) -> npt.NDArray[Any]:
    assert value.const_value is not None
    return value.const_value.numpy()


def _weighed(
    scores: Travelling,
    samples: Sequence[Sample],
    expected: Sequence[runtime.Outputs],
    values: Mapping[str, Mapping[str, npt.NDArray[Any]]],
) -> dict[str, float]:
    """Return the noise over signal with one operator's weights after another's at other values."""
    found = {}
    for operator, arrays in values.items():
        trial, error = scores.model.clone(), OutputError()
        for name, array in arrays.items():
            trial.graph.initializers[name].const_value = ir.tensor(array, name=name)
        session = runtime.Session(trial)
        for feeds, outputs in zip(samples, expected, strict=True):
            error.add(outputs, session.run(feeds))
        found[operator] = error.total
    return found


def affordable(model: ir.Model, runs: int, data: Dataset) -> bool:
    """Tell whether so many runs of one sample are within `ALONE`, for a model that can be judged by its outputs."""
    return cuttable(model) and Cost.of(model, next(iter(data))).total * runs <= ALONE


def whole_models(
    reference: ir.Model, candidates: Iterable[ir.Model], count: int, data: Dataset, track: Track[Any]
) -> list[float]:
    """Return the noise over signal at the outputs of one model after the other, each with everything quantized.

    As in `drift.losses`, they run as they are defined, without a runtime's fusions. Nothing is returned where `FEWEST`
    samples, or all that there are, cannot be run with each within `TOGETHER`.

    Parameters
    ----------
    reference : onnx_ir.Model
        The float model.
    candidates : iterable of onnx_ir.Model
        Each is taken when its turn comes.
    count : int
        How many these are.
    data : Dataset
        At most `SAMPLES` of it are run, as many as `TOGETHER` allows.
    track : callable
        Shows progress.
    """
    cost = Cost.of(reference, next(iter(data)))
    most = TOGETHER / max(1, cost.total) / (1 + count)
    if most < min(FEWEST, len(data)):
        return []
    samples = spread(data, cost.peak_bytes, min(SAMPLES, most))
    session = runtime.Session(at_scores(reference), optimize=False)
    expected = [session.run(feeds) for feeds in samples]
    found = []
    for model in track(candidates, count, "running choices"):
        session, error = runtime.Session(at_scores(model), optimize=False), OutputError()
        for feeds, outputs in zip(samples, expected, strict=True):
            # In front of a last Softmax, values have other names once they are quantized.
            error.add(outputs, dict(zip(outputs, session.run(feeds).values(), strict=True)))
        found.append(error.total)
    return found
