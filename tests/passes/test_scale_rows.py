"""The rest of the fold table: each operator passes factors where it may, and stops them where it may not."""

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

Build = Callable[..., ir.Model]
TEXT, IMAGE = "(float[2,3,8] x) => (y)", "(float[1,8,6,6] x) => (y)"
SHAPES: dict[str, tuple[int, ...]] = {
    "w": (8, 8), "w1": (8, 8), "w2": (8, 8), "wide": (8, 16), "b": (8,), "g": (8,), "var": (8,), "mean": (8,),
    "c": (8, 8, 1, 1), "c1": (8, 8, 1, 1), "stack": (2, 8, 8), "up": (8, 4, 2, 2),
}  # fmt: skip
INTEGERS = {
    "order": [3, 1, 0, 2, 7, 6, 5, 4],
    "last": [-1],
    "zero": [0],
    "one": [1],
    "middle": [1],
    "heads": [0, 0, 2, 4],
    "merged": [0, 0, 8],
}
NUMBERS = {"_epsilon": 0.001, "_two": 2.0}


@pytest.fixture
def built(model_of: Build, random: np.random.Generator) -> Build:
    def build(text: str) -> ir.Model:
        words = set(text.replace(",", " ").replace(")", " ").replace("(", " ").split())
        constants: dict[str, Any] = {name: random.uniform(0.5, 2.0, shape).astype(np.float32)
                                     for name, shape in SHAPES.items() if name in words}  # fmt: skip
        constants |= {name: np.array(numbers, np.int64) for name, numbers in INTEGERS.items() if name in words}
        constants |= {name: np.array(number, np.float32) for name, number in NUMBERS.items() if name in words}
        model = model_of(text, 21, **constants)
        InferShapes()(model)
        FixNames()(model)
        return model

    return build


def group_at(model: ir.Model, name: str) -> ScaleGroup | Refusal:
    every = {str(node.name) for node in model.graph}
    [found] = [pair for pair in linear_readings(model.graph, every) if pair[0].name == name]
    return scale_group(*found, recognise(model.graph), How.FOLD)


FIRES = {
    "decomposed LayerNorm": f"""{TEXT} {{ m = ReduceMean(x, last) d = Sub(x, m) q = Pow(d, _two)
        v = ReduceMean(q, last) a = Add(v, _epsilon) r = Sqrt(a) z = Div(d, r) s = Mul(z, g) n = Add(s, b)
        y = MatMul(n, w) }}""",
    "Identity": f"{TEXT} {{ h = MatMul(x, w) n = Identity(h) y = MatMul(n, w1) }}",
    "Dropout": f"{TEXT} {{ h = MatMul(x, w) n = Dropout(h) y = MatMul(n, w1) }}",
    "Gather of channels": f"{TEXT} {{ h = MatMul(x, w) n = Gather <axis = 2> (h, order) y = MatMul(n, w1) }}",
    "Transpose to channels first": "(float[1,6,8] x) => (y) { h = MatMul(x, w) n = Transpose <perm = [0, 2, 1]> (h) "
    "z = Transpose <perm = [0, 2, 1]> (n) y = MatMul(z, w1) }",
    "some of the tokens too": f"""{TEXT} {{ n = LayerNormalization(x, g, b) t = Slice(n, zero, one, middle)
        f = MatMul(t, w) z = MatMul(n, w1) y = Add(z, f) }}""",
    "sum of three": f"""{TEXT} {{ a = MatMul(x, w) k = MatMul(x, w1) n = Sum(a, k, b) y = MatMul(n, w2) }}""",
    "Abs": f"{TEXT} {{ h = MatMul(x, w) n = Abs(h) y = MatMul(n, w1) }}",
}
READS = {"Transpose to channels first": "z"}


