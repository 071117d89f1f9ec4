"""Reckon what measuring sensitivity takes; write docs/sensitivity.md.

    python benchmarks/sensitivity.py [NAME ...] [--cache DIR] --measured DIR

`--measured` is that of `allocation.py`: calibrations. Work is counted, not timed, so that the page is the same wherever
it is written; only what a session takes beside its runs is timed, as a ratio of processor time.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import scipy.stats
from allocation import NAMES
from bit_choices import Subject
from catalog import ROOT, fetch

from qcompile.calib.observers import Observer
from qcompile.calib.rounding import second_moments
from qcompile.calib.sections import at_scores, typed
from qcompile.calib.sensitivity import ALONE, SAMPLES, TRIED
from qcompile.calib.trials import Trials, distinct, quantizations
from qcompile.calib.work import Cost
from qcompile.core import numerics, runtime
from qcompile.passes import structure
from qcompile.passes.insert_qdq import InsertQdq, quantized_name
from qcompile.passes.integer_program import allocate
from qcompile.passes.round_weights import roundable
from qcompile.weight_losses import EIGHT, FOUR

PAGE = ROOT / "docs/sensitivity.md"
TIMED = 5
#: The budget that proxies choose for, as a part of the way from all weights in four bits to all in eight.
PART = 0.25
HEAD = """# What measuring sensitivity takes

Written by `python benchmarks/sensitivity.py`; do not edit. Runs of a whole model, or their equivalent in
multiply-accumulates, for each sample.

## Activations

Each tensor is tried alone with each of its distinct ranges. *Whole*: were the model run from its input each time.
*Parts*: what is done, the part in front of a tensor once and the part behind it once for each range. *Samples* is how
many {alone:.0e} multiply-accumulates allow of each half, {tried} at most.

| model | tensors | ranges | whole | parts | parts over whole | samples |
|---|---|---|---|---|---|---|
{activations}

## Weights

Each weight with a choice is run alone with {widths} widths. *Behind*: were the part in front of each weight kept from
one weight to the next, for every sample. *Session*: what making one takes, in runs of a sample, by processor time: it
is made for each weight and width, and the part of it that is behind a weight would be as well.

| model | weights | runs | behind | over runs | samples | session |
|---|---|---|---|---|---|---|
{weights}

## Proxies

What the error of a weight makes of its own operator's result, in place of what the model makes of it: *own* is its
noise over its own signal, *Gram* tr(EᵀGE) over tr(WᵀGW), with the second moments G of what it is multiplied by, which
rounding has. Spearman's coefficient between each and the losses that are measured, in four bits; and what the program's
choice by each is expected to have, in dB, by the losses that are measured, at {part:.0%} of the way from the smallest
file to the largest.

| model | weights | own | Gram | chosen by own | by Gram | by losses |
|---|---|---|---|---|---|---|
{proxies}
"""


def activations(subject: Subject) -> str:
    """Return a model's row of the first table."""
    first = next(iter(subject.job.evidence.calibration))
    model, calibration = typed(at_scores(subject.canonical), first), subject.calibration
    dtype, dynamic = subject.job.target.activation_dtype, calibration.choice.dynamic
    candidates = {name: quantizations(seen, tuple(Observer), dtype, name in dynamic)
                  for name, seen in calibration.statistics.histograms.items()}  # fmt: skip
    trials = Trials(model, model, list(candidates), dtype, {}, first, dynamic)
    ranges = sum(len(distinct(found)) for found in candidates.values())
    parts = trials.work_alone(candidates)
    samples = min(TRIED, max(1, int(ALONE / parts / 2)))
    whole = ranges * trials.work
    return (f"| {subject.name} | {len(candidates)} | {ranges} | {ranges} | {parts / trials.work:.0f} "
            f"| {parts / whole:.2f} | {samples} |")  # fmt: skip


def weights(subject: Subject) -> str:
    """Return a model's row of the second table."""
    first = next(iter(subject.job.evidence.calibration))
    model = typed(at_scores(subject.canonical), first)
    cost, names = Cost.of(model, first), subject.program.numbers
    before = np.concatenate([[0], np.cumsum(cost.work)])
    cuts = {structure.name_of(value): at for at, node in reversed(list(enumerate(model.graph)))
            for value in node.inputs if value is not None}  # fmt: skip
    widths = (EIGHT, FOUR)
    runs = len(names) * len(widths)
    # Each part in front is continued from the one before it: once through the model, for all weights.
    behind = 1.0 + sum(len(widths) * (cost.total - before[cuts[name]]) for name in names) / cost.total
    samples = min(SAMPLES, max(1, int(ALONE / cost.total / len(names))))
    return (f"| {subject.name} | {len(names)} | {runs} | {behind:.0f} | {behind / runs:.2f} | {samples} "
            f"| {session(model, first):.0f} |")  # fmt: skip


