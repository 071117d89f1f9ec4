"""What each integer operation computes, as TVM tensor expressions: no tile, no instruction of any processor.

`backends/integer/interpret.py` is the specification; these are equal to it bit by bit. Kernels of operations on maps
compute one row of the output, number `y`, from the whole input; those on single codes go through `count` of them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from qcompile.backends.integer import program as integer
from qcompile.backends.tvm.emit import Function, load_tvm

#: From this shift on only the product's high word counts.
HIGH_WORD = 33


@dataclass(frozen=True)
class Convolution:
    """The shape of a convolution's kernel: all that its C depends on.

    Parameters
    ----------
    rows, columns, channels : int
        Of the input.
    width, outputs : int
        Columns and channels of the output.
    size, strides, dilations : tuple of int
        Of rows and columns.
    top, left : int
        Padding.
    code : int
        That padding reads as.
    high_word : bool
        Whether every shift is 33 or more.
    zero_point, low, high : int
        Of the output.
    depthwise : bool
    """

    rows: int
    columns: int
    channels: int
    width: int
    outputs: int
    size: tuple[int, int]
    strides: tuple[int, int]
    dilations: tuple[int, int]
    top: int
    left: int
    code: int
    high_word: bool
    zero_point: int
    low: int
    high: int
    depthwise: bool = False

    @property
    def pointwise(self) -> bool:
        """Whether each pixel of the output needs one pixel of the input, at the same place."""
        return (self.size, self.strides) == ((1, 1), (1, 1)) and self.columns == self.width and self.rows == 1

    @property
    def taps(self) -> int:
        """Positions of the window."""
        return self.size[0] * self.size[1]

    def columns_from(self, first: int, count: int) -> Convolution:
        """Return the part that computes some columns of the output."""
        return replace(self, width=count, left=self.left - first * self.strides[1])


def convolution(operation: integer.Conv, source: integer.Tensor, target: integer.Tensor) -> Convolution:
    """Return the shape of a convolution's kernel."""
    window = operation.window
    _, rows, columns, channels = source.shape
    if (window.size, window.strides, window.pads) == ((1, 1), (1, 1), (0, 0, 0, 0)):
        rows, columns, width = 1, rows * columns, rows * columns
    else:
        width = target.shape[2]
    return Convolution(
        rows, columns, channels, width, target.shape[3], window.size, window.strides, window.dilations,
        window.pads[0], window.pads[1], source.zero_point, *_rounding(operation.requantize),
        depthwise=operation.groups > 1,
    )  # fmt: skip


def dense(operation: integer.Dense, source: integer.Tensor, target: integer.Tensor) -> Convolution:
    """Return a dense layer's kernel: a convolution of one tap over its positions."""
    positions = source.size // source.shape[-1]
    return Convolution(
        1, positions, source.shape[-1], positions, target.shape[-1], (1, 1), (1, 1), (1, 1), 0, 0, source.zero_point,
        *_rounding(operation.requantize),
    )  # fmt: skip


def _rounding(requantize: integer.Requantize) -> tuple[bool, int, int, int]:
    high_word = bool(np.all(requantize.shift >= HIGH_WORD))
    return high_word, requantize.zero_point, requantize.low, requantize.high


def channel_table(bias: npt.NDArray[np.int32], requantize: integer.Requantize) -> npt.NDArray[np.int32]:
    """Return bias, multiplier and shift (less 33 where only the high word counts) of each channel, as kernels read it.

    Parameters
    ----------
    bias : ndarray of int32, shape (channels,)
    requantize : Requantize

    Returns
    -------
    ndarray of int32, shape (channels, 3)
    """
    places = requantize.shift - (HIGH_WORD if _rounding(requantize)[0] else 0)
    columns = np.broadcast_arrays(bias, requantize.multiplier, places)
    return np.ascontiguousarray(np.stack(columns, axis=-1), np.int32)


