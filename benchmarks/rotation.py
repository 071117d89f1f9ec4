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

import numpy as np
import onnx_ir as ir
from catalog import NOT_MODELS, ROOT, fetch
from perplexity import losses, perplexity, sequences

from qcompile.backends.base import find_target
from qcompile.calib.collect import collect
from qcompile.calib.data import Dataset, Sample, input_specs, open_data
from qcompile.calib.observers import Observer
from qcompile.calib.rotations import Scheme
from qcompile.calib.rounding import round_weights, second_moments
from qcompile.core import model as models
from qcompile.core import numerics, runtime
from qcompile.core.orthogonal import Orthogonal
from qcompile.core.plan import How, Precision, Role
from qcompile.core.rotation import InputRotation, Site
from qcompile.job import Job
from qcompile.options import Options
from qcompile.passes.allocate_bits import allocate_bits
from qcompile.passes.canonicalize import Canonicalize
from qcompile.passes.canonicalize.editing import add_constant
from qcompile.passes.insert_qdq import InsertQdq
from qcompile.passes.place import Wish, place
from qcompile.passes.rotate import Rotate, spread_evenly
from qcompile.passes.rotate_inputs import RotateInputs, obstacle, rotated_products
from qcompile.passes.rotations import rotatable
from qcompile.passes.round_weights import RoundWeights, roundable
from qcompile.passes.smooth import Smooth
from qcompile.passes.structure import is_linear, node_name, produced_by
from qcompile.pipeline import untracked
from qcompile.rotation import plan_rotations
from qcompile.smoothing import Candidate, Smoothable

PAGE = ROOT / "docs/rotation-figures.md"
LANGUAGE = "smollm2-135m"
#: Models that are quantized to weights of four bits; their data have labels.
FOUR_BITS = ("digits-vit", "digits-mobilenet", "efficientnet-lite0")
SHORT = {Site.STREAM: "R1", Site.VALUES: "R2"}
#: Neighbouring channels that a product at run time mixes.
BLOCK = 32
#: Steps that are measured with weights rounded by GPTQ, too.
ROUNDED = ("smooth, α = 0.8 for all", "R1 and R2, smooth, R4")
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
tensor, minmax over the calibration half); everything else in float. Smoothing: what folds, each group by its own α
unless one is named, behind R1 and R2. R4: blocks of {block} in front of FFN-down, behind smoothing.
Weights to nearest, or by GPTQ where that is named.

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


def quantized(
    model: ir.Model, data: Dataset, keep: Sequence[str] = (), bits: int = 8, rounded: bool = False
) -> tuple[ir.Model, int]:
    """Quantize every linear operator but some, and nothing else; return the model and how many these are.

    Weights are rounded to nearest, or with regard to one another.
    """
    target = replace(find_target("cpu")[0], costs=None)
    float_only = {node_name(node) for node in model.graph if not is_linear(node)} | set(keep)
    wishes = {name: Wish(Precision.FLOAT, "linear operators only") for name in float_only}
    placement = place(model, target, weights=True, activations=True, wishes=wishes)
    statistics = collect(model, placement.activations, data, untracked)
    plan = allocate_bits(model, placement, statistics, target, dict.fromkeys(placement.activations, Observer.MINMAX))
    # Codes of fewer bits, stored as bytes.
    coarser = (2**7 - 1) / (2 ** (bits - 1) - 1)
    tensors = {
        name: replace(quant, scale=tuple(float(np.float32(scale * coarser)) for scale in quant.scale))
        if quant.role is Role.WEIGHT
        else quant
        for name, quant in plan.tensors.items()
    }
    copy, plan = model.clone(), replace(plan, tensors=tensors)
    InsertQdq(plan)(copy)
    if rounded:
        codes_of = {operator: name for name, operator in roundable(model, copy, plan)[0].items()}
        moments = second_moments(model, list(codes_of), data, untracked)
        RoundWeights({codes_of[operator]: round_weights(operator, found) for operator, found in moments})(copy)
    return copy, sum(op.precision is Precision.INTEGER for op in placement.ops.values())


def linear(model: ir.Model) -> frozenset[str]:
    """Return the names of the linear operators."""
    return frozenset(node_name(node) for node in model.graph if is_linear(node))


def rotated(model: ir.Model, *sites: Site) -> ir.Model:
    """Rotate all places of some kinds by Hadamard matrices."""
    copy = model.clone()
    Rotate(spread_evenly(place for place in rotatable(model.graph).places if place.site in sites))(copy)
    return copy


