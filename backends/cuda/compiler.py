"""CUDA C++ to machine code of six architectures, and these into one fatbin: NVRTC and nvFatbin, called by ctypes.

Both come as Python packages and need neither a device, a driver nor a C compiler; see docs/targets/cuda-tvm.md.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import importlib.util
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qcompile.core.errors import TargetError, VerificationError

#: What kernels are compiled for: Turing, A100, other Amperes, Jetson Orin, Ada, Hopper.
ARCHITECTURES: tuple[str, ...] = ("75", "80", "86", "87", "89", "90a")
#: By library, the folder of its package below `nvidia`, and what installs it.
PACKAGES = {
    "libnvrtc.so.12": ("cuda_nvrtc", "nvidia-cuda-nvrtc-cu12"),
    "libnvfatbin.so.12": ("nvfatbin", "nvidia-nvfatbin-cu12"),
}
REMEDY = "pip install 'qcompile[cuda-tvm]'"


@dataclass(frozen=True)
class Cubin:
    """Machine code of one architecture.

    Parameters
    ----------
    architecture : str
        ``90a`` of sm_90a.
    code : bytes
        An ELF file.
    log : str
        What the assembler says of each kernel: registers, shared memory, spills.
    """

    architecture: str
    code: bytes
    log: str

    def spills(self) -> list[str]:
        """Return the kernels that keep something in local memory, by the assembler's account."""
        found, name = [], ""
        for line in self.log.splitlines():
            if properties := re.search(r"Function properties for (\S+)", line):
                name = properties[1]
            elif (numbers := re.findall(r"(\d+) bytes (?:stack frame|spill)", line)) and any(map(int, numbers)):
                found.append(name)
        return found


def available() -> bool:
    """Tell whether NVRTC and nvFatbin are installed."""
    return all(_file(library) is not None for library in PACKAGES)


def require() -> None:
    """Refuse to go on without NVRTC and nvFatbin.

    Raises
    ------
    TargetError
    """
    for library in PACKAGES:
        _library(library)


def compile_cuda(source: str, architecture: str) -> Cubin:
    """Compile CUDA C++ for one architecture.

    Parameters
    ----------
    source : str
        Without any #include.
    architecture : str
        One of `ARCHITECTURES`.

    Raises
    ------
    TargetError
        If NVRTC is not installed.
    VerificationError
        If it does not compile, with the first error.
    """
    nvrtc, program = _library("libnvrtc.so.12"), ctypes.c_void_p()
    _done(nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernels.cu", 0, None, None), "NVRTC")
    # Products and sums are fused where the source says so: results are the same on every device.
    words = [f"-arch=sm_{architecture}", "-std=c++17", "-default-device", "--fmad=false", "--ptxas-options=-v"]
    options = (ctypes.c_char_p * len(words))(*(word.encode() for word in words))
    try:
        failed = nvrtc.nvrtcCompileProgram(program, len(words), options)
        log = _taken(nvrtc, "ProgramLog", program).rstrip(b"\0").decode(errors="replace")
        if failed:
            said = next((line for line in log.splitlines() if "error" in line), log.strip()[:200])
            raise VerificationError(f"sm_{architecture}", f"NVRTC refuses a kernel: {said}", "report it with the model")
        return Cubin(architecture, _taken(nvrtc, "CUBIN", program), log)
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def fatbin(cubins: Mapping[str, bytes]) -> bytes:
    """Return one file that holds the machine code of several architectures; the driver takes what fits its device.

    Parameters
    ----------
    cubins : mapping of str to bytes
        By architecture.

    Raises
    ------
    TargetError
        If nvFatbin is not installed.
    """
    library, handle, size = _library("libnvfatbin.so.12"), ctypes.c_void_p(), ctypes.c_size_t()
    # Compressed as every driver reads it; smaller modes want newer ones.
    words = [b"-64", b"-host=linux", b"-cuda", b"-compress-all"]
    _done(library.nvFatbinCreate(ctypes.byref(handle), (ctypes.c_char_p * len(words))(*words), len(words)), "nvFatbin")
    try:
        for architecture, code in cubins.items():
            number = ctypes.c_size_t(len(code))
            _done(library.nvFatbinAddCubin(handle, code, number, architecture.encode(), b"kernels"), "nvFatbin")
        _done(library.nvFatbinSize(handle, ctypes.byref(size)), "nvFatbin")
        content = ctypes.create_string_buffer(size.value)
        _done(library.nvFatbinGet(handle, content), "nvFatbin")
        return content.raw
    finally:
        library.nvFatbinDestroy(ctypes.byref(handle))


def compile_all(source: str) -> bytes:
    """Return the fatbin of CUDA C++ for all of `ARCHITECTURES`.

    Raises
    ------
    TargetError
        If kernels cannot be compiled here.
    VerificationError
        If they do not compile, or keep something in local memory.
    """
    cubins = {}
    for architecture in ARCHITECTURES:
        made = compile_cuda(source, architecture)
        if spilled := made.spills():
            fact = f"keeps registers in memory on sm_{architecture}"
            raise VerificationError(spilled[0], fact, "report it with the model")
        cubins[architecture] = made.code
    return fatbin(cubins)


def version() -> str:
    """Return the version of NVRTC, as its package has it."""
    return importlib.metadata.version(PACKAGES["libnvrtc.so.12"][1])


def _taken(nvrtc: Any, what: str, program: ctypes.c_void_p) -> bytes:
    size = ctypes.c_size_t()
    _done(nvrtc[f"nvrtcGet{what}Size"](program, ctypes.byref(size)), "NVRTC")
    content = ctypes.create_string_buffer(size.value)
    _done(nvrtc[f"nvrtcGet{what}"](program, content), "NVRTC")
    return content.raw


def _done(code: int, library: str) -> None:
    if code:
        raise VerificationError("cuda:tvm", f"{library} fails with its code {code}", "report it with the model")


def _file(library: str) -> Path | None:
    folder, _ = PACKAGES[library]
    try:
        found = importlib.util.find_spec(f"nvidia.{folder}")
    except ModuleNotFoundError:
        return None
    places = found.submodule_search_locations if found else None
    files = [Path(place) / "lib" / library for place in places or ()]
    return next((file for file in files if file.is_file()), None)


@functools.cache
def _library(name: str) -> Any:
    file = _file(name)
    if file is None:
        raise TargetError(PACKAGES[name][1], "is not installed, which compiles kernels for CUDA devices", REMEDY)
    return ctypes.CDLL(str(file))
