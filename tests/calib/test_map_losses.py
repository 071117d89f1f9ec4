"""What activations lose in four bits, and which range loses least."""

from __future__ import annotations

import json

import numpy as np

from qcompile.calib.map_losses import Clip, MapLosses
from qcompile.calib.observers import Histogram, Observer

MSE, HALF = Clip(Observer.MSE), Clip(Observer.MINMAX, 0.5)
LOSSES = MapLosses(0.001, {"a": {MSE: 0.004, HALF: 0.02}, "b": {Clip(Observer.PERCENTILE, 0.65): 0.0005}})


def test_the_range_that_loses_least_counts() -> None:
    assert LOSSES.best("a") == (MSE, 0.003)
    # What a trial seems to gain is chance.
    assert LOSSES.best("b") == (Clip(Observer.PERCENTILE, 0.65), 0.0)


def test_a_part_of_a_range() -> None:
    histogram = Histogram()
    histogram.add(np.float32([-2.0, 0.5, 4.0]))
    assert HALF.bounds(histogram, "int4") == (-1.0, 2.0) and Clip(Observer.MINMAX).bounds(histogram, "int4") == (-2, 4)
    assert [str(MSE), str(HALF)] == ["mse", "0.5 minmax"]
    assert [Clip.parse(text) for text in ("mse", "0.5 minmax")] == [MSE, HALF]


def test_losses_go_through_json() -> None:
    assert MapLosses.from_json(json.loads(json.dumps(LOSSES.as_json()))) == LOSSES
    assert MapLosses.from_json(MapLosses().as_json()) == MapLosses()
