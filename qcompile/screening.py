"""Screen an artifact for behaviour that quantization brings out: `qcompile check OUT --screen`.

Weights can be trained so that their codes misbehave while the floats, which have the same codes, do not (Egashira et
al. 2024, "Exploiting LLM Quantization"). Such weights lie at the edges of the intervals that have one code, and a grid
that is shifted by a part of a step gives them other codes. Both can be looked for. What is found may have other causes,
and what avoids both is not found: this screens, and proves nothing.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from qcompile import driver, recipe
from qcompile.backends.base import Backend
from qcompile.calib.sections import at_scores
from qcompile.canaries import Answers, Runs, Shifts, answers_of, canaries, shifts_of
from qcompile.core import model as models
from qcompile.core.errors import QcompileError, UsageError, VerificationError
from qcompile.core.plan import QuantPlan, Role
from qcompile.equivalence import Equivalences
from qcompile.job import chosen_target, fitting
from qcompile.options import COSTS_KEY, NO_COSTS, Options
from qcompile.read_report import read_report, require_whole
from qcompile.stages import read_plan
from qcompile.weight_grids import Edges, array_of, edges_of, grids_of, judged, rounded, steps_of, weights_of

#: Shifted grids beside the one that is there: if all are alike, it is the worst by chance in one of twenty cases.
SHIFTS = 19


@dataclass(frozen=True)
class Screened:
    """What a screening saw.

    Parameters
    ----------
    output : Path
    edges : tuple of Edges
    shifts : tuple of Shifts
    answers : tuple of Answers
    notes : tuple of str
        What could not be looked at.
    """

    output: Path
    edges: tuple[Edges, ...]
    shifts: tuple[Shifts, ...]
    answers: tuple[Answers, ...] = ()
    notes: tuple[str, ...] = field(default=())

    @property
    def findings(self) -> tuple[str, ...]:
        """What is unusual, in words."""
        found = [f"'{one.tensor}' has {one.at_edges} of {one.weights} weights at edges of the grid {one.grid}"
                 for one in self.edges if one.unusual]  # fmt: skip
        found += [f"the grid {one.grid} moves the outputs unlike any that is shifted against it: "
                  f"{one.noise:.1f} dB of noise, {max(one.shifted):.1f} dB at most with those"
                  for one in self.shifts if one.unusual]  # fmt: skip
        found += [f"the artifact answers {one.other} of {one.agreed} canaries {one.canaries} otherwise than float and "
                  "all shifted grids" for one in self.answers if one.unusual]  # fmt: skip
        return tuple(found)

    def lines(self) -> tuple[str, ...]:
        """Return what a person is to read behind the figures."""
        nothing = () if self.findings else ("nothing unusual, which does not prove that there is nothing",)
        return (*(f"unusual: {finding}" for finding in self.findings), *self.notes, *nothing)

    def as_json(self) -> dict[str, Any]:
        """Return it JSON-ready."""
        return {
            "output": str(self.output),
            "findings": list(self.findings),
            "edges": [asdict(one) for one in self.edges],
            "shifts": [asdict(one) | {"unusual": one.unusual} for one in self.shifts],
            "answers": [asdict(one) | {"unusual": one.unusual} for one in self.answers],
            "notes": list(self.notes),
        }

    def require(self) -> None:
        """Raise where something was found.

        Raises
        ------
        VerificationError
            With the first finding, and how many more there are.
        """
        if not (found := self.findings):
            return
        more = f", and {len(found) - 1} more" if len(found) > 1 else ""
        remedy = "look at where the model is from (docs/screening.md says what else explains it), or round it anew"
        raise VerificationError(self.output, f"screening found what is unusual: {found[0]}{more}", remedy)


def screen(output: Path, model: Path, data: str | None, samples: int, seed: int) -> Screened:
    """Screen an artifact.

    Parameters
    ----------
    output : Path
        Its folder; its files are held to its manifest first.
    model : Path
        The float model that it was made from.
    data : str, optional
        Inputs, as of a compile; without them random ones.
    samples : int
        How many at most; as many are drawn beside them.
    seed : int
        Draws inputs and shifts.

    Raises
    ------
    UsageError
        If one of them cannot be read, or the artifact is of another model.
    """
    canonical, plan, backend, files = rewritten(output, model)
    random = np.random.default_rng(seed)
    given, drawn = canaries(canonical, data, samples, random)
    if not weights_of(canonical, plan):
        return Screened(output, (), (), notes=("No weights are codes: there is no grid to look at.",))
    edges, scores = judged(list(edges_of(canonical, plan))), at_scores(canonical)
    runs = Runs(scores, [*given, *drawn])
    shifts, agreed = [], runs.answers()
    for name, grid in grids_of(canonical, plan).items():
        there = runs.noise(rounded(scores, grid, None))
        moved = []
        for _ in range(SHIFTS):
            shifted = rounded(scores, grid, random)
            moved.append(runs.noise(shifted))
            agreed &= runs.agreeing
        shifts.append(shifts_of(name, there, np.array(moved)))
    try:
        answers = answers_of(backend.open(output, files), canonical, given, drawn, agreed)
    except QcompileError as error:
        note = f"The artifact itself was not run: {error.fact}."
        return Screened(output, tuple(edges), tuple(shifts), notes=(note,))
    return Screened(output, tuple(edges), tuple(shifts), answers)


def rewritten(output: Path, model: Path) -> tuple[ir.Model, QuantPlan, Backend, tuple[str, ...]]:
    """Return the float model as it was when it was quantized, the plan, and what opens the artifact."""
    require_whole(output)
    report, plan = read_report(output), read_plan(output / "plan.json")
    source = models.load(model)
    if models.content_hash(source) != report["model"]["sha256"]:
        raise UsageError(model, f"is not the model that {output} was made from", "give that one with --model")
    stored = {key: value for key, value in plan.options.items() if key != COSTS_KEY}
    fields = {**recipe.parse(stored, output / "plan.json", Path()), "target": report["target"], "costs": NO_COSTS}
    target, backend = chosen_target(Options(**fields))
    options = fitting(Options(**fields), target)
    calibrated = any(quant.role is Role.ACTIVATION for quant in plan.tensors.values())
    canonical = driver.canonical_form(target, options, calibrated)(source).model
    canonical = Equivalences(plan.rotation, plan.smoothing).applied(canonical)
    return canonical, plan, backend, tuple(report["files"])


def reround(output: Path, model: Path, seed: int) -> ir.Model:
    """Return the float model with each weight that is a code moved by up to half a step, at random.

    What a weight is rounded to then is drawn, with its float as the mean: no code is the one that somebody chose.

    Parameters
    ----------
    output : Path
        The artifact whose plan has the steps.
    model : Path
        The float model that it was made from.
    seed : int
    """
    canonical, plan, _, _ = rewritten(output, model)
    random = np.random.default_rng(seed)
    for value, quant in weights_of(canonical, plan):
        array, steps = array_of(value), steps_of(value, quant.scales, quant)
        moved = array + (random.random(array.shape, np.float32) - np.float32(0.5)) * steps
        value.const_value = ir.tensor(moved.astype(array.dtype), name=value.name)
    return canonical
