"""Why single operators became what they are, in plain words, from what a compile wrote."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np

from qcompile.core import numerics
from qcompile.core.errors import UsageError
from qcompile.core.plan import ChannelFactors, How, QuantPlan, Role, TensorQuant
from qcompile.read_report import read_report
from qcompile.stages import read_plan

#: Operators that are named where none was asked for: those that lose most.
MOST = 5
_RUNS = {
    "integer": "runs in integers",
    "weight_only": "computes in float, with weights that are stored as integers",
    "float": "runs in float",
}
_FACTORS = {
    How.FOLD: "divided by factors from {low:.3g} to {high:.3g}, which constants around it take back: no node is added",
    How.RESTORE: "divided by factors from {low:.3g} to {high:.3g}; a Mul gives them back to what cannot take them in",
    How.BRANCH: "divided by factors from {low:.3g} to {high:.3g}, by a Mul in front of the operators that read it",
    How.ASIDE: "read in integers but for {count}, which reach far beyond the others and are multiplied in float",
    How.SPLIT: "split: {count} more share the range of those that reach far",
}


@dataclass(frozen=True)
class Explanation:
    """What became of one operator, and why.

    Parameters
    ----------
    name, op_type : str
    facts : tuple of str
        Sentences.
    """

    name: str
    op_type: str
    facts: tuple[str, ...]


def explain(output: Path, layers: Sequence[str] = ()) -> list[Explanation]:
    """Explain operators of an artifact.

    Parameters
    ----------
    output : Path
        The folder that a compile wrote.
    layers : sequence of str
        Names, or patterns of names as overrides have them; without any, those that lose most.

    Raises
    ------
    UsageError
        If the artifact cannot be read, or a name fits no operator.
    """
    report, plan = read_report(output), read_plan(output / "plan.json")
    operators = {op["name"]: op for op in report["operators"]}
    measured = sorted((op["sqnr"], name) for name, op in operators.items() if op["sqnr"] is not None)
    chosen = dict.fromkeys(name for _, name in measured[:MOST]) if not layers else {}
    for layer in layers:
        found = [name for name in operators if name == layer] or [n for n in operators if fnmatchcase(n, layer)]
        if not found:
            near = difflib.get_close_matches(layer, operators, 1)
            remedy = f"did you mean '{near[0]}'?" if near else "'qcompile inspect MODEL --ops' lists the names"
            raise UsageError(output, f"has no operator '{layer}'", remedy)
        chosen |= dict.fromkeys(found)
    ranks = {name: place for place, (_, name) in enumerate(measured, 1)}
    refusals = report["refusals"]
    return [
        Explanation(name, operators[name]["op_type"], tuple(_facts(operators[name], plan, refusals, ranks)))
        for name in chosen
    ]


def _facts(
    op: Mapping[str, Any], plan: QuantPlan, refusals: Sequence[Mapping[str, str]], ranks: Mapping[str, int]
) -> Iterator[str]:
    kernel = f", by {op['kernel']}" if op["kernel"] else ""
    reason = f": {op['reason']}" if op["reason"] else ""
    yield f"It {_RUNS[op['precision']]}{kernel}{reason}."
    for name in op["reads"]:
        quant = plan.tensors[name]
        yield _weight(name, quant, plan) if quant.role is Role.WEIGHT else _activation(name, quant)
        if name in plan.smoothing:
            yield _smoothing(name, plan.smoothing[name])
    if any(one.node == op["name"] for one in plan.rotation.inputs):
        yield "Its input is multiplied by an orthogonal matrix first, which its weight takes back."
    if op["sqnr"] is not None:
        place = f"number {ranks[op['name']]} from below of {len(ranks)} that were measured"
        yield f"Its result has {op['sqnr']:.1f} dB against float, with all error gathered up to it: {place}."
    for refusal in refusals:
        if refusal["node"] == op["name"]:
            yield f"{refusal['stage']} left it alone: {refusal['reason']}."


def _weight(name: str, quant: TensorQuant, plan: QuantPlan) -> str:
    scales = np.asarray(quant.scale)
    if quant.block_size:
        of = f"in blocks of {quant.block_size}"
    elif quant.axis is None:
        of = f"with one scale, {scales[0]:.3g}"
    else:
        of = f"with {scales.size} scales along axis {quant.axis}, from {scales.min():.3g} to {scales.max():.3g}"
    bits = plan.allocation.get("bits", {}).get(name)
    chosen = f"; {bits} bits were chosen for it by the integer program" if bits else ""
    return f"Its weight '{name}' is {quant.dtype} {of}{chosen}."


def _activation(name: str, quant: TensorQuant) -> str:
    if quant.is_dynamic:
        return f"It reads '{name}' as {quant.dtype} in the range of each run's own values."
    low, high = numerics.code_range(quant.dtype)
    scale, zero = quant.scale[0], quant.zero_point[0]
    reach = f"{scale * (low - zero):.4g} to {scale * (high - zero):.4g}"
    return f"It reads '{name}' as {quant.dtype} in steps of {scale:.3g}, which is the range {reach}."


def _smoothing(name: str, chosen: ChannelFactors) -> str:
    if chosen.how is How.NONE:
        return f"As to the channels of '{name}': {chosen.reason}."
    factors = chosen.factors if chosen.log2 else np.ones(1)
    shifted = " shifted, then" if chosen.shift else ""
    what = _FACTORS[chosen.how].format(low=factors.min(), high=factors.max(), count=len(chosen.channels))
    return f"The channels of '{name}' are{shifted} {what}."
