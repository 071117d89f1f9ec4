"""What a rewritten model comes to once everything in it is quantized: noise at the outputs, and time for it."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice

import onnx_ir as ir

from qcompile.calib.collect import collect
from qcompile.calib.data import Dataset, Sample
from qcompile.calib.observers import Observer
from qcompile.calib.output_error import OutputError, surely_less
from qcompile.calib.sections import at_scores, is_language, typed
from qcompile.calib.trials import Trials, quantizations
from qcompile.core.runtime import Outputs
from qcompile.decision import choose_operators, pricer_for
from qcompile.job import Job
from qcompile.passes.allocate_bits import allocate_bits, round_to_codes
from qcompile.passes.place import Wish, code_readers
from qcompile.pricing import Pricer

#: Time and noise are weighed as time · noise^0.1: a decibel is worth 2 % of time, next to nothing beyond 30 dB.
NOISE, NEGLIGIBLE = 0.1, 1e-3
#: Standard errors by which a language model's noise must be less: blocks of a sequence have a part of it in common.
SURE = 2.0
#: Ranges by which a trial quantizes, if these are to be chosen from: the one that loses less counts.
OBSERVERS = (Observer.MINMAX, Observer.MSE)


@dataclass(frozen=True)
class Outcome:
    """What a candidate comes to: noise at the outputs, and what that costs together with the time it takes.

    Parameters
    ----------
    error : OutputError
    cost : float
    sure : float
        By how many standard errors noise must be less: two where these are of blocks of one sequence.
    """

    error: OutputError
    cost: float
    sure: float = 1.0

    def beats(self, other: Outcome) -> bool:
        """Tell whether it is better: by its cost, and by more noise less than chance explains."""
        return self.cost < other.cost and surely_less(self.error, other.error, self.sure)


@dataclass(frozen=True)
class Judge:
    """Quantizes models by the ranges of some samples and runs them on others.

    Parameters
    ----------
    job : Job
    dear : mapping of str to Wish
        What stays in float because integers do not pay.
    pricer : Pricer, optional
        Of the canonical model.
    fit : Dataset
        What ranges are measured on.
    judge : sequence of Sample
        What is run.
    expected : dict
        What they come to in float, by the names of the outputs: candidates differ by rounding alone.
    ratios : dict
        How much longer candidates take, by what they add.
    """

    job: Job
    dear: Mapping[str, Wish]
    pricer: Pricer | None
    fit: Dataset
    judge: Sequence[Sample]
    expected: dict[tuple[str | None, ...], list[Outputs]] = field(default_factory=dict)
    ratios: dict[Hashable, float] = field(default_factory=dict)

    def outcome(self, model: ir.Model, kept: Mapping[str, Wish], added: Hashable) -> Outcome:
        """Quantize a model and run it.

        Parameters
        ----------
        model : onnx_ir.Model
        kept : mapping of str to Wish
            What more stays in float.
        added : hashable
            What tells its nodes from those of other candidates; None if it has those of the canonical model, and takes
            the same time.
        """
        target, options, track, judge = self.job.target, self.job.options, self.job.track, self.judge
        placement = choose_operators(model, target, options, True, {**self.dear, **kept})
        among = [observer for observer in OBSERVERS if observer in options.observers] or options.observers[:1]
        statistics = collect(model, placement.activations, self.fit, track, options.threads)
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
        outputs = tuple(value.name for value in trials.model.graph.outputs)
        if outputs not in self.expected:
            self.expected[outputs] = trials.expected(judge)
        errors = trials.together(judge, choices, 1, track, options.threads, self.expected[outputs])
        error = min(errors.values(), key=lambda one: one.value)
        cost = self._slower(model, kept, added) * (error.total + NEGLIGIBLE) ** NOISE
        return Outcome(error, cost, SURE if is_language(model) else 1.0)

    def _slower(self, model: ir.Model, kept: Mapping[str, Wish], added: Hashable) -> float:
        """Return how much longer a run takes with added nodes, over the time without."""
        other = pricer_for(self.job, model, kept) if added is not None and added not in self.ratios else None
        if self.pricer is not None and other is not None:
            self.ratios[added] = other.latency(other.placed(self.dear)) / self._latency
        return self.ratios.get(added, 1.0)

    @cached_property
    def _latency(self) -> float:
        assert self.pricer is not None
        return self.pricer.latency(self.pricer.placed(self.dear))


def halves(data: Dataset, most: int) -> tuple[Dataset, list[Sample]]:
    """Return samples to measure on, and others to judge by, at most so many; a single sample serves as both."""
    if len(data) == 1:
        return data, list(data)
    fit = Dataset(data.place, lambda: islice(iter(data), 0, 2 * most, 2), data.specs)
    return fit, list(islice(iter(data), 1, 2 * most, 2))
