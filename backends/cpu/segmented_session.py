"""Run a network in segments from Python: libraries, and between them small ONNX models, which ONNX Runtime runs.

    session = InferenceSession("build/model")
    outputs = session.run(None, {"input": array})

It needs NumPy and onnxruntime. This file stands as `session.py` in the folder of every network in segments; each
library's folder has a `session.py` of its own, which runs that library alone.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
DESCRIPTION = "network.json"


@dataclass(frozen=True)
class Port:
    """An input or output.

    Parameters
    ----------
    name : str
    shape : tuple of int
    dtype : str
    """

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def type(self) -> str:
        """The type of its values, as onnxruntime has it."""
        return {"float32": "tensor(float)"}.get(self.dtype, f"tensor({self.dtype})")

    @classmethod
    def read(cls, table: Mapping[str, Any]) -> Port:
        """Return a port from its JSON."""
        return cls(table["name"], tuple(table["shape"]), table["dtype"])


@dataclass(frozen=True)
class Segment:
    """A part that is run in its turn.

    Parameters
    ----------
    inputs, outputs : tuple of Port
    run : callable
        Takes names of outputs and feeds.
    """

    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    run: Callable[[Sequence[str], Mapping[str, Array]], Sequence[Array]]


class InferenceSession:
    """A network in segments, ready to run: for one caller at a time.

    Parameters
    ----------
    folder : str or Path
        Where the segments and their description are.
    threads : int
        Among which each library and each ONNX model shares its work.
    opened : callable, optional
        Opens the folder of a library, for so many threads, in place of its own `session.py`.

    Raises
    ------
    OSError
        If onnxruntime is not installed, or a library cannot be loaded.
    """

    def __init__(self, folder: str | Path, threads: int = 1, opened: Callable[[Path, int], Any] | None = None) -> None:
        folder = Path(folder)
        self.about = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
        self.inputs, self.outputs = (tuple(map(Port.read, self.about[key])) for key in ("inputs", "outputs"))
        self.segments = tuple(_segment(folder, table, threads, opened or _opened) for table in self.about["segments"])

    def get_inputs(self) -> list[Port]:
        """Return the inputs."""
        return list(self.inputs)

    def get_outputs(self) -> list[Port]:
        """Return the outputs."""
        return list(self.outputs)

    def run(self, names: Sequence[str] | None, feeds: Mapping[str, Array]) -> list[Array]:
        """Return outputs.

        Parameters
        ----------
        names : sequence of str, optional
            Of the outputs wanted; all, in order, without it.
        feeds : mapping of str to ndarray

        Raises
        ------
        ValueError
            If an input is missing or has another shape.
        """
        for port in self.inputs:
            if port.name not in feeds:
                raise ValueError(f"input '{port.name}' is missing")
            if np.shape(feeds[port.name]) != port.shape:
                raise ValueError(f"input '{port.name}' has shape {np.shape(feeds[port.name])}, not {port.shape}")
        known = dict(feeds)
        for segment in self.segments:
            given = {port.name: known[port.name] for port in segment.inputs}
            made = segment.run([port.name for port in segment.outputs], given)
            # A library's numbers are floats, whatever the model calls them.
            known |= {port.name: np.asarray(array, port.dtype)
                      for port, array in zip(segment.outputs, made, strict=True)}  # fmt: skip
        return [known[name] for name in (names or [port.name for port in self.outputs])]


def _segment(folder: Path, table: Mapping[str, Any], threads: int, opened: Callable[[Path, int], Any]) -> Segment:
    inputs, outputs = (tuple(map(Port.read, table[key])) for key in ("inputs", "outputs"))
    if "library" in table:
        return Segment(inputs, outputs, opened(folder / table["library"], threads).run)
    try:
        import onnxruntime
    except ImportError as error:
        raise OSError(f"{folder}: {table['model']} needs onnxruntime, which is not installed") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    path = str(folder / table["model"])
    return Segment(inputs, outputs, onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"]).run)


def _opened(folder: Path, threads: int) -> Any:
    """Open a library by the `session.py` in its folder."""
    spec = importlib.util.spec_from_file_location(f"session_of_{folder.name}", folder / "session.py")
    assert spec is not None and spec.loader is not None
    module: ModuleType = importlib.util.module_from_spec(spec)
    # What makes a dataclass looks its module up.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module.InferenceSession(folder, threads)
