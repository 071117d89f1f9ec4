"""Models are timed in turns: who ran how often and when, never how long it took."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from qcompile import timing

FEEDS = [{"x": np.array([index])} for index in range(3)]


def watched(count):
    """Models that write down who ran on what."""
    runs = []
    return runs, [lambda feeds, index=index: runs.append((index, int(feeds["x"][0]))) for index in range(count)]


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_every_model_runs_once_a_round_on_the_same_input(count):
    runs, models = watched(count)
    times = timing.in_turns(models, FEEDS, budget=60.0, most=8)
    assert [len(of_model) for of_model in times] == [8] * count
    assert all(taken >= 0.0 for of_model in times for taken in of_model)
    measured = runs[2 * count :]
    for index in range(8):
        of_round = measured[index * count : (index + 1) * count]
        assert sorted(model for model, _ in of_round) == list(range(count))
        assert {sample for _, sample in of_round} == {index % len(FEEDS)}


@pytest.mark.parametrize("count", [2, 3, 5])
def test_all_models_take_turns_at_every_place(count):
    runs, models = watched(count)
    timing.in_turns(models, FEEDS, budget=60.0, most=2 * count)
    measured = [model for model, _ in runs[2 * count :]]
    for place in range(count):
        assert set(Counter(measured[place::count]).values()) == {2}


def test_settled_models_run_twice_and_once_counts():
    runs, models = watched(3)
    times = timing.in_turns(models, FEEDS, budget=60.0, most=4, settle=True)
    measured = runs[6:]
    assert [len(of_model) for of_model in times] == [4] * 3 and len(measured) == 24
    assert measured[::2] == measured[1::2]


def test_a_few_rounds_are_timed_whatever_they_take():
    _, models = watched(2)
    assert len(timing.in_turns(models, FEEDS, budget=0.0)[0]) == timing.FEWEST


def test_two_models_are_timed_against_each_other():
    runs, (reference, candidate) = watched(2)
    latency = timing.interleave(reference, candidate, FEEDS[:1])
    assert latency.rounds == (len(runs) - 4) / 2 <= timing.MOST
    assert latency.ratio == pytest.approx(latency.candidate_ms / latency.reference_ms)
