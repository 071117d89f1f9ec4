"""Kernels of what multiplies by weights: which one computes a layer, in which tile, and how it stores the weights."""

from __future__ import annotations

from dataclasses import astuple, dataclass
from math import gcd

import numpy as np
import numpy.typing as npt

from qcompile.backends.integer import operations as ops
from qcompile.backends.integer.float_operations import Dequantize, FloatDense
from qcompile.backends.integer.program import Tensor
from qcompile.backends.tvm.definitions import HIGH_WORD

Int8Array = npt.NDArray[np.int8]
Int32Array = npt.NDArray[np.int32]

#: Codes that a tensor core multiplies at once: rows of weights are filled up to a multiple of them.
DEEP = 32
#: Codes of a step of a tile.
STEP = 64
#: Tiles of shared memory that are in flight, and the bytes of it that a kernel may declare.
STAGES, DECLARED = 3, 49152
#: From so few positions on a warp computes each output alone.
FEW = 8
#: Threads of a block of depthwise convolutions, and warps of a block for few positions.
DEPTHWISE_THREADS, WARPS = 128, 4
Layer = ops.Conv | ops.Dense | FloatDense
#: How sums end, as linear.cuh has it: by whole products, by their high words, as floats.
SHIFTED, HIGH, REAL = "SHIFTED", "HIGH", "REAL"
#: Multiprocessors that tiles are chosen for: between Jetson's 16 and H100's 132.
PROCESSORS = 48


@dataclass(frozen=True)
class Tile:
    """Outputs that a block computes, and how its warps share them.

    Parameters
    ----------
    pixels, outputs : int
    down, across : int
        Warps; none of dp4a's tiles, whose threads are 16 x 16.
    """

    pixels: int
    outputs: int
    down: int = 0
    across: int = 0

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return 32 * self.down * self.across or 256

    @property
    def resident(self) -> str:
        """Blocks that a multiprocessor is to have room for in registers."""
        return "RESIDENT" if self.threads == 256 and self.pixels * self.outputs <= 64 * self.threads else "1"

    @property
    def launched(self) -> int:
        """Bytes of shared memory that a launch gives it, where that is more than a kernel may declare."""
        nbytes = STAGES * (self.pixels + self.outputs) * STEP
        return nbytes if nbytes > DECLARED else 0

    @property
    def kind(self) -> str:
        """What computes its sums, in linear.cuh."""
        if not self.down:
            return f"DotProducts<{self.pixels}, {self.outputs}>"
        return f"TensorCores<{self.pixels}, {self.outputs}, {self.down}, {self.across}>"


#: Tiles of tensor cores; each warp has 16 rows and 16 columns at least.
TILES = (Tile(128, 256, 2, 4), Tile(128, 128, 2, 4), Tile(128, 64, 4, 2), Tile(64, 64, 2, 2), Tile(128, 32, 4, 1),
         Tile(32, 64, 2, 2), Tile(64, 32, 2, 2), Tile(32, 32, 2, 1))  # fmt: skip
#: Of dp4a: for groups that would leave tensor cores mostly idle.
NARROW = Tile(64, 16)


@dataclass(frozen=True)
class Shape:
    """The numbers that kernels take: `Linear` of linear.cuh, in its order."""

    rows: int
    columns: int
    channels: int
    height: int
    width: int
    outputs: int
    window_columns: int
    stride_y: int
    stride_x: int
    dilation_y: int
    dilation_x: int
    top: int
    left: int
    depth: int
    stored_depth: int
    group_channels: int
    group_outputs: int
    blocks: int
    outside: int
    zero_point: int
    low: int
    high: int

    @property
    def numbers(self) -> tuple[int, ...]:
        """All of them."""
        return astuple(self)

    @property
    def pixels(self) -> int:
        """Positions of the output."""
        return self.height * self.width


