"""The options of a compile: one field is one flag of the command line and one key of a recipe."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self, get_args, get_type_hints

from qcompile.budget import Budget
from qcompile.calib.observers import Observer
from qcompile.calib.sensitivity import SAMPLES
from qcompile.calib.workers import Workers
from qcompile.core.costs import CostTable
from qcompile.core.errors import UsageError
from qcompile.core.lengths import Lengths, Shape
from qcompile.core.target import LIMITS
from qcompile.override import Override

#: Fidelity measures that --min-fidelity can bound; all are better when larger.
FIDELITY_MEASURES = ("sqnr", "cosine", "top1")
#: What stands in place of a cost table's path in what is written: its SHA-256.
COSTS_KEY = "costs_sha256"
#: What stands for no cost table, in place of a path.
NO_COSTS = Path("none")
#: Pairs of weights farther apart are many more, and take the program longer than it has.
WINDOW = 8
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
        Calibration data, see docs/data.md. Without them activations are quantized only where BatchNormalization tells
        their ranges.
    enlarge : int, optional
        How many calibration samples there are to be: as many as are missing are made of those that are given.
    eval : str, optional
        Evaluation data. Without them the last fifth of the calibration data is held out.
    output : Path, optional
        Folder of the artifact; by default ``<model>-<target>`` in the working directory.
    weights : "auto", "8", "4", "mixed" or "none"
        Bits that weights are stored in. ``mixed`` chooses for each tensor; ``auto`` is 8, and ``mixed`` where a budget
        on size or bit operations is set, or a device's flash is too small for 8.
    activations : "8", "16" or "none"
        Bits that activations are computed in.
    observer : "auto", or one of `Observer`
        How an activation's range is chosen; ``auto`` measures which serves each tensor best.
    smoothing : "auto" or "none"
        Whether channels of activations may be divided by factors that the weights behind them take back.
    rotation : "auto" or "none"
        Whether channels may be rotated by matrices that the weights around them take back.
    no_added_nodes : bool
        Whether both must be without a node more.
    costs : Path, optional
        Cost table that takes the place of the target's own, as ``qcompile probe`` writes it. ``none`` is no table:
        whatever can be integers becomes integers, whether it pays or not.
    shape : mapping of str to Shape
        Inputs to fix; of libraries, an axis may have several lengths.
    allow_ort_segments : bool
        Whether ONNX Runtime may run what a library has no form for, in an artifact for Python.
    max_size : str, optional
        The artifact's bytes at most: in parts of float's, ``0.2x``, or with a unit, ``5MB``.
    max_bops : str, optional
        The bit operations of a run at most: in parts of float's, ``0.05x``, or with a unit, ``20G``.
    max_latency : str, optional
        What a run may take by the cost table: in parts of float's, ``0.6x``, or with a unit, ``12ms``.
    board : str, optional
        Board of a microcontroller, whose SRAM and flash the artifact must fit.
    max_sram, max_flash : str, optional
        What it may take of either at most, with a unit: ``64KB``.
    min_fidelity : mapping of str to float
        Bounds on ``sqnr`` (dB), ``cosine`` or ``top1``; missed is an error.
    pairs : int
        With how many weights that follow it each one is measured together, where bits are chosen; 0 is with none.
    pareto : bool
        Whether the best choices of weights' bits for all sizes are to be written beside the artifact.
    cache : Path, optional
        Folder where finished stages are kept, so that a compile that was cut off goes on.
    seed : int
        For the synthetic inputs that stand in for missing data.
    threads : int
        Threads of the compile, by default as many as the machine has. The artifact does not depend on it.
    workers : str, optional
        What measures losses in place of those threads: a number of processes, or the address of a Dask cluster.
    max_memory : str, optional
        What this process may take of memory, with a unit: ``4GB``. The artifact does not depend on it.
    overrides : tuple of Override
        What is asked of single operators; the later of two that choose the same one counts.

    Raises
    ------
    UsageError
        If a field has a value that it cannot have.
    """

    target: str
    data: str | None = None
    enlarge: int | None = None
    eval: str | None = None
    output: Path | None = None
    weights: Literal["auto", "8", "4", "mixed", "none"] = "auto"
    activations: Literal["8", "16", "none"] = "8"
    observer: Literal["auto", "minmax", "moving-average", "percentile", "entropy", "mse"] = "auto"
    smoothing: Literal["auto", "none"] = "auto"
    rotation: Literal["auto", "none"] = "auto"
    no_added_nodes: bool = False
    costs: Path | None = None
    shape: Mapping[str, Shape] = field(default_factory=dict)
    allow_ort_segments: bool = False
    max_size: str | None = None
    max_bops: str | None = None
    max_latency: str | None = None
    board: str | None = None
    max_sram: str | None = None
    max_flash: str | None = None
    min_fidelity: Mapping[str, float] = field(default_factory=dict)
    pairs: int = 0
    pareto: bool = False
    cache: Path | None = None
    seed: int = 0
    threads: int = field(default_factory=lambda: os.cpu_count() or 1)
    workers: str | None = None
    max_memory: str | None = None
    overrides: tuple[Override, ...] = ()

    @classmethod
    def from_recipe(cls, path: str | Path, **fields: Any) -> Self:
        """Read a recipe, see docs/recipe.md; fields that are given count more than its keys.

        Raises
        ------
        UsageError
            If the recipe cannot be read, or does not name the target and neither do the fields.
        """
        from qcompile import recipe

        options = recipe.read(Path(path)) | fields
        if "target" not in options:
            raise UsageError(path, "names no target", 'add target = "cpu"')
        return cls(**options)

    def __post_init__(self) -> None:
        # A caller in Python has a text or a path at hand.
        for kind, names in ((Path, ("output", "costs", "cache")), (str, ("data", "eval"))):
            given = {name: value for name in names if (value := getattr(self, name)) is not None}
            self.__dict__.update({name: kind(value) for name, value in given.items()})
        hints = get_type_hints(type(self))
        for name in ("weights", "activations", "observer", "smoothing", "rotation"):
            choices, chosen = get_args(hints[name]), getattr(self, name)
            if chosen not in choices:
                raise UsageError(f"--{name}", f"there is no choice '{chosen}'", f"use one of {', '.join(choices)}")
        if unknown := sorted(set(self.min_fidelity) - set(FIDELITY_MEASURES)):
            fact = f"there is no measure '{unknown[0]}'"
            raise UsageError("--min-fidelity", fact, f"use one of {', '.join(FIDELITY_MEASURES)}")
        for name in ("max_size", "max_bops", "max_latency", "max_sram", "max_flash", "max_memory"):
            if (text := getattr(self, name)) is not None:
                Budget.parse(text, f"--{name.replace('_', '-')}")
        if not 0 <= self.pairs <= WINDOW:
            fact = f"{self.pairs} is not a number of neighbours that can be measured"
            raise UsageError("--pairs", fact, f"give 1 to {WINDOW}, or 0")
        if self.pareto and self.weights == "none":
            raise UsageError("--pareto", "leaves nothing to choose with --weights none", "leave out one of them")
        if self.enlarge is not None and not 1 <= self.enlarge <= SAMPLES:
            fact = f"{self.enlarge} is not a number of samples that rounding looks at"
            raise UsageError("--enlarge", fact, f"give 1 to {SAMPLES}")
        if self.threads < 1:
            raise UsageError("--threads", f"{self.threads} is not a number of threads", "give 1 or more")
        Workers(self.threads, self.workers)
        if Lengths.of(self.shape) is not None and self.allow_ort_segments:
            raise UsageError("--allow-ort-segments", "is for one shape", "name one length, or leave it out")

    def quantized(self, calibrated: bool) -> tuple[bool, bool]:
        """Return whether weights and whether activations are to be quantized; the latter take ranges."""
        return self.weights != "none", self.activations != "none" and calibrated

    @property
    def mixed(self) -> bool:
        """Whether each weight's bits are to be chosen."""
        return self.weights == "mixed" or (self.weights == "auto" and (self.max_size or self.max_bops) is not None)

    @property
    def observers(self) -> tuple[Observer, ...]:
        """The observers to choose among."""
        return tuple(Observer) if self.observer == "auto" else (Observer(self.observer),)

    @property
    def limits(self) -> dict[str, Any]:
        """The device's memory, as a target's settings have it: bytes."""
        texts = {"max_sram": self.max_sram, "max_flash": self.max_flash}
        found: dict[str, Any] = {"board": self.board}
        for name, text in texts.items():
            found[name] = None if text is None else int(Budget.parse(text, f"--{name.replace('_', '-')}").amount)
        return found

    @cached_property
    def lengths(self) -> Lengths | None:
        """The lengths that an axis may have, where `shape` has several of one."""
        return Lengths.of(self.shape)

    @cached_property
    def cost_table(self) -> CostTable | None:
        """The cost table that is to take the place of the target's own.

        Raises
        ------
        UsageError
            If the file is none.
        """
        return None if self.costs in (None, NO_COSTS) else CostTable.from_json(self.costs)

    @cached_property
    def costs_sha256(self) -> str:
        """The SHA-256 of that table's content, empty without one: where it lies decides nothing."""
        if self.cost_table is None:
            return "" if self.costs is None else str(NO_COSTS)
        return hashlib.sha256(self.cost_table.to_json().encode()).hexdigest()

    def decisive(self) -> dict[str, Any]:
        """Return the options that the artifact's bytes depend on, JSON-ready; where things lie is not among them."""
        placeless = {"data", "eval", "output", "cache", "threads", "workers", "max_memory", "costs", "pareto"}
        chosen = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in placeless}
        return chosen | {
            "shape": {name: list(shape) for name, shape in self.shape.items()},
            "min_fidelity": dict(self.min_fidelity),
            "overrides": [override.as_table() for override in self.overrides],
            **({COSTS_KEY: self.costs_sha256} if self.costs else {}),
        }

    def as_recipe(self) -> dict[str, Any]:
        """Return what decides a plan, as a recipe has it; data, places and bounds on the result do not."""
        decisive = self.decisive()
        decisive["override"] = decisive.pop("overrides")
        left_out = ("min_fidelity", "seed", "allow_ort_segments", *LIMITS)
        return {key: value for key, value in decisive.items() if key not in left_out and value is not None}

    def measured_by(self) -> dict[str, Any]:
        """Return the options that measurements depend on: what is chosen by them afterwards, for a budget, is not."""
        # What is made of a model for weights of four bits alone is none of them.
        weights = "4" if (self.weights, self.activations) == ("4", "none") else self.weights != "none"
        free = dict.fromkeys(("max_size", "max_bops", "max_latency", "min_fidelity", "pairs", *LIMITS))
        return self.decisive() | free | {"weights": weights, "allow_ort_segments": False}


def parse_shape(text: str) -> tuple[str, Shape]:
    """Read ``name=1x128``, or ``name=1x32,128`` of an axis with several lengths.

    Raises
    ------
    UsageError
        If it is none, or an axis is not positive.
    """
    name, equals, dims = text.rpartition("=")
    try:
        sizes = [tuple(map(int, dim.split(","))) for dim in dims.split("x")] if dims else []
    except ValueError:
        sizes = [(0,)]
    if not equals or not name or any(size < 1 for dim in sizes for size in dim):
        raise UsageError(f"--shape {text}", "is not NAME=1x128", "give the input's name and its sizes")
    return name, tuple(dim if len(dim) > 1 else dim[0] for dim in sizes)


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
