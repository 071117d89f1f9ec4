"""What activations lose in four bits, and which range loses least."""

from __future__ import annotations

import json

from qcompile.calib.map_losses import MapLosses
from qcompile.calib.observers import Observer

LOSSES = MapLosses(0.001, {"a": {Observer.MSE: 0.004, Observer.MINMAX: 0.02}, "b": {Observer.PERCENTILE: 0.0005}})


def test_the_range_that_loses_least_counts() -> None:
    assert LOSSES.best("a") == (Observer.MSE, 0.003)
    # What a trial seems to gain is chance.
    assert LOSSES.best("b") == (Observer.PERCENTILE, 0.0)


def test_losses_go_through_json() -> None:
    assert MapLosses.from_json(json.loads(json.dumps(LOSSES.as_json()))) == LOSSES
    assert MapLosses.from_json(MapLosses().as_json()) == MapLosses()
