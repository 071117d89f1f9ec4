import math
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qcompile.core import numerics, runtime

DTYPES = ("uint8", "int8", "uint16", "int16")
EVERY_DTYPE = pytest.mark.parametrize("dtype", DTYPES)

ordinary = st.floats(-1e6, 1e6, width=32, allow_subnormal=False)
finite = st.floats(allow_nan=False, allow_infinity=False, width=32)
arrays = hnp.arrays(np.float32, st.integers(1, 40), elements=ordinary)


def affine(low: float, high: float, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    return numerics.affine_scale(np.float64([low]), np.float64([high]), dtype)


@pytest.mark.parametrize(
    ("dtype", "full", "symmetric"),
    [
        ("uint8", (0, 255), (0, 255)),
        ("int8", (-128, 127), (-127, 127)),
        ("uint16", (0, 65535), (0, 65535)),
        ("int16", (-32768, 32767), (-32767, 32767)),
        ("int32", (-(2**31), 2**31 - 1), (-(2**31) + 1, 2**31 - 1)),
    ],
)
def test_code_range(dtype: str, full: tuple[int, int], symmetric: tuple[int, int]) -> None:
    assert numerics.code_range(dtype) == full
    assert numerics.code_range(dtype, symmetric=True) == symmetric


@given(x=arrays, dtype=st.sampled_from(DTYPES))
def test_round_trip_is_off_by_half_a_step_at_most(x: np.ndarray, dtype: str) -> None:
    scale, zero_point = affine(x.min(), x.max(), dtype)
    restored = numerics.dequantize(numerics.quantize(x, scale, zero_point, dtype), scale, zero_point)
    # Half a step of rounding. The zero point is rounded too, which shifts the codes' range by up to half a step: the
    # ends saturate that far beyond. The second term is float32's own rounding of quotient and product.
    inside = (x >= np.float64(scale[0]) * (numerics.code_range(dtype)[0] - zero_point[0])) & (
        x <= np.float64(scale[0]) * (numerics.code_range(dtype)[1] - zero_point[0])
    )
    allowed = np.where(inside, 0.5, 1.0) * np.float64(scale[0]) + 4 * np.spacing(np.abs(x)).astype(np.float64)
    assert np.all(np.abs(restored.astype(np.float64) - x) <= allowed)


@given(x=finite, scale=st.floats(2.0**-10, 2.0**10, width=32), dtype=st.sampled_from(DTYPES), data=st.data())
def test_codes_saturate(x: float, scale: float, dtype: str, data: st.DataObject) -> None:
    qmin, qmax = numerics.code_range(dtype)
    zero = data.draw(st.integers(qmin, qmax))
    code = int(numerics.quantize(np.float32([x]), np.float32([scale]), np.array([zero]), dtype)[0])
    with np.errstate(over="ignore"):
        exact = float(np.rint(np.float32(x) / np.float32(scale))) + zero
    assert code == min(max(exact, qmin), qmax)


def test_symmetric_saturation_leaves_the_lowest_code_out() -> None:
    x = np.float32([-200.0, -128.0, -127.0, 127.0, 200.0])
    one, zero = np.ones(1, np.float32), np.zeros(1, np.int64)
    assert numerics.quantize(x, one, zero, "int8").tolist() == [-128, -128, -127, 127, 127]
    assert numerics.quantize(x, one, zero, "int8", symmetric=True).tolist() == [-127, -127, -127, 127, 127]


def test_halves_go_to_the_even_code() -> None:
    x = np.float32([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 3.5])
    codes = numerics.quantize(x, np.ones(1, np.float32), np.array([0]), "int8")
    assert codes.tolist() == [-2, -2, 0, 0, 2, 2, 4]


def test_the_zero_point_is_added_after_rounding() -> None:
    # With an odd zero point, rounding the sum instead of the quotient would give 2 for 0.5.
    assert numerics.quantize(np.float32([0.5, 1.5]), np.ones(1, np.float32), np.array([1]), "uint8").tolist() == [1, 3]


@given(low=finite, high=finite, dtype=st.sampled_from(DTYPES))
def test_real_zero_has_a_code(low: float, high: float, dtype: str) -> None:
    assume(low <= high and high - low < 3e38)
    scale, zero_point = affine(low, high, dtype)
    qmin, qmax = numerics.code_range(dtype)
    assert np.isfinite(scale).all() and scale[0] > 0
    assert qmin <= zero_point[0] <= qmax
    code = numerics.quantize(np.zeros(1, np.float32), scale, zero_point, dtype)
    assert numerics.dequantize(code, scale, zero_point).tolist() == [0.0]


@given(high=st.floats(2.0**-60, 2.0**60, width=32), dtype=st.sampled_from(DTYPES))
def test_a_range_from_zero_has_the_lowest_code_as_zero_point(high: float, dtype: str) -> None:
    qmin, qmax = numerics.code_range(dtype)
    assert affine(0.0, high, dtype)[1] == [qmin]
    assert affine(high / 2, high, dtype)[1] == [qmin], "a range above zero is widened to hold it"
    assert affine(-high, 0.0, dtype)[1] == [qmax]
    assert affine(-high, -high / 2, dtype)[1] == [qmax]
    step = np.float32(high / (qmax - qmin))
    assert affine(high / 2, high, dtype)[0] == affine(-high, -high / 2, dtype)[0] == [step]


@given(low=finite, high=finite, dtype=st.sampled_from(DTYPES))
def test_ranges_in_float32_are_subtracted_in_float64(low: float, high: float, dtype: str) -> None:
    expected = affine(low, high, dtype)
    found = numerics.affine_scale(np.float32([low]), np.float32([high]), dtype)
    for one, other in zip(expected, found, strict=True):
        np.testing.assert_array_equal(one, other, strict=True)
    assert found[0].dtype == np.float32 and found[1].dtype == np.int64


@EVERY_DTYPE
def test_both_ends_of_a_range_are_reached(dtype: str) -> None:
    scale, zero_point = affine(-1.0, 3.0, dtype)
    assert tuple(numerics.quantize(np.float32([-1.0, 3.0]), scale, zero_point, dtype)) == numerics.code_range(dtype)


@EVERY_DTYPE
@pytest.mark.parametrize("width", [0.0, 1e-45, 1e-40, 1.1754944e-38])
def test_a_range_without_width_gets_a_scale_that_can_be_divided_by(width: float, dtype: str) -> None:
    scale, zero_point = affine(0.0, width, dtype)
    assert scale[0] == 1.0
    codes = numerics.quantize(np.float32([0.0, width]), scale, zero_point, dtype)
    assert numerics.dequantize(codes, scale, zero_point).tolist() == [0.0, 0.0]


def test_the_smallest_scale_that_is_kept_has_a_float32_reciprocal() -> None:
    scale = numerics.symmetric_scale(np.float64([127 * numerics.SMALLEST_SCALE]), "int8")
    assert scale[0] == np.float32(numerics.SMALLEST_SCALE)
    assert np.isfinite(np.float32(1.0) / scale[0])


def test_symmetric_scale_maps_the_peak_to_the_highest_code() -> None:
    absmax = np.float32([0.0, 0.5, 127.0, 1e30])
    scale = numerics.symmetric_scale(absmax, "int8")
    assert scale.dtype == np.float32
    assert scale[0] == 1.0 and scale[2] == 1.0
    zeros = np.zeros(4, np.int64)
    assert numerics.quantize(absmax, scale, zeros, "int8", axis=0).tolist() == [0, 127, 127, 127]
    assert numerics.quantize(-absmax, scale, zeros, "int8", axis=0).tolist() == [0, -127, -127, -127]


def test_the_peak_of_any_type_of_float_is_divided_in_float64() -> None:
    absmax = [0.1001, 3.0, 60000.0]
    half = np.float16(absmax)
    np.testing.assert_array_equal(
        numerics.symmetric_scale(half, "int8"), (half.astype(np.float64) / 127).astype(np.float32), strict=True
    )


def test_a_scalar_stays_one() -> None:
    codes = numerics.quantize(np.array(3.0, np.float32), np.float32([2.0]), np.array([1]), "uint8")
    assert codes.shape == () and int(codes) == 3
    assert numerics.dequantize(codes, np.float32([2.0]), np.array([1])).shape == ()


def test_values_of_float64_count_as_float32() -> None:
    x = np.float64([3.5 - 2.0**-40])
    assert numerics.quantize(x, np.ones(1, np.float32), np.array([0]), "int8").tolist() == [4]
    assert numerics.quantize(x, np.ones(1, np.float32), np.array([0]), "int32").tolist() == [3], "but for biases"


@given(
    x=hnp.arrays(np.float32, hnp.array_shapes(min_dims=2, max_dims=4, max_side=4), elements=ordinary),
    dtype=st.sampled_from(DTYPES),
    data=st.data(),
)
def test_per_axis_equals_each_slice_per_tensor(x: np.ndarray, dtype: str, data: st.DataObject) -> None:
    axis = data.draw(st.integers(-x.ndim, x.ndim - 1))
    channels = x.shape[axis]
    scale = data.draw(hnp.arrays(np.float32, channels, elements=st.floats(0.125, 1000, width=32)))
    zero_point = data.draw(hnp.arrays(np.int64, channels, elements=st.integers(*numerics.code_range(dtype))))
    codes = numerics.quantize(x, scale, zero_point, dtype, axis)
    restored = numerics.dequantize(codes, scale, zero_point, axis)
    assert codes.dtype == dtype and codes.shape == x.shape
    for i in range(channels):
        one = numerics.quantize(np.take(x, i, axis), scale[i : i + 1], zero_point[i : i + 1], dtype)
        np.testing.assert_array_equal(np.take(codes, i, axis), one)
        back = numerics.dequantize(one, scale[i : i + 1], zero_point[i : i + 1])
        np.testing.assert_array_equal(np.take(restored, i, axis), back)


def quantizing_model(dtype: str, scale: np.ndarray, zero_point: np.ndarray, axis: int | None, back: bool) -> ir.Model:
    """One QuantizeLinear or DequantizeLinear as ONNX Runtime sees it, at opset 21, where 16 bits are standard."""
    single, code = onnx.TensorProto.FLOAT, onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    shape = () if axis is None else scale.shape
    parameters = [
        onnx.numpy_helper.from_array(scale.reshape(shape), "scale"),
        onnx.numpy_helper.from_array(zero_point.astype(dtype).reshape(shape), "zero_point"),
    ]
    attributes = {} if axis is None else {"axis": axis}
    op_type = "DequantizeLinear" if back else "QuantizeLinear"
    node = onnx.helper.make_node(op_type, ["x", "scale", "zero_point"], ["y"], **attributes)
    graph = onnx.helper.make_graph(
        [node],
        "g",
        [onnx.helper.make_tensor_value_info("x", code if back else single, [None] * 3)],
        [onnx.helper.make_tensor_value_info("y", single if back else code, [None] * 3)],
        parameters,
    )
    return ir.from_proto(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10))


