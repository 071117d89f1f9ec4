"""W4A16: one row of halves times weights of four bits, of which every 32 have a scale; see kernels/w4a16.cuh.

The codes lie as ONNX Runtime's MatMulNBits has them, and stand for (code - 8) · scale.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from qcompile.backends.cuda.blocks import ROWS, WARPS, few_rows
from qcompile.backends.cuda.floats import bits
from qcompile.backends.cuda.network import prelude

#: Codes that have a scale.
BLOCK = 32


@dataclass(frozen=True)
class Gemv:
    """The kernel for a matrix.

    Parameters
    ----------
    outputs, depth : int
        Of the matrix; `depth` is a multiple of `BLOCK`.
    """

    outputs: int
    depth: int

    def source(self, name: str) -> str:
        """Return its CUDA C++, with all that it builds on."""
        return prelude() + self.kernel(name)

    def kernel(self, name: str) -> str:
        """Return it alone."""
        return few_rows(4, 1, "uint16_t").replace("{name}", name)

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return 32 * WARPS

    @property
    def grid(self) -> tuple[int, int, int]:
        """Blocks."""
        return -(-self.outputs // (WARPS * ROWS)), 1, 1

    @property
    def numbers(self) -> tuple[int, ...]:
        """The struct behind its pointers: x, codes, scales, table, output."""
        blocks = self.depth // BLOCK
        return 1, self.depth, self.outputs, blocks, 0, blocks, bits(-np.inf), bits(np.inf)

    @property
    def table(self) -> npt.NDArray[np.float32]:
        """What its sums are multiplied by, and what is added: nothing."""
        return np.tile(np.array([1.0, 0.0], np.float32), (self.outputs, 1))

    @property
    def nbytes(self) -> int:
        """Bytes that it reads and writes: codes, scales, the table, and one row each of x and output."""
        weights = self.outputs * self.depth // 2 + 2 * self.outputs * self.depth // BLOCK + 8 * self.outputs
        return weights + 2 * (self.outputs + self.depth)


def pack(codes: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Return codes from 0 to 15 two a byte, the first in its low half.

    Parameters
    ----------
    codes : ndarray of uint8, shape (outputs, depth)
        `depth` is a multiple of `BLOCK`.

    Returns
    -------
    ndarray of uint8, shape (outputs, depth / 2)

    Raises
    ------
    ValueError
        If it is not, or a code is larger.
    """
    if codes.shape[1] % BLOCK or codes.max(initial=0) > 15:
        raise ValueError(f"{codes.shape} codes up to {codes.max(initial=0)} are no blocks of {BLOCK} of four bits")
    return np.ascontiguousarray(codes[:, ::2] | codes[:, 1::2] << 4)


def exact(
    x: npt.NDArray[np.float16], codes: npt.NDArray[np.uint8], scales: npt.NDArray[np.float16]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return what the kernel approximates, and by how much it may be off.

    Terms are exact; each is added a few times in float32 (unit roundoff 2^-24), and the sum is rounded to a half.

    Parameters
    ----------
    x : ndarray of float16, shape (depth,)
    codes : ndarray of uint8, shape (outputs, depth)
    scales : ndarray of float16, shape (outputs, depth / BLOCK)

    Returns
    -------
    sums, bounds : ndarray of float64, shape (outputs,)
    """
    weights = (codes.astype(np.float64) - 8.0) * np.repeat(scales.astype(np.float64), BLOCK, axis=1)
    sums = weights @ x.astype(np.float64)
    # In a block 32 times, each lane one block in 32, then five sums of lanes, and the scale.
    additions = BLOCK + -(-codes.shape[1] // (BLOCK * 32)) + 7
    size = np.abs(weights) @ np.abs(x.astype(np.float64))
    off = additions * 2.0**-24 * size
    return sums, off + (np.abs(sums) + off) * 2.0**-11 + 2.0**-25
