"""Factors of queries and their reciprocals on keys: through a product of two activations, along what it sums over."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from qcompile.core import runtime
from qcompile.core.contract import Refusal
from qcompile.core.plan import ChannelFactors, How
from qcompile.passes.canonicalize.fix_names import FixNames
from qcompile.passes.canonicalize.infer_shapes import InferShapes
from qcompile.passes.patterns import recognise
from qcompile.passes.scale_groups import ScaleGroup, linear_readings, scale_group
from qcompile.passes.smooth import Smooth

Array = np.ndarray[Any, np.dtype[Any]]
Build = Callable[..., ir.Model]

SHAPES = {"w": (8, 8), "w1": (8, 8), "w2": (8, 8), "w3": (8, 8), "wide": (8, 24), "tall": (24, 8), "g": (8,), "b": (8,)}
INTEGERS = {
    "heads": [0, 0, 2, 4], "six": [0, 0, 6, 4], "merged": [0, 0, 8], "two": [2], "shared": [1, 1, 3, 1, 1],
    "flat": [2, 6, 3, 4], "_0": [0], "_4": [4], "_8": [8], "last": [-1],
}  # fmt: skip
NUMBERS = {"_half": 0.5}

TEXT = "(float[2,3,8] x) => (y)"
#: The queries n; what they are for, and a linear operator that reads them as well.
SCORES = "p = Softmax(a) v = MatMul(n, w2) y = MatMul(p, v)"
TURNED = """{0}a = Slice({0}, _0, _4, last) {0}b = Slice({0}, _4, _8, last) {0}n = Neg({0}b)
    {0}h = Concat <axis = -1> ({0}n, {0}a) {0}c = Mul({0}, cos) {0}s = Mul({0}h, sin) {0}r = Add({0}c, {0}s)"""
ROPE = f"""(float[2,3,8] x, float[3,8] cos, float[3,8] sin) => (y) {{ n = MatMul(x, w) k = MatMul(x, w1)
    {TURNED.format("n")} {TURNED.format("k")} t = Transpose <perm = [0,2,1]> (kr) a = MatMul(nr, t) {SCORES} }}"""
HEADS = """{0}h = Reshape({0}, heads) {0}t = Transpose <perm = {1}> ({0}h)"""
FIRES = {
    "queries": f"""{TEXT} {{ n = MatMul(x, w) k = MatMul(x, w1) t = Transpose <perm = [0,2,1]> (k) a = MatMul(n, t)
        {SCORES} }}""",
    "keys": f"""{TEXT} {{ q = MatMul(x, w) n = MatMul(x, w1) t = Transpose <perm = [0,2,1]> (n) a = MatMul(q, t)
        {SCORES} }}""",
    "with biases": f"""{TEXT} {{ h = MatMul(x, w) n = Add(h, g) m = MatMul(x, w1) k = Add(m, b)
        t = Transpose <perm = [0,2,1]> (k) a = MatMul(n, t) {SCORES} }}""",
    "heads, and a scale in between": f"""{TEXT} {{ n = MatMul(x, w) k = MatMul(x, w1)
        {HEADS.format("n", "[0,2,1,3]")} {HEADS.format("k", "[0,2,3,1]")} c = Mul(nt, _half)
        s = MatMul(c, kt) a = Div(s, _half) p = Softmax(a) v = MatMul(n, w2) {HEADS.format("v", "[0,2,1,3]")}
        o = MatMul(p, vt) u = Transpose <perm = [0,2,1,3]> (o) y = Reshape(u, merged) }}""",
    "keys that are no projection": f"""{TEXT} {{ n = LayerNormalization(x, g, b) q = MatMul(n, w)
        t = Transpose <perm = [0,2,1]> (n) a = MatMul(q, t) {SCORES} }}""",
}  # fmt: skip


@pytest.fixture
def built(model_of: Build, random: np.random.Generator) -> Build:
    def build(text: str) -> ir.Model:
        words = set(text.replace(",", " ").replace(")", " ").replace("(", " ").split())
        constants: dict[str, Array] = {name: random.uniform(-1.0, 1.0, shape).astype(np.float32)
                                       for name, shape in SHAPES.items() if name in words}  # fmt: skip
        constants |= {name: np.array(numbers) for name, numbers in INTEGERS.items() if name in words}
        constants |= {name: np.array(number, np.float32) for name, number in NUMBERS.items() if name in words}
        model = model_of(text, 21, **constants)
        InferShapes()(model)
        FixNames()(model)
        return model

    return build


def group_at(model: ir.Model, name: str = "n") -> ScaleGroup | Refusal:
    every = {str(node.name) for node in model.graph}
    [found] = [pair for pair in linear_readings(model.graph, every) if pair[0].name == name]
    return scale_group(*found, recognise(model.graph), How.FOLD)


def outputs(model: ir.Model) -> Array:
    return runtime.Session(model, optimize=False).run(runtime.synthetic_feeds(model, 3))["y"]


def smoothed(model: ir.Model, group: ScaleGroup, random: np.random.Generator, steps: int = 1) -> ir.Model:
    """Return the model with random powers of two, or parts of them, folded into it."""
    log2 = np.append(0.0, random.integers(1, 4 * steps, group.factors) / steps)
    of_channels = log2[np.abs(group.classes)] * np.sign(group.classes)
    result = Smooth({str(group.root.name): ChannelFactors(How.FOLD, tuple(map(float, of_channels)))})(model.clone())
    assert result.modified and result.refusals == () and len(result.model.graph) == len(model.graph)
    return result.model


@pytest.mark.parametrize("row", FIRES)
def test_keys_take_the_reciprocal(row: str, built: Build, random: np.random.Generator) -> None:
    model = built(FIRES[row])
    group = group_at(model)
    assert isinstance(group, ScaleGroup) and group.factors == 8, group
    assert any((fold.classes < 0).any() for fold in group.folds)
    np.testing.assert_array_equal(outputs(smoothed(model, group, random)), outputs(model))
    np.testing.assert_allclose(outputs(smoothed(model, group, random, 8)), outputs(model), rtol=1e-4, atol=1e-5)


def test_queries_that_share_keys_share_factors(built: Build, random: np.random.Generator) -> None:
    """Three query heads to each of two heads of keys (Ainslie et al. 2023)."""
    model = built(f"""{TEXT} {{ n = MatMul(x, wide) nh = Reshape(n, six) nt = Transpose <perm = [0,2,1,3]> (nh)
        k = MatMul(x, w) {HEADS.format("k", "[0,2,1,3]")} ku = Unsqueeze(kt, two) ke = Expand(ku, shared)
        kr = Reshape(ke, flat) kk = Transpose <perm = [0,1,3,2]> (kr) a = MatMul(nt, kk) s = ReduceSum(a)
        z = MatMul(n, tall) y = Add(z, s) }}""")  # fmt: skip
    group = group_at(model)
    assert isinstance(group, ScaleGroup) and group.classes.size == 24 and group.factors == 8
    heads = group.classes.reshape(6, 4)
    assert (heads[:3] == heads[0]).all() and (heads[3:] == heads[3]).all() and (heads[0] != heads[3]).all()
    np.testing.assert_array_equal(outputs(smoothed(model, group, random)), outputs(model))


def test_rotated_pairs_share_factors(built: Build, random: np.random.Generator) -> None:
    """Rotary embeddings turn channel j with channel j + 4 (Su et al. 2021)."""
    model = built(ROPE)
    group = group_at(model)
    assert isinstance(group, ScaleGroup) and group.factors == 4
    np.testing.assert_array_equal(group.classes[:4], group.classes[4:])
    np.testing.assert_array_equal(outputs(smoothed(model, group, random)), outputs(model))
    unlike = Smooth({"n": ChannelFactors(How.FOLD, (0.0, 1.0, 2.0, 3.0, 4.0, 1.0, 2.0, 3.0))})(model.clone())
    assert not unlike.modified
    assert [one.reason for one in unlike.refusals] == ["channels that are scaled together have different factors"]


def test_channels_that_are_queries_and_keys_are_reciprocal(built: Build, random: np.random.Generator) -> None:
    """One projection whose first half are the queries and whose second half the keys."""
    model = built(f"""{TEXT} {{ n = MatMul(x, w) q = Slice(n, _0, _4, last) k = Slice(n, _4, _8, last)
        t = Transpose <perm = [0,2,1]> (k) a = MatMul(q, t) {SCORES} }}""")
    group = group_at(model)
    assert isinstance(group, ScaleGroup) and group.factors == 4
    np.testing.assert_array_equal(group.classes[:4], -group.classes[4:])
    np.testing.assert_array_equal(outputs(smoothed(model, group, random)), outputs(model))
    np.testing.assert_allclose(outputs(smoothed(model, group, random, 8)), outputs(model), rtol=1e-4, atol=1e-5)


REFUSES = {
    "another reader of the queries": (
        f"""{TEXT} {{ n = MatMul(x, w) k = MatMul(x, w1) t = Transpose <perm = [0,2,1]> (k) a = MatMul(n, t)
        p = Softmax(a) v = MatMul(n, w2) o = MatMul(p, v) r = Tanh(n) y = Add(o, r) }}""",
        "no factor passes this Tanh",
    ),
    "another reader of the keys": (
        f"""{TEXT} {{ n = MatMul(x, w) k = MatMul(x, w1) t = Transpose <perm = [0,2,1]> (k) a = MatMul(n, t)
        p = Softmax(a) v = MatMul(n, w2) o = MatMul(p, v) r = Sigmoid(k) y = Add(o, r) }}""",
        "no factor passes this Sigmoid",
    ),
    "keys of a cache": (
        "(float[2,3,8] x, float[2,8,5] t) => (y) { n = MatMul(x, w) a = MatMul(n, t) s = ReduceSum(a) "
        "v = MatMul(n, w2) y = Add(v, s) }",
        "'t' is fed to the model",
    ),
    "weights of the keys that are read elsewhere": (
        f"""{TEXT} {{ n = MatMul(x, w) k = MatMul(x, w1) t = Transpose <perm = [0,2,1]> (k) a = MatMul(n, t)
        p = Softmax(a) v = MatMul(n, w2) o = MatMul(p, v) r = MatMul(o, w1) y = Tanh(r) }}""",
        "its weights 'w1' are read elsewhere too",
    ),
    "a constant in front": (
        "(float[2,8,8] x) => (y) { n = MatMul(x, w) a = MatMul(w1, n) r = Tanh(a) v = MatMul(n, w2) y = Add(v, r) }",
        "no factor passes this Tanh",
    ),
    "a constant that sums channels": (
        """(float[2,8,3] x) => (y) { t = Transpose <perm = [0,2,1]> (x) n = MatMul(t, w)
        u = Transpose <perm = [0,2,1]> (n) a = MatMul(w1, u) s = ReduceSum(a) v = MatMul(n, w2) y = Add(v, s) }""",
        "its first factor is constant",
    ),
    "products with itself": (
        f"""{TEXT} {{ n = MatMul(x, w) t = Transpose <perm = [0,2,1]> (n) a = MatMul(n, t) {SCORES} }}""",
        "it cannot be scaled apart from what shares its channels",
    ),
    "a vector": (
        "(float[2,3,8] x, float[8] k) => (y) { n = MatMul(x, w) a = MatMul(n, k) s = ReduceSum(a) v = MatMul(n, w2) "
        "y = Add(v, s) }",
        "it multiplies by a vector",
    ),
    "a product whose result is scaled too": (
        """(float[2,8,8] x) => (y) { n = MatMul(x, w) k = MatMul(x, w1) a = MatMul(n, k) z = Add(a, n)
        v = MatMul(z, w2) u = MatMul(n, w3) y = Add(u, v) }""",
        "both of its factors would be scaled",
    ),
}  # fmt: skip


@pytest.mark.parametrize("row", REFUSES)
def test_no_factor_goes_to_the_keys(row: str, built: Build) -> None:
    text, reason = REFUSES[row]
    found = group_at(built(text))
    assert isinstance(found, Refusal), found
    assert found.reason == reason and found.node
