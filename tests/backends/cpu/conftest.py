"""Libraries of integer programs, compiled and loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qcompile.backends.cpu.session import InferenceSession, absent
from qcompile.backends.integer.program import Program
from qcompile.core.errors import TargetError

Load = Callable[..., InferenceSession]


@pytest.fixture(scope="session", autouse=True)
def tvm() -> Any:
    """Skip without TVM: it generates the kernels."""
    return pytest.importorskip("tvm")


def require_emulation() -> None:
    """Skip where aarch64 cannot be linked for, or emulated."""
    from qcompile.backends.cpu import library
    from qcompile.backends.cpu.emulate import emulator

    try:
        library.linker("aarch64")
        emulator("aarch64")
    except TargetError as error:
        pytest.skip(str(error))


@pytest.fixture
def emulation() -> None:
    """Skip where aarch64 cannot be linked for, or emulated."""
    require_emulation()


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """Return what compiles a program and loads its library; skip where the processor lacks the instructions."""
    from qcompile.backends.cpu import library
    from qcompile.backends.cpu.backend import PROCESSORS, opened, write

    def loaded(program: Program, processor: str = "avx512-vnni") -> InferenceSession:
        if PROCESSORS[processor].emulated:
            require_emulation()
        elif missing := absent(PROCESSORS[processor].flags):
            pytest.skip(f"the processor has no {missing[0]}")
        write(library.network_of(program, PROCESSORS[processor]), "net", tmp_path)
        return opened(tmp_path)

    return loaded
