from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from qcompile import equivalence
from qcompile.backends.base import find_target
from qcompile.calib.data import Dataset, input_specs
from qcompile.calib.rotations import Scheme
from qcompile.core import model as models
from qcompile.core import numerics, runtime
from qcompile.core.orthogonal import Orthogonal
from qcompile.core.plan import ChannelFactors, How, Precision
from qcompile.core.rotation import InputRotation, Rotations, Site
from qcompile.decision import choose_operators
from qcompile.equivalence import NOTHING, Equivalences
from qcompile.options import Options
from qcompile.override import Override
from qcompile.passes.canonicalize import Canonicalize
from qcompile.passes.patterns import recognise
from qcompile.passes.rotate import Rotate, spread_evenly
from qcompile.passes.rotate_inputs import obstacle
from qcompile.passes.rotations import rotatable
from qcompile.passes.scale_groups import ScaleGroup, linear_readings, scale_group
from qcompile.passes.structure import is_linear, node_name
from qcompile.rotation import RotationPlan, input_operators, plan_inputs, plan_rotations
from qcompile.smoothing import Candidate

EXPORTS = Path(__file__).parent / "passes" / "exports"
Planned = Callable[..., RotationPlan]


def load(name: str, loud: bool = False) -> ir.Model:
    """Load an export; loud: one channel of its stream is a hundred times the others, as in large transformers."""
    model = models.load(EXPORTS / f"{name}.onnx")
    Canonicalize(21)(model)
    if loud:
        [node] = [node for node in model.graph if node.op_type == "Gather" and node.inputs[0].is_initializer()]
        table = node.inputs[0]
        array = np.array(table.const_value.numpy())
        array[:, 3] *= 100
        table.const_value = ir.tensor(array, name=table.name)
    return model


def data_of(model: ir.Model, count: int = 4) -> Dataset:
    samples = [runtime.synthetic_feeds(model, seed, open_axis=4) for seed in range(count)]
    return Dataset("synthetic", lambda: samples, input_specs(model))


def linear(model: ir.Model) -> set[str]:
    return {node_name(node) for node in model.graph if is_linear(node)}


def planned(model: ir.Model, integers: set[str] | None = None, **options: object) -> RotationPlan:
    before = models.serialize(model)
    found = plan_rotations(
        model, linear(model) if integers is None else integers, data_of(model), lambda items, *_: items, **options
    )
    assert models.serialize(model) == before, "planning leaves the graph as it is"
    return found


@pytest.mark.parametrize("name", ["pre_norm.dynamo20", "llama.script14"])
def test_a_loud_channel_is_worth_a_rotation(name: str) -> None:
    model = load(name, loud=True)
    plan = planned(model, scheme=Scheme(6, 8))
    [rotation] = [rotation for rotation in plan.rotations if rotation.place.site is Site.STREAM]
    noise = plan.noise[rotation.place]
    assert min(noise["hadamard"], noise["learned"]) < 0.8 * noise["none"]
    result = Rotate(plan.rotations, plan.refusals)(model.clone()).model
    feeds = runtime.synthetic_feeds(model, 9, open_axis=2)
    before, after = (next(iter(runtime.Session(m, optimize=False).run(feeds).values())) for m in (model, result))
    assert numerics.relative_error(before, after) < 1e-5


def test_what_gains_nothing_is_refused_with_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qcompile.rotation.WORTH", 0.0)
    plan = planned(load("bottlenecks.script17"), steps=0)
    [place] = plan.noise
    assert plan.rotations == ()
    [refusal] = plan.refusals
    assert refusal.node == place.node
    assert refusal.reason.startswith("it is not rotated: what reads it in integers is at ")
    assert f"{numerics.decibel(1.0, plan.noise[place]['none']):.1f} dB" in refusal.reason


def test_operators_in_float_do_not_count() -> None:
    model = load("pre_norm.dynamo20", loud=True)
    plan = planned(model, integers=set())
    assert plan.rotations == () and plan.noise == {}
    assert {refusal.reason for refusal in plan.refusals} == {"it is not rotated: nothing reads it in integers"}


