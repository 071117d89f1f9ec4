from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from qcompile.calib.data import Dataset, input_specs
from qcompile.calib.rotations import Scheme
from qcompile.core import model as models
from qcompile.core import numerics, runtime
from qcompile.core.rotation import Site
from qcompile.passes.canonicalize import Canonicalize
from qcompile.passes.rotate import Rotate
from qcompile.passes.rotated_inputs import rotated_inputs
from qcompile.passes.rotations import rotatable
from qcompile.passes.structure import is_linear, node_name
from qcompile.rotation import RotationPlan, plan_rotations

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


@pytest.mark.parametrize("name", ["pre_norm.script14", "vit.dynamo20", "llama.dynamo20", "bottlenecks.script17"])
def test_what_readers_see(name: str) -> None:
    """Rows times weights are what the operators make, whatever norm, γ, β or layout stands between."""
    model = load(name)
    feeds = runtime.synthetic_feeds(model, 2, open_axis=2)
    found = rotatable(model.graph)
    checked = 0
    for site in (*found.streams, *found.values):
        for part in rotated_inputs(site, linear(model)):
            names = [str(part.value.name), *(str(node.outputs[0].name) for node in part.readers)]
            values = runtime.Session(runtime.with_outputs(model, names), optimize=False).run(feeds)
            rows = np.moveaxis({**feeds, **values}[names[0]], part.axis, -1).astype(np.float64)
            rows = rows.reshape(-1, rows.shape[-1])
            if part.norm is not None:
                rows = rows - rows.mean(axis=1, keepdims=True) * (part.norm.kind == "layer")
                rows /= np.sqrt((rows**2).mean(axis=1, keepdims=True) + part.norm.epsilon)
            made, at = rows[:, part.channels] @ part.weights(), 0
            for node in part.readers:
                seen = np.moveaxis(values[str(node.outputs[0].name)], part.axis, -1)
                flat = seen.reshape(-1, seen.shape[-1])
                at += flat.shape[1]
                if len(flat) == len(rows):
                    # A Gemm or Conv has its bias, a norm its β: both are constants.
                    difference = flat - made[:, at - flat.shape[1] : at]
                    assert np.ptp(difference, axis=0).max() < 1e-4 * np.ptp(flat)
                    checked += 1
    # The head of the vision transformer reads one token of several.
    assert checked == {"pre_norm": 6, "vit": 3, "llama": 7, "bottlenecks": 3}[name.partition(".")[0]]
