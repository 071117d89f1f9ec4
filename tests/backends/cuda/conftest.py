"""Networks for CUDA devices on a machine without one: their kernels as C++, launched through a driver of ours."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qcompile.backends.integer.program import Program

#: What a fatbin begins with, in front of nothing: the emulated driver has the kernels already.
EMPTY = bytes.fromhex("50ed55ba") + bytes(12)
Load = Callable[..., Any]


@pytest.fixture(scope="session", autouse=True)
def tvm() -> Any:
    """Skip without TVM: it generates kernels."""
    return pytest.importorskip("tvm")


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Load:
    """Return what opens a program's session on the emulated device."""
    from emulated_cuda import emulate

    from qcompile.backends.cuda.backend import write
    from qcompile.backends.cuda.network import network_of
    from qcompile.backends.cuda.session import InferenceSession

    sessions = []

    def loaded(program: Program, batch: int = 1) -> InferenceSession:
        network = network_of(program)
        write(network, "net", EMPTY, tmp_path)
        monkeypatch.setenv("QCOMPILE_LIBCUDA", str(emulate.library(network, tmp_path)))
        sessions.append(InferenceSession(tmp_path, batch))
        return sessions[-1]

    yield loaded
    for session in sessions:
        session.close()