def smoothed(job: Job, model: ir.Model, alpha: float | None = None) -> ir.Model:
    """Smooth by what folds, each group by its own α or all by the same."""
    smoothable = Smoothable(job, model, linear(model), mul=False)
    tuned = smoothable.tuned(job.evidence.calibration)
    return Smooth(smoothable.factors(tuned, Candidate((How.FOLD,), alpha)))(model.clone()).model


def planned(model: ir.Model, data: Dataset, learning: int, bits: int = 8) -> ir.Model:
    """Rotate where the estimate says that it pays, by the matrices that it chooses."""
    plan, copy = plan_rotations(
        model, linear(model), data, untracked, scheme=Scheme(8, bits), steps=learning
    ), model.clone()  # fmt: skip
    Rotate(plan.rotations)(copy)
    return copy


def behind_gates(model: ir.Model) -> list[ir.Node]:
    """Return the operators that alone read a product of two activations, but for those behind norms: FFN-down."""
    behind = {node for site in rotatable(model.graph).streams for norm in site.norms for node in norm.readers}
    nodes = [node for node in model.graph if is_linear(node) and not obstacle(node) and node not in behind]
    return [node for node in nodes if produced_by(node.inputs[0], "Mul") is not None]


def with_products(model: ir.Model, block: int = BLOCK) -> tuple[ir.Model, list[str]]:
    """Put products in front of every FFN-down; return what is to stay in float too."""
    online = tuple(
        InputRotation(node_name(node), Orthogonal.spreading(block, seed, block=block))
        for seed, node in enumerate(behind_gates(model))
    )
    copy = model.clone()
    RotateInputs(online)(copy)
    return copy, list(rotated_products(online, copy.graph))


def first_token_apart(model: ir.Model) -> tuple[ir.Model, list[str]]:
    """Let every FFN-down read the first token in float, beside the integers; return what does."""
    copy = model.clone()
    graph, kept = copy.graph, []
    numbers = {name: graph_constant(graph, name, at) for name, at in (("zero", 0), ("one", 1), ("end", 2**31 - 1))}
    for node in behind_gates(copy):
        value, result = node.inputs[0], node.outputs[0]
        first = ir.node("Slice", [value, numbers["zero"], numbers["one"], numbers["one"]])
        rest = ir.node("Slice", [value, numbers["one"], numbers["end"], numbers["one"]])
        apart = ir.node("MatMul", [first.outputs[0], node.inputs[1]], name=f"{node.name}_first")
        joined = ir.node("Concat", [apart.outputs[0], result], {"axis": 1})
        for added, name in ((first, "first"), (rest, "rest"), (apart, "apart"), (joined, "joined")):
            added.outputs[0].name = f"{result.name}_{name}"
            added.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
        for use in [use for use in result.uses() if use.node is not joined]:
            use.node.replace_input_with(use.idx, joined.outputs[0])
        graph.insert_before(node, [first, rest, apart])
        graph.insert_after(node, joined)
        node.replace_input_with(0, rest.outputs[0])
        kept.append(node_name(apart))
    return copy, kept


def graph_constant(graph: ir.Graph, name: str, number: int) -> ir.Value:
    """Add a constant of one whole number."""
    return add_constant(graph, f"first_token/{name}", np.array([number], np.int64))


def steps(job: Job, model: ir.Model) -> Iterator[tuple[str, ir.Model, list[str]]]:
    """Yield each step's name, the float model that it makes, and what must stay in float there."""
    data = job.evidence.calibration
    yield "nothing", model, []
    yield "the first token of FFN-down in float", *first_token_apart(model)
    yield "smooth", smoothed(job, model), []
    yield "smooth, α = 0.65 for all", smoothed(job, model, 0.65), []
    yield "smooth, α = 0.8 for all", smoothed(job, model, 0.8), []
    yield "R1", rotated(model, Site.STREAM), []
    yield "R2", rotated(model, Site.VALUES), []
    both = rotated(model, Site.STREAM, Site.VALUES)
    yield "R1 and R2", both, []
    for name, learning in (("KLT·Hadamard", 0), ("learned", 6)):
        yield f"R1 and R2, {name} where better", planned(model, data, learning), []
    yield "R4", *with_products(model)
    yield "R1, R2 and R4", *with_products(both)
    yield "R1 and R2, smooth", smoothed(job, both), []
    yield "R1, smooth", smoothed(job, rotated(model, Site.STREAM)), []
    yield "smooth, R4", *with_products(smoothed(job, model))
    for alpha in (None, 0.65, 0.8):
        name = "" if alpha is None else f", α = {alpha} for all"
        yield f"R1 and R2, smooth{name}, R4", *with_products(smoothed(job, both, alpha))
    yield "R1, smooth, R4", *with_products(smoothed(job, rotated(model, Site.STREAM)))


