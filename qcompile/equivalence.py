"""Equivalences before quantization: the model becomes another one that computes the same, and loses less by integers.

Measured and decided here, between `canonicalize` and `calibrate`; applied by `passes/rotate.py`, `passes/smooth.py`,
`passes/split.py` and `passes/rotate_inputs.py`, in this order: scales are those of what is rotated, and none is lost
with γ, while factors in front of a product go into what makes its input.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Self

import numpy as np
import onnx_ir as ir

from qcompile.calib.output_error import surely_less
from qcompile.calib.sections import cuttable, is_language
from qcompile.calib.smoothing import rounded_log2
from qcompile.calib.work import Cost
from qcompile.calibration import Calibration
from qcompile.core.contract import Pass, Refusal
from qcompile.core.plan import ChannelFactors, How, Precision
from qcompile.core.rotation import InputRotation, Rotation, Rotations
from qcompile.decision import choose_operators, pricer_for
from qcompile.equalization import measure_gains
from qcompile.job import Job
from qcompile.outcome import Judge, Outcome, halves
from qcompile.passes.place import Wish
from qcompile.passes.read_plan import is_quantized
from qcompile.passes.rotate import Rotate
from qcompile.passes.rotate_inputs import RotateInputs
from qcompile.passes.smooth import Smooth, adds_nodes
from qcompile.passes.split import Split
from qcompile.pipeline import WISHES, Codec
from qcompile.pricing import Pricer
from qcompile.rotation import RotationPlan, input_operators, kept_in_float, plan_inputs, plan_rotations
from qcompile.smoothing import Candidate, Smoothable, Tuned, middles, shifted
from qcompile.weight_scaling import WeightScaling, scales_weights

#: Multiply-accumulates that all trials of smoothing together may take; rotation has at most eight more. Of a language
#: model they may be so many times more: ranges of few sequences clip what the tokens of others reach.
WORK, LANGUAGE = 1.5e12, 3.0
#: Samples that a trial runs at most, of each half, and the fewest with which several α for all groups are tried.
SAMPLES, ENOUGH = 32, 3
#: α for all groups at once (SmoothQuant+, Pan et al. 2023), beside each group its own.
GLOBAL = (0.65, 0.8)
#: Noise over signal with which a model of integers alone is of no use: parts of it will go back to float, and which of
#: them decides more than smoothing and rotation do.
UNUSABLE = 0.1
#: Nothing is smoothed.
NOTHING = Candidate()
#: What becomes of factors that a model is too sensitive for.
WHOLE = "its factors are whole powers of 2"
#: Why what could be smoothed or rotated is not.
USELESS = "that did not help enough on samples held out from it"


@dataclass(frozen=True)
class Equivalences:
    """What was chosen, and why nothing was elsewhere.

    Parameters
    ----------
    rotation : Rotations
    smoothing : mapping of str to ChannelFactors
    """

    rotation: Rotations = field(default_factory=Rotations)
    smoothing: Mapping[str, ChannelFactors] = field(default_factory=dict)

    @property
    def passes(self) -> list[Pass]:
        """The passes that apply it, in their order."""
        rotation, found = self.rotation, list[Pass]()
        if rotation.folded or rotation.refused:
            found.append(Rotate(rotation.folded, rotation.refused))
        split = {name: chosen for name, chosen in self.smoothing.items() if chosen.how is How.SPLIT}
        if smoothing := {name: chosen for name, chosen in self.smoothing.items() if name not in split}:
            found.append(Smooth(smoothing))
        if split:
            found.append(Split(split))
        return [*found, RotateInputs(rotation.inputs)] if rotation.inputs else found

    def in_whole_powers(self, reason: str) -> Self:
        """Return the same with the nearest whole powers of 2 as factors, and the reason where that is another one.

        They change no digit of a float32 that they multiply, so that nothing is left to round differently.
        """
        found = dict(self.smoothing)
        for name, chosen in self.smoothing.items():
            whole = tuple(map(float, rounded_log2(np.asarray(chosen.log2), 1)))
            if chosen.how is not How.SPLIT and whole != chosen.log2:
                found[name] = replace(chosen, log2=whole, reason=reason)
        return replace(self, smoothing=found)

    def kept(self, model: ir.Model) -> dict[str, Wish]:
        """Return what stays in float in the model that it makes: the products that rotate."""
        return kept_in_float(self.rotation.inputs, model)

    def applied(self, model: ir.Model) -> ir.Model:
        """Apply it to a copy of a model, without verification."""
        model = model.clone()
        for pass_ in self.passes:
            model = pass_(model).model
        return model

    def noted(self, calibration: Calibration) -> Calibration:
        """Note it in what was measured behind it."""
        return replace(calibration, rotation=self.rotation, smoothing=self.smoothing)

    def to_json(self) -> dict[str, Any]:
        """Return it JSON-ready."""
        smoothing = {name: factors.as_json() for name, factors in self.smoothing.items()}
        return {"rotation": self.rotation.to_json(), "smoothing": smoothing}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """Read what `to_json` returned."""
        smoothing = {name: ChannelFactors.from_json(entry) for name, entry in content["smoothing"].items()}
        return cls(Rotations.from_json(content["rotation"]), smoothing)


EQUIVALENCES: Codec[Equivalences] = Codec(
    lambda found: json.dumps(found.to_json()).encode(), lambda content: Equivalences.from_json(json.loads(content))
)


def rewrite(job: Job, canonical: ir.Model) -> tuple[ir.Model, Equivalences]:
    """Rotate and smooth channels of activations, by what the weights around them take back, where less is lost then.

    Returns
    -------
    model : onnx_ir.Model
        The rewritten one.
    chosen : Equivalences
    """
    options = job.options
    if scales_weights(options) and job.evidence.calibrated and not is_quantized(canonical):
        scaling = WeightScaling(job, canonical)
        chosen = job.pipeline.measure(
            "equivalences", EQUIVALENCES, lambda: settled(job, canonical, Equivalences(smoothing=scaling.chosen()))
        )
        return apply(job, canonical, chosen), chosen
    wanted = "auto" in (options.smoothing, options.rotation) and job.evidence.calibrated
    if not wanted or not all(options.quantized(True)) or is_quantized(canonical) or not cuttable(canonical):
        return canonical, Equivalences()
    pricer = pricer_for(job, canonical)
    dear = job.pipeline.measure("costs before equivalences", WISHES, pricer.dear) if pricer is not None else {}
    search = _Search(job, canonical, dear, pricer)
    chosen = job.pipeline.measure("equivalences", EQUIVALENCES, lambda: settled(job, canonical, search.run()))
    return apply(job, canonical, chosen), chosen


def settled(job: Job, canonical: ir.Model, chosen: Equivalences) -> Equivalences:
    """Return what was chosen, in whole powers of 2 where the model magnifies what other factors round.

    A fold is exact but for float32's last digits, which a model may magnify beyond what a pass may do. Whole powers
    tell that from a fault: if these do not stay within the bound either, what was chosen stays, to be stopped.
    """
    passes = chosen.passes
    at = next((index for index, pass_ in enumerate(passes) if isinstance(pass_, Smooth)), None)
    if at is None:
        return chosen
    model = canonical
    for pass_ in passes[:at]:
        model = pass_(model.clone()).model
    fact = job.pipeline.obstacle(passes[at], model)
    if not fact:
        return chosen
    whole = chosen.in_whole_powers(f"{WHOLE}: finer ones {fact}")
    return chosen if job.pipeline.obstacle(whole.passes[at], model) else whole


def apply(job: Job, canonical: ir.Model, chosen: Equivalences) -> ir.Model:
    """Apply what was chosen; each pass is verified."""
    for pass_ in chosen.passes:
        canonical = job.pipeline.apply(pass_, canonical)
    return canonical


@dataclass(frozen=True)
class _Candidate:
    """What is rotated, whether channels are shifted then, what is smoothed, and what is rotated behind that."""

    folded: tuple[Rotation, ...] = ()
    shifted: bool = False
    smoothing: Candidate = NOTHING
    inputs: tuple[InputRotation, ...] = ()


@dataclass(frozen=True, eq=False)
class _Base:
    """A model, rotated or not, with its groups of channels that can be smoothed, tuned on some samples.

    The groups are those of the model with its channels shifted, or not.
    """

    model: ir.Model
    smoothable: Smoothable
    tuned: Sequence[Tuned]


@dataclass(frozen=True)
class _Search:
    """What `rewrite` chooses by."""

    job: Job
    model: ir.Model
    dear: Mapping[str, Wish]
    pricer: Pricer | None
    bases: dict[tuple[tuple[Rotation, ...], bool], _Base] = field(default_factory=dict)

    def run(self) -> Equivalences:
        """Choose on samples that had no part in it; what is kept of smoothing is measured on all of them."""
        planned = self._planned()
        return self._settled(self._best(planned.rotations), planned)

    @cached_property
    def integers(self) -> frozenset[str]:
        """The linear operators in integers."""
        placement = choose_operators(self.model, self.job.target, self.job.options, True, self.dear)
        return frozenset(name for name, op in placement.ops.items() if op.precision is Precision.INTEGER)

    @property
    def priced(self) -> bool:
        """Whether nodes may be added, and somebody knows what they take."""
        return not self.job.options.no_added_nodes and (self.pricer is not None or self.job.target.costs is not None)

    @cached_property
    def steps(self) -> list[Candidate]:
        """What is tried of smoothing: each kind of group more, and where the work allows it all groups by one α."""
        if self.job.options.smoothing == "none":
            return [NOTHING]
        steps = Smoothable(self.job, self.model, self.integers, self.priced).candidates()
        few = self._runs / 2.0 / (len(steps) + len(GLOBAL)) < ENOUGH or len(steps) == 1
        return steps if few else [*steps, *(Candidate(alpha=alpha) for alpha in GLOBAL)]

    @cached_property
    def judge(self) -> Judge:
        """What candidates are judged by, on as many samples as the model's work leaves."""
        most = int(np.clip(self._runs / max(2, len(self.steps)) / 2.0, 1, SAMPLES))
        return Judge(self.job, self.dear, self.pricer, *halves(self.job.evidence.calibration, most))

    @cached_property
    def _runs(self) -> float:
        work = WORK * (LANGUAGE if is_language(self.model) else 1.0)
        return work / Cost.of(self.model, next(iter(self.job.evidence.calibration))).total / 3.0

    @cached_property
    def _gains(self) -> Mapping[str, float]:
        """What noise of operators comes to: it tells where one scale for all weights of an operator does most harm."""
        alike = self.job.target.per_channel
        return {} if alike else measure_gains(self.job, self.model, self.integers, self.judge.fit)

    def _planned(self) -> RotationPlan:
        """Return the rotations that leave the operators behind them less noise, by the estimate."""
        if self.job.options.rotation == "none":
            return RotationPlan((), (), {})
        return plan_rotations(self.model, self.integers, self.judge.fit, self.job.track, steps=0)

    def _operators(self, model: ir.Model) -> list[ir.Node]:
        """Return the operators that a product may be put in front of."""
        wanted = self.job.options.rotation == "auto" and self.priced
        return input_operators(model, self.integers) if wanted else []

    def _best(self, rotations: tuple[Rotation, ...]) -> _Candidate:
        """Return the candidate that costs least on samples held out from it: one thing is added after the other."""
        best = start = _Candidate()
        least: Outcome | None = None  # that of the start takes runs, in vain where there is nothing to consider

        def consider(candidate: _Candidate) -> None:
            nonlocal best, least
            if not self._same(candidate, best) and not self._same(candidate, start):
                least = least or self._outcome(start)
                found = self._outcome(candidate)
                # Factors chosen together take no time, and by more than few outputs tell of: these can only veto them.
                anew = candidate.smoothing.together and not best.smoothing.together
                better = not surely_less(least.error, found.error) if anew else found.beats(least)
                best, least = (candidate, found) if better else (best, least)

        for step in self.steps:
            kinds = step.kinds if step.alpha is None else best.smoothing.kinds
            consider(_Candidate(smoothing=replace(step, kinds=kinds) if kinds else NOTHING))
        if self.job.options.smoothing == "auto":
            consider(replace(best, shifted=True))
        for candidate in (replace(best, folded=rotations), _Candidate(rotations)) if rotations else ():
            consider(candidate)
        for candidate in self._with_products(best):
            if len(candidate.inputs) < len(best.inputs):  # fewer save less
                break
            consider(candidate)
        # What the products spread hid what the residual stream's rotation gains.
        if best.inputs and rotations and not best.folded:
            consider(replace(best, folded=rotations))
        return best if least is None or least.error.total <= UNUSABLE else start

    def _with_products(self, before: _Candidate) -> Iterator[_Candidate]:
        """Yield a candidate with products in front of operators: all that may gain, by each α, then some of them.

        Products spread what factors had to even out, so that another α may be the best with them.
        """
        if not self._operators(self.model):
            return
        model, smoothing = self._built(before)[0], before.smoothing
        planned = plan_inputs(model, self._operators(model), self.judge.fit, self.job.track)
        alphas = {smoothing.alpha: None} | dict.fromkeys(step.alpha for step in self.steps if smoothing.kinds)
        for inputs in planned[:1]:
            yield from (replace(before, smoothing=replace(smoothing, alpha=one), inputs=inputs) for one in alphas)
        yield from (replace(before, inputs=inputs) for inputs in planned[1:])

    def _same(self, one: _Candidate, other: _Candidate) -> bool:
        """Tell whether two candidates make the same model."""
        alike = (one.folded, one.inputs) == (other.folded, other.inputs)
        return alike and self._factors(one) == self._factors(other)

    def _outcome(self, candidate: _Candidate) -> Outcome:
        model, chosen = self._built(candidate)
        # By other factors the same nodes are added.
        ways = tuple((name, one.how, len(one.channels)) for name, one in chosen.smoothing.items())
        adds = adds_nodes(chosen.smoothing) or bool(candidate.inputs)
        added = (candidate.folded, ways, candidate.inputs) if adds else None
        return self.judge.outcome(model, chosen.kept(model), added)

    def _built(self, candidate: _Candidate) -> tuple[ir.Model, Equivalences]:
        """Return the model that a candidate makes, and what that does."""
        behind = Equivalences(Rotations(inputs=candidate.inputs), self._factors(candidate))
        return behind.applied(self._base(candidate).model), behind

    def _factors(self, candidate: _Candidate) -> dict[str, ChannelFactors]:
        base = self._base(candidate)
        return base.smoothable.factors(base.tuned, candidate.smoothing)

    def _base(self, candidate: _Candidate) -> _Base:
        key = candidate.folded, candidate.shifted
        if key not in self.bases:
            model, fit = Equivalences(Rotations(candidate.folded)).applied(self.model), self.judge.fit
            shifts = middles(self.job, model, self.integers, fit) if candidate.shifted else {}
            if candidate.shifted and not shifts:  # it is the model as it was, and is not tuned again
                self.bases[key] = self._base(replace(candidate, shifted=False))
                return self.bases[key]
            auto = self.job.options.smoothing == "auto"
            gains = self._gains if auto else {}
            smoothable = Smoothable(self.job, shifted(model, shifts), self.integers, self.priced, shifts, gains)
            tuned = smoothable.tuned(fit) if auto else []
            self.bases[key] = _Base(model, smoothable, tuned)
        return self.bases[key]

    def _settled(self, best: _Candidate, planned: RotationPlan) -> Equivalences:
        """Return what is done, and why the rest is not."""
        unused = [] if best.folded else [rotation.place.node for rotation in planned.rotations]
        refused = *planned.refusals, *(Refusal(node, f"it is not rotated: {USELESS}") for node in unused)
        rotation = Rotations(best.folded, best.inputs, refused)
        if self.job.options.smoothing == "none":
            return Equivalences(rotation)
        base, data = self._base(best), self.job.evidence.calibration
        why = f"it is not smoothed: {USELESS}"
        return Equivalences(rotation, base.smoothable.chosen(base.tuned, best.smoothing, data, why))
