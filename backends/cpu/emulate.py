"""Run a network's executable on an emulated processor: QEMU's user mode, one process for all inputs."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qcompile.backends.cpu.session import DESCRIPTION, InferenceSession
from qcompile.backends.mcu.emulate import counted, counter
from qcompile.core.errors import TargetError, VerificationError

Array = npt.NDArray[Any]
PACKAGE = "qemu-user"
#: Bytes in front of outputs: when the run began and ended.
TIMES = 32
#: What `runner_aarch64.s` does around the network.
AROUND = {"_start", "take", "give", "clock", "leave"}


def emulator(architecture: str) -> str:
    """Return the command that emulates an architecture.

    Raises
    ------
    TargetError
        If it is not installed.
    """
    names = (f"qemu-{architecture}", f"qemu-{architecture}-static")
    found = next((name for name in names if shutil.which(name)), None)
    if found is None:
        fact = f"needs {names[0]}, since this machine is none of its kind and the result has to be verified"
        raise TargetError(architecture, fact, f"apt-get install {PACKAGE}")
    return found


class EmulatedSession(InferenceSession):
    """A network on an emulated processor, as `InferenceSession` has it.

    Parameters
    ----------
    folder : Path
        With the executable.
    words : sequence of str
        What the emulator is told beside the executable and its processor.

    Raises
    ------
    TargetError
        If the emulator is not installed.
    """

    def __init__(self, folder: Path, words: Sequence[str] = ()) -> None:
        about = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
        self._described(about, lambda _, index: bytes([index]))
        pipe = subprocess.PIPE
        program = folder / about["executable"]
        if not os.access(program, os.X_OK):
            program.chmod(0o755)  # a bundle keeps no modes
        command = [emulator(about["architecture"]), "-cpu", about["emulated"], *words, str(program)]
        process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, bufsize=-1)
        self._process = process
        self.close = weakref.finalize(self, _end, process)

    def _call(self, function: bytes, inputs: Sequence[Array], outputs: Sequence[Array]) -> None:
        given, made = self._process.stdin, self._process.stdout
        assert given is not None and made is not None
        with contextlib.suppress(BrokenPipeError):
            given.write(b"".join([function, *(array.tobytes() for array in inputs)]))
            given.flush()
        content = made.read(TIMES + sum(array.nbytes for array in outputs))[TIMES:]
        for array in outputs:
            if len(content) < array.nbytes:
                self._failed()
            array[...] = np.frombuffer(content[: array.nbytes], array.dtype).reshape(array.shape)
            content = content[array.nbytes :]

    def run_quantized(self, feeds: Mapping[str, Array]) -> None:
        """Run once from codes to codes."""
        _, at, feeds = self._fitted(feeds)
        self.run_codes([self._codes(port, self._given(port, feeds)) for port in at.inputs])

    def _failed(self) -> None:
        assert self._process.stderr is not None
        said = self._process.stderr.read().decode(errors="replace").strip().splitlines()
        code = self._process.wait()
        fact = f"the emulated network left with {code}{f': {said[0]}' if said else ''}"
        raise VerificationError(self.about["executable"], fact, "report it with the model")


def instructions(folder: Path, feeds: Mapping[str, Array]) -> int:
    """Return how many instructions a network executes, from codes to codes; exact, and no time.

    Raises
    ------
    TargetError
        If the emulator or a compiler for its plugin is not installed, or ONNX Runtime runs a part.
    """
    if "segments" in json.loads((folder / DESCRIPTION).read_text(encoding="utf-8")):
        raise TargetError(folder.name, "ONNX Runtime runs a part of it, which is not emulated", "leave it out")
    with tempfile.TemporaryDirectory() as scratch:
        counts = Path(scratch) / "counts.tsv"
        # The emulator knows functions by name only where it writes a log.
        words = ("-d", "plugin", "-D", os.devnull, "-plugin", f"{counter(Path(scratch))},out={counts}")
        session = EmulatedSession(folder, words)
        session.run_quantized(feeds)
        session.close()
        return sum(count for name, count in counted(counts).items() if name not in AROUND)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process, by the end of its input."""
    for stream in (process.stdin, process.stdout, process.stderr):
        if stream is not None:
            with contextlib.suppress(OSError):
                stream.close()
    process.wait()
