"""Smoothing: by which factors the channels of activations are divided, so that what is quantized loses least.

X · W = (X / s) · (s · W). Factors that even out X leave more to the weights, and the other way round; how much of each
is reckoned by the noise of the operators' results under the target's own scheme (Xiao et al. 2023, "SmoothQuant",
section 4, whose α is searched here for each group; Lin et al. 2024, "AWQ", search likewise).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from qcompile.calib.collect import ChannelSpread
from qcompile.core import numerics, scratch

Numbers = npt.NDArray[np.float64]

#: How much of a channel's reach goes into the weights: 0 evens out the weights, 1 the activations.
ALPHAS = tuple(step / 20 for step in range(6, 21))
#: Factors are powers of 2 by eighths: at most 4 % beside the exact ones, and a plan can hold them as short numbers.
STEPS = 8
#: Whole powers of 2 change no digit of a float, so they are preferred at this much more noise.
WHOLE = 1.02
#: Channels that may be set aside or added, in parts of all, and what each part more costs in parts of the noise.
MOST_MORE, PRICE = 1 / 32, 8.0
#: Their largest and least logarithm: about 1e-4 to 1e4.
LARGEST_LOG2 = 13.0


@dataclass(frozen=True, eq=False)
class Reader:
    """A linear operator in integers, and the channels that it reads.

    Parameters
    ----------
    spread : ChannelSpread
        Of what it reads.
    classes : ndarray of int, shape (channels,)
        Which factor divides each channel; 0 is none, and -c multiplies by the factor of c.
    weight : ndarray of float32
    axis : int
        The axis of the weights that counts output channels.
    channels : ndarray of int
        Which channel each weight multiplies; broadcasts with the weights.
    """

    spread: ChannelSpread
    classes: npt.NDArray[np.int64]
    weight: npt.NDArray[Any]
    axis: int
    channels: npt.NDArray[np.int64]

    @cached_property
    def reach(self) -> Numbers:
        """The largest absolute weight of each channel that it reads, shape (channels,)."""
        found = np.zeros(self.classes.size)
        np.maximum.at(found, self.channels, self._over(np.max, self._absolute))
        return found

    @cached_property
    def energy(self) -> Numbers:
        """The sum of the squared weights of each channel that it reads, shape (channels,)."""
        found = np.zeros(self.classes.size)
        np.add.at(found, self.channels, self._over(np.sum, np.square(self.weight, dtype=np.float64)))
        return found

    @cached_property
    def taps(self) -> Numbers:
        """How many weights each channel that it reads is multiplied by, shape (channels,)."""
        found = np.zeros(self.classes.size)
        np.add.at(found, self.channels, self._over(np.sum, np.ones(self.weight.shape)))
        return found

    @property
    def signal(self) -> float:
        """The power of what it adds up, as if channels were independent, summed over its output channels."""
        return float(np.dot(self.energy, self.spread.power))

    @cached_property
    def _absolute(self) -> npt.NDArray[Any]:
        return scratch.kept(np.abs(self.weight))

    def _over(self, reduce: Callable[..., npt.NDArray[Any]], array: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Reduce an array of the weights' shape to that of `channels`."""
        axes = tuple(at for at, length in enumerate(self.channels.shape) if length == 1)
        return reduce(array, axis=axes, keepdims=True)

    def noise(self, factors: Numbers, dtype: str, weight_dtype: str, per_channel: bool) -> float:
        """Return the noise power that quantization adds, summed over its output channels.

        Rounding X/s adds Σ_j e_j Σ_k (s_j W_jk)², e_j being Δ²/12 with Δ the step over the range of all channels, or
        all that channel j has where that is less: what is far below a step becomes zero. Rounding s·W to R adds
        Σ_jk (s_j W_jk - R_jk)² E[X_j²]/s_j². Roundings are taken as independent.

        Parameters
        ----------
        factors : ndarray, shape (number of factors + 1,)
            By class.
        dtype, weight_dtype : str
            Integer types of the codes: activations have one scale and a zero point, weights are symmetric.
        per_channel : bool
            Whether weights have a scale per output channel.
        """
        by_channel = by_class(factors, self.classes)
        low, high = np.min(self.spread.low / by_channel), np.max(self.spread.high / by_channel)
        step = float(numerics.affine_scale([low], [high], dtype)[0][0])
        power = self.spread.power / by_channel**2
        rounded = np.minimum(step**2 / 12.0, power)
        others = tuple(at for at in range(self.weight.ndim) if at != self.axis) if per_channel else None
        scaled = self.weight * by_channel.astype(np.float32)[self.channels]
        lost = self._over(np.sum, np.square(rounding(scaled, others, weight_dtype)))
        return float(np.dot(self.energy, rounded * by_channel**2) + np.sum(lost * power[self.channels]))


