"""Run a network's library from Python, as onnxruntime's `InferenceSession` does; needs NumPy and nothing else.

    session = InferenceSession("build/model")
    outputs = session.run(None, {"input": array})

This file stands in the folder of every compiled network and can be taken along with the library and `network.json`.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import re
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
DESCRIPTION = "network.json"
#: What the system calls AMX, and how a process asks for its registers: arch_prctl(ARCH_REQ_XCOMP_PERM, XTILEDATA).
TILES, ASK = "amx_tile", (158, 0x1023, 18)


@dataclass(frozen=True)
class Port:
    """An input or output.

    Parameters
    ----------
    name : str
    shape : tuple of int
        In the model.
    stored : tuple of int
        As codes are stored: the model's axes in the order `axes`, then reshaped.
    axes : tuple of int
    dtype : str
        ``int8`` of codes; ``float32`` and ``int64`` are handed over as they are.
    scale : float
    zero_point : int
    offset : int
        What the model's own codes are above those of the library.
    """

    name: str
    shape: tuple[int, ...]
    stored: tuple[int, ...]
    axes: tuple[int, ...]
    dtype: str
    scale: float
    zero_point: int
    offset: int

    @property
    def type(self) -> str:
        """The type of its values, as onnxruntime has it."""
        return "tensor(int64)" if self.dtype == "int64" else "tensor(float)"

    @property
    def is_codes(self) -> bool:
        """Whether it has codes."""
        return self.dtype == "int8"

    @classmethod
    def read(cls, table: Mapping[str, Any]) -> Port:
        """Return a port from its JSON."""
        fields: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in table.items()
        }
        return cls(**fields)

    def take(self, array: Array) -> Array:
        """Return an input's codes as stored, from the model's own codes."""
        codes = (array.astype(np.int16) - self.offset).astype(np.int8)
        return np.ascontiguousarray(codes.reshape(self.shape).transpose(self.axes).reshape(self.stored))

    def empty(self) -> Array:
        """Return room for an output's codes as stored, or its floats in the model's order."""
        return np.empty(self.stored if self.is_codes else self.shape, self.dtype)

    def give(self, codes: Array) -> Array:
        """Return the numbers that an output is, or the floats that its codes as stored stand for."""
        if not self.is_codes:
            return codes
        ordered = codes.reshape([self.shape[axis] for axis in self.axes]).transpose(np.argsort(self.axes))
        real: npt.NDArray[np.float32] = (ordered.astype(np.int32) - self.zero_point).astype(np.float32)
        return np.ascontiguousarray(real * np.float32(self.scale))


@dataclass(frozen=True)
class Length:
    """A network at one of its lengths.

    Parameters
    ----------
    size : int
        0 of the only one.
    inputs, outputs : tuple of Port
    run, run_floats : object
        What runs it, from and to codes or floats.
    """

    size: int
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    run: Any
    run_floats: Any


class InferenceSession:
    """A network ready to run: for one caller at a time; several sessions run side by side.

    Where a network has several lengths, each run takes the least that holds its inputs. Shorter ones are padded where
    the network has a mask, and what stands behind them in outputs is cut off.

    Parameters
    ----------
    folder : str or Path
        Where the library and its description are.
    threads : int
        Among which each run is shared, the caller's being one of them. They are the session's own, as long as it lives.

    Raises
    ------
    OSError
        If this machine is of another kind, lacks instructions that the library is made of or leave of its system to use
        them, or gives no such number of threads.
    """

    def __init__(self, folder: str | Path, threads: int = 1) -> None:
        folder = Path(folder)
        about = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
        if not is_here(about["architecture"]):
            raise OSError(f"{folder}: the library is for {about['architecture']}, and this is {platform.machine()}")
        if missing := absent(about["instructions"]):
            raise OSError(f"{folder}: this processor has no {missing[0]}, which the library is made of")
        if TILES in about["instructions"] and not tiles_allowed():
            raise OSError(f"{folder}: the system does not let this process use the tiles of AMX (arch_prctl)")
        library = ctypes.CDLL(str((folder / about["library"]).absolute()))
        self._described(about, lambda stem, index: _function(library, about["name"] + stem))
        alignment = about["alignment"]
        self._memory = np.zeros(about["workspace_bytes"] + alignment, np.uint8)
        self._workspace = ctypes.c_void_p(self._memory.ctypes.data + -self._memory.ctypes.data % alignment)
        if failed := library[f"{about['name']}_start"](self._workspace, threads):
            raise OSError(failed, f"{folder}: {threads} threads cannot be had: {os.strerror(failed)}")
        # The library and the memory are held on to until the threads are gone.
        stop = library[f"{about['name']}_stop"]
        stop.restype = None
        weakref.finalize(self, _stop, stop, self._workspace, self._memory)

    def _described(self, about: dict[str, Any], function: Callable[[str, int], Any]) -> None:
        """Take what `network.json` says, and what runs it, by how the function's name ends and by its number."""
        self.about = about
        found = []
        for index, (size, ports) in enumerate(about.get("lengths", {"": about}).items()):
            inputs, outputs = (tuple(map(Port.read, ports[key])) for key in ("inputs", "outputs"))
            suffix = f"_{size}" if size else ""
            runs = [function(f"_run{stem}{suffix}", 2 * index + place) for place, stem in enumerate(("", "_floats"))]
            found.append(Length(int(size or 0), inputs, outputs, *runs))
        self.lengths = tuple(found)
        self.inputs, self.outputs = self.lengths[-1].inputs, self.lengths[-1].outputs

    def get_inputs(self) -> list[Port]:
        """Return the inputs, at the longest of several lengths."""
        return list(self.inputs)

    def get_outputs(self) -> list[Port]:
        """Return the outputs, at the longest of several lengths."""
        return list(self.outputs)

    def run(self, names: Sequence[str] | None, feeds: Mapping[str, Array]) -> list[Array]:
        """Return outputs as floats.

        Parameters
        ----------
        names : sequence of str, optional
            Of the outputs wanted; all, in order, without it.
        feeds : mapping of str to ndarray
            Each input's floats, or the model's own codes.

        Raises
        ------
        ValueError
            If an input is missing or has another shape.
        """
        count, at, feeds = self._fitted(feeds)
        given = [self._given(port, feeds) for port in at.inputs]
        pairs = list(zip(at.inputs, given, strict=True))
        if all(array.dtype.kind == "f" or not port.is_codes for port, array in pairs):
            made = [np.empty(port.shape, np.float32 if port.is_codes else port.dtype) for port in at.outputs]
            real = [np.ascontiguousarray(array, np.float32 if port.is_codes else port.dtype) for port, array in pairs]
            self._call(at.run_floats, real, made)
        else:
            codes = [port.empty() for port in at.outputs]
            self._call(at.run, [self._codes(port, array) for port, array in pairs], codes)
            made = [port.give(array) for port, array in zip(at.outputs, codes, strict=True)]
        if count < at.size:
            cut = self.about["padding"]["outputs"]
            made = [_cut(array, cut[port.name], count) for port, array in zip(at.outputs, made, strict=True)]
        found = {port.name: array for port, array in zip(at.outputs, made, strict=True)}
        return [found[name] for name in (names or found)]

    def run_codes(self, inputs: Sequence[Array]) -> list[Array]:
        """Return outputs' codes for inputs' codes, both as the library stores them; what has no codes as it is."""
        shapes = [np.shape(array) for array in inputs]
        wanted = [[port.stored if port.is_codes else port.shape for port in at.inputs] for at in self.lengths]
        if shapes not in wanted:
            expected = " or ".join(map(str, wanted))
            raise ValueError(
                f"inputs {[port.name for port in self.inputs]} have codes of shape {shapes}, not {expected}"
            )
        at = self.lengths[wanted.index(shapes)]
        made = [port.empty() for port in at.outputs]
        given = [np.ascontiguousarray(array, port.dtype) for port, array in zip(self.inputs, inputs, strict=True)]
        self._call(at.run, given, made)
        return made

    def _fitted(self, feeds: Mapping[str, Array]) -> tuple[int, Length, Mapping[str, Array]]:
        """Return the length that feeds have, the network that takes them, and the feeds as long as that."""
        if len(self.lengths) == 1:
            return self.lengths[0].size, self.lengths[0], feeds
        axes, sizes = self.about["axes"], ", ".join(str(at.size) for at in self.lengths)
        found = {np.shape(feeds[port.name])[axis] for port in self.inputs if port.name in feeds
                 for axis in axes[port.name] if axis < np.ndim(feeds[port.name])}  # fmt: skip
        if len(found) != 1:
            raise ValueError(f"inputs have the lengths {sorted(found)}; they must have one, of {sizes}")
        (count,) = found
        at = next((at for at in self.lengths if at.size >= count), None)
        if at is None or (at.size > count and self.about["padding"] is None):
            why = "and this one is longer" if at is None else "and there is no mask that inputs could be padded under"
            raise ValueError(f"inputs have length {count}: the network has {sizes}, {why}")
        return count, at, {name: _padded(array, axes.get(name, ()), at.size) for name, array in feeds.items()}

    def _call(self, function: Any, inputs: Sequence[Array], outputs: Sequence[Array]) -> None:
        function(self._workspace, *(ctypes.c_void_p(array.ctypes.data) for array in (*inputs, *outputs)))

    @staticmethod
    def _given(port: Port, feeds: Mapping[str, Array]) -> Array:
        if port.name not in feeds:
            raise ValueError(f"input '{port.name}' is missing")
        array = np.asarray(feeds[port.name])
        if array.shape != port.shape:
            raise ValueError(f"input '{port.name}' has shape {array.shape}, not {port.shape}")
        return array

    @staticmethod
    def _codes(port: Port, array: Array) -> Array:
        if not port.is_codes:
            return np.ascontiguousarray(array, port.dtype)
        if array.dtype.kind != "f":
            return port.take(array)
        codes = np.rint(array.astype(np.float32) / np.float32(port.scale)) + port.zero_point
        return Port.take(port, np.clip(codes, -128, 127).astype(np.int16) + port.offset)


