"""The integer program: a network as an ordered list of operations on codes, with no float anywhere.

What an operation computes is said here and done by `interpret.py`, to which every generated kernel is equal bit by bit.
An activation with code q stands for (q - zero_point) · scale. Maps of four axes are stored channels last, [1, H, W, C];
batch is 1 and every shape is known. See docs/integer-kernels.md.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import numpy.typing as npt

Int8Array = npt.NDArray[np.int8]
Int32Array = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Tensor:
    """An activation.

    Parameters
    ----------
    name : str
    shape : tuple of int
        As it is stored: [1, H, W, C] of a map.
    dtype : str
        ``int8`` or ``int16``.
    scale : float
        A float32.
    zero_point : int
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    scale: float
    zero_point: int

    @property
    def size(self) -> int:
        """How many codes it has."""
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def nbytes(self) -> int:
        """Bytes of its codes."""
        return self.size * np.dtype(self.dtype).itemsize

    @property
    def rows(self) -> int:
        """How many rows kernels go through from the top: those of a map, or all positions in front of the last axis."""
        return self.shape[1] if len(self.shape) == 4 else self.size // self.shape[-1]

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return self.nbytes // self.rows


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
class Operation:
    """What all operations have.

    Parameters
    ----------
    name : str
        The node's that it comes from.
    inputs : tuple of str
        Tensors.
    output : str
        A tensor.
    """

    name: str
    inputs: tuple[str, ...]
    output: str

    @property
    def outputs(self) -> tuple[str, ...]:
        """Everything that it writes."""
        return (self.output,)


@dataclass(frozen=True, eq=False)
class Window:
    """How a window goes over the rows and columns of a map.

    Parameters
    ----------
    size, strides, dilations : tuple of int
        Of rows and columns.
    pads : tuple of int
        Top, left, bottom, right.
    """

    size: tuple[int, int]
    strides: tuple[int, int] = (1, 1)
    pads: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilations: tuple[int, int] = (1, 1)


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
    """output = table[input + 128], any function of one code: an activation, a change of scale.

    Parameters
    ----------
    table : ndarray of int8, shape (256,)
    """

    table: Int8Array


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


@dataclass(frozen=True)
class Step:
    """One operation's part in one strip. Rows are numbered as in the whole tensor; ends are exclusive.

    Parameters
    ----------
    operation : int
        Index into the strips' operations.
    first, last : int
        The rows of its output to compute now.
    held : int
        The first row that the output's window holds now: the window's top. Rows from `held` to `first` stood in the
        window before and are moved there from `moved_from` rows below the top, in front of this step.
    moved_from : int
        0 where nothing is kept.
    """

    operation: int
    first: int
    last: int
    held: int
    moved_from: int = 0


@dataclass(frozen=True, eq=False)
class Strips(Operation):
    """Several operations run through together, a strip of rows at a time, so that no map between them is ever whole.

    In each strip every operation computes some rows of its output, by the kernel that would compute them all: it takes
    the first and last row to compute, and pointers to where row 0 of its input and output would be. Rows above and
    below the map are padding as ever. Tensors between the operations live in windows of a few rows; inputs and `output`
    are whole.

    Parameters
    ----------
    operations : tuple of Operation
    windows : mapping of str to int
        Rows that the window of each inner tensor has. Row r of a tensor stands r - held rows below the window's top.
    strips : tuple of tuple of Step
    recomputed : int
        Multiply-accumulates beyond what the operations take when they are run whole.
    """

    operations: tuple[Operation, ...]
    windows: Mapping[str, int]
    strips: tuple[tuple[Step, ...], ...]
    recomputed: int = 0


@dataclass(frozen=True)
class Port:
    """An input or output of the model.

    Parameters
    ----------
    name : str
        In the model.
    tensor : str
        In the program.
    shape : tuple of int
        In the model.
    axes : tuple of int
        The codes as stored are those of the model's value transposed by `axes`, then reshaped to the tensor's shape.
    unsigned : bool
        Whether the model's own codes are uint8: 128 above the program's.
    """

    name: str
    tensor: str
    shape: tuple[int, ...]
    axes: tuple[int, ...]
    unsigned: bool = False


@dataclass(frozen=True)
class Program:
    """A network in integers.

    Parameters
    ----------
    name : str
    tensors : mapping of str to Tensor
    operations : tuple of Operation
        In the order in which they run.
    inputs, outputs : tuple of Port
    notes : tuple of str
        What a user must know of it.
    """

    name: str
    tensors: Mapping[str, Tensor]
    operations: tuple[Operation, ...]
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    notes: tuple[str, ...] = field(default=())

    def as_json(self) -> dict[str, Any]:
        """Return a description, JSON-ready; of arrays their shape and SHA-256."""
        return {
            "name": self.name,
            "inputs": [_describe(port) for port in self.inputs],
            "outputs": [_describe(port) for port in self.outputs],
            "tensors": [_describe(tensor) for tensor in self.tensors.values()],
            "operations": [_describe(operation) for operation in self.operations],
        }


def _describe(content: Any) -> Any:
    """Return a dataclass JSON-ready."""
    if isinstance(content, np.ndarray):
        data = np.ascontiguousarray(content).astype(content.dtype.newbyteorder("<"))
        digest = hashlib.sha256(data.tobytes()).hexdigest()
        return {"shape": list(content.shape), "dtype": str(content.dtype), "sha256": digest}
    if isinstance(content, Mapping):
        return {key: _describe(item) for key, item in content.items()}
    if isinstance(content, tuple | list):
        return [_describe(item) for item in content]
    if hasattr(content, "__dataclass_fields__"):
        kind = {"kind": type(content).__name__} if isinstance(content, Operation) else {}
        return kind | {item.name: _describe(getattr(content, item.name)) for item in fields(content)}
    return content
