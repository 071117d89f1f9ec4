"""The compiler's story, on one screen.

A model goes in as ONNX, is measured once, is changed by an ordered list of graph passes whose every step is proven not
to break it, becomes one quantized (QDQ) ONNX model that any ONNX runtime can read, and leaves as the artifact that the
chosen target runs fastest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import onnx
import onnx_ir as ir

from qcompile import artifact, report, timing, verify
from qcompile.backends.base import Backend, find_target
from qcompile.calib.collect import Statistics, collect
from qcompile.calib.drift import helps, measure_drift
from qcompile.calib.moments import Moments, known_moments
from qcompile.calib.observers import Observer
from qcompile.calib.sections import cuttable
from qcompile.calib.sensitivity import Choice, choose_observers
from qcompile.calib.synthetic import carried_over, derivable, propagate
from qcompile.calibration import Calibration
from qcompile.core import model as models
from qcompile.core import numerics, runtime
from qcompile.core.contract import Effect, Refusal, Rewritten, Track
from qcompile.core.errors import ModelError, VerificationError
from qcompile.core.plan import Precision, QuantPlan
from qcompile.core.target import Target
from qcompile.evidence import SYNTHETIC, Evidence, gather
from qcompile.options import Options
from qcompile.override import wishes
from qcompile.passes.allocate_bits import allocate_bits, round_to_codes
from qcompile.passes.canonicalize import Canonicalize
from qcompile.passes.correct_bias import CorrectBias, correctable
from qcompile.passes.insert_qdq import InsertQdq
from qcompile.passes.lower_opset import LowerOpset
from qcompile.passes.place import Placement, Wish, code_readers, place, sparing
from qcompile.pipeline import CHOICE, DRIFT, STATISTICS, VERDICT, Pipeline, untracked

#: What remains may spoil the outputs as well; so often it is looked at again.
ATTEMPTS = 4
#: Why an operator keeps its float activations without data.
UNTOLD = "no data, and no BatchNormalization tells the ranges that it needs"
#: Every form that a caller may have a model in.
Source = str | Path | onnx.ModelProto | ir.Model


@dataclass(frozen=True)
class CompileResult:
    """What a compile produced.

    Parameters
    ----------
    output : Path
        Folder of the artifact.
    plan : QuantPlan
    report : mapping
        What ``report.json`` holds; docs/schemas/report.schema.json describes it.
    measurements : mapping
        What was seen on this machine: latency, and the seconds that stages took.
    """

    output: Path
    plan: QuantPlan
    report: Mapping[str, Any]
    measurements: Mapping[str, Any]


@dataclass(frozen=True)
class Job:
    """What every stage of one compile works with.

    Parameters
    ----------
    model : onnx_ir.Model
        As it came in.
    target : Target
    backend : Backend
    options : Options
    evidence : Evidence
    pipeline : Pipeline
    track : callable
        Shows progress over samples.
    """

    model: ir.Model
    target: Target
    backend: Backend
    options: Options
    evidence: Evidence
    pipeline: Pipeline
    track: Track[Any]

    @classmethod
    def begin(cls, source: Source, options: Options, track: Track[Any]) -> Self:
        """Load what the options name."""
        target, backend = find_target(options.target)
        taken = take(source)
        evidence = gather(taken.model, options)
        pipeline = Pipeline.start(taken.model, evidence, target, options)
        if taken.modified:
            pipeline.record(LowerOpset, taken)
        return cls(taken.model, target, backend, options, evidence, pipeline, track)


def compile(source: Source, options: Options, track: Track[Any] = untracked) -> CompileResult:
    """Compile a model for a target.

    `stages.py` has the same stages one by one, with files between them.

    Parameters
    ----------
    source : path, onnx.ModelProto or onnx_ir.Model
    options : Options
    track : callable
        Shows progress over samples; silent by default.

    Raises
    ------
    QcompileError
        One line that says where, what, and what to do. Nothing is written then.
    """
    output = artifact.place(source, options)  # refused before the work rather than after it
    job = Job.begin(source, options, track)
    # Only float rewrites stand before the measurements: what is measured must be what is quantized.
    canonical = canonicalize(job)
    calibration = calibrate(job, canonical)
    plan = decide(canonical, calibration, job.target, options)
    quantized = quantize(job, canonical, plan)
    return deliver(job, canonical, quantized, plan, output)


def take(source: Source) -> Rewritten:
    """Return the model; one newer than the runtime is lowered first, or there would be nothing to hold it against."""
    model = models.take(source)
    opset, ir_version, name = runtime.newest_versions()
    came, result = models.opset(model), LowerOpset(opset, ir_version, name)(model)
    note = f"The model's opset {came} is newer than {name}'s {opset}: it is lowered to that before all."
    return Rewritten(result.model, result.modified, notes=(note,) if came > opset else ())


def canonicalize(job: Job) -> ir.Model:
    """Bring the model into the form that the stages behind expect."""
    return job.pipeline.apply(canonical_form(job.target, job.options, job.evidence.calibrated), job.model)


def canonical_form(target: Target, options: Options, calibrated: bool) -> Canonicalize:
    """Return the pass that does so; integers want float32 beside them."""
    return Canonicalize(target.opset, options.shape, widen=any(options.quantized(calibrated)))


def calibrate(job: Job, canonical: ir.Model) -> Calibration:
    """Measure: a histogram of each activation that gets a scale, and which observer serves it.

    What alone would ruin the outputs is spared, and what is left is measured as it will be then. Without data, what
    BatchNormalization tells stands in for them.
    """
    if not job.evidence.calibrated:
        return _guess(job, canonical)
    options, target = job.options, job.target
    spared: dict[str, Wish] = {}
    for attempt in range(ATTEMPTS):
        placement = choose_operators(canonical, target, options, True, spared)
        statistics, choice = _measure(job, canonical, placement, f" {attempt + 1}" if attempt else "")
        if not choice.spoilers or attempt + 1 == ATTEMPTS:
            break
        # Where an operator goes back to float, its neighbours get codes elsewhere: these have to be measured.
        spared |= sparing(canonical, placement, {name: _spoils(choice.alone[name]) for name in choice.spoilers})
    return _calibration(job, statistics, choice, spared, calibrated=True)


def choose_operators(
    canonical: ir.Model, target: Target, options: Options, calibrated: bool, spared: Mapping[str, Wish]
) -> Placement:
    """Choose what runs as integers, and thereby what must be measured; activations take ranges."""
    asked = {**spared, **wishes(options.overrides, canonical)}
    return place(canonical, target, *options.quantized(calibrated), asked)


def decide(canonical: ir.Model, calibration: Calibration, target: Target, options: Options) -> QuantPlan:
    """Turn what was measured into the plan, which says what it was decided with.

    Raises
    ------
    UsageError
        If the options need a measurement that was not made.
    """
    # What is spared for want of data keeps its integer weights; what would spoil the outputs keeps nothing.
    least = Precision.FLOAT if calibration.statistics.samples else Precision.WEIGHT_ONLY
    spared = {node: Wish(least, reason) for node, reason in calibration.spared.items()}
    placement = choose_operators(canonical, target, options, calibration.calibrated, spared)
    calibration.require(placement.activations)
    observers = calibration.choice.observers
    plan = allocate_bits(canonical, placement, calibration.statistics, target, observers)
    return replace(plan, options=options.as_recipe(), guessed=calibration.guessed)


def quantize(job: Job, canonical: ir.Model, plan: QuantPlan) -> ir.Model:
    """Apply the plan."""
    quantized = job.pipeline.apply(InsertQdq(plan), canonical)
    # Behind Q/DQ: what is corrected is the mean of the codes as they really come out.
    operators, refused = correctable(quantized, plan, job.target)
    if operators and not job.evidence.calibrated:
        refused = (Refusal("model", "no biases are corrected: without data nothing tells what they lack"), *refused)
    elif operators:
        return _correct_bias(job, canonical, quantized, operators, refused)
    if refused:
        job.pipeline.decline(CorrectBias, quantized, refused)
    return quantized


def deliver(job: Job, canonical: ir.Model, quantized: ir.Model, plan: QuantPlan, output: Path) -> CompileResult:
    """Lower, verify on what calibration did not see, and write the artifact."""
    evidence, quantized = job.evidence.told(plan), deploy(job, quantized)
    with artifact.staged(output) as folder:
        lowered = job.backend.lower(quantized, plan, job.target, folder)
        run = job.backend.open(folder, lowered.files)
        proof = verify.prove(job.model, canonical, quantized, plan, run, job.evidence.evaluation, job.track)
        proof.require(job.options.min_fidelity)
        latency = timing.interleave(proof.reference, run, job.evidence.samples)
        content = report.build(
            job.model, job.target, job.options, evidence, plan, job.pipeline.steps, lowered, proof, folder
        )
        measurements = report.measurements(content, latency, job.pipeline)
        artifact.write(folder, plan, content, measurements)
    return CompileResult(output, plan, content, measurements)


def deploy(job: Job, quantized: ir.Model) -> ir.Model:
    """Lower the opset where the target's runtime reads an older one only."""
    if job.target.deployed_opset is None:
        return quantized
    return job.pipeline.apply(LowerOpset.for_target(job.target.deployed_opset, job.target.name), quantized)


