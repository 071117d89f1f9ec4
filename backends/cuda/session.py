"""Run a network on a CUDA device from Python, as onnxruntime's `InferenceSession` does.

    session = InferenceSession("build/model")
    outputs = session.run(None, {"input": array})

It needs NumPy, NVIDIA's driver, and of this folder `driver.py`, `network.json`, the kernels and the weights: no CUDA
toolkit. A run is one graph, captured once: inputs to the device, kernels, outputs back.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import sys
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
DESCRIPTION = "network.json"


def _driver() -> ModuleType:
    """Return the module `driver`, which lies beside this file, installed or in a network's folder."""
    name = f"{__name__}_driver"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name("driver.py"))
        assert spec is not None and spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


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
    scale : float
    zero_point : int
    code_offset : int
        What the model's own codes are above those of the kernels.
    at : int
        Byte of the arena where its codes are, counted for one sample.
    dtype : str
        ``int8``; or ``float32`` or ``int64`` of what is no codes and is handed over as it is.
    """

    name: str
    shape: tuple[int, ...]
    stored: tuple[int, ...]
    axes: tuple[int, ...]
    scale: float
    zero_point: int
    code_offset: int
    at: int
    dtype: str = "int8"

    @classmethod
    def read(cls, table: Mapping[str, Any]) -> Port:
        """Return a port from its JSON."""
        fields: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in table.items()
        }
        return cls(**fields)

    @property
    def size(self) -> int:
        """Elements of a sample."""
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def type(self) -> str:
        """What the model takes or gives, as onnxruntime calls it."""
        return "tensor(int64)" if self.dtype == "int64" else "tensor(float)"

    @property
    def plain(self) -> bool:
        """Whether it is no codes."""
        return self.dtype != "int8"

    def take(self, array: Array) -> Array:
        """Return what is stored, shape (samples, *stored), from the model's own codes, or from what is none."""
        own = array.astype(self.dtype) if self.plain else (array.astype(np.int16) - self.code_offset).astype(np.int8)
        ordered = own.reshape(-1, *self.shape).transpose(0, *(axis + 1 for axis in self.axes))
        return np.ascontiguousarray(ordered.reshape(-1, *self.stored))

    def quantize(self, array: Array) -> Array:
        """Return what is stored of a model's floats."""
        if self.plain:
            return self.take(array)
        codes = np.rint(array.astype(np.float32) / np.float32(self.scale)) + self.zero_point
        return self.take(np.clip(codes, -128, 127).astype(np.int16) + self.code_offset)


class _Memory:
    """What a session has of the device and of pinned memory, given back when the session goes."""

    def __init__(self, driver: Any) -> None:
        self.driver, self.last = driver, list[tuple[str, Any]]()

    def keep(self, function: str, handle: Any) -> Any:
        """Return a handle that `function` gives back."""
        self.last.append((function, handle))
        return handle

    def device(self, size: int) -> int:
        """Return the address of so many bytes on the device."""
        return int(self.keep("cuMemFree_v2", self.driver.allocate(size)))

    def host(self, shape: tuple[int, ...], dtype: str) -> Array:
        """Return an array in pinned memory."""
        size = max(int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize, 1)
        place = self.keep("cuMemFreeHost", self.driver.made("cuMemAllocHost_v2", size))
        content = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(place.value))
        return content.view(dtype).reshape(shape)

    def free(self) -> None:
        """Give everything back, the last first."""
        self.driver.enter()
        for function, handle in reversed(self.last):
            self.driver.call(function, handle)
        self.last.clear()
        self.driver.call("cuDevicePrimaryCtxRelease_v2", self.driver.device)


