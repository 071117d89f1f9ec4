"""Libraries of integer programs, compiled and loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qcompile.backends.cpu.session import InferenceSession, absent
from qcompile.backends.integer.program import Program

Load = Callable[..., InferenceSession]


@pytest.fixture(scope="session", autouse=True)
def tvm() -> Any:
    """Skip without TVM: it generates the kernels."""
    return pytest.importorskip("tvm")


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """Return what compiles a program and loads its library; skip where the processor lacks the instructions."""
    from qcompile.backends.cpu import library
    from qcompile.backends.cpu.backend import write
    from qcompile.backends.tvm.schedules.x86 import PROCESSORS

    def loaded(program: Program, processor: str = "avx512-vnni") -> InferenceSession:
        if missing := absent(PROCESSORS[processor].flags):
            pytest.skip(f"the processor has no {missing[0]}")
        write(library.network_of(program, PROCESSORS[processor]), "net", tmp_path)
        return InferenceSession(tmp_path)

    return loaded
