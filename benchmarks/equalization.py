"""Quantize a CNN with one scale for the weights of each operator, smoothed and not: docs/equalization.md.

    python benchmarks/equalization.py [--cache DIR]

Needs the extra `models` for what is not in the cache yet. Everything that can be integers is (no cost table), for the
target `cpu` but for the granularity of its weights.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
from catalog import ROOT, fetch
from smoothing import groups_of

from qcompile import driver
from qcompile.backends.base import find_target
from qcompile.calib.collect import collect
from qcompile.calib.data import input_specs, open_data
from qcompile.calib.observers import Observer
from qcompile.calib.output_error import OutputError
from qcompile.calib.sections import at_scores
from qcompile.core import model as models
from qcompile.core import numerics, runtime
from qcompile.core.plan import How
from qcompile.decision import choose_operators
from qcompile.equivalence import rewrite
from qcompile.job import Job
from qcompile.options import NO_COSTS, Options
from qcompile.passes.allocate_bits import allocate_bits
from qcompile.passes.canonicalize import Canonicalize
from qcompile.passes.insert_qdq import InsertQdq
from qcompile.passes.structure import is_linear, name_of
from qcompile.pipeline import untracked

PAGE = ROOT / "docs/equalization.md"
#: One whose convolutions have Relu between them, and one with depthwise convolutions between Clips.
EQUALIZED, REFUSED = "open-nsfw", "efficientnet-lite0"
#: What turns a value into codes and back.
CODES = ("QuantizeLinear", "DequantizeLinear")
HEAD = """# Weights with one scale

Written by `python benchmarks/equalization.py`; do not edit. Where a target has one scale for all weights of an
operator, the noise of what writes a channel counts as well, and the factors of cross-layer equalization (Nagel et al.
2019) are tried beside those of activations ([smoothing.md](smoothing.md)), and then factors that are chosen for all
groups together. SQNR over all evaluation samples, everything that can be integers in integers, minmax ranges, weights
to nearest and no bias corrected. Outputs: in front of a last Softmax. Features: what the last product reads, each
channel times its factor. An output of two numbers is a matter of how the roundings of all operators happen to add up,
so it is features that tell what factors do.

| model | at | a scale per channel, dB | one scale, dB | one scale, smoothed, dB | of the gap | folded | left alone |
|---|---|---|---|---|---|---|---|
"""
REFUSALS = """
## What does not fold in {name}

| where | why |
|---|---|
"""


@dataclass(frozen=True)
class Quantized:
    """A model before and behind smoothing, with everything in codes, and how many groups fold or are left alone."""

    canonical: ir.Model
    smoothed: ir.Model
    quantized: ir.Model
    hows: Counter[How]


def quantized(paths: Sequence[Path], per_channel: bool, smoothing: str) -> Quantized:
    """Quantize with a scale for each channel of weights or one, to nearest, with minmax ranges."""
    options = Options("cpu", data=str(paths[1]), eval=str(paths[2]), observer="minmax",
                      smoothing=smoothing, rotation="none", costs=NO_COSTS)  # type: ignore[arg-type]  # fmt: skip
    job = Job.begin(paths[0], options, untracked)
    job = replace(job, target=replace(job.target, per_channel=per_channel))
    canonical = driver.canonicalize(job)
    smoothed, chosen = rewrite(job, canonical)
    placement = choose_operators(smoothed, job.target, options, True, {})
    statistics = collect(smoothed, placement.activations, job.evidence.calibration, untracked)
    observers = dict.fromkeys(placement.activations, Observer.MINMAX)
    copy = smoothed.clone()
    InsertQdq(allocate_bits(smoothed, placement, statistics, job.target, observers))(copy)
    return Quantized(canonical, smoothed, copy, Counter(one.how for one in chosen.smoothing.values()))


def sqnr(model: ir.Model, quantized: ir.Model, data: Path) -> float:
    """Return the SQNR of a quantized model's scores in dB: the mean over samples."""
    before, after = (runtime.Session(at_scores(each), integer_kernels=False) for each in (model, quantized))
    error = OutputError()
    for feeds in open_data(str(data), input_specs(model)):
        found = list(after.run(feeds).values())
        expected = before.run(feeds)
        error.add(expected, dict(zip(expected, found, strict=True)))
    return numerics.decibel(1.0, error.value)


def last_input(model: ir.Model) -> str:
    """Return the name of what the last product reads, before it is codes."""
    value = [node for node in model.graph if is_linear(node)][-1].inputs[0]
    while value is not None and (source := value.producer()) is not None and source.op_type in CODES:
        value = source.inputs[0]
    assert value is not None
    return name_of(value)


def features(one: Quantized, data: Path) -> float:
    """Return the SQNR in dB of what the last product reads, each channel times its factor: the mean over samples."""
    models_of = (one.canonical, one.smoothed, one.quantized)
    names = [last_input(model) for model in models_of]
    sessions = [
        runtime.Session(runtime.with_outputs(model, [name]), integer_kernels=False)
        for model, name in zip(models_of, names, strict=True)
    ]
    runs = [[session.run(feeds)[name] for session, name in zip(sessions, names, strict=True)]
            for feeds in open_data(str(data), input_specs(one.canonical))]  # fmt: skip
    # Powers of two by eighths; a channel that is zero throughout has none.
    before, behind = (sum(np.abs(run[at]).astype(np.float64) for run in runs) for at in (0, 1))
    alive = (before > 0) & (behind > 0)
    log2 = np.log2(np.where(alive, before, 1.0) / np.where(alive, behind, 1.0))
    factors, error = np.exp2(np.rint(8 * log2) / 8), OutputError()
    for exact, _, found in runs:
        error.add({"features": exact}, {"features": found * factors})
    return numerics.decibel(1.0, error.value)


def rows(name: str, paths: Sequence[Path]) -> str:
    """Quantize one model in three ways; return its rows of the table."""
    found = []
    for per_channel, smoothing in ((True, "none"), (False, "none"), (False, "auto")):
        one = quantized(paths, per_channel, smoothing)
        found.append((features(one, paths[2]), sqnr(one.canonical, one.quantized, paths[2])))
        print(name, per_channel, smoothing, *(f"{number:.2f}" for number in found[-1]), flush=True)
    table = ""
    for at, numbers in zip(("features", "outputs"), zip(*found, strict=True), strict=True):
        gap = f"{(numbers[2] - numbers[1]) / (numbers[0] - numbers[1]):.0%}"
        cells = [
            name,
            at,
            *(f"{number:.1f}" for number in numbers),
            gap,
            str(one.hows[How.FOLD]),
            str(one.hows[How.NONE]),
        ]
        table += f"| {' | '.join(cells)} |\n"
    return table


def refusals(name: str, path: Path) -> str:
    """Return why nothing folds where it does not, each with the node that is in the way."""
    model = models.load(path)
    Canonicalize(find_target("cpu")[0].opset, widen=True)(model)
    rows = [f"| {refusal.node} | {refusal.reason} |" for refusal in groups_of(model.graph)[1]]
    return REFUSALS.format(name=name) + "\n".join(rows) + "\n"


def main() -> None:
    """Measure and write the page."""
    parser = argparse.ArgumentParser(description="Quantize with one scale for weights; write docs/equalization.md.")
    parser.add_argument("--cache", type=Path, help="folder of the fetched models")
    options = parser.parse_args()
    table = rows(EQUALIZED, fetch(EQUALIZED, options.cache))
    PAGE.write_text(HEAD + table + refusals(REFUSED, fetch(REFUSED, options.cache)[0]), encoding="utf-8")


if __name__ == "__main__":
    main()
