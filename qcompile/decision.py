"""Measure, then decide: from a canonical model to its calibration, and from that to the plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType

import onnx_ir as ir

from qcompile import bit_losses, map_widths, verify
from qcompile.allocation import Widths, choose_widths
from qcompile.backends.base import Backend
from qcompile.calib.collect import Statistics, collect
from qcompile.calib.map_losses import Clip
from qcompile.calib.moments import Moments, known_moments
from qcompile.calib.observers import Observer
from qcompile.calib.sections import cuttable
from qcompile.calib.sensitivity import Choice, choose_observers
from qcompile.calib.synthetic import carried_over, derivable, propagate
from qcompile.calib.weighing import weights_alone
from qcompile.calibration import Calibration
from qcompile.core import model as models
from qcompile.core import numerics
from qcompile.core.contract import Effect
from qcompile.core.errors import ModelError, UsageError, VerificationError
from qcompile.core.plan import OpPlan, Precision, QuantPlan
from qcompile.core.target import OpKind, Target
from qcompile.evidence import SYNTHETIC
from qcompile.job import Job, with_limits
from qcompile.latency_budget import noisiest, quietest
from qcompile.options import EXPECTED_SQNR, Options
from qcompile.override import wishes
from qcompile.passes.allocate_bits import allocate_bits, round_to_codes
from qcompile.passes.insert_qdq import InsertQdq
from qcompile.passes.place import Placement, Wish, code_readers, place, sparing
from qcompile.passes.read_plan import is_quantized
from qcompile.passes.share_scales import unlike_ranges
from qcompile.pipeline import CHOICE, MAP_LOSSES, NOISE, STATISTICS, WISHES
from qcompile.planned_ranges import require_ranges
from qcompile.pricing import Pricer
from qcompile.rotation import ROTATES
from qcompile.weight_losses import Planned

#: What remains may spoil the outputs as well; so often it is looked at again.
ATTEMPTS = 3
#: Why an operator keeps its float activations without data.
UNTOLD = "no data, and neither BatchNormalization nor a run's own values tell the ranges that it needs"


def calibrate(job: Job, canonical: ir.Model, kept: Mapping[str, Wish]) -> Calibration:
    """Measure: a histogram of each activation that gets a scale, and which observer serves it.

    What alone would ruin the outputs is spared, and what is left is measured as it will be then. Without data, what
    BatchNormalization tells stands in for them.

    Parameters
    ----------
    job : Job
    canonical : onnx_ir.Model
    kept : mapping of str to Wish
        What stays in float whatever comes of it.
    """
    bit_losses.require_choice(job, canonical)
    calibration = _ranged(job, canonical, kept)
    planned = planner(canonical, calibration, job.target, job.options)
    return _with_map_losses(job, canonical, bit_losses.measured(job, canonical, calibration, planned))


def _ranged(job: Job, canonical: ir.Model, kept: Mapping[str, Wish]) -> Calibration:
    """Measure all but what bits are chosen by."""
    text = job.options.max_latency
    if text is not None:
        _require_time(job, canonical)
    if not job.evidence.calibrated:
        _require_samples(job)
        return _guess(job, canonical)
    pricer = pricer_for(job, canonical, kept)
    dear = job.pipeline.measure("costs", WISHES, pricer.dear) if pricer is not None else {}
    dear |= kept
    if pricer is not None:
        weights = _weights_noise(job, canonical, pricer, kept)
        dear |= pricer.spoilt(dear, weights)
    best = _measure(job, canonical, pricer, dear, "")
    if pricer is not None:
        if text is not None:
            best = _within_latency(job, canonical, pricer, weights, best, text)
        else:
            best = _spare(job, canonical, pricer, weights, best)
    elif job.target.device:
        best = _spare_noisiest(job, canonical, best)
    return _calibration(job, best.statistics, best.choice, best.spared, calibrated=True)


def _with_map_losses(job: Job, canonical: ir.Model, calibration: Calibration) -> Calibration:
    """Measure what activations lose in four bits, where the device's memory has no room for eight."""
    if is_quantized(canonical) or not job.evidence.calibrated or not map_widths.bounded(job.device):
        return calibration
    narrowing = partial(_planned, canonical, calibration, job.target, job.options, {})
    quantized = InsertQdq(narrowing({}))(canonical.clone()).model
    tied = map_widths.ties(choose_operators(canonical, job.target, job.options, True, calibration.spared))
    names = job.backend.narrowable(quantized, job.device, tied)
    if not names:
        return calibration
    losses = job.pipeline.measure(
        "maps", MAP_LOSSES, lambda: map_widths.measure(job, canonical, names, tied, narrowing)
    )
    return replace(calibration, maps=losses)


