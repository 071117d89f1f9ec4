"""From an integer program to the C functions of its layers: kernels that are equal are one function."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from qcompile.backends.integer import operations as ops
from qcompile.backends.integer.program import Operation, Program, Strips, Tensor
from qcompile.backends.tvm.kernels import PLACEHOLDER, Kernel, kernels
from qcompile.backends.tvm.weight_forms import WeightForm

Array = npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class Layer:
    """One operation as C.

    Parameters
    ----------
    index : int
        Its number among the layers.
    operation : Operation
    kernels : tuple of Kernel
        None of a `Concat`.
    names : tuple of str
        The C functions that those became.
    """

    index: int
    operation: Operation
    kernels: tuple[Kernel, ...]
    names: tuple[str, ...]

    @property
    def by_row(self) -> bool:
        """Whether it computes row by row, and so any rows that are asked for."""
        return bool(self.kernels) and self.kernels[0].by_row

    @property
    def counted(self) -> bool:
        """Whether it goes through codes one by one, and so through any rows as well."""
        return bool(self.kernels) and "count" in self.kernels[0].arguments

    @property
    def takes_rows(self) -> bool:
        """Whether its function takes the first and last row to compute."""
        return self.by_row or self.counted

    @property
    def function(self) -> str:
        """The layer's C function."""
        return f"layer_{self.index}"

    def constant(self, kind: str) -> str:
        """Return the name of one of its constants."""
        return f"{kind}_{self.index}"

    @property
    def weight_bits(self) -> int:
        """Bits that a weight takes in flash; 0 without weights."""
        if not self.kernels or "weights" not in self.constants:
            return 0
        return 4 if self.kernels[0].form is WeightForm.NIBBLES else 8

    @property
    def constants(self) -> Mapping[str, Array]:
        """Its constants by kind; its kernels share them."""
        return self.kernels[0].constants if self.kernels else {}


@dataclass
class Layers:
    """The layers of a program, and the text of their kernels.

    Parameters
    ----------
    layers : list of Layer
        In the order in which they first run; those inside of strips are among them.
    sources : dict of str to str
        By name, the C of each kernel.
    """

    layers: list[Layer] = field(default_factory=list)
    sources: dict[str, str] = field(default_factory=dict)
    _names: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, program: Program, offsets: Mapping[str, int]) -> Layers:
        """Generate the kernels of a program.

        Parameters
        ----------
        program : Program
        offsets : mapping of str to int
            Where each tensor lies in the arena: it decides what may be computed at once.
        """
        found = cls()
        for operation in program.operations:
            parts: Sequence[Operation] = operation.operations if isinstance(operation, Strips) else (operation,)
            for part in parts:
                if not isinstance(part, ops.View):
                    inside = isinstance(operation, Strips)
                    found.take(part, program.tensors, flat=not inside and _apart(part, program.tensors, offsets))
        return found

    def take(self, operation: Operation, tensors: Mapping[str, Tensor], flat: bool) -> None:
        """Add an operation's layer."""
        generated = () if isinstance(operation, ops.Concat) else tuple(kernels(operation, tensors, flat))
        names = tuple(self._named(kernel, operation) for kernel in generated)
        self.layers.append(Layer(len(self.layers), operation, generated, names))

    def _named(self, kernel: Kernel, operation: Operation) -> str:
        if kernel.source not in self._names:
            name = f"{type(operation).__name__.lower()}_{len(self._names)}"
            self._names[kernel.source] = name
            self.sources[name] = kernel.source.replace(f"{PLACEHOLDER}(", f"{name}(")
        return self._names[kernel.source]

    def callers(self, kernel: str) -> list[Layer]:
        """Return the layers that call a kernel."""
        return [layer for layer in self.layers if kernel in layer.names]


def _apart(operation: Operation, tensors: Mapping[str, Tensor], offsets: Mapping[str, int]) -> bool:
    """Tell whether pixels of two rows may be computed at once: no output lies on an input, or rows are of pairs."""
    target = tensors[operation.output]
    if len(target.shape) == 4 and target.shape[2] % 2 == 0:
        return True
    first, last = offsets[operation.output], offsets[operation.output] + target.nbytes
    return all(offsets[name] + tensors[name].nbytes <= first or last <= offsets[name] for name in operation.inputs)


def weight_bytes(layers: Sequence[Layer]) -> int:
    """Return the bytes of all constants."""
    return int(np.sum([array.nbytes for layer in layers for array in layer.constants.values()], dtype=np.int64))


def macs(operation: Operation, tensors: Mapping[str, Tensor]) -> int:
    """Return the multiply-accumulates of an operation with weights, 0 of others."""
    if isinstance(operation, ops.Conv | ops.Dense):
        return tensors[operation.output].size * int(np.prod(operation.weights.shape[1:]))
    return 0
