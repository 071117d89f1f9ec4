"""What is known of a float value while a model is lowered, and the program that grows meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompile.backends.integer.operations import Lookup, Requantize, Rescale, Transpose, View
from qcompile.backends.integer.program import Operation, Tensor
from qcompile.core import numerics
from qcompile.core.errors import OperatorError

FloatArray = npt.NDArray[np.float32]
Factors = npt.NDArray[np.float64]


def refuse(node: ir.Node, fact: str, remedy: str) -> NoReturn:
    """Say in one line why an operator has no place in an integer program."""
    raise OperatorError(node.op_type, str(node.name), fact, remedy)


@dataclass(frozen=True)
class Grid:
    """The codes that real values are rounded to: signed, whatever the model has.

    Parameters
    ----------
    scale : float
        A float32.
    zero_point : int
    dtype : str
        ``int4``, ``int8`` or ``int16``.
    unsigned : bool
        Whether the model's own codes are unsigned, half of their range above these.
    """

    scale: float
    zero_point: int
    dtype: str = "int8"
    unsigned: bool = False

    @property
    def low(self) -> int:
        """The lowest code."""
        return numerics.code_range(self.dtype)[0]

    @property
    def high(self) -> int:
        """The highest code."""
        return numerics.code_range(self.dtype)[1]

    def same(self, other: Grid) -> bool:
        """Tell whether codes mean the same, however the model writes them."""
        return (self.scale, self.zero_point, self.dtype) == (other.scale, other.zero_point, other.dtype)

    def codes(self, real: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """Return the codes of real values, rounded as QuantizeLinear does."""
        scale, zero_point = np.float32(self.scale), np.array(self.zero_point)
        array = np.asarray(real, np.float32)
        return numerics.quantize(array, np.asarray(scale), zero_point, self.dtype).astype(np.int64)

    def levels(self) -> FloatArray:
        """Return what each code of int8 stands for, shape (256,)."""
        codes = np.arange(-128, 128)
        return numerics.dequantize(codes, np.asarray(np.float32(self.scale)), np.array(self.zero_point))


#: What is said of floats that are stored as they are.
FLOAT = Grid(1.0, 0, "float32")


@dataclass(frozen=True, eq=False)
class Codes:
    """A float value that is a function of codes, element by element.

    Parameters
    ----------
    tensor : str
        Of shape [shape[axis] for axis in order].
    shape : tuple of int
        In the model.
    order : tuple of int
        Which axis of the model stands at each place as stored.
    grid : Grid
        Of the tensor.
    levels : ndarray of float, shape (256,), optional
        What the codes from -128 to 127 stand for, where that is not (code - zero point) · scale.
    map : Codes, optional
        The map that a vector holds the codes of as they are stored, not in the order that the model flattens it in:
        weights that read it are put into that order, and only what cannot do so moves codes (`Writer.settled`).
    """

    tensor: str
    shape: tuple[int, ...]
    order: tuple[int, ...]
    grid: Grid
    levels: FloatArray | None = None
    map: Codes | None = None

    @property
    def stored(self) -> tuple[int, ...]:
        """The tensor's shape."""
        return tuple(self.shape[axis] for axis in self.order)

    def place_of(self, axis: int) -> int:
        """Return where an axis of the model is stored."""
        return self.order.index(axis % len(self.shape))


@dataclass(frozen=True, eq=False)
class Pending:
    """The result of an operation that waits for the scale of its codes.

    Parameters
    ----------
    node : onnx_ir.Node
    shape, order : tuple of int
        As of `Codes`.
    finish : callable
        Given grid, lowest and highest code, and a name, writes the operation and returns the tensor's name.
    low, high : float
        Bounds by a Relu or Clip behind it.
    natural : Grid, optional
        What is right for its range, where that is known.
    finish_real : callable, optional
        Given lowest and highest value, and a name, writes the operation with floats for a result.
    affine : callable, optional
        Given a factor and a summand per channel of the last axis, returns the same result times the one plus the other,
        or None.
    """

    node: ir.Node
    shape: tuple[int, ...]
    order: tuple[int, ...]
    finish: Callable[[Grid, int, int, str], str]
    low: float = -np.inf
    high: float = np.inf
    natural: Grid | None = None
    finish_real: Callable[[float, float, str], str] | None = None
    affine: Callable[[Factors, Factors], Pending | None] | None = None

    def settle_real(self, name: str) -> Codes:
        """Write the operation with floats for a result."""
        if self.finish_real is None:
            refuse(self.node, "leaves its result in float", "quantize it: it has a kernel for codes alone")
        return Codes(self.finish_real(self.low, self.high, name), self.shape, self.order, FLOAT)

    def clipped(self, low: float, high: float) -> Pending:
        """Return it between narrower bounds."""
        least = min(max(self.low, low), high)
        return replace(self, low=least, high=max(min(self.high, high), least))

    def settle(self, grid: Grid, name: str) -> Codes:
        """Write the operation with the codes that it is to have."""
        low = grid.low if self.low == -np.inf else int(grid.codes(self.low))
        high = grid.high if self.high == np.inf else int(grid.codes(self.high))
        return Codes(self.finish(grid, low, high, name), self.shape, self.order, grid)


def channels_last(rank: int) -> tuple[int, ...]:
    """Return the order of a map's axes as stored: batch, space, channels."""
    return (0, *range(2, rank), 1)


def moves_nothing(shape: Sequence[int], order: Sequence[int], other: Sequence[int]) -> bool:
    """Tell whether two orders of axes are the same but for axes of one element."""
    return [axis for axis in order if shape[axis] != 1] == [axis for axis in other if shape[axis] != 1]


