"""How codes are stored: as bytes, or two a byte. The one place where a code's bits become bytes."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from qcompile.backends.integer.operations import Add, AveragePool, Conv, MaxPool, View
from qcompile.backends.integer.program import Program, Tensor
from qcompile.core import numerics
from qcompile.core.errors import TargetError

#: What reads and writes codes of four bits: kernels unpack them while they gather, and pack what they requantize.
NARROW = (Conv, AveragePool, MaxPool, Add)
Codes = npt.NDArray[np.integer[Any]]


def to_bytes(codes: Codes, dtype: str) -> npt.NDArray[np.uint8]:
    """Return codes as they are stored.

    Parameters
    ----------
    codes : ndarray of int
        An even number of them where they have four bits.
    dtype : str
        ``int4``, ``int8`` or ``int16``.

    Returns
    -------
    ndarray of uint8, shape (bytes,)
        Of four bits, code 2i is in the low half of byte i and code 2i + 1 in its high half.
    """
    flat = np.ascontiguousarray(codes).reshape(-1)
    if dtype != "int4":
        return np.asarray(flat.astype(dtype)).view(np.uint8)
    halves = flat.astype(np.uint8) & 15
    return np.asarray(halves[0::2] | halves[1::2] << 4, np.uint8)


def from_bytes(stored: npt.NDArray[np.uint8], dtype: str) -> Codes:
    """Return the codes that bytes hold, shape (codes,): int8 for four bits too; see `to_bytes`."""
    if dtype != "int4":
        return np.ascontiguousarray(stored).view(dtype)
    halves = np.stack([stored & 15, stored >> 4], axis=-1).reshape(-1).astype(np.int8)
    return np.asarray((halves ^ 8) - 8, np.int8)


def require_forms(program: Program) -> Program:
    """Return the program, or say which of its tensors of four bits no kernel takes.

    Raises
    ------
    TargetError
    """
    narrow = {name for name, tensor in program.tensors.items() if tensor.bits == 4}
    remedy = "quantize it to 8 bits"
    for name in sorted(narrow):
        if not packs(program.tensors[name]):
            raise TargetError(f"tensor '{name}'", "has four bits and an odd number of codes in a row", remedy)
    for operation in program.operations:
        touched = narrow & {*operation.inputs, *operation.outputs}
        if touched and not isinstance(operation, NARROW):
            kind = "a reshape" if isinstance(operation, View) else f"{type(operation).__name__} '{operation.name}'"
            fact = f"has four bits, for which {kind} has no form"
            raise TargetError(f"tensor '{min(touched)}'", fact, remedy)
    for port in program.outputs:
        if port.tensor in narrow:
            raise TargetError(f"output '{port.name}'", "has four bits, which only inner maps may have", remedy)
    return program


def packs(tensor: Tensor) -> bool:
    """Tell whether a tensor could be stored in four bits: a map whose rows have an even number of codes."""
    return len(tensor.shape) == 4 and tensor.row_codes % 2 == 0


def random_codes(tensor: Tensor, random: np.random.Generator) -> Codes:
    """Return codes that a tensor could hold, every one as likely as any other."""
    low, high = numerics.code_range(tensor.dtype)
    return random.integers(low, high + 1, tensor.shape).astype(tensor.array_dtype)