@EVERY_DTYPE
@pytest.mark.parametrize("axis", [None, 0, 1, 2])
def test_codes_are_those_of_onnx_runtime(dtype: str, axis: int | None, random: np.random.Generator) -> None:
    shape = (5, 6, 700)
    channels = 1 if axis is None else shape[axis]
    qmin, qmax = numerics.code_range(dtype)
    scale = np.exp2(random.uniform(-12, 4, channels)).astype(np.float32)
    zero_point = random.integers(qmin, qmax + 1, channels)
    x = (random.standard_normal(shape) * (qmax - qmin) * 0.4).astype(np.float32)
    # Ties as well, since they are where roundings differ.
    x[::2] = np.rint(2 * x[::2]) / 2
    x *= numerics.along_axis(scale, axis, 3)
    codes = numerics.quantize(x, scale, zero_point, dtype, axis)
    theirs = runtime.Session(quantizing_model(dtype, scale, zero_point, axis, back=False)).run({"x": x})["y"]
    np.testing.assert_array_equal(codes, theirs, strict=True)
    assert len(np.unique(codes)) > 200 and (codes == qmin).any() and (codes == qmax).any()
    back = runtime.Session(quantizing_model(dtype, scale, zero_point, axis, back=True)).run({"x": codes})["y"]
    np.testing.assert_array_equal(numerics.dequantize(codes, scale, zero_point, axis), back, strict=True)


