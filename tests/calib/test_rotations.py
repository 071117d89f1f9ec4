from __future__ import annotations

import numpy as np
import pytest

from qcompile.calib.rotations import Reading, Scheme, choose, learn, noise, second_moments, spread_moments
from qcompile.core import numerics
from qcompile.core.orthogonal import Orthogonal, OrthogonalKind


def reading(seed: int = 0, rows: int = 512, width: int = 32, outputs: int = 48, outliers: bool = True) -> Reading:
    """Return correlated channels, three of which stand out, and weights of unequal rows."""
    random = np.random.default_rng(seed)
    x = random.normal(size=(rows, width)) * np.exp(0.7 * random.normal(size=width))
    if outliers:
        x[:, [3, 10, 20]] *= 25
    x = x @ (random.normal(size=(width, width)) * 0.15 + np.eye(width))
    return Reading(x, random.normal(size=(width, outputs)) * np.exp(0.4 * random.normal(size=(width, 1))))


def test_the_scheme_is_that_of_the_numerics() -> None:
    rows, weights = reading().rows.astype(np.float32), reading().weights.astype(np.float32)
    scale, zero = numerics.affine_scale(rows.min(), rows.max(), "uint8")
    codes = numerics.quantize(rows, scale, zero, "uint8")
    np.testing.assert_allclose(
        Scheme().activation(rows.astype(np.float64)), numerics.dequantize(codes, scale, zero), atol=float(scale) / 2
    )
    scale = numerics.symmetric_scale(np.abs(weights).max(axis=0), "int8")
    zeros = np.zeros(48, np.int64)
    codes = numerics.quantize(weights, scale, zeros, "int8", axis=1, symmetric=True)
    held = numerics.dequantize(codes, scale, zeros, axis=1)
    np.testing.assert_allclose(Scheme().weight(weights.astype(np.float64)), held, atol=float(scale.max()) / 2)


def test_noise_is_what_rounding_adds() -> None:
    one = reading()
    exact, r = one.rows @ one.weights, np.eye(32)
    rounded = Scheme(4, 4).activation(one.rows) @ Scheme(4, 4).weight(one.weights)
    expected = ((rounded - exact) ** 2).sum() / (exact**2).sum()
    assert noise([one], r, Scheme(4, 4)) == pytest.approx(expected)
    assert noise([one, one], r, Scheme(4, 4)) == pytest.approx(expected)
    assert noise([Reading(np.zeros((3, 32)), one.weights)], r, Scheme()) == 0.0


@pytest.mark.parametrize(("width", "block"), [(32, 32), (52, 4)])
def test_equal_moments_behind_klt_and_hadamard(width: int, block: int) -> None:
    moments = second_moments([reading(width=width)], width)
    r = spread_moments(moments, Orthogonal.spreading(width, 1, block=block)).matrix()
    found = np.diag(r.T @ moments @ r).reshape(-1, block)
    np.testing.assert_allclose(found, found[:, :1].repeat(block, axis=1), rtol=1e-9)
    # No block got the smallest moments alone.
    assert block == width or found.mean(axis=1).min() > 2 * np.linalg.eigvalsh(moments)[:block].mean()


@pytest.mark.parametrize("keeps_ones", [False, True])
def test_each_step_of_sophistication_pays_where_channels_stand_out(keeps_ones: bool) -> None:
    """As notes on the probe say: none > Hadamard > KLT·Hadamard >= learned."""
    readings = [reading(seed) for seed in range(3)]
    best, table = choose(readings, 32, Scheme(4, 4), keeps_ones=keeps_ones)
    assert table["none"] > 1.5 * table["hadamard"] > 1.5 * table["klt hadamard"] > 0
    assert min(table, key=lambda kind: table[kind]) in ("klt hadamard", "learned")
    assert best.kind is OrthogonalKind.STORED and best.keeps_ones is keeps_ones
    r = best.matrix()
    np.testing.assert_allclose(r @ r.T, np.eye(32), atol=1e-12)
    if keeps_ones:
        np.testing.assert_allclose(r.sum(axis=1), 1.0, atol=1e-9)


@pytest.mark.parametrize("keeps_ones", [False, True])
def test_learning_never_ends_worse_than_it_began(keeps_ones: bool) -> None:
    readings = [reading(7)]
    start = Orthogonal.spreading(32, 5, keeps_ones=keeps_ones)
    learned = learn(readings, start, Scheme(4, 4))
    assert noise(readings, learned.matrix(), Scheme(4, 4)) < noise(readings, start.matrix(), Scheme(4, 4))
    assert learn(readings, start, Scheme(4, 4), steps=0) is start


def test_the_same_choice_every_time() -> None:
    first, second = (choose([reading(1)], 32, Scheme(4, 4))[0] for _ in range(2))
    assert first == second


def test_heads_that_share_a_matrix_share_a_scale() -> None:
    """Two heads side by side, one ten times the other, are one tensor: R ⊕ R."""
    one, r = reading(), Orthogonal.spreading(16, 3).matrix()
    wide = np.kron(np.eye(2), r)
    assert noise([one], r, Scheme(4, 4)) == pytest.approx(noise([one], wide, Scheme(4, 4)))
    pulled = learn([one], Orthogonal.spreading(16, 3), Scheme(4, 4)).matrix()
    assert noise([one], pulled, Scheme(4, 4)) < noise([one], r, Scheme(4, 4))


def test_what_a_seed_describes_is_preferred() -> None:
    """Where all channels are alike, K·H is one more random rotation, and not worth its numbers."""
    random = np.random.default_rng(0)
    white = Reading(random.normal(size=(512, 32)), random.normal(size=(32, 48)))
    best, table = choose([white], 32, Scheme(), steps=0)
    assert best.kind is OrthogonalKind.HADAMARD
    assert table["klt hadamard"] == pytest.approx(table["hadamard"], rel=0.2)
