"""Shift: what takes z off a tensor's channels gives it back, without a node more, or says what is in the way."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest

from qcompile.core import runtime
from qcompile.core.contract import Refusal
from qcompile.core.plan import ChannelFactors, How
from qcompile.passes import structure
from qcompile.passes.canonicalize import Canonicalize
from qcompile.passes.patterns import recognise
from qcompile.passes.shift import Shift
from qcompile.passes.smooth import Smooth

Build = Callable[..., ir.Model]

#: A post-norm block in double: the norm feeds two products and the residual that meets another branch's bias.
BLOCK = """(double[2,3,8] x) => (double[2,3,8] y, double[2,3,4] v) {
    n = LayerNormalization(x, g, b) h = MatMul(n, w) k = Add(h, b1) t = Tanh(k) o = MatMul(t, w2) z = Add(b2, o)
    s = Add(z, n) y = LayerNormalization(s, g, b3) c = MatMul(n, w4) v = Add(c, b4) }"""


def build(model_of: Build, random: np.random.Generator, text: str = BLOCK) -> ir.Model:
    square = {name: random.normal(size=(8, 8)) for name in ("w", "w2")}
    vectors = {name: random.uniform(0.5, 1.5, 8) for name in ("g", "b", "b1", "b2", "b3")}
    every = {**square, **vectors, "w4": random.normal(size=(8, 4)), "b4": random.normal(size=4), "two": np.float64(2.0)}
    model = model_of(text, 17, **{name: array for name, array in every.items() if name in text})
    Canonicalize(21)(model)
    return model


def value(model: ir.Model, name: str) -> ir.Value:
    return next(v for node in model.graph for v in node.outputs if v.name == name)


def shift(model: ir.Model, z: np.ndarray) -> Refusal | None:
    found = Shift(value(model, "n"), z, {norm.result: norm for norm in recognise(model.graph).norms})
    if (obstacle := found.obstacle()) is None:
        found.apply()
    return obstacle


def outputs(model: ir.Model) -> list[np.ndarray]:
    feeds = {"x": np.random.default_rng(1).normal(size=model.graph.inputs[0].shape.numpy())}
    return list(runtime.Session(model, optimize=False).run(feeds).values())


@pytest.mark.parametrize("text", [
    BLOCK,
    BLOCK.replace("s = Add(z, n)", "m = Mul(n, two) s = Add(m, z)"),
    BLOCK.replace("s = Add(z, n)", "m = Mul(g, n) s = Add(m, z)"),
    BLOCK.replace("s = Add(z, n)", "p = Add(n, b1) s = Add(p, z)"),
])  # fmt: skip
def test_the_same_function_to_the_digits_of_a_double(model_of: Build, random: np.random.Generator, text: str) -> None:
    model, z = build(model_of, random, text), random.normal(size=8)
    expected, nodes, beta = outputs(model), len(model.graph), structure.constant(model.graph.initializers["b"])
    assert beta is not None and shift(model, z) is None
    for found, before in zip(outputs(model), expected, strict=True):
        np.testing.assert_allclose(found, before, rtol=1e-12, atol=1e-12)
    assert len(model.graph) == nodes
    np.testing.assert_array_equal(structure.constant(model.graph.initializers["b"]), beta - z)


def test_a_gemm_takes_it_in(model_of: Build, random: np.random.Generator) -> None:
    text = """(double[3,8] x) => (double[3,4] y) {
        n = Gemm(x, w, b1) y = Gemm<transB = 1>(n, w4, b4) }"""
    weights = {"w": random.normal(size=(8, 8)), "b1": random.normal(size=8)}
    model = model_of(text, 17, **weights, w4=random.normal(size=(4, 8)), b4=random.normal(size=4))
    Canonicalize(21)(model)
    (expected,) = outputs(model)
    assert shift(model, random.normal(size=8)) is None
    np.testing.assert_allclose(outputs(model)[0], expected, rtol=1e-12, atol=1e-12)


def test_a_constant_that_others_read_stays_as_it_is(model_of: Build, random: np.random.Generator) -> None:
    model = build(model_of, random, BLOCK.replace("LayerNormalization(s, g, b3)", "LayerNormalization(s, g, b)"))
    before, beta = outputs(model), structure.constant(model.graph.initializers["b"])
    assert shift(model, random.normal(size=8)) is None
    np.testing.assert_allclose(outputs(model)[0], before[0], rtol=1e-12, atol=1e-12)
    np.testing.assert_array_equal(structure.constant(model.graph.initializers["b"]), beta)


@pytest.mark.parametrize(("text", "why"), [
    (BLOCK.replace("LayerNormalization(x, g, b)", "LayerNormalization(x, g)"), "no constant is added"),
    (BLOCK.replace("Add(b2, o)", "Identity(o)"), "LayerNormalization reads it"),
    (BLOCK.replace("h = MatMul(n, w)", "r = Relu(n) h = MatMul(r, w)"), "Relu reads it"),
    (BLOCK.replace("k = Add(h, b1)", "k = Identity(h)"), "Tanh reads it"),
    (BLOCK.replace("h = MatMul(n, w)", "h = Mul(n, x)"), "another activation"),
    (BLOCK.replace("v = Add(c, b4)", "u = Transpose<perm=[0,2,1]>(x) e = MatMul(n, u) q = ReduceSum(e) v = Add(c, q)"),
     "constant weights"),
    (BLOCK.replace("double[2,3,4] v", "double[2,3,4] v, double[2,3,8] n"), "output of the model"),
])  # fmt: skip
def test_what_takes_nothing_back_refuses(model_of: Build, random: np.random.Generator, text: str, why: str) -> None:
    model = build(model_of, random, text)
    before = outputs(model)
    obstacle = shift(model, random.normal(size=8))
    assert obstacle is not None and why in obstacle.reason
    for found, expected in zip(outputs(model), before, strict=True):
        np.testing.assert_array_equal(found, expected)


def test_shifted_in_front_of_the_division(model_of: Build, random: np.random.Generator) -> None:
    """A plan shifts the norm's channels and divides what is left, which the residual gets back through a Mul."""
    model = build(model_of, random)
    log2, z = tuple(map(float, random.integers(-3, 4, 8))), tuple(map(float, random.normal(size=8)))
    expected = outputs(model)
    result = Smooth({"n": ChannelFactors(How.RESTORE, log2, shift=z)})(model.clone())
    assert result.modified and not result.refusals
    for found, before in zip(outputs(result.model), expected, strict=True):
        np.testing.assert_allclose(found, before, rtol=1e-12, atol=1e-12)
    beta = structure.constant(model.graph.initializers["b"])
    assert beta is not None
    np.testing.assert_allclose(
        structure.constant(result.model.graph.initializers["b"]), (beta - z) / np.exp2(log2), rtol=1e-14
    )


