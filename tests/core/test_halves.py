"""Halves: what they hold, and how far off what they cannot hold is."""

from __future__ import annotations

import hypothesis.extra.numpy as arrays
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from qcompile.core import halves

#: The largest of them decides on the power of two, so that one has to be far from the end of what float32 holds.
SINGLES = st.lists(st.floats(-(2.0**80), 2.0**80, width=32), min_size=1).filter(lambda x: max(map(abs, x)) > 2.0**-80)
STEPS = st.floats(2.0**-100, 2.0**100, width=32)


@given(SINGLES.map(np.float32))
def test_the_nearest_can_be_packed_and_is_near(values: np.ndarray) -> None:
    rounded = halves.nearest(values)
    packed = halves.packed(rounded)
    assert packed is not None
    assert np.array_equal(np.ldexp(packed[0].astype(np.float64), packed[1]), rounded)
    bound = np.maximum(np.abs(np.float64(values)) * 2.0**-11, np.max(np.abs(values)) * 2.0**-39)
    assert np.all(np.abs(np.float64(rounded) - values) <= bound)


@given(arrays.arrays(np.float32, st.integers(1, 40), elements=STEPS))
def test_what_is_above_is_above_by_less_than_a_thousandth(values: np.ndarray) -> None:
    raised = np.float64(halves.above(values))
    assert np.all(raised >= values) and np.all(raised < np.float64(values) * (1.0 + 2.0**-10))


@given(arrays.arrays(np.float32, st.integers(1, 40), elements=st.floats(2.0**-12, 2.0**14, width=32)))
def test_what_is_above_can_be_packed(values: np.ndarray) -> None:
    raised = halves.above(values)
    packed = halves.packed(raised)
    assert packed is not None
    assert np.array_equal(np.ldexp(packed[0].astype(np.float64), packed[1]), raised)


def test_no_power_where_none_is_needed() -> None:
    found = halves.packed(np.float32([0.5, 3.0, 2.0**-20]))
    assert found is not None and found[1] == 0


def test_more_digits_more_range_and_what_is_no_number_are_left_alone() -> None:
    assert halves.packed(np.float32([1.0, 1.0 + 2.0**-11])) is None
    assert halves.packed(np.float32([1.0, 2.0**-60])) is None
    assert halves.packed(np.float32([1.0, np.inf])) is None
    assert halves.packed(np.float32([2.0**-120, 2.0**-121])) is None, "its power of two is none that can be relied on"