class InferenceSession:
    """A network ready to run on a device: for one caller at a time; several sessions run side by side.

    Parameters
    ----------
    folder : str or Path
        Where `network.json` and what it names are.
    batch : int
        Samples of a run; each input's first axis is so many times as long as the model's, which is 1.
    device : int

    Raises
    ------
    OSError
        If there is no driver, no device, or the kernels are for none such.
    """

    def __init__(self, folder: str | Path, batch: int = 1, device: int = 0) -> None:
        folder = Path(folder)
        self.about = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
        self.inputs, self.outputs = ([Port.read(port) for port in self.about[key]] for key in ("inputs", "outputs"))
        self.batch = batch
        self.driver = _driver().Driver(device)
        self._memory = _Memory(self.driver)
        self.close = weakref.finalize(self, _Memory.free, self._memory)
        self._load(folder)
        self._stream = self._memory.keep("cuStreamDestroy_v2", self.driver.made("cuStreamCreate", 1))
        self._given, self._made = ({floats: self._pinned(ports, floats) for floats in (False, True)}
                                   for ports in (self.inputs, self.outputs))  # fmt: skip
        self._graphs = dict[tuple[bool, bool], Any]()

    def _pinned(self, ports: Sequence[Port], floats: bool) -> list[Array]:
        kinds = [port.dtype if port.plain or not floats else "float32" for port in ports]
        return [self._memory.host((self.batch * port.size,), kind) for port, kind in zip(ports, kinds, strict=True)]

    def _load(self, folder: Path) -> None:
        content = (folder / self.about["kernels"]).read_bytes()
        try:
            module = self._memory.keep("cuModuleUnload", self.driver.made("cuModuleLoadData", content))
        except OSError as error:
            made = ", ".join(f"sm_{architecture}" for architecture in self.about["architectures"])
            here = f"{self.driver.name} ({self.driver.capability})"
            raise OSError(f"{folder}: the kernels are for {made}, and this is {here} ({error})") from error
        launches = [launch for part in ("taking", "launches", "giving") for launch in self.about[part]]
        launches += [launch["many"] for launch in launches if "many" in launch]
        known = {launch["kernel"]: launch.get("shared", 0) for launch in launches}
        self._functions = {name: self.driver.function(module, name) for name in sorted(known)}
        self._shared = {name: self.driver.give_shared(self._functions[name], shared) if shared else 0
                        for name, shared in known.items()}  # fmt: skip
        constants = (folder / self.about["constants"]).read_bytes()
        places = {"arena": self._memory.device(self.batch * self.about["arena_bytes"]),
                  "constants": int(self._memory.keep("cuMemFree_v2", self.driver.upload(constants)))}  # fmt: skip
        for key, ports in (("input", self.inputs), ("output", self.outputs)):
            for index, port in enumerate(ports):
                places[f"{key} {index}"] = self._memory.device(4 * self.batch * port.size)
        self._places = places

    def get_inputs(self) -> list[Port]:
        """Return the inputs, with the shape of one sample."""
        return list(self.inputs)

    def get_outputs(self) -> list[Port]:
        """Return the outputs, with the shape of one sample."""
        return list(self.outputs)

    def run(self, names: Sequence[str] | None, feeds: Mapping[str, Array]) -> list[Array]:
        """Return outputs as floats.

        Parameters
        ----------
        names : sequence of str, optional
            Of the outputs wanted; all, in order, without it.
        feeds : mapping of str to ndarray
            Each input's floats, or the model's own codes; of what is no codes, what the model takes.

        Raises
        ------
        ValueError
            If an input is missing or has another shape.
        """
        given = [self._array(port, feeds) for port in self.inputs]
        pairs = list(zip(self.inputs, given, strict=True))
        if floats := all(port.plain or array.dtype.kind == "f" for port, array in pairs):
            stored = [port.take(array) if port.plain else array for port, array in pairs]
        else:
            stored = [port.quantize(array) if array.dtype.kind == "f" else port.take(array) for port, array in pairs]
        made = [array.copy().reshape(self._shape(port)) if floats and not port.plain else self._floats(port, array)
                for port, array in zip(self.outputs, self._run(stored, floats), strict=True)]  # fmt: skip
        found = {port.name: array for port, array in zip(self.outputs, made, strict=True)}
        return [found[name] for name in (names or found)]

    def run_codes(self, inputs: Sequence[Array]) -> list[Array]:
        """Return outputs' codes for inputs' codes, both as the kernels store them: shape (batch, *stored[1:])."""
        for port, array in zip(self.inputs, inputs, strict=True):
            if array.size != self.batch * port.size or array.dtype != port.dtype:
                fact = f"has {array.size} codes of {array.dtype}, not {port.dtype} of {port.stored}"
                raise ValueError(f"input '{port.name}' {fact}")
        found = self._run(list(inputs), False)
        return [array.copy().reshape(self.batch * port.stored[0], *port.stored[1:])
                for port, array in zip(self.outputs, found, strict=True)]  # fmt: skip

    def _run(self, inputs: Sequence[Array], floats: bool) -> list[Array]:
        self.driver.enter()
        for pinned, array in zip(self._given[floats], inputs, strict=True):
            pinned[...] = array.reshape(-1)
        self.driver.call("cuGraphLaunch", self.graph(floats), self._stream)
        self.driver.call("cuStreamSynchronize", self._stream)
        return self._made[floats]

    def graph(self, floats: bool, copied: bool = True) -> Any:
        """Return a run as the driver has it, captured when it is first asked for.

        Parameters
        ----------
        floats : bool
            Whether it takes and gives the model's floats, or codes.
        copied : bool
            Whether inputs go to the device and outputs come back, or both stay there.
        """
        if (floats, copied) not in self._graphs:
            self.driver.enter()
            self.driver.call("cuStreamBeginCapture_v2", self._stream, _driver().THREAD_LOCAL)
            self._copy(self.inputs if copied else (), "input", floats)
            self._launch("taking" if floats else "")
            self._launch("launches")
            self._launch("giving" if floats else "")
            self._copy(self.outputs if copied else (), "output", floats)
            ready = self._memory.keep("cuGraphExecDestroy", self.driver.captured(self._stream))
            self._graphs[floats, copied] = ready
        return self._graphs[floats, copied]

    def _copy(self, ports: Sequence[Port], key: str, floats: bool) -> None:
        pinned = (self._given if key == "input" else self._made)[floats]
        for index, port in enumerate(ports):
            array = pinned[index]
            apart = floats and not port.plain
            address = self._places[f"{key} {index}"] if apart else self._places["arena"] + self.batch * port.at
            if key == "input":
                self.driver.call("cuMemcpyHtoDAsync_v2", address, array.ctypes.data, array.nbytes, self._stream)
            else:
                self.driver.call("cuMemcpyDtoHAsync_v2", array.ctypes.data, address, array.nbytes, self._stream)

    def _launch(self, part: str) -> None:
        for few in self.about[part] if part else ():
            launch = few["many"] if self.batch >= self.about["many"] and "many" in few else few
            addresses = [self._address(*argument) for argument in launch["arguments"]]
            grid = (*launch["grid"], self.batch)
            function = self._functions[launch["kernel"]]
            shared = self._shared[launch["kernel"]]
            self.driver.launch(function, grid, launch["threads"], addresses, launch["numbers"], self._stream, shared)

    def _address(self, place: str, at: int) -> int:
        if place in ("input", "output"):
            return int(self._places[f"{place} {at}"])
        # A tensor's samples lie behind one another, so that everything is so many times as far from the start.
        return int(self._places[place]) + (self.batch * at if place == "arena" else at)

    def time(self, rounds: int, each: int = 1, floats: bool = True, copied: bool = True) -> list[float]:
        """Return milliseconds of a run by the device's own clock, once for each round.

        Parameters
        ----------
        rounds : int
        each : int
            Runs of a round, one right behind the other.
        floats, copied : bool
            See `graph`.
        """
        graph = self.graph(floats, copied)
        self.driver.enter()
        return [self.driver.timed(graph, self._stream, each) for _ in range(rounds)]

    def _shape(self, port: Port) -> tuple[int, ...]:
        return (self.batch * port.shape[0], *port.shape[1:]) if port.shape else ()

    def _array(self, port: Port, feeds: Mapping[str, Array]) -> Array:
        if port.name not in feeds:
            raise ValueError(f"input '{port.name}' is missing")
        array = np.asarray(feeds[port.name])
        if array.shape != self._shape(port):
            raise ValueError(f"input '{port.name}' has shape {array.shape}, not {self._shape(port)}")
        return array

    def _floats(self, port: Port, codes: Array) -> npt.NDArray[np.float32]:
        ordered = codes.reshape(self.batch, *(port.shape[axis] for axis in port.axes))
        back = ordered.transpose(0, *(1 + int(axis) for axis in np.argsort(port.axes)))
        if port.plain:
            return np.array(back.reshape(self._shape(port)), np.float32)
        real = (back.astype(np.int32) - port.zero_point).astype(np.float32) * np.float32(port.scale)
        return np.ascontiguousarray(real.reshape(self._shape(port)), np.float32)