@dataclass(frozen=True, eq=False)
class LinearKernel:
    """A layer's kernel and what it takes.

    Parameters
    ----------
    body : str
        Its call of a template, with arguments ``input``, ``weights``, ``table``, ``output``, ``shape``.
    stem : str
        What kernels of its kind are called by.
    shape : Shape
    grid : tuple of int
    threads : int
    weights : ndarray of int8
        As it stores them.
    table : ndarray of int32, shape (outputs, 3)
        Bias, multiplier and shift of each; bias and the bits of its scale where results are floats.
    floats : bool
        Whether they are.
    resident : str
        Blocks that a multiprocessor is to have room for.
    launched : int
        Bytes of shared memory that a launch gives it.
    """

    body: str
    stem: str
    shape: Shape
    grid: tuple[int, int]
    threads: int
    weights: Int8Array
    table: Int32Array
    floats: bool = False
    resident: str = "1"
    launched: int = 0


def form_of(step: ops.Requantize | Dequantize) -> str:
    """Return how sums end."""
    if isinstance(step, Dequantize):
        return REAL
    return HIGH if np.all(step.shift >= HIGH_WORD) else SHIFTED


def linear_kernel(operation: Layer, source: Tensor, target: Tensor, samples: int = 1) -> LinearKernel:
    """Return the kernel of a layer, in a tile for so many samples: what it stores is the same for all."""
    form = form_of(operation.requantize)
    table = _table(operation, form)
    if isinstance(operation, ops.Conv) and _depthwise(operation, source, target):
        return _depthwise_kernel(operation, _shape(operation, source, target, form, 1), table, form)
    shape = _shape(operation, source, target, form, STEP)
    groups = shape.outputs // shape.group_outputs
    alike = shape.depth == shape.channels and shape.rows * shape.columns == shape.pixels
    if alike and groups == 1 and shape.pixels <= FEW and not (shape.top or shape.left):
        return _gemv_kernel(operation, shape, table, form)
    tile = tile_of(shape, samples, form)
    blocks = -(-shape.group_outputs // tile.outputs)
    shape = _shape(operation, source, target, form, tile.outputs)
    widest = 16 if tile.down else 4
    taken, given = gcd(widest, shape.channels, shape.group_channels), gcd(16, shape.outputs, shape.group_outputs)
    taken = taken if taken >= 4 else 1
    given = given if given >= 4 else 1
    body = f"linear<{tile.kind}, {tile.pixels}, {tile.outputs}, {taken}, {given}, {form}>"
    grid = -(-shape.pixels // tile.pixels), groups * blocks
    rows = operation.weights.reshape(len(operation.weights), -1)
    stem = "linear" if tile.down else "narrow"
    stored = filled(rows, shape.stored_depth)
    return LinearKernel(
        body, stem, shape, grid, tile.threads, stored, table, form == REAL, tile.resident, tile.launched
    )


def tile_of(shape: Shape, samples: int = 1, form: str = HIGH) -> Tile:
    """Return the tile that takes fewest cycles by count: the same everywhere, whatever device it will run on."""
    if shape.group_outputs < 8 or shape.depth < 16:
        return NARROW
    groups = shape.outputs // shape.group_outputs
    # The largest one has no registers left to gather codes one by one, nor for products of 64 bits.
    whole = gcd(16, shape.channels, shape.group_channels) == 16 and form != SHIFTED

    def cycles(tile: Tile) -> tuple[int, int]:
        blocks = -(-shape.pixels // tile.pixels) * -(-shape.group_outputs // tile.outputs) * groups * samples
        # A step's products at 1024 a cycle, or the bytes that it takes at 32 a cycle, and what passing a barrier takes.
        step = max(tile.pixels * tile.outputs * STEP // 1024, (tile.pixels + tile.outputs) * STEP // 32) + 60
        waves = max(1.0, blocks / PROCESSORS)
        return round(waves * step * -(-shape.stored_depth // STEP)), -tile.pixels * tile.outputs

    return min((tile for tile in TILES if whole or not tile.launched), key=cycles)


def filled(rows: Int8Array, length: int) -> Int8Array:
    """Return rows of weights with zeros behind them, so many codes long."""
    return np.ascontiguousarray(np.pad(rows, ((0, 0), (0, length - rows.shape[1]))))


def by_taps(weights: Int8Array) -> Int8Array:
    """Return depthwise weights as depthwise.cuh reads them: [channel / 4][tap / 4][channel % 4][tap % 4].

    Parameters
    ----------
    weights : ndarray of int8, shape (channels, taps)
    """
    channels, taps = weights.shape
    whole = np.pad(weights, ((0, -channels % 4), (0, -taps % 4)))
    return np.ascontiguousarray(whole.reshape(-1, 4, whole.shape[1] // 4, 4).transpose(0, 2, 1, 3))


def _depthwise(operation: ops.Conv, source: Tensor, target: Tensor) -> bool:
    return operation.groups == source.shape[-1] == target.shape[-1] > 1


def _depthwise_kernel(operation: ops.Conv, shape: Shape, table: Int32Array, form: str) -> LinearKernel:
    vector = 4 if shape.channels % 4 == 0 else 1
    height, width = operation.window.size
    body = f"depthwise<{height}, {width}, {DEPTHWISE_THREADS}, {vector}, {form}>"
    work = shape.pixels * -(-shape.channels // 4)
    weights = by_taps(operation.weights.reshape(shape.outputs, -1))
    grid = -(-work // DEPTHWISE_THREADS), 1
    return LinearKernel(body, "depthwise", shape, grid, DEPTHWISE_THREADS, weights, table)


def _gemv_kernel(operation: Layer, shape: Shape, table: Int32Array, form: str) -> LinearKernel:
    taken = gcd(16, shape.depth)
    body = f"gemv<{WARPS}, {taken if taken in (4, 16) else 4 if taken == 8 else 1}, {form}>"
    weights = filled(operation.weights.reshape(shape.outputs, -1), shape.stored_depth)
    grid = -(-shape.outputs // WARPS), shape.pixels
    return LinearKernel(body, "gemv", shape, grid, 32 * WARPS, weights, table, form == REAL)


def _table(operation: Layer, form: str) -> Int32Array:
    step = operation.requantize
    if isinstance(step, Dequantize):
        columns = np.broadcast_arrays(operation.bias, step.scale.view(np.int32), np.int32(0))
    else:
        places = step.shift - (HIGH_WORD if form == HIGH else 0)
        columns = np.broadcast_arrays(operation.bias, step.multiplier, places)
    return np.ascontiguousarray(np.stack(columns, axis=-1), np.int32)


def ending(step: ops.Requantize | Dequantize, form: str) -> tuple[int, int, int]:
    """Return the zero point and the bounds that a kernel is given; of floats the bits of the bounds."""
    if isinstance(step, Dequantize):
        low, high = (int(np.float32(bound).view(np.int32)) for bound in (step.low, step.high))
        return 0, low, high
    return 2 * step.zero_point + 1 if form == HIGH else step.zero_point, step.low, step.high


def _shape(operation: Layer, source: Tensor, target: Tensor, form: str, block: int) -> Shape:
    outputs = len(operation.weights)
    depth = operation.weights.size // outputs
    if isinstance(operation, ops.Conv):
        window, groups = operation.window, operation.groups
        rows, columns, height, width = *source.shape[1:3], *target.shape[1:3]
    else:
        window, groups = ops.Window((1, 1)), 1
        rows, columns = source.size // source.shape[-1], 1
        height, width = rows, columns
    channels = source.shape[-1]
    return Shape(
        rows, columns, channels, height, width, outputs, window.size[1], *window.strides, *window.dilations,
        *window.pads[:2], depth, -(-depth // DEEP) * DEEP, channels // groups, outputs // groups,
        -(-(outputs // groups) // block), window.outside,
        *ending(operation.requantize, form),
    )  # fmt: skip
