"""What a compile may take of memory: refused before the work where that cannot be held, and looked at again at its end.

What grows with a model is the float model in the runtime, which packs weights anew for its kernels. One model is held
at a time then, with fewer threads where each would hold one of its own; weights that passes rewrite go to a file and
are mapped from there (`core/scratch.py`). None of it changes a byte of the artifact.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import ParamSpec, TypeVar

import onnx_ir as ir

from qcompile.budget import Budget
from qcompile.calib.sensitivity import MEMORY
from qcompile.core import model as models
from qcompile.core import scratch
from qcompile.core.errors import BudgetError
from qcompile.options import Options

FLAG = "--max-memory"
#: What the process takes beside any model: interpreter, libraries, and what allocators do not give back.
BASE = 320 << 20
#: What the runtime takes of a model, in parts of its weights in float32: packed, with what is read meanwhile, and
#: beside it the QDQ model, whose layers are held against its own.
HELD = 2.5
#: What the largest of the weights takes while it is rounded, in parts of it: its codes in float64, and as a matrix. No
#: model is held then. Beside both there are `sensitivity.MEMORY` of samples, or second moments of about two weights.
ROUNDED = 5.0
#: What a compile with data takes beyond that, in parts of the weights in float32: as measured at 0.54 GB of them.
LEFT = 0.25

P = ParamSpec("P")
R = TypeVar("R")


def within_memory(stage: Callable[P, R]) -> Callable[P, R]:
    """Let weights that are rewritten leave memory while a stage runs, where the options that it is given bound that."""

    @wraps(stage)
    def within(*given: P.args, **named: P.kwargs) -> R:
        bounded = any(isinstance(one, Options) and one.max_memory is not None for one in (*given, *named.values()))
        with scratch.opened(bounded):
            _forget_peak()
            return stage(*given, **named)

    return within


def least(model: ir.Model, held: int = 1, data: bool = False) -> int:
    """Return the bytes that a compile takes at least, as is to be expected, with so many models held at once.

    Parameters
    ----------
    model : onnx_ir.Model
    held : int
    data : bool
        Weights are rounded with regard to data.
    """
    tensors = [value.const_value for value in models.initializers(model) if value.const_value is not None]
    sizes = [4 * one.size if one.dtype.is_floating_point() else one.nbytes for one in tensors]
    whole, largest = sum(sizes), max(sizes, default=0)
    parts = held * HELD + (LEFT if data else 0.0)
    return BASE + min(MEMORY, 2 * whole) + int(max(parts * whole, ROUNDED * largest))


def holds(options: Options, model: ir.Model, held: int) -> bool:
    """Tell whether so many models may be held at once."""
    bound = _bound(options)
    return bound is None or least(model, held, options.data is not None) <= bound


def threads(options: Options, model: ir.Model) -> int:
    """Return how many threads may each hold a model, of those that are given.

    Raises
    ------
    BudgetError
        If memory has no room for one.
    """
    bound = _bound(options)
    if bound is None:
        return options.threads
    if not holds(options, model, 1):
        needed = _text(least(model, data=options.data is not None))
        fact = f"has no room for a model whose compile takes {needed} at least"
        raise BudgetError(f"{FLAG} {options.max_memory}", fact, f"give {needed} or more, or leave it out")
    return next(count for count in range(options.threads, 0, -1) if count == 1 or holds(options, model, count))


def require_held(options: Options) -> None:
    """Hold what was taken against the bound.

    Raises
    ------
    BudgetError
        If more was taken.
    """
    bound, taken = _bound(options), peak()
    if bound is not None and taken is not None and taken > bound:
        fact = f"was not held: the compile took {_text(taken)}"
        raise BudgetError(f"{FLAG} {options.max_memory}", fact, f"give {_text(taken)} or more, or leave it out")


def peak() -> int | None:
    """Return the most bytes that this process had in memory since the compile began; None where nothing tells."""
    try:
        found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    except OSError:
        return None
    return None if found is None else int(found[1]) * 1024


def as_json(options: Options) -> dict[str, int | None]:
    """Return what was taken and what was to be held, JSON-ready."""
    return {"peak_bytes": peak(), "bound_bytes": _bound(options)}


def _forget_peak() -> None:
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _bound(options: Options) -> int | None:
    return None if options.max_memory is None else int(Budget.parse(options.max_memory, FLAG).amount)


def _text(count: int) -> str:
    """Return a number of bytes, rounded up, as the option takes it."""
    return f"{-(-count // (1 << 20))}MB"
