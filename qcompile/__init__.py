"""qcompile: an ONNX graph-rewriting compiler for edge deployment.

    >>> import qcompile
    >>> result = qcompile.compile("model.onnx", qcompile.Options(target="cpu", data="calib.npz"))

Importing the package loads no runtime and no backend.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from qcompile.core.errors import QcompileError
    from qcompile.core.plan import QuantPlan
    from qcompile.driver import CompileResult, compile
    from qcompile.options import Options

__all__ = ["CompileResult", "Options", "QcompileError", "QuantPlan", "__version__", "compile"]

_HOMES = {
    "CompileResult": "qcompile.driver",
    "Options": "qcompile.options",
    "QcompileError": "qcompile.core.errors",
    "QuantPlan": "qcompile.core.plan",
    "compile": "qcompile.driver",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'qcompile' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOMES[name]), name)