def define_convolution(shape: Convolution) -> Function:
    """Return acc[x, o] = Σ patch[x, k] · weights[o, k], requantized; weights are [out, rows · columns · in].

    Arguments: input, weights, channels, output, and y unless the convolution is pointwise.
    """
    te = load_tvm().te
    length = shape.taps * shape.channels
    weights = te.placeholder((shape.outputs, length), "int8", name="weights")
    channels = te.placeholder((shape.outputs, 3), "int32", name="channels")
    k = te.reduce_axis((0, length), name="k")
    if shape.pointwise:
        source = te.placeholder((shape.width, length), "int8", name="input")
        patch, rest = source, []
    else:
        y = te.var("y", "int32")
        source = te.placeholder((shape.rows, shape.columns, shape.channels), "int8", name="input")
        patch, rest = te.compute((shape.width, length), _patch(shape, source, y, length), name="patch"), [y]
    acc = te.compute(
        (shape.width, shape.outputs),
        lambda x, o: te.sum(patch[x, k].astype("int32") * weights[o, k].astype("int32"), axis=k),
        name="acc",
    )
    output = te.compute(acc.shape, lambda x, o: _code(shape, acc[x, o], channels, o), name="output")
    return te.create_prim_func([source, weights, channels, output, *rest])


def define_depthwise(shape: Convolution, group: int) -> Function:
    """Return acc[x, c] = Σ patch[x, t, c] · weights[c / group, t, c % group], requantized.

    Arguments: input, weights, channels, output, y.
    """
    te = load_tvm().te
    y = te.var("y", "int32")
    source = te.placeholder((shape.rows, shape.columns, shape.channels), "int8", name="input")
    weights = te.placeholder((shape.channels // group, shape.taps, group), "int8", name="weights")
    channels = te.placeholder((shape.outputs, 3), "int32", name="channels")
    inside = _patch(shape, source, y, shape.taps * shape.channels)
    patch = te.compute(
        (shape.width, shape.taps, shape.channels), lambda x, t, c: inside(x, t * shape.channels + c), name="patch"
    )
    t = te.reduce_axis((0, shape.taps), name="t")
    acc = te.compute(
        (shape.width, shape.outputs),
        lambda x, c: te.sum(
            patch[x, t, c].astype("int32") * weights[c // group, t, c % group].astype("int32"), axis=t
        ),
        name="acc",
    )
    output = te.compute(acc.shape, lambda x, c: _code(shape, acc[x, c], channels, c), name="output")
    return te.create_prim_func([source, weights, channels, output, y])


def _patch(shape: Convolution, source: Any, y: Any, length: int) -> Any:
    """Return what pixel x of the output sees as k-th: [rows, columns, channels] of the window, in order."""
    tirx = load_tvm().tirx
    row = length // shape.size[0]

    def code(x: Any, k: Any) -> Any:
        i, j, c = k // row, k % row // shape.channels, k % shape.channels
        above = y * shape.strides[0] + i * shape.dilations[0] - shape.top
        beside = x * shape.strides[1] + j * shape.dilations[1] - shape.left
        inside = tirx.all(above >= 0, above < shape.rows, beside >= 0, beside < shape.columns)
        return tirx.if_then_else(inside, source[above, beside, c], tirx.const(shape.code, "int8"))

    return code


def _code(shape: Convolution, acc: Any, channels: Any, o: Any) -> Any:
    numbers = (acc + channels[o, 0], channels[o, 1], channels[o, 2])
    return requantized(shape.high_word, numbers, shape.zero_point, shape.low, shape.high)


def requantized(high_word: bool, numbers: tuple[Any, Any, Any], zero_point: int, low: int, high: int) -> Any:
    """Return the code of an accumulator by its multiplier and shift, as `core/numerics.py` has it."""
    tirx = load_tvm().tirx
    name, offset = ("qc_requantize_high", 2 * zero_point + 1) if high_word else ("qc_requantize", zero_point)
    constants = [tirx.const(number, "int32") for number in (offset, low, high)]
    return tirx.call_pure_extern("int32", name, *numbers, *constants).astype("int8")
