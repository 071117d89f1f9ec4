"""Packages of integer programs, written and compiled."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qcompile.backends.integer.program import Program
from qcompile.backends.integer.strips import plan_memory
from qcompile.backends.mcu.emulate import missing
from qcompile.backends.mcu.footprint import Footprint
from qcompile.backends.mcu.layers import Layers
from qcompile.backends.mcu.package import Example, write_package
from qcompile.backends.mcu.write_c import Source, identifier

Pack = Callable[..., Source]


def pytest_collection_modifyitems(items: list[Any]) -> None:
    """Skip what needs programs that are not here."""
    absent = missing() or ("" if shutil.which("clang-19") else "clang-19")
    if absent:
        for item in items:
            if item.get_closest_marker("qemu"):
                item.add_marker(pytest.mark.skip(reason=f"needs {absent}"))


@pytest.fixture(scope="session", autouse=True)
def tvm() -> Any:
    """Skip without TVM: it generates the kernels."""
    return pytest.importorskip("tvm")


@pytest.fixture
def pack(tmp_path: Path) -> Pack:
    """Return what writes a program's package into a folder."""

    def written(program: Program, folder: Path = tmp_path, max_sram: int | None = None) -> Source:
        plan = plan_memory(program, max_sram)
        layers = Layers.of(plan.program, plan.offsets)
        source = Source(identifier(program.name), plan.program, plan.offsets, plan.arena_bytes, layers)
        folder.mkdir(exist_ok=True)
        write_package(source, Footprint.of(source.name, "cortex-m4", plan, layers), Example.of(source), folder)
        return source

    return written
