"""Artifacts of one model side by side on a device: what each is worth, and what it takes."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np

from qcompile import runner
from qcompile.backends.base import find_target
from qcompile.backends.cpu.emulate import instructions
from qcompile.backends.mcu.emulate import MACHINES
from qcompile.backends.mcu.emulated_run import run_package
from qcompile.bundle import Failed
from qcompile.core import numerics
from qcompile.core.errors import QcompileError, TargetError, UsageError
from qcompile.devices import Device
from qcompile.static_devices import DeviceError
from qcompile.timing import processor


@dataclass(frozen=True)
class Latency:
    """What runs took, in milliseconds.

    Parameters
    ----------
    median, p90 : float
        Of interleaved runs, once all are warm.
    """

    median: float
    p90: float


@dataclass(frozen=True)
class Row:
    """One artifact, or the float model.

    Parameters
    ----------
    output : str
        Its folder; the model's file.
    target : str
        ``float`` for the model.
    bytes : int
    sqnr : mapping of str to float, optional
        By output, in dB against the float model; infinite where it is equal to the last bit.
    accuracy : float, optional
        The part of labelled samples that are right.
    latency : Latency, optional
        Of what runs on this machine.
    instructions : int, optional
        Of what runs under emulation, which are no time.
    peak_bytes : int, optional
        What loading it and one run add to the memory of a process of its own.
    load_ms : float, optional
        What these take there, in milliseconds.
    energy_mj : float, optional
        Millijoules that the device draws while it runs once, where it counts them.
    failure : str
        Why it could not be run, or why it was not timed.
    failed : bool
    """

    output: str
    target: str
    bytes: int = 0
    sqnr: Mapping[str, float] | None = None
    accuracy: float | None = None
    latency: Latency | None = None
    instructions: int | None = None
    peak_bytes: int | None = None
    load_ms: float | None = None
    energy_mj: float | None = None
    failure: str = ""
    failed: bool = False

    @property
    def decibels(self) -> float:
        """The least SQNR over outputs; infinite where all are exact."""
        return min((self.sqnr or {}).values(), default=float("inf"))


@dataclass(frozen=True)
class Compared:
    """Artifacts side by side.

    Parameters
    ----------
    rows : tuple of Row
        Ranked; the float model's among them.
    samples : int
    threads : int
    device : str
    told : mapping of int to mapping
        What the device told, by artifact of the bundle.
    """

    rows: tuple[Row, ...]
    samples: int
    threads: int
    device: str
    told: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Return it JSON-ready: null is an SQNR that is infinite."""
        rows = [asdict(row) | {"sqnr": _finite(row.sqnr)} for row in self.rows]
        where = {"device": self.device, "processor": processor() if self.device == "local" else None}
        return {**where, "samples": self.samples, "threads": self.threads, "rows": rows}

    def require(self) -> None:
        """Raise where an artifact could not be run.

        Raises
        ------
        TargetError
            Naming the first of them.
        """
        if failed := [row for row in self.rows if row.failed]:
            fact = f"{len(failed)} of {len(self.rows) - 1} could not be run: {failed[0].failure}"
            raise TargetError(failed[0].output, fact, "see its row")


def _finite(ratios: Mapping[str, float] | None) -> dict[str, float | None] | None:
    return None if ratios is None else {name: one if isfinite(one) else None for name, one in ratios.items()}


def compare(
    folder: Path, content: Mapping[str, Any], failed: Iterable[Failed], device: Device, threads: int, rank: str,
    timeout: float, profile: bool = False,
) -> Compared:  # fmt: skip
    """Run a bundle on a device and hold its artifacts against the float model and one another.

    Parameters
    ----------
    folder : Path
        Of the bundle.
    content : mapping
        What `bundle.json` holds.
    failed : iterable of Failed
        What could not be packed has a row, too.
    device : Device
        Packages of microcontrollers, and what it emulates, run under emulation here, wherever the others run.
    threads : int
        Of each run.
    rank : {"latency", "fidelity", "size"}
    timeout : float
        Seconds after which the device counts as lost.
    profile : bool
        Have it time the kernels of ONNX models too.
    """
    rows = [Row(one["name"], one["target"], one["bytes"]) for one in content["artifacts"]]
    here = [index for index, one in enumerate(content["artifacts"]) if _is_emulated(one, device)]
    misplaced = {index: why for index, one in enumerate(content["artifacts"])
                 if index not in here and (why := device.misplaced(one))}  # fmt: skip
    there = [index for index in range(len(rows)) if index not in here and index not in misplaced]
    alone = [index for index in there if device.runs_alone(content["artifacts"][index])]
    told, lost = _told(folder, device, [index for index in there if index not in alone], threads, timeout, profile)
    for index in alone:
        told[index] = _told_alone(folder, device, content["artifacts"][index], content["labels"], timeout)
    for index in there:
        rows[index] = _seen(rows[index], told.get(index, {}), "" if index in alone else lost)
    for index, why in misplaced.items():
        rows[index] = replace(rows[index], failure=why, failed=rows[index].target != "float")
    for index in here:
        rows[index] = _emulated(rows[index], folder, content["artifacts"][index], content["labels"])
    rows = [row for row, one in zip(rows, content["artifacts"], strict=True) if "form" not in one]
    rows += [Row(str(one.output), "", failure=one.reason, failed=True) for one in failed]
    ranked = sorted(rows, key=_KEYS[rank])
    return Compared(tuple(ranked), len(content["labels"]), threads, device.name, told)