@given(code=st.integers(-(2**31), 2**31 - 1), scale=st.floats(2.0**-40, 2.0**-5, width=32))
def test_int32_codes_survive_the_round_trip_through_float64(code: int, scale: float) -> None:
    x = np.float64([code]) * np.float64(np.float32(scale))
    assert numerics.quantize(x, np.float32([scale]), np.array([0]), "int32").tolist() == [code]


def test_int32_saturates() -> None:
    codes = numerics.quantize(np.float32([-1e30, 1e30]), np.ones(1, np.float32), np.array([0]), "int32")
    assert codes.tolist() == [-(2**31), 2**31 - 1]
    assert codes.dtype == np.int32


def test_dequantized_int32_is_float32() -> None:
    restored = numerics.dequantize(np.int32([2**31 - 1]), np.float32([1.0]), np.array([0]))
    assert restored.dtype == np.float32 and restored[0] == np.float32(2.0**31)


def test_what_is_dequantized_is_a_product_of_float32_whatever_the_types() -> None:
    scale = np.float64([0.1])
    restored = numerics.dequantize(np.int8([3, 7]), scale, np.uint8([1]))
    assert restored.dtype == np.float32
    np.testing.assert_array_equal(restored, np.float32([2, 6]) * np.float32(0.1))


@given(codes=hnp.arrays(np.int32, 20, elements=st.integers(-(2**31), 2**31 - 1)), zero=st.integers(-(2**31), 2**31 - 1))
def test_the_difference_of_codes_is_exact(codes: np.ndarray, zero: int) -> None:
    """It has up to 33 bits, and is rounded once."""
    restored = numerics.dequantize(codes, np.ones(1, np.float32), np.array([zero]))
    assert restored.tolist() == [float(np.float32(int(code) - zero)) for code in codes]


