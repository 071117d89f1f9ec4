"""Hold what losses predict, alone and with pairs, against what choices of bits measure; write docs/pairs.md.

    python benchmarks/pairs.py [NAME ...] [--cache DIR] --measured DIR

`--measured` is that of `allocation.py`; it also keeps pairs and what came of choices, by model, so that a model that
was measured before is only written down again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import scipy.stats
from allocation import NAMES, Judge
from bit_choices import SAMPLES, Bits, Subject
from catalog import ROOT, fetch

from qcompile.calib.trials import SPREAD
from qcompile.core import numerics
from qcompile.weight_losses import EIGHT, FOUR, in_four, measure_pairs, tempered

PAGE = ROOT / "docs/pairs.md"
#: With how many that follow it each weight is measured.
WINDOW = 2
#: Budgets, as parts of the way from all weights in four bits to all in eight.
PARTS = (0.06, 0.12, 0.25, 0.45, 0.7)
#: Choices that are predicted to differ by more than this, in dB, are told apart.
APART = 1.0
#: Runs of an artifact where its noise is averaged over what widening its scales by up to `SPREAD` makes of it.
REPEATS = 8
HEAD = """# What losses predict, alone and in pairs

Written by `python benchmarks/pairs.py`; do not edit. [allocation.md](allocation.md#pairs) says what pairs are. Each
weight was measured with the {window} that follow it (`--pairs {window}`). Samples, codes and dB are those of
[allocation-figures.md](allocation-figures.md): at most {samples} samples held out of the calibration data, and as many
of evaluation data.

## Random choices

Spearman's coefficient between predicted and measured noise of 20 random choices of four and eight bits, no two alike
(16 of a model with four weights). What is predicted is what weights lose, so that is measured first: weights of four
bits in codes and all else in float. *Itself* is the coefficient between both kinds of samples, both measured: no
prediction knows more of one than the other does.

| model | held out | with pairs | evaluation | with pairs | itself |
|---|---|---|---|---|---|
{weights}

Of artifacts, with everything quantized and all of the runtime's optimizations: the mean over samples of each one's
SQNR, its noise averaged over {repeats} runs, all but the first with the scales of activations wider by up to
{spread:.0%}: the yardstick of [observers.md](observers.md).

| model | held out | with pairs | evaluation | with pairs | itself |
|---|---|---|---|---|---|
{sampled}

The same artifacts run once, as a ratio of sums, in which the samples that lose most decide
([why that tells less](allocation.md#predicted-and-measured)). *Apart*: of two choices
that are predicted to differ by more than {apart:g} dB, how often artifacts come in that order on samples held out.

| model | held out | with pairs | evaluation | with pairs | itself | apart |
|---|---|---|---|---|---|---|
{artifacts}

By how much the noise of weights is mispredicted, in dB on held-out samples: root of the mean square, over the same
choices.

| model | alone | with pairs |
|---|---|---|
{errors}

## What they change

The program's choice with pairs over that without, where they differ, artifacts, in dB: as predicted with pairs, on
samples held out, and on evaluation data; the least and the most over {sizes} sizes. A compile with `--pairs` runs both
and takes the better one on samples held out: *taken*, on evaluation data.

| model | others | predicted, least | most | held out, least | most | evaluation, least | most | taken, least | most |
|---|---|---|---|---|---|---|---|---|---|
{changes}
"""


@dataclass(frozen=True)
class Row:
    """One choice of bits: noise predicted, in dB, of the artifact and of weights alone, and what was measured.

    Both kinds of samples: held out and evaluation.
    """

    predicted: float
    paired: float
    weights_predicted: float
    weights_paired: float
    artifact: tuple[float, float]
    weights: tuple[float, float]


class Predictor:
    """What is predicted of one model's choices."""

    def __init__(self, subject: Subject) -> None:
        self.subject, self.judge = subject, Judge(subject)
        program = subject.program
        more = {name: max(0.0, of[FOUR] - of[EIGHT]) for name, of in program.losses.items()}
        self.paired = replace(program, pairs=tempered(more, self._pairs()), tried={})

    def _pairs(self) -> dict[tuple[str, str], float]:
        subject, file = self.subject, self.subject.folder / f"{self.subject.name}-pairs-{WINDOW}.json"
        if not file.exists():
            planned, losses, codes = subject.program.planned, subject.program.losses, subject.codes
            found = measure_pairs(subject.job, subject.canonical, planned, lambda: codes, losses, WINDOW)
            file.write_text(json.dumps([[*names, loss] for names, loss in found.items()]))
        return {(a, b): loss for a, b, loss in json.loads(file.read_text())}

    def row(self, bits: Bits) -> Row:
        """Measure one choice."""
        point = self.judge.point("", bits).measured
        four = in_four(bits)
        alone = sum(self.subject.program.losses[name][FOUR] for name in four)
        together = sum(loss for pair, loss in self.paired.pairs.items() if four.issuperset(pair))
        expected = self.subject.expected(bits)
        noises = (expected, expected + together, alone, alone + together)
        plain, paired, weights_plain, weights_paired = (
            numerics.decibel(1.0, noise) if noise > 0.0 else float("inf") for noise in noises
        )
        weights = self.subject.in_codes(bits, self.subject.codes[FOUR])
        return Row(plain, paired, weights_plain, weights_paired, (point.held_out, point.scores), weights)

    def changes(self) -> list[tuple[Row, Row] | None]:
        """Return what the program chooses without and with pairs, by size; None where that is the same."""
        program, found = replace(self.subject.program, tried={}), list[tuple[Row, Row] | None]()
        ends = [program.of(dict.fromkeys(program.numbers, bits)).bytes for bits in (FOUR, EIGHT)]
        for part in PARTS:
            budget = ends[0] + part * (ends[1] - ends[0])
            plain, paired = (of.proposals(budget)[0].bits for of in (program, self.paired))
            found.append(None if plain == paired else (self.row(plain), self.row(paired)))
        return found


def measured(name: str, cache: Path | None, folder: Path) -> Mapping[str, list[object]]:
    """Return the rows of random choices and of those that pairs change, from the folder where they are there."""
    file = folder / f"{name}-predicted-{WINDOW}.json"
    if not file.exists():
        predictor = Predictor(Subject.load(name, fetch(name, cache), folder))
        random = [asdict(predictor.row(bits)) for bits in predictor.judge.drawn()]
        changes = [of and [asdict(row) for row in of] for of in predictor.changes()]
        file.write_text(json.dumps({"random": random, "changes": changes}))
    found: Mapping[str, list[object]] = json.loads(file.read_text())
    return found


def by_sample(name: str, cache: Path | None, folder: Path) -> list[tuple[float, float]]:
    """Return what artifacts of the random choices have, sample by sample, from the folder where it is there."""
    file = folder / f"{name}-by-sample-{REPEATS}.json"
    if not file.exists():
        subject = Subject.load(name, fetch(name, cache), folder)
        file.write_text(json.dumps([subject.by_sample(bits, REPEATS) for bits in Judge(subject).drawn()]))
    return [(held_out, evaluation) for held_out, evaluation in json.loads(file.read_text())]


#: Predictions without and with pairs, of weights alone and of artifacts.
WEIGHTS, ARTIFACTS = ("weights_predicted", "weights_paired"), ("predicted", "paired")


def ranks(name: str, rows: Sequence[Row], measured: Sequence[tuple[float, float]], ways: Sequence[str]) -> str:
    """Return a model's row of Spearman's coefficients, of predictions and of what was measured itself."""

    def spearman(first: Sequence[float], second: Sequence[float]) -> str:
        return f"{float(scipy.stats.spearmanr(first, second).statistic):.2f}"

    seen = list(zip(*measured, strict=True))
    cells = [spearman([getattr(row, way) for row in rows], of) for of in seen for way in ways]
    cells.append(spearman(*seen))
    return f"| {name} | {' | '.join(cells)} |"


def apart(rows: Sequence[Row]) -> str:
    """Return how often artifacts come in the order that is predicted, of choices that are to differ by `APART`."""
    pairs = [(a, b) for a, b in itertools.combinations(rows, 2) if abs(a.predicted - b.predicted) > APART]
    right = sum((a.predicted - b.predicted) * (a.artifact[0] - b.artifact[0]) > 0.0 for a, b in pairs)
    return f" {right / len(pairs):.0%} of {len(pairs)} |"


def errors(name: str, rows: Sequence[Row]) -> str:
    """Return a model's row of the second table."""
    finite = [row for row in rows if np.isfinite(row.weights_predicted)]
    wrong = [np.sqrt(np.mean([(getattr(row, way) - row.weights[0]) ** 2 for row in finite]))
             for way in ("weights_predicted", "weights_paired")]  # fmt: skip
    return f"| {name} | {wrong[0]:.2f} | {wrong[1]:.2f} |"


def changes(name: str, found: Sequence[tuple[Row, Row] | None]) -> str:
    """Return a model's row of the last table."""
    differ = [of for of in found if of is not None]
    if not differ:
        return f"| {name} | 0 of {len(found)} |{' |' * 8}"
    gains = [[other.paired - plain.paired for plain, other in differ]]
    gains += [[other.artifact[kind] - plain.artifact[kind] for plain, other in differ] for kind in (0, 1)]
    gains.append([gain if ahead > 0.0 else 0.0 for ahead, gain in zip(gains[1], gains[2], strict=True)])
    cells = [f"{end(of):+.1f}" for of in gains for end in (min, max)]
    return f"| {name} | {len(differ)} of {len(found)} | {' | '.join(cells)} |"


def read(entry: Mapping[str, object]) -> Row:
    """Read what `asdict` made of a row."""
    return Row(**entry)  # type: ignore[arg-type]


def main() -> None:
    """Measure what was asked for, all by default, and write the page."""
    parser = argparse.ArgumentParser(description="Hold predicted noise against measured; write docs/pairs.md.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"models, by default {', '.join(NAMES)}")
    parser.add_argument("--cache", type=Path, help="where models and data are kept")
    parser.add_argument("--measured", type=Path, required=True, help="where calibrations and codes are kept")
    words = parser.parse_args()
    words.measured.mkdir(parents=True, exist_ok=True)
    tables: list[list[str]] = [[], [], [], [], []]
    for name in words.names or NAMES:
        start = time.perf_counter()
        found = measured(name, words.cache, words.measured)
        random = [read(entry) for entry in found["random"]]  # type: ignore[arg-type]
        other = [(read(of[0]), read(of[1])) if of else None for of in found["changes"]]  # type: ignore[index]
        rows = (
            ranks(name, random, [row.weights for row in random], WEIGHTS),
            ranks(name, random, by_sample(name, words.cache, words.measured), ARTIFACTS),
            ranks(name, random, [row.artifact for row in random], ARTIFACTS) + apart(random),
        )
        for table, row in zip(tables, (*rows, errors(name, random), changes(name, other)), strict=True):
            table.append(row)
            print(row, flush=True)
        print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)
    weights, sampled, artifacts, wrong, changed = ("\n".join(table) for table in tables)
    told = {"weights": weights, "sampled": sampled, "artifacts": artifacts, "errors": wrong, "changes": changed}
    head = HEAD.format(
        window=WINDOW, samples=SAMPLES, repeats=REPEATS, spread=SPREAD, apart=APART, sizes=len(PARTS), **told
    )
    PAGE.write_text(head, encoding="utf-8")


if __name__ == "__main__":
    main()
