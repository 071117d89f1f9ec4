"""Which channels of a model can be smoothed, and by which factors each candidate smooths them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompile.calib.collect import ChannelSpread, collect_spread
from qcompile.calib.data import Dataset
from qcompile.calib.smoothing import (
    Numbers,
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
from qcompile.calib.splitting import Pieces, pieces
from qcompile.core.contract import Refusal
from qcompile.core.plan import ChannelFactors, How
from qcompile.equalization import equalized
from qcompile.job import Job
from qcompile.passes import structure
from qcompile.passes.patterns import Activation, recognise
from qcompile.passes.scale_classes import FIXED, channel_axis, lengths, weight_channels
from qcompile.passes.scale_groups import ScaleGroup, linear_readings, scale_group
from qcompile.passes.set_aside import aside_obstacle
from qcompile.passes.shift import Shift
from qcompile.passes.smooth import Smooth
from qcompile.passes.split import Splittable, splittable

Weights = npt.NDArray[Any]

#: A Mul more is considered where it makes the noise of the operators behind it this much less, by the estimate.
MUL_GAIN = 2.0


#: Channels are shifted where their range becomes this much narrower.
NARROWER = 0.95


@dataclass(frozen=True)
class Candidate:
    """Some of the groups, each by its own α (None) or all by the same; or by factors chosen for all together."""

    kinds: tuple[How, ...] = ()
    alpha: float | None = None
    together: bool = False


@dataclass(frozen=True, eq=False)
class Tuned:
    """A group with the operators in integers around it, its own rule (without one, why), and what may be done beside.

    What that is: channels that may be set aside, and those that may be split, with their bound. Where weights have one
    scale, also the logarithms of the factors that are chosen for all groups together, by class.
    """

    group: ScaleGroup
    sides: Sides
    rule: Rule | None
    reason: str = ""
    aside: tuple[int, ...] = ()
    split: Pieces | None = None
    together: Numbers | None = None


@dataclass(frozen=True)
class Smoothable:
    """The groups of a model's channels that can be smoothed.

    Parameters
    ----------
    job : Job
    model : onnx_ir.Model
    integers : frozenset of str
        The linear operators in integers.
    mul : bool
        Whether a Mul may be added, and somebody knows what it takes.
    shifts : mapping of str to tuple of float
        What has been taken off the channels of the model's values, by their names.
    gains : mapping of str to float
        Where weights have one scale: what noise of operators comes to at the features, by name.
    """

    job: Job
    model: ir.Model
    integers: frozenset[str]
    mul: bool
    shifts: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    gains: Mapping[str, float] = field(default_factory=dict)

    @cached_property
    def found(self) -> tuple[tuple[ScaleGroup, ...], dict[str, str]]:
        """The groups around what those operators read, and by value name why there is none."""
        patterns, groups, refused = recognise(self.model.graph), list[ScaleGroup](), dict[str, str]()
        covered: set[ir.Value] = set()
        for value, axis in linear_readings(self.model.graph, self.integers):
            if value in covered:
                continue
            kinds = (How.FOLD, How.RESTORE, How.BRANCH) if self.mul else (How.FOLD,)
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

    @cached_property
    def activations(self) -> dict[ir.Value, Activation]:
        """Those that were recognised, by result."""
        return {activation.result: activation for activation in recognise(self.model.graph).activations}

    @property
    def scheme(self) -> Scheme:
        """How the target quantizes."""
        target = self.job.target
        return Scheme(target.activation_dtype, target.weight_dtype, target.per_channel)

    def candidates(self) -> list[Candidate]:
        """Return nothing smoothed, and one kind of group after the other, each by its own α."""
        groups, _ = self.found
        kinds = [kind for kind in (How.FOLD, How.RESTORE) if any(group.how is kind for group in groups)]
        steps = [Candidate(tuple(kinds[:count])) for count in range(len(kinds) + 1)]
        if How.FOLD in kinds and not self.scheme.per_channel:
            steps.append(Candidate((How.FOLD,), together=True))
        if any(group.how is How.BRANCH for group in groups):
            steps += [Candidate((*kinds, How.BRANCH, *beside)) for beside in ((), (How.SPLIT,), (How.ASIDE,))]
        return steps

    def tuned(self, data: Dataset) -> list[Tuned]:
        """Measure, and choose each group's own α."""
        spread = self._spread(data)
        return self._together([self._tune(group, spread) for group in self.found[0]], spread)

    def chosen(
        self, tuned: Sequence[Tuned], candidate: Candidate, data: Dataset, why: str
    ) -> dict[str, ChannelFactors]:
        """Return what every tensor that linear operators read as codes is divided by, or why by nothing.

        Parameters
        ----------
        tuned : sequence of Tuned
        candidate : Candidate
        data : Dataset
            What the factors are measured on.
        why : str
            Why the groups that are not the candidate's are left alone.
        """
        spread = self._spread(data)
        anew = [replace(one, sides=self._sides(one.group, spread)) for one in tuned]
        anew = self._together(anew, spread) if candidate.together else anew
        found = {name: ChannelFactors(How.NONE, reason=reason) for name, reason in self.found[1].items()}
        found |= self.factors(anew, candidate, why)
        order = [structure.name_of(value) for value, _ in linear_readings(self.model.graph, self.integers)]
        return {name: found[name] for name in order if name in found}

    def factors(self, tuned: Sequence[Tuned], candidate: Candidate, why: str = "") -> dict[str, ChannelFactors]:
        """Return each group's factors if it is one of a candidate's, else why it has none; and all that is shifted."""
        found = {name: ChannelFactors(How.NONE, reason=self.found[1].get(name, why)) for name in self.shifts}
        found |= {structure.name_of(one.group.root): self._factors(one, candidate, why) for one in tuned}
        return {name: replace(factors, shift=self.shifts.get(name, ())) for name, factors in found.items()}

    def _factors(self, one: Tuned, candidate: Candidate, why: str) -> ChannelFactors:
        if one.aside and How.ASIDE in candidate.kinds:
            return _aside(one)
        if one.split is not None and one.split.channels.size and How.SPLIT in candidate.kinds:
            return _split(one.split)
        classes = one.group.classes
        if candidate.together and one.together is not None:
            log2 = one.together
        elif one.rule is None or one.group.how not in candidate.kinds:
            return ChannelFactors(How.NONE, reason=one.reason or why)
        else:
            log2 = smoothing_log2(one.sides, one.rule if candidate.alpha is None else Rule(candidate.alpha))
            log2 = preferably_whole(one.sides, log2, self.scheme)
        return ChannelFactors(one.group.how, tuple(map(float, log2[np.abs(classes)] * np.sign(classes))))

    def _spread(self, data: Dataset) -> Mapping[str, ChannelSpread]:
        readings = [reading for group in self.found[0] for reading in group.readings]
        axes = {structure.name_of(reading.value): reading.axis for reading in readings}
        if not self.scheme.per_channel:
            axes |= {structure.name_of(value): axis for group in self.found[0] for value, axis in _written_from(group)}
        return collect_spread(self.model, axes, data, self.job.track) if axes else {}

    def _tune(self, group: ScaleGroup, spread: Mapping[str, ChannelSpread]) -> Tuned:
        """Choose a group's own α, and whether it is worth a node where it takes one."""
        sides = self._sides(group, spread)
        rule = best_rule(sides, self.scheme)
        tuned = self._worth_a_node(group, sides, rule)
        if group.how is How.BRANCH and not aside_obstacle(group):
            tuned = replace(tuned, aside=farthest(sides.readers, self.scheme))
        if group.how is How.BRANCH and isinstance(splittable(group.root, self.activations), Splittable):
            tuned = replace(tuned, split=pieces(sides.readers, self.scheme))
        return tuned

    def _worth_a_node(self, group: ScaleGroup, sides: Sides, rule: Rule | None) -> Tuned:
        if rule is None:
            return Tuned(group, sides, None, "its channels are even enough: no factors lower the noise")
        log2 = smoothing_log2(sides, rule)
        before, after = (self.scheme.loss(sides, each) for each in (np.zeros(log2.size), log2))
        if group.how is not How.FOLD and before < MUL_GAIN * after:
            reason = f"it takes a Mul, which would leave {after / before:.0%} of the noise behind it: too little gain"
            return Tuned(group, sides, None, reason)
        return Tuned(group, sides, rule)

    def _together(self, tuned: Sequence[Tuned], spread: Mapping[str, ChannelSpread]) -> list[Tuned]:
        """Choose the factors of all groups that fold at once, where weights have one scale."""
        if self.scheme.per_channel:
            return list(tuned)
        folding = [one.group for one in tuned if one.group.how is How.FOLD]
        found = equalized(folding, spread, self.integers, self.gains, self.scheme)
        return [replace(one, together=found.get(one.group)) for one in tuned]

    def _sides(self, group: ScaleGroup, spread: Mapping[str, ChannelSpread]) -> Sides:
        """Return the group's operators in integers; those that write count where weights have one scale."""
        writers = () if self.scheme.per_channel else self._writers(group, spread)
        return Sides(self._readers(group, spread), writers)

    def _writers(self, group: ScaleGroup, spread: Mapping[str, ChannelSpread]) -> list[Writer]:
        """Return what writes the group's channels, nothing where that is not linear operators in integers alone."""
        found, written = list[Writer](), set[int]()
        for fold in group.folds:
            node = fold.node
            if fold.exponent > 0 or fold.index != structure.WEIGHT_INPUT or not structure.is_linear(node):
                continue
            channels, name = weight_channels(node), structure.name_of(structure.input_of(node, 0))
            if structure.node_name(node) in self.integers and name in spread:
                assert channels is not None
                found.append(Writer(spread[name].power[channels], fold.classes, _weight(node)))
                written |= set(np.unique(fold.classes).tolist())
        return found if written >= set(group.classes.tolist()) - {FIXED} else []

    def _readers(self, group: ScaleGroup, spread: Mapping[str, ChannelSpread]) -> list[Reader]:
        """Return the operators in integers that read the group's channels."""
        found = []
        for reading in group.readings:
            name, channels = structure.name_of(reading.value), weight_channels(reading.node)
            if structure.node_name(reading.node) in self.integers and name in spread:
                assert channels is not None
                weight, axis = _weight(reading.node), structure.weight_axis(reading.node)
                found.append(Reader(spread[name], reading.classes, weight, axis, channels))
        return found


