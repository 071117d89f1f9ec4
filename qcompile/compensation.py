"""Make up for what quantization took: weights rounded with regard to one another, biases that take the drift back.

Both are tried on three quarters of the samples and judged on the others; what is kept is measured on all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import onnx_ir as ir

from qcompile.calib.data import Dataset
from qcompile.calib.drift import losses, measure_drift
from qcompile.calib.output_error import OutputError, surely_less
from qcompile.calib.rounding import MANY, Operator, SecondMoments, round_weights, second_moments
from qcompile.calib.workers import abreast
from qcompile.chosen_codes import is_nearer
from qcompile.core import scratch
from qcompile.core.contract import Pass, Refusal
from qcompile.core.numerics import IntArray
from qcompile.core.plan import QuantPlan
from qcompile.job import Job
from qcompile.passes import structure
from qcompile.passes.correct_bias import CorrectBias, correctable
from qcompile.passes.insert_qdq import InsertQdq
from qcompile.passes.round_weights import RoundWeights, roundable
from qcompile.pipeline import CODES, DRIFT, NAMES

#: Part of the samples that trials are judged on.
HELD_OUT = 0.25
#: Standard errors by which noise must be less without rounding for it to be left out.
SURE = 1.0
#: Why a pass is not applied though it could be.
UNKNOWN = "no biases are corrected: without data nothing tells what they lack"
VAIN = "its weights are rounded to nearest: by what it reads, codes chosen with regard to one another are no better"
USELESS = {
    RoundWeights: "weights rounded with regard to one another lost more on samples held out from it",
    CorrectBias: "correcting biases did not help on samples held out from it",
}


def compensate(job: Job, canonical: ir.Model, quantized: ir.Model, plan: QuantPlan) -> ir.Model:
    """Round weights and correct biases, where that helps on samples held out from it.

    Parameters
    ----------
    job : Job
    canonical : onnx_ir.Model
        The float model.
    quantized : onnx_ir.Model
        The QDQ model that `plan` made of it.
    plan : QuantPlan
    """
    operators, weights_left = roundable(canonical, quantized, plan)
    biases, biases_left = correctable(quantized, plan, job.target)
    if not job.evidence.calibrated:
        _decline(job, CorrectBias, quantized, ((Refusal("model", UNKNOWN),) if biases else ()) + biases_left)
        return quantized
    data, pipeline, track = job.evidence.fitted(job.evidence.calibration), job.pipeline, job.track
    threads = job.options.threads
    useful = pipeline.measure("compensation", NAMES, lambda: _useful(job, canonical, quantized, operators, biases))
    if RoundWeights.__name__ in useful:
        codes = pipeline.measure("codes", CODES, lambda: _codes(job, canonical, operators, data))
        vain = tuple(Refusal(structure.node_name(one.node), VAIN) for name, one in operators.items()
                     if name not in codes)  # fmt: skip
        quantized = pipeline.apply(RoundWeights(codes, (*weights_left, *vain)), quantized)
    else:
        _decline(job, RoundWeights, quantized, (_useless(RoundWeights) if operators else ()) + weights_left)
    if CorrectBias.__name__ in useful:
        walk = partial(measure_drift, canonical, quantized, biases, data, track, threads)
        drift = pipeline.measure("drift", DRIFT, walk)
        return pipeline.apply(CorrectBias(drift, biases_left), quantized)
    _decline(job, CorrectBias, quantized, (_useless(CorrectBias) if biases else ()) + biases_left)
    return quantized


def rounded_at_once(job: Job, canonical: ir.Model, plan: QuantPlan) -> RoundWeights | None:
    """Return codes for weights in plain four bits, which rounded to nearest may leave nothing of the outputs.

    Parameters
    ----------
    job : Job
    canonical : onnx_ir.Model
        The float model.
    plan : QuantPlan

    Returns
    -------
    RoundWeights or None
        None where there are none, or without data.
    """
    narrow = any(quant.bits < MANY and not quant.block_size for quant in plan.tensors.values())
    if not narrow or not job.evidence.calibrated:
        return None
    operators, _ = roundable(canonical, InsertQdq(plan)(canonical.clone()).model, plan)
    few = {name: one for name, one in operators.items() if one.quant.bits < MANY}
    data = job.evidence.fitted(job.evidence.calibration)
    codes = job.pipeline.measure("codes at once", CODES, lambda: _codes(job, canonical, few, data))
    return RoundWeights(codes)


def _useful(
    job: Job, canonical: ir.Model, quantized: ir.Model, operators: Mapping[str, Operator], biases: Sequence[str]
) -> list[str]:
    """Return the names of the passes that help.

    Biases are corrected where that leaves less noise. Weights stay at nearest only where that surely leaves less: of
    two dozen samples few are held out, and rounding helps on nearly all models (docs/rounding.md).
    """
    fit, others = job.evidence.calibration.split(HELD_OUT)
    fitted = job.evidence.fitted(fit)
    trials: list[tuple[tuple[type[Pass], ...], ir.Model]] = [((), quantized)]
    if operators:
        codes = _codes(job, canonical, operators, fitted)
        trials.append(((RoundWeights,), RoundWeights(codes)(quantized.clone()).model))
    for passes, model in tuple(trials) if biases else ():
        drift = measure_drift(canonical, model, biases, fitted, job.track, job.options.threads)
        trials.append(((*passes, CorrectBias), CorrectBias(drift)(model.clone()).model))
    if len(trials) == 1:
        return []
    errors = losses(canonical, [model for _, model in trials], others, job.track, job.options.threads)
    found = dict(zip((passes for passes, _ in trials), errors, strict=True))
    least = partial(min, key=lambda passes: found[passes].value)
    best = least(passes for passes in found if RoundWeights not in passes)
    if operators:
        rounded = least(passes for passes in found if RoundWeights in passes)
        best = best if _surely_worse(found[rounded], found[best]) else rounded
    return [pass_.__name__ for pass_ in best]


def _surely_worse(error: OutputError, other: OutputError) -> bool:
    """Tell whether an error is larger by more than its standard error; of one sample, whether it is larger."""
    return surely_less(other, error, SURE) if error.samples > 1 else other.value < error.value


def _codes(job: Job, canonical: ir.Model, operators: Mapping[str, Operator], data: Dataset) -> dict[str, IntArray]:
    """Return the codes of each operator's weights, by the initializer that holds them, where they are of use."""
    names = {operator: name for name, operator in operators.items()}
    threads = job.options.threads
    moments = second_moments(canonical, list(operators.values()), data, job.track, threads)

    def rounded(pair: tuple[Operator, SecondMoments]) -> tuple[str, IntArray | None]:
        codes = round_weights(*pair)
        return names[pair[0]], codes if is_nearer(*pair, codes) else None

    kept = ((name, codes) for name, codes in abreast(rounded, moments, threads) if codes is not None)
    return {name: scratch.kept(codes) for name, codes in kept}


def _useless(pass_: type[Pass]) -> tuple[Refusal, ...]:
    return (Refusal("model", USELESS[pass_]),)


def _decline(job: Job, pass_: type[Pass], model: ir.Model, refusals: Sequence[Refusal]) -> None:
    if refusals:
        job.pipeline.decline(pass_, model, refusals)
