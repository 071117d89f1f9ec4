"""Passes in random orders leave the function as it is, and what is declared not to matter leaves the bytes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pass_orders
import planted_bugs
import pytest
from planted_models import SUBJECTS

from qcompile.core import model as models
from qcompile.core import runtime
from qcompile.core.target import Target
from qcompile.passes.canonicalize import Canonicalize

EXPORTS = Path(__file__).parent.parent / "passes/exports"


def of_exports(name: str) -> tuple[ir.Model, list[dict[str, np.ndarray]]]:
    model = models.load(EXPORTS / f"{name}.onnx")
    return model, [dict(runtime.synthetic_feeds(model, seed, open_axis=2)) for seed in range(pass_orders.MEASURED_ON)]


def of_subject(name: str) -> tuple[ir.Model, list[dict[str, np.ndarray]]]:
    subject = SUBJECTS[name]()
    samples = [{key: array[index].astype(np.float32) for key, array in subject.data.items()} for index in range(4)]
    return models.from_proto(subject.proto), samples


@pytest.mark.parametrize("name", ["pre_norm.script14", "llama.dynamo20", "vit.script14", "bottlenecks.dynamo20"])
def test_exports(cpu: Target, name: str) -> None:
    tally = pass_orders.tried(*of_exports(name), rounds=4, seed=1, target=cpu)
    assert tally.broken == [] and tally.orders == 4 and tally.applied > 4


@pytest.mark.parametrize("name", ["images", "post-norm", "feed-forward", "sensor"])
def test_small_models(cpu: Target, name: str) -> None:
    tally = pass_orders.tried(*of_subject(name), rounds=4, seed=2, target=cpu)
    assert tally.broken == [] and tally.orders == 4


def test_bytes_are_compared_where_something_is_quantized(cpu: Target) -> None:
    assert pass_orders.tried(*of_subject("feed-forward"), rounds=0, seed=0, target=cpu).same == 3


def test_a_pass_that_is_wrong_is_seen(cpu: Target) -> None:
    bug = next(one for one in planted_bugs.BUGS if one.what == "a matrix not transposed for who reads the stream")
    with planted_bugs.planted(bug) as runs:
        tally = pass_orders.tried(*of_exports("pre_norm.script14"), rounds=4, seed=1, target=cpu)
    assert runs[0] and tally.broken and "moved output" in tally.broken[0]


def test_bytes_that_differ_are_seen(model_of) -> None:
    tally = pass_orders.Tally()
    one = model_of("(float[2] x) => (float[2] y) { y = Relu (x) }")
    other = model_of("(float[2] x) => (float[2] y) { y = Abs (x) }")
    pass_orders._compare("nothing", one, other, tally)
    assert tally.broken == ["the order of nothing changes bytes"] and not tally.same


def test_each_kind_is_drawn(cpu: Target) -> None:
    model, _ = of_exports("pre_norm.script14")
    canonical = Canonicalize(21)(model).model
    kinds = {type(pass_).__name__ for pass_ in pass_orders.deck(canonical, np.random.default_rng(0))}
    assert kinds >= {"Canonicalize", "Rotate", "RotateInputs", "Smooth"}
    split, _ = of_subject("feed-forward")
    canonical = Canonicalize(21)(split).model
    kinds = {type(pass_).__name__ for pass_ in pass_orders.deck(canonical, np.random.default_rng(0))}
    assert "Split" in kinds
