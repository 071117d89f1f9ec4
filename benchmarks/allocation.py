"""Hold bits that the integer program chose against other ways to choose them; write docs/allocation-figures.md.

    python benchmarks/allocation.py [NAME ...] [--cache DIR] [--measured DIR]

Needs the extra `models` for what is not in the cache yet. `--measured` keeps calibrations and rounded weights, by
model: made once, used again.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import scipy.stats
from bit_choices import SAMPLES, Bits, Measured, Subject
from catalog import ROOT, fetch

from qcompile.core import numerics
from qcompile.passes import structure
from qcompile.passes.greedy import greedy
from qcompile.passes.integer_program import allocate
from qcompile.weight_losses import EIGHT, FOUR

PAGE = ROOT / "docs/allocation-figures.md"
NAMES = ("resnet8", "ds-cnn", "efficientnet-lite0", "minilm-l6", "ppocr-rec")
#: Budgets, as parts of the way from all weights in four bits to all in eight.
PARTS = (0.0, 0.06, 0.12, 0.25, 0.45, 0.7, 1.0)
#: Random choices of bits.
RANDOM = 20
#: The part at which expected and measured noise are looked into.
CAUSES = 0.12
#: What the program is to gain over uniform settings, in dB.
GAIN = 2.0


@dataclass(frozen=True)
class Point:
    """One choice of bits."""

    way: str
    size: float
    expected: float
    measured: Measured


class Judge:
    """Measures choices of one model's bits, each once."""

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self.known: dict[tuple[int, ...], Measured] = {}

    def point(self, way: str, bits: Bits) -> Point:
        """Return what comes of a choice."""
        key = tuple(bits.values())
        if key not in self.known:
            self.known[key] = self.subject.measured(bits)
        size = self.subject.size + self.subject.bytes(bits) / self.subject.calibration.float_bytes
        return Point(way, size, numerics.decibel(1.0, self.subject.expected(bits)), self.known[key])

    def rivals(self, budget: float) -> list[Point]:
        """Return the choice of the program within so many bytes, and those of others.

        The first is the one among them that a compile takes: it runs them on samples that are held out.
        """
        subject = self.subject
        found = {"program": subject.bits(allocate(subject.candidates, (budget,)).choice)}
        steps = greedy(subject.candidates, (budget,))
        if steps is not None:
            found["greedy"] = subject.bits(steps.choice)
        found["in order"] = in_order(subject, budget)
        spared = ends_spared(subject)
        proposed = found | ({"ends spared": spared} if subject.bytes(spared) <= budget else {})
        points = [self.point(way, bits) for way, bits in proposed.items()]
        taken = max(points, key=lambda point: point.measured.held_out)
        return [replace(taken, way="taken"), *(point for point in points if point.way in found)]

    def random(self) -> list[Point]:
        """Return what comes of choices by chance."""
        return [self.point("random", bits) for bits in self.drawn()]

    def drawn(self) -> list[dict[str, int]]:
        """Return choices by chance, no two alike: each weight in four bits with a chance that is drawn first."""
        generator, count = np.random.default_rng(0), len(self.subject.program.numbers)
        drawn: dict[tuple[int, ...], None] = {}
        while len(drawn) < min(RANDOM, 2**count):
            chance = generator.uniform()
            drawn[tuple(map(int, generator.uniform(size=count) < chance))] = None
        return [self.subject.bits(choice) for choice in drawn]


def in_order(subject: Subject, budget: float) -> dict[str, int]:
    """Return as many weights in four bits, in the graph's order, as are needed."""
    nodes = (value for node in subject.canonical.graph for value in node.inputs if value is not None)
    order = [name for name in dict.fromkeys(map(structure.name_of, nodes)) if name in subject.program.numbers]
    bits = dict.fromkeys(subject.program.numbers, EIGHT)
    for name in order:
        if subject.bytes(bits) <= budget:
            break
        bits[name] = FOUR
    return bits


def ends_spared(subject: Subject) -> dict[str, int]:
    """Return all weights in four bits but the first and the last."""
    nodes = (value for node in subject.canonical.graph for value in node.inputs if value is not None)
    order = [name for name in dict.fromkeys(map(structure.name_of, nodes)) if name in subject.program.numbers]
    return {name: EIGHT if name in (order[0], order[-1]) else FOUR for name in subject.program.numbers}


