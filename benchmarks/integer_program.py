"""Time the integer program on made-up models of many sizes; write docs/integer-program.md.

    python benchmarks/integer_program.py [--seconds 10]

Tensors of 10^3 to 10^6.5 weights with widths from 2 to 16 bits, loss falling fourfold by the bit from a start that
spans six powers of ten, bytes, microseconds and bit operations; pairs share up to 0.8 of the geometric mean of the
losses, of either sign. Each budget is a part of the way from its least to its most. Nothing else should run meanwhile.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from qcompile.passes.greedy import greedy
from qcompile.passes.integer_program import Allocation, Candidate, Pair, allocate

PAGE = Path(__file__).parent.parent / "docs/integer-program.md"
#: Tensors, candidates, budgets, and to how many of the next ones each tensor has a pair.
SIZES = ((50, 6, 3, 0), (200, 6, 1, 0), (200, 6, 3, 0), (500, 6, 3, 0), (20, 6, 3, 4), (100, 4, 1, 4), (100, 4, 3, 4),
         (100, 6, 3, 4))  # fmt: skip
PARTS, SEEDS = (0.15, 0.4), (0, 1, 2)
HEAD = """# How long the integer program takes

Written by `python benchmarks/integer_program.py`; do not edit. [allocation.md](allocation.md) has the formulation.

Made-up models; six of each size: budgets at 15 % and 40 % of the way from their least to their most, three seeds.
Seconds are the processor's and include what tells ties apart; a search is capped at {seconds:g} s by the clock, and the
gap is what was not proven by then. Greedy: its loss over the integer program's, where it found a choice; with pairs, a
step counts with what it does to them.

| tensors | candidates | budgets | pairs | seconds, median | most | proven | largest gap | greedy, median | most |
|---|---|---|---|---|---|---|---|---|---|
"""


def problem(
    size: tuple[int, int, int, int], part: float, seed: int
) -> tuple[list[list[Candidate]], list[float], list[Pair]]:
    """Return tensors, budgets and pairs."""
    count, ways, budgets, window = size
    generator, tensors = np.random.default_rng(seed), []
    for _ in range(count):
        weights, start = 10 ** generator.uniform(3, 6.5), 10 ** generator.uniform(-6, 0)
        ways_here = []
        for bits in np.sort(generator.choice(np.arange(2, 17), ways, replace=False)):
            microseconds = round(weights * 1e-4 * generator.uniform(0.5, 1.5) * (0.4 + bits / 16), 1)
            costs = (float(int(weights * bits / 8)), microseconds, weights * bits * 8)[:budgets]
            ways_here.append(Candidate(float(start * 4.0 ** (2 - bits) * generator.uniform(0.5, 2)), costs))
        tensors.append(ways_here)
    pairs = []
    for first in range(count):
        for second in range(first + 1, min(count, first + 1 + window)):
            losses = np.multiply.outer(*(np.array([way.loss for way in tensors[at]]) for at in (first, second)))
            together = generator.uniform(-0.8, 0.8) * generator.uniform(0.5, 1.5, losses.shape)
            pairs.append(Pair(first, second, together * np.sqrt(losses)))
    ends = [
        [sum(end(way.costs[k] for way in tensor) for tensor in tensors) for end in (min, max)] for k in range(budgets)
    ]
    return tensors, [low + (high - low) * part for low, high in ends], pairs


def row(size: tuple[int, int, int, int], seconds: float) -> str:
    """Return a size's row of the table."""
    taken, found, ratios = list[float](), list[Allocation](), list[float]()
    for part in PARTS:
        for seed in SEEDS:
            tensors, budgets, pairs = problem(size, part, seed)
            start = time.process_time()
            found.append(allocate(tensors, budgets, pairs, seconds=seconds))
            taken.append(time.process_time() - start)
            steps = greedy(tensors, budgets, pairs)
            ratios += [steps.loss / found[-1].loss] if steps else []
    gaps = [one.gap for one in found]
    return (f"| {' | '.join(map(str, size[:3]))} | {f'window of {size[3]}' if size[3] else ''} "
            f"| {statistics.median(taken):.2f} | {max(taken):.2f} | {sum(gap < 1e-8 for gap in gaps)} of {len(gaps)} "
            f"| {_percent(max(gaps))} | {_ratio(ratios, statistics.median)} | {_ratio(ratios, max)} |")  # fmt: skip


def _percent(gap: float) -> str:
    return "0" if gap < 1e-8 else f"{gap:.2%}"


def _ratio(ratios: Sequence[float], of: Callable[[Sequence[float]], float]) -> str:
    return f"{of(ratios):.2f}x" if ratios else ""


def main() -> None:
    """Measure all sizes and write the page."""
    parser = argparse.ArgumentParser(description="Time the integer program; write docs/integer-program.md.")
    parser.add_argument("--seconds", type=float, default=10.0, help="cap of each search")
    seconds = parser.parse_args().seconds
    rows = []
    for size in SIZES:
        rows.append(row(size, seconds))
        print(rows[-1], flush=True)
    PAGE.write_text(HEAD.format(seconds=seconds) + "\n".join(rows) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
