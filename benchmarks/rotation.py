"""Rotate every model of the catalogue and SmolLM2 in steps; write docs/rotation-figures.md.

    python benchmarks/rotation.py [NAME ...] [--cache DIR]

Needs the extra `models` for what is not in the cache yet. Exactness: max|Δ| / max|y| over all evaluation samples, run
node by node. Perplexity: W8A8 with static ranges per tensor (minmax over the calibration half) and every operator with
constant weights in integers, nothing else; a language model is named in `LANGUAGE`.
"""

from __future__ import annotations

import argparse
import tomllib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import onnx_ir as ir
from catalog import NOT_MODELS, ROOT, fetch
from perplexity import losses, perplexity, sequences

from qcompile.backends.base import find_target
from qcompile.calib.collect import collect
from qcompile.calib.data import Dataset, Sample, input_specs, open_data
from qcompile.calib.observers import Observer
from qcompile.core import model as models
from qcompile.core import numerics, runtime
from qcompile.core.orthogonal import Orthogonal
from qcompile.core.plan import Precision
from qcompile.core.rotation import InputRotation, Site
from qcompile.passes.allocate_bits import allocate_bits
from qcompile.passes.canonicalize import Canonicalize
from qcompile.passes.insert_qdq import InsertQdq
from qcompile.passes.place import Wish, place
from qcompile.passes.rotate import Rotate, spread_evenly
from qcompile.passes.rotate_inputs import RotateInputs, obstacle, rotated_products
from qcompile.passes.rotations import rotatable
from qcompile.passes.structure import is_linear, node_name, produced_by
from qcompile.pipeline import untracked
from qcompile.rotation import plan_rotations

PAGE = ROOT / "docs/rotation-figures.md"
LANGUAGE = "smollm2-135m"
#: Neighbouring channels that a product at run time mixes.
BLOCK = 32
HEAD = """# What rotation does

Written by `python benchmarks/rotation.py`; do not edit. [rotation.md](rotation.md) says what is done.

## It changes nothing in float

Places that were rotated by Hadamard matrices, the largest max|Δ| / max|y| over outputs and evaluation samples, and by
how many nodes the graph changed. Refused: places with the reason why not.

| model | streams | error | heads' values | error | both | nodes | refused |
|---|---|---|---|---|---|---|---|
"""
STEPS_HEAD = """
## Perplexity of {name}

{count} sequences of {length} tokens of the evaluation half, {integers} products in integers (W8A8, one static range per
tensor, minmax over the calibration half); everything else in float.

| step | nodes | perplexity | of float's |
|---|---|---|---|
"""


def errors(model: ir.Model, rotated: ir.Model, samples: Sequence[Sample]) -> float:
    """Return the largest relative error over outputs and samples."""
    before, after = (runtime.Session(x, optimize=False) for x in (model, rotated))
    worst = 0.0
    for sample in samples:
        expected, found = before.run(sample), after.run(sample)
        worst = max(worst, *(numerics.relative_error(expected[name], found[name]) for name in expected))
    return worst


def exactness(name: str, paths: Sequence[Path]) -> str:
    """Rotate one model; return its row of the table."""
    model = models.load(paths[0])
    Canonicalize(21)(model)
    samples = list(open_data(str(paths[2]), input_specs(model)))[:16]
    found = rotatable(model.graph)
    cells, added = [name], "-"
    for sites in ((Site.STREAM,), (Site.VALUES,), (Site.STREAM, Site.VALUES)):
        places = [place for place in found.places if place.site in sites]
        if len(sites) == 1:
            cells.append(str(len(places)))
        if not places or len({place.site for place in places}) < len(sites):
            cells.append("-")
            continue
        copy = model.clone()
        Rotate(spread_evenly(places))(copy)
        cells.append(f"{errors(model, copy, samples):.1g}")
        added = f"{len(copy.graph) - len(model.graph):+d}"
    return f"| {' | '.join([*cells, added, str(len(found.refusals))])} |"