@dataclass(frozen=True, eq=False)
class Writer:
    """A linear operator in integers whose results are divided by factors: with one scale for its weights it matters.

    Parameters
    ----------
    power : ndarray of float64
        The mean square of what each weight multiplies; broadcasts with the weights.
    classes : ndarray of int
        Which factor divides each weight; 0 is none, and -c multiplies by the factor of c. Broadcasts with the weights.
    weight : ndarray of float32
    """

    power: Numbers
    classes: npt.NDArray[np.int64]
    weight: npt.NDArray[Any]

    @property
    def signal(self) -> float:
        """The power of what it makes, as if channels were independent."""
        return float(np.sum(np.square(self.weight, dtype=np.float64) * self.power))

    def noise(self, factors: Numbers, weight_dtype: str) -> float:
        """Return the noise power that rounding W/s with one scale adds, once its readers have taken s back."""
        divisors = by_class(factors, self.classes).astype(np.float32)
        lost = np.square(rounding(self.weight / divisors, None, weight_dtype) * divisors)
        return float(np.sum(lost * self.power))


def by_class(factors: Numbers, classes: npt.NDArray[np.int64]) -> Numbers:
    """Return the factors of classes, of a negative one the reciprocal."""
    found: Numbers = factors[np.abs(classes)] ** np.where(classes < 0, -1.0, 1.0)
    return found


def rounding(weight: npt.NDArray[Any], others: tuple[int, ...] | None, dtype: str) -> npt.NDArray[Any]:
    """Return what symmetric codes lack of weights; a scale for what lies along `others`, for all of them if None."""
    absmax = np.max(np.abs(weight), axis=others, keepdims=True)
    steps = np.asarray(numerics.symmetric_scale(absmax, dtype), np.float32)
    codes = weight / steps
    lack: npt.NDArray[Any] = (codes - np.rint(codes)) * steps
    return lack


@dataclass(frozen=True)
class Scheme:
    """How the target quantizes.

    Parameters
    ----------
    dtype, weight_dtype : str
        Integer types of activations and weights.
    per_channel : bool
        Whether weights have a scale per output channel.
    """

    dtype: str
    weight_dtype: str
    per_channel: bool

    def loss(self, sides: Sides, log2: Numbers) -> float:
        """Return noise over signal, summed over the operators, with factors of 2 to the power of `log2` by class."""
        factors = np.exp2(log2)
        ratios = [
            (reader.noise(factors, self.dtype, self.weight_dtype, self.per_channel), reader.signal)
            for reader in sides.readers
        ]
        if not self.per_channel:  # else each written channel's scale goes with its factor
            ratios += [(writer.noise(factors, self.weight_dtype), writer.signal) for writer in sides.writers]
        return sum(noise / signal for noise, signal in ratios if signal > 0.0)

    def noise(self, changed: Sequence[Reader], readers: Sequence[Reader]) -> float:
        """Return noise over signal, summed over operators as they have become, without factors."""
        ones = np.ones(max(int(np.abs(reader.classes).max()) for reader in readers) + 1)
        pairs = zip(changed, readers, strict=True)
        return sum(
            now.noise(ones, self.dtype, self.weight_dtype, self.per_channel) / before.signal
            for now, before in pairs
            if before.signal > 0.0
        )


@dataclass(frozen=True, eq=False)
class Sides:
    """The operators in integers on both sides of a group's channels.

    Parameters
    ----------
    readers : sequence of Reader
        All that read channels of it, at least one.
    writers : sequence of Writer
        Those that write all of them; none if something else takes part in that.
    """

    readers: Sequence[Reader]
    writers: Sequence[Writer] = ()

    @property
    def count(self) -> int:
        """How many factors there are, with that of channels that are not scaled."""
        return max(int(np.abs(reader.classes).max()) for reader in self.readers) + 1


@dataclass(frozen=True)
class Rule:
    """How factors follow from what is seen.

    Parameters
    ----------
    alpha : float
    equalizes : bool
        A channel's reach is that of the weights that write it, not of its values.
    """

    alpha: float
    equalizes: bool = False


