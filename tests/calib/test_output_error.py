from __future__ import annotations

import numpy as np
import pytest

from qcompile.calib.output_error import QUIET, OutputError, gain


def error_of(*noise: float) -> OutputError:
    error = OutputError()
    for power in noise:
        error.add({"y": np.array([1.0, -1.0])}, {"y": np.array([1.0 + power**0.5, -1.0 - power**0.5])})
    return error


def test_output_error_sums_outputs_each_relative_to_its_signal() -> None:
    error = OutputError()
    error.add({"a": np.array([3.0, 4.0]), "b": np.array([100.0])}, {"a": np.array([3.0, 5.0]), "b": np.array([90.0])})
    assert error.value == pytest.approx(1 / 25 + 100 / 10000, rel=2 * QUIET)


def test_output_error_lets_each_sample_count_alike() -> None:
    error = OutputError()
    for noise in (1e-4, 1e-4, 1e2):
        error.add({"y": np.array([1.0, -1.0])}, {"y": np.array([1.0 + noise**0.5, -1.0 - noise**0.5])})
    assert error.value == pytest.approx(1e-2, rel=0.01)
    assert error.total == pytest.approx((1e-4 + 1e-4 + 1e2) / 3, rel=0.01)


def test_output_error_in_decibels_is_the_mean_of_what_each_sample_says() -> None:
    error = error_of(1e-4, 1e-3, 1e-2)
    assert error.decibels == pytest.approx([40.0, 30.0, 20.0], abs=0.02)
    two = OutputError()
    for noise in (1e-4, 1e-2):
        two.add({"a": np.ones(2), "b": np.ones(2)}, {"a": np.ones(2) + noise**0.5, "b": np.ones(2) + 0.01})
    assert two.decibels.mean() == pytest.approx(-10 * np.log10(two.value))
    assert two.decibels[0] > two.decibels[1]


def test_the_gain_between_errors_is_paired_by_sample() -> None:
    better, uncertain = gain(error_of(1e-5, 1e-3, 1e-1), error_of(2e-5, 2e-3, 2e-1))
    assert better == pytest.approx(10 * np.log10(2), abs=0.01) and uncertain < 0.01
    better, uncertain = gain(error_of(1e-5, 1e-3, 1e-1), error_of(2e-1, 2e-3, 2e-5))
    assert better == pytest.approx(10 * np.log10(2), abs=0.1) and uncertain > 10
    assert gain(error_of(1e-3), error_of(1e-2))[1] == np.inf


def test_an_output_error_over_both_samples() -> None:
    joined = error_of(1e-4) + error_of(1e-2)
    assert joined.value == pytest.approx(error_of(1e-4, 1e-2).value)
    assert joined.noise["y"] == pytest.approx([1e-4, 1e-2])


def test_output_error_judges_a_silent_sample_by_the_others() -> None:
    error = OutputError()
    error.add({"y": np.array([0.0, 0.0])}, {"y": np.array([0.0, 0.001])})
    error.add({"y": np.array([1.0, 1.0])}, {"y": np.array([1.0, 1.001])})
    assert 0 < error.value < 1e-3


@pytest.mark.parametrize(
    ("reference", "candidate", "value"),
    [
        ([1.0, -np.inf], [1.0, -np.inf], 0.0),
        ([1.0, 2.0], [1.0, np.nan], np.inf),
        ([0.0, 0.0], [0.0, 0.1], np.inf),
        ([0.0, 0.0], [0.0, 0.0], 0.0),
    ],
)
def test_output_error_at_the_edges(reference: list[float], candidate: list[float], value: float) -> None:
    error = OutputError()
    error.add({"y": np.array(reference)}, {"y": np.array(candidate)})
    assert error.value == error.total == value
