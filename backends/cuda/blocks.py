"""Dense layers of floats by weights with a scale for each block of their inputs; see kernels/w4a16.cuh."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from qcompile.backends.cuda.floats import Kernel, Scratch, Tensors, bits, function
from qcompile.backends.cuda.linear import DEEP, FEW, PROCESSORS
from qcompile.backends.integer.float_operations import BlockDense, HalfDense
from qcompile.backends.integer.program import Operation, Program
from qcompile.core.errors import TargetError

#: Warps of a block for few rows, and outputs of each; threads that make halves of a row.
WARPS, ROWS, HALVING = 4, 2, 128
#: For many rows: rows, outputs, warps down and across.
TILES = ((128, 128, 2, 4), (64, 64, 2, 2), (32, 64, 2, 2))
#: A shift that leaves nothing of any chunk's number: all of them have one scale.
ALL = 31
FIELDS = "const Blocks shape"


@dataclass(frozen=True, eq=False)
class Stored:
    """Weights as kernels read them.

    Parameters
    ----------
    codes : ndarray of uint8, shape (outputs, chunks * 4 * bits)
        Half of all codes above their own: of four bits two a byte.
    scales : ndarray of float16, shape (outputs, scales)
        As parts of `table`.
    table : ndarray of float32, shape (outputs, 2)
        A power of two that scales are multiplied by, and the bias.
    each : int
        Scales of a chunk: 1 or 2.
    shift : int
        2^shift chunks have one in common.
    """

    codes: npt.NDArray[np.uint8]
    scales: npt.NDArray[np.float16]
    table: npt.NDArray[np.float32]
    each: int
    shift: int

    @property
    def nbytes(self) -> int:
        """Bytes of all."""
        return self.codes.nbytes + self.scales.nbytes + self.table.nbytes


def with_halves(program: Program) -> Program:
    """Return a program whose layers with a scale per block multiply floats, and no codes of eight bits."""
    operations = (HalfDense(**vars(part)) if isinstance(part, BlockDense) else part for part in program.operations)
    return replace(program, operations=tuple(operations))


def stored(operation: HalfDense) -> Stored:
    """Return a layer's weights as kernels read them.

    Raises
    ------
    TargetError
        If its blocks are none that kernels know.
    """
    (outputs, depth), block, most = operation.weights.shape, operation.block, 1 << (operation.bits - 1)
    chunks = -(-depth // DEEP)
    whole = np.full((outputs, chunks * DEEP), most, np.uint8)
    whole[:, :depth] = operation.weights.astype(np.int16) + most
    codes = whole[:, ::2] | whole[:, 1::2] << 4 if operation.bits == 4 else whole
    scale, each, shift = operation.scale, 1, ALL
    if block < depth and block == DEEP // 2:
        each = 2
        scale = np.pad(scale, ((0, 0), (0, 2 * chunks - scale.shape[1])))
    elif block < depth and block % DEEP == 0:
        per = block // DEEP
        shift = per.bit_length() - 1 if per.bit_count() == 1 else 0
        scale = scale if shift or per == 1 else np.repeat(scale, per, axis=1)[:, :chunks]
    elif block < depth:
        fact = f"has blocks of {block} inputs, and kernels for CUDA devices have blocks of 16 and multiples of 32"
        raise TargetError(operation.name, fact, "give its weights such blocks")
    _, exponent = np.frexp(np.abs(scale).max(axis=1))
    factor = np.exp2(exponent.astype(np.float32) - 1.0)
    table = np.stack([factor, operation.bias], axis=1).astype(np.float32)
    return Stored(np.ascontiguousarray(codes), (scale / factor[:, np.newaxis]).astype(np.float16), table, each, shift)


def _tile(rows: int, outputs: int) -> tuple[int, int, int, int]:
    """Return the tile that takes fewest cycles by count, as `linear.tile_of` does."""

    def cycles(tile: tuple[int, int, int, int]) -> tuple[float, int]:
        blocks = -(-rows // tile[0]) * -(-outputs // tile[1])
        step = max(tile[0] * tile[1] * DEEP // 512, (tile[0] + tile[1]) * DEEP // 16) + 60
        return max(1.0, blocks / PROCESSORS) * step, -tile[0] * tile[1]

    return min(TILES, key=cycles)


def _half_dense(operation: HalfDense, tensors: Tensors) -> list[Kernel]:
    (source,), target, weights = operation.inputs, operation.output, stored(operation)
    outputs, depth = operation.weights.shape
    rows, chunks = tensors[source].size // depth, -(-depth // DEEP)
    numbers = (rows, depth, outputs, chunks, weights.shift, weights.scales.shape[1], bits(operation.low),
               bits(operation.high))  # fmt: skip
    constants = weights.codes, weights.scales, weights.table
    if rows <= FEW:
        text = few_rows(operation.bits, weights.each, "float")
        grid = -(-outputs // (WARPS * ROWS)), rows
        return [Kernel("blocks", text, (source, *constants, target), grid, 32 * WARPS, numbers)]
    scratch = rows * chunks * DEEP * 2
    places = Scratch(0, scratch), Scratch(scratch, rows * 4)
    parameters = ["const float *x", "uint16_t *halves", "float *steps", FIELDS]
    text = function(HALVING, parameters, [f"halve<{operation.bits}, {HALVING}>(x, halves, steps, shape);"])
    tile = _tile(rows, outputs)
    threads = 32 * tile[2] * tile[3]
    parameters = ["const uint16_t *x", "const float *steps", "const uint32_t *codes", "const uint16_t *scales",
                  "const float2 *table", "float *output", FIELDS]  # fmt: skip
    called = ", ".join(map(str, (*tile, operation.bits, weights.each)))
    many = function(threads, parameters, [f"many_rows<{called}>(x, steps, codes, scales, table, output, shape);"])
    grid = -(-rows // tile[0]), -(-outputs // tile[1])
    return [
        Kernel("halve", text, (source, *places), (rows, 1), HALVING, numbers),
        Kernel("blocks", many, (*places, *constants, target), grid, threads, numbers),
    ]


def few_rows(bits_: int, each: int, kind: str) -> str:
    """Return a kernel for few rows.

    Parameters
    ----------
    bits_ : int
    each : int
        Scales of a chunk.
    kind : str
        What x and results are: ``float``, or ``uint16_t`` of halves.
    """
    parameters = [f"const {kind} *x", "const int4 *codes", "const uint16_t *scales", "const float2 *table",
                  f"{kind} *output", FIELDS]  # fmt: skip
    call = f"few_rows<{bits_}, {each}, {WARPS}, {ROWS}>(x, codes, scales, table, output, shape);"
    return function(32 * WARPS, parameters, [call])


GENERATORS: Mapping[type[Operation], Callable[[HalfDense, Tensors], list[Kernel]]] = {HalfDense: _half_dense}