def test_only_what_may_be_rotated() -> None:
    plan = planned(load("llama.script14", loud=True), sites=(Site.VALUES,), steps=0)
    assert {place.site for place in plan.noise} == {Site.VALUES}


def test_obstacles_are_passed_on() -> None:
    plan = planned(load("post_norm.script14"), steps=0)
    assert any("γ is on the way" in refusal.reason for refusal in plan.refusals)


def three_products(last: float = 1.0) -> ir.Model:
    """Build three products in a row; single numbers in front of each are made louder, least in front of the last."""
    random = np.random.default_rng(3)
    text = """(float[1,40,64] x) => (float[1,40,8] y) {
        a = Mul (x, p) b = MatMul (a, u) c = Mul (b, q) d = MatMul (c, v) e = Mul (d, r) y = MatMul (e, w) }"""
    model = ir.from_onnx_text(f'<ir_version: 10, opset_import: ["": 21]> g {text}')
    shapes = {"u": (64, 64), "v": (64, 64), "w": (64, 8), "p": (40, 64), "q": (40, 64), "r": (40, 64)}
    arrays = {name: random.normal(0, 0.125, shape) for name, shape in shapes.items()}
    for name, loud in (("p", 60.0), ("q", 30.0), ("r", last)):
        arrays[name] = np.ones((40, 64))
        arrays[name][::4, random.integers(0, 64)] = loud
    for name, array in arrays.items():
        value = ir.Value(name=name, const_value=ir.tensor(array.astype(np.float32), name=name))
        model.graph.register_initializer(value)
        for node in model.graph:
            for index, read in enumerate(node.inputs):
                if read is not None and read.name == name:
                    node.replace_input_with(index, value)
    Canonicalize(21)(model)
    return model


def test_products_stand_where_they_save_most_first() -> None:
    model = three_products()
    operators = input_operators(model, linear(model))
    assert [node.inputs[1].name for node in operators] == ["u", "v", "w"]
    most, least = plan_inputs(model, operators, data_of(model), lambda items, *_: items)
    names = [node_name(node) for node in operators]
    assert [rotation.node for rotation in most] == names[:2] and least == most[:1]
    assert {(rotation.matrix.width, rotation.matrix.block) for rotation in most} == {(32, 32)}


def test_a_product_that_gains_little_is_tried_with_all_others() -> None:
    """By 1.5 dB in the operator: what that is worth is for the outputs to say."""
    model = three_products(last=3.0)
    operators = input_operators(model, linear(model))
    every, *fewer = plan_inputs(model, operators, data_of(model), lambda items, *_: items)
    assert [rotation.node for rotation in every] == [node_name(node) for node in operators]
    assert all(len(some) < 3 for some in fewer) and fewer


