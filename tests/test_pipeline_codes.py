"""Codes that were rounded come out of the cache as they went in."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from qcompile import pipeline


@pytest.mark.parametrize("dtype", [ml_dtypes.int4, np.int8, np.int16])
def test_codes_of_any_width_come_back_with_their_type(dtype):
    codes = {"w": np.array([[1, -8, 7]], dtype)}
    found = pipeline.CODES.decode(pipeline.CODES.encode(codes))
    assert found["w"].dtype == codes["w"].dtype
    np.testing.assert_array_equal(found["w"], codes["w"])