def test_a_scale_of_float64_counts_as_the_float32_that_is_stored() -> None:
    scale = np.float64([2.0 * (1 + 2.0**-30)])
    # 1.5 steps, which is a tie; of the scale itself, a little less.
    assert numerics.quantize(np.float32([3.0]), scale, np.array([0]), "int8").tolist() == [2]


@pytest.mark.parametrize(
    ("signal", "noise", "expected"),
    [
        (1.0, 0.0, math.inf),
        (0.0, 0.0, math.inf),
        (0.0, 1.0, -math.inf),
        (100.0, 1.0, 20.0),
        (1.0, 1000.0, -30.0),
    ],
)
def test_decibel(signal: float, noise: float, expected: float) -> None:
    assert numerics.decibel(signal, noise) == pytest.approx(expected)


def test_sqnr_of_a_known_noise() -> None:
    y = np.full((3, 4), 2.0, np.float32)
    assert numerics.sqnr(y, y) == math.inf
    assert numerics.sqnr(y, y + np.float32(0.5)) == pytest.approx(10 * math.log10(16))
    assert numerics.sqnr(y, np.zeros_like(y)) == pytest.approx(0.0)


def test_sqnr_does_not_overflow_in_float32() -> None:
    y = np.full(8, 1e30, np.float32)
    assert numerics.sqnr(y, y * np.float32(1.5)) == pytest.approx(10 * math.log10(4), abs=1e-4)


INF, NAN = math.inf, math.nan


@pytest.mark.parametrize(
    ("reference", "candidate", "expected"),
    [
        ([1.0, -4.0], [1.0, -4.0], 0.0),
        ([1.0, -4.0], [1.0, -3.0], 0.25),
        ([0.5, 0.0], [0.25, 0.0], 0.5),
        ([3e38], [-3e38], 2.0),
        ([0.0, 0.0], [0.0, 0.5], 0.5),
        ([0.0, 0.0], [0.0, 0.0], 0.0),
        ([1.0, NAN], [1.5, NAN], 0.5),
        ([1.0, INF], [1.0, INF], 0.0),
        ([1.0, INF], [1.0, -INF], INF),
        ([1.0, INF], [1.0, NAN], INF),
        ([1.0, INF], [1.0, 1e30], INF),
        ([1.0, 2.0], [1.0, NAN], INF),
        ([NAN, NAN], [NAN, NAN], 0.0),
        ([NAN, INF], [INF, NAN], INF),
        ([1.0, 2.0], [1.0], INF),
        ([], [], 0.0),
    ],
)
def test_relative_error(reference: list[float], candidate: list[float], expected: float) -> None:
    assert numerics.relative_error(np.float32(reference), np.float32(candidate)) == expected


ratios = st.floats(2.0**-60, 2.0**29, exclude_max=True)


