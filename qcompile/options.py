"""The options of a compile: one field is one flag of the command line and one key of a recipe."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

from qcompile.calib.observers import Observer
from qcompile.calib.sensitivity import Choice
from qcompile.core.errors import UsageError

#: Fidelity measures that --min-fidelity can bound; all are better when larger.
FIDELITY_MEASURES = ("sqnr", "cosine", "top1")
#: Without a bound of the user's, the report warns below this.
EXPECTED_SQNR = 20.0


@dataclass(frozen=True)
class Options:
    """What the user asks for.

    Parameters
    ----------
    target : str
        Device, as ``qcompile targets`` lists them.
    data : str, optional
        Calibration data, see docs/data.md. Without them weights are quantized only.
    eval : str, optional
        Evaluation data. Without them the last fifth of the calibration data is held out.
    output : Path, optional
        Folder of the artifact; by default ``<model>-<target>`` in the working directory.
    weights : "8" or "none"
    activations : "8" or "none"
    observer : "auto", or one of `Observer`
        How an activation's range is chosen; ``auto`` measures which serves each tensor best.
    shape : mapping of str to tuple of int
        Inputs to fix.
    min_fidelity : mapping of str to float
        Bounds on ``sqnr`` (dB), ``cosine`` or ``top1``; missed is an error.
    cache : Path, optional
        Folder where finished stages are kept, so that a compile that was cut off goes on.
    seed : int
        For the synthetic inputs that stand in for missing data.
    threads : int
        Threads of the compile, by default as many as the machine has. The artifact does not depend on it.

    Raises
    ------
    UsageError
        If a field has a value that it cannot have.
    """

    target: str
    data: str | None = None
    eval: str | None = None
    output: Path | None = None
    weights: Literal["8", "none"] = "8"
    activations: Literal["8", "none"] = "8"
    observer: Literal["auto", "minmax", "moving-average", "percentile", "entropy", "mse"] = "auto"
    shape: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    min_fidelity: Mapping[str, float] = field(default_factory=dict)
    cache: Path | None = None
    seed: int = 0
    threads: int = field(default_factory=lambda: os.cpu_count() or 1)

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for name in ("weights", "activations", "observer"):
            choices, chosen = get_args(hints[name]), getattr(self, name)
            if chosen not in choices:
                raise UsageError(f"--{name}", f"there is no choice '{chosen}'", f"use one of {', '.join(choices)}")
        if unknown := sorted(set(self.min_fidelity) - set(FIDELITY_MEASURES)):
            fact = f"there is no measure '{unknown[0]}'"
            raise UsageError("--min-fidelity", fact, f"use one of {', '.join(FIDELITY_MEASURES)}")
        if self.threads < 1:
            raise UsageError("--threads", f"{self.threads} is not a number of threads", "give 1 or more")

    def quantized(self, calibrated: bool) -> tuple[bool, bool]:
        """Return whether weights and whether activations are to be quantized; the latter takes real data."""
        return self.weights == "8", self.activations == "8" and calibrated

    def fixed_choice(self, names: Iterable[str]) -> Choice | None:
        """Return the choice of one observer for all of these tensors, or None where each one's is to be found."""
        return None if self.observer == "auto" else Choice(dict.fromkeys(names, Observer(self.observer)))

    def decisive(self) -> dict[str, Any]:
        """Return the options that the artifact's bytes depend on, JSON-ready; where things lie is not among them."""
        placeless = {"data", "eval", "output", "cache", "threads"}
        chosen = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in placeless}
        return chosen | {
            "shape": {name: list(shape) for name, shape in self.shape.items()},
            "min_fidelity": dict(self.min_fidelity),
        }


def parse_shape(text: str) -> tuple[str, tuple[int, ...]]:
    """Read ``name=1x128``.

    Raises
    ------
    UsageError
        If it is none, or an axis is not positive.
    """
    name, equals, dims = text.rpartition("=")
    try:
        shape = tuple(int(dim) for dim in dims.split("x")) if dims else ()
    except ValueError:
        shape = (0,)
    if not equals or not name or any(dim < 1 for dim in shape):
        raise UsageError(f"--shape {text}", "is not NAME=1x128", "give the input's name and its sizes")
    return name, shape


def parse_bound(text: str) -> tuple[str, float]:
    """Read ``sqnr=20``.

    Raises
    ------
    UsageError
        If it is none.
    """
    name, equals, number = text.partition("=")
    try:
        bound = float(number if equals else "")
        if not math.isfinite(bound):
            raise ValueError
        return name, bound
    except ValueError:
        raise UsageError(f"--min-fidelity {text}", "is not MEASURE=NUMBER", "for example sqnr=20") from None
