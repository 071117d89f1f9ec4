"""The integer program: a network as an ordered list of operations on codes, with no float anywhere.

What an operation computes is said in `operations.py` and done by `interpret.py`, to which every generated kernel is
equal bit by bit. An activation with code q stands for (q - zero_point) · scale. Maps of four axes are stored channels
last, [1, H, W, C]; batch is 1 and every shape is known. See docs/integer-kernels.md.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from qcompile.core import numerics

#: Types of tensors that are no codes.
PLAIN = ("float32", "int64")


@dataclass(frozen=True)
class Tensor:
    """An activation.

    Parameters
    ----------
    name : str
    shape : tuple of int
        As it is stored: [1, H, W, C] of a map.
    dtype : str
        ``int8``, ``int16``, or ``int4``: two codes a byte, the first in its low half, rows of whole bytes. Of what is
        no codes, where a target has floats: ``float32``, or an input's ``int64``; their scale is 1.
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
    def is_codes(self) -> bool:
        """Whether its elements are codes, and no floats nor an input's integers."""
        return self.dtype not in PLAIN

    @property
    def bits(self) -> int:
        """Bits that an element is stored in: 4, 8 or 16 of a code."""
        return numerics.bits_of(self.dtype) if self.is_codes else 8 * np.dtype(self.dtype).itemsize

    @property
    def array_dtype(self) -> str:
        """The type of an array that holds its codes one by one."""
        return "int8" if self.bits == 4 else self.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of its codes."""
        return -(-self.size * self.bits // 8)

    @property
    def rows(self) -> int:
        """How many rows kernels go through from the top: those of a map, or all positions in front of the last axis."""
        return self.shape[0] * self.shape[1] if len(self.shape) == 4 else self.size // max(self.shape[-1:], default=1)

    @property
    def row_codes(self) -> int:
        """Codes of one row."""
        return self.size // self.rows

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return self.nbytes // self.rows


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
