"""Weights of four bits beside activations in float: channels are divided so that what is rounded loses least (AWQ).

The same groups and the same pass as smoothing has, in what folds alone; only what the factors are for differs
(`calib/weight_scaling.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import onnx_ir as ir

from qcompile.calib.collect import ChannelSpread, Statistics, collect_spread
from qcompile.calib.data import Dataset
from qcompile.calib.drift import losses
from qcompile.calib.output_error import surely_less
from qcompile.calib.rounding import Operator, second_moments
from qcompile.calib.smoothing import Numbers
from qcompile.calib.weight_scaling import ALPHAS, PackedReader, magnitude_log2
from qcompile.core.contract import Refusal
from qcompile.core.plan import ChannelFactors, How, QuantPlan
from qcompile.decision import choose_operators
from qcompile.job import Job
from qcompile.options import Options
from qcompile.outcome import halves
from qcompile.passes import structure
from qcompile.passes.allocate_bits import allocate_bits, round_to_codes
from qcompile.passes.patterns import recognise
from qcompile.passes.scale_classes import weight_channels
from qcompile.passes.scale_groups import Reading, ScaleGroup, linear_readings, scale_group
from qcompile.passes.smooth import Smooth
from qcompile.weight_losses import FOUR, packable

#: Samples of each half that factors are chosen by, and judged on, at most.
SAMPLES = 32
#: By so many dB noise must be less for it, weights to nearest. What rounding them with regard to one another leaves of
#: less is chance: it makes up for most of what channels lose.
LEAST = 0.25
#: Why a group is left alone.
EVEN = "its channels stay as they are: no factors lower the noise of the weights behind it"
USELESS = "its channels stay as they are: factors for the weights behind it did not help on samples held out from them"


def scales_weights(options: Options) -> bool:
    """Tell whether that is what the options ask for."""
    return options.weights == str(FOUR) and options.activations == "none" and options.smoothing == "auto"


@dataclass(frozen=True)
class WeightScaling:
    """What chooses the factors.

    Parameters
    ----------
    job : Job
    model : onnx_ir.Model
        Canonical.
    """

    job: Job
    model: ir.Model

    def chosen(self) -> dict[str, ChannelFactors]:
        """Return what every tensor that operators with weights of four bits read is divided by, or why by nothing."""
        fit, judge = halves(self.job.evidence.calibration, SAMPLES)
        alphas = self._alphas(fit)
        if not any(alphas):
            return self._factors(alphas, fit)
        candidate = Smooth(self._factors(alphas, fit))(self.model.clone()).model
        rounded = [round_to_codes(model, self._plan(model)) for model in (self.model, candidate)]
        held_out = Dataset(fit.place, lambda: iter(judge), fit.specs)
        before, after = losses(self.model, rounded, held_out, self.job.track)
        useful = surely_less(after, before) and after.value * 10.0 ** (LEAST / 10.0) < before.value
        return self._factors(alphas, self.job.evidence.calibration, useful)

    def _plan(self, model: ir.Model) -> QuantPlan:
        """Return the plan with all weights in four bits that can be."""
        placement = choose_operators(model, self.job.target, self.job.options, False, {})

        def planned(bits: Mapping[str, int]) -> QuantPlan:
            return allocate_bits(model, placement, Statistics(), self.job.target, {}, bits)

        return planned(dict.fromkeys(packable(model, planned), FOUR))

    @cached_property
    def operators(self) -> dict[str, Operator]:
        """The linear operators with such weights, by node name."""
        tensors, found = self._plan(self.model).tensors, {}
        for node in self.model.graph:
            if structure.is_linear(node) and node.inputs[structure.WEIGHT_INPUT] is not None:
                quant = tensors.get(structure.name_of(structure.input_of(node, structure.WEIGHT_INPUT)))
                if quant is not None and quant.block_size and weight_channels(node) is not None:
                    found[structure.node_name(node)] = Operator(node, quant)
        return found

    @cached_property
    def found(self) -> tuple[tuple[ScaleGroup, ...], dict[str, str]]:
        """The groups that fold around what those operators read, and by value name why there is none."""
        patterns, groups, refused = recognise(self.model.graph), list[ScaleGroup](), dict[str, str]()
        covered: set[ir.Value] = set()
        for value, axis in linear_readings(self.model.graph, self.operators):
            group = scale_group(value, axis, patterns, How.FOLD) if value not in covered else None
            if isinstance(group, Refusal):
                refused[structure.name_of(value)] = f"its channels stay as they are: {group.reason} ('{group.node}')"
            elif group is not None:
                groups.append(group)
                covered |= {reading.value for reading in group.readings}
        return tuple(groups), refused

    def _alphas(self, data: Dataset) -> list[float]:
        """Return the α of each group that leaves its weights least noise over signal, 0 where none is better."""
        groups, _ = self.found
        spread = self._spread(data)
        tried = [[self._log2(group, spread, alpha) for alpha in ALPHAS] for group in groups]
        noise, places = np.zeros((len(groups), len(ALPHAS))), {
            structure.node_name(reading.node): (at, reading) for at, group in enumerate(groups)
            for reading in group.readings if structure.node_name(reading.node) in self.operators
        }  # fmt: skip
        weighed = [self.operators[name] for name in places]
        for operator, moments in second_moments(self.model, weighed, data, self.job.track):
            at, reading = places[structure.node_name(operator.node)]
            channels = weight_channels(reading.node)
            reader = PackedReader.of(operator, moments, reading.classes[channels])
            noise[at] += [reader.noise(log2) for log2 in tried[at]]
        return [ALPHAS[int(at)] for at in noise.argmin(axis=1)] if groups else []

    def _factors(self, alphas: Sequence[float], data: Dataset, useful: bool = True) -> dict[str, ChannelFactors]:
        """Return the factors of each group, measured on these samples, or why it has none."""
        groups, refused = self.found
        found = {name: ChannelFactors(How.NONE, reason=reason) for name, reason in refused.items()}
        spread = self._spread(data) if useful and any(alphas) else {}
        for group, alpha in zip(groups, alphas, strict=True):
            name = structure.name_of(group.root)
            if alpha == 0.0 or not useful:
                found[name] = ChannelFactors(How.NONE, reason=USELESS if alpha else EVEN)
                continue
            log2 = self._log2(group, spread, alpha)
            by_channel = log2[np.abs(group.classes)] * np.sign(group.classes)
            found[name] = ChannelFactors(group.how, tuple(map(float, by_channel)))
        return found

    def _log2(self, group: ScaleGroup, spread: Mapping[str, ChannelSpread], alpha: float) -> Numbers:
        return magnitude_log2([(spread[structure.name_of(one.value)], one.classes) for one in _read(group)], alpha)

    def _spread(self, data: Dataset) -> dict[str, ChannelSpread]:
        axes = {structure.name_of(one.value): one.axis for group in self.found[0] for one in _read(group)}
        return collect_spread(self.model, axes, data, self.job.track) if axes else {}


def _read(group: ScaleGroup) -> list[Reading]:
    """Return one reading of each tensor that has channels of a group."""
    return list({reading.value: reading for reading in group.readings}.values())
