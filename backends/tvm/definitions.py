"""What each integer operation computes, as TVM tensor expressions: no tile, no instruction of any processor.

`backends/integer/interpret.py` is the specification; these are equal to it bit by bit. Kernels of operations on maps
compute one row of the output, number `y`, from the whole input; those on single codes go through `count` of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from qcompile.backends.integer import operations as ops
from qcompile.backends.integer.bounds import LARGEST, largest_sums
from qcompile.backends.integer.program import Tensor
from qcompile.backends.tvm.emit import Function, load_tvm
from qcompile.backends.tvm.weight_forms import WeightForm
from qcompile.core.numerics import code_range

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
    pads : tuple of int
        Top, left, bottom, right.
    outside : int
        The code that padding reads as.
    high_word : bool
        Whether every shift is 33 or more, accumulators that are moved included.
    zero_point, low, high : int
        Of the output.
    groups : int
    packed : bool
        Whether the input has four bits: what is multiplied is gathered first then, also of a single pixel.
    moved : int
        Places by which accumulators are moved to the left first.
    form : WeightForm
        How weights are stored, where the kernel's tiles take them in a form of their own.
    reads, writes : str
        Types of the input's and the output's codes.
    """

    rows: int
    columns: int
    channels: int
    width: int
    outputs: int
    size: tuple[int, int]
    strides: tuple[int, int]
    dilations: tuple[int, int]
    pads: tuple[int, int, int, int]
    outside: int
    high_word: bool
    zero_point: int
    low: int
    high: int
    groups: int = 1
    packed: bool = False
    moved: int = 0
    form: WeightForm = WeightForm.BYTES
    reads: str = "int8"
    writes: str = "int8"

    @property
    def pointwise(self) -> bool:
        """Whether each pixel of the output needs one pixel of the input, at the same place, and can read it there."""
        return (
            not self.packed
            and (self.size, self.strides, self.pads) == ((1, 1), (1, 1), (0, 0, 0, 0))
            and self.groups == 1
        )

    @property
    def depthwise(self) -> bool:
        """Whether each channel of the output needs the same channel of the input only."""
        return self.groups == self.channels == self.outputs > 1

    def flat(self) -> Convolution:
        """Return a pointwise convolution as one of a single row."""
        return replace(self, rows=1, columns=self.rows * self.columns, width=self.rows * self.columns)

    @property
    def taps(self) -> int:
        """Positions of the window."""
        return self.size[0] * self.size[1]

    def columns_from(self, first: int, count: int) -> Convolution:
        """Return the part that computes some columns of the output."""
        if self.pointwise:
            return replace(self, columns=count, width=count)
        left = self.pads[1] - first * self.strides[1]
        reach = (count - 1) * self.strides[1] + (self.size[1] - 1) * self.dilations[1] - left
        pads = (self.pads[0], left, self.pads[2], max(0, reach - (self.columns - 1)))
        return replace(self, width=count, pads=pads)


def convolution(operation: ops.Conv, source: Tensor, target: Tensor) -> Convolution:
    """Return the shape of a convolution's kernel."""
    window = operation.window
    _, rows, columns, channels = source.shape
    return Convolution(
        rows, columns, channels, target.shape[2], target.shape[3], window.size, window.strides, window.dilations,
        window.pads, window.outside, *_rounding(operation.requantize, moved := places_free(operation, source)),
        groups=operation.groups, packed=source.bits == 4, moved=moved,
        reads=source.array_dtype, writes=target.array_dtype,
    )  # fmt: skip


def dense(operation: ops.Dense, source: Tensor, target: Tensor) -> Convolution:
    """Return a dense layer's kernel: a pointwise convolution over a map of its positions."""
    columns = source.size // source.shape[-1] // source.rows
    return Convolution(
        source.rows, columns, source.shape[-1], columns, target.shape[-1], (1, 1), (1, 1), (1, 1), (0, 0, 0, 0), 0,
        *_rounding(operation.requantize, moved := places_free(operation, source)), moved=moved,
        reads=source.array_dtype, writes=target.array_dtype,
    )  # fmt: skip


