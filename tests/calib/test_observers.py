import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qcompile.calib.observers import BINS, PERCENTILE, Histogram, Observer, value_range
from qcompile.core import numerics

ordinary = st.floats(-100, 100, width=32)
finite = st.floats(allow_nan=False, allow_infinity=False, width=32)
# Mostly one magnitude, at times all of float32's: both kinds of range have their own traps.
arrays = st.one_of(
    hnp.arrays(np.float32, st.integers(1, 60), elements=ordinary),
    hnp.arrays(np.float32, st.integers(1, 12), elements=finite),
    hnp.arrays(
        np.float32, st.integers(1, 12), elements=st.sampled_from([0.0, -0.0, 1e-45, -1e-40, -1e-30, 1e30, -3e38])
    ),
)


def histogram(*parts: np.ndarray, bins: int = BINS) -> Histogram:
    result = Histogram(bins)
    for part in parts:
        result.add(part)
    return result


def content(h: Histogram) -> tuple[object, ...]:
    return h.low, h.high, h.exponent, h.start, h.counts.tolist()


@given(x=arrays, bins=st.sampled_from([2, 3, 16, BINS]), data=st.data())
def test_neither_order_nor_chunking_matters(x: np.ndarray, bins: int, data: st.DataObject) -> None:
    shuffled = x[data.draw(st.permutations(range(x.size)))]
    cuts = data.draw(st.lists(st.integers(0, x.size), max_size=5).map(sorted))
    assert content(histogram(*np.split(shuffled, cuts), bins=bins)) == content(histogram(x, bins=bins))


@given(x=arrays, bins=st.sampled_from([2, 3, 16, BINS]))
def test_counts_are_those_of_the_bins(x: np.ndarray, bins: int) -> None:
    h = histogram(x, bins=bins)
    assert h.exponent is not None and 1 <= h.counts.size <= bins
    expected = np.zeros(h.counts.size, np.int64)
    for value in x.tolist():  # a double holds every float32 and its quotient by a power of two exactly
        expected[int(np.floor(value / 2.0**h.exponent)) - h.start] += 1
    assert h.counts.tolist() == expected.tolist()
    assert h.counts[0] > 0 and h.counts[-1] > 0


@given(x=arrays, bins=st.sampled_from([2, 3, 16, BINS]))
def test_the_bins_are_the_finest_that_fit(x: np.ndarray, bins: int) -> None:
    h = histogram(x, bins=bins)
    assert h.exponent is not None
    peak = max(abs(h.low), abs(h.high))
    floor = max(-126, np.frexp(peak)[1] - 1 - 23) if peak else -126
    if h.exponent > floor:
        finer = 2.0 ** (h.exponent - 1)
        assert np.floor(h.high / finer) - np.floor(h.low / finer) + 1 > bins
    else:
        assert h.exponent == floor, "finer than the spacing of float32 numbers at the peak"


@given(first=arrays, second=arrays)
def test_low_and_high_are_exact(first: np.ndarray, second: np.ndarray) -> None:
    h = histogram(first, second)
    assert h.low == min(first.min(), second.min())
    assert h.high == max(first.max(), second.max())
    assert value_range(h, Observer.MINMAX, "uint8") == (h.low, h.high)


def test_memory_is_bounded_however_far_the_range_grows() -> None:
    h = Histogram()
    for power in range(-140, 127):
        h.add(np.float32([2.0**power, -(2.0**power)]))
        assert h.counts.size <= BINS
    assert h.counts.sum() == 2 * 267


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused_and_leaves_no_trace(bad: float) -> None:
    h = histogram(np.float32([1.0, 2.0]))
    before = content(h)
    with pytest.raises(ValueError, match="not finite"):
        h.add(np.float32([5.0, bad, 7.0]))
    assert content(h) == before


def test_an_empty_array_counts_nothing() -> None:
    h = histogram(np.zeros((0, 3), np.float32))
    assert content(h) == content(Histogram())
    assert value_range(h, Observer.MSE, "uint8") == (0.0, 0.0)


def test_any_shape_and_half_precision_are_counted() -> None:
    x = np.linspace(-3, 5, 24).astype(np.float16)
    assert content(histogram(x.reshape(2, 3, 4))) == content(histogram(x.astype(np.float32)))


@pytest.mark.parametrize("observer", Observer)
@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, -1.0, 0.1, -7.3, 1e30, -1e-30, 1e-40, 3.4e38])
def test_a_constant_is_represented(value: float, observer: Observer) -> None:
    x = np.full(1000, value, np.float32)
    low, high = value_range(histogram(x), observer, "uint8")
    scale, zero_point = numerics.affine_scale(np.float64([low]), np.float64([high]), "uint8")
    restored = numerics.dequantize(numerics.quantize(x, scale, zero_point, "uint8"), scale, zero_point)
    # Half a step of 255, or of the constant's own size where the range is too narrow for a float32 scale.
    assert np.abs(restored[0] - np.float64(x[0])) <= max(np.abs(x[0]) / 255 / 2, 256 * numerics.SMALLEST_SCALE)