def front(judge: Judge) -> tuple[str, list[list[Point]]]:
    """Return the table of one model, and what is in it, by size."""
    subject = judge.subject
    ends = [subject.bytes(dict.fromkeys(subject.program.numbers, bits)) for bits in (FOUR, EIGHT)]
    spared, rows = ends_spared(subject), []
    found = [judge.rivals(ends[0] + part * (ends[1] - ends[0])) for part in PARTS]
    found.append([*judge.rivals(subject.bytes(spared)), judge.point("ends spared", spared)])
    for points in sorted(found, key=lambda of: of[0].size):
        by_way = {point.way: point for point in points}
        best, rival = by_way["taken"], by_way.get("ends spared", by_way["in order"])
        name = {"ends spared": "all but first and last in 4"}.get(rival.way, "in order")
        own = [f"{number:.1f}" for number in (best.measured.held_out, best.measured.outputs)]
        ways = (by_way["program"], by_way.get("greedy"), rival)
        others = ["" if way is None else f"{way.measured.scores:.1f}" for way in ways]
        cells = [f"{best.size:.3f}x", f"{best.expected:.1f}", f"{best.measured.scores:.1f}", *own, *others]
        rows.append(f"| {' | '.join(cells)} | {name}, {rival.size:.3f}x |")
    return "\n".join(rows), found


def ranks(name: str, points: Sequence[Point]) -> str:
    """Return a model's row of Spearman's coefficients, of expected noise and that on both kinds of samples."""
    expected = [point.expected for point in points]
    measured = ([point.measured.held_out for point in points], [point.measured.scores for point in points])
    held_out, evaluation = (float(scipy.stats.spearmanr(expected, of).statistic) for of in measured)
    return f"| {name} | {held_out:.2f} | {evaluation:.2f} |"


def verdict(name: str, sizes: Sequence[Sequence[Point]]) -> str:
    """Return a model's row of the summary."""
    over: dict[str, list[float]] = {"program": [], "greedy": [], "uniform": []}
    for points in sizes:
        best = points[0]
        for rival in points[1:]:
            way = rival.way if rival.way in over else "uniform"
            over[way].append(best.measured.scores - rival.measured.scores)
    uniform, greedily, alone = over["uniform"], over["greedy"], over["program"]
    cells = [
        name,
        *(f"{gain:+.1f}" for gain in (min(uniform), max(uniform))),
        f"{sum(gain >= GAIN for gain in uniform)} of {len(uniform)}",
        *(f"{gain:+.1f}" for gain in (min(greedily), max(greedily), min(alone), max(alone))),
    ]
    return f"| {' | '.join(cells)} |"


def causes(subject: Subject) -> str:
    """Return a model's row of the table that tells where expected and measured noise part."""
    ends = [subject.bytes(dict.fromkeys(subject.program.numbers, bits)) for bits in (FOUR, EIGHT)]
    budget = ends[0] + CAUSES * (ends[1] - ends[0])
    bits = subject.bits(allocate(subject.candidates, (budget,)).choice)
    alone = sum(subject.program.losses[name][FOUR] for name, chosen in bits.items() if chosen == FOUR)
    numbers = [numerics.decibel(1.0, alone), *subject.in_codes(bits, subject.codes[FOUR]), *subject.in_codes(bits, {})]
    return f"| {subject.name} | {' | '.join(f'{number:.1f}' for number in numbers)} |"


def far(points: Sequence[Point]) -> str:
    """Say by how much what was measured differs from what was expected."""
    return "; ".join(
        f"{which} {min(of):+.1f} to {max(of):+.1f} dB"
        for which, of in (
            ("held out", [point.measured.held_out - point.expected for point in points]),
            ("evaluation", [point.measured.scores - point.expected for point in points]),
        )
    )


