"""Measure what bits of weights are chosen by: losses, pairs of them, choices that are run, and multiplications."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache, partial

import onnx_ir as ir

from qcompile.allocation import program_of
from qcompile.bops_budget import operations_of
from qcompile.budget import Budget
from qcompile.calib.work import multiply_accumulates
from qcompile.calibration import Calibration
from qcompile.core.errors import UsageError
from qcompile.job import Job
from qcompile.passes.read_plan import is_quantized
from qcompile.pipeline import COUNTS, LOSSES, PAIRS, TRIED, WIDTHS
from qcompile.unasked_bits import above_a_quarter, short_of_flash
from qcompile.weight_losses import (
    Codes,
    Planned,
    find_codes,
    measure_losses,
    measure_pairs,
    packable,
    try_choices,
)


def require_choice(job: Job, canonical: ir.Model) -> None:
    """Refuse pairs where nothing is chosen by them.

    Raises
    ------
    UsageError
    """
    options = job.options
    if not options.pairs:
        return
    if is_quantized(canonical):
        fact, remedy = "has nothing to choose: the model came in quantized", "give the float model, or leave it out"
    elif not job.evidence.calibrated:
        fact, remedy = "needs to measure what weights lose, which takes data", "give --data"
    elif not (options.mixed or options.pareto):
        fact, remedy = "has nothing to choose: all weights have the same bits", "give --max-size or --weights mixed"
    else:
        return
    raise UsageError(f"--pairs {options.pairs}", fact, remedy)


def measured(job: Job, canonical: ir.Model, calibration: Calibration, planned: Planned) -> Calibration:
    """Return a calibration with what bits are chosen by, where they are to be chosen.

    Parameters
    ----------
    job : Job
    canonical : onnx_ir.Model
    calibration : Calibration
    planned : callable
        Returns the plan with weights in given bits.
    """
    options, pipeline = job.options, job.pipeline
    chosen = options.mixed or options.pareto
    if is_quantized(canonical):
        return calibration
    if chosen or options.max_bops is not None:
        count = partial(multiply_accumulates, canonical, job.evidence.samples[0])
        macs = pipeline.measure("multiply-accumulates", COUNTS, count)
        calibration = replace(calibration, macs=macs)
    if options.mixed and options.max_bops is not None:  # refused before the runs rather than after them
        plain = planned({})
        operations_of(canonical, plain, calibration, options, packable(canonical, planned))
    if not job.evidence.calibrated:
        return calibration
    short = short_of_flash(canonical, planned, job.backend, options) is not None
    if not (chosen or short or above_a_quarter(canonical, calibration, planned, job.backend, options)):
        return calibration
    return _with_losses(job, canonical, calibration, planned)


def _with_losses(job: Job, canonical: ir.Model, calibration: Calibration, planned: Planned) -> Calibration:
    """Measure what weights lose in each number of bits, and what the choices do that budgets lead to."""
    options, pipeline = job.options, job.pipeline
    spared = f" {options.max_latency}" if options.max_latency else ""  # which weights have a choice depends on that
    rounded = partial(find_codes, job, canonical, planned)

    @cache
    def codes() -> Codes:
        return pipeline.measure(f"codes by bits{spared}", WIDTHS, rounded)

    losses = pipeline.measure(f"losses{spared}", LOSSES, lambda: measure_losses(job, canonical, planned, codes))
    calibration = replace(calibration, losses=losses)
    if options.pairs:
        near = partial(measure_pairs, job, canonical, planned, codes, losses, options.pairs)
        pairs = pipeline.measure(f"pairs {options.pairs}{spared}", PAIRS, near)
        calibration = replace(calibration, pairs=pairs)
    budgets = (options.max_size, options.max_bops)
    if not options.mixed or budgets == (None, None):
        return calibration
    program, budget = program_of(canonical, calibration, planned, job.backend, options), math.inf
    if options.max_size is not None:
        budget = Budget.parse(options.max_size, "--max-size").of(calibration.float_bytes)
    choices = [one.bits for one in program.proposals(budget)]
    if len(choices) == 1:
        return calibration
    stage = f"choices {options.max_size} {options.max_bops} {options.pairs}{spared}"
    tried = pipeline.measure(stage, TRIED, lambda: try_choices(job, canonical, planned, codes, choices))
    return replace(calibration, tried=tried)