def smoothing_log2(sides: Sides, rule: Rule) -> Numbers:
    """Return max|X|^α / max|W|^(1-α) of each class (SmoothQuant, equation 4), as powers of 2 by eighths.

    With α = 1/2 and the weights that write in place of X these are the factors of cross-layer equalization (Nagel et
    al. 2019, "Data-Free Quantization", equation 11).

    Returns
    -------
    ndarray of float64, shape (number of factors + 1,)
        Their logarithms. The first is 0, for channels that are not scaled; so is that of channels that are dead. A
        factor that all have in common changes nothing, so it is taken out.
    """
    # Those of the classes, and behind them those of their reciprocals, counted back from the end.
    reach, weights, alpha = *np.zeros((2, 2 * sides.count)), rule.alpha
    for reader in sides.readers:
        if not rule.equalizes:
            np.maximum.at(reach, reader.classes, reader.spread.absmax)
        np.maximum.at(weights, reader.classes, reader.reach)
    for writer in sides.writers if rule.equalizes else ():
        np.maximum.at(reach, np.broadcast_to(writer.classes, writer.weight.shape), np.abs(writer.weight))
    asked = (reach > 0.0) & (weights > 0.0)
    wish = np.zeros(asked.size)
    wish[asked] = alpha * np.log2(reach[asked]) - (1.0 - alpha) * np.log2(weights[asked])
    classes = np.arange(sides.count)
    alive = (asked[classes] | asked[-classes]) & (classes > 0)
    # A factor that is asked for on both sides of a product is the mean of what each asks.
    log2 = np.where(alive, (wish[classes] - wish[-classes]) / np.maximum(1, asked[classes] + 1 * asked[-classes]), 0.0)
    if alive.any():
        log2[alive] -= np.median(log2[alive])
    return rounded_log2(log2, STEPS)


def best_rule(sides: Sides, scheme: Scheme) -> Rule | None:
    """Return the rule of least loss, None where nothing is better than leaving the channels as they are."""
    equalizes = (False, True) if sides.writers and not scheme.per_channel else (False,)
    losses = {
        rule: scheme.loss(sides, smoothing_log2(sides, rule))
        for rule in (Rule(alpha, each) for each in equalizes for alpha in ALPHAS)
    }
    best = min(losses, key=lambda rule: losses[rule])
    return best if losses[best] < scheme.loss(sides, np.zeros(sides.count)) else None


def preferably_whole(sides: Sides, log2: Numbers, scheme: Scheme) -> Numbers:
    """Return the nearest whole powers of 2 where they lose next to nothing, else the factors as they are."""
    whole = rounded_log2(log2, 1)
    return whole if scheme.loss(sides, whole) <= WHOLE * scheme.loss(sides, log2) else log2


def farthest(readers: Sequence[Reader], scheme: Scheme) -> tuple[int, ...]:
    """Return the channels that are best set aside, read in float beside the integers.

    Those that reach farthest, as many of them as make noise · (1 + 8 · share of the channels) least, a power of two or
    a thirty-second at most; none where that is no less than with all.

    Parameters
    ----------
    readers : sequence of Reader
        That read the same tensor.
    scheme : Scheme
    """
    spread = readers[0].spread
    order = np.argsort(-spread.absmax, kind="stable")

    def noise(aside: int) -> float:
        return scheme.noise([without(reader, order[:aside]) for reader in readers], readers)

    return tuple(sorted(map(int, order[: worthwhile(noise, order.size)])))


def worthwhile(noise: Callable[[int], float], count: int) -> int:
    """Return how many of `count` channels are worth what they take: a power of two, the most that may be, or none.

    Parameters
    ----------
    noise : callable
        What is left with so many.
    count : int
    """
    most = int(count * MOST_MORE)
    fewer = {0, most, *(1 << step for step in range(most.bit_length()))}
    costs = [(noise(some) * (1.0 + PRICE * some / count), some) for some in sorted(fewer)]
    return min(costs)[1]


def without(reader: Reader, channels: Sequence[int] | npt.NDArray[np.int64]) -> Reader:
    """Return what an operator in integers still reads when some channels are set aside."""
    kept = np.isin(np.arange(reader.classes.size), channels, invert=True)
    spread = ChannelSpread(reader.spread.low * kept, reader.spread.high * kept, reader.spread.power * kept)
    return replace(reader, spread=spread, weight=reader.weight * kept[reader.channels])


def rounded_log2(log2: Numbers, steps: int) -> Numbers:
    """Return logarithms of factors in so many steps for each power of 2, none beyond `LARGEST_LOG2`."""
    clipped: Numbers = np.clip(np.rint(log2 * steps) / steps, -LARGEST_LOG2, LARGEST_LOG2)
    return clipped