HEAD = """# Bits by the integer program, beside other ways to choose them

Written by `python benchmarks/allocation.py`; do not edit. [allocation.md](allocation.md) says what is done.

SQNR in dB in front of a last Softmax, which is where losses are measured: *expected* by losses that add up,
*held out* on the quarter of the calibration data that weights were not rounded by, *evaluation* on data that
calibration did not see, at most {samples} samples each. Noise over signal of several outputs is added up in these;
*outputs* is evaluation data behind the Softmax and the worst of several outputs, as in reports. All are of the QDQ
model in ONNX Runtime with all optimizations, weights rounded with regard to one another ([rounding.md](rounding.md)) by
three quarters of the calibration data, biases not corrected. A compile rounds by all of them, and corrects biases,
where that helps. Losses were measured once, of each weight alone.

- *program*: least expected loss in so many bytes. *greedy*: the same losses, step by step.
- *taken*: of these and the uniform ones that fit, the one that loses least on the samples held out, as in a compile,
  which runs them. What it is then worth is told by evaluation data, of which it knows nothing.
- *uniform*: all in 8 bits or all in 4; between, as many weights in the graph's order in 4 bits as are needed, and one
  more row with all but the first and the last in 4. Its file may be smaller than the budget, by less than a weight.

## Summary

What is taken over the uniform setting within the same budget, in dB on evaluation data: the least and the most over
all sizes, and at how many it is 2 dB or more; the same over greedy, and over the program's own choice.

| model | over uniform, least | most | 2 dB or more | over greedy, least | most | over the program, least | most |
|---|---|---|---|---|---|---|---|
{summary}

Spearman's coefficient between expected and measured noise of {random} random choices, no two alike (all 16 of a model
with four weights), on samples held out and on evaluation data; artifacts run once, as a ratio of sums
([pairs.md](pairs.md) has them sample by sample):

| model | held out | evaluation |
|---|---|---|
{ranks}

## Where expected and measured noise part

With the program's weights of four bits in codes and all else in float, at {part:.0%} of the way from the smallest file
to the largest: what single weights lose, added up; what they lose together on the same samples; the same on evaluation
data; and both with weights rounded to nearest.

| model | added up | together, held out | evaluation | nearest, held out | evaluation |
|---|---|---|---|---|---|
{causes}

Added up against together is what the program neglects: errors that meet. Held out against evaluation is what the
calibration data do not tell. Rounding with regard to one another fits weights to the samples, and samples that are held
out are honest about that only where they are other ones: the crops that EfficientNet-Lite0 is calibrated on, held out
or not, are of the same six photographs. Rounding to nearest fits nothing, and loses the same on both.

With all weights in eight bits less is lost than expected: the program starts from the noise before weights are rounded
with regard to one another.

## Model by model
"""
TABLE = """
### {name}

{weights} weights with a choice. Measured over expected: {far}.

| size | taken, expected | evaluation | held out | outputs | program | greedy | uniform | |
|---|---|---|---|---|---|---|---|---|
{rows}
"""


def main() -> None:
    """Measure what was asked for, all by default, and write the page."""
    parser = argparse.ArgumentParser(description="Compare ways to choose bits; write docs/allocation-figures.md.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"models, by default {', '.join(NAMES)}")
    parser.add_argument("--cache", type=Path, help="where models and data are kept")
    parser.add_argument("--measured", type=Path, required=True, help="where calibrations and codes are kept")
    words = parser.parse_args()
    words.measured.mkdir(parents=True, exist_ok=True)
    summary, spearman, reasons, tables = [], [], [], []
    for name in words.names or NAMES:
        start = time.perf_counter()
        judge = Judge(Subject.load(name, fetch(name, words.cache), words.measured))
        table, sizes = front(judge)
        chance = judge.random()
        summary.append(verdict(name, sizes))
        spearman.append(ranks(name, chance))
        reasons.append(causes(judge.subject))
        count, points = len(judge.subject.program.numbers), [*(point for of in sizes for point in of), *chance]
        tables.append(TABLE.format(name=name, weights=count, far=far(points), rows=table))
        print(tables[-1], summary[-1], spearman[-1], reasons[-1], f"{time.perf_counter() - start:.0f} s", flush=True)
    head = HEAD.format(
        samples=SAMPLES,
        random=RANDOM,
        summary="\n".join(summary),
        ranks="\n".join(spearman),
        causes="\n".join(reasons),
        part=CAUSES,
    )
    PAGE.write_text(head + "".join(tables), encoding="utf-8")


if __name__ == "__main__":
    main()