def _require_time(job: Job, canonical: ir.Model) -> None:
    """Refuse a budget of time where nothing can be chosen by it."""
    if is_quantized(canonical):
        fact, remedy = "has nothing to choose: the model came in quantized", "give the float model, or leave it out"
    elif not job.evidence.calibrated:
        fact, remedy = "has nothing to go by: without data nothing tells which codes add noise", "give --data"
    elif pricer_for(job, canonical) is None:
        fact = "nothing tells what integers take: the target has no cost table, or activations are to stay in float"
        remedy = "leave it out, or give --costs"
    else:
        return
    raise UsageError(f"--max-latency {job.options.max_latency}", fact, remedy)


def _require_samples(job: Job) -> None:
    """Refuse to make samples of none."""
    if (count := job.options.enlarge) is not None:
        raise UsageError(f"--enlarge {count}", "has nothing to make samples of", "give --data, or leave it out")


@dataclass(frozen=True)
class _Measured:
    """What was measured, and what was spared meanwhile."""

    spared: Mapping[str, Wish]
    statistics: Statistics
    choice: Choice

    def worth(self, pricer: Pricer) -> float:
        return pricer.worth(self.spared, self.choice)


def _spare(job: Job, canonical: ir.Model, pricer: Pricer, weights: Mapping[str, float], best: _Measured) -> _Measured:
    """Spare what makes noise that is not paid for by time, as long as that pays in what is measured then."""
    for attempt in range(2, ATTEMPTS + 1):
        worst = partial(pricer.spoiling, best.choice, best.spared, weights)
        spoiling = job.pipeline.measure(f"spoilers {attempt}", WISHES, worst)
        if not spoiling:
            break
        # Where an operator goes back to float, its neighbours get codes elsewhere: these have to be measured.
        other = _measure(job, canonical, pricer, {**best.spared, **spoiling}, f" {attempt}")
        if other.worth(pricer) >= best.worth(pricer):
            break
        best = other
    return best


def _spare_noisiest(job: Job, canonical: ir.Model, best: _Measured) -> _Measured:
    """Spare what makes most noise where nothing tells what integers are worth, until the outputs are usable."""
    bound = 10.0 ** (-EXPECTED_SQNR / 10.0)
    for attempt in range(2, ATTEMPTS + 1):
        names = noisiest(best.choice.alone, best.choice.noise, bound)
        if not names:
            break
        fact = f"its codes leave {numerics.decibel(1.0, best.choice.noise):.1f} dB of the outputs, with others"
        placement = choose_operators(canonical, job.target, job.options, True, best.spared)
        wishes = sparing(canonical, placement, dict.fromkeys(names, fact))
        other = _measure(job, canonical, None, {**best.spared, **wishes}, f" {attempt}")
        if other.choice.noise >= best.choice.noise:
            break
        best = other
    return best


def _within_latency(
    job: Job, canonical: ir.Model, pricer: Pricer, weights: Mapping[str, float], best: _Measured, text: str
) -> _Measured:
    """Spare what makes most noise for its time, as long as that stays within the budget."""
    wishes = quietest(pricer, job.model, best.choice, best.spared, weights, text)
    return _measure(job, canonical, pricer, {**best.spared, **wishes}, f" {text}") if wishes else best


def _weights_noise(job: Job, canonical: ir.Model, pricer: Pricer, kept: Mapping[str, Wish]) -> dict[str, float]:
    """Measure what the weights of single operators lose at the outputs as codes."""
    placement = choose_operators(canonical, job.target, job.options, False, kept)
    rounded = round_to_codes(canonical, allocate_bits(canonical, placement, Statistics(), job.target, {}))
    data, track = job.evidence.calibration, job.track
    return job.pipeline.measure(
        "weights", NOISE, lambda: weights_alone(canonical, rounded, pricer.weights, data, track, job.workers)
    )


def choose_operators(
    canonical: ir.Model, target: Target, options: Options, calibrated: bool, spared: Mapping[str, Wish]
) -> Placement:
    """Choose what runs as integers, and thereby what must be measured; activations take ranges."""
    # Products that rotate are none of the model's own operators, so no override is meant for them.
    rotating = {node: wish for node, wish in spared.items() if wish.reason == ROTATES}
    asked = {**spared, **wishes(options.overrides, canonical), **rotating}
    return place(canonical, target, *options.quantized(calibrated), asked)


