"""Apply random passes in random orders, and see whether the function stays; write docs/pass-orders.md.

    python benchmarks/pass_orders.py [--cache DIR] [--models NAME...] [--rounds 12] [--seed 0]

Each round draws some of what can be done to a model in float: each stream and each attention's values rotated, each
group of channels divided by random factors, in each way that the graph allows, each activation split that can be, what
products read rotated in front of them, and the clean-up once more. A pass may stand anywhere where its contract lets
it: one whose `requires` refuses the model is left out, and what it refuses by itself is left alone. The outputs are
held to the float model's as a compile holds them, with those of a split model in its place where one is among them,
since splitting alone is no exact equivalence.

Orders that are declared not to matter are held to the last byte: of a plan's tensors, and of codes and corrections that
were measured before.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from qcompile import verify
from qcompile.calib.collect import collect
from qcompile.calib.data import Dataset, Sample, input_specs, open_data
from qcompile.calib.observers import Observer
from qcompile.core import model as models
from qcompile.core.contract import Effect, Pass, Rewritten
from qcompile.core.errors import VerificationError
from qcompile.core.orthogonal import Orthogonal
from qcompile.core.plan import ChannelFactors, How, QuantPlan
from qcompile.core.rotation import InputRotation
from qcompile.core.target import Target
from qcompile.job import chosen_target
from qcompile.options import NO_COSTS, Options
from qcompile.passes import structure
from qcompile.passes.allocate_bits import allocate_bits
from qcompile.passes.canonicalize import Canonicalize
from qcompile.passes.correct_bias import CorrectBias, correctable
from qcompile.passes.insert_qdq import InsertQdq
from qcompile.passes.patterns import recognise
from qcompile.passes.place import place
from qcompile.passes.rotate import Rotate, spread_evenly
from qcompile.passes.rotate_inputs import RotateInputs, obstacle
from qcompile.passes.rotations import rotatable
from qcompile.passes.round_weights import RoundWeights, roundable
from qcompile.passes.scale_groups import ScaleGroup, linear_readings, scale_group
from qcompile.passes.smooth import Smooth
from qcompile.passes.split import Split, Splittable, splittable

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs/pass-orders.md"
#: Samples that each order is run on, and those that ranges are measured on.
HELD_ON, MEASURED_ON = 2, 4
#: The most of one kind that is drawn for a model.
MOST = 12
HEAD = """# Passes in other orders

