"""The operations of an integer program. Each says what it computes; `interpret.py` does it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from qcompile.backends.integer.program import Operation

Int8Array = npt.NDArray[np.int8]
Int32Array = npt.NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class Requantize:
    """From an int32 accumulator to codes: clip(((acc · multiplier + 2^(shift-1)) >> shift) + zero_point, low, high).

    The product has 64 bits and the shift is arithmetic, so ties go up (`core/numerics.py`). With a shift of 33 or more,
    which a ratio below 1/4 has, only the product's high word counts: ((hi + 2^(shift-33)) >> (shift-32)).

    Parameters
    ----------
    multiplier : ndarray of int32, shape (channels,) or (1,)
        Not negative.
    shift : ndarray of int32, same shape
        From 1 to 62.
    zero_point : int
        Of the result.
    low, high : int
        Lowest and highest code that may come out; a Relu or Clip behind the operation is in them.
    """

    multiplier: Int32Array
    shift: Int32Array
    zero_point: int
    low: int
    high: int


@dataclass(frozen=True, eq=False)
class Window:
    """How a window goes over the rows and columns of a map.

    Parameters
    ----------
    size, strides, dilations : tuple of int
        Of rows and columns.
    pads : tuple of int
        Top, left, bottom, right.
    outside : int
        The code that a Conv or AveragePool reads outside of the map: its input's zero point.
    """

    size: tuple[int, int]
    strides: tuple[int, int] = (1, 1)
    pads: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilations: tuple[int, int] = (1, 1)
    outside: int = 0


@dataclass(frozen=True, eq=False)
class Conv(Operation):
    """A convolution; depthwise where `groups` is the number of input channels.

    acc[y, x, o] = bias[o] + Σ weights[o, i, j, c] · input[y·stride + i·dilation - pad, …, channel of o's group]

    over raw codes: the input's zero point is in the bias, and what lies outside of the map reads as the input's zero
    point (so that padding is real zero).

    Parameters
    ----------
    weights : ndarray of int8, shape (out, rows, columns, in / groups)
    bias : ndarray of int32, shape (out,)
        The layer's own, less zero point · Σ weights.
    requantize : Requantize
    window : Window
    groups : int
    bits : int
        8, or 4 where every code is from -8 to 7.
    """

    weights: Int8Array
    bias: Int32Array
    requantize: Requantize
    window: Window
    groups: int = 1
    bits: int = 8


@dataclass(frozen=True, eq=False)
class Dense(Operation):
    """acc[t, o] = bias[o] + Σ_k weights[o, k] · input[t, k], over raw codes.

    Here t counts the positions in front of the last axis.

    Parameters
    ----------
    weights : ndarray of int8, shape (out, in)
    bias : ndarray of int32, shape (out,)
        The layer's own, less zero point · Σ weights.
    requantize : Requantize
    bits : int
        8, or 4 where every code is from -8 to 7.
    """

    weights: Int8Array
    bias: Int32Array
    requantize: Requantize
    bits: int = 8


@dataclass(frozen=True, eq=False)
class Add(Operation):
    """clip((a · multipliers[0] + b · multipliers[1] + bias) >> shift, low, high) over raw codes, all in int32.

    The zero points, the rounding's half and the result's zero point are in the bias; no sum leaves int32. Both inputs
    have the output's shape.

    Parameters
    ----------
    multipliers : tuple of int
        May be negative: a subtraction is an Add.
    bias, shift, low, high : int
    """

    multipliers: tuple[int, int]
    bias: int
    shift: int
    low: int
    high: int


@dataclass(frozen=True, eq=False)
class Mul(Operation):
    """acc = (a - zero_points[0]) · (b - zero_points[1]), then requantized.

    The first input has the output's shape; the second too, or it has one value per channel ([1, 1, 1, C]).

    Parameters
    ----------
    zero_points : tuple of int
    requantize : Requantize
        With one multiplier.
    """

    zero_points: tuple[int, int]
    requantize: Requantize


@dataclass(frozen=True, eq=False)
class AveragePool(Operation):
    """acc = Σ over the window of raw codes - size · zero point, then requantized with 1 / size in the multiplier.

    What lies outside of the map reads as the input's zero point: padding counts. A global pool's window is the map.

    Parameters
    ----------
    window : Window
    bias : int
        - size of the window · the input's zero point.
    requantize : Requantize
        With one multiplier.
    """

    window: Window
    bias: int
    requantize: Requantize


@dataclass(frozen=True, eq=False)
class MaxPool(Operation):
    """The highest code in the window, clipped to [low, high]; what lies outside of the map is not looked at.

    Parameters
    ----------
    window : Window
    low, high : int
    """

    window: Window
    low: int
    high: int


@dataclass(frozen=True, eq=False)
class Lookup(Operation):
    """output = table[input + 128], any function of one code of 8 bits: an activation, a change of scale.

    Parameters
    ----------
    table : ndarray of int8 or int16, shape (256,)
        Of the output's type.
    """

    table: Int8Array | npt.NDArray[np.int16]


@dataclass(frozen=True, eq=False)
class Rescale(Operation):
    """acc = input - zero_point, then requantized: a change of scale where codes of 16 bits have no table.

    Parameters
    ----------
    zero_point : int
        Of the input.
    requantize : Requantize
        With one multiplier.
    """

    zero_point: int
    requantize: Requantize


@dataclass(frozen=True, eq=False)
class Softmax(Operation):
    """Along the last axis, with d = max - input: clip((table[d]·factor + D/2) / D + zero_point, low, high).

    D = (Σ table[d]) << shift; the division drops the remainder (nothing is negative) and every number fits uint32.

    Parameters
    ----------
    table : ndarray of uint32, shape (256,)
        2^k · exp(-d · scale of the input).
    factor : int
        2^shift / scale of the output.
    shift, zero_point, low, high : int
    """

    table: npt.NDArray[np.uint32]
    factor: int
    shift: int
    zero_point: int
    low: int
    high: int


@dataclass(frozen=True, eq=False)
class Concat(Operation):
    """The inputs behind one another along an axis; all have the output's scale.

    Parameters
    ----------
    axis : int
        As stored.
    """

    axis: int


@dataclass(frozen=True, eq=False)
class Pad(Operation):
    """The input within a margin of one code.

    Parameters
    ----------
    before, after : tuple of int
        One number per axis, as stored.
    code : int
    """

    before: tuple[int, ...]
    after: tuple[int, ...]
    code: int


@dataclass(frozen=True, eq=False)
class Slice(Operation):
    """Every `steps`-th element from `starts` on, as many as the output's shape says.

    Parameters
    ----------
    starts, steps : tuple of int
        One number per axis, as stored; steps are positive.
    """

    starts: tuple[int, ...]
    steps: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Resize(Operation):
    """Nearest neighbour: output[y, x] = input[rows[y], columns[x]].

    Parameters
    ----------
    rows, columns : tuple of int
        Both never fall.
    """

    rows: tuple[int, ...]
    columns: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class View(Operation):
    """The same codes under another shape. Planned in place, so nothing is to be done."""


@dataclass(frozen=True, eq=False)
class Transpose(Operation):
    """Axes in another order, where that moves codes.

    Parameters
    ----------
    axes : tuple of int
        As `numpy.transpose` takes them.
    """

    axes: tuple[int, ...]
