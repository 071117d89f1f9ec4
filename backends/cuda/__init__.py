"""CUDA devices without a runtime: a network as integer kernels, compiled for six architectures on any machine."""

from __future__ import annotations

from qcompile.backends.cuda.backend import CudaBackend

__all__ = ["CudaBackend"]