@pytest.mark.parametrize("observer", Observer)
def test_ranges_lie_within_what_was_seen_and_zero(observer: Observer, random: np.random.Generator) -> None:
    for x in (random.standard_normal(5000), -np.abs(random.standard_normal(5000)) - 1, random.random(5000) + 2):
        x = x.astype(np.float32)
        low, high = value_range(histogram(x), observer, "uint8")
        assert min(x.min(), 0) <= low <= high <= max(x.max(), 0)


def true_rmse(x: np.ndarray, bounds: tuple[float, float], dtype: str) -> float:
    scale, zero_point = numerics.affine_scale(np.float64([bounds[0]]), np.float64([bounds[1]]), dtype)
    restored = numerics.dequantize(numerics.quantize(x, scale, zero_point, dtype), scale, zero_point)
    return float(np.sqrt(np.mean((restored.astype(np.float64) - x) ** 2)))


@given(
    x=hnp.arrays(np.float32, st.integers(1, 300), elements=st.floats(-1000, 1000, width=32)),
    outlier=st.floats(-1e5, 1e5, width=32),
    dtype=st.sampled_from(["uint8", "int8"]),
)
def test_mse_is_no_worse_than_minmax_beyond_the_resolution(x: np.ndarray, outlier: float, dtype: str) -> None:
    # The distance to the nearest code is 1-Lipschitz, and a value lies within half a bin of what stands for it: the
    # error that the search sees is within width / 2 of the true one (root mean square), on both sides.
    x = np.append(x, np.float32(outlier))
    h = histogram(x)
    searched = true_rmse(x, value_range(h, Observer.MSE, dtype), dtype)
    widest = true_rmse(x, value_range(h, Observer.MINMAX, dtype), dtype)
    assert searched <= widest + h.width + 1e-6 * np.abs(x).max()


def test_mse_cuts_an_outlier_off(random: np.random.Generator) -> None:
    x = np.append(random.standard_normal(200_000), 30.0).astype(np.float32)
    bounds = value_range(histogram(x), Observer.MSE, "uint8")
    low = float(x.min())
    searched = true_rmse(x, bounds, "uint8")
    assert bounds[1] < 27
    assert searched < 0.9 * true_rmse(x, (low, 30.0), "uint8")
    # Nearly as good as the best upper end of a brute force; the search's own steps are 1 %.
    assert searched <= 1.02 * min(true_rmse(x, (low, end), "uint8") for end in np.linspace(4, 30, 53))


def test_mse_keeps_the_whole_range_of_uniform_values(random: np.random.Generator) -> None:
    x = random.uniform(-1, 1, 100_000).astype(np.float32)
    low, high = value_range(histogram(x), Observer.MSE, "uint8")
    assert low < -0.98 and high > 0.98


def test_mse_keeps_zero_at_the_lowest_code_behind_a_relu(random: np.random.Generator) -> None:
    x = np.maximum(random.standard_normal(10_000), 0).astype(np.float32)
    low, high = value_range(histogram(x), Observer.MSE, "uint8")
    assert low == 0.0 and numerics.affine_scale(np.float64([low]), np.float64([high]), "uint8")[1] == [0]


@pytest.mark.parametrize("distribution", ["standard_normal", "standard_exponential", "random"])
def test_percentile_agrees_with_numpy(distribution: str, random: np.random.Generator) -> None:
    x = getattr(random, distribution)(1_000_000).astype(np.float32)
    h = histogram(x)
    outside = (1 - PERCENTILE) / 2
    expected = np.quantile(x, [outside, 1 - outside])
    low, high = value_range(h, Observer.PERCENTILE, "uint8")
    assert expected[0] - h.width <= low <= expected[0]
    assert expected[1] <= high <= expected[1] + h.width


@given(x=arrays)
def test_percentile_leaves_out_no_more_than_it_may(x: np.ndarray) -> None:
    x = np.repeat(x, 700)  # enough that some may be left out
    low, high = value_range(histogram(x), Observer.PERCENTILE, "uint8")
    assert x.min() <= low <= high <= x.max()
    allowed = (1 - PERCENTILE) / 2 * x.size
    assert np.sum(x < low) <= allowed and np.sum(x > high) <= allowed


