"""Hold weights of four bits, rounded with regard to one another, against nearest; write docs/rounding-figures.md.

    python benchmarks/rounding.py [NAME ...] [--cache DIR] --measured DIR

Needs the extra `models` for what is not in the cache yet. `--measured` keeps calibrations, by model, as for
`allocation.py`.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from bit_choices import SAMPLES, Subject
from catalog import ROOT, fetch

from qcompile import Options, compensation, stages
from qcompile.calib.rounding import round_weights, second_moments
from qcompile.core.numerics import IntArray
from qcompile.passes.insert_qdq import InsertQdq, quantized_name
from qcompile.passes.round_weights import roundable
from qcompile.pipeline import untracked
from qcompile.weight_losses import FOUR

PAGE = ROOT / "docs/rounding-figures.md"
NAMES = ("minilm-l6", "efficientnet-lite0")


def rounded(subject: Subject) -> tuple[dict[str, IntArray], float]:
    """Return the codes of all weights in four bits that can be chosen, and how many seconds of processors that took."""
    plan = subject.program.planned(dict.fromkeys(subject.program.numbers, FOUR))
    quantized = InsertQdq(plan)(subject.canonical.clone()).model
    operators, _ = roundable(subject.canonical, quantized, plan)
    packed = {quantized_name(name) for name in subject.program.numbers}
    names = {operator: name for name, operator in operators.items() if name in packed}
    start = time.process_time()
    moments = second_moments(subject.canonical, list(names), subject.parts[0], untracked)
    codes = {names[operator]: round_weights(operator, found) for operator, found in moments}
    return codes, time.process_time() - start


def weights_only(subject: Subject) -> str:
    """Return a model's row of the table of weights alone."""
    codes, seconds = rounded(subject)
    bits = {name: FOUR for name in subject.program.numbers if quantized_name(name) in codes}
    cells = [f"{number:.1f}" for number in _gains(subject.in_codes(bits, {}), subject.in_codes(bits, codes))]
    return f"| {subject.name} | {len(bits)} | {' | '.join(cells)} | {seconds:.0f} |"


def _gains(nearest: Sequence[float], found: Sequence[float]) -> list[float]:
    """Return for each kind of sample the SQNR with codes at nearest and with those found, and the difference."""
    return [number for one, other in zip(nearest, found, strict=True) for number in (one, other, other - one)]


def applied(subject: Subject, paths: Sequence[Path], nearest: bool) -> Mapping[str, Any]:
    """Compile with all weights in four bits, from the calibration on, and return the report."""
    model, data, evaluation = map(str, paths)
    found = (lambda *_: ({}, ())) if nearest else roundable
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(compensation, "roundable", found):
        options = Options("cpu", data=data, eval=evaluation, weights="4", output=Path(folder) / "out")
        plan = Path(folder) / "plan.json"
        stages.plan(model, options, subject.folder / f"{subject.name}.npz", plan)
        return stages.apply(model, options, plan).report


def whole(subject: Subject, paths: Sequence[Path]) -> str:
    """Return a model's row of the table of whole compiles."""
    reports = [applied(subject, paths, nearest) for nearest in (True, False)]
    least = [min(one["sqnr"] for one in report["fidelity"]["outputs"].values()) for report in reports]
    sizes = [f"{report['size']['ratio']:.3f}x" for report in reports]
    figures = [f"{least[0]:.1f}", f"{least[1]:.1f}", f"{least[1] - least[0]:+.1f}", *sizes]
    return f"| {subject.name} | {' | '.join(figures)} |"


HEAD = """# Four bits, rounded with regard to one another and to nearest

Written by `python benchmarks/rounding.py`; do not edit. [rounding.md](rounding.md) says what is done.

SQNR in dB. Both have the same scheme, packed codes with a scale per channel ([allocation.md](allocation.md)), and the
same bytes: they differ in codes and in multiples of blocks. *Nearest* has the multiples of least squared error.

## Weights alone

Of Conv, Gemm and MatMul, all that can be packed; everything else in float. Codes are found by three quarters of the
calibration data; *held out* is the rest of these, *evaluation* is data that calibration did not see, at most {samples}
samples each, in front of a last Softmax, the noise of several outputs added up. *Seconds* are those of processors, for
weighing inputs and rounding, all threads added up.

| model | weights | nearest, held out | rounded | gain | nearest, evaluation | rounded | gain | seconds |
|---|---|---|---|---|---|---|---|---|
{alone}

## Whole compiles

`--weights 4`, from the calibration on: activations in eight bits and tables of embeddings in four, which add noise of
their own to both, and biases corrected, which makes up for a part of what rounding to nearest loses. *Rounded* is what
a compile does by itself. All evaluation samples, the worst of several outputs.

| model | nearest | rounded | gain | size, nearest | rounded |
|---|---|---|---|---|---|
{whole}
"""


def main() -> None:
    """Measure what was asked for, all by default, and write the page."""
    parser = argparse.ArgumentParser(description="Compare rounding to nearest; write docs/rounding-figures.md.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"models, by default {', '.join(NAMES)}")
    parser.add_argument("--cache", type=Path, help="where models and data are kept")
    parser.add_argument("--measured", type=Path, required=True, help="where calibrations are kept")
    words = parser.parse_args()
    words.measured.mkdir(parents=True, exist_ok=True)
    alone, compiles = [], []
    for name in words.names or NAMES:
        paths = fetch(name, words.cache)
        subject = Subject.load(name, paths, words.measured)
        alone.append(weights_only(subject))
        print(alone[-1], flush=True)
        compiles.append(whole(subject, paths))
        print(compiles[-1], flush=True)
        text = HEAD.format(samples=SAMPLES, alone="\n".join(alone), whole="\n".join(compiles))
        PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
