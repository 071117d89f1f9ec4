"""Probe: what the installed runtime makes of models on this machine, and what its kernels take."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx_ir as ir

from qcompile.backends.base import Subject
from qcompile.backends.ort import capabilities, grid
from qcompile.backends.ort.legalize import legalize
from qcompile.calib.collect import collect
from qcompile.calib.data import Dataset, input_specs
from qcompile.calib.observers import Observer
from qcompile.core import runtime
from qcompile.core.capabilities import Capability
from qcompile.core.contract import Track
from qcompile.core.costs import OVERHEAD, CostTable
from qcompile.core.execution import Kernel, execute
from qcompile.core.plan import Precision
from qcompile.core.target import Target
from qcompile.passes import structure
from qcompile.passes.allocate_bits import allocate_bits
from qcompile.passes.canonicalize import Canonicalize
from qcompile.passes.insert_qdq import InsertQdq
from qcompile.passes.place import Wish, place

#: Sessions that time one model: where each puts its tensors differs, and with that its times, by up to a quarter.
SESSIONS = 3
#: Seconds that timing one model or one model of the grid may take, and the runs of a session that bound it.
BUDGET, GRID_BUDGET, FEWEST, MOST = 3.0, 0.1, 4, 300
#: The forms that a model is measured in.
AS_IT_CAME, WEIGHTS, INTEGERS = "as it came", "weights in integers", "everything in integers"
DYNAMIC = "ranges of each run"
#: Runs of a model of one small node, which tell what a run takes beside kernels.
EMPTY_RUNS = 2000


@dataclass(frozen=True)
class Run:
    """What one sample takes.

    Parameters
    ----------
    kernels : tuple of Kernel
        In each session their times add up to the run's, but for what no kernel takes; the medians do nearly.
    microseconds : float
        Of the whole run, undisturbed by timing single kernels.
    """

    kernels: tuple[Kernel, ...]
    microseconds: float


def executed(model: ir.Model, samples: Sequence[runtime.Feeds]) -> list[list[Kernel]]:
    """Return for each sample the kernels that the runtime executes for a quantized model, written as for a user."""
    return execute(legalize(model), samples)


def timed(
    models: Sequence[ir.Model], samples: Sequence[runtime.Feeds], beside: float = 0.0, budget: float = BUDGET
) -> list[list[Run]]:
    """Run models as they are; return for each, sample by sample, its kernels with the times that they take undisturbed.

    Each is the median over several sessions, all of which stay open so that none gets the memory of another. What each
    takes beside the others is measured in turns, run by run: machines are slow for seconds at a time, and what counts
    is one model's time over another's.

    Parameters
    ----------
    models : sequence of onnx_ir.Model
    samples : sequence of Feeds
        That all of them read.
    beside : float
        Microseconds of a run that no kernel takes.
    budget : float
        Seconds for each model, to time its kernels, and as many for the turns.
    """
    sessions: list[runtime.Session] = []
    found: list[list[Run]] = []
    for _ in range(SESSIONS):
        for model in models:
            sessions.append(runtime.Session(model))
            found.append(_session_runs(model, samples, sessions[-1], beside, budget / SESSIONS))
    turns = _in_turns(sessions, samples, budget * len(models))
    beside_others = [[_scaled(run, total, beside) for run, total in zip(runs, totals, strict=True)]
                     for runs, totals in zip(found, turns, strict=True)]  # fmt: skip
    return [
        [_median(runs) for runs in zip(*beside_others[first :: len(models)], strict=True)]
        for first in range(len(models))
    ]


def _in_turns(
    sessions: Sequence[runtime.Session], samples: Sequence[runtime.Feeds], budget: float
) -> list[list[float]]:
    """Return the median microseconds of each session's runs, sample by sample, with one run of each after another."""
    began, times = time.perf_counter(), np.empty((MOST, len(samples), len(sessions)))
    rounds = 0
    while rounds < MOST and (rounds < FEWEST or time.perf_counter() - began < budget):
        for which, feeds in enumerate(samples):
            for index, session in enumerate(sessions):
                session.run(feeds)  # what the others left in the caches is none of its own
                start = time.perf_counter()
                session.run(feeds)
                times[rounds, which, index] = 1e6 * (time.perf_counter() - start)
        rounds += 1
    medians: list[list[float]] = np.median(times[:rounds], axis=0).T.tolist()
    return medians


