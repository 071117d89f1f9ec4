"""Sensitivity: what quantizing tensors does to the model's outputs, and which observers do the least.

The squared error of a tensor, which `Observer.MSE` minimizes, says little about the outputs: a clipped outlier may be
what a decision hangs on. Forward runs tell, and need neither labels nor gradients.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self, TypeVar

import numpy as np
import onnx_ir as ir

from qcompile.calib.collect import Statistics
from qcompile.calib.data import Dataset, Sample
from qcompile.calib.observers import Observer
from qcompile.calib.sections import at_scores, cuttable, typed
from qcompile.calib.trials import OutputError, Trials, quantizations
from qcompile.core.contract import Track

Key = TypeVar("Key", str, Observer)

#: More samples than this move no decision that stands, and cost time in proportion.
SAMPLES = 64
#: Multiply-accumulates that trying the tensors one by one may take, and comparing whole choices after that. A thread
#: does 2e10 to 6e10 in a second.
ALONE, TOGETHER = 5e11, 6e11
#: With fewer samples than this, tensors are not tried one by one.
FEWEST = 8
#: Every so many-th sample is kept from the trials, for comparing what came of them.
KEPT = 4
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
        Noise over signal at the outputs with all tensors quantized, on the samples that the tensors were tried on or on
        others, whichever is worse: by an observer's name, which then serves all tensors, and ``"each its own"``. The
        least of them was chosen.
    """

    observers: Mapping[str, Observer]
    alone: Mapping[str, float] = field(default_factory=dict)
    together: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def from_json(cls, entries: Mapping[str, Any]) -> Self:
        """Read what `dataclasses.asdict` made of one, after a way through JSON."""
        fields = {key: dict(entries[key]) for key in ("observers", "alone", "together")}
        return cls(**fields | {"observers": {name: Observer(o) for name, o in fields["observers"].items()}})

    @property
    def noise(self) -> float:
        """Noise over signal at the outputs with everything quantized as chosen, as far as it was measured."""
        return min(self.together.values(), default=0.0) or sum(self.alone.values())


#: The choice that gives each tensor the observer that is best for it alone.
OWN = "each its own"


def choose_observers(
    model: ir.Model,
    rounded: ir.Model,
    statistics: Statistics,
    readers: Mapping[str, Collection[str]],
    among: Sequence[Observer],
    dtype: str,
    data: Dataset,
    track: Track[Any],
    threads: int,
) -> Choice:
    """Choose for each measured tensor the observer whose range moves the model's outputs least.

    First each tensor is quantized alone and everything else stays in float: the part of the graph before the tensor
    runs once per sample, the part behind it once per sample and distinct range. What comes of it, and each observer for
    all tensors, are then held against one another with all tensors quantized, also on samples that were kept from the
    trials: what is best alone need not be best together, and a choice among many can fit its samples.

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
        At most `SAMPLES` of it are run, spread evenly.
    track : callable
        Shows progress.
    threads : int
        Trials that run at the same time; the result does not depend on it.
    """
    candidates = {name: quantizations(seen, among, dtype) for name, seen in statistics.histograms.items()}
    if not candidates or not cuttable(model):
        return Choice(dict.fromkeys(candidates, among[-1]))
    first = next(iter(data))
    trials = Trials(typed(at_scores(model), first), typed(at_scores(rounded), first), candidates, readers, first)
    fit, kept = _apart(len(data))
    choices: dict[str, Mapping[str, Observer]] = {o.value: dict.fromkeys(candidates, o) for o in among}

    def compare(positions: Sequence[int], halves: int) -> dict[str, float]:
        samples = spread(data, trials.sample_bytes, TOGETHER / halves / (len(choices) * trials.work), positions)
        return trials.together(samples, choices, track, threads) if len(choices) > 1 else {among[0].value: 0.0}

    tried = candidates
    each_its_own = len(among) > 1 and trials.work_alone(candidates) * FEWEST <= ALONE
    if not each_its_own:
        best = choices[_least(compare(fit, 1))]
        tried = {name: {best[name]: found[best[name]]} for name, found in candidates.items()}
    alone: Mapping[str, Mapping[Observer, OutputError]] = {}
    if (work := trials.work_alone(tried)) <= ALONE:
        alone = trials.alone(tried, spread(data, trials.sample_bytes, ALONE / work, fit), track, threads)
    if each_its_own:
        choices[OWN] = {name: _least({observer: error.value for observer, error in errors.items()})
                        for name, errors in alone.items()}  # fmt: skip
    first_half, second_half = compare(fit, 2), compare(kept, 2)
    # Few samples hold most of what is clipped: a range that happens to suit one half is found out by the other.
    together = {name: max(error, second_half[name]) for name, error in first_half.items()}
    spoilt = {name: min(error.total for error in errors.values()) for name, errors in alone.items()}
    return Choice(choices[_least(together)], spoilt, together)


def _least(errors: Mapping[Key, float]) -> Key:
    return min(errors, key=lambda key: errors[key])


def _apart(count: int) -> tuple[Sequence[int], Sequence[int]]:
    """Return which samples to try tensors on and which to compare on; a few samples serve for both."""
    if count < KEPT:
        return range(count), range(count)
    return [i for i in range(count) if i % KEPT != KEPT - 1], range(KEPT - 1, count, KEPT)


def spread(data: Dataset, sample_bytes: int, most: float = SAMPLES, among: Sequence[int] | None = None) -> list[Sample]:
    """Return at most `most` samples, spread evenly over those `among`, so that together they are within `MEMORY`.

    Parameters
    ----------
    data : Dataset
    sample_bytes : int
        What is held of each sample.
    most : float
        At least one sample is returned, and no more than `SAMPLES`.
    among : sequence of int, optional
        Positions in the data; all by default.
    """
    among = range(len(data)) if among is None else among
    wanted = int(min(len(among), most, SAMPLES, MEMORY // max(1, sample_bytes)))
    chosen = {among[i] for i in np.linspace(0, len(among) - 1, max(1, wanted)).round().astype(int)}
    return [feeds for index, feeds in enumerate(data) if index in chosen]
