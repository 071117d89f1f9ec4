"""Factors where weights have one scale: by the noise of all codes around a channel, group after group."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcompile.calib.collect import ChannelSpread
from qcompile.calib.equalization import _read, _written, equalized_log2
from qcompile.calib.smoothing import Reader, Rule, Scheme, Sides, Writer, smoothing_log2

Array = np.ndarray[Any, np.dtype[Any]]
ONE_SCALE = Scheme("uint8", "int8", False)
seeds = st.integers(0, 2**32 - 1)


def around(random: np.random.Generator, loud: float = 1.5, count: int = 24) -> Sides:
    """Build what writes channels and what reads them, each side with channels that reach farther than others."""
    x = random.normal(size=(64, 12))
    first = random.normal(size=(12, count)) * np.exp(random.normal(0, loud, count))
    values = np.maximum(x @ first, 0.0)
    second = random.normal(size=(count, 8)) * np.exp(random.normal(0, loud / 2, (count, 1)))
    spread = ChannelSpread(np.zeros(count), values.max(0), np.mean(values**2, 0))
    numbers = np.arange(1, count + 1)
    reader = Reader(spread, numbers, second.astype(np.float32), 1, np.arange(count)[:, None])
    writer = Writer(np.mean(x**2, 0)[:, None], numbers[None], first.astype(np.float32))
    return Sides([reader], [writer])


@given(seeds)
def test_terms_are_the_noise_of_uniform_roundings(seed: int) -> None:
    """Step² / 12 for each number that is rounded, times what multiplies it, written out."""
    random = np.random.default_rng(seed)
    sides = around(random)
    [reader], [writer] = sides.readers, sides.writers
    log2 = np.r_[0.0, random.integers(-16, 17, 24) / 8]
    s, (values, weights), written = (
        np.exp2(log2[1:]), _read(reader, sides.count, ONE_SCALE), _written(writer, sides.count, ONE_SCALE)
    )  # fmt: skip
    first, second = writer.weight.astype(np.float64), reader.weight.astype(np.float64)
    step = np.max(reader.spread.high / s) / 255
    exact = step**2 * np.sum((s[:, None] * second) ** 2) / reader.signal
    assert values.noise(np.exp2(log2)) == pytest.approx(exact, rel=1e-6)
    step = 2 * np.abs(second * s[:, None]).max() / 255
    exact = step**2 * np.sum(reader.spread.power / s**2) * 8 / reader.signal
    assert weights.noise(np.exp2(log2)) == pytest.approx(exact, rel=1e-6)
    step = 2 * np.abs(first / s).max() / 255
    exact = step**2 * np.sum(writer.power) * np.sum(s**2) / writer.signal
    assert written.noise(np.exp2(log2)) == pytest.approx(exact, rel=1e-6)


def estimate(sides: Sides, log2: Array) -> float:
    terms = [*_read(sides.readers[0], sides.count, ONE_SCALE), _written(sides.writers[0], sides.count, ONE_SCALE)]
    return float(sum(term.noise(np.exp2(log2)) for term in terms))


@given(seeds)
def test_noise_is_less_than_with_the_factors_of_the_papers(seed: int) -> None:
    sides = around(np.random.default_rng(seed))
    log2 = equalized_log2(sides, ONE_SCALE)
    assert log2[0] == 0.0 and np.array_equal(8 * log2, np.rint(8 * log2))
    assert ONE_SCALE.loss(sides, log2) < ONE_SCALE.loss(sides, np.zeros(sides.count))
    for rule in (Rule(0.5, equalizes=True), Rule(0.5)):
        assert estimate(sides, log2) <= estimate(sides, smoothing_log2(sides, rule)) * (1 + 1e-9)


def test_much_noise_is_less_than_with_the_factors_of_the_papers() -> None:
    """By what is really rounded, on the average over many."""
    ratios = []
    for seed in range(20):
        sides = around(np.random.default_rng(seed))
        papers = [smoothing_log2(sides, rule) for rule in (Rule(0.5, equalizes=True), Rule(0.5))]
        ratios.append(ONE_SCALE.loss(sides, equalized_log2(sides, ONE_SCALE)) /
                      min(ONE_SCALE.loss(sides, log2) for log2 in papers))  # fmt: skip
    assert np.median(ratios) < 0.85


def test_even_channels_are_left_alone() -> None:
    """Also those that are dead, and such as divide one side of a product and multiply the other."""
    ones = np.ones(8)
    spread = ChannelSpread(np.zeros(8), ones, ones)
    weight, channels = np.ones((8, 4), np.float32), np.arange(8)[:, None]
    for classes in (np.arange(1, 9), np.r_[np.arange(1, 5), -np.arange(1, 5)]):
        sides = Sides([Reader(spread, classes, weight, 1, channels)])
        assert not equalized_log2(sides, ONE_SCALE).any()
    dead = ChannelSpread(np.zeros(8), np.zeros(8), np.zeros(8))
    assert not equalized_log2(Sides([Reader(dead, np.arange(1, 9), weight, 1, channels)]), ONE_SCALE).any()
