"""Weights in files: mapped into memory while somebody looks at them, and only then."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir


class MappedTensor(ir.ExternalTensor):
    """A tensor in a file, whose pages leave memory with the last array that shows them.

    `onnx_ir.ExternalTensor` maps its file once and for all: what was read once counts as this process's memory to its
    end, and what was exported to an array cannot be released any more. Its location is told from the root of the file
    system, so that a runtime that is given one folder finds all of a model's files below it.

    Parameters
    ----------
    path : Path
        The file; it must not change as long as the tensor is in use.
    offset, length : int
        Bytes.
    dtype : onnx_ir.DataType
    shape : onnx_ir.Shape
    name : str
    """

    def __init__(self, path: Path, offset: int, length: int, dtype: ir.DataType, shape: ir.Shape, name: str) -> None:
        path = path.resolve()
        location = path.relative_to(path.anchor)
        super().__init__(location, offset, length, dtype, shape=shape, name=name, base_dir=path.anchor)

    def numpy(self) -> npt.NDArray[Any]:
        """Return the values, read-only, mapped anew."""
        return self._opened().numpy()

    def __array__(self, dtype: Any = None) -> npt.NDArray[Any]:
        return np.asarray(self.numpy(), dtype)

    def tobytes(self) -> bytes:
        """Return a copy of the bytes as they are stored."""
        return self._opened().tobytes()

    def release(self) -> None:
        """Do nothing: nothing is held."""

    def _opened(self) -> ir.ExternalTensor:
        return ir.ExternalTensor(
            self.location, self.offset, self.length, self.dtype, shape=self.shape, name=self.name or "",
            base_dir=self.base_dir,
        )  # fmt: skip


def mapped(tensor: ir.ExternalTensor) -> MappedTensor:
    """Return the same tensor without anything held of it."""
    if isinstance(tensor, MappedTensor):
        return tensor
    offset, length = tensor.offset or 0, tensor.length or tensor.nbytes
    return MappedTensor(Path(tensor.path), offset, length, tensor.dtype, tensor.shape, tensor.name or "")


def map_weights(model: ir.Model) -> None:
    """Map the external weights of all graphs of a model when they are looked at, rather than for good."""
    for graph in model.graphs():
        for value in graph.initializers.values():
            if isinstance(value.const_value, ir.ExternalTensor):
                value.const_value = mapped(value.const_value)