def language(paths: Sequence[Path], show: Callable[[str], None]) -> str:
    """Measure every step; return the section of the page."""
    job = Job.begin(paths[0], Options("cpu", data=str(paths[1]), eval=str(paths[2])), untracked)
    model = Canonicalize(21)(job.model.clone()).model
    data = job.evidence.calibration
    name, tokens = sequences(paths[2])
    base = perplexity(losses(runtime.Session(model), name, tokens))
    rows, count = [f"| float | | {base:.2f} | 1.000x |"], 0
    for step, changed, keep in steps(job, model):
        change = len(changed.graph) - len(model.graph)
        for rounded in (False, True) if step in ROUNDED else (False,):
            integer, count = quantized(changed, data, keep, rounded=rounded)
            value = perplexity(losses(runtime.Session(integer), name, tokens))
            rows.append(f"| {step}{', GPTQ' * rounded} | {change:+d} | {value:.2f} | {value / base:.3f}x |")
            show(rows[-1])
    head = STEPS_HEAD.format(name=LANGUAGE, count=tokens.shape[0], length=tokens.shape[1], integers=count, block=BLOCK)
    return head + "\n".join(rows) + "\n"


FOUR_HEAD = """
## With 4-bit weights

Every linear operator with weights of four bits per output channel, to nearest, and activations of eight (minmax, one
static range per tensor). Mean SQNR of the logits over the samples of the evaluation data in dB, and how many of them
are classified correctly.

| model | step | error in float | SQNR | correct |
|---|---|---|---|---|
"""


def four_bits(name: str, paths: Sequence[Path]) -> list[str]:
    """Quantize a model to W4A8 with and without rotations; return its rows."""
    model = models.load(paths[0])
    Canonicalize(21)(model)
    data = open_data(str(paths[1]), input_specs(model))
    samples = list(open_data(str(paths[2]), input_specs(model)))
    with np.load(paths[2]) as archive:
        labels = archive["labels"]
    sites = dict.fromkeys(place.site for place in rotatable(model.graph).places)
    changed = {"nothing": model, **{SHORT[site]: rotated(model, site) for site in sites}}
    if len(sites) > 1:
        changed |= {" and ".join(SHORT[site] for site in sites): rotated(model, *sites)}
    changed |= {f"the best of {kind}": planned(model, data, learning, 4)
                for kind, learning in (("Hadamard and KLT·Hadamard", 0), ("these and learned", 12))}  # fmt: skip
    reference, rows = runtime.Session(model, optimize=False), []
    exact = [next(iter(reference.run(sample).values())) for sample in samples]
    right = np.mean([y.argmax() == label for y, label in zip(exact, labels, strict=True)])
    rows.append(f"| {name} | float | | | {right:.1%} |")
    for step, other in changed.items():
        session = runtime.Session(quantized(other, data, bits=4)[0])
        found = [next(iter(session.run(sample).values())) for sample in samples]
        pairs = list(zip(exact, found, strict=True))
        ratios = [numerics.decibel(float(np.sum(y**2)), float(np.sum((y - z) ** 2))) for y, z in pairs]
        right = np.mean([z.argmax() == label for z, label in zip(found, labels, strict=True)])
        error = "" if other is model else f"{errors(model, other, samples[:16]):.1g}"
        rows.append(f"| {name} | {step} | {error} | {np.mean(ratios):.1f} | {right:.1%} |")
    return rows


def main() -> None:
    """Measure what was asked for, all by default, and write the page."""
    catalog = tomllib.loads((ROOT / "models/catalog.toml").read_text(encoding="utf-8"))
    known = [name for name in catalog if name not in NOT_MODELS]
    parser = argparse.ArgumentParser(description="Rotate models; write docs/rotation-figures.md.")
    parser.add_argument("names", nargs="*", choices=[*known, []], metavar="NAME", help=f"one of {', '.join(known)}")
    parser.add_argument("--cache", type=Path, help="folder of the fetched models")
    options = parser.parse_args()
    rows, section, four = [], "", list[str]()
    for name in options.names or known:
        paths = fetch(name, options.cache)
        rows.append(exactness(name, paths))
        print(rows[-1], flush=True)
        if name == LANGUAGE:
            section = language(paths, lambda row: print(row, flush=True))
        if name in FOUR_BITS:
            four += four_bits(name, paths)
            print("\n".join(four), flush=True)
    last = FOUR_HEAD + "\n".join(four) + "\n" if four else ""
    PAGE.write_text(HEAD + "\n".join(rows) + "\n" + section + last, encoding="utf-8")


if __name__ == "__main__":
    main()
