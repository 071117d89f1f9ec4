from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcompile.core import packing
from qcompile.core.plan import Role, TensorQuant

SHAPES = [((64, 48), 1), ((30, 3, 3, 3), 0), ((96, 1, 3, 3), 0), ((5, 7, 40), 1), ((33,), None), ((1, 100), None)]


def quant(weights: np.ndarray, axis: int | None) -> TensorQuant:
    others = tuple(a for a in range(weights.ndim) if a != axis)
    scale = packing.packed_scale(np.abs(weights).max(axis=None if axis is None else others)).reshape(-1)
    return TensorQuant(Role.WEIGHT, "int8", tuple(map(float, scale)), (0,) * scale.size, axis, packing.BLOCK)


@pytest.mark.parametrize(("shape", "axis"), SHAPES)
@pytest.mark.parametrize("size", [1, 7, 16])
def test_blocks_are_a_tensor_cut_up(shape: tuple[int, ...], axis: int | None, size: int) -> None:
    whole = np.arange(1, np.prod(shape) + 1).reshape(shape)
    blocks = packing.in_blocks(whole, axis, size)
    assert blocks.shape[2] <= size
    np.testing.assert_array_equal(packing.from_blocks(blocks, shape, axis), whole)
    # Nothing but zeros is added, and less than a block of them for each channel.
    assert np.count_nonzero(blocks) == whole.size and blocks.size - whole.size < blocks[:, 0].size * 1
    channels = np.array([np.unique(part[part > 0]) for part in blocks]) if axis is not None else whole.reshape(1, -1)
    assert len(channels) == (1 if axis is None else shape[axis])


@pytest.mark.parametrize(("shape", "axis"), SHAPES)
def test_packed_codes_are_products_and_round_to_themselves(
    shape: tuple[int, ...], axis: int | None, random: np.random.Generator
) -> None:
    weights = random.normal(size=shape).astype(np.float32)
    packed = quant(weights, axis)
    codes = packed.quantize(weights)
    found = packing.unpacked(codes, axis)
    assert found is not None
    numbers, multiples = found
    assert numbers.min() >= packing.LOWEST and numbers.max() <= packing.HIGHEST
    assert multiples.min() >= 1 and multiples.max() <= packing.MOST
    np.testing.assert_array_equal(packing.from_blocks(numbers * multiples, shape, axis), codes)
    np.testing.assert_array_equal(packed.quantize(packed.dequantize(codes)), codes)


@given(st.lists(st.floats(-105, 105, width=32), min_size=1, max_size=packing.BLOCK))
def test_no_other_multiple_is_nearer(numbers: list[float]) -> None:
    scaled = np.array(numbers, np.float32)[None]

    def error(multiple: int) -> float:
        return float(np.square(scaled - np.clip(np.rint(scaled / multiple), -8, 7) * multiple).sum())

    found = packing.multiples(scaled, 0)
    assert len(np.unique(found)) == 1
    least = min(error(multiple) for multiple in range(1, packing.MOST + 1))
    assert error(int(found.flat[0])) == pytest.approx(least, rel=1e-5, abs=1e-5)


def test_the_most_distant_weight_is_within_reach() -> None:
    weights = np.array([[1.0, -0.99, 0.5], [4.0, 0.1, -3.9]], np.float32)
    packed = quant(weights, 0)
    np.testing.assert_allclose(packed.dequantize(packed.quantize(weights)).max(axis=1), [1.0, 4.0], rtol=1e-6)


def test_free_codes_are_no_products(random: np.random.Generator) -> None:
    codes = random.integers(-127, 128, (64, 64)).astype(np.int8)
    assert packing.unpacked(codes, 0) is None
    # One block that is none, behind many that are: all of them are looked at in the end.
    codes[:-1] = 7
    assert packing.unpacked(codes, 0) is None


def test_normal_weights_keep_22_decibel(random: np.random.Generator) -> None:
    """As much as blocks of 16 with scales in float: 21.8 to 22 dB with the best clipping."""
    weights = random.normal(size=(256, 256)).astype(np.float32)
    packed = quant(weights, 1)
    noise = packed.dequantize(packed.quantize(weights)) - weights
    assert 10 * np.log10(np.square(weights).sum() / np.square(noise).sum()) > 21.7
