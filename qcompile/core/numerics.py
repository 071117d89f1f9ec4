"""Rounding, saturation and scales, defined here and nowhere else.

The integer types and the rounding (half to even) are those of ONNX QuantizeLinear:
https://onnx.ai/onnx/operators/onnx__QuantizeLinear.html
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import ml_dtypes  # which makes int4 and uint4 types of NumPy
import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.floating[Any]]
IntArray = npt.NDArray[np.integer[Any]]

#: What NumPy's own tells of its integer types, it tells of those of four bits too; without type hints.
_IINFO: Any = ml_dtypes.iinfo

#: Below this a scale would make `1 / scale` overflow float32; a tensor that narrow is constant for every purpose.
SMALLEST_SCALE = float(np.finfo(np.float32).tiny)

#: Of a fixed-point multiplier: with it a product of 32 by 31 bits, rounded, still fits int64.
LARGEST_SHIFT = 62


#: Elements that are turned into codes or back at once.
AT_ONCE = 1 << 20
#: Parts of absmax that the largest code may stand for where codes are few, from all of it down.
SHARES = np.linspace(1.0, 0.4, 25)


def code_range(dtype: str, symmetric: bool = False) -> tuple[int, int]:
    """Return the lowest and highest code of an integer type.

    Parameters
    ----------
    dtype : str
        An integer type's name, such as ``"uint8"`` or ``"int4"``.
    symmetric : bool
        Leave out the lowest code of a signed type, so that the range is ``[-q, q]``.
    """
    info = _IINFO(np.dtype(dtype))
    return (-int(info.max) if symmetric and info.min < 0 else int(info.min)), int(info.max)


def bits_of(dtype: str) -> int:
    """Return how many bits a code of an integer type has."""
    return int(_IINFO(np.dtype(dtype)).bits)


def affine_scale(
    low: npt.ArrayLike, high: npt.ArrayLike, dtype: str
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """Return scale and zero point that map the range [low, high], widened to hold 0, onto all codes of `dtype`.

    Real zero falls on a code exactly, since padding and Relu produce it (Jacob et al. 2018, section 2.1). A range
    that starts at zero therefore gets the lowest code as its zero point, which is what lets a runtime drop the Relu.

    Parameters
    ----------
    low, high : array_like of float, same shape
    dtype : str
        An integer type's name.

    Returns
    -------
    scale : ndarray of float32, zero_point : ndarray of int64
        Same shape as `low`.
    """
    qmin, qmax = code_range(dtype)
    least, most = np.minimum(np.asarray(low, np.float64), 0.0), np.maximum(np.asarray(high, np.float64), 0.0)
    scale = _usable((most - least) / (qmax - qmin))
    zero_point = np.clip(np.rint(qmin - least / scale.astype(np.float64)), qmin, qmax).astype(np.int64)
    return scale, zero_point


def symmetric_scale(absmax: npt.ArrayLike, dtype: str) -> npt.NDArray[np.float32]:
    """Return the scale that maps [-absmax, absmax] onto the symmetric codes of a signed type (zero point 0)."""
    return _usable(np.asarray(absmax, np.float64) / code_range(dtype)[1])


def clipped_scale(rows: FloatArray, dtype: str) -> npt.NDArray[np.float32]:
    """Return for each row the symmetric scale of least squared error, of a few that clip its largest values.

    Of four bits a step is long: what little is lost by clipping a few weights is won by a shorter step for all others.

    Parameters
    ----------
    rows : ndarray of float, shape (rows, n)
    dtype : str

    Returns
    -------
    ndarray of float32, shape (rows,)
    """
    most = code_range(dtype)[1]
    absmax = np.abs(rows).max(axis=1)
    best, least = np.zeros(len(rows), np.float32), np.full(len(rows), np.inf)
    for share in SHARES:
        scale = symmetric_scale(share * absmax, dtype)
        steps = scale.astype(np.float64)[:, None]
        error = np.square(np.clip(np.rint(rows / steps), -most, most) * steps - rows).sum(axis=1)
        best, least = np.where(error < least, scale, best), np.minimum(error, least)
    return best


def _usable(scale: FloatArray) -> npt.NDArray[np.float32]:
    """Replace scales that cannot be divided by with 1: every code they would produce stands for (nearly) zero."""
    single = np.asarray(scale, np.float32)
    return np.where(single >= SMALLEST_SCALE, single, np.float32(1.0))


def along_axis(parameter: npt.NDArray[Any], axis: int | None, rank: int) -> npt.NDArray[Any]:
    """Shape a per-tensor (axis None) or per-channel parameter so that it broadcasts against a tensor of `rank`."""
    if axis is None:
        return parameter.reshape(())
    shape = [1] * rank
    shape[axis] = -1
    return parameter.reshape(shape)


def quantize(
    x: FloatArray,
    scale: npt.NDArray[np.float32],
    zero_point: IntArray,
    dtype: str,
    axis: int | None = None,
    symmetric: bool = False,
) -> IntArray:
    """Return saturate(round_half_even(x / scale) + zero_point) as codes of `dtype`.

    Parameters
    ----------
    x : ndarray of float, any shape
    scale, zero_point : ndarray
        One value (axis None), or one per index of `axis`.
    dtype : str
        ``uint4``, ``int4``, ``uint8``, ``int8``, ``uint16``, ``int16`` or ``int32``.
    axis : int, optional
    symmetric : bool
        Saturate at ``-qmax`` rather than at the lowest code of a signed type.

    Notes
    -----
    The quotient is formed in float32, as the specification and every runtime form it, except for int32 (biases),
    where float32 has too few digits for the codes.
    """
    qmin, qmax = code_range(dtype, symmetric)
    wide = np.float64 if dtype == "int32" else np.float32
    s = along_axis(np.asarray(scale, wide), axis, x.ndim)
    z = along_axis(np.asarray(zero_point, np.int64), axis, x.ndim)
    saturated = np.empty(np.shape(x), dtype)
    for part in _parts(x):
        codes = np.rint(np.asarray(x[part], wide) / _part_of(s, part)).astype(np.float64) + _part_of(z, part)
        saturated[part] = np.clip(codes, qmin, qmax).astype(dtype)
    return saturated


def dequantize(
    codes: IntArray, scale: npt.NDArray[np.float32], zero_point: IntArray, axis: int | None = None
) -> npt.NDArray[np.float32]:
    """Return (codes - zero_point) * scale in float32, as ONNX DequantizeLinear does."""
    s = along_axis(np.asarray(scale, np.float32), axis, codes.ndim)
    z = along_axis(np.asarray(zero_point, np.int64), axis, codes.ndim)
    real = np.empty(codes.shape, np.float32)
    for part in _parts(codes):
        real[part] = (codes[part].astype(np.int64) - _part_of(z, part)).astype(np.float32) * _part_of(s, part)
    return real


def _parts(array: npt.NDArray[Any]) -> Iterator[slice | tuple[()]]:
    """Yield what of an array is worked on at once: wider numbers of a large one would be several times its bytes."""
    if array.ndim == 0:
        yield ()
        return
    rows = max(1, AT_ONCE * len(array) // max(1, array.size))
    yield from (slice(start, start + rows) for start in range(0, len(array), rows))


def _part_of(parameter: npt.NDArray[Any], part: slice | tuple[()]) -> npt.NDArray[Any]:
    """Return what of a parameter of as many axes goes with a part of an array."""
    return parameter if parameter.ndim == 0 or len(parameter) == 1 else parameter[part]


def fixed_point(ratio: npt.ArrayLike) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """Return multiplier and shift with ratio ≈ multiplier · 2^-shift, to 31 bits.

    Parameters
    ----------
    ratio : array_like of float, shape (n,)
        From 0 to below 2^29.

    Returns
    -------
    multiplier : ndarray of int32
        From 2^30 to 2^31 - 1; less where the ratio is so small that the shift would exceed 62.
    shift : ndarray of int32
        From 1 to 62.

    Raises
    ------
    ValueError
        If a ratio is out of range.
    """
    real = np.asarray(ratio, np.float64)
    if not np.all((real >= 0.0) & (real < 2.0**29)):
        raise ValueError(f"a ratio of {float(np.max(np.abs(real)))} is no fixed-point multiplier")
    # A fraction of nearly 1 is rounded to 2^31, one too many: half of it with one shift less.
    exponent = np.frexp(real)[1] + (np.rint(np.frexp(real)[0] * 2.0**31) >= 2.0**31)
    shift = np.minimum(31 - exponent, LARGEST_SHIFT)
    return np.rint(np.ldexp(real, shift)).astype(np.int32), shift.astype(np.int32)


def requantize(
    accumulator: IntArray, multiplier: IntArray, shift: IntArray, zero_point: int, low: int, high: int
) -> npt.NDArray[np.int64]:
    """Return clip(((acc · multiplier + 2^(shift-1)) >> shift) + zero_point, low, high): the one rounding of integers.

    Ties go up (Yao et al. 2021, HAWQ-V3, section 3.2, has the dyadic form). Exact: the product needs 63 bits.

    Parameters
    ----------
    accumulator : ndarray of int, shape (..., channels)
        Within int32.
    multiplier, shift : ndarray of int, shape (channels,) or (1,)
    zero_point, low, high : int
    """
    product = np.asarray(accumulator, np.int64) * multiplier
    rounded: npt.NDArray[np.int64] = (product + (np.int64(1) << (shift - 1))) >> shift
    return np.clip(rounded + zero_point, low, high)


def sqnr(reference: FloatArray, candidate: FloatArray) -> float:
    """Return the signal-to-quantization-noise ratio in dB, 10·log10(Σy² / Σ(y - ŷ)²), summed in float64."""
    y = np.asarray(reference, np.float64)
    return decibel(float(np.sum(y * y)), float(np.sum((y - candidate) ** 2)))


def decibel(signal: float, noise: float) -> float:
    """Return 10·log10(signal / noise); infinite when there is no noise."""
    if noise == 0.0:
        return math.inf
    return float(10.0 * np.log10(signal / noise)) if signal > 0.0 else -math.inf


def relative_error(reference: FloatArray, candidate: FloatArray) -> float:
    """Return max|y - ŷ| / max|y|; non-finite values must stand at the same places with the same sign."""
    y, z = np.asarray(reference, np.float64), candidate
    finite = np.isfinite(y)
    if y.shape != z.shape or not np.array_equal(finite, np.isfinite(z)):
        return math.inf
    if not np.array_equal(y[~finite], z[~finite], equal_nan=True):
        return math.inf
    if not finite.any():
        return 0.0
    peak = float(np.max(np.abs(y[finite])))
    error = float(np.max(np.abs(y[finite] - z[finite])))
    return error / peak if peak > 0.0 else error