def quantized(model: ir.Model, data: Dataset, keep: Sequence[str] = ()) -> tuple[ir.Model, int]:
    """Quantize every linear operator but some, and nothing else; return the model and how many these are."""
    target = replace(find_target("cpu")[0], costs=None)
    float_only = {node_name(node) for node in model.graph if not is_linear(node)} | set(keep)
    wishes = {name: Wish(Precision.FLOAT, "linear operators only") for name in float_only}
    placement = place(model, target, weights=True, activations=True, wishes=wishes)
    statistics = collect(model, placement.activations, data, untracked)
    plan = allocate_bits(model, placement, statistics, target, dict.fromkeys(placement.activations, Observer.MINMAX))
    copy = model.clone()
    InsertQdq(plan)(copy)
    return copy, sum(op.precision is Precision.INTEGER for op in placement.ops.values())


def behind_gates(model: ir.Model) -> list[str]:
    """Return the operators that alone read a product of two activations, but for those behind norms: FFN-down."""
    behind = {node for site in rotatable(model.graph).streams for norm in site.norms for node in norm.readers}
    linear = [node for node in model.graph if is_linear(node) and not obstacle(node) and node not in behind]
    return [node_name(node) for node in linear if produced_by(node.inputs[0], "Mul") is not None]


def steps(model: ir.Model, data: Dataset) -> Iterator[tuple[str, ir.Model, list[str]]]:
    """Yield each step's name, the float model that it makes, and what must stay in float there."""
    places = rotatable(model.graph).places

    def rotated(*sites: Site) -> ir.Model:
        copy = model.clone()
        Rotate(spread_evenly(place for place in places if place.site in sites))(copy)
        return copy

    yield "nothing", model, []
    yield "R1", rotated(Site.STREAM), []
    yield "R2", rotated(Site.VALUES), []
    both = rotated(Site.STREAM, Site.VALUES)
    yield "R1 and R2", both, []
    for name, learning in (("R1 and R2, KLT·Hadamard where better", 0), ("R1 and R2, learned where better", 6)):
        integers = {node_name(node) for node in model.graph if is_linear(node)}
        planned, copy = plan_rotations(model, integers, data, untracked, steps=learning), model.clone()
        Rotate(planned.rotations)(copy)
        yield name, copy, []
    online = tuple(
        InputRotation(name, Orthogonal.spreading(BLOCK, seed, block=BLOCK))
        for seed, name in enumerate(behind_gates(both))
    )
    RotateInputs(online)(both)
    yield f"R1, R2 and R4 in blocks of {BLOCK}", both, list(rotated_products(online, both.graph))


def language(paths: Sequence[Path], show: Callable[[str], None]) -> str:
    """Measure every step; return the section of the page."""
    model = models.load(paths[0])
    Canonicalize(21)(model)
    data = open_data(str(paths[1]), input_specs(model))
    name, tokens = sequences(paths[2])
    base = perplexity(losses(runtime.Session(model), name, tokens))
    rows, count = [f"| float | | {base:.2f} | 1.000x |"], 0
    for step, rotated, keep in steps(model, data):
        integer, count = quantized(rotated, data, keep)
        value = perplexity(losses(runtime.Session(integer), name, tokens))
        change = len(rotated.graph) - len(model.graph)
        rows.append(f"| {step} | {change:+d} | {value:.2f} | {value / base:.3f}x |")
        show(rows[-1])
    head = STEPS_HEAD.format(name=LANGUAGE, count=tokens.shape[0], length=tokens.shape[1], integers=count)
    return head + "\n".join(rows) + "\n"


def main() -> None:
    """Measure what was asked for, all by default, and write the page."""
    catalog = tomllib.loads((ROOT / "models/catalog.toml").read_text(encoding="utf-8"))
    known = [name for name in catalog if name not in NOT_MODELS]
    parser = argparse.ArgumentParser(description="Rotate models; write docs/rotation-figures.md.")
    parser.add_argument("names", nargs="*", choices=[*known, []], metavar="NAME", help=f"one of {', '.join(known)}")
    parser.add_argument("--cache", type=Path, help="folder of the fetched models")
    options = parser.parse_args()
    rows, section = [], ""
    for name in options.names or known:
        paths = fetch(name, options.cache)
        rows.append(exactness(name, paths))
        print(rows[-1], flush=True)
        if name == LANGUAGE:
            section = language(paths, lambda row: print(row, flush=True))
    PAGE.write_text(HEAD + "\n".join(rows) + "\n" + section, encoding="utf-8")


if __name__ == "__main__":
    main()
