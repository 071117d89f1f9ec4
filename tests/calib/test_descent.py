from __future__ import annotations

import numpy as np
import pytest

from qcompile.calib.descent import Tried, descend
from qcompile.calib.observers import Observer
from qcompile.calib.output_error import OutputError

MINMAX, MSE = Observer.MINMAX, Observer.MSE


def error_of(*noise: float, other: float | None = None) -> OutputError:
    """Return the error of one output, or of two, with this noise on samples of power 1."""
    error = OutputError()
    for power in noise:
        reference, candidate = {"y": np.ones(1)}, {"y": np.ones(1) + power**0.5}
        if other is not None:
            reference["z"], candidate["z"] = np.ones(1), np.ones(1) + other**0.5
        error.add(reference, candidate)
    return error


def choice(weights: OutputError, **alone: dict[Observer, OutputError]) -> dict[str, Observer]:
    return descend(MSE, Tried(alone, weights))


def test_a_tensor_takes_the_observer_that_lessens_the_noise() -> None:
    better, worse = error_of(1e-4, 1e-4), error_of(1e-2, 1e-2)
    found = choice(error_of(1e-5, 1e-5), g={MINMAX: better, MSE: worse}, h={MINMAX: worse, MSE: better})
    assert found == {"g": MINMAX, "h": MSE}


def test_equal_observers_leave_the_one_to_start_from() -> None:
    assert choice(error_of(1e-5), h={MINMAX: error_of(1e-3), MSE: error_of(1e-3)}) == {"h": MSE}


def test_a_tensor_counts_where_it_adds_to_what_others_do() -> None:
    """Alone g does better by minmax, which loses less on three samples of four; but there h drowns it."""
    g = {MINMAX: error_of(1e-7, 1e-7, 1e-7, 1e-2), MSE: error_of(1e-5, 1e-5, 1e-5, 1e-4)}
    assert g[MINMAX].value < g[MSE].value
    loud = error_of(1e-2, 1e-2, 1e-2, 1e-4)
    assert choice(error_of(*[1e-9] * 4), g=g) == {"g": MINMAX}
    assert choice(error_of(*[1e-9] * 4), g=g, h={MSE: loud})["g"] is MSE
    assert choice(loud, g=g) == {"g": MSE}, "so do the weights"


def test_outputs_are_summed() -> None:
    """Minmax halves the noise of the good output and doubles that of the bad one."""
    h = {MINMAX: error_of(0.5e-4, 0.5e-4, other=2e-2), MSE: error_of(1e-4, 1e-4, other=1e-2)}
    assert choice(error_of(0.0, 0.0, other=0.0), h=h) == {"h": MSE}


@pytest.mark.parametrize("lost", [np.inf, np.nan])
def test_what_drives_an_output_to_infinity_is_left(lost: float) -> None:
    with np.errstate(invalid="ignore"):
        spoilt = error_of(lost, 1e-9)
    assert choice(error_of(1e-9, 1e-9), h={MINMAX: error_of(1.0, 1.0), MSE: spoilt}) == {"h": MINMAX}


def test_a_tensor_that_reaches_no_output_stays_as_it_is() -> None:
    found = choice(
        error_of(1e-5), h={MINMAX: OutputError(), MSE: OutputError()}, g={MINMAX: error_of(1e-3), MSE: error_of(1.0)}
    )
    assert found == {"h": MSE, "g": MINMAX}


def test_nothing_was_tried() -> None:
    assert choice(error_of(1e-5)) == {}


def test_what_was_found_on_two_parts_is_joined() -> None:
    one, other = (
        Tried({"h": {MSE: error_of(1e-2)}}, error_of(1e-3)),
        Tried({"h": {MSE: error_of(1e-4)}}, error_of(1e-5)),
    )
    both = one + other
    assert both.alone["h"][MSE].noise["y"] == pytest.approx([1e-2, 1e-4])
    assert both.weights.noise["y"] == pytest.approx([1e-3, 1e-5])
