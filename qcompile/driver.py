"""The compiler's story, on one screen.

A model goes in as ONNX, is measured once, is changed by an ordered list of graph passes whose every step is proven not
to break it, becomes one quantized (QDQ) ONNX model that any ONNX runtime can read, and leaves as the artifact that the
chosen target runs fastest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import onnx_ir as ir

from qcompile import artifact, continuous, memory, padding, pareto, regression, report, timing, verify
from qcompile.budget import require_size
from qcompile.calib.collect import Statistics
from qcompile.compensation import compensate, rounded_at_once
from qcompile.core.contract import Track
from qcompile.core.lengths import Lengths
from qcompile.core.plan import QuantPlan
from qcompile.core.target import Target
from qcompile.decision import calibrate, decide
from qcompile.distributions import distributions
from qcompile.equivalence import rewrite
from qcompile.halving import HALF, halve
from qcompile.job import Job, Source, one_blas_thread
from qcompile.memory import within_memory
from qcompile.options import Options
from qcompile.page import Page
from qcompile.pareto import Front
from qcompile.passes.canonicalize import Canonicalize
from qcompile.passes.insert_qdq import InsertQdq
from qcompile.passes.lower_opset import LowerOpset
from qcompile.pipeline import untracked
from qcompile.pricing import predict
from qcompile.timing import Latency


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
    front : mapping, optional
        What ``pareto/front.json`` holds, where it was asked for.
    """

    output: Path
    plan: QuantPlan
    report: Mapping[str, Any]
    measurements: Mapping[str, Any]
    front: Mapping[str, Any] | None = None


@one_blas_thread
@within_memory
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
    options = job.options
    # Only float rewrites stand before the measurements: what is measured must be what is quantized.
    canonical = canonicalize(job)
    if options.pareto:
        pareto.require_choice(canonical, job.evidence.calibrated)
    canonical, chosen = rewrite(job, canonical)
    calibration = chosen.noted(calibrate(job, canonical, chosen.kept(canonical)))
    plan = decide(canonical, calibration, job.target, job.backend, options)
    front = pareto.sweep(canonical, calibration, job.target, job.backend, options, plan) if options.pareto else None
    quantized = quantize(job, canonical, plan)
    return deliver(job, canonical, quantized, plan, output, calibration.statistics, front)


def canonicalize(job: Job) -> ir.Model:
    """Bring the model into the form that the stages behind expect."""
    canonical = job.pipeline.apply(canonical_form(job.target, job.options, job.evidence.calibrated), job.model)
    padding.require_fitting(job, canonical)
    return canonical


def canonical_form(target: Target, options: Options, calibrated: bool) -> Canonicalize:
    """Return the pass that does so; integers want float32 beside them."""
    widen = any(options.quantized(calibrated))
    return Canonicalize(target.opset, options.shape, widen, target.static_shapes, target.joined_activations)


def quantize(job: Job, canonical: ir.Model, plan: QuantPlan) -> ir.Model:
    """Apply the plan, and make up for what that takes where something can."""
    inserted = job.pipeline.apply(InsertQdq(plan, rounded_at_once(job, canonical, plan)), canonical)
    return compensate(job, canonical, inserted, plan)


def deliver(
    job: Job, canonical: ir.Model, quantized: ir.Model, plan: QuantPlan, output: Path, seen: Statistics,
    front: Front | None = None,
) -> CompileResult:  # fmt: skip
    """Lower, verify on what calibration did not see, and write the artifact."""
    evidence, quantized, earlier = job.evidence.told(plan), deploy(job, quantized), regression.earlier(output)
    lengths = padding.settled(job, canonical, quantized)
    with artifact.staged(output) as folder:
        lowered = job.backend.lower(quantized, plan, job.device_at(lengths), folder)
        if lowered.same_form:
            continuous.hold("artifact", quantized, ir.load(folder / lowered.files[0]), job.evidence.samples)
        proof, timed = prove(job, canonical, quantized, plan, partial(job.backend.open, folder, lowered.files), lengths)
        content = report.build(job, evidence, canonical, plan, lowered, proof, folder, lengths)
        content |= report.predicted(predict(job.target.costs, job.backend, job.model, quantized, job.evidence.samples))
        require_size(job.options.max_size, content["size"]["float_bytes"], content["size"]["artifact_bytes"])
        measurements = report.measurements(content, timed, lowered, job)
        drawn = pareto.write(folder / pareto.FOLDER, front, job.model.graph.name or "model") if front else None
        spread = distributions(canonical, plan, seen.histograms)
        memory.require_held(job.options)
        artifact.write(folder, plan, content, spread, measurements)
        Page(content, measurements, spread, drawn, regression.changes(earlier, content)).write(folder)
    return CompileResult(output, plan, content, measurements, drawn)


def prove(
    job: Job, canonical: ir.Model, quantized: ir.Model, plan: QuantPlan, load: Callable[[], verify.Run],
    lengths: Lengths | None,
) -> tuple[verify.Proof, Latency | None]:  # fmt: skip
    """Hold the artifact against what it was made of, and time it beside that; nothing that runs is held behind it."""
    opened = cache(load)
    given, further, threads = job.evidence.evaluation, job.evidence.further or (), job.options.threads
    proof = verify.prove(job.model, canonical, quantized, plan, opened, given, job.track, lengths, threads, further)
    proof.require(job.options.min_fidelity)
    # A device that is not here has no latency here.
    here = not job.target.device and (job.target.timed_here or not job.target.integer_only)
    if not here or not memory.holds(job.options, job.model, 2):
        return replace(proof, reference=None), None
    samples = padding.fitting(lengths, job.evidence)
    return replace(proof, reference=None), timing.interleave(proof.reference_of(job.model), opened(), samples)


def deploy(job: Job, quantized: ir.Model) -> ir.Model:
    """Compute in float16 where the target does, and lower the opset where its runtime reads an older one only."""
    if job.target.float_dtype == HALF:
        quantized = halve(job, quantized)
    if job.target.deployed_opset is None:
        return quantized
    return job.pipeline.apply(LowerOpset.for_target(job.target.deployed_opset, job.target.name), quantized)
