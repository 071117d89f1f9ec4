"""Run a package on this machine: its C through the host's compiler, which takes the plain kernels."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import tempfile
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qcompile.backends.integer.program import Program
from qcompile.backends.integer.storage import to_bytes
from qcompile.core.errors import TargetError, VerificationError

Array = npt.NDArray[np.integer[Any]]


class HostNetwork:
    """A package's network as a function of this process.

    Parameters
    ----------
    folder : Path
        The package.
    name : str
        Prefix of its functions.
    program : Program

    Raises
    ------
    TargetError
        If there is no C compiler.
    VerificationError
        If it does not take the C.
    """

    def __init__(self, folder: Path, name: str, program: Program) -> None:
        compiler = next((found for found in ("cc", "gcc", "clang") if shutil.which(found)), None)
        if compiler is None:
            raise TargetError("check of model.c", "needs a C compiler on this machine", "apt-get install gcc")
        self.program = program
        # A name of its own for each: loading the same file twice would give one arena to both.
        built = Path(tempfile.mkdtemp()) / "model.so"
        weakref.finalize(self, shutil.rmtree, built.parent, ignore_errors=True)
        flags = ["-std=c99", "-O2", "-shared", "-fPIC"]
        done = subprocess.run(
            [compiler, *flags, str(folder / "model.c"), "-o", str(built)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            fact = f"{compiler}: {done.stderr.strip().splitlines()[0]}"
            raise VerificationError("model.c", fact, "report it with the model")
        self.function = getattr(ctypes.CDLL(str(built)), f"{name}_run")

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Return the outputs' codes for the inputs' codes, as `integer.interpret` does."""
        tensors, program = self.program.tensors, self.program
        given = [to_bytes(inputs[port.name], tensors[port.tensor].dtype) for port in program.inputs]
        made = {
            port.name: np.zeros(tensors[port.tensor].shape, tensors[port.tensor].array_dtype)
            for port in program.outputs
        }
        self.function(*(array.ctypes.data_as(ctypes.c_void_p) for array in (*given, *made.values())))
        return dict(made)
