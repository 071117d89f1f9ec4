"""Descent: from one observer for all tensors, step by step to each tensor's own where the outputs surely gain by it.

Noise of different tensors is all but uncorrelated at the outputs, so that its powers add up: what each tensor does
alone, and the weights, tell what any choice does together, on every sample.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from qcompile.calib.observers import Observer
from qcompile.calib.trials import EXACT, OutputError

#: A step is taken where it gains more than so many standard errors: by chance it would once in forty times.
SURE = 2.0
#: Noise over signal that stands for an output that is driven to infinity.
LOST = 1e9


@dataclass(frozen=True)
class Tried:
    """What single tensors do to the outputs, and what the weights do, on the same samples.

    Parameters
    ----------
    alone : mapping of str to mapping of Observer to OutputError
        By value name: what each observer of that tensor alone does.
    weights : OutputError
        What the rounded weights do, without any tensor quantized.
    """

    alone: Mapping[str, Mapping[Observer, OutputError]]
    weights: OutputError

    def __add__(self, other: Tried) -> Tried:
        """Return what was found on both's samples."""
        alone = {name: {observer: error + other.alone[name][observer] for observer, error in errors.items()}
                 for name, errors in self.alone.items()}  # fmt: skip
        return Tried(alone, self.weights + other.weights)


def descend(start: Observer, tried: Tried) -> dict[str, Observer]:
    """Return each tensor's observer: `start`, unless the outputs gain by another more than by chance.

    The step that gains most is taken again and again, until none is left that gains more than `SURE` standard errors.
    What a step gains is the mean over samples, in dB at the outputs with all tensors quantized. So a tensor counts for
    what it adds on the samples where it adds most, and one that adds little stays as it is.
    """
    chosen = dict.fromkeys(tried.alone, start)
    shape = len(tried.weights.noise), tried.weights.samples
    weights = _relative(tried.weights, shape)
    noise = {name: {observer: _relative(error, shape) for observer, error in errors.items()}
             for name, errors in tried.alone.items()}  # fmt: skip
    while True:
        total = sum((noise[name][observer] for name, observer in chosen.items()), weights)
        steps = {(name, observer): _gain(total, total - noise[name][chosen[name]] + other)
                 for name, others in noise.items() for observer, other in others.items()}  # fmt: skip
        if not steps or max(steps.values()) <= 0.0:
            return chosen
        name, observer = max(steps, key=lambda step: steps[step])
        chosen[name] = observer


def _relative(error: OutputError, shape: tuple[int, int]) -> npt.NDArray[np.float64]:
    """Return noise over signal by output and sample: none of a tensor that reaches no output."""
    if not error.noise:
        return np.zeros(shape)
    return np.nan_to_num([error.relative(name) for name in error.noise], nan=LOST, posinf=LOST)


def _gain(total: npt.NDArray[np.float64], other: npt.NDArray[np.float64]) -> float:
    """Return by how many dB the outputs gain, 0 where that may be chance. The outputs' geometric means add up."""
    before, after = (np.log(np.maximum(noise, EXACT)) for noise in (total, other))
    means = np.exp(before.mean(axis=1, keepdims=True))
    gains = (means / means.sum() * (before - after)).sum(axis=0) * 10.0 / np.log(10.0)
    if gains.size < 2:
        return 0.0
    mean, error = float(gains.mean()), float(gains.std(ddof=1) / np.sqrt(gains.size))
    return mean if mean > SURE * error else 0.0
