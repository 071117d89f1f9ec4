"""Descent: from one observer for all tensors, step by step to each tensor's own where the outputs gain by it.

Noise of different tensors is all but uncorrelated at the outputs, so that its powers add up: what each tensor does
alone, and the weights, tell what any choice does together, on every sample.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from qcompile.calib.observers import Observer
from qcompile.calib.output_error import EXACT, OutputError

#: By what part a change must lessen the error: less may be the sum's own rounding.
LEAST = 1e-6
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


def descend(start: Observer, tried: Tried, dynamic: Mapping[str, float] = MappingProxyType({})) -> dict[str, Observer]:
    """Return each tensor's observer: from `start` for all of them, one change after another, the best one first.

    The last change is followed by none that lessens the outputs' error (`OutputError.value`) with all tensors
    quantized. So a tensor counts for what it adds on the samples where it adds most; one whose noise is far below that
    of others or of the weights stays as it is, whatever serves it best alone.

    Parameters
    ----------
    start : Observer
        One that measures a range.
    tried : Tried
    dynamic : mapping of str to float
        By value name, what must be gained by a range that is taken when the model runs; others have none.
    """
    chosen = dict.fromkeys(tried.alone, start)
    shape = len(tried.weights.noise), tried.weights.samples
    weights = _relative(tried.weights, shape)
    noise = {name: {observer: _relative(error, shape) for observer, error in errors.items()}
             for name, errors in tried.alone.items()}  # fmt: skip
    prices = {name: dict.fromkeys(others, 0.0) | {Observer.DYNAMIC: dynamic.get(name, np.inf)}
              for name, others in noise.items()}  # fmt: skip
    while True:
        total = sum((noise[name][observer] for name, observer in chosen.items()), weights)
        changes = {(name, observer): _value(total - noise[name][chosen[name]] + other)
                   + prices[name][observer] - prices[name][chosen[name]]
                   for name, others in noise.items() for observer, other in others.items()}  # fmt: skip
        if not changes or min(changes.values()) >= (1.0 - LEAST) * _value(total):
            return chosen
        name, observer = min(changes, key=lambda change: changes[change])
        chosen[name] = observer


def _relative(error: OutputError, shape: tuple[int, int]) -> npt.NDArray[np.float64]:
    """Return noise over signal by output and sample: none of a tensor that reaches no output."""
    if not error.noise:
        return np.zeros(shape)
    return np.nan_to_num([error.relative(name) for name in error.noise], nan=LOST, posinf=LOST)


def _value(noise: npt.NDArray[np.float64]) -> float:
    return float(np.exp(np.log(np.maximum(noise, EXACT)).mean(axis=1)).sum())
