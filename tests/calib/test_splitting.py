from __future__ import annotations

import numpy as np
import pytest

from qcompile.calib.collect import ChannelSpread
from qcompile.calib.smoothing import Reader, Scheme
from qcompile.calib.splitting import ROOM, Pieces, pieces

CPU = Scheme("uint8", "int8", True)


def reader(high: np.ndarray, weight: np.ndarray, axis: int = 1) -> Reader:
    spread = ChannelSpread(np.full(high.size, -0.17), high, np.square(high) / 8.0)
    shape = (-1, 1) if axis else (1, -1)
    array = np.asarray(weight if axis else weight.T, np.float32)
    return Reader(spread, np.arange(1, high.size + 1), array, axis, np.arange(high.size).reshape(shape))


@pytest.mark.parametrize("copies", [0, 1, 3, 8, 20])
def test_the_bound_is_the_least_that_so_many_copies_suffice_for(random: np.random.Generator, copies: int) -> None:
    high = np.concatenate([random.uniform(1.0, 2.0, 40), [9.0, 6.5]])
    found = Pieces.of(high, copies)
    assert found.channels.size == found.log2.size <= copies

    def needed(end: float) -> int:
        return int(np.sum(np.ceil(high / end) - 1))

    assert needed(found.high * (1 + 1e-5)) <= copies < needed(found.high * (1 - 1e-5))


def test_all_that_was_seen_is_covered_and_more_where_there_is_room(random: np.random.Generator) -> None:
    high = np.concatenate([random.uniform(0.5, 2.0, 60), [6.0, 2.2, 2.1]])
    found = Pieces.of(high, 12)
    for channel in np.unique(found.channels):
        steep = np.exp2(found.log2[found.channels == channel])
        reach = found.high * (1.0 + np.sum(1.0 / steep))
        beyond = (reach - found.high) / (high[channel] - found.high)
        assert beyond >= 1.0 - 1e-5
        assert (steep == 1.0).all() or beyond >= ROOM - 1e-5
    assert np.exp2(found.log2).max() > 1.0


def test_channels_that_nothing_raises_are_not_split() -> None:
    found = Pieces.of(np.zeros(8), 4)
    assert found.channels.size == 0 and found.high == 0.0


@pytest.mark.parametrize("axis", [0, 1])
def test_the_noise_is_that_of_an_operator_with_the_pieces(random: np.random.Generator, axis: int) -> None:
    """What is estimated beside the channels that were there is what an operator that had them all along would have."""
    high = np.concatenate([random.uniform(1.0, 2.0, 63), [12.0]])
    weight = random.normal(size=(64, 16))
    one, found = reader(high, weight, axis), Pieces.of(high, 4)
    now = found.read_by(one)
    assert now.weight.shape[1 - axis] == 64 + found.channels.size
    np.testing.assert_allclose(now.spread.power.sum(), one.spread.power.sum())
    assert now.spread.high.max() <= found.high
    assert CPU.noise([now], [one]) < CPU.noise([one], [one]) / 4


def test_as_many_as_pay(random: np.random.Generator) -> None:
    """One of 64 channels sets the step of all; where all are alike, copies gain nothing."""
    weight = random.normal(size=(64, 16))
    far = np.concatenate([np.ones(63), [2.9]])
    found = pieces([reader(far, weight)], CPU)
    assert set(found.channels.tolist()) == {63} and found.high < 2.0
    assert pieces([reader(np.ones(64), weight)], CPU).channels.size == 0
