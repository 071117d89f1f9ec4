"""Equalization: factors of channels where operators have one scale for all their weights, group after group.

What cross-layer equalization chooses by the weights on both sides of a channel alone (Nagel et al. 2019, "Data-Free
Quantization", equation 11) is chosen here by the noise that all codes around it make: those of the weights that write a
channel, of its values, and of the weights that read it. With factors s and steps Δ, roundings being independent, it is

    Σ_j  s_j² · (Δ_w² d_j + Δ_x² b_j)  +  Δ_r² a_j / s_j²,    each Δ following from the largest of all channels,

which falls apart into channels once the largest are bounded: s_j = (Δ_r² a_j / (Δ_w² d_j + Δ_x² b_j))^¼, as far as the
bounds leave room. Bounds are tried, and of the factors those with least noise by the steps that they really lead to.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from qcompile.calib.smoothing import STEPS, Numbers, Reader, Rule, Scheme, Sides, Writer, rounded_log2, smoothing_log2

#: How often all groups have their turn: each moves what the others are chosen by.
ROUNDS = 3
#: By how much the largest weight that writes, value, and weight that reads are lowered.
LIMITS = tuple(2.0 ** (-step / 2.0) for step in range(7))
#: Nothing is divided by less.
SMALLEST = 1e-30


@dataclass(frozen=True)
class _Term:
    """What one tensor's codes add: (max_j reach_j / s_j^sign)² · Σ_j weight_j · s_j^(2 sign).

    `sign` is 1 where factors divide what is coded, -1 where they multiply it; `limit` says which bound holds for it.
    """

    reach: Numbers
    weight: Numbers
    sign: int
    limit: int

    def largest(self, factors: Numbers) -> Numbers:
        """Return the largest of what is coded, for each set of factors `[..., classes]`."""
        found: Numbers = np.max(self.reach / factors**self.sign, axis=-1)
        return found

    def noise(self, factors: Numbers) -> Numbers:
        """Return what it adds, for each set of factors `[..., classes]`."""
        found: Numbers = self.largest(factors) ** 2 * np.sum(self.weight * factors ** (2 * self.sign), axis=-1)
        return found


def equalized_log2(sides: Sides, scheme: Scheme) -> Numbers:
    """Return the factors of one group that leave the operators on both of its sides least noise, by eighths.

    Parameters
    ----------
    sides : Sides
        With what all other groups' factors have made of weights and values.
    scheme : Scheme

    Returns
    -------
    ndarray of float64, shape (number of factors + 1,)
        Their logarithms, 0 where nothing is better than the channels as they are. Channels that divide one side of a
        product of two activations and multiply the other are left as they are.
    """
    nothing, parts = np.zeros(sides.count), list[Reader | Writer]([*sides.readers, *sides.writers])
    if any(part.classes.min() < 0 for part in parts) or not all(part.signal > 0.0 for part in parts):
        return nothing
    terms = [term for reader in sides.readers for term in _read(reader, sides.count, scheme)]
    terms += [_written(writer, sides.count, scheme) for writer in sides.writers]
    rules = [Rule(0.5), *([Rule(0.5, equalizes=True)] if sides.writers else [])]
    tried = [nothing, *(smoothing_log2(sides, rule) for rule in rules)]
    tried += [_within(terms, limits) for limits in product(LIMITS, repeat=3)]
    candidates = np.unique(rounded_log2(np.stack(tried), STEPS), axis=0)
    noise = np.sum([term.noise(np.exp2(candidates)) for term in terms], axis=0)
    found: Numbers = candidates[int(np.argmin(noise))]
    return found if scheme.loss(sides, found) < scheme.loss(sides, nothing) else nothing


def _within(terms: Sequence[_Term], limits: Sequence[float]) -> Numbers:
    """Return the logarithms of the factors of least noise where the largest of what is coded stay within limits."""
    ones = np.ones(terms[0].reach.size)
    (more, less, low), high = np.zeros((3, ones.size)), np.full(ones.size, np.inf)
    for term in terms:
        bound = limits[term.limit] * float(term.largest(ones))
        if term.sign > 0:
            less, low = less + bound**2 * term.weight, np.maximum(low, term.reach / max(bound, SMALLEST))
        else:
            more, high = more + bound**2 * term.weight, np.minimum(high, bound / np.maximum(term.reach, SMALLEST))
    alive = (more > 0.0) & (less > 0.0)
    best = np.where(alive, more, 1.0) ** 0.25 / np.where(alive, less, 1.0) ** 0.25
    # Where the bounds leave no room, what they ask for meets in the middle.
    apart = low > high
    middle = np.sqrt(np.where(apart, low * np.where(apart, high, 1.0), 1.0))
    factors = np.where(apart, middle, np.clip(best, low, np.maximum(low, high)))
    log2 = np.where(alive, np.log2(np.maximum(factors, SMALLEST)), 0.0)
    if alive[1:].any():  # what all have in common changes nothing
        log2[1:][alive[1:]] -= np.median(log2[1:][alive[1:]])
    log2[0] = 0.0
    return log2


def _read(reader: Reader, count: int, scheme: Scheme) -> Iterator[_Term]:
    """Yield what a reader's values and weights add, by class."""
    high, low, reach, energy, power = np.zeros((5, count))
    np.maximum.at(high, reader.classes, reader.spread.high)
    np.minimum.at(low, reader.classes, reader.spread.low)
    np.maximum.at(reach, reader.classes, reader.reach)
    np.add.at(energy, reader.classes, reader.energy)
    np.add.at(power, reader.classes, reader.spread.power * reader.taps)
    yield _Term(high - low, energy / _codes(scheme.dtype) ** 2 / reader.signal, 1, 1)
    yield _Term(2.0 * reach, power / _codes(scheme.weight_dtype) ** 2 / reader.signal, -1, 2)


def _written(writer: Writer, count: int, scheme: Scheme) -> _Term:
    """Return what a writer's weights add, by class."""
    classes, (reach, power) = np.broadcast_to(writer.classes, writer.weight.shape), np.zeros((2, count))
    np.maximum.at(reach, classes, np.abs(writer.weight))
    np.add.at(power, classes, np.broadcast_to(writer.power, writer.weight.shape))
    return _Term(2.0 * reach, power / _codes(scheme.weight_dtype) ** 2 / writer.signal, 1, 0)


def _codes(dtype: str) -> float:
    """Return how many steps a type's codes reach over."""
    limits = np.iinfo(dtype)
    return float(int(limits.max) - int(limits.min))
