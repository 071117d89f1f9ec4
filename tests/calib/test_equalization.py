"""Factors where weights have one scale: by the noise of all codes of all operators, for all channels together."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import scipy.optimize
from hypothesis import given
from hypothesis import strategies as st
from threadpoolctl import threadpool_limits

from qcompile.calib.collect import ChannelSpread
from qcompile.calib.equalization import LARGEST, Operator, equalized_log2
from qcompile.calib.smoothing import Reader, Rule, Scheme, Sides, Writer, smoothing_log2

Array = np.ndarray[Any, np.dtype[Any]]
ONE_SCALE = Scheme("uint8", "int8", False)
seeds = st.integers(0, 2**32 - 1)
COUNT = 24


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """As compiles do."""
    with threadpool_limits(1, user_api="blas"):
        yield


def chain(random: np.random.Generator, loud: float = 1.5) -> list[Operator]:
    """Build two products with a Relu between them, whose channels reach differently far."""
    x = random.normal(size=(64, 12))
    first = random.normal(size=(12, COUNT)) * np.exp(random.normal(0, loud, COUNT))
    values = np.maximum(x @ first, 0.0)
    second = random.normal(size=(COUNT, 8)) * np.exp(random.normal(0, loud / 2, (COUNT, 1)))
    numbers = np.arange(1, COUNT + 1)
    before = ChannelSpread(x.min(0), x.max(0), np.mean(x**2, 0))
    between = ChannelSpread(np.zeros(COUNT), values.max(0), np.mean(values**2, 0))
    reads = np.zeros(12, np.int64), numbers
    readers = [Reader(seen, classes, weight.astype(np.float32), 1, np.arange(len(weight))[:, None])
               for seen, classes, weight in zip((before, between), reads, (first, second), strict=True)]  # fmt: skip
    return [Operator(readers[0], numbers), Operator(readers[1], np.zeros(8, np.int64))]


def depthwise(random: np.random.Generator) -> Operator:
    """Build a convolution of each channel by itself, whose channels are divided on both sides, some of them not."""
    weight = random.normal(size=(COUNT, 1, 3, 3)).astype(np.float32)
    reach = np.exp(random.normal(0, 1, COUNT))
    read, written = np.arange(1, COUNT + 1), np.r_[0, np.arange(COUNT + 2, 2 * COUNT), -1]
    channels = np.arange(COUNT).reshape(-1, 1, 1, 1)
    return Operator(Reader(ChannelSpread(-reach / 3, reach, reach**2 / 8), read, weight, 0, channels), written, 0.3)


def estimate(operators: list[Operator], log2: Array) -> float:
    return sum(operator.noise(log2 * np.log(2.0), LARGEST, ONE_SCALE)[0] for operator in operators)


@given(seeds)
def test_noise_is_that_of_uniform_roundings(seed: int) -> None:
    """Step² for each number that is rounded, times what multiplies it, written out in float64."""
    random = np.random.default_rng(seed)
    first, second = chain(random)
    log2 = np.r_[0.0, random.integers(-16, 17, COUNT) / 8]
    s = np.exp2(log2[1:])
    w, x = first.reader.weight.astype(np.float64), first.reader.spread
    step = 2 * np.abs(w / s).max() / 255
    exact = step**2 * np.sum(x.power) * np.sum(s**2)
    exact += ((x.high.max() - x.low.min()) / 255) ** 2 * np.sum(w**2)
    assert estimate([first], log2) * first.reader.signal == pytest.approx(exact, rel=1e-3)
    w, x = second.reader.weight.astype(np.float64), second.reader.spread
    step = 2 * np.abs(w * s[:, None]).max() / 255
    exact = step**2 * np.sum(x.power / s**2) * 8 + (np.max(x.high / s) / 255) ** 2 * np.sum((s[:, None] * w) ** 2)
    assert estimate([second], log2) * second.reader.signal == pytest.approx(exact, rel=1e-3)


@given(seeds)
def test_a_depthwise_convolution_counts_its_own_channels(seed: int) -> None:
    random = np.random.default_rng(seed)
    operator = depthwise(random)
    log2 = np.r_[0.0, random.integers(-16, 17, 2 * COUNT) / 8]
    reader, factors = operator.reader, np.exp2(log2)
    s, t = factors[reader.classes], factors[np.abs(operator.written)] ** np.where(operator.written < 0, -1.0, 1.0)
    w, x = reader.weight.astype(np.float64)[:, 0], reader.spread
    step = 2 * np.abs(w * (s / t)[:, None, None]).max() / 255
    exact = step**2 * 9 * np.sum(x.power * (t / s) ** 2)
    exact += (np.max(x.high / s) / 255 - np.min(x.low / s) / 255) ** 2 * np.sum((s[:, None, None] * w) ** 2)
    assert estimate([operator], log2) == pytest.approx(0.3 * exact / reader.signal, rel=1e-3)


@given(seeds, st.sampled_from([8.0, 128.0]))
def test_derivatives_are_those_of_the_noise(seed: int, norm: float) -> None:
    random = np.random.default_rng(seed)
    logs = np.r_[0.0, random.normal(0, 0.3, 2 * COUNT)]
    for operator in (*chain(random), depthwise(random)):
        slopes = operator.noise(logs, norm, ONE_SCALE)[1]
        way = np.r_[0.0, random.normal(size=2 * COUNT)]
        noise = [operator.noise(logs + step * way, norm, ONE_SCALE)[0] for step in (-1e-3, 0.0, 1e-3)]
        rounding = 1e-2 * noise[1]  # the reach of weights is kept in float32, and p multiplies what that lacks
        assert (noise[2] - noise[0]) / 2e-3 == pytest.approx(float(slopes @ way), rel=0.05, abs=rounding)


@given(seeds)
def test_noise_is_less_than_with_the_factors_of_the_papers(seed: int) -> None:
    operators = chain(np.random.default_rng(seed))
    log2 = equalized_log2(operators, COUNT, ONE_SCALE)
    assert log2[0] == 0.0 and np.array_equal(8 * log2, np.rint(8 * log2))
    for rule in (Rule(0.5, equalizes=True), Rule(0.5)):
        assert estimate(operators, log2) <= estimate(operators, smoothing_log2(sides(operators), rule))
    assert estimate(operators, log2) < estimate(operators, np.zeros(COUNT + 1))


def sides(operators: list[Operator]) -> Sides:
    first, second = operators
    writer = Writer(first.reader.spread.power[:, None], first.written[None], first.reader.weight)
    return Sides([second.reader], [writer])


def test_much_noise_is_less_than_with_the_factors_of_the_papers() -> None:
    """By what is really rounded, on the average over many."""
    ratios = []
    for seed in range(20):
        operators = chain(np.random.default_rng(seed))
        papers = [smoothing_log2(sides(operators), rule) for rule in (Rule(0.5, equalizes=True), Rule(0.5))]
        ratios.append(ONE_SCALE.loss(sides(operators), equalized_log2(operators, COUNT, ONE_SCALE)) /
                      min(ONE_SCALE.loss(sides(operators), log2) for log2 in papers))  # fmt: skip
    assert np.median(ratios) < 0.85


@pytest.mark.parametrize("seed", range(3))
def test_no_other_factors_leave_less(seed: int) -> None:
    """Beside the least that a search without derivatives finds, from where it stopped and from others, by eighths."""
    random = np.random.default_rng(seed)
    operators = chain(random)
    found = estimate(operators, equalized_log2(operators, COUNT, ONE_SCALE))
    for start in (np.zeros(COUNT), random.normal(0, 1, COUNT)):
        best = scipy.optimize.minimize(lambda log2: np.log(estimate(operators, np.r_[0.0, log2])), start,
                                       method="Powell", options={"maxiter": 60})  # fmt: skip
        assert found < 1.05 * np.exp(best.fun)


def test_an_operator_whose_noise_counts_more_is_served_more() -> None:
    first, second = chain(np.random.default_rng(0))
    noise = []
    for gain in (0.01, 1.0, 100.0):
        log2 = equalized_log2([Operator(first.reader, first.written, gain), second], COUNT, ONE_SCALE)
        noise.append(estimate([first], log2))
    assert noise[0] > 1.2 * noise[1] > 1.44 * noise[2]


def test_even_channels_are_left_alone() -> None:
    """Also those that are dead, and such as divide one side of a product and multiply the other."""
    ones = np.ones(8)
    spread = ChannelSpread(np.zeros(8), ones, ones)
    weight, channels, none = np.ones((8, 4), np.float32), np.arange(8)[:, None], np.zeros(4, np.int64)
    for classes in (np.arange(1, 9), np.r_[np.arange(1, 5), -np.arange(1, 5)]):
        operator = Operator(Reader(spread, classes, weight, 1, channels), none)
        assert not equalized_log2([operator], 8, ONE_SCALE).any()
    dead = ChannelSpread(np.zeros(8), np.zeros(8), np.zeros(8))
    assert not equalized_log2([Operator(Reader(dead, np.arange(1, 9), weight, 1, channels), none)], 8, ONE_SCALE).any()
    assert not equalized_log2([], 8, ONE_SCALE).any()
