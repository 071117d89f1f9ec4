"""The operations of a program that compute in float32, or join integers to floats; see docs/integer-kernels.md.

No two ways to compute them give the same bits: kernels are held to float64 within bounds, not to the interpreter.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from qcompile.backends.integer.expressions import Expression, FloatArray
from qcompile.backends.integer.operations import Int8Array, Int32Array, Requantize
from qcompile.backends.integer.program import Operation


@dataclass(frozen=True, eq=False)
class Dequantize:
    """From an int32 accumulator to floats: clip(acc · scale, low, high).

    Parameters
    ----------
    scale : ndarray of float32, shape (channels,) or (1,)
    low, high : float
    """

    scale: npt.NDArray[np.float32]
    low: float = -np.inf
    high: float = np.inf


@dataclass(frozen=True, eq=False)
class FloatDense(Operation):
    """A Dense whose sums become floats.

    Parameters
    ----------
    weights : ndarray of int8, shape (out, in)
    bias : ndarray of int32, shape (out,)
    requantize : Dequantize
    bits : int
        8, or 4 where every code is from -8 to 7.
    """

    weights: Int8Array
    bias: Int32Array
    requantize: Dequantize
    bits: int = 8


@dataclass(frozen=True, eq=False)
class Leaf:
    """One input of an expression: a tensor's values, or a constant's, along the axes of a loop nest.

    Parameters
    ----------
    source : int
        Which of the operation's inputs; -1 of a constant.
    axes : tuple of int or None
        By axis of the loops, the axis of what is stored that is gone along; None where its values are the same.
    scale : float
    zero_point : int
        A tensor's codes q are read as (q - zero_point) · scale; 1 and 0 of floats and of int64.
    values : ndarray of float32, optional
        The constant.
    """

    source: int
    axes: tuple[int | None, ...]
    scale: float = 1.0
    zero_point: int = 0
    values: FloatArray | None = None


@dataclass(frozen=True, eq=False)
class FloatOperation(Operation):
    """What reads its inputs through an expression, and writes floats, or codes of its output's scale.

    Codes are rounded as QuantizeLinear does, but for the product with 1 / scale in place of the quotient.

    Parameters
    ----------
    leaves : tuple of Leaf
    expression : tuple
        See `expressions.py`.
    """

    leaves: tuple[Leaf, ...]
    expression: Expression


@dataclass(frozen=True, eq=False)
class Pointwise(FloatOperation):
    """output = expression, element by element as the output is stored."""


@dataclass(frozen=True, eq=False)
class Normalize(FloatOperation):
    """(x - mean) / sqrt(variance + epsilon) · weight + bias along the last axis as stored, x being the expression.

    Parameters
    ----------
    weight, bias : ndarray of float32, shape (last axis,)
    epsilon : float
    centred : bool
        False: the mean is taken for 0 (Zhang and Sennrich 2019, arXiv:1910.07467).
    """

    weight: FloatArray
    bias: FloatArray
    epsilon: float
    centred: bool = True


@dataclass(frozen=True, eq=False)
class FloatSoftmax(FloatOperation):
    """exp(x - max) / Σ exp(x - max) along the last axis as stored, x being the expression."""


@dataclass(frozen=True, eq=False)
class Reduce(FloatOperation):
    """The sum or the maximum of the expression over some axes.

    Parameters
    ----------
    extents : tuple of int
        Of the axes that are gone over; leaves have them behind the output's.
    kind : str
        ``sum`` or ``max``.
    factor : float
        What a sum is multiplied by: 1 / count of a mean.
    """

    extents: tuple[int, ...]
    kind: str
    factor: float = 1.0


@dataclass(frozen=True, eq=False)
class Gather(Operation):
    """output[t] = table[input[t]] · scale: rows of a table, as floats. An index out of the table reads its last row.

    Parameters
    ----------
    table : ndarray of int8 or float32, shape (rows, channels)
    scale : ndarray of float32, shape (channels,)
    """

    table: npt.NDArray[np.int8] | FloatArray
    scale: FloatArray


@dataclass(frozen=True, eq=False)
class MatMul(Operation):
    """acc[…, m, n] = Σ_k (a[…, m, k] - zero_point) · b[…, k, n], then codes or floats; b's zero point is 0.

    Parameters
    ----------
    axes : tuple of tuple of int or None
        Of a, b and the output: by axis of (batch…, rows, columns) the stored axis, None where it is repeated.
    extents : tuple of int
        (batch…, m, k, n).
    zero_point : int
    requantize : Requantize or Dequantize
        With one multiplier, or scale.
    """

    axes: tuple[tuple[int | None, ...], tuple[int | None, ...], tuple[int | None, ...]]
    extents: tuple[int, ...]
    zero_point: int
    requantize: Requantize | Dequantize


#: A block of activations whose magnitudes are all below this is zeros.
LEAST_PEAK = 2.0**-100


@dataclass(frozen=True, eq=False)
class BlockDense(Operation):
    """A Dense of floats, by weights with a scale for each block of their inputs: ``MatMulNBits`` of ONNX Runtime.

    A block of activations becomes codes: d = max|x| / 127, q = round(x · (127 / max|x|)), ties to even, and zeros where
    max|x| is below `LEAST_PEAK`. y starts as the bias, and block by block, from the first one on, becomes
    d · scale · Σ q · weights + y: Σ is exact, d · scale a float32, and product and sum are rounded once. At last it is
    clipped. So results are the same everywhere, to the last bit.

    Parameters
    ----------
    weights : ndarray of int8, shape (out, in)
    scale : ndarray of float32, shape (out, blocks)
    bias : ndarray of float32, shape (out,)
    block : int
        Inputs that have a scale in common; the last block may have less.
    bits : int
        8, or 4 where every code is from -8 to 7.
    low, high : float
    """

    weights: Int8Array
    scale: FloatArray
    bias: FloatArray
    block: int
    bits: int
    low: float = -np.inf
    high: float = np.inf


@dataclass(frozen=True, eq=False)
class HalfDense(BlockDense):
    """The same layer of activations that no codes are made of: clip(bias + Σ x · scale · weights, low, high).

    Kernels may round x, and scale · weights, to eleven bits, and add up in float32.
    """


@dataclass(frozen=True, eq=False)
class FloatMatMul(Operation):
    """A product of two activations in float: clip(scale · Σ_k a[…, m, k] · b[…, k, n], low, high).

    The sum starts at zero and goes from the first k on, each product and sum rounded once.

    Parameters
    ----------
    axes, extents
        As of `MatMul`.
    scale, low, high : float
    """

    axes: tuple[tuple[int | None, ...], tuple[int | None, ...], tuple[int | None, ...]]
    extents: tuple[int, ...]
    scale: float = 1.0
    low: float = -np.inf
    high: float = np.inf
