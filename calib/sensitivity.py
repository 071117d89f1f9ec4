"""Sensitivity: what quantizing tensors does to the model's outputs, and which observers do the least.

The squared error of a tensor, which `Observer.MSE` minimizes, says little about the outputs: a clipped outlier may be
what a decision hangs on. Forward runs tell, and need neither labels nor gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import Any, Self

import numpy as np
import onnx_ir as ir

from qcompile.calib.collect import Statistics, collect
from qcompile.calib.data import Dataset, Sample
from qcompile.calib.descent import Tried, descend
from qcompile.calib.observers import Observer
from qcompile.calib.output_error import OutputError, surely_less
from qcompile.calib.sections import at_scores, cuttable, typed
from qcompile.calib.trials import Parameters, Part, Quantizations, Trials, quantizations
from qcompile.calib.workers import Workers
from qcompile.core.contract import Track

Alone = Mapping[str, Mapping[Observer, OutputError]]

#: Samples that stand for all where nothing is chosen by them, at most; samples of each half that choices are tried on,
#: and those that ranges are measured on.
SAMPLES, TRIED, MEASURED = 64, 128, 256
#: Runs of a half, at most, with each choice: few samples are run up to four times, to average the chance of their
#: roundings, where that takes a quarter of the work that trying may take. Four halve it; what is left after that is
#: mostly the difference between samples.
RUNS, REPEATS = 256, 4
#: Multiply-accumulates that trying the tensors one by one may take, and comparing whole choices after that. A thread
#: does 2e10 to 6e10 in a second.
ALONE, TOGETHER = 5e11, 6e11
#: A choice gives way to another that is better by more standard errors than this.
SURE = 2.0
#: With fewer samples than this, tensors are not tried one by one.
FEWEST = 8
#: Bytes of arrays that are held over all samples; where they would be more, there are fewer samples.
MEMORY = 512 << 20


@dataclass(frozen=True)
class Choice:
    """The observers that were chosen, and what led to them.

    Parameters
    ----------
    observers : mapping of str to Observer
        By value name, in the order of the statistics.
    alone : mapping of str to float
        Noise over signal at the outputs when only that tensor is quantized, by its best observer. Empty where tensors
        were not tried one by one.
    together : mapping of str to float
        Noise over signal at the outputs with all tensors quantized, on samples that the ranges were not measured on: by
        an observer's name, which then serves all tensors, and `OWN` or `DYNAMIC`.
    noise : float
        Noise over signal at the outputs with all tensors quantized as chosen, as a ratio of sums over samples, which is
        what the report's SQNR is. `alone` is one too.
    """

    observers: Mapping[str, Observer]
    alone: Mapping[str, float] = field(default_factory=dict)
    together: Mapping[str, float] = field(default_factory=dict)
    noise: float = 0.0

    @property
    def dynamic(self) -> frozenset[str]:
        """The tensors whose range is to be taken when the model runs, where it can be."""
        return frozenset(name for name, observer in self.observers.items() if observer is Observer.DYNAMIC)

    @classmethod
    def from_json(cls, entries: Mapping[str, Any]) -> Self:
        """Read what `dataclasses.asdict` made of one, after a way through JSON."""
        observers = {name: Observer(o) for name, o in entries["observers"].items()}
        return cls(observers, dict(entries["alone"]), dict(entries["together"]), float(entries["noise"]))


#: The choices that give each tensor an observer of its own where the outputs gain by it: among those that measure a
#: range, which is the choice that others must be surely better than, and among all.
OWN, DYNAMIC = "each its own", "each its own, or dynamic"


def choose_observers(
    model: ir.Model,
    rounded: ir.Model,
    statistics: Statistics,
    readers: Mapping[str, Collection[str]],
    among: Sequence[Observer],
    dtype: str,
    data: Dataset,
    track: Track[Any],
    workers: Workers,
    dynamic: Mapping[str, float] = MappingProxyType({}),
    fitted: Callable[[Dataset], Dataset] = lambda data: data,
    symmetric: bool = False,
) -> Choice:
    """Choose for each measured tensor the observer whose range moves the model's outputs least.

    Each observer for all tensors, and each tensor its own, are held against one another with everything quantized,
    always on samples that had no part in the choice: the ranges of every second sample are judged on the others, and
    the other way round (twofold cross-validation; Stone 1974). On the samples that a range was measured on, minmax
    never clips, and a moving average may happen to lie between two outliers.

    What each observer of a tensor does is found with that tensor alone quantized: the part of the graph before it runs
    once per sample, the part behind it once per sample and distinct range. From the last observer for all tensors,
    `descend` then changes one after another where the outputs gain by it.

    Memory holds the samples, the float outputs and one sample's values per thread. The number of samples follows from
    the model's work, so that the time is bounded whatever its size.

    Parameters
    ----------
    model : onnx_ir.Model
        The float model that `statistics` were collected from, topologically sorted.
    rounded : onnx_ir.Model
        The same graph with the values that its weights will have.
    statistics : Statistics
    readers : mapping of str to collection of str
        By value name, the nodes that read its codes. A value that is not listed is quantized for all its readers (and
        for the caller, where it is an output of the model).
    among : sequence of Observer
        To choose from. Of a single one the tensors are tried all the same, for what each does alone.
    dtype : str
        Integer type of the codes.
    data : Dataset
        At most `SAMPLES` of each half are run, spread evenly.
    track : callable
        Shows progress.
    workers : Workers
        What runs trials; the result does not depend on it. Whole choices are run by the threads of this process.
    dynamic : mapping of str to float
        The values whose range may be taken when the model runs, and by how much that must lessen the noise over signal.
        It is a choice for single tensors: others pay for it what it does not gain.
    fitted : callable
        Adds to samples what is to be measured with them.
    symmetric : bool
        Codes are around zero.
    """
    candidates = {name: quantizations(seen, among, dtype, name in dynamic, symmetric)
                  for name, seen in statistics.histograms.items()}  # fmt: skip
    if not candidates or not cuttable(model):
        return Choice(dict.fromkeys(candidates, among[-1]))
    first = next(iter(data))
    trials = Trials(
        typed(at_scores(model), first),
        typed(at_scores(rounded), first),
        list(candidates),
        dtype,
        readers,
        first,
        dynamic,
        symmetric,
    )
    search = _Search(trials, candidates, data, among, track, workers, fitted)
    if len(among) == 1:
        alone_by_it = _spoilt(search.alone_by(among[0]))
        together = {among[0].value: 0.0}  # it is compared with nothing: what the tensors do alone is all that is known
        return Choice(dict.fromkeys(candidates, among[0]), alone_by_it, together, sum(alone_by_it.values()))
    halves = search.halves(model)
    tried: list[Tried] = []
    if trials.work_alone(candidates) * FEWEST <= ALONE:
        tried = search.tried(halves)
    own = partial(_own, start=among[-1], dynamic=dynamic)
    errors = search.compare(halves, [own(part) for part in tried])
    best = _decide(errors)
    together = {name: error.value for name, error in errors.items()}
    both = sum(tried[1:], tried[0]) if tried else None
    alone = both.alone if both else search.alone_by(Observer(best))
    observers = own(both).get(best) if both else None
    return Choice(observers or dict.fromkeys(candidates, Observer(best)), _spoilt(alone), together, errors[best].total)


@dataclass(frozen=True)
class _Half:
    """Some samples, what each observer makes of them, and the samples that this is judged on."""

    measured: Sequence[int]
    held_out: Sequence[int]
    candidates: Mapping[str, Quantizations]


@dataclass(frozen=True)
class _Search:
    """What the steps of `choose_observers` share; see there."""

    trials: Trials
    candidates: Mapping[str, Quantizations]
    data: Dataset
    among: Sequence[Observer]
    track: Track[Any]
    workers: Workers
    fitted: Callable[[Dataset], Dataset]

    def halves(self, model: ir.Model) -> list[_Half]:
        """Measure the ranges of each half of the samples; a single sample is judged by itself."""
        count = len(self.data)
        if count == 1:
            return [_Half([0], [0], self.candidates)]
        found = []
        for measured, held_out in ((even := range(0, count, 2), odd := range(1, count, 2)), (odd, even)):
            chosen = _evenly(measured, min(MEASURED, TOGETHER / self.trials.work / 2))
            part, trials = self.fitted(_subset(self.data, chosen)), self.trials
            seen = collect(model, list(self.candidates), part, self.track, self.workers.threads)
            ranges = {name: quantizations(histogram, self.among, trials.dtype, name in trials.dynamic, trials.symmetric)
                      for name, histogram in seen.histograms.items()}  # fmt: skip
            found.append(_Half(measured, held_out, ranges))
        return found

    def tried(self, halves: Sequence[_Half]) -> list[Tried]:
        """Try the tensors of each half one by one, and its weights."""
        parts = self._parts([(half.candidates, half.measured) for half in halves])
        alone = self.trials.alone(parts, self.track, self.workers)
        return [Tried(errors, self.trials.weights(part.samples)) for errors, part in zip(alone, parts, strict=True)]

    def alone_by(self, observer: Observer) -> Alone:
        """Try what one observer makes of each tensor, unless that is too much work."""
        candidates = {name: {observer: found[observer]} for name, found in self.candidates.items()}
        if self.trials.work_alone(candidates) > ALONE:
            return {}
        parts = self._parts([(candidates, range(len(self.data)))])
        return self.trials.alone(parts, self.track, self.workers)[0]

    def _parts(self, parts: Sequence[tuple[Mapping[str, Quantizations], Sequence[int]]]) -> list[Part]:
        """Return the samples of each part that its candidates can be tried on within `ALONE`."""
        found = []
        for candidates, among in parts:
            runs = ALONE / self.trials.work_alone(candidates) / len(parts)
            samples = spread(self.data, self.trials.sample_bytes * len(parts), min(TRIED, runs), among)
            found.append(Part(candidates, samples, _repeats(samples, runs)))
        return found

    def compare(
        self, halves: Sequence[_Half], own: Sequence[Mapping[str, Mapping[str, Observer]]]
    ) -> dict[str, OutputError]:
        """Return the error of each observer for all tensors, and of each half's own, on what is held out."""
        found: dict[str, OutputError] = {}
        for_all = [observer for observer in self.among if observer is not Observer.DYNAMIC]
        count = len(for_all) + max(map(len, own), default=0)
        runs = TOGETHER / self.trials.work / count / len(halves)
        for index, half in enumerate(halves):
            choices: dict[str, Mapping[str, Observer]]
            choices = {observer.value: dict.fromkeys(half.candidates, observer) for observer in for_all}
            choices |= own[index] if own else {}
            parameters = {name: _parameters(half.candidates, choice) for name, choice in choices.items()}
            samples = spread(self.data, self.trials.sample_bytes, min(TRIED, runs), half.held_out)
            errors = self.trials.together(
                samples, parameters, _repeats(samples, runs), self.track, self.workers.threads
            )
            found = {name: found[name] + error if found else error for name, error in errors.items()}
        return found