def _weight(node: ir.Node) -> Weights:
    """Return a linear operator's weights."""
    weight = structure.constant(node.inputs[structure.WEIGHT_INPUT])
    assert weight is not None
    return weight


def middles(job: Job, model: ir.Model, integers: frozenset[str], data: Dataset) -> dict[str, tuple[float, ...]]:
    """Return the middle of each channel, in four digits, of what those operators read and can be shifted.

    Tensors whose range does not become narrower are left out.
    """
    norms = {norm.result: norm for norm in recognise(model.graph).norms}
    readings = [value for value, axis in linear_readings(model.graph, integers) if axis == -1]
    widths = {value: shape[-1] for value in readings if (shape := lengths(value)) is not None}
    shiftable = [value for value, width in widths.items()
                 if isinstance(width, int) and Shift(value, np.zeros(width), norms).obstacle() is None]  # fmt: skip
    axes = {structure.name_of(value): -1 for value in shiftable}
    found = {}
    for name, spread in (collect_spread(model, axes, data, job.track) if axes else {}).items():
        whole = max(0.0, float(spread.high.max())) - min(0.0, float(spread.low.min()))
        if float((spread.high - spread.low).max()) < NARROWER * whole:
            found[name] = tuple(float(f"{middle:.4g}") for middle in (spread.low + spread.high) / 2.0)
    return found


