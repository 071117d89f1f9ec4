"""Fold random factors into every group of every model of the catalogue; write docs/smoothing-figures.md.

    python benchmarks/smoothing.py [NAME ...] [--cache DIR]

Needs the extra `models` for what is not in the cache yet. What is folded must change nothing in float: not one bit
where factors are whole powers of two, and roundings alone where they are eighths. Run node by node.
"""

from __future__ import annotations

import argparse
import tomllib
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import onnx_ir as ir
from catalog import NOT_MODELS, ROOT, fetch

from qcompile.backends.base import find_target
from qcompile.calib.data import Sample, input_specs, open_data
from qcompile.calib.sections import at_scores
from qcompile.core import model as models
from qcompile.core import numerics, runtime
from qcompile.core.contract import Refusal
from qcompile.core.plan import ChannelFactors, How
from qcompile.passes.canonicalize import Canonicalize
from qcompile.passes.patterns import recognise
from qcompile.passes.scale_groups import ScaleGroup, linear_readings, scale_group
from qcompile.passes.smooth import Smooth
from qcompile.passes.structure import is_linear, name_of, node_name

PAGE = ROOT / "docs/smoothing-figures.md"
#: Evaluation samples that are run, and the largest logarithm of a random factor.
SAMPLES, REACH = 4, 3
HEAD = f"""# What folded factors change in float

Written by `python benchmarks/smoothing.py`; do not edit. Random factors between 2^-{REACH} and 2^{REACH} in every
group that folds ([smoothing.md](smoothing.md)), all at once: the largest max|Δ| / max|y| over outputs and
{SAMPLES} samples. Whole: powers of two. Eighths: powers of two by eighths, as smoothing chooses them; at the scores: in
front of a last Softmax or Sigmoid. No node is added.

| model | groups | refused | whole | eighths | eighths, at the scores |
|---|---|---|---|---|---|
"""


def groups_of(graph: ir.Graph) -> tuple[list[ScaleGroup], list[Refusal]]:
    """Return every group that folds, each around other operators, and why the rest do not."""
    patterns, linear = recognise(graph), {node_name(node) for node in graph if is_linear(node)}
    found, refused, covered = list[ScaleGroup](), list[Refusal](), set[ir.Value]()
    for value, axis in linear_readings(graph, linear):
        group = scale_group(value, axis, patterns, How.FOLD) if value not in covered else None
        if isinstance(group, ScaleGroup):
            found.append(group)
            covered |= {reading.value for reading in group.readings}
        elif group is not None:
            refused.append(group)
    return found, refused


def with_random_factors(model: ir.Model, groups: Sequence[ScaleGroup], steps: int) -> ir.Model:
    """Return the model with factors of 2 to the power of random multiples of 1 / steps in all groups."""
    random, factors = np.random.default_rng(0), {}
    for group in groups:
        log2 = random.integers(-REACH * steps, REACH * steps + 1, group.factors + 1) / steps
        log2[0] = 0.0
        factors[name_of(group.root)] = ChannelFactors(How.FOLD, tuple(map(float, log2[group.classes])))
    result = Smooth(factors).call(model.clone())
    assert not result.refusals and len(result.model.graph) == len(model.graph)
    return result.model


def error(model: ir.Model, other: ir.Model, samples: Sequence[Sample]) -> float:
    """Return the largest relative error over outputs and samples; outputs are taken in their order."""
    before, after = (runtime.Session(each, optimize=False) for each in (model, other))
    worst = 0.0
    for sample in samples:
        pairs = zip(before.run(sample).values(), after.run(sample).values(), strict=True)
        worst = max(worst, *(numerics.relative_error(expected, found) for expected, found in pairs))
    return worst


def row(name: str, paths: Sequence[Path]) -> str:
    """Fold factors into one model; return its row of the table."""
    model = models.load(paths[0])
    Canonicalize(find_target("cpu")[0].opset, widen=True)(model)
    samples = list(islice(open_data(str(paths[2]), input_specs(model)), SAMPLES))
    groups, refused = groups_of(model.graph)
    cells = [name, str(len(groups)), str(len(refused))]
    if not groups:
        return f"| {' | '.join([*cells, '-', '-', '-'])} |"
    whole, eighths = (with_random_factors(model, groups, steps) for steps in (1, 8))
    found = (error(model, whole, samples), error(model, eighths, samples),
             error(at_scores(model), at_scores(eighths), samples))  # fmt: skip
    return f"| {' | '.join([*cells, *(f'{each:.2g}' for each in found)])} |"


def main() -> None:
    """Measure what was asked for, all by default, and write the page."""
    catalog = tomllib.loads((ROOT / "models/catalog.toml").read_text(encoding="utf-8"))
    known = [name for name in catalog if name not in NOT_MODELS]
    parser = argparse.ArgumentParser(description="Fold random factors; write docs/smoothing-figures.md.")
    parser.add_argument("names", nargs="*", choices=[*known, []], metavar="NAME", help=f"one of {', '.join(known)}")
    parser.add_argument("--cache", type=Path, help="folder of the fetched models")
    options = parser.parse_args()
    rows = []
    for name in options.names or known:
        rows.append(row(name, fetch(name, options.cache)))
        print(rows[-1], flush=True)
    PAGE.write_text(HEAD + "\n".join(rows) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