def test_a_huge_dynamic_range_keeps_its_ends() -> None:
    h = histogram(np.float32([-1e-38, 0.0, 1e-45, 3e38]))
    assert (h.low, h.high) == (float(np.float32(-1e-38)), float(np.float32(3e38)))
    assert h.counts.sum() == 4 and h.counts[0] == 1, "the negative one lies in the bin below zero"


def test_negative_values_only() -> None:
    x = np.linspace(-8, -2, 5001, dtype=np.float32)
    low, high = value_range(histogram(x), Observer.MSE, "uint8")
    assert numerics.affine_scale(np.float64([low]), np.float64([high]), "uint8")[1] == [255]
    assert low == pytest.approx(-8, rel=0.02)


def test_moving_average_is_the_mean_of_each_arrays_extremes() -> None:
    h = histogram(np.float32([-1, 5]), np.float32([-3, 1]), np.float32([-2, 0]), np.zeros(0, np.float32))
    assert value_range(h, Observer.MOVING_AVERAGE, "uint8") == pytest.approx((-2.0, 2.0))


def test_entropy_cuts_a_thin_tail_off_and_leaves_a_full_range(random: np.random.Generator) -> None:
    flat = random.uniform(0, 1, 100_000).astype(np.float32)
    assert value_range(histogram(flat), Observer.ENTROPY, "uint8")[1] > 0.98
    tailed = np.append(random.standard_normal(100_000), random.uniform(4, 60, 5)).astype(np.float32)
    assert 3 < value_range(histogram(tailed), Observer.ENTROPY, "uint8")[1] < 0.8 * tailed.max()


def test_entropy_is_not_drawn_to_the_peak_at_zero(random: np.random.Generator) -> None:
    """Behind a Relu half of the values are zero, which every range represents exactly."""
    x = np.abs(random.standard_normal(100_000)).astype(np.float32)
    alone = value_range(histogram(x), Observer.ENTROPY, "uint8")[1]
    peaked = value_range(histogram(np.append(x, np.zeros(100_000, np.float32))), Observer.ENTROPY, "uint8")[1]
    assert peaked == pytest.approx(alone, rel=0.1)
    assert peaked > 3


def divergence(x: np.ndarray, high: float) -> float:
    """KL(P‖Q) by loops over the bins: P with the tail at its end, Q each code's mass shared among its occupied bins."""
    h = histogram(x)
    step = np.float64(np.float32(high / 255))
    inside = [i for i, centre in enumerate(h.centres) if centre <= 255.5 * step]
    p = [float(h.counts[i]) for i in inside]
    tail = float(h.counts.sum()) - sum(p)
    groups: dict[int, list[int]] = {}
    for i in inside:
        groups.setdefault(min(255, int(np.rint(h.centres[i] / step))), []).append(i)
    q = [0.0] * len(inside)
    p[-1] += tail
    for members in groups.values():
        occupied = [i for i in members if p[i] > 0]
        for i in occupied:
            q[i] = max(0.5, sum(float(h.counts[j]) for j in members) / len(occupied))
    total_p, total_q = sum(p), sum(q)
    return sum(a / total_p * np.log(a / total_p / (b / total_q)) for a, b in zip(p, q, strict=True) if a > 0)


def test_entropy_is_near_the_least_divergence_of_a_brute_force(random: np.random.Generator) -> None:
    x = (random.gamma(2.0, 1.0, 50_000) + 0.01).astype(np.float32)
    high = value_range(histogram(x), Observer.ENTROPY, "uint8")[1]
    least = min(divergence(x, end) for end in np.linspace(2, float(x.max()), 150))
    assert divergence(x, high) <= 1.05 * least + 1e-5


@given(x=arrays, bins=st.sampled_from([2, 3, 16, BINS]))
def test_mirrored_counts_are_those_of_either_sign(x: np.ndarray, bins: int) -> None:
    seen = histogram(x, bins=bins)
    both = seen.mirrored()
    assert both.high == -both.low == max(abs(seen.low), abs(seen.high)) and both.counts.size <= max(bins, 2)
    np.testing.assert_array_equal(both.counts, both.counts[::-1])
    assert both.counts.sum() == 2 * x.size and both.start == -(both.counts.size // 2)
    assert both.mirrored().counts.tolist() == (2 * both.counts).tolist()
    # No value is beyond the outermost bins.
    assert both.high <= both.counts.size // 2 * both.width


@pytest.mark.parametrize("observer", [each for each in Observer if each is not Observer.DYNAMIC])
def test_ranges_of_mirrored_counts_are_around_zero(observer: Observer, random: np.random.Generator) -> None:
    seen = histogram(np.abs(random.standard_normal(4000)).astype(np.float32)).mirrored()
    low, high = value_range(seen, observer, "int8")
    assert high > 0.5 and abs(low + high) < 0.1 * high