def test_shifted_without_division(model_of: Build, random: np.random.Generator) -> None:
    model, z = build(model_of, random), tuple(map(float, random.normal(size=8)))
    expected = outputs(model)
    result = Smooth({"n": ChannelFactors(How.NONE, reason="even", shift=z)})(model.clone())
    assert result.modified and [refusal.reason for refusal in result.refusals] == ["even"]
    np.testing.assert_allclose(outputs(result.model)[0], expected[0], rtol=1e-12, atol=1e-12)


def test_a_plan_whose_shift_does_not_fit_is_refused(model_of: Build, random: np.random.Generator) -> None:
    model = build(model_of, random, BLOCK.replace("Add(b2, o)", "Identity(o)"))
    result = Smooth({"n": ChannelFactors(How.NONE, reason="even", shift=(1.0,) * 8)})(model.clone())
    assert any("not shifted" in refusal.reason for refusal in result.refusals)


def test_a_shift_is_kept_in_a_plan() -> None:
    chosen = ChannelFactors(How.FOLD, (1.0, -2.0), shift=(0.5, -0.25))
    assert ChannelFactors.from_json(chosen.as_json()) == chosen
    entry = {**chosen.as_json(), "shift": [float("nan"), 0.0]}
    with pytest.raises(ValueError, match="number"):
        ChannelFactors.from_json(entry)
