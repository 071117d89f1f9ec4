from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest

from qcompile.calib import moments
from qcompile.calib.moments import INPUT_REACH, REACH, Moments, estimate, known_moments

Array = np.ndarray
Model = Callable[..., ir.Model]

NORMALIZED = """(float[1, 3, 8, 8] x) => (float[1, 6, 8, 8] y)
{ c = Conv <pads = [1, 1, 1, 1]> (x, w) n = BatchNormalization (c, gamma, beta, mean, variance) y = Relu (n) }"""


def weights(random: np.random.Generator, filters: int = 6, channels: int = 3) -> dict[str, Array]:
    f32 = np.float32
    return {
        "w": random.normal(size=(filters, channels, 3, 3)).astype(f32),
        "gamma": random.normal(size=filters).astype(f32),
        "beta": random.normal(size=filters).astype(f32),
        "mean": random.normal(size=filters).astype(f32),
        "variance": np.full(filters, 30.0, f32),
    }


# What a normalization tells of its result.


def test_a_normalized_result_has_shift_and_scale(model_of: Model, random: np.random.Generator) -> None:
    arrays = weights(random)
    found = known_moments(model_of(NORMALIZED, **arrays))["n"]
    np.testing.assert_allclose(found.mean, arrays["beta"])
    np.testing.assert_allclose(found.deviation, np.abs(arrays["gamma"]))
    assert found.reach == REACH


def test_parameters_in_constants_behind_identity_are_found(model_of: Model, random: np.random.Generator) -> None:
    text = """(float[1, 2, 8, 8] x) => (float[1, 2, 8, 8] n) {
        gamma = Constant <value = float[2] {2, 3}> ()
        g = Identity (gamma)
        n = BatchNormalization (x, g, beta, mean, variance)
    }"""
    arrays = {name: array for name, array in weights(random, 2).items() if name not in ("w", "gamma")}
    assert known_moments(model_of(text, **arrays))["n"].deviation.tolist() == [2.0, 3.0]


@pytest.mark.parametrize(
    "text",
    [
        "(float[1, 6, 8, 8] x, float[6] gamma) => (float[1, 6, 8, 8] n)"
        " { n = BatchNormalization (x, gamma, beta, mean, variance) }",
        "(float[1, 6, 8, 8] x) => (float[1, 6, 8, 8] n)"
        " { g = Abs (gamma) n = BatchNormalization (x, g, beta, mean, variance) }",
        "(float[1, 6, 8, 8] x) => (float[1, 6, 8, 8] n)"
        " { n, a, b = BatchNormalization <training_mode = 1> (x, gamma, beta, mean, variance) }",
    ],
    ids=["replaceable", "computed", "training"],
)
def test_nothing_is_known_of_others(model_of: Model, random: np.random.Generator, text: str) -> None:
    arrays = {name: array for name, array in weights(random).items() if f"{name}) =>" not in text and name != "w"}
    assert known_moments(model_of(text, **arrays)) == {}


# What it tells of the input.


def correlated(random: np.random.Generator, mean: float, deviation: float, smooth: int) -> Array:
    """Return [samples, channels, h, w] with these moments, each element an average of smooth² that neighbours share."""
    side = 40 + smooth - 1
    noise = random.normal(size=(24, 3, side, side)) + random.normal(size=(24, 1, side, side))
    windows = np.lib.stride_tricks.sliding_window_view(noise, (smooth, smooth), axis=(2, 3)).mean(axis=(-1, -2))
    return np.asarray((windows - windows.mean()) / windows.std() * deviation + mean)


def convolved(images: Array, filters: Array) -> tuple[Array, Array]:
    windows = np.lib.stride_tricks.sliding_window_view(images, filters.shape[2:], axis=(2, 3))
    results = np.einsum("nchwpq,fcpq->fnhw", windows, filters)
    return results.mean(axis=(1, 2, 3)), results.var(axis=(1, 2, 3))


@pytest.mark.parametrize("smooth", [1, 3, 8])
@pytest.mark.parametrize(("mean", "deviation"), [(120.0, 60.0), (0.0, 1.0), (0.5, 0.25)])
def test_an_inputs_moments_are_recovered(
    random: np.random.Generator, mean: float, deviation: float, smooth: int
) -> None:
    filters = random.normal(size=(16, 3, 3, 3))
    found = estimate(filters, *convolved(correlated(random, mean, deviation, smooth), filters))
    assert found is not None
    assert abs(found.mean[0] - mean) < 0.1 * deviation
    assert 0.75 < found.deviation[0] / deviation < 1.33


