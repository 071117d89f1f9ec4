"""Hold low-rank compensation against the same bytes spent on bits; write docs/low-rank.md.

    python benchmarks/low_rank.py [NAME ...] [--cache DIR] --measured DIR

A weight in four bits gets a branch x · A · B beside it that makes up for what rounding left: the best of its rank for
the inputs that calibration saw (EoRA, Liu et al. 2024, arXiv 2410.21271; LoRC of ZeroQuant-V2, Yao et al. 2023, is the
same with inputs that are alike), A and B in int8. `--measured` is that of `allocation.py`.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from bit_choices import Subject
from catalog import ROOT, fetch

from qcompile.calib.rounding import second_moments
from qcompile.calib.weighing import weights_alone
from qcompile.core import numerics, packing
from qcompile.passes import structure
from qcompile.passes.insert_qdq import InsertQdq, quantized_name
from qcompile.passes.integer_program import Candidate, allocate
from qcompile.passes.round_weights import roundable
from qcompile.weight_losses import EIGHT, FOUR

PAGE = ROOT / "docs/low-rank.md"
#: Models with products, whose weights are most of their bytes or some.
NAMES = ("minilm-l6", "ppocr-rec")
RANKS = (2, 4, 8, 16, 32)
#: Sizes in parts of float's.
SIZES = (0.14, 0.145, 0.15, 0.155, 0.16, 0.17, 0.18)
#: Bytes of two products, a sum and their DequantizeLinears in a file, names included.
NODES = 1200
Array = npt.NDArray[np.float64]
HEAD = """# Low-rank compensation