def _padded(array: Array, axes: Sequence[int], size: int) -> Array:
    """Return an array with zeros behind its end along some axes, so that they are as long as `size`."""
    array = np.asarray(array)
    behind = [(0, max(0, size - extent) if axis in axes else 0) for axis, extent in enumerate(array.shape)]
    return np.pad(array, behind) if any(after for _, after in behind) else array


def _cut(array: Array, axes: Sequence[int], count: int) -> Array:
    """Return the first elements along some axes."""
    kept = tuple(slice(count) if axis in axes else slice(None) for axis in range(array.ndim))
    return np.ascontiguousarray(array[kept])


def _function(library: ctypes.CDLL, name: str) -> Any:
    function = library[name]
    function.restype = None
    return function


def _stop(stop: Any, workspace: ctypes.c_void_p, memory: Array) -> None:
    stop(workspace)
    del memory


def is_here(architecture: str) -> bool:
    """Tell whether this machine is of that kind."""
    names = {"AMD64": "x86_64", "arm64": "aarch64"}
    return names.get(platform.machine(), platform.machine()) == architecture


def absent(instructions: Sequence[str]) -> list[str]:
    """Return those of the instructions that this processor does not have, as far as the system tells."""
    try:
        flags = re.search(r"^(?:flags|Features)\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        return []
    known = set(flags[1].split()) if flags else set()
    return [name for name in instructions if known and name not in known]


def tiles_allowed() -> bool:
    """Ask the system for the tiles of AMX, for the whole process, and tell whether it lets it have them."""
    try:
        return bool(ctypes.CDLL(None).syscall(*map(ctypes.c_long, ASK)) == 0)
    except (OSError, AttributeError):
        return False
