from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest

from qcompile.core import model as models
from qcompile.core import runtime
from qcompile.core.plan import ChannelFactors, How
from qcompile.passes import structure
from qcompile.passes.canonicalize import Canonicalize
from qcompile.passes.smooth import Smooth, adds_nodes

Build = Callable[..., ir.Model]

#: A post-norm block: QKV fold into the norm but for its residual, V folds into what reads it, GELU's reader does not.
BLOCK = """(float[2,3,8] x) => (float[2,3,8] y) {
    n = LayerNormalization(x, g, b) h = MatMul(n, w) k = Add(h, b1) r = Relu(k) o = MatMul(r, w1)
    t = Tanh(o) z = MatMul(t, w2) s = Add(z, n) y = LayerNormalization(s, g, b) }"""


@pytest.fixture
def block(model_of: Build, random: np.random.Generator) -> ir.Model:
    weights = {name: random.normal(size=(8, 8)).astype(np.float32) for name in ("w", "w1", "w2")}
    vectors = {name: random.uniform(0.5, 1.5, 8).astype(np.float32) for name in ("g", "b", "b1")}
    model = model_of(BLOCK, 17, **weights, **vectors)
    Canonicalize(21)(model)
    return model


def name_behind(model: ir.Model, op_type: str) -> str:
    return str(next(node.outputs[0].name for node in model.graph if node.op_type == op_type))


def factors(how: How, random: np.random.Generator, width: int = 8) -> ChannelFactors:
    return ChannelFactors(how, tuple(map(float, random.integers(-4, 5, width))))


def outputs(model: ir.Model) -> np.ndarray:
    return runtime.Session(model, optimize=False).run(runtime.synthetic_feeds(model, 3))["y"]


def test_all_ways_at_once(block: ir.Model, random: np.random.Generator) -> None:
    chosen = {
        name_behind(block, "LayerNormalization"): factors(How.RESTORE, random),
        name_behind(block, "Relu"): factors(How.FOLD, random),
        name_behind(block, "Tanh"): factors(How.BRANCH, random),
    }
    before = models.serialize(block)
    result = Smooth(chosen)(block.clone())
    assert result.modified and result.refusals == ()
    assert models.serialize(block) == before
    np.testing.assert_array_equal(outputs(result.model), outputs(block))
    assert len(result.model.graph) - len(block.graph) == 2 and adds_nodes(chosen)
    norms = [node for node in result.model.graph if node.op_type == "LayerNormalization"]
    last = structure.constant(norms[1].inputs[1])
    np.testing.assert_array_equal(last, structure.constant(block.graph.initializers["g"]), "the other norm keeps its γ")


def test_the_same_factors_give_the_same_bytes(block: ir.Model, random: np.random.Generator) -> None:
    chosen = {name_behind(block, "Tanh"): factors(How.BRANCH, random)}
    assert models.serialize(Smooth(chosen)(block.clone()).model) == models.serialize(
        Smooth(chosen)(block.clone()).model
    )


def test_inverse_factors_undo_a_fold(block: ir.Model, random: np.random.Generator) -> None:
    name, chosen = name_behind(block, "Relu"), factors(How.FOLD, random)
    there = Smooth({name: chosen})(block.clone()).model
    back = Smooth({name: ChannelFactors(How.FOLD, tuple(-number for number in chosen.log2))})(there.clone()).model
    for key, value in block.graph.initializers.items():
        np.testing.assert_array_equal(value.const_value.numpy(), back.graph.initializers[key].const_value.numpy())


def test_nothing_to_do_changes_nothing(block: ir.Model) -> None:
    before = models.serialize(block)
    result = Smooth({})(block)
    assert not result.modified and result.refusals == () and models.serialize(block) == before


@pytest.mark.parametrize(
    ("op_type", "chosen", "reason"),
    [
        ("Relu", ChannelFactors(How.NONE, reason="because"), "because"),
        ("Tanh", ChannelFactors(How.FOLD, (1.0,) * 8), "no factor passes this Tanh"),
        ("Relu", ChannelFactors(How.FOLD, (1.0,) * 7), "it has 8 channels, not the 7 that have factors"),
        ("Add", ChannelFactors(How.FOLD, (1.0,) * 8), "no linear operator with constant weights reads it"),
    ],
)
def test_what_does_not_fit_is_refused(block: ir.Model, op_type: str, chosen: ChannelFactors, reason: str) -> None:
    name, before = name_behind(block, op_type), models.serialize(block)
    result = Smooth({name: chosen})(block)
    assert [refusal.reason for refusal in result.refusals] == [reason] and not result.modified
    assert models.serialize(block) == before


def test_factors_of_channels_that_are_one_must_be_equal(model_of: Build, random: np.random.Generator) -> None:
    model = model_of(
        "(float[2,3,8] x) => (y) { h = MatMul(x, w) r = Reshape(h, s) m = ReduceMean <axes = [2]> (r) "
        "e = Expand(m, f) n = Reshape(e, t) y = MatMul(n, w1) }",
        17, w=random.normal(size=(8, 8)).astype(np.float32), w1=random.normal(size=(8, 8)).astype(np.float32),
        s=np.array([0, 0, 2, 4]), f=np.array([2, 3, 2, 4]), t=np.array([0, 0, 8]),
    )  # fmt: skip
    Canonicalize(21)(model)
    name = str([node for node in model.graph if node.op_type == "MatMul"][-1].inputs[0].name)
    uneven = ChannelFactors(How.FOLD, tuple(map(float, range(8))))
    even = ChannelFactors(How.FOLD, (0.0, 1.0, 2.0, 3.0) * 2)
    assert Smooth({name: uneven})(model.clone()).refusals[0].reason.startswith("channels that are scaled together")
    result = Smooth({name: even})(model.clone())
    assert result.refusals == ()
    np.testing.assert_array_equal(outputs(result.model), outputs(model))
