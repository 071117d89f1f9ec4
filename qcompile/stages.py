"""The stages of a compile one by one: `qcompile calibrate`, `qcompile plan`, `qcompile apply`.

They are the stages of `driver.compile`, with a file between each and the next; together they write the same bytes.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx_ir as ir

from qcompile import artifact, cache, decision, driver, equivalence, pareto, recipe, report
from qcompile.calib.collect import Statistics
from qcompile.calibration import Calibration
from qcompile.core import model as models
from qcompile.core.contract import Track
from qcompile.core.errors import UsageError
from qcompile.core.plan import QuantPlan
from qcompile.driver import CompileResult
from qcompile.equivalence import Equivalences
from qcompile.job import Job, Source, chosen_target, fitting, one_blas_thread, take
from qcompile.memory import require_held, within_memory
from qcompile.options import COSTS_KEY, Options
from qcompile.passes.check_plan import check_plan, check_rotations
from qcompile.pipeline import untracked


@dataclass(frozen=True)
class Written:
    """What `calibrate` wrote, and what is to be said of it.

    Parameters
    ----------
    output : Path
    calibration : Calibration
    caveat : str
        What the measurements do not show; empty where they stand on their own.
    """

    output: Path
    calibration: Calibration
    caveat: str

    def summary(self) -> dict[str, Any]:
        """Return what there is to tell, JSON-ready."""
        return {
            "output": str(self.output),
            "warnings": [self.caveat] if self.caveat else [],
            "samples": self.calibration.statistics.samples,
            "tensors": len(self.calibration.statistics.histograms),
            "observers": self.calibration.chosen,
            "options": dict(self.calibration.options),
        }


@one_blas_thread
@within_memory
def calibrate(source: Source, options: Options, output: Path, track: Track[Any] = untracked) -> Written:
    """Measure what a plan needs to know of a model, and write it to a file.

    Raises
    ------
    QcompileError
        Nothing is written then.
    """
    artifact.check_own(output, Calibration.read)
    job = Job.begin(source, options, track)
    canonical = driver.canonicalize(job)
    canonical, chosen = equivalence.rewrite(job, canonical)
    calibration = chosen.noted(decision.calibrate(job, canonical, chosen.kept(canonical)))
    require_held(job.options)
    artifact.write_file(output, calibration.to_bytes())
    evidence = job.evidence
    if calibration.calibrated and not evidence.calibrated:
        evidence = evidence.guessing() if calibration.guessed else evidence.at_run_time()
    return Written(output, calibration, evidence.caveat)


@dataclass(frozen=True)
class Planned:
    """What `plan` wrote.

    Parameters
    ----------
    plan : QuantPlan
    front : mapping, optional
        What front.json holds, where it was asked for.
    """

    plan: QuantPlan
    front: Mapping[str, Any] | None = None


def plan(source: Source, options: Options, measured: Path, output: Path, front: Path | None = None) -> Planned:
    """Decide, by what a calibration file holds, and write the plan to a file. Nothing is run.

    Parameters
    ----------
    source : path, onnx.ModelProto or onnx_ir.Model
    options : Options
        Overrides may be others than those that the calibration was made with, as long as what they need was measured.
    measured : Path
        The calibration file.
    output : Path
    front : Path, optional
        A folder for the Pareto front.

    Raises
    ------
    QcompileError
        Nothing is written then.
    """
    artifact.check_own(output, read_plan)
    if front is not None:
        artifact.check_replaceable(front)
    calibration = Calibration.read(measured)
    target, backend = chosen_target(options)
    options = fitting(options, target)
    model = take(source).model
    calibration.require_model(models.content_hash(model), measured)
    canonical = driver.canonical_form(target, options, calibration.calibrated)(model).model
    canonical = Equivalences(calibration.rotation, calibration.smoothing).applied(canonical)
    decided = decision.decide(canonical, calibration, target, backend, options)
    if front is None:
        artifact.write_file(output, decided.to_json().encode())
        return Planned(decided)
    pareto.require_choice(canonical, calibration.calibrated)
    found = pareto.sweep(canonical, calibration, target, backend, options, decided)
    with artifact.staged(front) as folder:
        drawn = pareto.write(folder, found, model.graph.name or "model")
        artifact.write_manifest(folder, _origin(model, calibration, options))
        artifact.write_file(output, decided.to_json().encode())
    return Planned(decided, drawn)


def _origin(model: ir.Model, calibration: Calibration, options: Options) -> dict[str, Any]:
    """Return what a manifest says of where the files beside it come from."""
    caveat = "What is expected by the calibration: nothing was run."
    return {
        "qcompile": cache.versions()["qcompile"],
        "target": options.target,
        "model": report.describe(model),
        "data": {"sha256": calibration.data, "evaluated_on": "no samples", "caveat": caveat},
        "options": options.decisive(),
        "versions": cache.versions(),
    }


@one_blas_thread
@within_memory
def apply(source: Source, options: Options, planned: Path, track: Track[Any] = untracked) -> CompileResult:
    """Apply a plan, which may have been edited: quantize, correct biases, lower, verify, write the artifact.

    Parameters
    ----------
    source : path, onnx.ModelProto or onnx_ir.Model
    options : Options
        Without data no bias is corrected, which the report says first.
    planned : Path
        The plan.
    track : callable
        Shows progress over samples.

    Raises
    ------
    QcompileError
        Nothing is written then.
    """
    output = artifact.place(source, options)
    decided = read_plan(planned)
    job = Job.begin(source, options, track)
    canonical = driver.canonicalize(job)
    check_rotations(canonical, decided.rotation, planned)
    canonical = equivalence.apply(job, canonical, Equivalences(decided.rotation, decided.smoothing))
    decided = check_plan(canonical, replace(decided, options=job.options.as_recipe()), job.target, planned)
    quantized = driver.quantize(job, canonical, decided)
    return driver.deliver(job, canonical, quantized, decided, output, Statistics())


def read_plan(path: Path) -> QuantPlan:
    """Read a plan from a file.

    Raises
    ------
    UsageError
        If there is none.
    """
    try:
        return QuantPlan.from_json(path.read_text(encoding="utf-8"), path)
    except OSError as error:
        raise UsageError(path, f"cannot be read ({error.strerror})", "check the path of the plan") from error
    except UnicodeDecodeError as error:
        raise UsageError(path, "is not a quantization plan", "name a plan.json") from error


def settled(
    given: Mapping[str, Any], stored: Mapping[str, Any], place: Path, free: Collection[str] = ()
) -> dict[str, Any]:
    """Join the options that are given with those that an earlier stage was run with, which stand.

    Parameters
    ----------
    given : mapping
        Fields of `Options`, from flags and recipe.
    stored : mapping
        What the file of the earlier stage holds, as a recipe has it.
    place : Path
        That file.
    free : collection of str
        Fields in which the given one counts after all.

    Raises
    ------
    UsageError
        If both have an option and they differ.
    """
    table = stored.get(COSTS_KEY, "")
    if table != Options("any", costs=given.get("costs")).costs_sha256:
        fact = f"was made with {'another' if table else 'no'} cost table"
        raise UsageError(place, fact, "name the same one with --costs in each stage, or make it anew")
    fields = recipe.parse({key: value for key, value in stored.items() if key != COSTS_KEY}, place, Path())
    for name in sorted(set(given) & set(fields) - set(free)):
        if given[name] != fields[name]:
            fact = f"was made with another '{name}' than is asked for now"
            raise UsageError(place, fact, "make it anew with that, or leave it out here")
    return {**given, **fields, **{name: given[name] for name in free if name in given}}
