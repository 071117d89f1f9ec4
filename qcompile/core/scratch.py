"""Weights that passes rewrite, in a folder that is taken away afterwards, where they are to leave memory."""

from __future__ import annotations

import contextlib
import ctypes
import tempfile
import threading
import weakref
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompile.core.errors import UsageError
from qcompile.core.mapped import MappedTensor

#: Elements of the smallest array that leaves memory: a file takes a while to open, and onnx's checker and its shape
#: inference, which are not given what is larger, would look for smaller ones in their working folder.
LEAST = 1 << 14


class Scratch:
    """A folder with a file for each array that left memory; a file goes when nobody has its array any more.

    Parameters
    ----------
    folder : Path
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._count = 0
        self._lock = threading.Lock()

    def put(self, array: npt.NDArray[Any], name: str) -> MappedTensor:
        """Write an array, and return what maps it."""
        with self._lock:
            self._count += 1
            path = self.folder / str(self._count)
        try:
            path.write_bytes(np.ascontiguousarray(array).data)
        except OSError as error:
            fact = f"weights that leave memory cannot be written to '{self.folder.parent}' ({error.strerror or error})"
            raise UsageError("--max-memory", fact, "free some space, or set TMPDIR to another folder") from error
        tensor = MappedTensor(path, 0, array.nbytes, ir.DataType.from_numpy(array.dtype), ir.Shape(array.shape), name)
        weakref.finalize(tensor, _remove, path)
        return tensor


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()


#: Of one compile, and not of another that runs in a thread beside it. Threads of a pool have none: what they return is
#: `kept` by whoever asked them.
_open: ContextVar[Scratch | None] = ContextVar("scratch", default=None)


@contextlib.contextmanager
def opened(wanted: bool) -> Iterator[None]:
    """Let what `tensor` and `kept` are given leave memory from here on, if wanted, and take it away at the end."""
    if not wanted:
        yield
        return
    with tempfile.TemporaryDirectory(prefix="qcompile-", ignore_cleanup_errors=True) as folder:
        token = _open.set(Scratch(Path(folder)))
        try:
            yield
        finally:
            _open.reset(token)


def give_back() -> None:
    """Give freed memory back to the system where arrays leave memory: C's allocator keeps it otherwise."""
    if is_open():
        with contextlib.suppress(OSError, AttributeError):  # glibc alone has it
            ctypes.CDLL(None).malloc_trim(0)


def is_open() -> bool:
    """Tell whether large arrays leave memory."""
    return _open.get() is not None


def tensor(array: npt.NDArray[Any], name: str | None) -> ir.TensorProtocol:
    """Return a tensor of an array: in memory, or of a large one in a file where that was asked for."""
    place = _open.get()
    return ir.tensor(array, name=name) if place is None or not _leaves(array) else place.put(array, name or "")


def kept(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return the same array, in memory or mapped from a file, by the same rule."""
    place = _open.get()
    if place is None or not _leaves(array):
        return array
    return place.put(array, "").numpy()  # a mapping outlives the name of its file


def _leaves(array: npt.NDArray[Any]) -> bool:
    """Tell whether an array is large, and of a type that NumPy stores as ONNX does."""
    return array.size >= LEAST and array.dtype.isbuiltin == 1 and array.dtype.isnative
