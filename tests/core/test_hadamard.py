from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcompile.core.hadamard import hadamard, largest_block

#: Multiples of four up to 200 that need a construction which is not here: Williamson's, or fields of prime powers.
MISSING = {52, 92, 100, 116, 156, 172, 184, 188}


@given(st.integers(1, 640))
def test_rows_of_signs_are_orthogonal(order: int) -> None:
    matrix = hadamard(order)
    if matrix is None:
        return
    wide = matrix.astype(np.int64)
    assert set(np.unique(wide)) <= {-1, 1}
    np.testing.assert_array_equal(wide @ wide.T, order * np.eye(order, dtype=np.int64))


def test_which_orders_there_are() -> None:
    built = {order for order in range(1, 201) if hadamard(order) is not None}
    assert built == {1, 2, *range(4, 201, 4)} - MISSING


@pytest.mark.parametrize(
    ("order", "construction"),
    [(64, "Sylvester"), (12, "Paley I, q = 11"), (20, "q = 19"), (24, "q = 23"), (44, "q = 43"),
     (28, "Paley II, q = 13"), (36, "Paley II, q = 17"), (576, "8 x 72"), (768, "2 x 384"), (1536, "4 x 384")],
)  # fmt: skip
def test_orders_that_models_have(order: int, construction: str) -> None:
    matrix = hadamard(order)
    assert matrix is not None, construction
    assert matrix.shape == (order, order) and not matrix.flags.writeable


@pytest.mark.parametrize(("width", "block"), [(64, 64), (52, 4), (120, 120), (15, 1), (30, 2), (92, 4)])
def test_the_largest_block_that_divides_a_width(width: int, block: int) -> None:
    assert largest_block(width) == block
