"""Artifacts of one model side by side on this machine: what each is worth, and what it takes."""

from __future__ import annotations

import json
import multiprocessing
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from qcompile.backends.base import find_target
from qcompile.backends.mcu.emulate import MACHINES
from qcompile.backends.mcu.emulated_run import run_package
from qcompile.calib.data import Sample, input_specs, open_data
from qcompile.core import model as models
from qcompile.core import runtime
from qcompile.core.errors import QcompileError, TargetError, UsageError, first_line
from qcompile.core.target import Target
from qcompile.read_report import read_report, require_whole
from qcompile.timing import in_turns, processor
from qcompile.verify import Fidelity, Run

#: Seconds for each model of those that are timed.
SECONDS = 1.5


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
    fidelity : mapping of str to mapping
        Measures by output, as reports have them.
    accuracy : float, optional
        The part of labelled samples that are right.
    latency : Latency, optional
        Of what runs on this machine.
    instructions : int, optional
        Of a microcontroller's package under emulation, which are no time.
    peak_bytes : int, optional
        What loading it and one run add to the memory of a process of its own.
    load_ms : float, optional
        What these take there, in milliseconds.
    failure : str
        Why it could not be run, or why it was not timed.
    failed : bool
    """

    output: str
    target: str
    bytes: int = 0
    fidelity: Mapping[str, Mapping[str, float | None]] | None = None
    accuracy: float | None = None
    latency: Latency | None = None
    instructions: int | None = None
    peak_bytes: int | None = None
    load_ms: float | None = None
    failure: str = ""
    failed: bool = False

    @property
    def decibels(self) -> float:
        """The least SQNR over outputs; infinite where all are exact."""
        numbers = [measures["sqnr"] for measures in (self.fidelity or {}).values() if not measures["exact"]]
        return min((float("-inf") if number is None else number for number in numbers), default=float("inf"))


@dataclass(frozen=True)
class Compared:
    """Artifacts side by side.

    Parameters
    ----------
    rows : tuple of Row
        Ranked; the float model's among them.
    samples : int
    threads : int
    """

    rows: tuple[Row, ...]
    samples: int
    threads: int

    def as_json(self) -> dict[str, Any]:
        """Return it JSON-ready."""
        rows = [asdict(row) for row in self.rows]
        return {"processor": processor(), "samples": self.samples, "threads": self.threads, "rows": rows}

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


def compare(outputs: Sequence[Path], model: Path, data: str, count: int, threads: int, rank: str) -> Compared:
    """Run artifacts on the same inputs and hold them against the float model and one another.

    Parameters
    ----------
    outputs : sequence of Path
        Folders that compiles wrote.
    model : Path
        The float model.
    data : str
        As ``--data`` of a compile.
    count : int
        Samples at most.
    threads : int
    rank : {"latency", "fidelity", "size"}

    Raises
    ------
    QcompileError
        If the model or the data cannot be used. What goes wrong with one artifact is said in its row.
    """
    loaded = models.load(model)
    pairs = list(islice(open_data(data, input_specs(loaded)).labelled(), count))
    samples, reference = [feeds for feeds, _ in pairs], runtime.Session(loaded, threads=threads).run
    expected, digest = [reference(feeds) for feeds in samples], models.content_hash(loaded)
    rows, timed = list[Row](), dict[int, Run]()
    for output in outputs:
        row = Row(str(output), "")
        try:
            row, target, run = _opened(output, digest, threads)
            row = _judged(row, run, pairs, expected)
            if _runs_here(target):
                memory, load = _in_a_process(output, threads, samples[0])
                row, timed[len(rows)] = replace(row, peak_bytes=memory, load_ms=load), run
            else:
                row = _emulated(row, target, output, samples[0])
        except (QcompileError, RuntimeError, OSError) as error:
            why = f"{error.fact}; {error.remedy}" if isinstance(error, QcompileError) else first_line(error)
            row = replace(row, failure=why, failed=True)
        rows.append(row)
    base, *latencies = _latencies([reference, *timed.values()], samples)
    for index, latency in zip(timed, latencies, strict=True):
        rows[index] = replace(rows[index], latency=latency)
    float_row = Row(str(model), "float", models.file_bytes(loaded), latency=base)
    return Compared(tuple(sorted([float_row, *rows], key=_KEYS[rank])), len(samples), threads)


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


def _opened(output: Path, model: str, threads: int) -> tuple[Row, Target, Run]:
    require_whole(output)
    report = read_report(output)
    if report["model"]["sha256"] != model:
        raise UsageError(output, "was compiled from another model", "give the model that it was compiled from")
    target, backend = find_target(report["target"])
    row = Row(str(output), target.name, report["size"]["artifact_bytes"])
    return row, target, backend.open(output, tuple(report["files"]), threads)


def _judged(row: Row, run: Run, pairs: Sequence[tuple[Sample, int | None]], expected: Sequence[runtime.Outputs]) -> Row:
    fidelity = Fidelity()
    for (feeds, label), outputs in zip(pairs, expected, strict=True):
        fidelity.add(outputs, run(feeds), label)
    measures = {name: found.measures() for name, found in fidelity.outputs.items()}
    right = fidelity.candidate_correct / fidelity.labelled if fidelity.labelled else None
    return replace(row, fidelity=measures, accuracy=right)


def _runs_here(target: Target) -> bool:
    return target.timed_here or not target.integer_only


def _latencies(runs: Sequence[Run], samples: Sequence[Sample]) -> list[Latency]:
    times = in_turns(runs, samples, budget=SECONDS * len(runs), settle=len(runs) > 2)
    return [Latency(statistics.median(each), float(np.quantile(each, 0.9))) for each in times]


def _emulated(row: Row, target: Target, output: Path, sample: Sample) -> Row:
    """Count instructions; without an emulator, the row says why there are none."""
    if target.name not in MACHINES:
        return replace(row, failure=f"no emulator has a {target.name}")
    try:
        return replace(row, instructions=run_package(output, [sample]).instructions)
    except TargetError as error:
        return replace(row, failure=error.fact)


def _in_a_process(output: Path, threads: int, sample: Sample) -> tuple[int, float] | tuple[None, None]:
    """Return the bytes and milliseconds that loading an artifact and one run take where nothing else happens."""
    if not Path("/proc/self/clear_refs").exists():
        return None, None
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_loaded, output, threads, sample).result()


def _loaded(output: Path, threads: int, sample: Sample) -> tuple[int, float]:
    report = read_report(output)
    _, backend = find_target(report["target"])
    if backend.name == "ort":
        runtime.load_onnxruntime()  # what the library itself takes is no artifact's
    before, began = _memory("VmRSS"), time.perf_counter()
    backend.open(output, tuple(report["files"]), threads)(sample)
    took = 1e3 * (time.perf_counter() - began)
    return _memory("VmHWM") - before, took


def _memory(kind: str) -> int:
    """Return this process's memory in bytes, now (VmRSS) or at its peak since then (VmHWM)."""
    process = Path("/proc/self")
    if kind == "VmRSS":
        (process / "clear_refs").write_text("5")  # the peak begins anew
    [line] = [line for line in (process / "status").read_text().splitlines() if line.startswith(kind)]
    return 1024 * int(line.split()[1])


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