Written by `python benchmarks/low_rank.py`; do not edit. [allocation.md](allocation.md#low-rank-compensation) says what
follows.

Beside codes of four bits, x · W, a product may have x · A · B, with A and B of a low rank in int8 (a scale in sixteen
bits for each column of A and row of B, and {nodes} bytes for the nodes): EoRA, the best of its rank for second moments
of the inputs, on what GPTQ left. What weights lose is measured as in a compile, each alone, on samples that nothing was
fitted to. Sizes are in parts of float's; SQNR in dB, as losses are expected to add up.
"""
MODEL = """
## {name}

{linear} products, of {count} weights with a choice; {noise:.1f} dB with all in eight bits. By how many dB the noise of
one product alone in four bits falls at the outputs, and the bytes of the branch over those of the codes:

| rank | median | least | most | bytes |
|---|---|---|---|---|
{gains}

The integer program's choice with four and eight bits for each weight, and with branches of every rank as well, which
cost nothing but their bytes:

| size | bits alone | with branches | gained, dB | branches taken |
|---|---|---|---|---|
{sizes}
"""


@dataclass(frozen=True)
class Branch:
    """What a weight is with a branch beside its codes, and the branch's bytes."""

    weight: Array
    bytes: float


def branch(error: Array, moments: Array, rank: int) -> tuple[Array, float]:
    """Return what a branch of a rank makes of an error `[depth, columns]`, and its bytes.

    Of all A · B of the rank, the one that leaves least of tr (E - AB)ᵀ H (E - AB) for the second moments H of the
    inputs: with H = Q Λ Qᵀ, the largest singular values of √Λ Qᵀ E. A and B are then rounded to int8, a scale for each
    column of A and each row of B.
    """
    values, vectors = np.linalg.eigh(moments)
    root = np.sqrt(np.maximum(values, 1e-4 * values.mean()))
    left, sizes, right = np.linalg.svd(root[:, None] * (vectors.T @ error), full_matrices=False)
    down = (vectors / root) @ (left[:, :rank] * np.sqrt(sizes[:rank]))
    up = np.sqrt(sizes[:rank, None]) * right[:rank]
    product = _int8(down, 0) @ _int8(up, 1)
    return product, float(down.size + up.size + 2 * (2 * rank) + NODES)


def _int8(array: Array, axis: int) -> Array:
    scale = np.maximum(np.abs(array).max(axis, keepdims=True), 1e-30) / 127.0
    return np.asarray(np.rint(array / scale) * scale)


def branches(subject: Subject) -> dict[str, dict[int, Branch]]:
    """Return, by the name of a weight of a product and by rank, what it becomes."""
    names = list(subject.program.numbers)
    plan = subject.program.planned(dict.fromkeys(names, FOUR))
    operators, _ = roundable(subject.canonical, InsertQdq(plan)(subject.canonical.clone()).model, plan)
    known = {name: operators[quantized_name(name)] for name in names if quantized_name(name) in operators}
    wanted = {operator: name for name, operator in known.items() if operator.node.op_type != "Conv"}
    found: dict[str, dict[int, Branch]] = {}
    track: Any = subject.job.track
    data = subject.job.evidence.fitted(subject.parts[0])
    for operator, moments in second_moments(subject.canonical, list(wanted), data, track):
        name = wanted[operator]
        weight = structure.constant(subject.canonical.graph.initializers[name])
        assert weight is not None
        quant, codes = plan.tensors[name], subject.codes[FOUR].get(quantized_name(name))
        stored = np.float64(quant.dequantize(quant.quantize(weight) if codes is None else codes))
        (error,) = operator.matrix(np.asarray(weight, np.float64) - stored)
        found[name] = {}
        for rank in RANKS:
            product, size = branch(error, moments.matrices[0], rank)
            found[name][rank] = Branch(stored + operator.weights(product[None]), size)
    return found


def losses(subject: Subject, found: Mapping[str, Mapping[int, Branch]]) -> dict[str, dict[int, float]]:
    """Measure what each of these weights loses alone with a branch of each rank."""
    lost: dict[str, dict[int, float]] = {name: {} for name in found}
    for rank in RANKS:
        model = subject.canonical.clone()
        for name, of in found.items():
            model.graph.initializers[name].const_value = ir.tensor(of[rank].weight.astype(np.float32), name=name)
        weights = {name: (name,) for name in found}
        others, job, shared = subject.parts[1], subject.job, len(subject.program.numbers)
        alone = weights_alone(subject.canonical, model, weights, others, job.track, job.workers, shared=shared)
        for name, loss in alone.items():
            lost[name][rank] = loss
    return lost


def gains(subject: Subject, found: Mapping[str, Mapping[int, Branch]], lost: Mapping[str, Mapping[int, float]]) -> str:
    """Return the rows of the first table."""
    rows = []
    for rank in RANKS:
        of = [10.0 * np.log10(subject.program.losses[name][FOUR] / lost[name][rank]) for name in found]
        sizes = [found[name][rank].bytes / (subject.program.numbers[name] * packing.BITS / 8.0) for name in found]
        rows.append(f"| {rank} | {np.median(of):+.2f} | {min(of):+.2f} | {max(of):+.2f} | {np.mean(sizes):.1%} |")
    return "\n".join(rows)


def sizes(subject: Subject, found: Mapping[str, Mapping[int, Branch]], lost: Mapping[str, Mapping[int, float]]) -> str:
    """Return the rows of the second table."""
    plain, rows = subject.candidates, []
    more = [[*of, *_branched(subject, name, of, found, lost)] for name, of in
            zip(subject.program.numbers, plain, strict=True)]  # fmt: skip
    for size in SIZES:
        budget = (size - subject.size) * subject.calibration.float_bytes
        if budget < sum(of[1].costs[0] for of in plain):
            continue
        bits, both = allocate(plain, (budget,)), allocate(more, (budget,))
        expected = [numerics.decibel(1.0, subject.program.noise + one.loss) for one in (bits, both)]
        taken = sum(at > 1 for at in both.choice)
        rows.append(f"| {size:.3f}x | {expected[0]:.2f} | {expected[1]:.2f} | {expected[1] - expected[0]:+.2f} "
                    f"| {taken} |")  # fmt: skip
    return "\n".join(rows)


def _branched(
    subject: Subject,
    name: str,
    plain: Sequence[Candidate],
    found: Mapping[str, Mapping[int, Branch]],
    lost: Mapping[str, Mapping[int, float]],
) -> list[Candidate]:
    eight = subject.program.losses[name][EIGHT]
    return [Candidate(max(0.0, lost[name][rank] - eight), (plain[1].costs[0] + one.bytes,))
            for rank, one in found.get(name, {}).items()]  # fmt: skip


def main() -> None:
    """Measure and write the page."""
    parser = argparse.ArgumentParser(description="Low-rank compensation beside bits; write docs/low-rank.md.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"models, by default {', '.join(NAMES)}")
    parser.add_argument("--cache", type=Path, help="where models and data are kept")
    parser.add_argument("--measured", type=Path, required=True, help="where calibrations and codes are kept")
    words = parser.parse_args()
    page = HEAD.format(nodes=NODES)
    for name in words.names or NAMES:
        subject = Subject.load(name, fetch(name, words.cache), words.measured)
        found = branches(subject)
        lost = losses(subject, found)
        page += MODEL.format(
            name=name, count=len(subject.program.numbers), linear=len(found), gains=gains(subject, found, lost),
            sizes=sizes(subject, found, lost), noise=numerics.decibel(1.0, subject.program.noise),
        )  # fmt: skip
    print(page)
    PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
