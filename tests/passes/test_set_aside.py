from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest

from qcompile.core import model as models
from qcompile.core import runtime
from qcompile.core.plan import ChannelFactors, How
from qcompile.passes.canonicalize import Canonicalize
from qcompile.passes.smooth import Smooth, adds_nodes

Build = Callable[..., ir.Model]
BODY = "(float[2,3,8] x) => (float[2,3,4] y) { t = Tanh(x) h = MatMul(t, w) y = Add(h, b) }"
MISSING = "it has 8 channels, not those that are to be set aside"
ASIDE = ChannelFactors(How.ASIDE, channels=(1, 6), low=-0.25, high=0.5)


@pytest.fixture
def built(model_of: Build, random: np.random.Generator) -> Build:
    def build(text: str) -> ir.Model:
        model = model_of(text, 17, **{
            name: random.normal(size=shape).astype(np.float32)
            for name, shape in {"w": (8, 4), "w1": (8, 4), "b": (4,), "c": (4, 8, 1, 1)}.items() if f"{name})" in text
        })  # fmt: skip
        Canonicalize(21)(model)
        return model

    return build


def outputs(model: ir.Model, seed: int = 0) -> np.ndarray:
    return runtime.Session(model).run(runtime.synthetic_feeds(model, seed))["y"]


def test_channels_are_read_in_float_beside_the_others(built: Build) -> None:
    """The function stays the same on all inputs: the bounds touch only what has no weights left."""
    model = built(BODY)
    before = models.serialize(model)
    result = Smooth({"t": ASIDE})(model.clone())
    assert result.modified and result.refusals == () and adds_nodes({"t": ASIDE})
    assert models.serialize(model) == before
    for seed in range(3):
        np.testing.assert_allclose(outputs(result.model, seed), outputs(model, seed), rtol=1e-5, atol=1e-6)
    # Tanh, Min, Max, MatMul and bias; Gather and MatMul in float; their sum.
    assert len(result.model.graph) == len(model.graph) + 5


def test_what_is_read_as_codes_has_the_range_of_the_others(built: Build) -> None:
    model = Smooth({"t": ASIDE})(built(BODY)).model
    [codes] = [node.inputs[0] for node in model.graph if node.op_type == "MatMul" and node.inputs[1].name == "w"]
    feeds = runtime.synthetic_feeds(model, 0)
    found = runtime.Session(runtime.with_outputs(model, [codes.name, "t"])).run(feeds)
    others = [0, 2, 3, 4, 5, 7]
    np.testing.assert_array_equal(found[codes.name][..., others], found["t"][..., others])
    assert found[codes.name][..., [1, 6]].max() <= 0.5 and found[codes.name][..., [1, 6]].min() >= -0.25
    weight = model.graph.initializers["w"].const_value.numpy()
    assert not weight[[1, 6]].any() and weight[others].all()


def test_all_readers_get_the_channels_back(built: Build) -> None:
    text = "(float[2,3,8] x) => (float[2,3,4] y) { t = Tanh(x) h = MatMul(t, w) k = MatMul(t, w1) y = Add(h, k) }"
    model = built(text)
    result = Smooth({"t": ASIDE})(model.clone())
    np.testing.assert_allclose(outputs(result.model), outputs(model), rtol=1e-5, atol=1e-6)
    assert sum(node.op_type == "Gather" for node in result.model.graph) == 1


def test_a_value_that_others_read_stays_as_it_was(built: Build) -> None:
    model = built("(float[2,3,8] x) => (float[2,3,4] y, t) { t = Tanh(x) h = MatMul(t, w) y = Add(h, b) }")
    result = Smooth({"t": ASIDE})(model.clone())
    expected, found = (runtime.Session(one).run(runtime.synthetic_feeds(model, 0)) for one in (model, result.model))
    np.testing.assert_array_equal(found["t"], expected["t"])
    np.testing.assert_allclose(found["y"], expected["y"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("text", "chosen", "reason"),
    [
        ("(float[1,8,4,4] x) => (y) { t = Tanh(x) y = Conv(t, c) }", ASIDE, "another operator than MatMul reads it"),
        ("(float[3,8] x) => (y) { t = Tanh(x) y = MatMul(t, w) }", ASIDE, "it has no axis of tokens"),
        (BODY, ChannelFactors(How.ASIDE, channels=(8,), high=1.0), MISSING),
        (BODY, ChannelFactors(How.ASIDE, high=1.0), MISSING),
    ],
)  # fmt: skip
def test_what_cannot_be_set_aside_is_refused(built: Build, text: str, chosen: ChannelFactors, reason: str) -> None:
    model = built(text)
    before = models.serialize(model)
    result = Smooth({"t": chosen})(model)
    assert [refusal.reason for refusal in result.refusals] == [reason]
    assert models.serialize(model) == before
