"""Equivalences before quantization: the model becomes another one that computes the same, and loses less by integers.

Measured and decided here, between `canonicalize` and `calibrate`; applied by `passes/smooth.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice

import numpy as np
import onnx_ir as ir

from qcompile.calib.collect import ChannelSpread, collect, collect_spread
from qcompile.calib.data import Dataset, Sample
from qcompile.calib.observers import Observer
from qcompile.calib.output_error import OutputError, surely_less
from qcompile.calib.sections import at_scores, cuttable, typed
from qcompile.calib.smoothing import (
    Reader,
    Rule,
    Scheme,
    Sides,
    Writer,
    best_rule,
    farthest,
    preferably_whole,
    smoothing_log2,
    without,
)
from qcompile.calib.trials import Trials, quantizations
from qcompile.calib.work import Cost
from qcompile.core.contract import Refusal
from qcompile.core.plan import ChannelFactors, How, Precision
from qcompile.decision import choose_operators, pricer_for
from qcompile.job import Job
from qcompile.passes import structure
from qcompile.passes.allocate_bits import allocate_bits, round_to_codes
from qcompile.passes.patterns import recognise
from qcompile.passes.place import Wish, code_readers
from qcompile.passes.read_plan import is_quantized
from qcompile.passes.scale_classes import FIXED, channel_axis, weight_channels
from qcompile.passes.scale_groups import ScaleGroup, linear_readings, scale_group
from qcompile.passes.set_aside import aside_obstacle
from qcompile.passes.smooth import Smooth, adds_nodes
from qcompile.pipeline import SMOOTHING, WISHES
from qcompile.pricing import Pricer

#: Multiply-accumulates that all trials together may take.
WORK = 1.5e12
#: Samples that a trial runs at most, of each half, and the fewest with which several α for all groups are tried.
SAMPLES, ENOUGH = 32, 3
#: α for all groups at once (SmoothQuant+, Pan et al. 2023), beside each group its own.
GLOBAL = (0.65, 0.8)
#: A Mul more is considered where it makes the noise of the operators behind it this much less, by the estimate.
MUL_GAIN = 2.0
#: Time and noise are weighed as time · noise^0.1: a decibel is worth 2 % of time, next to nothing beyond 30 dB.
NOISE, NEGLIGIBLE = 0.1, 1e-3
#: Noise over signal with which a model of integers alone is of no use: parts of it will go back to float, and which of
#: them decides more than smoothing does.
UNUSABLE = 0.1
#: Ranges by which a trial quantizes, if these are to be chosen from: the one that loses less counts.
OBSERVERS = (Observer.MINMAX, Observer.MSE)

Smoothing = Mapping[str, ChannelFactors]


def smooth(job: Job, canonical: ir.Model) -> tuple[ir.Model, Smoothing]:
    """Divide channels of activations by factors that the weights behind them take back, where less is lost then.

    Returns
    -------
    model : onnx_ir.Model
        The smoothed one.
    smoothing : mapping of str to ChannelFactors
        What was chosen, and why nothing was elsewhere.
    """
    options = job.options
    if options.smoothing == "none" or not job.evidence.calibrated or not all(options.quantized(True)):
        return canonical, {}
    if is_quantized(canonical) or not cuttable(canonical):
        return canonical, {}
    pricer = pricer_for(job, canonical)
    dear = job.pipeline.measure("costs before smoothing", WISHES, pricer.dear) if pricer is not None else {}
    search = _Search(job, canonical, dear, pricer)
    smoothing = job.pipeline.measure("smoothing", SMOOTHING, search.run)
    return apply_smoothing(job, canonical, smoothing), smoothing


def apply_smoothing(job: Job, canonical: ir.Model, smoothing: Smoothing) -> ir.Model:
    """Apply what was chosen; verified like every pass."""
    return job.pipeline.apply(Smooth(smoothing), canonical) if smoothing else canonical


@dataclass(frozen=True)
class _Candidate:
    """Some of the groups, each by its own α (None) or all by the same."""

    kinds: tuple[How, ...]
    alpha: float | None = None


@dataclass(frozen=True, eq=False)
class _Tuned:
    """A group with the operators in integers around it, its own rule (without one, why), and what may be set aside."""

    group: ScaleGroup
    sides: Sides
    rule: Rule | None
    reason: str = ""
    aside: tuple[int, ...] = ()


@dataclass(frozen=True)
class _Outcome:
    """What a candidate comes to: noise at the outputs, and what that costs together with the time it takes."""

    error: OutputError
    cost: float


@dataclass(frozen=True)
class _Search:
    """What `smooth` chooses by."""

    job: Job
    model: ir.Model
    dear: Mapping[str, Wish]
    pricer: Pricer | None

    @cached_property
    def integers(self) -> set[str]:
        """The linear operators in integers."""
        placement = choose_operators(self.model, self.job.target, self.job.options, True, self.dear)
        return {name for name, op in placement.ops.items() if op.precision is Precision.INTEGER}

    @cached_property
    def found(self) -> tuple[tuple[ScaleGroup, ...], dict[str, str]]:
        """The groups around what those operators read, and by value name why there is none."""
        patterns, groups, refused = recognise(self.model.graph), list[ScaleGroup](), dict[str, str]()
        covered: set[ir.Value] = set()
        mul = not self.job.options.no_added_nodes and (self.pricer is not None or self.job.target.costs is not None)
        for value, axis in linear_readings(self.model.graph, self.integers):
            if value in covered:
                continue
            kinds = (How.FOLD, How.RESTORE, How.BRANCH) if mul else (How.FOLD,)
            tried = [scale_group(value, axis, patterns, kind) for kind in kinds[:1]]
            for kind in kinds[1:]:
                if isinstance(tried[-1], Refusal):
                    tried.append(scale_group(value, axis, patterns, kind))
            if isinstance(tried[-1], ScaleGroup):
                groups.append(tried[-1])
                covered |= {reading.value for reading in tried[-1].readings}
            else:
                refused[structure.name_of(value)] = self._why(tried)
        return tuple(groups), refused

    def _why(self, tried: Sequence[ScaleGroup | Refusal]) -> str:
        first, last = tried[0], tried[-1]
        assert isinstance(first, Refusal) and isinstance(last, Refusal)
        if len(tried) > 1:
            return f"its channels stay as they are: {last.reason} ('{last.node}')"
        added = "no node may be added" if self.job.options.no_added_nodes else "what a Mul takes is not known"
        return f"its channels stay as they are: {first.reason} ('{first.node}'), and {added}"

    @property
    def scheme(self) -> Scheme:
        """How the target quantizes."""
        target = self.job.target
        return Scheme(target.activation_dtype, target.weight_dtype, target.per_channel)

    def run(self) -> dict[str, ChannelFactors]:
        """Return what every tensor that linear operators read as codes is divided by, or why by nothing."""
        groups, refused = self.found
        smoothing = {name: ChannelFactors(How.NONE, reason=reason) for name, reason in refused.items()}
        if groups:
            smoothing |= self._choose(groups)
        order = [structure.name_of(value) for value, _ in linear_readings(self.model.graph, self.integers)]
        return {name: smoothing[name] for name in order if name in smoothing}

    def _choose(self, groups: Sequence[ScaleGroup]) -> dict[str, ChannelFactors]:
        """Choose on samples that had no part in it; what is kept is measured on all of them."""
        data = self.job.evidence.calibration
        chosen, tuned = self._try(groups, data)
        spread = self._spread(groups, data)
        tuned = [replace(one, sides=self._sides(one.group, spread)) for one in tuned]
        return self._factors(tuned, chosen, "smoothing did not help enough on samples held out from it")

    def _try(self, groups: Sequence[ScaleGroup], data: Dataset) -> tuple[_Candidate, list[_Tuned]]:
        """Return the candidate that loses least on samples held out from it."""
        first = next(iter(data))
        trials = _Trials(self.job, self.dear, self.pricer)
        kinds = [kind for kind in (How.FOLD, How.RESTORE) if any(group.how is kind for group in groups)]
        steps = [_Candidate(tuple(kinds[:count])) for count in range(len(kinds) + 1)]
        if any(group.how is How.BRANCH for group in groups):
            steps += [_Candidate((*kinds, How.BRANCH)), _Candidate((*kinds, How.BRANCH, How.ASIDE))]
        runs = WORK / Cost.of(self.model, first).total / 3.0
        few = runs / 2.0 / (len(steps) + len(GLOBAL)) < ENOUGH
        count = len(steps) + (0 if few else len(GLOBAL))
        fit, judge = _halves(data, int(np.clip(runs / count / 2.0, 1, SAMPLES)))
        spread = self._spread(groups, fit)
        tuned = [self._tune(group, spread) for group in groups]

        def outcome(candidate: _Candidate) -> _Outcome:
            factors = self._factors(tuned, candidate, "")
            return trials.outcome(Smooth(factors)(self.model.clone()).model, fit, judge, adds_nodes(factors))

        best, least = steps[0], outcome(steps[0])
        for step in (*steps[1:], *(_Candidate((), alpha) for alpha in (() if few else GLOBAL))):
            step = step if step.alpha is None else replace(step, kinds=best.kinds)
            if step.alpha is None or step.kinds:
                found = outcome(step)
                if found.cost < least.cost and surely_less(found.error, least.error):
                    best, least = step, found
        return (best if least.error.total <= UNUSABLE else steps[0]), tuned

    def _spread(self, groups: Sequence[ScaleGroup], data: Dataset) -> Mapping[str, ChannelSpread]:
        axes = {structure.name_of(reading.value): reading.axis for group in groups for reading in group.readings}
        if not self.scheme.per_channel:
            axes |= {structure.name_of(value): axis for group in groups for value, axis in _written_from(group)}
        return collect_spread(self.model, axes, data, self.job.track)

    def _tune(self, group: ScaleGroup, spread: Mapping[str, ChannelSpread]) -> _Tuned:
        """Choose a group's own α, and whether it is worth a node where it takes one."""
        sides = self._sides(group, spread)
        rule = best_rule(sides, self.scheme)
        aside = farthest(sides.readers, self.scheme) if group.how is How.BRANCH and not aside_obstacle(group) else ()
        return replace(self._worth_a_node(group, sides, rule), aside=aside)

    def _worth_a_node(self, group: ScaleGroup, sides: Sides, rule: Rule | None) -> _Tuned:
        if rule is None:
            return _Tuned(group, sides, None, "its channels are even enough: no factors lower the noise")
        log2 = smoothing_log2(sides, rule)
        before, after = (self.scheme.loss(sides, each) for each in (np.zeros(log2.size), log2))
        if group.how is not How.FOLD and before < MUL_GAIN * after:
            reason = f"it takes a Mul, which would leave {after / before:.0%} of the noise behind it: too little gain"
            return _Tuned(group, sides, None, reason)
        return _Tuned(group, sides, rule)

    def _factors(self, tuned: Sequence[_Tuned], candidate: _Candidate, why: str) -> dict[str, ChannelFactors]:
        """Return each group's factors if it is one of a candidate's, else why it has none."""
        found = {}
        for one in tuned:
            name = structure.name_of(one.group.root)
            if one.aside and How.ASIDE in candidate.kinds:
                found[name] = _aside(one)
                continue
            if one.rule is None or one.group.how not in candidate.kinds:
                found[name] = ChannelFactors(How.NONE, reason=one.reason or why)
                continue
            log2 = smoothing_log2(one.sides, one.rule if candidate.alpha is None else Rule(candidate.alpha))
            log2 = preferably_whole(one.sides, log2, self.scheme)
            found[name] = ChannelFactors(one.group.how, tuple(map(float, log2[one.group.classes])))
        return found

    def _sides(self, group: ScaleGroup, spread: Mapping[str, ChannelSpread]) -> Sides:
        """Return the group's operators in integers; those that write count where weights have one scale."""
        return Sides(self._readers(group, spread), () if self.scheme.per_channel else self._writers(group, spread))

    def _writers(self, group: ScaleGroup, spread: Mapping[str, ChannelSpread]) -> list[Writer]:
        """Return what writes the group's channels, nothing where that is not linear operators in integers alone."""
        found, written = list[Writer](), set[int]()
        for fold in group.folds:
            node, weight = fold.node, structure.constant(fold.node.inputs[fold.index])
            if fold.exponent > 0 or fold.index != structure.WEIGHT_INPUT or not structure.is_linear(node):
                continue
            channels, name = weight_channels(node), structure.name_of(structure.input_of(node, 0))
            if structure.node_name(node) in self.integers and name in spread:
                assert weight is not None and channels is not None
                found.append(Writer(spread[name].power[channels], fold.classes, weight))
                written |= set(np.unique(fold.classes).tolist())
        return found if written >= set(group.classes.tolist()) - {FIXED} else []

    def _readers(self, group: ScaleGroup, spread: Mapping[str, ChannelSpread]) -> list[Reader]:
        """Return the operators in integers that read the group's channels."""
        found = []
        for reading in group.readings:
            name, channels = structure.name_of(reading.value), weight_channels(reading.node)
            weight = structure.constant(reading.node.inputs[structure.WEIGHT_INPUT])
            if structure.node_name(reading.node) in self.integers and name in spread:
                assert weight is not None and channels is not None
                axis = structure.weight_axis(reading.node)
                found.append(Reader(spread[name], reading.classes, weight, axis, channels))
        return found