def _scaled(run: Run, total: float, beside: float) -> Run:
    """Return the run as one of `total` microseconds, of which every kernel has the part that it had."""
    factor = max(OVERHEAD, total - beside) / max(OVERHEAD, run.microseconds - beside)
    return Run(tuple(replace(kernel, microseconds=factor * kernel.microseconds) for kernel in run.kernels), total)


def _session_runs(
    model: ir.Model, samples: Sequence[runtime.Feeds], session: runtime.Session, beside: float, budget: float
) -> list[Run]:
    """Time single kernels in turn with undisturbed runs of a session, which tell what that timing takes itself."""
    began = time.perf_counter()
    for feeds in samples:
        session.run(feeds)
    once = time.perf_counter() - began
    times: list[list[float]] = []

    def undisturbed(feeds: runtime.Feeds) -> None:
        start = time.perf_counter()
        session.run(feeds)
        times.append([1e6 * (time.perf_counter() - start)])

    rounds = int(min(MOST, max(FEWEST, budget / (2.0 * once))))
    kernels = execute(model, samples, rounds, undisturbed)
    # Rounds by samples, without the first round and the slowest quarter, as for the single kernels.
    runs = np.sort(np.reshape(times, (rounds + 1, len(samples)))[1:], axis=0)
    whole = runs[: max(1, rounds - rounds // 4)].mean(axis=0)
    return [Run(tuple(without_timing(one, float(total) - beside)), float(total))
            for one, total in zip(kernels, whole, strict=True)]  # fmt: skip


def without_timing(kernels: Sequence[Kernel], total: float) -> list[Kernel]:
    """Take what timing takes off each kernel alike, so that together they take `total` microseconds, or as near."""
    excess = (sum(kernel.microseconds for kernel in kernels) - total) / max(1, len(kernels))
    return [replace(kernel, microseconds=max(OVERHEAD, kernel.microseconds - max(0.0, excess))) for kernel in kernels]


def _median(runs: Sequence[Run]) -> Run:
    # Sessions run branches that do not depend on one another in orders of their own.
    alike = [sorted(run.kernels, key=lambda k: (k.name, k.op_type, k.dtypes, k.inputs, k.outputs)) for run in runs]
    kernels = [
        replace(same[0], microseconds=float(np.median([kernel.microseconds for kernel in same])))
        for same in zip(*alike, strict=True)
    ]
    return Run(tuple(kernels), float(np.median([run.microseconds for run in runs])))


def one_operator() -> ir.Model:
    """Return a model of one small node: what a run of it takes is nearly all beside kernels."""
    x = ir.val("x", ir.DataType.FLOAT, (1,))
    node = ir.node("Neg", [x])
    node.outputs[0].name = "y"
    return ir.Model(ir.Graph([x], node.outputs, nodes=[node], opset_imports={"": 21}, name="one"), ir_version=10)


def time_beside_kernels() -> float:
    """Return the microseconds of a run that no kernel takes: checking inputs, handing outputs over."""
    session, feeds, times = runtime.Session(one_operator()), {"x": np.zeros(1, np.float32)}, []
    for _ in range(EMPTY_RUNS):
        start = time.perf_counter()
        session.run(feeds)
        times.append(1e6 * (time.perf_counter() - start))
    return max(OVERHEAD, float(np.median(times)) - OVERHEAD)


def quantized(
    model: ir.Model,
    target: Target,
    samples: Sequence[runtime.Feeds],
    activations: bool = True,
    wishes: Mapping[str, Wish] | None = None,
    dynamic: bool = False,
) -> ir.Model:
    """Return a canonical model with Q/DQ wherever the target's rules allow it.

    Ranges are those of the first sample, or, where they can be, those that each run's values have.
    """
    placement = place(model, target, weights=True, activations=activations, wishes=wishes)
    one = Dataset("one sample", lambda: samples[:1], input_specs(model))
    statistics = collect(model, placement.activations, one, _silent)
    observer = Observer.DYNAMIC if dynamic else Observer.MINMAX
    plan = allocate_bits(model, placement, statistics, target, dict.fromkeys(placement.activations, observer))
    return InsertQdq(plan)(model.clone()).model


def forms_of(subject: Subject, target: Target) -> dict[str, ir.Model]:
    """Return a model in the forms that are measured, so that each operator is among them in float and in integers."""
    forms = {
        AS_IT_CAME: subject.model,
        WEIGHTS: legalize(quantized(subject.canonical, target, subject.samples, activations=False)),
        INTEGERS: legalize(quantized(subject.canonical, target, subject.samples)),
    }
    if place(subject.canonical, target, weights=True, activations=True).dynamic:
        forms[DYNAMIC] = legalize(quantized(subject.canonical, target, subject.samples, dynamic=True))
    return forms


def measure_model(subject: Subject, target: Target, beside: float) -> dict[str, list[Run]]:
    """Return what a model takes in each of its forms, for each sample."""
    forms = forms_of(subject, target)
    return dict(zip(forms, timed(list(forms.values()), subject.samples, beside), strict=True))


def measure_grid(target: Target, beside: float, track: Track[Any]) -> list[Kernel]:
    """Return the kernels of the built-in grid of shapes."""
    found: list[Kernel] = []
    tasks: list[Any] = [*grid.convolutions(), *grid.products()]
    for task in track(tasks, len(tasks), "shapes"):
        if isinstance(task, grid.Product):
            found += _measure_task(task, target, beside, alone=True, forms=(WEIGHTS, INTEGERS, DYNAMIC))
        else:
            found += _measure_task(task, target, beside)
    for task in track(grid.shared(), len(grid.shared()), "shared"):
        found += _measure_task(task, target, beside, forms=(DYNAMIC,))
    signed = replace(target, activation_dtype="int8")
    for task in track(grid.signed(), len(grid.signed()), "signed"):
        found += _measure_task(task, signed, beside, forms=(INTEGERS,))
    models = list(grid.between())
    for _, model in track(models, len(models), "between"):
        found += _grid_kernels([model], beside)
    return found


def _measure_task(
    task: grid.Convolution | grid.Product,
    target: Target,
    beside: float,
    *,
    alone: bool = False,
    forms: Sequence[str] = (WEIGHTS, INTEGERS),
) -> Iterable[Kernel]:
    """Time one shape with its weights in integers and all in integers; in float as well where that differs."""
    model = task.model()
    Canonicalize(target.opset)(model)
    samples = [runtime.synthetic_feeds(model, 0)]
    wishes = {structure.node_name(node): Wish(Precision.INTEGER, "") for node in model.graph}
    variants = [model] if alone else []
    for form in forms:
        integers = form != WEIGHTS
        variant = quantized(model, target, samples, integers, wishes if integers else None, form == DYNAMIC)
        variants.append(legalize(variant))
    return _grid_kernels(variants, beside)


def _grid_kernels(models: Sequence[ir.Model], beside: float) -> Iterable[Kernel]:
    for (run,) in timed(models, [runtime.synthetic_feeds(models[0], 0)], beside, GRID_BUDGET):
        yield from run.kernels


def measure(target: Target, subjects: Sequence[Subject], processor: str, track: Track[Any]) -> CostTable:
    """Measure a whole cost table here: the capabilities, the grid, and the models' own kernels.

    Parameters
    ----------
    target : Target
    subjects : sequence of Subject
    processor : str
        What the table is to say of this machine.
    track : callable
        Shows progress.
    """
    wanted = capabilities.patterns()
    rows = [row for pattern in track(wanted, len(wanted), "patterns") for row in capabilities.measure([pattern])]
    seen = target.with_costs(untimed(rows, processor))
    beside = time_beside_kernels()
    kernels = measure_grid(seen, beside, track)
    for subject in track(subjects, len(subjects), "models"):
        for runs in measure_model(subject, seen, beside).values():
            kernels += [kernel for run in runs for kernel in run.kernels]
    return CostTable.measured(runtime.name(), processor, beside, kernels, rows)


def untimed(rows: Iterable[Capability], processor: str) -> CostTable:
    """Return a table that has capabilities alone, as emulation can tell them: it prices nothing."""
    return CostTable(runtime.name(), processor, 0.0, capabilities=tuple(rows))


def _silent(items: Iterable[Any], total: int, what: str) -> Iterable[Any]:
    return items
