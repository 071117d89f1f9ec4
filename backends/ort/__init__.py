"""ONNX Runtime: QDQ models that its optimizer turns into integer kernels."""

from __future__ import annotations

from qcompile.backends.ort.lower import OrtBackend

__all__ = ["OrtBackend"]
