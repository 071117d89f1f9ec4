"""CPUs without a runtime: a network as one shared library of integer kernels that TVM generates."""

from __future__ import annotations

from qcompile.backends.cpu.backend import CpuBackend

__all__ = ["CpuBackend"]
