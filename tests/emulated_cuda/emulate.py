"""The kernels of a network as C++ of this machine, and a driver that runs them: see device.h and libcuda.h."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from qcompile.backends.cuda.network import Network, prelude

HERE = Path(__file__).parent
#: In place of what only a device understands.
REPLACED = "instructions.cuh"
_KERNEL = re.compile(r'extern "C" __global__ void __launch_bounds__\([^)]*\) (\w+)\(([^)]*)\)')


def compiler() -> list[str]:
    """Return what compiles C++ here; skip without."""
    for name in ("clang++-19", "clang-19", "g++", "clang++"):
        if shutil.which(name):
            return [name, "-x", "c++"]
    pytest.skip("no C++ compiler")


def library(network: Network, folder: Path) -> Path:
    """Compile a network's kernels with the driver that runs them here, and return the library."""
    return built([prelude(REPLACED), *network.sources.values()], folder)


def built(parts: list[str], folder: Path) -> Path:
    """Compile CUDA C++ with the driver that runs it here."""
    text = "\n".join(parts)
    table, calls = [], []
    for name, signature in _KERNEL.findall(text):
        types = [" ".join(re.split(r"[ *]", one.strip())[:-1]) + "*" * one.count("*") for one in signature.split(",")]
        types = [one.replace("__restrict__", "") for one in types]
        passed = ", ".join(f"*({one} *)arguments[{at}]" for at, one in enumerate(types))
        calls.append(f"static void call_{name}(void **arguments) {{ {name}({passed}); }}")
        sizes = "".join(f"sizeof({one}), " for one in types)
        pointers = ", ".join(str(int("*" in one)) for one in types)
        table.append(f'    {{"{name}", call_{name}, {{{sizes}0}}, {{{pointers}}}}},')
    head = "struct Kernel { const char *name; void (*call)(void **); int sizes[16]; int pointers[16]; };"
    rows = "\n".join([head, "static const Kernel kernels[] = {", *table, "    {}};"])
    device, driver = ((HERE / name).read_text(encoding="utf-8") for name in ("device.h", "libcuda.h"))
    # Each has a name of its own: a library that is open already would be taken for it.
    source, made = folder / "emulated.cpp", folder / f"libcuda{len(list(folder.glob('libcuda*')))}.so"
    source.write_text("\n".join([device, text, *calls, rows, driver]), encoding="utf-8")
    words = ["-std=c++17", "-O1", "-w", "-fwrapv", "-fPIC", "-shared", "-fno-exceptions", "-fno-rtti"]
    command = [*compiler(), *words, "-ffp-contract=off", "-fno-threadsafe-statics", str(source), "-o", str(made), "-lm"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[:4000]
    return made