def places_free(operation: ops.Conv | ops.Dense, source: Tensor) -> int:
    """Return by how many places accumulators can be moved to the left so that only the product's high word counts.

    (acc · 2^n · multiplier) >> (shift + n) is what it is without n. Ratios above a quarter, as coarse weights have,
    have shifts below 33; 0 where those are enough, or where 32 bits might not hold what is moved.
    """
    needed = max(0, HIGH_WORD - int(operation.requantize.shift.min()))
    low, high = code_range(source.dtype)
    rows = operation.weights.reshape(len(operation.weights), -1)
    return needed if int(largest_sums(rows, operation.bias, low, high).max()) << needed <= LARGEST else 0


def _rounding(requantize: ops.Requantize, moved: int = 0) -> tuple[bool, int, int, int]:
    high_word = bool(np.all(requantize.shift + moved >= HIGH_WORD))
    return high_word, requantize.zero_point, requantize.low, requantize.high


def high_word(requantize: ops.Requantize) -> tuple[bool, Any, Any]:
    """Return whether only the high word counts, and the multiplier and shift of an operation that has one of each."""
    tirx = load_tvm().tirx
    high = _rounding(requantize)[0]
    shift = int(requantize.shift[0]) - (HIGH_WORD if high else 0)
    return high, tirx.const(int(requantize.multiplier[0]), "int32"), tirx.const(shift, "int32")


def channel_table(bias: npt.NDArray[np.int32], requantize: ops.Requantize, moved: int = 0) -> npt.NDArray[np.int32]:
    """Return bias, multiplier and shift (less 33 where only the high word counts) of each channel, as kernels read it.

    Parameters
    ----------
    bias : ndarray of int32, shape (channels,)
    requantize : Requantize
    moved : int
        Places by which accumulators are moved to the left first.

    Returns
    -------
    ndarray of int32, shape (channels, 3)
    """
    places = requantize.shift + moved - (HIGH_WORD if _rounding(requantize, moved)[0] else 0)
    columns = np.broadcast_arrays(bias, requantize.multiplier, places)
    return np.ascontiguousarray(np.stack(columns, axis=-1), np.int32)


def define_convolution(shape: Convolution) -> Function:
    """Return acc[x, o] = Σ patch[x, k] · weights[o, k], requantized; weights are [out, rows · columns · in].

    Arguments: input, weights, channels, output, y; of a pointwise convolution, the row of the input and no y.
    """
    te = load_tvm().te
    length = shape.taps * shape.channels
    weights = te.placeholder((shape.outputs, length), "int8", name="weights")
    channels = te.placeholder((shape.outputs, 3), "int32", name="channels")
    k = te.reduce_axis((0, length), name="k")
    y = te.var("y", "int32")
    if shape.pointwise:
        patch = source = te.placeholder((shape.width, length), shape.reads, name="input")
    else:
        source = te.placeholder((shape.rows, shape.columns, shape.channels), shape.reads, name="input")
        patch = te.compute((shape.width, length), _patch(shape, source, y, shape.channels), name="patch")
    acc = te.compute(
        (shape.width, shape.outputs),
        lambda x, o: te.sum(patch[x, k].astype("int32") * weights[o, k].astype("int32"), axis=k),
        name="acc",
    )
    output = te.compute(acc.shape, lambda x, o: _code(shape, acc[x, o], channels, o), name="output")
    return te.create_prim_func([source, weights, channels, output, *([] if shape.pointwise else [y])])


