"""What the target's own compiler makes of a package: bytes of code, bytes of stack. Without one, nothing is said."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qcompile.core.errors import VerificationError

#: Constants that stand in the weights already.
DATA = re.compile(r"(weights|channels|table|steps)_\d+$")
#: What a call of the C library's own copies puts on the stack, in bytes.
LIBRARY_FRAME = 32
FLAGS = ("-std=c99", "-O2", "-ffunction-sections", "-fdata-sections")


@dataclass(frozen=True)
class Compiled:
    """What a compiler made of ``model.c``.

    Parameters
    ----------
    compiler : str
        Its name and version.
    code_bytes : int
        In flash, without the weights.
    stack_bytes : int
        At most: the network's function, the deepest layer, the deepest kernel, and the library's copies.
    """

    compiler: str
    code_bytes: int
    stack_bytes: int


def compile_package(folder: Path, settings: Mapping[str, Any]) -> Compiled | None:
    """Compile ``model.c`` for the target; None if its compiler is not here.

    Raises
    ------
    VerificationError
        If the compiler does not take the C.
    """
    command = tuple(settings.get("compiler", ()))
    if not command or shutil.which(command[0]) is None or shutil.which("nm") is None:
        return None
    with tempfile.TemporaryDirectory() as name:
        objects = Path(name) / "model.o"
        done = subprocess.run(
            [*command, *FLAGS, "-fstack-usage", "-c", str(folder / "model.c"), "-o", str(objects)],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            first = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr)
            raise VerificationError("model.c", f"{command[0]}: {first}", "report it with the model")
        return Compiled(_version(command), _code(objects), _stack(objects.with_suffix(".su")))


def _version(command: Sequence[str]) -> str:
    said = subprocess.run([command[0], "--version"], capture_output=True, text=True, check=True).stdout
    number = re.search(r"\d+\.\d+(\.\d+)?", said)
    return f"{command[0]} {number.group() if number else ''} -O2".replace("  ", " ")


def _code(objects: Path) -> int:
    listed = subprocess.run(["nm", "--print-size", str(objects)], capture_output=True, text=True, check=True)
    rows = [line.split() for line in listed.stdout.splitlines()]
    return sum(int(row[1], 16) for row in rows if len(row) == 4 and row[2] in "tTrR" and not DATA.match(row[3]))


def _stack(usage: Path) -> int:
    """Add up the largest frames of each kind of function; none calls another of its kind."""
    run = layer = kernel = 0
    for line in usage.read_text().splitlines():
        place, size, _ = line.split("\t")
        function = place.rpartition(":")[2]
        if function.endswith("_run"):
            run = max(run, int(size))
        elif function.startswith("layer_"):
            layer = max(layer, int(size))
        else:
            kernel = max(kernel, int(size))
    return run + layer + kernel + LIBRARY_FRAME
