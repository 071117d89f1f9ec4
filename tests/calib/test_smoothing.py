"""The factors of smoothing and the noise that they are chosen by, against the definitions in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcompile.calib.collect import ChannelSpread
from qcompile.calib.smoothing import (
    Reader,
    Rule,
    Scheme,
    Sides,
    Writer,
    best_rule,
    farthest,
    preferably_whole,
    rounding,
    smoothing_log2,
    without,
)
from qcompile.core import numerics

Array = np.ndarray[Any, np.dtype[Any]]
CPU = Scheme("uint8", "int8", True)
seeds = st.integers(0, 2**32 - 1)


def spread_of(x: Array) -> ChannelSpread:
    return ChannelSpread(np.minimum(x.min(0), 0.0), np.maximum(x.max(0), 0.0), np.mean(np.square(x), 0))


def dense(x: Array, weight: Array, classes: Array | None = None) -> Reader:
    """Return a MatMul that reads x [tokens, channels]."""
    count = x.shape[1]
    numbers = np.arange(1, count + 1) if classes is None else classes
    return Reader(spread_of(x), numbers, weight.astype(np.float32), 1, np.arange(count)[:, None])


def outliers(random: np.random.Generator, tokens: int = 64, channels: int = 16) -> Array:
    return random.normal(size=(tokens, channels)) * np.exp(random.normal(0, 1.5, channels))


@given(seeds, st.floats(0.0, 1.0))
def test_factors_are_those_of_the_paper(seed: int, alpha: float) -> None:
    random = np.random.default_rng(seed)
    x, weight = outliers(random), random.normal(size=(16, 5))
    log2 = smoothing_log2(Sides([dense(x, weight)]), Rule(alpha))
    exact = np.log2(np.abs(x).max(0) ** alpha / np.abs(weight.astype(np.float32)).max(1) ** (1 - alpha))
    assert log2[0] == 0.0
    np.testing.assert_array_equal(8 * log2[1:], np.rint(8 * (exact - np.median(exact))))


def test_factors_of_all_readers_and_of_shared_channels_are_one(random: np.random.Generator) -> None:
    x, weights = outliers(random), [random.normal(size=(16, 5)), random.normal(size=(16, 3))]
    classes = np.repeat(np.arange(1, 9), 2)
    both = smoothing_log2(Sides([dense(x, weight, classes) for weight in weights]), Rule(0.5))
    reach = np.abs(x).max(0).reshape(8, 2).max(1)
    most = np.abs(np.concatenate(weights, 1)).max(1).reshape(8, 2).max(1)
    exact = np.log2(np.sqrt(reach / most))
    assert both.shape == (9,)
    np.testing.assert_array_equal(8 * both[1:], np.rint(8 * (exact - np.median(exact))))


@given(seeds, st.floats(0.0, 1.0))
def test_factors_of_both_sides_of_a_product_are_the_mean_of_what_they_ask(seed: int, alpha: float) -> None:
    """Queries are divided by what keys are multiplied by."""
    random = np.random.default_rng(seed)
    x, k, weight = outliers(random), outliers(random), random.normal(size=(16, 5))
    queries, keys = dense(x, weight), dense(k, weight, -np.arange(1, 17))
    log2 = smoothing_log2(Sides([queries, keys]), Rule(alpha))
    weights = (1 - alpha) * np.log2(np.abs(weight.astype(np.float32)).max(1))
    exact = (alpha * np.log2(np.abs(x).max(0)) - weights - (alpha * np.log2(np.abs(k).max(0)) - weights)) / 2
    # Eighths, and the nearest: half of one either way, and what a float64 has beyond it where it lies between two.
    np.testing.assert_array_equal(8 * log2, np.rint(8 * log2))
    np.testing.assert_allclose(8 * log2[1:], 8 * (exact - np.median(exact)), rtol=0, atol=0.5 + 1e-8)
    swapped = dense(k, weight).noise(np.exp2(-log2), "uint8", "int8", True)
    np.testing.assert_allclose(keys.noise(np.exp2(log2), "uint8", "int8", True), swapped, rtol=1e-9)


def test_dead_channels_and_extreme_ones_have_bounded_factors(random: np.random.Generator) -> None:
    x, weight = outliers(random), random.normal(size=(16, 5))
    x[:, 3], weight[4] = 0.0, 0.0
    x[:, 5] *= 1e12
    log2 = smoothing_log2(Sides([dense(x, weight)]), Rule(1.0))
    assert log2[4] == log2[5] == 0.0 and log2[6] == 13.0 and np.abs(log2).max() == 13.0


def test_what_is_not_scaled_keeps_its_factor(random: np.random.Generator) -> None:
    classes = np.where(np.arange(16) < 4, 0, np.arange(16) - 3)
    sides = Sides([dense(outliers(random), random.normal(size=(16, 5)), classes)])
    assert smoothing_log2(sides, Rule(0.8))[0] == 0.0


@given(seeds, st.booleans())
def test_noise_is_that_of_the_formula(seed: int, per_channel: bool) -> None:
    random = np.random.default_rng(seed)
    x, weight = outliers(random), random.normal(size=(16, 5)).astype(np.float32)
    factors = np.exp2(random.integers(-16, 17, 17) / 8)
    scaled_x, scaled = x / factors[1:], weight * factors[1:, None].astype(np.float32)
    step = (max(scaled_x.max(), 0) - min(scaled_x.min(), 0)) / 255
    steps = np.abs(scaled).max(0 if per_channel else None) / 127 * np.ones(5)
    power = np.mean(scaled_x**2, 0)
    expected = np.sum(np.minimum(step**2 / 12, power)[:, None] * np.square(scaled, dtype=np.float64))
    lack = scaled - np.rint(scaled / steps) * steps
    expected += np.sum(lack**2 * power[:, None])
    found = dense(x, weight).noise(factors, "uint8", "int8", per_channel)
    np.testing.assert_allclose(found, expected, rtol=1e-4)


@pytest.mark.parametrize("group", [1, 2, 8])
def test_noise_of_convolutions_is_that_of_their_groups(group: int, random: np.random.Generator) -> None:
    """A grouped convolution is as many dense ones, each on its own channels."""
    x = outliers(random, channels=8)
    per, out = 8 // group, 4
    weight = random.normal(size=(out * group, per, 3, 3)).astype(np.float32)
    first = np.arange(out * group) // out * per
    channels = (first[:, None] + np.arange(per)).reshape(out * group, per, 1, 1)
    factors = np.exp2(random.integers(-8, 9, 9) / 8)
    whole = Reader(spread_of(x), np.arange(1, 9), weight, 0, channels)
    parts = 0.0
    step = float(numerics.affine_scale([np.min(x / factors[1:])], [np.max(x / factors[1:])], "uint8")[0][0])
    for index in range(group):
        own = slice(index * per, (index + 1) * per)
        scaled = weight[index * out : (index + 1) * out] * factors[1:][own, None, None].astype(np.float32)
        steps = np.abs(scaled).max((1, 2, 3), keepdims=True) / 127
        power = np.mean((x / factors[1:])[:, own] ** 2, 0)[:, None, None]
        parts += np.sum(np.minimum(step**2 / 12, power) * np.square(scaled, dtype=np.float64))
        parts += np.sum((scaled - np.rint(scaled / steps) * steps) ** 2 * power)
    np.testing.assert_allclose(whole.noise(factors, "uint8", "int8", True), parts, rtol=1e-4)
    np.testing.assert_allclose(whole.reach, [np.abs(np.where(channels == c, weight, 0)).max() for c in range(8)])


@given(seeds)
def test_the_estimate_predicts_what_quantization_does(seed: int) -> None:
    """Within a decibel of the error of quantized X and W, over enough tokens for roundings to average out."""
    random = np.random.default_rng(seed)
    x, weight = outliers(random, 512, 32), random.normal(size=(32, 24)).astype(np.float32)
    reader = dense(x, weight)
    log2 = smoothing_log2(Sides([reader]), Rule(0.7))
    factors = np.exp2(log2[1:])
    smooth_x, smooth_w = (x / factors).astype(np.float32), (weight * factors[:, None]).astype(np.float32)
    scale, zero = numerics.affine_scale([smooth_x.min()], [smooth_x.max()], "uint8")
    rounded_x = numerics.dequantize(numerics.quantize(smooth_x, scale[0], zero[0], "uint8"), scale[0], zero[0])
    steps = numerics.symmetric_scale(np.abs(smooth_w).max(0), "int8")
    zeros = np.zeros(24, np.int64)
    codes = numerics.quantize(smooth_w, steps, zeros, "int8", 1, symmetric=True)
    rounded_w = numerics.dequantize(codes, steps, zeros, 1)
    error = np.mean(np.sum(np.square(rounded_x @ rounded_w - x @ weight), 1))
    assert abs(10 * np.log10(error / reader.noise(np.exp2(log2), "uint8", "int8", True))) < 1.0


def test_alpha_is_searched_by_the_loss(random: np.random.Generator) -> None:
    x, weight = outliers(random, channels=32), random.normal(size=(32, 8))
    x[:, 7] *= 60.0
    sides = Sides([dense(x, weight)])
    rule = best_rule(sides, CPU)
    assert rule is not None and not rule.equalizes
    alpha = rule.alpha
    losses = {a: CPU.loss(sides, smoothing_log2(sides, Rule(a))) for a in (0.3, 0.5, alpha, 0.9, 1.0)}
    assert min(losses, key=lambda a: losses[a]) == alpha
    assert losses[alpha] < CPU.loss(sides, np.zeros(33)) / 10


def test_even_channels_are_left_alone() -> None:
    x, weight = np.tile([[-1.0], [1.0]], (1, 16)), np.ones((16, 4))
    assert best_rule(Sides([dense(x, weight)]), CPU) is None


def test_whole_powers_are_preferred_where_they_lose_nothing(random: np.random.Generator) -> None:
    """The largest channel decides the step; how the small ones are rounded costs next to nothing."""
    x, weight = random.normal(size=(64, 16)), random.normal(size=(16, 8))
    reader = Sides([dense(x, weight)])
    near = np.zeros(17)
    near[1 + np.abs(x).max(0).argmin()] = 0.125
    whole = preferably_whole(reader, near, CPU)
    assert (whole == 0.0).all()
    uneven = smoothing_log2(Sides([dense(outliers(random), weight)]), Rule(1.0))
    kept = preferably_whole(Sides([dense(outliers(random), weight)]), uneven, CPU)
    assert (kept == uneven).all() or (kept == np.rint(kept)).all()


def test_dead_weights_have_no_loss() -> None:
    assert CPU.loss(Sides([dense(np.ones((4, 3)), np.zeros((3, 2)))]), np.zeros(4)) == 0.0


def test_the_farthest_channels_are_set_aside(random: np.random.Generator) -> None:
    """Two of 64 channels set the step of all; behind them more would gain less than they cost."""
    x, weight = random.uniform(-1, 1, (256, 64)), random.normal(size=(64, 16))
    x[:, [5, 40]] *= 30.0
    assert farthest([dense(x, weight)], CPU) == (5, 40)
    assert farthest([dense(random.uniform(-1, 1, (256, 64)), weight)], CPU) == ()


def test_what_is_set_aside_adds_no_noise(random: np.random.Generator) -> None:
    x, weight = outliers(random, channels=32), random.normal(size=(32, 8))
    others = [c for c in range(32) if c not in (3, 7)]
    rest = without(dense(x, weight), [3, 7])
    alone = dense(x[:, others], weight[others])
    np.testing.assert_allclose(rest.noise(np.ones(33), "uint8", "int8", True),
                               alone.noise(np.ones(31), "uint8", "int8", True), rtol=1e-6)  # fmt: skip


def test_weights_that_vanish_lose_no_more_than_they_are(random: np.random.Generator) -> None:
    """Of a column with one large weight the others become zero: the error is what they are, not a twelfth step²."""
    x, weight = random.normal(size=(256, 16)), random.normal(size=(16, 4)) * 1e-3
    weight[3] = 1.0
    power = np.mean(x**2, 0)
    weights = np.sum(np.delete(weight, 3, 0) ** 2 * np.delete(power, 3)[:, None])
    step = (x.max() - x.min()) / 255
    noise = dense(x, weight).noise(np.ones(17), "uint8", "int8", True)
    np.testing.assert_allclose(noise, weights + step**2 / 12 * np.sum(weight**2), rtol=1e-3)
    assert weights < 0.5 * 4 * (1 / 127) ** 2 / 12 * power.sum()


#: Channels of weights with one scale: what writes eight channels from five, and what reads them.
ONE_SCALE = Scheme("uint8", "int8", False)


def writer_of(inputs: Array, weight: Array, classes: Array | None = None) -> Writer:
    count = weight.shape[1]
    numbers = np.arange(1, count + 1) if classes is None else classes
    return Writer(np.mean(np.square(inputs), 0)[:, None], numbers[None], weight.astype(np.float32))


@given(seeds)
def test_equalization_makes_both_sides_reach_alike(seed: int) -> None:
    """Nagel et al. 2019, equation 11: s = √(r1 / r2), so that r1 / s = r2 · s; by eighths of powers of two."""
    random = np.random.default_rng(seed)
    first = random.normal(size=(5, 8)) * np.exp(random.normal(0, 1, 8))
    second = random.normal(size=(8, 3)) * np.exp(random.normal(0, 1, (8, 1)))
    inputs = random.normal(size=(32, 5))
    sides = Sides([dense(inputs @ first, second)], [writer_of(inputs, first)])
    factors = np.exp2(smoothing_log2(sides, Rule(0.5, equalizes=True))[1:])
    ratio = (np.abs(first).max(0) / factors) / (np.abs(second).max(1) * factors)
    # What all channels have in common is taken out.
    np.testing.assert_allclose(np.log2(ratio / np.median(ratio)), 0.0, atol=0.25 + 1e-6)


@given(seeds)
def test_noise_of_what_writes_is_that_of_its_rounding(seed: int) -> None:
    random = np.random.default_rng(seed)
    inputs, weight = random.normal(size=(64, 5)), random.normal(size=(5, 8)) * np.exp(random.normal(0, 1, 8))
    factors = np.exp2(random.integers(-8, 9, 9) / 8)
    divided = weight.astype(np.float32) / factors[1:]
    step = np.abs(divided).max() / 127
    lack = (divided - np.rint(divided / step) * step) * factors[1:]
    expected = np.sum(lack**2 * np.mean(inputs**2, 0)[:, None])
    np.testing.assert_allclose(writer_of(inputs, weight).noise(factors, "int8"), expected, rtol=1e-3)


def test_with_one_scale_what_writes_is_evened_out_too(random: np.random.Generator) -> None:
    """One of its channels has weights that are fifty times the others', and what reads it small ones for that."""
    inputs, first, second = random.normal(size=(64, 5)), random.normal(size=(5, 8)), random.normal(size=(8, 3))
    first[:, 2] *= 50.0
    second[2] /= 50.0
    sides = Sides([dense(inputs @ first, second)], [writer_of(inputs, first)])
    rule = best_rule(sides, ONE_SCALE)
    assert rule is not None
    log2 = smoothing_log2(sides, rule)
    assert ONE_SCALE.loss(sides, log2) < 0.1 * ONE_SCALE.loss(sides, np.zeros(9))
    # With a scale per channel it makes no difference to what writes.
    assert CPU.loss(sides, log2) == CPU.loss(Sides(sides.readers), log2)


def test_rounding_is_what_codes_lack(random: np.random.Generator) -> None:
    weight = random.normal(size=(6, 4)).astype(np.float32)
    for others, axis in (((0,), 1), (None, None)):
        steps = numerics.symmetric_scale(np.abs(weight).max(others), "int8")
        codes = numerics.quantize(weight, steps, np.zeros(steps.shape, np.int64), "int8", axis, symmetric=True)
        held = numerics.dequantize(codes, steps, np.zeros(steps.shape, np.int64), axis)
        np.testing.assert_allclose(rounding(weight, others, "int8"), weight - held, atol=1e-6)