def _decide(errors: Mapping[str, OutputError]) -> str:
    """Return the choice for all tensors: each its own, where that was tried, or else the last observer.

    It gives way to the observer of least error that is better by more than `SURE` standard errors of the paired
    difference.
    """
    *_, last = errors
    best = min(errors, key=lambda name: errors[name].value)
    return best if surely_less(errors[best], errors[last], SURE) else last


def _own(tried: Tried, start: Observer, dynamic: Mapping[str, float]) -> dict[str, dict[str, Observer]]:
    """Return what tensors choose for themselves, that among the observers which measure a range last."""
    found = {DYNAMIC: descend(start, tried, dynamic)} if dynamic else {}
    return found | {OWN: descend(start, tried)}


def _repeats(samples: Sequence[Sample], runs: float) -> int:
    return int(np.clip(min(runs / 4, RUNS) / len(samples), 1, REPEATS))


def _spoilt(alone: Alone) -> dict[str, float]:
    return {name: min(error.total for error in errors.values()) for name, errors in alone.items()}


def _parameters(candidates: Mapping[str, Quantizations], choice: Mapping[str, Observer]) -> dict[str, Parameters]:
    return {name: candidates[name][observer] for name, observer in choice.items()}


def spread(data: Dataset, sample_bytes: int, most: float, among: Sequence[int] | None = None) -> list[Sample]:
    """Return at most `most` samples, spread evenly over those `among`, so that together they are within `MEMORY`.

    Parameters
    ----------
    data : Dataset
    sample_bytes : int
        What is held of each sample.
    most : float
        At least one sample is returned.
    among : sequence of int, optional
        Positions in the data; all by default.
    """
    among = range(len(data)) if among is None else among
    chosen = _evenly(among, min(most, MEMORY // max(1, sample_bytes)))
    return [feeds for index, feeds in enumerate(data) if index in chosen]


def _evenly(among: Sequence[int], most: float) -> set[int]:
    wanted = int(min(len(among), max(1, most)))
    return {among[i] for i in np.linspace(0, len(among) - 1, wanted).round().astype(int)}


def _subset(data: Dataset, chosen: Collection[int]) -> Dataset:
    return Dataset(data.place, lambda: (feeds for i, feeds in enumerate(data) if i in chosen), data.specs)