@pytest.mark.parametrize("row", FIRES)
def test_factors_fold(row: str, built: Build, random: np.random.Generator) -> None:
    model = built(FIRES[row])
    name = READS.get(row, "n")
    group = group_at(model, name)
    assert isinstance(group, ScaleGroup) and group.factors == 8, group
    log2 = random.integers(-3, 4, 8).astype(float)
    log2[0] += 1.0 if not log2.any() else 0.0
    other = Smooth({name: ChannelFactors(How.FOLD, tuple(log2))})(model.clone()).model
    assert len(other.graph) == len(model.graph)
    feeds = runtime.synthetic_feeds(model, 0)
    expected, found = (runtime.Session(one, optimize=False).run(feeds)["y"] for one in (model, other))
    np.testing.assert_array_equal(found, expected)


REFUSES = {
    "a norm that others read": (
        f"{TEXT} {{ n = LayerNormalization(x, g, b) h = MatMul(n, w) t = Tanh(n) y = Add(h, t) }}",
        "no factor passes this Tanh",
    ),
    "BatchNormalization that learns": (
        f"""{IMAGE} {{ h = Conv(x, c) n, q, r = BatchNormalization <training_mode = 1> (h, g, b, mean, var)
        y = Conv(n, c1) }}""",
        "no factor passes this BatchNormalization",
    ),
    "a stack of matrices": (
        "(float[2,3,8] x) => (y) { n = MatMul(x, stack) y = MatMul(n, w) }",
        "the channels of this MatMul are not followed",
    ),
    "a ConvTranspose in groups": (
        f"{IMAGE} {{ n = ConvTranspose <group = 2> (x, up) y = Conv(n, c1) }}",
        "the channels of this ConvTranspose are not followed",
    ),
    "a Gemm that transposes what it reads": (
        "(float[8,8] x) => (y) { h = Gemm(x, w) n = Gemm <transA = 1> (h, w1) y = Gemm(n, w2) }",
        "the channels of this Gemm are not followed",
    ),
    "Elu": (f"{TEXT} {{ h = MatMul(x, w) n = Elu(h) y = MatMul(n, w1) }}", "no factor passes this Elu"),
    "Tanh": (f"{TEXT} {{ h = MatMul(x, w) n = Tanh(h) y = MatMul(n, w1) }}", "no factor passes this Tanh"),
    "SiLU": (
        f"{TEXT} {{ h = MatMul(x, w) s = Sigmoid(h) n = Mul(h, s) y = MatMul(n, w1) }}",
        "no factor passes this Sigmoid",
    ),
    "a gate times a gate": (
        f"""{TEXT} {{ a = MatMul(x, w) s = Sigmoid(a) k = MatMul(x, w1) t = Tanh(k) n = Mul(s, t)
        y = MatMul(n, w2) }}""",
        "no factor passes this Sigmoid",
    ),
    "a mean that may be none": (
        f"{TEXT} {{ h = MatMul(x, w) n = ReduceMean <noop_with_empty_axes = 1> (h) y = MatMul(n, w1) }}",
        "what this ReduceMean mixes is not known",
    ),
    "places that are fed": (
        "(float[2,3,8] x, int64[8] at) => (y) { h = MatMul(x, w) n = Gather <axis = 2> (h, at) y = MatMul(n, w1) }",
        "where this Gather moves its elements is not known",
    ),
    "values of a cache": (
        "(float[2,3,8] x, float[2,3,3] p, float[2,3,8] v) => (y) { n = MatMul(p, v) y = MatMul(n, w) }",
        "'v' is fed to the model",
    ),
    "a part of a Concat that is fed": (
        "(float[2,3,8] x, float[2,3,8] v) => (y) { h = MatMul(x, w) n = Concat <axis = 1> (h, v) y = MatMul(n, w1) }",
        "'v' is fed to the model",
    ),
    "another operator's parameters": (
        "(float[2,3,8] x, float[8,8] v) => (y) { n = MatMul(x, v) y = MatMul(n, w1) }",
        "'v' is fed to the model",
    ),
}


@pytest.mark.parametrize("row", REFUSES)
def test_nothing_folds(row: str, built: Build) -> None:
    text, reason = REFUSES[row]
    found = group_at(built(text), "n")
    assert isinstance(found, Refusal), found
    assert found.reason == reason and found.node