@given(st.lists(ratios, min_size=1, max_size=8))
def test_a_fixed_point_multiplier_has_31_bits(values: list[float]) -> None:
    multiplier, shift = numerics.fixed_point(values)
    assert multiplier.dtype == shift.dtype == np.int32
    assert np.all((shift >= 1) & (shift <= numerics.LARGEST_SHIFT)) and np.all(multiplier >= 0)
    for value, m, s in zip(values, multiplier, shift, strict=True):
        assert m >= 2**30 or s == numerics.LARGEST_SHIFT
        assert abs(math.ldexp(int(m), -int(s)) - value) <= max(value * 2.0**-31, 2.0**-63)


@pytest.mark.parametrize(
    ("ratio", "multiplier", "shift"),
    [
        (0.0, 0, 31),
        (1.0, 2**30, 30),
        (1.0 - 2.0**-40, 2**30, 30),
        (0.25, 2**30, 32),
        (2.0**-62, 1, 62),
        (math.nextafter(2.0**29, 0.0), 2**30, 1),
        (2.0**28, 2**30, 2),
    ],
)
def test_fixed_point_by_hand(ratio: float, multiplier: int, shift: int) -> None:
    found = numerics.fixed_point([ratio])
    assert (int(found[0][0]), int(found[1][0])) == (multiplier, shift)


def test_ratios_of_any_type_of_float_are_counted_in_float64() -> None:
    ratios = [0.75, 3.0, 2.0**-12]
    expected = numerics.fixed_point(ratios)
    for dtype in (np.float16, np.float32):
        for found, wanted in zip(numerics.fixed_point(np.array(ratios, dtype)), expected, strict=True):
            np.testing.assert_array_equal(found, wanted, strict=True)


@pytest.mark.parametrize("ratio", [-1.0, 2.0**29, float("nan"), float("inf")])
def test_ratios_out_of_range_are_refused(ratio: float) -> None:
    with pytest.raises(ValueError, match="no fixed-point multiplier"):
        numerics.fixed_point([0.5, ratio])


@given(st.integers(-(2**31), 2**31 - 1), ratios, st.integers(-128, 127))
def test_requantization_is_that_of_unbounded_integers(accumulator: int, ratio: float, zero_point: int) -> None:
    multiplier, shift = numerics.fixed_point([ratio])
    m, s = int(multiplier[0]), int(shift[0])
    expected = min(max(((accumulator * m + (1 << (s - 1))) >> s) + zero_point, -128), 127)
    found = numerics.requantize(np.array([accumulator], np.int32), multiplier, shift, zero_point, -128, 127)
    assert int(found[0]) == expected


@given(st.integers(-(2**31), 2**31 - 1), st.floats(2.0**-20, 0.25 * (1.0 - 2.0**-31)))
def test_the_high_word_is_enough_for_small_ratios(accumulator: int, ratio: float) -> None:
    multiplier, shift = numerics.fixed_point([ratio])
    m, s = int(multiplier[0]), int(shift[0])
    assert s >= 33
    high = (accumulator * m) >> 32
    found = numerics.requantize(np.array([accumulator]), multiplier, shift, 0, -(2**31), 2**31 - 1)
    assert int(found[0]) == (high + (1 << (s - 33))) >> (s - 32)