def proxies(subject: Subject) -> str:
    """Return a model's row of the last table."""
    names = list(subject.program.numbers)
    plan = subject.program.planned(dict.fromkeys(names, FOUR))
    operators, _ = roundable(subject.canonical, InsertQdq(plan)(subject.canonical.clone()).model, plan)
    wanted = {operators[quantized_name(name)]: name for name in names if quantized_name(name) in operators}
    data, own, gram = subject.job.evidence.fitted(subject.parts[0]), dict[str, float](), dict[str, float]()
    for operator, moments in second_moments(subject.canonical, list(wanted), data, subject.job.track):
        name = wanted[operator]
        weight = structure.constant(subject.canonical.graph.initializers[name])
        assert weight is not None
        stored = np.float64(plan.tensors[name].dequantize(subject.codes[FOUR][quantized_name(name)]))
        whole, error = (
            operator.matrix(array)
            for array in (np.asarray(weight, np.float64), np.asarray(weight, np.float64) - stored)
        )
        own[name] = float((error**2).sum() / (whole**2).sum())
        made, lost = (float(np.einsum("gij,gik,gkj->", of, moments.matrices, of)) for of in (whole, error))
        gram[name] = lost / made
    lost_by = {name: subject.program.losses[name][FOUR] for name in gram}
    ranks = [float(scipy.stats.spearmanr(list(of.values()), list(lost_by.values())).statistic) for of in (own, gram)]
    chosen = [_expected(subject, of) for of in (own, gram, lost_by)]
    cells = [*(f"{rank:.2f}" for rank in ranks), *(f"{noise:.1f}" for noise in chosen)]
    return f"| {subject.name} | {len(gram)} | {' | '.join(cells)} |"


def _expected(subject: Subject, losses: Mapping[str, float]) -> float:
    """Return what a choice by some losses is expected to have by those that were measured."""
    plain = [of if name in losses else of[:1] for name, of in
             zip(subject.program.numbers, subject.candidates, strict=True)]  # fmt: skip
    ends = [sum(end(one.costs[0] for one in of) for of in plain) for end in (min, max)]
    tensors = [[replace(one, loss=losses.get(name, 0.0) * (one is not of[0])) for one in of]
               for name, of in zip(subject.program.numbers, plain, strict=True)]  # fmt: skip
    choice = allocate(tensors, (ends[0] + PART * (ends[1] - ends[0]),)).choice
    return numerics.decibel(1.0, subject.expected(subject.bits(choice)))


def session(model: ir.Model, feeds: runtime.Feeds) -> float:
    """Return what making a session takes, in runs of a sample."""
    made, ran = [], []
    for _ in range(TIMED):
        start = time.process_time()
        one = runtime.Session(model)
        middle = time.process_time()
        for _ in range(TIMED):
            one.run(feeds)
        made.append(middle - start)
        ran.append((time.process_time() - middle) / TIMED)
    return statistics.median(made) / statistics.median(ran)


def main() -> None:
    """Reckon for what was asked for, all by default, and write the page."""
    parser = argparse.ArgumentParser(description="Reckon what sensitivity takes; write docs/sensitivity.md.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"models, by default {', '.join(NAMES)}")
    parser.add_argument("--cache", type=Path, help="where models and data are kept")
    parser.add_argument("--measured", type=Path, required=True, help="where calibrations are kept")
    words = parser.parse_args()
    rows: list[list[str]] = [[], [], []]
    for name in words.names or NAMES:
        subject = Subject.load(name, fetch(name, words.cache), words.measured)
        for table, row in zip(rows, (activations(subject), weights(subject), proxies(subject)), strict=True):
            table.append(row)
            print(row, flush=True)
    tables = ("\n".join(of) for of in rows)
    page = HEAD.format(alone=ALONE, tried=TRIED, widths=2, part=PART,
                       **dict(zip(("activations", "weights", "proxies"), tables, strict=True)))  # fmt: skip
    PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
