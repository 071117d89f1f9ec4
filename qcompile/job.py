"""One compile: the model, the target, and everything that the stages share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, Self, TypeVar

import onnx
import onnx_ir as ir
from threadpoolctl import threadpool_limits

from qcompile import cache, memory
from qcompile.backends.base import Backend, find_target
from qcompile.calib.workers import Workers
from qcompile.core import model as models
from qcompile.core import runtime
from qcompile.core.contract import Rewritten, Track
from qcompile.core.errors import UsageError
from qcompile.core.lengths import Lengths
from qcompile.core.target import Target
from qcompile.evidence import Evidence, gather
from qcompile.options import NO_COSTS, Options
from qcompile.passes.lower_opset import LowerOpset
from qcompile.pipeline import Pipeline

#: Bits of activations beyond what targets work in by themselves.
WIDE = "16"
#: Every form that a caller may have a model in.
Source = str | Path | onnx.ModelProto | ir.Model

P = ParamSpec("P")
R = TypeVar("R")


def one_blas_thread(stage: Callable[P, R]) -> Callable[P, R]:
    """Let NumPy and SciPy multiply in the thread that asks for it, while a stage runs.

    Sums have one order then, whatever the number of cores; and matrices here are so small that a library's threads
    wait for one another longer than they compute. What is independent runs in threads of ours.
    """

    @wraps(stage)
    def alone(*given: P.args, **named: P.kwargs) -> R:
        with threadpool_limits(1, user_api="blas"):
            return stage(*given, **named)

    return alone


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

    @property
    def device(self) -> Target:
        """The target with the memory that the options give it."""
        return with_limits(self.target, self.options)

    def device_at(self, lengths: Lengths | None) -> Target:
        """Return the same, knowing how inputs are padded to lengths."""
        if lengths is None:
            return self.device
        return replace(self.device, settings={**self.device.settings, "lengths": lengths})

    @property
    def workers(self) -> Workers:
        """What runs trials."""
        return Workers(self.options.threads, self.options.workers, cache.identity)

    @classmethod
    def begin(cls, source: Source, options: Options, track: Track[Any]) -> Self:
        """Load what the options name."""
        target, backend = chosen_target(options)
        options = fitting(options, target)
        backend.check(with_limits(target, options))
        taken = take(source)
        options = replace(options, threads=memory.threads(options, taken.model))
        evidence = gather(taken.model, options, codes=bool(target.activation_dtype))
        pipeline = Pipeline.start(taken.model, evidence, target, options)
        if taken.modified:
            pipeline.record(LowerOpset, taken)
        return cls(taken.model, target, backend, options, evidence, pipeline, track)


def chosen_target(options: Options) -> tuple[Target, Backend]:
    """Return the target that is asked for, with the cost table that is asked for, and its backend.

    Raises
    ------
    TargetError, UsageError
        If there is none, or it cannot work with such activations, or with these beside such weights.
    """
    target, backend = find_target(options.target)
    if options.activations == WIDE:
        target = target.in_wide_activations()
        if options.weights in ("4", "mixed"):
            fact = "is for weights that no kernel multiplies 16-bit activations by"
            raise UsageError(f"--weights {options.weights}", fact, f"leave it out, or --activations {WIDE}")
    if options.costs == NO_COSTS:
        return replace(target, costs=None), backend
    table = options.cost_table
    return (target if table is None else target.with_costs(table)), backend


def fitting(options: Options, target: Target) -> Options:
    """Return the options as a target has them: where it has no codes of activations, these stay in float."""
    return options if target.activation_dtype else replace(options, activations="none")


def with_limits(target: Target, options: Options) -> Target:
    """Return a target whose settings hold what the options say of the device's memory, and of lengths."""
    asked = {"lengths": options.lengths, "allow_ort_segments": options.allow_ort_segments}
    given = {key: value for key, value in asked.items() if value}
    return replace(target, settings={**target.settings, **options.limits, **given})


def take(source: Source) -> Rewritten:
    """Return the model; one newer than the runtime is lowered first, or there would be nothing to hold it against."""
    model = models.take(source)
    opset, ir_version, name = runtime.newest_versions()
    came, result = models.opset(model), LowerOpset(opset, ir_version, name)(model)
    note = f"The model's opset {came} is newer than {name}'s {opset}: it is lowered to that before all."
    return Rewritten(result.model, result.modified, notes=(note,) if came > opset else ())
