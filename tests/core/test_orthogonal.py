from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcompile.core.orthogonal import Orthogonal, OrthogonalKind, keeping_ones

WIDTHS = (1, 2, 3, 4, 12, 15, 30, 52, 64, 96, 120, 384, 576)


@given(st.sampled_from(WIDTHS), st.integers(0, 9), st.booleans())
def test_orthogonal_in_float64(width: int, seed: int, keeps_ones: bool) -> None:
    matrix = Orthogonal.spreading(width, seed, keeps_ones=keeps_ones).matrix()
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(width), atol=1e-12)
    if keeps_ones:
        np.testing.assert_allclose(matrix.sum(axis=1), 1.0, atol=1e-12)
        np.testing.assert_allclose(matrix.sum(axis=0), 1.0, atol=1e-12)


def test_entries_of_a_hadamard_rotation() -> None:
    np.testing.assert_allclose(np.abs(Orthogonal.spreading(96, 1).matrix()), 1 / np.sqrt(96), atol=1e-15)


def test_keeping_ones_changes_little() -> None:
    """One channel still goes to all, none of which gets more than twice its share."""
    assert np.abs(Orthogonal.spreading(576, 1, keeps_ones=True).matrix()).max() < 2 / np.sqrt(576)


def test_seeds_differ_and_repeat() -> None:
    first, again, other = (Orthogonal.spreading(64, seed).matrix() for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_what_stands_where_no_hadamard_matrix_is() -> None:
    assert Orthogonal.spreading(12).block == 12
    assert Orthogonal.spreading(15).kind is Orthogonal.spreading(92).kind is OrthogonalKind.RANDOM
    blocks = Orthogonal.spreading(12, block=4).matrix()
    assert not blocks[:4, 4:].any() and blocks[:4, :4].all()


def test_a_block_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="divides 12 channels"):
        Orthogonal.spreading(12, block=8).matrix()


@pytest.mark.parametrize("keeps_ones", [False, True])
@pytest.mark.parametrize("width", [15, 24])
def test_json_and_back(width: int, keeps_ones: bool) -> None:
    drawn = Orthogonal.spreading(width, 3, keeps_ones=keeps_ones)
    for description in (drawn, Orthogonal.of(drawn.matrix(), keeps_ones=keeps_ones)):
        read = Orthogonal.from_json(json.loads(json.dumps(description.to_json())))
        assert read == description
        np.testing.assert_allclose(read.matrix(), drawn.matrix(), atol=1e-13)


def test_drawn_ones_are_small_in_json() -> None:
    assert len(json.dumps(Orthogonal.spreading(4096, 3).to_json())) < 200


def test_what_is_not_orthogonal_is_not_stored() -> None:
    with pytest.raises(ValueError, match="not orthogonal"):
        Orthogonal.of(2 * np.eye(3))
    with pytest.raises(ValueError, match="does not keep ones"):
        Orthogonal.of(-np.eye(3), keeps_ones=True)


def test_a_matrix_that_keeps_ones_stays() -> None:
    matrix = keeping_ones(np.linalg.qr(np.random.default_rng(0).normal(size=(9, 9)))[0])
    np.testing.assert_allclose(keeping_ones(matrix), matrix, atol=1e-12)


@given(st.sampled_from([4, 15, 24, 64]), st.integers(0, 99))
def test_layer_norm_commutes_with_a_rotation_that_keeps_ones(width: int, seed: int) -> None:
    """LN(xR) = LN(x)R; RMSNorm does with any."""
    x = np.random.default_rng(seed).normal(size=(5, width)) * 10

    def normalized(x: np.ndarray, centre: bool) -> np.ndarray:
        x = x - x.mean(axis=1, keepdims=True) * centre
        return x / np.sqrt((x**2).mean(axis=1, keepdims=True) + 1e-5)

    for centre in (True, False):
        r = Orthogonal.spreading(width, seed, keeps_ones=centre).matrix()
        np.testing.assert_allclose(normalized(x @ r, centre), normalized(x, centre) @ r, atol=1e-12)
    unkept = Orthogonal.spreading(width, seed).matrix()
    assert np.abs(normalized(x @ unkept, True) - normalized(x, True) @ unkept).max() > 1e-3
