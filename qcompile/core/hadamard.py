"""Hadamard matrices: n mutually orthogonal rows of ±1. They spread one channel evenly over all.

They exist for 1, 2 and, as far as is known, every multiple of four. Built here: Paley's two constructions over prime
fields (Paley 1933), and Kronecker products of what they give (Sylvester 1867). Up to 1,000 that is 188 of the 252
orders; 52 and 92 are the first that are missing.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import numpy.typing as npt

Signs = npt.NDArray[np.int8]


@lru_cache(maxsize=8)
def hadamard(order: int) -> Signs | None:
    """Return a matrix H `[n, n]` of ±1 with H Hᵀ = n I, or None if these constructions have none of this order.

    Parameters
    ----------
    order : int
        n; at least 1.
    """
    factors = _factors(order)
    if factors is None:
        return None
    matrix = np.ones((1, 1), np.int8)
    for factor in factors:
        matrix = np.kron(matrix, _prime(factor))
    matrix.flags.writeable = False
    return matrix


def largest_block(width: int) -> int:
    """Return the largest order with a Hadamard matrix that divides a width; 1 if the width is odd."""
    return next(block for block in range(width, 0, -1) if width % block == 0 and _factors(block) is not None)


@lru_cache(maxsize=4096)
def _factors(order: int) -> tuple[int, ...] | None:
    """Return orders that `_prime` builds and whose product this one is, or None."""
    if order == 1:
        return ()
    if order == 2 or _is_paley_1(order) or _is_paley_2(order):
        return (order,)
    if order % 4:
        return None
    for first in range(2, math.isqrt(order) + 1):
        if order % first == 0:
            parts = _factors(first), _factors(order // first)
            if parts[0] is not None and parts[1] is not None:
                return parts[0] + parts[1]
    return None


def _prime(order: int) -> Signs:
    if order == 2:
        return np.array([[1, 1], [1, -1]], np.int8)
    return _paley_1(order) if _is_paley_1(order) else _paley_2(order)


def _is_paley_1(order: int) -> bool:
    return order % 4 == 0 and _is_prime(order - 1)


def _is_paley_2(order: int) -> bool:
    return order % 4 == 0 and (order // 2 - 1) % 4 == 1 and _is_prime(order // 2 - 1)


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, math.isqrt(number) + 1))


def _bordered(q: int, below: int) -> Signs:
    """Return Jacobsthal's matrix χ(i - j) of a prime field with a border of ones, `below` along its column."""
    residues = np.full(q, -1, np.int8)
    residues[np.arange(1, q, dtype=np.int64) ** 2 % q] = 1
    residues[0] = 0
    matrix = np.zeros((q + 1, q + 1), np.int8)
    matrix[0, 1:], matrix[1:, 0] = 1, below
    matrix[1:, 1:] = residues[np.subtract.outer(np.arange(q), np.arange(q)) % q]
    return matrix


def _paley_1(order: int) -> Signs:
    """Return I + S with S skew: q = n - 1 is 3 modulo 4."""
    signs: Signs = _bordered(order - 1, -1) + np.eye(order, dtype=np.int8)
    return signs


def _paley_2(order: int) -> Signs:
    """Return S ⊗ [[1, 1], [1, -1]] + I ⊗ [[1, -1], [-1, -1]] with S symmetric: q = n/2 - 1 is 1 modulo 4."""
    symmetric = _bordered(order // 2 - 1, 1)
    ones, signs = np.array([[1, 1], [1, -1]], np.int8), np.array([[1, -1], [-1, -1]], np.int8)
    matrix: Signs = np.kron(symmetric, ones) + np.kron(np.eye(order // 2, dtype=np.int8), signs)
    return matrix
