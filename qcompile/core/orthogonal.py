"""Orthogonal matrices as frozen descriptions: a kind and a seed, or the numbers themselves where they were learned.

A rotation of n channels is x ↦ xR with R Rᵀ = I: it is taken back by Rᵀ, and leaves sums of squares as they are.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from qcompile.core.hadamard import hadamard, largest_block

Matrix = npt.NDArray[np.float64]

#: Smaller blocks spread a channel over too few: where none as large divides the width, the matrix is drawn instead.
SMALLEST_BLOCK = 16


class OrthogonalKind(StrEnum):
    """How a matrix is made."""

    HADAMARD = "hadamard"
    """Blocks of one Hadamard matrix / √block, rows and columns with signs that the seed draws."""
    RANDOM = "random"
    """Uniform over all orthogonal matrices: Q of a matrix of normal numbers, signs by R's diagonal (Mezzadri 2007)."""
    STORED = "stored"
    """Numbers, such as what was learned."""


@dataclass(frozen=True)
class Orthogonal:
    """An orthogonal matrix R `[width, width]`.

    Parameters
    ----------
    kind : OrthogonalKind
    width : int
        n, the number of channels.
    seed : int
        Draws the signs, or the matrix.
    block : int
        The order of the Hadamard matrix; divides the width.
    keeps_ones : bool
        R·1 = 1, so that the mean over the channels stays what it is, as a LayerNorm behind it needs. `keeping_ones`
        makes it so of the matrix that is otherwise described.
    stored : bytes
        Numbers of a STORED one: float64, little-endian, row by row.
    """

    kind: OrthogonalKind
    width: int
    seed: int = 0
    block: int = 1
    keeps_ones: bool = False
    stored: bytes = b""

    @classmethod
    def spreading(cls, width: int, seed: int = 0, *, keeps_ones: bool = False, block: int | None = None) -> Self:
        """Describe signs and a Hadamard matrix of the width, else in blocks that divide it, else a drawn one.

        Parameters
        ----------
        width, seed, keeps_ones
            As in the class.
        block : int, optional
            Of this order, for products that are to be cheap.
        """
        order = largest_block(width) if block is None else block
        if block is None and order < min(SMALLEST_BLOCK, width):
            return cls(OrthogonalKind.RANDOM, width, seed, keeps_ones=keeps_ones)
        return cls(OrthogonalKind.HADAMARD, width, seed, order, keeps_ones)

    @classmethod
    def of(cls, matrix: Matrix, *, keeps_ones: bool = False) -> Self:
        """Store a matrix, as near to it as an orthogonal one is.

        Raises
        ------
        ValueError
            If it is not orthogonal to 1e-6, or should keep ones and does not.
        """
        u, _, vt = np.linalg.svd(np.asarray(matrix, np.float64))
        nearest = u @ vt
        if not np.allclose(nearest, matrix, atol=1e-6):
            raise ValueError("the matrix is not orthogonal")
        if keeps_ones and not np.allclose(nearest.sum(axis=1), 1.0, atol=1e-6):
            raise ValueError("the matrix does not keep ones")
        content = np.ascontiguousarray(nearest, "<f8").tobytes()
        return cls(OrthogonalKind.STORED, len(nearest), keeps_ones=keeps_ones, stored=content)

    def matrix(self) -> Matrix:
        """Compute R, orthogonal to 1e-12."""
        made = self._made()
        return keeping_ones(made) if self.keeps_ones else made

    def _made(self) -> Matrix:
        if self.kind is OrthogonalKind.STORED:
            return np.frombuffer(self.stored, "<f8").reshape(self.width, self.width).astype(np.float64)
        random = np.random.default_rng(self.seed)
        if self.kind is OrthogonalKind.RANDOM:
            q, r = np.linalg.qr(random.standard_normal((self.width, self.width)))
            drawn: Matrix = q * np.sign(np.diag(r))
            return drawn
        signs = hadamard(self.block)
        if signs is None or self.width % self.block:
            raise ValueError(f"no Hadamard matrix of order {self.block} divides {self.width} channels")
        before, behind = random.choice([-1.0, 1.0], (2, self.width))
        whole = np.kron(np.eye(self.width // self.block), signs / np.sqrt(self.block))
        # The signs behind do nothing but keep R·1 from one channel, so that `keeping_ones` changes little.
        matrix: Matrix = before[:, None] * whole * behind
        return matrix

    def to_json(self) -> dict[str, Any]:
        """Return the description as JSON's types."""
        entry: dict[str, Any] = {"kind": self.kind.value, "width": self.width, "seed": self.seed}
        entry |= {"block": self.block, "keeps_ones": self.keeps_ones}
        return entry | ({"stored": base64.b64encode(self.stored).decode()} if self.stored else {})

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> Self:
        """Read what `to_json` returned.

        Raises
        ------
        ValueError, KeyError, TypeError
            If it describes no orthogonal matrix.
        """
        stored, kind = base64.b64decode(entry.get("stored", ""), validate=True), OrthogonalKind(entry["kind"])
        found = cls(kind, entry["width"], entry["seed"], entry["block"], entry["keeps_ones"], stored)
        if not (found.width > 0 and found.seed >= 0 and found.block > 0):
            raise ValueError(f"a matrix of {found.width} channels, in blocks of {found.block}, by seed {found.seed}")
        if kind is OrthogonalKind.STORED:
            cls.of(found.matrix(), keeps_ones=found.keeps_ones)
        elif kind is OrthogonalKind.HADAMARD and (hadamard(found.block) is None or found.width % found.block):
            raise ValueError(f"no Hadamard matrix of order {found.block} divides {found.width} channels")
        return found


def keeping_ones(matrix: Matrix) -> Matrix:
    """Return P R with the Householder reflection P that takes R·1 to 1, so that (P R)·1 = 1.

    It differs from R by a matrix of rank one, whose entries are small where R spreads: 2uuᵀR with unit vectors u.

    Parameters
    ----------
    matrix : ndarray `[n, n]`
        R, orthogonal.
    """
    ones = np.full(len(matrix), 1 / np.sqrt(len(matrix)))
    away = matrix @ ones - ones
    length = float(np.linalg.norm(away))
    if length < 1e-12:
        return matrix
    unit = away / length
    return matrix - 2.0 * np.outer(unit, unit @ matrix)