Written by `python benchmarks/pass_orders.py`; do not edit. Random passes, each with random choices, were applied to
each model in random orders, wherever their contracts let them ([passes.md](passes.md#orders) has what that says), and
the outputs held to the float model's: max\\|Δ\\| / max\\|y\\| of {bound:g} at most. The last column counts the orders
that are declared not to matter and gave the same bytes, of three; none where nothing is quantized.

*By rounding*: an order moved the outputs further, but not with factors that are whole powers of two in the place of its
own. These change no digit of the weights; the others round each to float32's last, which is what that model magnifies.

| model | choices | orders | passes applied | refused by contract | worst error | same bytes |
|---|---|---|---|---|---|---|
"""


@dataclass
class Tally:
    """What came of a model's orders.

    Parameters
    ----------
    choices : int
        Passes that could be drawn.
    orders, applied, illegal : int
    worst : float
        Largest max|Δ| / max|y|.
    broken : list of str
        Orders that moved the outputs further than they may, or what differed in its bytes.
    same : int
        Pairs of orders that gave the same bytes.
    rounding : list of float
        Errors beyond the bound that are none with factors that change no digit.
    """

    choices: int = 0
    orders: int = 0
    applied: int = 0
    illegal: int = 0
    worst: float = 0.0
    broken: list[str] = field(default_factory=list)
    same: int = 0
    rounding: list[float] = field(default_factory=list)


def rotations(model: ir.Model, seed: int) -> Iterator[Pass]:
    """Yield a pass for each stream and each attention's values."""
    for rotation in spread_evenly(rotatable(model.graph).places, seed):
        yield Rotate((rotation,))


def smoothings(model: ir.Model, random: np.random.Generator) -> Iterator[Pass]:
    """Yield a pass for each tensor that linear operators read, in a way that its graph allows."""
    every = {structure.node_name(node) for node in model.graph}
    patterns = recognise(model.graph)
    for value, axis in linear_readings(model.graph, every):
        ways = [how for how in (How.FOLD, How.RESTORE, How.BRANCH)
                if isinstance(scale_group(value, axis, patterns, how), ScaleGroup)]  # fmt: skip
        if not ways:
            continue
        how = ways[int(random.integers(len(ways)))]
        group = scale_group(value, axis, patterns, how)
        assert isinstance(group, ScaleGroup)
        log2 = np.concatenate([[0.0], random.integers(-16, 17, group.factors) / 8.0])
        factors = log2[np.abs(group.classes)] * np.sign(group.classes)
        yield Smooth({structure.name_of(value): ChannelFactors(how, tuple(map(float, factors)))})


def splits(model: ir.Model, random: np.random.Generator) -> Iterator[Pass]:
    """Yield a pass for each activation that can be split."""
    found = {activation.result: activation for activation in recognise(model.graph).activations}
    for value in found:
        place_ = splittable(value, found)
        if isinstance(place_, Splittable):
            channels = random.integers(0, place_.projection.width, 3)
            chosen = ChannelFactors(How.SPLIT, (1.0,) * 3, channels=tuple(map(int, channels)), high=4.0)
            yield Split({structure.name_of(value): chosen})


def input_rotations(model: ir.Model, seed: int) -> Iterator[Pass]:
    """Yield a pass for each product whose input can be rotated in front of it."""
    for node in model.graph:
        if obstacle(node):
            continue
        width = (structure.input_of(node, 0).shape or (0,))[-1]
        block = 1
        while isinstance(width, int) and width % (2 * block) == 0 and block < 64:
            block *= 2
        if block > 1:
            yield RotateInputs((InputRotation(structure.node_name(node), Orthogonal.spreading(block, seed)),))


def deck(model: ir.Model, random: np.random.Generator) -> list[Pass]:
    """Return what a round draws from: at most so many of each kind, and the clean-up."""
    seed = int(random.integers(1000))
    kinds = rotations(model, seed), smoothings(model, random), splits(model, random), input_rotations(model, seed)
    found: list[Pass] = [Canonicalize(models.opset(model))]
    for kind in kinds:
        passes = list(kind)
        some = random.permutation(len(passes))[:MOST]
        found += [passes[index] for index in some]
    return found


def in_order(model: ir.Model, passes: Sequence[Pass], tally: Tally) -> tuple[ir.Model, list[Pass]]:
    """Apply passes one behind the other to a copy, and tell which splits were done.

    What a contract refuses is left out.
    """
    model, splits_done = model.clone(), list[Pass]()
    for pass_ in passes:
        try:
            result = pass_(model)
        except ir.passes.PreconditionError:
            tally.illegal += 1
            continue
        tally.applied += bool(result.modified)
        splits_done += [pass_] if isinstance(pass_, Split) and result.modified else []
        model = result.model
    return model, splits_done


def told(passes: Sequence[Pass]) -> str:
    """Return an order in words."""
    return " → ".join(type(pass_).__name__ for pass_ in passes)


def float_orders(
    reference: ir.Model, canonical: ir.Model, samples: Sequence[Sample], rounds: int, random: np.random.Generator
) -> Tally:
    """Draw orders, and hold each to the float model."""
    tally, expected = Tally(), verify.outputs_of(reference, samples)
    for _ in range(rounds):
        passes = deck(canonical, random)
        tally.choices = max(tally.choices, len(passes))
        drawn = [passes[index] for index in random.permutation(len(passes))[: int(random.integers(1, len(passes) + 1))]]
        tally.orders += 1
        try:
            tally.worst = max(tally.worst, _error(canonical, drawn, samples, expected, tally))
        except VerificationError as broken:
            try:
                _error(canonical, [_in_powers(pass_) for pass_ in drawn], samples, expected, Tally())
            except VerificationError:
                tally.broken.append(str(broken))
                continue
            found = _outputs(canonical, drawn, samples)
            tally.rounding.append(verify.check_equivalence(told(drawn), Effect.LOSSY, expected, found))
    return tally


def _error(
    canonical: ir.Model, drawn: Sequence[Pass], samples: Sequence[Sample], expected: Sequence[Any], tally: Tally
) -> float:
    """Return how far an order moves the outputs; one with splits, from those of the splits alone."""
    model, split = in_order(canonical, drawn, tally)
    wanted = _outputs(canonical, split, samples) if split else expected
    return verify.check_equivalence(told(drawn), Effect.CLOSE, wanted, verify.outputs_of(model, samples))


def _outputs(canonical: ir.Model, passes: Sequence[Pass], samples: Sequence[Sample]) -> list[Any]:
    return verify.outputs_of(in_order(canonical, passes, Tally())[0], samples)


def _in_powers(pass_: Pass) -> Pass:
    """Return a smoothing by whole powers of two, which change no digit of what they multiply; others as they are."""
    if not isinstance(pass_, Smooth):
        return pass_
    return Smooth({name: replace(one, log2=tuple(float(round(log2)) for log2 in one.log2))
                   for name, one in pass_.smoothing.items()})  # fmt: skip


def byte_orders(canonical: ir.Model, samples: Sequence[Sample], target: Target, tally: Tally) -> None:
    """Apply what is declared not to depend on its order in both, and compare bytes."""
    placement = place(canonical, target, True, True)
    data = Dataset("samples", lambda: samples, input_specs(canonical))
    seen = collect(canonical, placement.activations, data, lambda items, *_: items)
    plan = allocate_bits(canonical, placement, seen, target, dict.fromkeys(placement.activations, Observer.MINMAX))
    if not plan.tensors:
        return
    inserted = InsertQdq(plan)(canonical.clone()).model
    turned = QuantPlan.from_json(json.dumps({**json.loads(plan.to_json()), "tensors": _backwards(plan)}))
    _compare("a plan's tensors", inserted, InsertQdq(turned)(canonical.clone()).model, tally)
    operators, _ = roundable(canonical, inserted, plan)
    codes = {name: _moved(inserted.graph.initializers[name]) for name in operators}
    names, _ = correctable(inserted, plan, target)
    widths = {structure.node_name(node): node for node in canonical.graph}
    corrections = {name: (0.0625,) * _channels(widths[name]) for name in names}
    both: list[Callable[[ir.Model], Any]] = [RoundWeights(codes), CorrectBias(corrections)]
    _compare("RoundWeights and CorrectBias", _chain(inserted, both), _chain(inserted, both[::-1]), tally)
    backwards = [RoundWeights(dict(reversed(codes.items()))), CorrectBias(dict(reversed(corrections.items())))]
    _compare("codes and corrections", _chain(inserted, both), _chain(inserted, backwards), tally)


def _backwards(plan: QuantPlan) -> dict[str, Any]:
    tensors = json.loads(plan.to_json())["tensors"]
    return dict(reversed(tensors.items()))


def _moved(value: ir.Value) -> Any:
    array = value.const_value.numpy()  # type: ignore[union-attr]
    return np.clip(array.astype(np.int64) + (np.arange(array.size).reshape(array.shape) % 3 - 1), -127, 127).astype(
        array.dtype
    )


def _channels(node: ir.Node) -> int:
    weights = structure.constant(node.inputs[structure.WEIGHT_INPUT])
    assert weights is not None
    groups = node.attributes.get_int("group", 1) if node.op_type == "ConvTranspose" else 1
    return int(weights.shape[structure.weight_axis(node)]) * groups


def _chain(model: ir.Model, passes: Sequence[Callable[[ir.Model], Any]]) -> ir.Model:
    model = model.clone()
    for pass_ in passes:
        result = pass_(model)
        assert isinstance(result, Rewritten | ir.passes.PassResult)
        model = result.model
    return model


def _compare(what: str, one: ir.Model, other: ir.Model, tally: Tally) -> None:
    if models.serialize(one) == models.serialize(other):
        tally.same += 1
    else:
        tally.broken.append(f"the order of {what} changes bytes")


def tried(model: ir.Model, data: Sequence[Sample], rounds: int, seed: int, target: Target) -> Tally:
    """Try a model: float passes in random orders, then the orders that are declared not to matter."""
    canonical = Canonicalize(target.opset, widen=True)(model.clone()).model
    tally = float_orders(model, canonical, data[:HELD_ON], rounds, np.random.default_rng(seed))
    byte_orders(canonical, data[:MEASURED_ON], target, tally)
    return tally


def row(name: str, tally: Tally) -> str:
    """Return a row of the page."""
    worst = "; ".join(tally.broken) if tally.broken else f"{tally.worst:.1e}"
    worst += "".join(f"; {error:.1e} by rounding" for error in tally.rounding)
    return (f"| {name} | {tally.choices} | {tally.orders} | {tally.applied} | {tally.illegal} | {worst} | "
            f"{tally.same} |")  # fmt: skip


def catalogue(cache: Path, names: Sequence[str]) -> Iterator[tuple[str, Path, Path]]:
    """Yield the models of a folder that `models/fetch.py` filled, with their calibration data."""
    for folder in sorted(cache.iterdir()):
        data = next((folder / name for name in ("calib.npz", "calib") if (folder / name).exists()), None)
        if (folder / "model.onnx").exists() and data is not None and (not names or folder.name in names):
            yield folder.name, folder / "model.onnx", data


def main() -> None:
    """Try the models and write the page."""
    parsed = argparse.ArgumentParser(description="Apply passes in random orders.")
    parsed.add_argument("--cache", type=Path, default=Path.home() / ".cache/qcompile/models")
    parsed.add_argument("--models", nargs="*", default=[], help="those alone; else all that are there")
    parsed.add_argument("--rounds", type=int, default=12)
    parsed.add_argument("--seed", type=int, default=0)
    given = parsed.parse_args()
    target, _ = chosen_target(Options(target="cpu", costs=NO_COSTS))
    rows, broken = [], 0
    for name, path, place_ in catalogue(given.cache, given.models):
        model = models.load(path)
        data = open_data(str(place_), input_specs(model))
        samples = [sample for sample, _ in zip(data, range(MEASURED_ON), strict=False)]
        tally = tried(model, samples, given.rounds, given.seed, target)
        rows.append(row(name, tally))
        broken += len(tally.broken)
        print(rows[-1], flush=True)
    PAGE.write_text(HEAD.format(bound=verify.CLOSE_BOUND[4]) + "\n".join(rows) + "\n")
    raise SystemExit(6 if broken else 0)


if __name__ == "__main__":
    main()