def _measure(job: Job, canonical: ir.Model, placement: Placement, attempt: str) -> tuple[Statistics, Choice]:
    data, track, pipeline, dtype = job.evidence.calibration, job.track, job.pipeline, job.target.activation_dtype
    wanted, readers = placement.activations, code_readers(canonical, placement)
    among, threads = job.options.observers, job.options.threads
    statistics = pipeline.measure(f"statistics{attempt}", STATISTICS, lambda: collect(canonical, wanted, data, track))
    # How wide an activation's range is hardly bears on the weights' scales: the first observer serves for these.
    plan = allocate_bits(canonical, placement, statistics, job.target, dict.fromkeys(wanted, among[0]))
    rounded = round_to_codes(canonical, plan)
    choice = pipeline.measure(
        f"observers{attempt}",
        CHOICE,
        lambda: choose_observers(canonical, rounded, statistics, readers, among, dtype, data, track, threads),
    )
    return statistics, choice


def _guess(job: Job, canonical: ir.Model) -> Calibration:
    """Derive ranges without data, and spare what they cannot be derived for; where nothing is left, weights alone."""
    weights_alone = _calibration(job, Statistics(), Choice({}), {}, calibrated=False)
    found = known_moments(job.model) if job.options.activations == "8" and cuttable(canonical) else {}
    if not found:
        return weights_alone
    spared: dict[str, Wish] = {}
    placement = hoped = choose_operators(canonical, job.target, job.options, True, spared)
    try:
        known = carried_over(found, job.model, canonical, job.evidence.samples[0])
        reachable = derivable(canonical, known)
        while unknown := [name for name in placement.activations if name not in reachable]:
            wanted = sparing(canonical, placement, dict.fromkeys(unknown, UNTOLD))
            if wanted.keys() <= spared.keys():  # somebody asks for integers all the same
                return weights_alone
            spared |= {node: Wish(Precision.WEIGHT_ONLY, wish.reason) for node, wish in wanted.items()}
            placement = choose_operators(canonical, job.target, job.options, True, spared)
        # Codes here and there cost what codes cost everywhere, and gain nothing.
        few = 2 * _integers(placement) < _integers(hoped)
        return weights_alone if few or not placement.activations else _derive(job, canonical, placement, known, spared)
    except (ModelError, VerificationError) as error:
        reason = f"activations stay in float: {error.fact}, with ranges that are guessed without data"
        unused = {node: Wish(Precision.WEIGHT_ONLY, reason) for node, op in placement.ops.items()
                  if op.precision is Precision.INTEGER}  # fmt: skip
        return _calibration(job, Statistics(), Choice({}), unused, calibrated=False)


