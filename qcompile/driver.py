"""The compiler's story, on one screen.

A model goes in as ONNX, is measured once, is changed by an ordered list of graph passes whose every step is proven not
to break it, becomes one quantized (QDQ) ONNX model that any ONNX runtime can read, and leaves as the artifact that the
chosen target runs fastest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir

from qcompile import artifact, report, timing, verify
from qcompile.backends.base import find_target
from qcompile.calib.collect import collect
from qcompile.calib.data import Dataset
from qcompile.calib.drift import helps, measure_drift
from qcompile.calib.sensitivity import choose_observers
from qcompile.core import model as models
from qcompile.core import runtime
from qcompile.core.contract import Refusal, Track
from qcompile.core.plan import QuantPlan
from qcompile.evidence import gather
from qcompile.options import Options
from qcompile.passes.allocate_bits import allocate_bits, place
from qcompile.passes.canonicalize import Canonicalize
from qcompile.passes.canonicalize.lower_opset import LowerOpset
from qcompile.passes.correct_bias import CorrectBias, correctable
from qcompile.passes.insert_qdq import InsertQdq
from qcompile.pipeline import DRIFT, OBSERVERS, STATISTICS, VERDICT, Pipeline, untracked


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


def compile(
    source: str | Path | onnx.ModelProto | ir.Model, options: Options, track: Track[Any] = untracked
) -> CompileResult:
    """Compile a model for a target.

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
    target, backend = find_target(options.target)
    output = artifact.place(source, options)  # refused before the work rather than after it
    # A model newer than the runtime has nothing to be held against: it is lowered before anything looks at it.
    model = LowerOpset(*runtime.newest_versions())(models.take(source)).model
    evidence = gather(model, options)
    data, threads = evidence.calibration, options.threads
    pipeline = Pipeline.start(model, evidence, target, options)

    # Only float rewrites stand before the measurements: what is measured must be what is quantized.
    canonical = pipeline.apply(Canonicalize(target.opset, options.shape), model)
    placement = place(canonical, target, *options.quantized(evidence.calibrated))
    wanted = placement.activations
    statistics = pipeline.measure("statistics", STATISTICS, lambda: collect(canonical, wanted, data, track))
    dtype = target.activation_dtype
    observers = options.fixed_observer or pipeline.measure(
        "observers", OBSERVERS, lambda: choose_observers(canonical, statistics, dtype, data, track, threads)
    )
    plan = allocate_bits(canonical, placement, statistics, target, observers)
    quantized = pipeline.apply(InsertQdq(plan), canonical)
    # Behind Q/DQ: what is corrected is the mean of the codes as they really come out.
    operators, refused = correctable(quantized, plan, target)
    if operators:
        quantized = _correct_bias(canonical, quantized, operators, refused, data, pipeline, track)
    elif refused:
        pipeline.decline(CorrectBias, quantized, refused)

    with artifact.staged(output) as folder:
        lowered = backend.lower(quantized, plan, target, folder)
        run = backend.open(folder, lowered.files)
        proof = verify.prove(model, canonical, quantized, plan, run, evidence.evaluation, track)
        proof.require(options.min_fidelity)
        latency = timing.interleave(proof.reference, run, evidence.samples)
        content = report.build(model, target, options, evidence, plan, pipeline.steps, lowered, proof, folder)
        measurements = report.measurements(content, latency, pipeline)
        artifact.write(folder, plan, content, measurements)
    return CompileResult(output, plan, content, measurements)


def _correct_bias(
    reference: ir.Model,
    quantized: ir.Model,
    operators: Sequence[str],
    refused: Sequence[Refusal],
    data: Dataset,
    pipeline: Pipeline,
    track: Track[Any],
) -> ir.Model:
    """Take the drift of the operators' means back, if that helps on samples that it was not measured on.

    A trial on three quarters of the samples decides; what is kept is measured on all of them.
    """
    fit, others = data.split(held_out=0.25)
    trial = pipeline.measure("trial", DRIFT, lambda: measure_drift(reference, quantized, operators, fit, track))
    improved = CorrectBias(trial)(quantized.clone()).model
    if not pipeline.measure("helps", VERDICT, lambda: helps(reference, quantized, improved, others, track)):
        reason = Refusal("model", "correcting biases did not help on samples held out from it")
        pipeline.decline(CorrectBias, quantized, (reason, *refused))
        return quantized
    drift = pipeline.measure("drift", DRIFT, lambda: measure_drift(reference, quantized, operators, data, track))
    return pipeline.apply(CorrectBias(drift, tuple(refused)), quantized)