def decide(
    canonical: ir.Model, calibration: Calibration, target: Target, backend: Backend, options: Options
) -> QuantPlan:
    """Turn what was measured into the plan, which says what it was decided with.

    Raises
    ------
    BudgetError
        If a budget cannot be met.
    UsageError
        If the options need a measurement that was not made.
    """
    planned = planner(canonical, calibration, target, options)
    widths = choose_widths(canonical, calibration, planned, backend, options)
    decided = told(planned, widths, calibration, options)
    if decided.tensors and calibration.calibrated:
        require_ranges(canonical, decided, _placed(canonical, calibration, target, options), calibration, target)
    device = with_limits(target, options)
    measured = calibration.calibrated and not calibration.guessed and decided.tensors
    if not (map_widths.bounded(device) and measured):
        return decided
    narrowing = partial(_planned, canonical, calibration, target, options, widths.bits)
    tied = map_widths.ties(choose_operators(canonical, target, options, True, calibration.spared))
    narrow, said = map_widths.narrowed(canonical, calibration.maps, device, backend, tied, narrowing)
    return replace(decided, tensors=narrowing(narrow).tensors, maps=said) if narrow else decided


def planner(canonical: ir.Model, calibration: Calibration, target: Target, options: Options) -> Planned:
    """Return what plans a model with weights in given bits."""
    return partial(_planned, canonical, calibration, target, options)


def told(planned: Planned, widths: Widths, calibration: Calibration, options: Options) -> QuantPlan:
    """Return the plan with weights in the bits that were chosen, and with what it was decided by."""
    return replace(
        planned(widths.bits),
        guessed=calibration.guessed,
        smoothing=calibration.smoothing,
        rotation=calibration.rotation,
        allocation=widths.as_json() if widths.bits else {},
    )


def _planned(
    canonical: ir.Model,
    calibration: Calibration,
    target: Target,
    options: Options,
    bits: Mapping[str, int],
    narrow: Mapping[str, Clip] = MappingProxyType({}),
) -> QuantPlan:
    """Return the plan with weights in so many bits, and these activations in four."""
    placement = _placed(canonical, calibration, target, options)
    calibration.require(placement.activations)
    observers = calibration.choice.observers
    plan = allocate_bits(canonical, placement, calibration.statistics, target, observers, bits, narrow)
    return replace(plan, options=options.as_recipe())


def _placed(canonical: ir.Model, calibration: Calibration, target: Target, options: Options) -> Placement:
    return choose_operators(canonical, target, options, calibration.calibrated, calibration.spared)


def pricer_for(job: Job, canonical: ir.Model, kept: Mapping[str, Wish] = MappingProxyType({})) -> Pricer | None:
    """Return what prices placements, where the target has prices and there is something to place.

    Some operators may have to stay as they are.
    """
    options, target = job.options, job.target
    if target.costs is None or not all(options.quantized(True)) or is_quantized(canonical):
        return None

    def placed(wishes: Mapping[str, Wish]) -> Placement:
        return choose_operators(canonical, target, options, True, {**wishes, **kept})

    return Pricer(canonical, target, job.backend, job.evidence.samples, placed)


def _measure(job: Job, canonical: ir.Model, pricer: Pricer | None, spared: Mapping[str, Wish], turn: str) -> _Measured:
    data, track, pipeline, dtype = job.evidence.calibration, job.track, job.pipeline, job.target.activation_dtype
    among, workers, fitted = job.options.observers, job.workers, job.evidence.fitted
    symmetric = job.target.symmetric

    def seen(wishes: Mapping[str, Wish], stage: str) -> tuple[Placement, Statistics]:
        placement = choose_operators(canonical, job.target, job.options, True, wishes)
        names = placement.activations
        return placement, pipeline.measure(
            stage + turn, STATISTICS, lambda: collect(canonical, names, fitted(data), track, workers.threads)
        )

    placement, statistics = seen(spared, "statistics")
    if not job.target.integer_only and (unlike := unlike_ranges(canonical, placement, statistics)):
        spared = {**unlike, **spared}
        placement, statistics = seen(spared, "statistics apart")
    # How wide an activation's range is hardly bears on the weights' scales: the first observer serves for these.
    first = dict.fromkeys(placement.activations, among[0])
    rounded = round_to_codes(canonical, allocate_bits(canonical, placement, statistics, job.target, first))
    readers = code_readers(canonical, placement)
    dynamic = dict.fromkeys(placement.dynamic, 0.0) if pricer is None else pricer.dynamic(placement)
    choice = pipeline.measure(
        f"observers{turn}",
        CHOICE,
        lambda: choose_observers(
            canonical, rounded, statistics, readers, among, dtype, data, track, workers, dynamic, fitted, symmetric
        ),
    )
    return _Measured(spared, statistics, choice)