def shifted(model: ir.Model, shifts: Mapping[str, tuple[float, ...]]) -> ir.Model:
    """Return the model with that taken off its channels."""
    only = {name: ChannelFactors(How.NONE, shift=shift) for name, shift in shifts.items()}
    return Smooth(only)(model.clone()).model if only else model


def _written_from(group: ScaleGroup) -> Iterator[tuple[ir.Value, int]]:
    """Yield what the linear operators that write a group read, with the axis of its channels."""
    for node in dict.fromkeys(
        fold.node for fold in group.folds if fold.exponent < 0 and structure.is_linear(fold.node)
    ):
        value = structure.input_of(node, 0)
        if (axis := channel_axis(node, value)) is not None:
            yield value, axis


def _aside(one: Tuned) -> ChannelFactors:
    """Set the channels aside that were chosen; the bounds are those of the others."""
    rest = without(one.sides.readers[0], one.aside).spread
    low, high = (float(np.float32(bound)) for bound in (min(0.0, rest.low.min()), max(0.0, rest.high.max())))
    return ChannelFactors(How.ASIDE, channels=one.aside, low=low, high=high)


def _split(pieces: Pieces) -> ChannelFactors:
    log2, channels = tuple(map(float, pieces.log2)), tuple(map(int, pieces.channels))
    return ChannelFactors(How.SPLIT, log2, channels=channels, high=pieces.high)