def _told(
    folder: Path, device: Device, there: Sequence[int], threads: int, timeout: float, profile: bool
) -> tuple[dict[int, dict[str, Any]], str]:
    """Run a bundle's runner on a device; return what it told of each artifact, and why it ended before it was done."""
    told = dict[int, dict[str, Any]]()
    words = ("--threads", str(threads), "--only", ",".join(map(str, there)), *(["--profile"] if profile else []))
    try:
        for line in device.lines(folder, words, timeout) if there else ():
            told[line["artifact"]] = line
    except DeviceError as error:
        return told, f"{device.name} was lost: {error}"
    return told, ""


def _told_alone(
    folder: Path, device: Device, packed: Mapping[str, Any], labels: Sequence[int | None], timeout: float
) -> dict[str, Any]:
    try:
        return device.alone(folder, packed, labels, timeout)
    except DeviceError as error:
        return {"failure": f"{device.name}: {error}"}


def _seen(row: Row, told: Mapping[str, Any], lost: str) -> Row:
    """Add what a device told of an artifact."""
    failure = told.get("failure") or lost
    if "outputs" in told:
        row = replace(_judged(row, told), peak_bytes=told["peak_bytes"], load_ms=told["load_ms"])
        row = replace(row, energy_mj=told.get("energy_mj"))
    times = told.get("times_ms", ())
    if len(times) >= runner.FEWEST:
        row = replace(row, latency=Latency(statistics.median(times), float(np.quantile(times, 0.9))))
    elif not failure:
        failure = "nothing was heard of it"
    return replace(row, failure=failure, failed=bool(failure))


def _judged(row: Row, told: Mapping[str, Any]) -> Row:
    ratios = {name: numerics.decibel(signal, noise) if signal or noise else float("inf")
              for name, (signal, noise) in told["outputs"].items()}  # fmt: skip
    return replace(row, sqnr=ratios if row.target != "float" else None, accuracy=told["accuracy"])


def _is_emulated(packed: Mapping[str, Any], device: Device) -> bool:
    """Tell whether an artifact runs here: under emulation, or as this processor stands in for what no runner has."""
    if "device" in packed or packed["kind"] == "package":
        return True
    return device.emulated != "" and packed.get("architecture") == device.emulated


def _emulated(row: Row, folder: Path, packed: Mapping[str, Any], labels: list[int | None]) -> Row:
    """Judge a package by its C on this machine, a library as it is emulated, and count instructions.

    What is for an accelerator is judged by the processor that verifies it in a compile.

    The row says why there are none.
    """
    output = folder / packed["folder"]
    try:
        _, backend = find_target(packed["target"])
        row = _judged(row, runner.fidelity(backend.open(output, (packed["entry"],)), folder, labels))
    except QcompileError as error:
        return replace(row, failure=f"{error.fact}; {error.remedy}", failed=True)
    if "device" in packed:
        return replace(row, failure=f"is for {packed['device']}: judged on this processor, not timed")
    library = packed["kind"] != "package"
    if not library and packed["target"] not in MACHINES:
        return replace(row, failure=f"no emulator has a {packed['target']}")
    try:
        [sample, *_] = runner.samples_of(folder / "inputs.npz")
        counted = instructions(output, sample) if library else run_package(output, [sample]).instructions
        return replace(row, instructions=counted)
    except TargetError as error:
        return replace(row, failure=error.fact)


def append(history: Path, compared: Compared) -> None:
    """Append what was seen, and when, as one line of JSON.

    Raises
    ------
    UsageError
        If the file cannot be written.
    """
    line = json.dumps({"at": datetime.now(UTC).isoformat(timespec="seconds"), **compared.as_json()})
    try:
        with history.open("a", encoding="utf-8") as file:
            file.write(f"{line}\n")
    except OSError as error:
        raise UsageError(history, f"cannot be written ({error.strerror})", "name another file") from error


def _by_latency(row: Row) -> tuple[bool, float]:
    """Rank what was timed first; instructions are no time, and stand behind it."""
    if row.latency is not None:
        return False, row.latency.median
    return True, float("inf") if row.instructions is None else row.instructions


_KEYS: Mapping[str, Callable[[Row], tuple[bool, float]]] = {
    "latency": _by_latency,
    "fidelity": lambda row: (row.failed, -row.decibels),
    "size": lambda row: (row.failed, row.bytes),
}
