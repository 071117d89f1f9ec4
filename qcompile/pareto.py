"""The Pareto front: for each size of the file, the bits of weights that lose least; each point is a plan.

What weights lose was measured once; the integer program (`allocation.py`) is solved for one budget of bytes after the
other. Nothing is run here: the decibels are those that are expected, by losses that add up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx_ir as ir

from qcompile import artifact
from qcompile.allocation import Widths, program_of
from qcompile.backends.base import Backend
from qcompile.calibration import Calibration
from qcompile.core.errors import UsageError
from qcompile.core.plan import QuantPlan
from qcompile.core.target import Target
from qcompile.decision import planner, told
from qcompile.front_picture import draw
from qcompile.options import Options
from qcompile.passes.read_plan import is_quantized
from qcompile.weight_losses import EIGHT, FOUR

#: Raised when the meaning of front.json changes; docs/schemas/front.schema.json describes this version.
SCHEMA_VERSION = 1
#: Budgets, from all weights in the fewest bits to all in the most.
POINTS = 24
#: The folder in an artifact.
FOLDER = "pareto"


@dataclass(frozen=True)
class Front:
    """The choices that nothing beats in both bytes and noise, and what they are held against.

    Parameters
    ----------
    points : sequence of (Widths, QuantPlan)
        From the smallest file to the largest, each expected to lose less than those before it.
    uniform : mapping of int to Widths
        By bits, what comes of all weights in so many.
    chosen : Widths
        What was compiled.
    float_bytes : int
        What the model's file takes in float.
    """

    points: Sequence[tuple[Widths, QuantPlan]]
    uniform: Mapping[int, Widths]
    chosen: Widths
    float_bytes: int

    def as_json(self) -> dict[str, Any]:
        """Return the content of front.json."""
        return {
            "schema_version": SCHEMA_VERSION,
            "float_bytes": self.float_bytes,
            "points": [
                {"plan": _plan_name(index), **self._row(widths)} for index, (widths, _) in enumerate(self.points, 1)
            ],
            "uniform": {str(bits): self._row(widths) for bits, widths in self.uniform.items()},
            "chosen": self._row(self.chosen),
        }

    def _row(self, widths: Widths) -> dict[str, Any]:
        whole = widths.as_json()
        return {
            "bytes": whole["bytes"],
            "size": round(widths.bytes / self.float_bytes, 4),
            "sqnr": whole["sqnr"],
            "gap": whole["gap"],
            "weights": len(widths.bits),
            "in_four_bits": sum(bits == FOUR for bits in widths.bits.values()),
        }


def require_choice(canonical: ir.Model, calibrated: bool) -> None:
    """Refuse a front where there is none to be had.

    Parameters
    ----------
    canonical : onnx_ir.Model
    calibrated : bool
        Whether there are data.

    Raises
    ------
    UsageError
    """
    if is_quantized(canonical):
        fact = "has nothing to choose: the model came in quantized, so that its weights have their bits"
        raise UsageError("--pareto", fact, "give the float model, or leave it out")
    if not calibrated:
        raise UsageError("--pareto", "needs to measure what weights lose, which takes data", "give --data")


def sweep(
    canonical: ir.Model, calibration: Calibration, target: Target, backend: Backend, options: Options, plan: QuantPlan
) -> Front:
    """Choose the bits of weights for sizes from the smallest to the largest.

    Parameters
    ----------
    canonical : onnx_ir.Model
    calibration : Calibration
    target : Target
    backend : Backend
    options : Options
    plan : QuantPlan
        What was decided by them: the chosen point.

    Raises
    ------
    UsageError
        If what weights lose was not measured.
    """
    # A point stands for itself: it was chosen by its own budget, not by that of the compile.
    options = replace(options, weights="mixed", max_size=None)
    planned = planner(canonical, calibration, target, options)
    # All points by what is expected, though the chosen one may have been run.
    program = program_of(canonical, replace(calibration, tried={}), planned, backend, options)
    chosen = {name: FOUR if plan.tensors[name].bits < EIGHT else EIGHT for name in program.numbers}
    return Front(
        [(widths, told(planned, widths, calibration, options)) for widths in undominated(program.front(POINTS))],
        {bits: program.of(dict.fromkeys(program.numbers, bits)) for bits in (EIGHT, FOUR)},
        program.of(chosen, float(plan.allocation.get("gap", 0.0))),
        calibration.float_bytes,
    )


def undominated(found: Sequence[Widths]) -> list[Widths]:
    """Return what is expected to lose less than all that is no larger, from the smallest to the largest."""
    kept = list[Widths]()
    for widths in sorted(found, key=lambda one: (one.bytes, one.noise)):
        if not kept or widths.noise < kept[-1].noise:
            kept.append(widths)
    return kept


def write(folder: Path, front: Front, title: str) -> dict[str, Any]:
    """Write the front into a folder: front.json, which is returned, pictures, and a plan per point."""
    folder.mkdir(exist_ok=True)
    content = front.as_json()
    for index, (_, plan) in enumerate(front.points, 1):
        (folder / _plan_name(index)).write_text(plan.to_json(), encoding="utf-8")
    artifact.write_json(folder / "front.json", content)
    picture = draw(title, content)
    (folder / "front.svg").write_text(picture.svg(), encoding="utf-8")
    (folder / "front.png").write_bytes(picture.png())
    return content


def _plan_name(index: int) -> str:
    return f"plan-{index:02d}.json"
