"""The pool of threads of a library: `pool.c`, and LLVM's text of it, so that compiling needs no C compiler."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from qcompile.backends.cpu.layout import NETWORK, POOL, THREADS
from qcompile.backends.tvm import native
from qcompile.backends.tvm.native import Machine, Object

HERE = Path(__file__).parent
SOURCE = HERE / "pool.c"
#: Architectures that there is a text for.
ARCHITECTURES = ("x86_64", "aarch64")
#: What names in the text begin with, in place of the network's.
STEM = "qc_"


def text_of(machine: Machine) -> Path:
    """Return LLVM's text for a processor."""
    return HERE / f"pool.{machine.triple.split('-')[0]}.ll"


def compiled(name: str, shared: Sequence[bool], machine: Machine) -> Object:
    """Return the machine code of the pool that runs ``NAME_step``.

    Parameters
    ----------
    name : str
        The network's.
    shared : sequence of bool
        Of each step, whether threads share it.
    machine : Machine
    """
    text = re.sub(
        rf"^@{STEM}(steps|shared) = external .*\n", "", text_of(machine).read_text("utf-8"), flags=re.MULTILINE
    )
    bytes_ = "".join(f"\\0{int(each)}" for each in shared)
    text += f"@{STEM}steps = internal constant i32 {len(shared)}\n"
    text += f'@{STEM}shared = internal constant [{len(shared)} x i8] c"{bytes_}"\n'
    return native.from_text(text.replace(f"@{STEM}", f"@{name}_"))


def command(architecture: str) -> list[str]:
    """Return what writes the text to standard output, run where the source is."""
    flags = ("-std=c11", "-Wall", "-Wextra", "-Werror", "-O2", "-fPIC", "-ffreestanding", "-fno-ident")
    # Atomics would be calls of a compiler's library, which nothing is linked with; x18 is the system's on Android.
    own = ["-mno-outline-atomics", "-ffixed-x18"] if architecture == "aarch64" else []
    made = [*own, "-S", "-emit-llvm", "-o", "-", SOURCE.name]
    return [
        "clang-19",
        f"--target={architecture}-unknown-linux-gnu",
        *flags,
        f"-DMOST={THREADS}",
        f"-DBYTES={POOL}",
        f"-DNETWORK={NETWORK}",
        *made,
    ]
