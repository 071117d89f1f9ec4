"""Canaries: inputs on which a float model, what its weights are rounded to, and an artifact are run side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompile.calib.data import Sample, input_specs, open_data
from qcompile.core import runtime
from qcompile.weight_grids import ALPHA, FloatArray, chance_of

#: By how many dB more a grid has to be worse than all that are shifted against it, over all canaries, and for one.
MARGIN, WORST_MARGIN = 3.0, 6.0
#: The share of answers that may differ from what float and all shifted grids agree on: activations are codes too.
DIFFER = 0.05


@dataclass(frozen=True)
class Shifts:
    """How much the outputs move by rounding weights to a grid, and by grids that are shifted against it.

    Parameters
    ----------
    grid : str
    noise : float
        Mean over canaries of noise over signal, in dB, with the grid as it is.
    shifted : tuple of float
        The same of the grids that are shifted.
    worst, shifted_worst : float
        How much more noise the worst canary has than the middle one of the others; the most of a shifted grid.
    """

    grid: str
    noise: float
    shifted: tuple[float, ...]
    worst: float
    shifted_worst: float

    @property
    def unusual(self) -> bool:
        """Whether the grid that is there is worse than all others by more than a margin."""
        mean = self.noise > max(self.shifted) + MARGIN
        return mean or self.worst > self.shifted_worst + WORST_MARGIN


@dataclass(frozen=True)
class Answers:
    """The artifact beside float on canaries.

    Parameters
    ----------
    canaries : str
        Where they are from.
    count : int
    noise : float
        Mean of noise over signal, in dB.
    agreed : int
        Canaries on whose answers float and all shifted grids agree; of scores in a row alone.
    other : int
        Of these, how often the artifact answers otherwise.
    """

    canaries: str
    count: int
    noise: float
    agreed: int
    other: int

    @property
    def unusual(self) -> bool:
        """Whether more answers differ than chance has it where `DIFFER` of them may."""
        return self.agreed > 0 and chance_of(self.other, self.agreed, DIFFER) < ALPHA


def canaries(
    model: ir.Model, data: str | None, count: int, random: np.random.Generator
) -> tuple[list[Sample], list[Sample]]:
    """Return inputs that are given, and others that are drawn: each element from a sample of its own.

    So what is drawn lies within what the data have, and is of no sample. Without data all are random.
    """
    if data is None:
        seeds = random.integers(1 << 30, size=count)
        return [], [runtime.synthetic_feeds(model, int(seed)) for seed in seeds]
    given = list(islice(open_data(data, input_specs(model)), count))
    return given, [_mixed(given, random) for _ in given]


def _mixed(given: Sequence[Sample], random: np.random.Generator) -> Sample:
    shapes = {name: array.shape for name, array in given[0].items()}
    alike = [sample for sample in given if {name: array.shape for name, array in sample.items()} == shapes]
    drawn = {}
    for name, shape in shapes.items():
        stacked = np.stack([sample[name] for sample in alike])
        drawn[name] = np.take_along_axis(stacked, random.integers(len(alike), size=(1, *shape)), 0)[0]
    return drawn


class Runs:
    """A float model's outputs on canaries, and how far those of others are from them."""

    def __init__(self, model: ir.Model, samples: Sequence[Sample]) -> None:
        self.samples = samples
        session = runtime.Session(model)
        self.expected = [session.run(feeds) for feeds in samples]
        #: Of the last model: on which canaries it answers as float does.
        self.agreeing = self.answers()

    def answers(self) -> npt.NDArray[np.bool_]:
        """Return for each canary whether its first output is one row of scores."""
        return np.array([answer(outputs) is not None for outputs in self.expected], bool)

    def noise(self, model: ir.Model) -> FloatArray:
        """Return noise over signal of each canary, in dB."""
        session = runtime.Session(model)
        found = [session.run(feeds) for feeds in self.samples]
        pairs = zip(self.expected, found, strict=True)
        self.agreeing = np.array([answer(one) == answer(other) for one, other in pairs])
        return noise_of(self.expected, found)


def answer(outputs: runtime.Outputs) -> int | None:
    """Return which score of the first output that is one row of scores is the highest."""
    for y in outputs.values():
        if y.dtype.kind == "f" and y.ndim >= 2 and y.shape[-1] == y.size > 1:
            return int(y.argmax())
    return None


def noise_of(expected: Sequence[runtime.Outputs], found: Sequence[runtime.Outputs]) -> FloatArray:
    """Return noise over signal for each pair of outputs, in dB; what is exact has as little as float32 tells."""
    ratios = []
    for one, other in zip(expected, found, strict=True):
        names = [name for name, y in one.items() if y.dtype.kind == "f"]
        reals = [(one[name].astype(np.float64), other[name].astype(np.float64)) for name in names]
        with np.errstate(invalid="ignore"):
            parts = [np.nansum((y - z) ** 2) / max(float(np.nansum(y**2)), 1e-30) for y, z in reals]
        ratios.append(max(max(parts, default=0.0), 1e-14))
    decibels: FloatArray = 10.0 * np.log10(np.array(ratios))
    return decibels


def shifts_of(grid: str, there: FloatArray, moved: FloatArray) -> Shifts:
    """Return what the noise of a grid and that of those shifted against it tell, `[shifts, canaries]`."""
    middle = np.median(moved, axis=0)
    means = tuple(round(float(one), 3) for one in moved.mean(axis=1))
    worst = [round(float(np.max(one - middle)), 3) for one in (there, *moved)]
    return Shifts(grid, round(float(there.mean()), 3), means, worst[0], max(worst[1:]))


def answers_of(
    run: Callable[[Sample], runtime.Outputs],
    model: ir.Model,
    given: Sequence[Sample],
    drawn: Sequence[Sample],
    agreed: npt.NDArray[np.bool_],
) -> tuple[Answers, ...]:
    """Run the artifact on canaries, beside the float model."""
    session, found, start = runtime.Session(model), list[Answers](), 0
    for name, samples in (("that are given", given), ("that are drawn", drawn)):
        if not samples:
            continue
        expected, outputs = ([each(feeds) for feeds in samples] for each in (session.run, run))
        sure = agreed[start : start + len(samples)]
        other = sum(bool(ok) and answer(one) != answer(two)
                    for ok, one, two in zip(sure, expected, outputs, strict=True))  # fmt: skip
        noise = round(float(noise_of(expected, outputs).mean()), 3)
        found.append(Answers(name, len(samples), noise, int(sure.sum()), other))
        start += len(samples)
    return tuple(found)
