"""What a backend is, and how the installed ones are found."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, ClassVar, Protocol

import onnx_ir as ir

from qcompile.core.contract import Refusal, Track
from qcompile.core.costs import CostTable
from qcompile.core.errors import TargetError, UsageError
from qcompile.core.execution import Kernel
from qcompile.core.plan import QuantPlan
from qcompile.core.runtime import Feeds, Outputs
from qcompile.core.target import Target

GROUP = "qcompile.backends"


@dataclass(frozen=True)
class Placed:
    """Where one node runs.

    Parameters
    ----------
    node, op_type : str
    host : str
        Why the host's processor runs it instead of the device; empty for the device.
    """

    node: str
    op_type: str
    host: str = ""


@dataclass(frozen=True)
class Lowered:
    """What a backend wrote.

    Parameters
    ----------
    files : tuple of str
        Names inside the artifact's folder; the first is what a user loads.
    kernels : mapping of str to str
        For each operator that really runs as integer, planned or not, the kernel that runs it.
    refusals : tuple of Refusal
        Operators that were planned as integer and that the target runs in float all the same.
    bytes_by_cause : mapping of str to int, optional
        What the device stores, where that is not the files; without it the first file is an ONNX model.
    measured : mapping of str to object, optional
        What this machine's tools say of the artifact, JSON-ready.
    segments : tuple of mapping
        Of an artifact in segments, what the report says of each, JSON-ready.
    placement : tuple of Placed, optional
        Where each node runs, of what a device and its host run together; those first that the host is left with.
    notes : tuple of str
        What a user must know of it first.
    same_form : bool
        Whether the first file is an ONNX model that computes what the QDQ model does, but for what rounding makes of
        another order of operations.
    """

    files: tuple[str, ...]
    kernels: Mapping[str, str]
    refusals: tuple[Refusal, ...]
    bytes_by_cause: Mapping[str, int] | None = None
    measured: Mapping[str, Any] | None = None
    segments: tuple[Mapping[str, Any], ...] = ()
    placement: tuple[Placed, ...] | None = None
    notes: tuple[str, ...] = ()
    same_form: bool = False


@dataclass(frozen=True)
class Subject:
    """A model whose kernels are to be measured.

    Parameters
    ----------
    name : str
    model : onnx_ir.Model
        As it came.
    canonical : onnx_ir.Model
    samples : sequence of Feeds
    """

    name: str
    model: ir.Model
    canonical: ir.Model
    samples: Sequence[Feeds]


class OnDevice(Protocol):
    """A model that was loaded where the target is.

    Attributes
    ----------
    provider, device, runtime : str
        What runs it, where, and what that is a part of, with its version.
    """

    provider: str
    device: str
    runtime: str

    def run(self, feeds: Feeds) -> Outputs:
        """Run one sample."""
        ...


class Backend(Protocol):
    """Turns a QDQ model into what a target runs."""

    name: str

    def targets(self) -> Iterable[Target]:
        """Return the targets that it lowers for."""
        ...

    def available(self) -> bool:
        """Tell whether what it lowers with is installed."""
        ...

    def check(self, target: Target) -> None:
        """Refuse a target whose settings it cannot follow, or that it cannot lower for here, before the work begins."""
        ...

    def lower(self, model: ir.Model, plan: QuantPlan, target: Target, folder: Path) -> Lowered:
        """Write the artifact's model files into `folder`."""
        ...

    def size(self, model: ir.Model) -> int:
        """Return the bytes that `lower` would write for a QDQ model."""
        ...

    def narrowable(self, model: ir.Model, target: Target, tied: Mapping[str, str]) -> tuple[str, ...]:
        """Return which activations may be stored in four bits, if a QDQ model with all in eight does not fit `target`.

        Parameters
        ----------
        model : onnx_ir.Model
        target : Target
            With the device's memory among its settings; what they do not bound always fits.
        tied : mapping of str to str
            By name of a value in the QDQ model, the activation that it is; several have their bits together.
        """
        ...

    def narrowed(
        self, model: ir.Model, target: Target, tied: Mapping[str, str], losses: Mapping[str, float]
    ) -> tuple[str, ...]:
        """Return which activations to store in four bits so that a QDQ model fits `target` and loses least.

        Parameters
        ----------
        model : onnx_ir.Model
            With all activations in eight bits.
        target : Target
        tied : mapping of str to str
            As of `narrowable`.
        losses : mapping of str to float
            Of each activation that may have four bits, what that loses.

        Raises
        ------
        BudgetError
            If it does not fit even with all of them in four bits; it says what it takes then.
        """
        ...

    def on_device(self, target: Target, fallback: bool) -> Callable[[Path], OnDevice]:
        """Return what loads a model file on the device of a target that has one.

        Parameters
        ----------
        target : Target
        fallback : bool
            Whether what the device has no kernel for may run on the host; otherwise it is an error.
        """
        ...

    def halvable(self, node: ir.Node, target: Target) -> bool:
        """Tell whether the target computes a standard operator in float16, where its values fit that."""
        ...

    def room(self, settings: Mapping[str, Any]) -> int | None:
        """Return the bytes that the device's memory leaves for constants, by its settings; None where nobody says."""
        ...

    def executed(self, model: ir.Model, samples: Sequence[Feeds]) -> list[list[Kernel]]:
        """Return for each sample the kernels that the target would execute for a QDQ model, for pricing."""
        ...

    def measure(self, target: Target, subjects: Sequence[Subject], processor: str, track: Track[Any]) -> CostTable:
        """Measure a cost table on this machine, which it names as `processor`."""
        ...

    def open(self, folder: Path, files: tuple[str, ...], threads: int = 1) -> Callable[[Feeds], Outputs]:
        """Load an artifact and return a function that runs one sample."""
        ...