def define_depthwise(shape: Convolution, group: int) -> Function:
    """Return acc[x, c] = Σ patch[x, t, c] · weights[c / group, t, c % group], requantized.

    Arguments: input, weights, channels, output, y.
    """
    te = load_tvm().te
    y = te.var("y", "int32")
    source = te.placeholder((shape.rows, shape.columns, shape.channels), shape.reads, name="input")
    weights = te.placeholder((shape.channels // group, shape.taps, group), "int8", name="weights")
    channels = te.placeholder((shape.outputs, 3), "int32", name="channels")
    inside = _patch(shape, source, y, shape.channels)
    patch = te.compute(
        (shape.width, shape.taps, shape.channels), lambda x, t, c: inside(x, t * shape.channels + c), name="patch"
    )
    t = te.reduce_axis((0, shape.taps), name="t")
    acc = te.compute(
        (shape.width, shape.outputs),
        lambda x, c: te.sum(patch[x, t, c].astype("int32") * weights[c // group, t, c % group].astype("int32"), axis=t),
        name="acc",
    )
    output = te.compute(acc.shape, lambda x, c: _code(shape, acc[x, c], channels, c), name="output")
    return te.create_prim_func([source, weights, channels, output, y])


def define_grouped(shape: Convolution) -> Function:
    """Return a convolution in groups: acc[x, o] = Σ patch[x, t, c of o's group] · weights[o, t, c], requantized.

    Arguments: input, weights, channels, output, y.
    """
    te = load_tvm().te
    y = te.var("y", "int32")
    fewer, each = shape.channels // shape.groups, shape.outputs // shape.groups
    source = te.placeholder((shape.rows, shape.columns, shape.channels), shape.reads, name="input")
    weights = te.placeholder((shape.outputs, shape.taps, fewer), "int8", name="weights")
    channels = te.placeholder((shape.outputs, 3), "int32", name="channels")
    inside = _patch(shape, source, y, shape.channels)
    t, c = te.reduce_axis((0, shape.taps), name="t"), te.reduce_axis((0, fewer), name="c")

    def product(x: Any, o: Any) -> Any:
        code = inside(x, t * shape.channels + o // each * fewer + c)
        return te.sum(code.astype("int32") * weights[o, t, c].astype("int32"), axis=[t, c])

    acc = te.compute((shape.width, shape.outputs), product, name="acc")
    output = te.compute(acc.shape, lambda x, o: _code(shape, acc[x, o], channels, o), name="output")
    return te.create_prim_func([source, weights, channels, output, y])


def _patch(shape: Convolution, source: Any, y: Any, channels: int) -> Any:
    """Return what pixel x of the output sees as k-th: [rows, columns, channels] of the window, in order."""

    def code(x: Any, k: Any) -> Any:
        i, j, c = k // (shape.size[1] * channels), k // channels % shape.size[1], k % channels
        above = y * shape.strides[0] + i * shape.dilations[0] - shape.pads[0]
        beside = x * shape.strides[1] + j * shape.dilations[1] - shape.pads[1]
        extent, margins = (shape.rows, shape.columns), (shape.pads[0::2], shape.pads[1::2])
        return within((above, beside), extent, margins, source[above, beside, c], shape.outside)

    return code


def within(place: tuple[Any, Any], extent: Sequence[int], margins: tuple[Any, Any], value: Any, outside: int) -> Any:
    """Return a code of a map, or the one outside of it; an axis without padding is not looked at."""
    tirx = load_tvm().tirx
    conditions = []
    for at, count, (before, after) in zip(place, extent, margins, strict=True):
        conditions += [at >= 0] if before > 0 else []
        conditions += [at < count] if after > 0 else []
    return tirx.if_then_else(tirx.all(*conditions), value, tirx.const(outside, value.dtype)) if conditions else value


def _code(shape: Convolution, acc: Any, channels: Any, o: Any) -> Any:
    total = acc + channels[o, 0]
    numbers = (total * (1 << shape.moved) if shape.moved else total, channels[o, 1], channels[o, 2])
    return requantized(shape.high_word, numbers, shape.zero_point, shape.low, shape.high, shape.writes)


def requantized(
    high_word: bool, numbers: tuple[Any, Any, Any], zero_point: int, low: int, high: int, dtype: str = "int8"
) -> Any:
    """Return the code of an accumulator by its multiplier and shift, as `core/numerics.py` has it."""
    tirx = load_tvm().tirx
    name, offset = ("qc_requantize_high", 2 * zero_point + 1) if high_word else ("qc_requantize", zero_point)
    constants = [tirx.const(number, "int32") for number in (offset, low, high)]
    return tirx.call_pure_extern("int32", name, *numbers, *constants).astype(dtype)