@given(st.integers(0, 2**32 - 1), st.sampled_from(["int4", "int8"]))
def test_a_clipped_scale_leaves_no_more_error_than_the_whole_range(seed: int, dtype: str) -> None:
    rows = np.random.default_rng(seed).standard_t(3, (4, 50)).astype(np.float32)
    most = numerics.code_range(dtype, symmetric=True)[1]

    def error(scale: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        steps = scale.astype(np.float64)[:, None]
        return np.square(np.clip(np.rint(rows / steps), -most, most) * steps - rows).sum(axis=1)

    whole = numerics.symmetric_scale(np.abs(rows).max(axis=1), dtype)
    clipped = numerics.clipped_scale(rows, dtype)
    assert np.all(clipped <= whole) and np.all(error(clipped) <= error(whole) * (1.0 + 1e-9))


@given(st.integers(0, 2**32 - 1), st.sampled_from(["int4", "int8"]), st.sampled_from([np.float16, np.float32]))
def test_a_clipped_scale_is_the_best_of_all_shares(seed: int, dtype: str, kind: type) -> None:
    """Tried one by one, row by row, in Python's floats."""
    rows = np.random.default_rng(seed).standard_t(3, (3, 30)).astype(kind)
    most = 2 ** (int(dtype[3:]) - 1) - 1
    for row, found in zip(rows, numerics.clipped_scale(rows, dtype), strict=True):
        absmax = max(abs(float(value)) for value in row)
        scales = [float(np.float32(share * absmax / most)) for share in np.linspace(1.0, 0.4, 25)]
        errors = [
            math.fsum((max(-most, min(most, round(float(x) / scale))) * scale - float(x)) ** 2 for x in row)
            for scale in scales
        ]
        assert found.dtype == np.float32
        assert errors[scales.index(float(found))] <= min(errors) * (1.0 + 1e-12)


def test_one_weight_far_out_is_clipped_and_none_is_where_all_are_alike() -> None:
    even = np.linspace(-1.0, 1.0, 101, dtype=np.float32)
    rows = np.stack([even, np.concatenate([even[1:], [1.6]]).astype(np.float32), np.full(101, 0.5, np.float32)])
    far, alike = numerics.clipped_scale(rows, "int4")[1:]
    assert far < np.float32(1.6 / 7) and alike == np.float32(0.5 / 7)
    np.testing.assert_array_equal(numerics.clipped_scale(np.zeros((2, 3), np.float32), "int4"), np.ones(2, np.float32))


def test_four_bits_are_a_type_like_any_other() -> None:
    assert numerics.code_range("int4") == (-8, 7) and numerics.code_range("int4", symmetric=True) == (-7, 7)
    assert (numerics.bits_of("int4"), numerics.bits_of("uint8"), numerics.bits_of("int16")) == (4, 8, 16)
    codes = numerics.quantize(np.float32([-9.0, 0.4, 3.0]), np.float32([1.0]), np.array([0]), "int4")
    assert codes.dtype == "int4" and codes.astype(int).tolist() == [-8, 0, 3]


@given(
    hnp.arrays(np.float32, hnp.array_shapes(min_dims=0, max_dims=3, max_side=6), elements=st.floats(-9, 9, width=32)),
    st.integers(1, 12),
    st.integers(0, 2),
)
def test_a_large_tensor_in_parts_is_as_it_would_be_at_once(x: np.ndarray, at_once: int, axis: int) -> None:
    """Scales and zero points go with their part, along whichever axis they lie."""
    along = axis if axis < x.ndim else None
    count = x.shape[along] if along is not None else 1
    scale, zero = np.float32([0.25, 0.5, 0.1, 2, 1, 0.3])[:count], np.int64([3, -4, 0, 9, 1, -7])[:count]
    if along is None:
        scale, zero = scale[0], zero[0]
    codes = numerics.quantize(x, scale, zero, "int8", along)
    real = numerics.dequantize(codes, scale, zero, along)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(numerics, "AT_ONCE", at_once)
        np.testing.assert_array_equal(numerics.quantize(x, scale, zero, "int8", along), codes)
        np.testing.assert_array_equal(numerics.dequantize(codes, scale, zero, along), real)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((5, 3), [(0, 2), (2, 4), (4, 6)]), ((2, 3), [(0, 2)]), ((2, 30), [(0, 1), (1, 2)]), ((0, 3), []), ((13,), [(0, 6),
     (6, 12), (12, 18)])],
)  # fmt: skip
def test_parts_of_six_elements(shape: tuple[int, ...], expected: list[tuple[int, int]]) -> None:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(numerics, "AT_ONCE", 6)
        assert [(part.start, part.stop) for part in numerics._parts(np.zeros(shape))] == expected


def test_scales_are_float32_before_they_multiply_or_divide() -> None:
    """As in ONNX: 0.1 is not what float64 has of it, and neither are codes beyond 24 bits."""
    codes = np.arange(-128, 128).astype(np.int8)
    expected = codes.astype(np.float32) * np.float32(0.1)
    assert not np.array_equal(expected, (codes * 0.1).astype(np.float32))
    np.testing.assert_array_equal(numerics.dequantize(codes, 0.1, 0), expected)
    wide = np.arange(2**24, 2**24 + 4096, dtype=np.int32)
    expected = wide.astype(np.float32) * np.float32(0.7)
    assert not np.array_equal(expected, (wide * np.float64(np.float32(0.7))).astype(np.float32))
    np.testing.assert_array_equal(numerics.dequantize(wide, np.float32(0.7), 0), expected)