def _derive(
    job: Job, canonical: ir.Model, placement: Placement, known: Mapping[str, Moments], spared: Mapping[str, Wish]
) -> Calibration:
    """Derive the ranges, and hold what they lead to against the float model: nothing that was seen speaks for them."""
    options, names = job.options, placement.activations
    # Data to evaluate on have the shapes of those that are missing; one random input has open axes of length 1.
    like = None if job.evidence.source == SYNTHETIC else job.evidence.samples[0]
    statistics = job.pipeline.measure("synthetic", STATISTICS, lambda: propagate(canonical, known, names, like))
    observer = Observer.MINMAX if options.observer == "auto" else Observer(options.observer)
    calibration = _calibration(job, statistics, Choice(dict.fromkeys(names, observer)), spared, calibrated=True)
    trial = InsertQdq(decide(canonical, calibration, job.target, options))(canonical.clone()).model
    before, after = (verify.outputs_of(model, job.evidence.samples) for model in (canonical, trial))
    verify.check_equivalence("InsertQdq", Effect.LOSSY, before, after)
    return calibration


def _calibration(
    job: Job, statistics: Statistics, choice: Choice, spared: Mapping[str, Wish], *, calibrated: bool
) -> Calibration:
    return Calibration(
        statistics,
        choice,
        {node: wish.reason for node, wish in spared.items()},
        model=models.content_hash(job.model),
        data=job.evidence.calibration.digest,
        calibrated=calibrated,
        options=job.options.as_recipe(),
    )


def _integers(placement: Placement) -> int:
    return sum(op.precision is Precision.INTEGER for op in placement.ops.values())


def _spoils(error: float) -> str:
    return f"its codes alone would leave {numerics.decibel(1.0, error):.1f} dB at the outputs"


def _correct_bias(
    job: Job, reference: ir.Model, quantized: ir.Model, operators: Sequence[str], refused: Sequence[Refusal]
) -> ir.Model:
    """Take the drift of the operators' means back, if that helps on samples that it was not measured on.

    A trial on three quarters of the samples decides; what is kept is measured on all of them.
    """
    data, pipeline, track = job.evidence.calibration, job.pipeline, job.track
    fit, others = data.split(held_out=0.25)
    trial = pipeline.measure("trial", DRIFT, lambda: measure_drift(reference, quantized, operators, fit, track))
    improved = CorrectBias(trial)(quantized.clone()).model
    if not pipeline.measure("helps", VERDICT, lambda: helps(reference, quantized, improved, others, track)):
        reason = Refusal("model", "correcting biases did not help on samples held out from it")
        pipeline.decline(CorrectBias, quantized, (reason, *refused))
        return quantized
    drift = pipeline.measure("drift", DRIFT, lambda: measure_drift(reference, quantized, operators, data, track))
    return pipeline.apply(CorrectBias(drift, tuple(refused)), quantized)
