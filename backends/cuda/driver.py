"""The CUDA driver's API, as far as running a network needs it, by ctypes alone. Goes along with every network."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from ctypes import POINTER, byref, c_char_p, c_int, c_size_t, c_uint, c_uint64, c_void_p
from typing import Any

#: What the driver's library is called; the variable names another one.
LIBRARY, VARIABLE = "libcuda.so.1", "QCOMPILE_LIBCUDA"
REMEDY = "run it on a machine with a CUDA device"
#: How a graph is captured: other threads may go on calling the driver (CU_STREAM_CAPTURE_MODE_THREAD_LOCAL).
THREAD_LOCAL = 1
#: Attributes of a device: its compute capability, and its multiprocessors.
MAJOR, MINOR, MULTIPROCESSORS, MOST_SHARED = 75, 76, 16, 97
#: Attribute of a kernel: bytes of shared memory that a launch may give it.
DYNAMIC_SHARED = 8
SIGNATURES: dict[str, tuple[Any, ...]] = {
    "cuInit": (c_uint,),
    "cuDriverGetVersion": (POINTER(c_int),),
    "cuDeviceGet": (POINTER(c_int), c_int),
    "cuDeviceGetCount": (POINTER(c_int),),
    "cuDeviceGetName": (c_char_p, c_int, c_int),
    "cuDeviceGetAttribute": (POINTER(c_int), c_int, c_int),
    "cuDevicePrimaryCtxRetain": (POINTER(c_void_p), c_int),
    "cuDevicePrimaryCtxRelease_v2": (c_int,),
    "cuCtxSetCurrent": (c_void_p,),
    "cuModuleLoadData": (POINTER(c_void_p), c_char_p),
    "cuModuleUnload": (c_void_p,),
    "cuModuleGetFunction": (POINTER(c_void_p), c_void_p, c_char_p),
    "cuMemAlloc_v2": (POINTER(c_uint64), c_size_t),
    "cuMemFree_v2": (c_uint64,),
    "cuMemAllocHost_v2": (POINTER(c_void_p), c_size_t),
    "cuMemFreeHost": (c_void_p,),
    "cuMemcpyHtoD_v2": (c_uint64, c_void_p, c_size_t),
    "cuMemcpyHtoDAsync_v2": (c_uint64, c_void_p, c_size_t, c_void_p),
    "cuMemcpyDtoHAsync_v2": (c_void_p, c_uint64, c_size_t, c_void_p),
    "cuStreamCreate": (POINTER(c_void_p), c_uint),
    "cuStreamDestroy_v2": (c_void_p,),
    "cuStreamBeginCapture_v2": (c_void_p, c_int),
    "cuStreamEndCapture": (c_void_p, POINTER(c_void_p)),
    "cuStreamSynchronize": (c_void_p,),
    "cuGraphInstantiateWithFlags": (POINTER(c_void_p), c_void_p, c_uint64),
    "cuGraphDestroy": (c_void_p,),
    "cuGraphExecDestroy": (c_void_p,),
    "cuGraphLaunch": (c_void_p, c_void_p),
    "cuFuncSetAttribute": (c_void_p, c_int, c_int),
    "cuLaunchKernel": (c_void_p, *(c_uint,) * 7, c_void_p, POINTER(c_void_p), POINTER(c_void_p)),
    "cuEventCreate": (POINTER(c_void_p), c_uint),
    "cuEventDestroy_v2": (c_void_p,),
    "cuEventRecord": (c_void_p, c_void_p),
    "cuEventSynchronize": (c_void_p,),
    "cuEventElapsedTime": (POINTER(ctypes.c_float), c_void_p, c_void_p),
    "cuGetErrorString": (c_int, POINTER(c_char_p)),
}


def opened() -> tuple[Any, int]:
    """Return the driver's library, ready, and how many devices it has.

    Raises
    ------
    OSError
        If there is no driver, or no device.
    """
    name = os.environ.get(VARIABLE, LIBRARY)
    try:
        library = ctypes.CDLL(name)
    except OSError as error:
        raise OSError(f"cuda: there is no NVIDIA driver here ({name}); {REMEDY}") from error
    for function, signature in SIGNATURES.items():
        known = getattr(library, function)  # which keeps it, other than library[function]
        known.argtypes, known.restype = signature, c_int
    count = c_int()
    if library.cuInit(0) or library.cuDeviceGetCount(byref(count)) or not count.value:
        raise OSError(f"cuda: the NVIDIA driver here has no device; {REMEDY}")
    return library, count.value


def has_device() -> bool:
    """Tell whether there is a driver with a device."""
    try:
        opened()
    except OSError:
        return False
    return True


class Driver:
    """The driver's functions, and a device to call them for.

    Parameters
    ----------
    device : int

    Raises
    ------
    OSError
        If there is no driver, or no such device.
    """

    def __init__(self, device: int = 0) -> None:
        self.library, count = opened()
        number = c_int()
        if not 0 <= device < count:
            raise OSError(f"cuda: there is no device {device}, of {count}; choose another one")
        self.call("cuDeviceGet", byref(number), device)
        self.device = number.value
        context = c_void_p()
        self.call("cuDevicePrimaryCtxRetain", byref(context), self.device)
        self.call("cuCtxSetCurrent", context)
        self.context = context

    def call(self, function: str, *arguments: Any) -> None:
        """Call a function of the driver.

        Raises
        ------
        OSError
            If it fails, with what the driver says of it.
        """
        if code := getattr(self.library, function)(*arguments):
            text = c_char_p()
            self.library.cuGetErrorString(code, byref(text))
            said = text.value.decode() if text.value else "an unknown error"
            raise OSError(f"cuda: {function}: {said}")

    def enter(self) -> None:
        """Make the device the calling thread's."""
        self.call("cuCtxSetCurrent", self.context)

    def attribute(self, which: int) -> int:
        """Return an attribute of the device."""
        value = c_int()
        self.call("cuDeviceGetAttribute", byref(value), which, self.device)
        return value.value

    @property
    def capability(self) -> str:
        """The device's architecture: ``sm_87``."""
        return f"sm_{self.attribute(MAJOR)}{self.attribute(MINOR)}"

    @property
    def version(self) -> str:
        """The newest CUDA that the driver knows: ``12.4``."""
        number = c_int()
        self.call("cuDriverGetVersion", byref(number))
        return f"{number.value // 1000}.{number.value % 1000 // 10}"

    @property
    def name(self) -> str:
        """What the device is called."""
        text = ctypes.create_string_buffer(128)
        self.call("cuDeviceGetName", text, len(text), self.device)
        return text.value.decode()

    def made(self, function: str, *arguments: Any) -> c_void_p:
        """Return the handle that a function of the driver makes."""
        handle = c_void_p()
        self.call(function, byref(handle), *arguments)
        return handle

    def allocate(self, size: int) -> int:
        """Return the address of so many bytes of the device's memory."""
        address = c_uint64()
        self.call("cuMemAlloc_v2", byref(address), max(size, 1))
        return address.value

    def upload(self, content: bytes) -> int:
        """Return the address of bytes that were copied to the device's memory, of its own."""
        address = self.allocate(len(content))
        self.call("cuMemcpyHtoD_v2", address, content, len(content))
        # The call returns while bytes are on their way, and streams of ours do not wait for the one that they are in.
        self.call("cuStreamSynchronize", None)
        return address

    def function(self, module: c_void_p, name: str) -> c_void_p:
        """Return a kernel of a module."""
        return self.made("cuModuleGetFunction", module, name.encode())

    def give_shared(self, function: c_void_p, wanted: int) -> int:
        """Let launches give a kernel shared memory, and return how much: what is wanted, or what the device has."""
        given = min(wanted, self.attribute(MOST_SHARED))
        self.call("cuFuncSetAttribute", function, DYNAMIC_SHARED, given)
        return given

    def captured(self, stream: c_void_p) -> c_void_p:
        """End a capture and return what was captured, ready to be launched; `cuGraphExecDestroy` gives it back."""
        graph = c_void_p()
        self.call("cuStreamEndCapture", stream, byref(graph))
        ready = self.made("cuGraphInstantiateWithFlags", graph, 0)
        self.call("cuGraphDestroy", graph)
        return ready

    def timed(self, graph: c_void_p, stream: c_void_p, each: int) -> float:
        """Return milliseconds of one of so many launches of a graph behind one another, by the device's clock."""
        events = [self.made("cuEventCreate", 0) for _ in range(2)]
        self.call("cuEventRecord", events[0], stream)
        for _ in range(each):
            self.call("cuGraphLaunch", graph, stream)
        self.call("cuEventRecord", events[1], stream)
        self.call("cuEventSynchronize", events[1])
        taken = ctypes.c_float()
        self.call("cuEventElapsedTime", byref(taken), *events)
        for event in events:
            self.call("cuEventDestroy_v2", event)
        return taken.value / each

    def launch(
        self, function: c_void_p, grid: Sequence[int], threads: int, addresses: Sequence[int], numbers: Sequence[int],
        stream: c_void_p, shared: int = 0,
    ) -> None:  # fmt: skip
        """Launch a kernel, or capture that it is.

        Parameters
        ----------
        function : c_void_p
        grid : sequence of int
            Blocks along x, y and z.
        threads : int
            Of a block, along x.
        addresses : sequence of int
            The pointers that it takes.
        numbers : sequence of int
            The fields of the struct of int32 that it takes behind them; none, if it takes no struct.
        stream : c_void_p
        shared : int
            Bytes of shared memory beyond what the kernel declares.
        """
        values: list[Any] = [c_uint64(address) for address in addresses]
        if numbers:
            values.append((ctypes.c_int32 * len(numbers))(*numbers))
        pointers = (c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        self.call("cuLaunchKernel", function, *grid, threads, 1, 1, shared, stream, pointers, None)