def _guess(job: Job, canonical: ir.Model) -> Calibration:
    """Do without data: ranges of each run's own values, or derived ones; where neither is possible, weights alone.

    What is spared is what no range can be had for.
    """
    options = job.options
    weights_alone = _calibration(job, Statistics(), Choice({}), {}, calibrated=False)
    found = known_moments(job.model) if options.activations != "none" and cuttable(canonical) else {}
    at_run_time = Observer.DYNAMIC in options.observers and any(rule.dynamic for rule in job.target.ops.values())
    if options.activations == "none" or not (found or at_run_time) or is_quantized(canonical):
        return weights_alone
    # Lengths that are open say nothing of what a run takes.
    fixed = all(value.shape is not None and value.shape.is_static() for value in canonical.graph.inputs)
    pricer = pricer_for(job, canonical) if fixed else None
    spared = job.pipeline.measure("costs", WISHES, pricer.dear) if pricer is not None else {}
    placement = hoped = choose_operators(canonical, job.target, options, True, spared)
    try:
        known = carried_over(found, job.model, canonical, job.evidence.samples[0]) if found else {}
        reachable = derivable(canonical, known) if found else frozenset()
        while unknown := [name for name in placement.activations
                          if name not in reachable and not (at_run_time and name in placement.dynamic)]:  # fmt: skip
            wanted = sparing(canonical, placement, dict.fromkeys(unknown, UNTOLD))
            # Behind what moves codes, an operator may have a range of its own if these are floats.
            moving = {node: wish for node, wish in wanted.items() if _moves_codes(placement.ops[node], job.target)}
            wanted = moving if at_run_time and moving else wanted
            if wanted.keys() <= spared.keys():  # somebody asks for integers all the same
                return weights_alone
            spared |= wanted
            placement = choose_operators(canonical, job.target, options, True, spared)
        # Codes here and there cost what codes cost everywhere, and gain nothing.
        few = 2 * _integers(placement) < _integers(hoped) and not at_run_time
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
    options = job.options
    observer = Observer.MINMAX if options.observer == "auto" else Observer(options.observer)
    observers = dict.fromkeys(placement.activations, observer)
    if Observer.DYNAMIC in options.observers:
        observers |= dict.fromkeys(placement.dynamic, Observer.DYNAMIC)
    names = [name for name in placement.activations if observers[name] is not Observer.DYNAMIC]
    # Data to evaluate on have the shapes of those that are missing; one random input has open axes of length 1.
    like = None if job.evidence.source == SYNTHETIC else job.evidence.samples[0]
    statistics = Statistics()
    if names:
        statistics = job.pipeline.measure("synthetic", STATISTICS, lambda: propagate(canonical, known, names, like))
    calibration = _calibration(job, statistics, Choice(observers), spared, calibrated=True)
    trial = InsertQdq(decide(canonical, calibration, job.target, job.backend, options))(canonical.clone()).model
    before, after = (verify.outputs_of(model, job.evidence.samples) for model in (canonical, trial))
    verify.check_equivalence("InsertQdq", Effect.LOSSY, before, after)
    return calibration


def _calibration(
    job: Job, statistics: Statistics, choice: Choice, spared: Mapping[str, Wish], *, calibrated: bool
) -> Calibration:
    return Calibration(
        statistics,
        choice,
        dict(spared),
        model=models.content_hash(job.model),
        data=job.evidence.calibration.digest,
        calibrated=calibrated,
        options=job.options.as_recipe(),
        float_bytes=models.file_bytes(job.model),
    )


def _moves_codes(op: OpPlan, target: Target) -> bool:
    return target.ops[op.op_type].kind is OpKind.PASSTHROUGH


def _integers(placement: Placement) -> int:
    return sum(op.precision is Precision.INTEGER for op in placement.ops.values())
