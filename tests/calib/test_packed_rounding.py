from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from qcompile.calib.packed_rounding import descend, factor_of_inverse, fit_multiples
from qcompile.core import packing

LIMITS = (packing.LOWEST, packing.HIGHEST)


def correlated(generator: np.random.Generator, n: int) -> np.ndarray:
    """Return second moments of inputs that go together."""
    few = max(1, n // 3)
    rows = generator.normal(size=(20, few)) @ generator.normal(size=(few, n))
    moments = rows.T @ rows / 20
    return moments + 0.1 * moments.diagonal().mean() * np.eye(n)


def error(codes: np.ndarray, scaled: np.ndarray, moments: np.ndarray) -> np.ndarray:
    return np.einsum("im,ij,jm->m", codes - scaled, moments, codes - scaled)


def nearest(scaled: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Round each block by the multiple of least squared error, one by one."""
    codes, multiple = np.empty_like(scaled), np.empty_like(scaled)
    for start in range(0, len(scaled), length):
        for column in range(scaled.shape[1]):
            at = slice(start, start + length), column
            found = [np.clip(np.rint(scaled[at] / one), *LIMITS) * one for one in range(1, packing.MOST + 1)]
            best = int(np.argmin([np.square(one - scaled[at]).sum() for one in found]))
            codes[at], multiple[at] = found[best], best + 1
    return codes, multiple


@given(st.integers(1, 12), st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_coordinate_descent_only_comes_nearer_and_stops_at_no_better_neighbour(n: int, m: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    scaled, multiple = generator.normal(0, 20, (n, m)), generator.integers(1, 16, (n, m)).astype(np.float64)
    moments = correlated(generator, n)
    start = np.clip(np.rint(scaled / multiple), *LIMITS) * multiple

    def errors(codes: np.ndarray) -> np.ndarray:
        return error(codes, scaled, moments)

    found = descend(start, scaled, moments, LIMITS, multiple)
    assert (errors(found) <= errors(start) * (1 + 1e-12)).all()
    numbers = found / multiple
    np.testing.assert_array_equal(numbers, np.rint(numbers))
    assert numbers.min() >= LIMITS[0] and numbers.max() <= LIMITS[1]
    settled = found
    for _ in range(50):
        settled = descend(settled, scaled, moments, LIMITS, multiple)
    for row in range(n):
        for step in (-1, 1):
            other = settled.copy()
            other[row] += step * multiple[row]
            fits = (other[row] / multiple[row] >= LIMITS[0]) & (other[row] / multiple[row] <= LIMITS[1])
            assert (errors(other)[fits] >= errors(settled)[fits] * (1 - 1e-9)).all()


@given(st.integers(1, 20), st.integers(1, 6), st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_blocks_take_another_multiple_only_where_the_result_comes_nearer(
    n: int, length: int, m: int, seed: int
) -> None:
    generator = np.random.default_rng(seed)
    scaled, moments = generator.normal(0, 25, (n, m)), correlated(generator, n)
    start, before = nearest(scaled, length)
    codes, multiple = fit_multiples(start, scaled, moments, LIMITS, before, length)
    assert (error(codes, scaled, moments) <= error(start, scaled, moments) * (1 + 1e-9)).all()
    for at in range(0, n, length):
        assert (multiple[at : at + length] == multiple[at]).all()
    numbers = codes / multiple
    np.testing.assert_array_equal(numbers, np.rint(numbers))
    assert numbers.min() >= LIMITS[0] and numbers.max() <= LIMITS[1]
    assert multiple.min() >= 1 and multiple.max() <= packing.MOST


@given(st.integers(1, 20), st.integers(1, 6), st.integers(0, 2**32 - 1))
def test_of_inputs_that_have_nothing_in_common_it_finds_the_best_multiple(n: int, length: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    scaled, moments = generator.normal(0, 25, (n, 3)), np.eye(n)
    worst = np.full_like(scaled, packing.MOST)
    start = np.clip(np.rint(scaled / worst), *LIMITS) * worst
    codes, _ = fit_multiples(start, scaled, moments, LIMITS, worst, length)
    np.testing.assert_allclose(error(codes, scaled, moments), error(nearest(scaled, length)[0], scaled, moments))


def test_multiples_that_are_chosen_by_the_result_leave_less_error_than_those_of_the_weights(
    random: np.random.Generator,
) -> None:
    scaled, moments = random.normal(0, 25, (96, 64)), correlated(random, 96)
    start, before = nearest(scaled, packing.BLOCK)
    alone = descend(start, scaled, moments, LIMITS, before)
    codes, multiple = fit_multiples(start, scaled, moments, LIMITS, before, packing.BLOCK)
    both = descend(codes, scaled, moments, LIMITS, multiple)
    assert error(both, scaled, moments).sum() < 0.99 * error(alone, scaled, moments).sum()


@given(st.integers(1, 12), st.integers(0, 2**32 - 1))
def test_the_factor_is_upper_and_gives_the_inverse(n: int, seed: int) -> None:
    moments = correlated(np.random.default_rng(seed), n)
    upper = factor_of_inverse(moments)
    np.testing.assert_array_equal(np.tril(upper, -1), 0.0)
    np.testing.assert_allclose(upper.T @ upper @ moments, np.eye(n), atol=1e-8)