def require_one_length(target: Target, fact: str) -> None:
    """Refuse several lengths of an axis.

    Raises
    ------
    UsageError
        With `fact` of the target, if there are any.
    """
    if target.settings.get("lengths") is not None:
        raise UsageError(f"--shape with the lengths {target.settings['lengths']}", fact, "name one, or leave it open")


def require_no_segments(target: Target) -> None:
    """Refuse segments where everything is one runtime's, or has to be.

    Raises
    ------
    UsageError
    """
    if target.settings.get("allow_ort_segments"):
        fact = f"means nothing for {target.name}, which has no libraries for a CPU"
        raise UsageError("--allow-ort-segments", fact, "leave it out")


def read_targets(package: str, costs: bool = False) -> Iterator[Target]:
    """Yield the targets of a package's folder `targets`, by the names of their files; some have tables of `costs`."""
    here = files(package)
    for entry in sorted((here / "targets").iterdir(), key=lambda entry: entry.name):
        if entry.name.endswith(".toml"):
            yield Target.from_toml(entry, here / "costs" if costs else None)


class Unpriced:
    """What a backend says whose kernels no table of costs is about; `unpriced` is why."""

    unpriced: ClassVar[str] = "computes in integers alone, whatever they take: no cost decides anything there"

    def executed(self, model: ir.Model, samples: Sequence[Feeds]) -> list[list[Kernel]]:
        """Return nothing: nothing prices these kernels."""
        del model
        return [[] for _ in samples]

    def measure(self, target: Target, subjects: Sequence[Subject], processor: str, track: Track[Any]) -> CostTable:
        """Refuse: nobody would ask for the times.

        Raises
        ------
        TargetError
            Always.
        """
        del subjects, processor, track
        raise TargetError(f"probe {target.name}", self.unpriced, "leave it out")


class Unbounded:
    """What a backend says whose targets have all the memory that an artifact may want."""

    def on_device(self, target: Target, fallback: bool) -> Callable[[Path], OnDevice]:
        """Refuse: nothing here runs on a device of its own.

        Raises
        ------
        TargetError
        """
        del fallback
        raise TargetError(target.name, "has no device that runs files", "see docs/comparing.md")

    def halvable(self, node: ir.Node, target: Target) -> bool:
        """Tell that whatever has a type for it has a kernel for it."""
        del node, target
        return True

    def room(self, settings: Mapping[str, Any]) -> int | None:
        """Return nothing: files have no flash to fit."""
        del settings
        return None

    def narrowable(self, model: ir.Model, target: Target, tied: Mapping[str, str]) -> tuple[str, ...]:
        """Return nothing: all activations in eight bits fit."""
        del model, target, tied
        return ()

    def narrowed(
        self, model: ir.Model, target: Target, tied: Mapping[str, str], losses: Mapping[str, float]
    ) -> tuple[str, ...]:
        """Return nothing; see `narrowable`."""
        del model, target, tied, losses
        return ()


def backends() -> dict[str, Backend]:
    """Return the installed backends by name, from the entry points of the group ``qcompile.backends``."""
    found: dict[str, Backend] = {}
    for entry in sorted(importlib.metadata.entry_points(group=GROUP), key=lambda entry: entry.name):
        found[entry.name] = entry.load()()
    return found


def find_target(name: str) -> tuple[Target, Backend]:
    """Return a target by name, and its backend.

    Raises
    ------
    TargetError
        If no installed backend has it.
    """
    known = {}
    for backend in backends().values():
        for target in backend.targets():
            if target.name == name:
                return target, backend
            known[target.name] = target
    remedy = f"'qcompile targets' lists what there is: {', '.join(sorted(known))}"
    raise TargetError(f"--target {name}", "there is no such target", remedy)
