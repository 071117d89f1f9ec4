"""Compile a CNN with one scale for the weights of each operator, with and without smoothing: docs/equalization.md.

    python benchmarks/equalization.py [--cache DIR]

Needs the extra `models` for what is not in the cache yet. Everything that can be integers is (no cost table), for the
target `cpu` but for the granularity of its weights.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import onnx_ir as ir
from catalog import ROOT, fetch
from smoothing import groups_of

from qcompile import driver
from qcompile.backends.base import find_target
from qcompile.calib.data import input_specs, open_data
from qcompile.calib.output_error import OutputError
from qcompile.calib.sections import at_scores
from qcompile.core import model as models
from qcompile.core import numerics, runtime
from qcompile.core.plan import How, QuantPlan
from qcompile.decision import calibrate, decide
from qcompile.equivalence import rewrite
from qcompile.job import Job
from qcompile.options import NO_COSTS, Options
from qcompile.passes.canonicalize import Canonicalize
from qcompile.pipeline import untracked

PAGE = ROOT / "docs/equalization.md"
#: One whose convolutions have Relu between them, and one with depthwise convolutions between Clips.
EQUALIZED, REFUSED = "open-nsfw", "efficientnet-lite0"
HEAD = """# Weights with one scale

Written by `python benchmarks/equalization.py`; do not edit. Where a target has one scale for all weights of an
operator, the noise of what writes a channel counts as well, and the factors of cross-layer equalization (Nagel et al.
2019) are tried beside those of activations ([smoothing.md](smoothing.md)). SQNR in front of a last Softmax, over all
evaluation samples; everything that can be integers is, with minmax ranges.

| model | a scale per channel, dB | one scale, dB | one scale, smoothed, dB | of the gap | folded | left alone |
|---|---|---|---|---|---|---|
"""
REFUSALS = """
## What does not fold in {name}

| where | why |
|---|---|
"""


def compiled(paths: Sequence[Path], per_channel: bool, smoothing: str) -> tuple[ir.Model, ir.Model, QuantPlan]:
    """Return the canonical model, the quantized one and the plan."""
    options = Options("cpu", data=str(paths[1]), eval=str(paths[2]), observer="minmax",
                      smoothing=smoothing, rotation="none", costs=NO_COSTS)  # type: ignore[arg-type]  # fmt: skip
    job = Job.begin(paths[0], options, untracked)
    job = replace(job, target=replace(job.target, per_channel=per_channel))
    canonical = driver.canonicalize(job)
    smoothed, chosen = rewrite(job, canonical)
    calibration = chosen.noted(calibrate(job, smoothed, chosen.kept(smoothed)))
    plan = decide(smoothed, calibration, job.target, job.backend, options)
    return canonical, driver.quantize(job, smoothed, plan), plan


def sqnr(model: ir.Model, quantized: ir.Model, data: Path) -> float:
    """Return the SQNR of a quantized model's scores in dB: the mean over samples."""
    before, after = (runtime.Session(at_scores(each), integer_kernels=False) for each in (model, quantized))
    error = OutputError()
    for feeds in open_data(str(data), input_specs(model)):
        found = list(after.run(feeds).values())
        expected = before.run(feeds)
        error.add(expected, dict(zip(expected, found, strict=True)))
    return numerics.decibel(1.0, error.value)


def row(name: str, paths: Sequence[Path]) -> str:
    """Compile one model in three ways; return its row of the table."""
    found = []
    for per_channel, smoothing in ((True, "none"), (False, "none"), (False, "auto")):
        canonical, quantized, plan = compiled(paths, per_channel, smoothing)
        found.append(sqnr(canonical, quantized, paths[2]))
        print(name, per_channel, smoothing, f"{found[-1]:.2f}", flush=True)
    every, one, smoothed = found
    hows = Counter(chosen.how for chosen in plan.smoothing.values())
    gap = f"{(smoothed - one) / (every - one):.0%}"
    cells = [name, *(f"{number:.1f}" for number in found), gap, str(hows[How.FOLD]), str(hows[How.NONE])]
    return f"| {' | '.join(cells)} |\n"


def refusals(name: str, path: Path) -> str:
    """Return why nothing folds where it does not, each with the node that is in the way."""
    model = models.load(path)
    Canonicalize(find_target("cpu")[0].opset, widen=True)(model)
    rows = [f"| {refusal.node} | {refusal.reason} |" for refusal in groups_of(model.graph)[1]]
    return REFUSALS.format(name=name) + "\n".join(rows) + "\n"


def main() -> None:
    """Measure and write the page."""
    parser = argparse.ArgumentParser(description="Compile with one scale for weights; write docs/equalization.md.")
    parser.add_argument("--cache", type=Path, help="folder of the fetched models")
    options = parser.parse_args()
    table = row(EQUALIZED, fetch(EQUALIZED, options.cache))
    PAGE.write_text(HEAD + table + refusals(REFUSED, fetch(REFUSED, options.cache)[0]), encoding="utf-8")


if __name__ == "__main__":
    main()