def test_bytes_get_a_range_within_a_factor_of_two(random: np.random.Generator) -> None:
    images = np.clip(correlated(random, 125.0, 65.0, 6), 0, 255).round()
    filters = random.normal(size=(8, 3, 3, 3))
    found = estimate(filters, *convolved(images, filters))
    assert found is not None
    low, high = (found.mean[0] + sign * INPUT_REACH * found.deviation[0] for sign in (-1, 1))
    assert low <= 0 and high >= 255 and high - low < 2 * 255


def test_filters_that_tell_nothing_are_no_evidence(random: np.random.Generator) -> None:
    filters, ones = random.normal(size=(16, 3, 3, 3)), np.ones(16)
    assert estimate(filters[:3], ones[:3], ones[:3]) is None
    assert estimate(filters, 0 * ones, np.logspace(-2, 6, 16)) is None
    assert estimate(0 * filters, 0 * ones, ones) is None
    assert estimate(filters, 0 * ones, 0 * ones) is None


def test_the_input_is_found_behind_what_moves_elements(model_of: Model, random: np.random.Generator) -> None:
    arrays = weights(random)
    text = NORMALIZED.replace("1, 3, 8, 8", "1, 8, 8, 3").replace(
        "{ c", "{ t = Transpose <perm = [0, 3, 1, 2]> (x) c"
    ).replace("(x, w)", "(t, w)")  # fmt: skip
    plain, moved = (known_moments(model_of(body, **arrays)) for body in (NORMALIZED, text))
    assert set(plain) == set(moved) == {"x", "n"} and plain["x"] == moved["x"]


@pytest.mark.parametrize(
    "before",
    ["{ s = Sigmoid (x) c = Conv <pads = [1, 1, 1, 1]> (s, w)", "{ c = Conv <pads = [1, 1, 1, 1], group = 3> (x, w)"],
)
def test_the_input_in_front_of_others_is_not_told(model_of: Model, random: np.random.Generator, before: str) -> None:
    arrays = weights(random, channels=1 if "group" in before else 3)
    model = model_of(NORMALIZED.replace("{ c = Conv <pads = [1, 1, 1, 1]> (x, w)", before), **arrays)
    assert set(known_moments(model)) == {"n"}


# Values brought to moments.


@pytest.mark.parametrize("channels", [4, 1])
@pytest.mark.parametrize("block", [moments.BLOCK, 30_000])
def test_values_are_brought_to_mean_deviation_and_reach(
    random: np.random.Generator, monkeypatch: pytest.MonkeyPatch, channels: int, block: int
) -> None:
    monkeypatch.setattr(moments, "BLOCK", block)
    wanted = Moments(random.normal(size=channels), random.uniform(0.5, 2.0, channels), 6.0)
    arrays = list(random.gamma(2.0, size=(8, 1, 4, 40, 40)).astype(np.float32) * 30 + 7)
    before = np.stack(arrays)
    wanted.bring(arrays, random)
    after, over = np.stack(arrays), (0, 1, 3, 4) if channels == 4 else (0, 1, 2, 3, 4)
    assert after.dtype == np.float32 and np.corrcoef(before[:, :, 0].ravel(), after[:, :, 0].ravel())[0, 1] > 0.98
    np.testing.assert_allclose(after.mean(axis=over), np.squeeze(wanted.mean), atol=0.05)
    np.testing.assert_allclose(after.std(axis=over), np.squeeze(wanted.deviation), rtol=0.05)
    np.testing.assert_allclose(after.max(axis=over), np.squeeze(wanted.mean + 6 * wanted.deviation), rtol=1e-5)
    np.testing.assert_allclose(after.min(axis=over), np.squeeze(wanted.mean - 6 * wanted.deviation), rtol=1e-5)


def test_a_dead_channel_becomes_noise(random: np.random.Generator) -> None:
    arrays = [np.full((1, 2, 30, 30), 5.0, np.float32) for _ in range(4)]
    Moments(np.array([1.0, -1.0]), np.array([2.0, 0.0]), 6.0).bring(arrays, random)
    found = np.concatenate(arrays)
    assert abs(float(found[:, 0].mean()) - 1.0) < 0.2 and abs(float(found[:, 0].std()) - 2.0) < 0.2
    assert np.all(found[:, 1] == -1.0)
