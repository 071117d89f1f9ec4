"""HiGHS, through `scipy.optimize.milp`, without what it writes to standard output."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import scipy.optimize

#: One search at a time: standard output belongs to the process.
_ONE = threading.Lock()


def milp(*arguments: Any, **options: Any) -> scipy.optimize.OptimizeResult:
    """Call `scipy.optimize.milp`.

    HiGHS, as scipy 1.17 has it, writes a line to standard output whenever it repairs a solution, whatever its options
    say: in the middle of what `--json` prints.
    """
    with _ONE, _silence():
        return scipy.optimize.milp(*arguments, **options)


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Drop what native code writes to standard output."""
    try:
        kept = os.dup(1)
    except OSError:  # There is no standard output.
        yield
        return
    flush = ctypes.CDLL(None).fflush if os.name == "posix" else lambda _: None
    sys.stdout.flush()
    flush(None)
    with Path(os.devnull).open("wb") as nothing:
        os.dup2(nothing.fileno(), 1)
    try:
        yield
    finally:
        flush(None)
        os.dup2(kept, 1)
        os.close(kept)