@pytest.mark.parametrize(
    ("noise", "expected", "alpha", "tried"),
    [
        # All of them help, most with another α; fewer are not tried then.
        ({(2, None): 3.0, (2, 0.65): 2.0, (1, None): 1.0}, 2, 0.65, [(2, None), (2, 0.65)]),
        # All are too many.
        ({(2, None): 9.0, (2, 0.65): 9.0, (1, None): 4.0}, 1, None, [(2, None), (2, 0.65), (1, None)]),
        ({(2, None): 9.0, (2, 0.65): 9.0, (1, None): 9.0}, 0, None, [(2, None), (2, 0.65), (1, None)]),
    ],
)
def test_products_are_tried_all_with_each_alpha_before_fewer(
    monkeypatch: pytest.MonkeyPatch,
    noise: dict[tuple[int, float | None], float],
    expected: int,
    alpha: float | None,
    tried: list[tuple[int, float | None]],
) -> None:
    planned = tuple(InputRotation(name, Orthogonal.spreading(32)) for name in "ab")
    options = SimpleNamespace(smoothing="none", rotation="auto")
    search = equivalence._Search(SimpleNamespace(options=options, track=None), None, {}, None)
    fold = Candidate((How.FOLD,))
    search.__dict__.update(steps=[NOTHING, fold, replace(fold, alpha=0.65)], judge=SimpleNamespace(fit=None))
    seen = []

    def outcome(_: object, candidate: Any) -> Any:
        key = len(candidate.inputs), candidate.smoothing.alpha
        seen.append(key)
        value = noise.get(key, {(): 8.0}.get(candidate.smoothing.kinds, 5.0 + (candidate.smoothing.alpha or 0.0)))
        error = SimpleNamespace(total=0.0)
        return SimpleNamespace(error=error, value=value, beats=lambda other: value < other.value)

    for name, stub in (
        ("_outcome", outcome), ("_operators", lambda *_: ["a", "b"]), ("_built", lambda *_: (None, None)),
        ("_same", lambda _, one, other: one == other),
    ):  # fmt: skip
        monkeypatch.setattr(equivalence._Search, name, stub)
    monkeypatch.setattr(equivalence, "plan_inputs", lambda *_: (planned, planned[:1]))
    best = search._best(())
    assert (len(best.inputs), best.smoothing.alpha) == (expected, alpha)
    assert [key for key in seen if key[0]] == tried


def test_an_override_is_not_meant_for_products() -> None:
    model = three_products()
    inputs = tuple(InputRotation(name, Orthogonal.spreading(32)) for name in sorted(linear(model)))
    chosen = Equivalences(Rotations(inputs=inputs))
    result = chosen.applied(model)
    options = Options("cpu", overrides=(Override(op_type="MatMul", weights="int8"),))
    target = replace(find_target("cpu")[0], costs=None)
    ops = choose_operators(result, target, options, True, chosen.kept(result)).ops
    for rotation in inputs:
        assert ops[rotation.node].precision is Precision.INTEGER
        assert ops[f"{rotation.node}_rotated"].precision is Precision.FLOAT


def test_operators_without_products() -> None:
    model = three_products()
    assert input_operators(model, set()) == []
    assert plan_inputs(model, [], data_of(model), lambda items, *_: items) == ()


@pytest.mark.parametrize("name", ["llama.script14", "pre_norm.script14", "vit.dynamo20"])
def test_rotated_then_smoothed_then_rotated_it_is_the_same_function(name: str) -> None:
    """All three passes behind one another, factors from random numbers."""
    model, random = load(name), np.random.default_rng(5)
    rotated = Equivalences(Rotations(spread_evenly(rotatable(model.graph).places))).applied(model)
    patterns, smoothing = recognise(rotated.graph), {}
    for value, axis in linear_readings(rotated.graph, linear(rotated)):
        group = scale_group(value, axis, patterns, How.FOLD)
        if isinstance(group, ScaleGroup) and group.root is value:
            factors = np.r_[0.0, random.integers(-3, 4, group.classes.max())]
            smoothing[str(value.name)] = ChannelFactors(How.FOLD, tuple(map(float, factors[group.classes])))
    nodes = [node for node in rotated.graph if is_linear(node) and not obstacle(node)]
    widths = [int(node.inputs[0].shape[-1]) for node in nodes]
    inputs = tuple(
        InputRotation(node_name(node), Orthogonal.spreading(width, 1, block=4))
        for node, width in zip(nodes, widths, strict=True)
    )
    chosen = Equivalences(Rotations(spread_evenly(rotatable(model.graph).places), inputs), smoothing)
    result = chosen.applied(model)
    assert Equivalences.from_json(json.loads(json.dumps(chosen.to_json()))) == chosen
    assert smoothing and len(result.graph) > len(rotated.graph)
    assert set(chosen.kept(result)) == {f"{name}_rotated" for name in (rotation.node for rotation in inputs)}
    feeds = runtime.synthetic_feeds(model, 9, open_axis=2)
    before, after = (next(iter(runtime.Session(m, optimize=False).run(feeds).values())) for m in (model, result))
    assert numerics.relative_error(before, after) < 1e-4