class Writer:
    """The program as far as it is written."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.operations: list[Operation] = []

    def add_tensor(self, name: str, shape: Sequence[int], grid: Grid) -> str:
        """Add a tensor under a name that none has yet, and return that."""
        free = name
        while free in self.tensors:
            free += "_"
        self.tensors[free] = Tensor(free, tuple(map(int, shape)), grid.dtype, grid.scale, grid.zero_point)
        return free

    def write(self, operation: Operation) -> str:
        """Add an operation and return its output."""
        self.operations.append(operation)
        return operation.output

    def viewed(self, tensor: str, shape: Sequence[int]) -> str:
        """Return a tensor's codes under another shape."""
        known = self.tensors[tensor]
        if known.shape == tuple(shape):
            return tensor
        grid = Grid(known.scale, known.zero_point, known.dtype)
        output = self.add_tensor(f"{tensor}_view", shape, grid)
        return self.write(View(output, (tensor,), output))

    def arranged(self, codes: Codes, order: Sequence[int]) -> Codes:
        """Return the same value with its axes stored in another order."""
        target = replace(codes, order=tuple(order))
        if moves_nothing(codes.shape, codes.order, order):
            return replace(target, tensor=self.viewed(codes.tensor, target.stored))
        output = self.add_tensor(f"{codes.tensor}_transposed", target.stored, codes.grid)
        axes = tuple(codes.order.index(axis) for axis in order)
        return replace(target, tensor=self.write(Transpose(output, (codes.tensor,), output, axes)))

    def settled(self, codes: Codes) -> Codes:
        """Return a flattened map with its codes in the model's order."""
        if codes.map is None:
            return codes
        moved = self.arranged(codes.map, tuple(range(len(codes.map.shape))))
        return replace(codes, tensor=self.viewed(moved.tensor, codes.shape), map=None)

    def on_grid(self, codes: Codes, grid: Grid, name: str, node: ir.Node) -> Codes:
        """Return a value as codes of a grid, through a table where they are other ones."""
        if codes.levels is None and codes.grid.same(grid):
            return replace(codes, grid=grid)
        codes = self.settled(codes)
        if "int4" in (codes.grid.dtype, grid.dtype):
            refuse(node, "changes the scale of int4 codes", "give what it joins one scale, or 8 bits")
        if codes.grid.dtype != "int8":
            return self.rescaled(codes, grid, name, node)
        levels = codes.grid.levels() if codes.levels is None else codes.levels
        table = grid.codes(levels).astype(grid.dtype)
        if grid.dtype == "int8" and np.array_equal(table, np.arange(-128, 128)):
            # Equal codes under other parameters: a view carries these.
            output = self.add_tensor(name, codes.stored, grid)
            self.write(View(node.name or output, (codes.tensor,), output))
        else:
            output = self.add_tensor(name, codes.stored, grid)
            self.write(Lookup(node.name or output, (codes.tensor,), output, table))
        return replace(codes, tensor=output, grid=grid, levels=None)

    def rescaled(
        self, codes: Codes, grid: Grid, name: str, node: ir.Node, bounds: tuple[int, int] | None = None
    ) -> Codes:
        """Return 16-bit codes as codes of another grid, perhaps between bounds: of 65,536 codes there is no table."""
        multiplier, shift = fixed_point([np.float64(codes.grid.scale) / grid.scale], node)
        low, high = (grid.low, grid.high) if bounds is None else bounds
        output = self.add_tensor(name, codes.stored, grid)
        step = Requantize(multiplier, shift, grid.zero_point, low, high)
        self.write(Rescale(node.name or output, (codes.tensor,), output, codes.grid.zero_point, step))
        return replace(codes, tensor=output, grid=grid, levels=None)

    def narrowed(self, codes: Codes, node: ir.Node) -> Codes:
        """Return a value as plain codes of 8 bits: those of 16 over the same range."""
        codes = self.plain(codes, node)
        if codes.grid.dtype == "int8":
            return codes
        scale = float(np.float32(codes.grid.scale * 257.0))
        grid = Grid(scale, round((codes.grid.zero_point - codes.grid.low) / 257.0) - 128)
        return self.on_grid(codes, grid, f"{codes.tensor}_{node.name}", node)

    def plain(self, codes: Codes, node: ir.Node) -> Codes:
        """Return a value as codes that stand for (code - zero point) · scale, on a grid of its own if they do not."""
        if codes.levels is None:
            return codes
        return self.on_grid(codes, spanning(codes.levels), f"{codes.tensor}_{node.name}", node)


def fixed_point(ratio: npt.ArrayLike, node: ir.Node) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """Return multipliers and shifts; a ratio that no fixed-point number holds is refused for a node."""
    try:
        return numerics.fixed_point(ratio)
    except ValueError as error:
        refuse(node, f"its scales are out of proportion ({error})", "calibrate its result with real data")


def spanning(levels: npt.NDArray[Any]) -> Grid:
    """Return the grid of int8 that just holds all levels."""
    scale, zero_point = numerics.affine_scale(levels.min(), levels.max(), "int8")
    return Grid(float(scale), int(zero_point))


def shape_of(value: ir.Value) -> tuple[int, ...]:
    """Return a shape of which shape inference knows all."""
    return tuple(length for length in value.shape or () if isinstance(length, int))


def as_map(stored: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of a map that what is stored is: a sequence goes down the rows of a single column."""
    return stored if len(stored) == 4 else (stored[0], stored[1], 1, stored[2])
