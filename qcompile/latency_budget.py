"""What a budget of time buys: operators go back to float, those first whose codes add most noise for their time."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

import onnx_ir as ir

from qcompile.budget import Budget
from qcompile.calib.sensitivity import Choice
from qcompile.core.errors import BudgetError
from qcompile.core.execution import execute
from qcompile.core.plan import Precision
from qcompile.passes import structure
from qcompile.passes.place import Placement, Wish
from qcompile.passes.place_by_cost import Source, quietest_in_float
from qcompile.pricing import WORST, Pricer

#: So often the program's budget is moved by what its prices are off, and how near to the budget is near enough.
ATTEMPTS, NEAR = 6, 0.01


def quietest(
    pricer: Pricer,
    original: ir.Model,
    choice: Choice,
    spared: Mapping[str, Wish],
    weights: Mapping[str, float],
    text: str,
) -> dict[str, Wish]:
    """Return what to wish for, beside what is spared, so that noise is least within a budget of time.

    The program's prices are sums over operators; what it finds is held against the kernels that the runtime makes of
    it, and its budget moved by the difference.

    Parameters
    ----------
    pricer : Pricer
    original : onnx_ir.Model
        As it came in: what float takes.
    choice : Choice
        What was measured with all that is not spared in integers.
    spared : mapping of str to Wish
    weights : mapping of str to float
        By node name, noise over signal at the outputs with that operator's weights alone in codes.
    text : str
        The budget, as `Budget` reads it.

    Raises
    ------
    BudgetError
        If the fastest placement takes longer.
    """
    placement = pricer.placed(spared)
    whole = pricer.table.mean(execute(original, pricer.samples))
    limit = Budget.parse(text, "--max-latency").of(whole)
    least = pricer.latency(placement, choice.dynamic)
    if least > limit:
        fact = f"cannot be met: the fastest placement is expected to take {least / whole:.2f}x, {least / 1e3:.3g} ms"
        raise BudgetError(f"--max-latency {text}", fact, "give a larger budget")
    integers = [name for name, op in placement.ops.items() if op.precision is Precision.INTEGER and not op.reason]
    # Weights of all in float would be read by kernels that round activations; beside integers they are unpacked.
    unpacked = {name: replace(wish, wide=True) for name, wish in _wishes(pricer, placement, integers, "").items()}
    everywhere = pricer.placed({**spared, **unpacked})
    prices = pricer.prices(pricer.kernels(everywhere)[0], pricer.kernels(placement, choice.dynamic)[0])
    sources = _sources(pricer.model, placement, choice, weights)
    aim, best, quiet = limit - pricer.latency(everywhere), dict[str, Wish](), _noise(sources, ())
    for _ in range(ATTEMPTS):
        found = quietest_in_float(pricer.model, placement, prices, sources, aim) or set()
        reason = f"its noise is paid for by --max-latency {text}"
        wishes = _wishes(pricer, placement, sorted(found), reason)
        wishes |= pricer.spoilt(wishes, weights)
        left = limit - pricer.latency(pricer.placed({**spared, **wishes}), choice.dynamic)
        if left >= 0.0 and (noise := _noise(sources, found)) < quiet:
            best, quiet = wishes, noise
        if 0.0 <= left < NEAR * limit:
            break
        aim += left
    return best


def _sources(model: ir.Model, placement: Placement, choice: Choice, weights: Mapping[str, float]) -> list[Source]:
    """Return what adds noise: tensors, as long as codes of theirs are read or written, and operators' weights."""
    values = ir.convenience.create_value_mapping(model.graph)
    same: dict[str, list[str]] = {}
    for name, source in placement.same_scale.items():
        same.setdefault(source, []).append(name)
    found = []
    for name, noise in choice.alone.items():
        names = [name, *same.get(name, ())]
        nodes = [structure.node_name(node) for one in names for node in structure.readers(values[one])]
        nodes += [node for node, op in placement.ops.items() if op.output in names]
        found.append(Source(min(noise, WORST), tuple(dict.fromkeys(nodes))))
    return [*found, *(Source(min(noise, WORST), (node,)) for node, noise in weights.items())]


def _noise(sources: Collection[Source], in_float: Collection[str]) -> float:
    return sum(source.noise for source in sources if not set(source.operators) <= set(in_float))


def _wishes(pricer: Pricer, placement: Placement, names: Collection[str], reason: str) -> dict[str, Wish]:
    """Return what to wish for so that these operators, and the activations that they absorb, are in float."""
    return {
        node: Wish(Precision.WEIGHT_ONLY, reason)
        for group in pricer.groups(placement, names).values()
        for node in group
    }


def noisiest(alone: Mapping[str, float], noise: float, bound: float) -> list[str]:
    """Return the fewest tensors without which noise should be within a bound; none where it is, or nothing tells.

    Parameters
    ----------
    alone : mapping of str to float
        Noise over signal with one tensor quantized.
    noise, bound : float
        With all of them, and what it may be.
    """
    left, total = noise, sum(alone.values())
    found: list[str] = []
    for name in sorted(alone, key=lambda name: -alone[name]):
        if not left > bound or total <= 0.0:
            break
        found.append(name)
        left -= noise * alone[name] / total
    return found