@dataclass(frozen=True)
class _Trials:
    """Runs of smoothed models with everything quantized."""

    job: Job
    dear: Mapping[str, Wish]
    pricer: Pricer | None

    def outcome(self, model: ir.Model, fit: Dataset, judge: Sequence[Sample], added: bool) -> _Outcome:
        """Quantize a model by the ranges of some samples and run it on others.

        Parameters
        ----------
        model : onnx_ir.Model
        fit : Dataset
        judge : sequence of Sample
        added : bool
            Whether it has more nodes than the canonical one; otherwise it takes the same time.
        """
        target, options, track = self.job.target, self.job.options, self.job.track
        placement = choose_operators(model, target, options, True, self.dear)
        among = [observer for observer in OBSERVERS if observer in options.observers] or options.observers[:1]
        statistics = collect(model, placement.activations, fit, track)
        first = dict.fromkeys(placement.activations, among[0])
        rounded = round_to_codes(model, allocate_bits(model, placement, statistics, target, first))
        readers, names = code_readers(model, placement), list(placement.activations)
        trials = Trials(
            typed(at_scores(model), judge[0]), typed(at_scores(rounded), judge[0]), names, target.activation_dtype,
            readers, judge[0],
        )  # fmt: skip
        ranges = {name: quantizations(seen, among, target.activation_dtype)
                  for name, seen in statistics.histograms.items()}  # fmt: skip
        choices = {observer.value: {name: found[observer] for name, found in ranges.items()} for observer in among}
        errors = trials.together(judge, choices, 1, track, options.threads)
        error = min(errors.values(), key=lambda one: one.value)
        return _Outcome(error, self._slower(model, added) * (error.total + NEGLIGIBLE) ** NOISE)

    def _slower(self, model: ir.Model, added: bool) -> float:
        """Return how much longer a run takes with added nodes, over the time without."""
        other = pricer_for(self.job, model) if added else None
        if self.pricer is None or other is None:
            return 1.0
        return other.latency(other.placed(self.dear)) / self.pricer.latency(self.pricer.placed(self.dear))


def _written_from(group: ScaleGroup) -> Iterator[tuple[ir.Value, int]]:
    """Yield what the linear operators that write a group read, with the axis of its channels."""
    for node in {fold.node for fold in group.folds if fold.exponent < 0 and structure.is_linear(fold.node)}:
        value = structure.input_of(node, 0)
        if (axis := channel_axis(node, value)) is not None:
            yield value, axis


def _aside(one: _Tuned) -> ChannelFactors:
    """Set the channels aside that were chosen; the bounds are those of the others."""
    rest = without(one.sides.readers[0], one.aside).spread
    low, high = (float(np.float32(bound)) for bound in (rest.low.min(), rest.high.max()))
    return ChannelFactors(How.ASIDE, channels=one.aside, low=low, high=high)


def _halves(data: Dataset, most: int) -> tuple[Dataset, list[Sample]]:
    """Return samples to measure on, and others to judge by, at most so many; a single sample serves as both."""
    if len(data) == 1:
        return data, list(data)
    fit = Dataset(data.place, lambda: islice(iter(data), 0, 2 * most, 2), data.specs)
    return fit, list(islice(iter(data), 1, 2 * most, 2))
