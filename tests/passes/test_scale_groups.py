"""Where factors fold, row by row of docs/smoothing.md, and where they do not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcompile.core import model as models
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

#: Shapes of the constants that the models below name.
SHAPES = {
    "w": (8, 8), "w1": (8, 8), "w2": (8, 8), "w3": (8, 8), "wide": (8, 24), "narrow": (8, 4), "t": (8, 8),
    "b": (8,), "b1": (8,), "g": (8,), "v": (8,), "v3": (24,), "slope": (8, 1, 1), "table": (20, 8),
    "c": (8, 3, 3, 3), "c1": (8, 8, 1, 1), "c2": (8, 8, 3, 3), "d": (8, 1, 3, 3), "grouped": (8, 4, 1, 1),
    "up": (8, 4, 2, 2), "mean": (8,), "half": (4,),
}  # fmt: skip
NUMBERS = {
    "heads": [0, 0, 2, 4], "merged": [0, 0, 8], "last": [-1], "space": [2, 3], "zero": [0],
    "eight": [8], "two": [2], "pads": [0, 0, 1, 1, 0, 0, 1, 1], "thirds": [8, 8, 8],
    "_lengths": [1, 1, 2, 2], "_two": 2, "_epsilon": 0.001, "_zero": 0, "_half": 0.5, "_six": 6,
    "_root": 2**0.5, "_one": 1,
}  # fmt: skip


@pytest.fixture
def built(model_of: Build, random: np.random.Generator) -> Build:
    def build(text: str) -> ir.Model:
        words = set(text.replace(",", " ").replace(")", " ").replace("(", " ").split())
        constants: dict[str, Array] = {
            name: random.uniform(0.5, 2.0, shape).astype(np.float32) * random.choice([-1, 1], shape).astype(np.float32)
            for name, shape in SHAPES.items() if name in words
        }  # fmt: skip
        constants |= {name: np.abs(constants[name]) for name in ("var", "mean") if name in constants}
        constants |= {
            name: np.array(numbers, np.int64 if name[0] != "_" else np.float32)
            for name, numbers in NUMBERS.items()
            if name in words
        }
        model = model_of(text, 21, **constants)
        InferShapes()(model)
        FixNames()(model)
        return model

    return build


def group_at(model: ir.Model, name: str, how: How = How.FOLD) -> ScaleGroup | Refusal:
    every = {str(node.name) for node in model.graph}
    [(value, axis)] = [(value, axis) for value, axis in linear_readings(model.graph, every) if value.name == name]
    before = models.serialize(model)
    found = scale_group(value, axis, recognise(model.graph), how)
    assert models.serialize(model) == before, "a query changes nothing"
    return found


def smoothed(model: ir.Model, group: ScaleGroup, random: np.random.Generator) -> ir.Model:
    """Return the model with random powers of two folded into it."""
    log2 = random.integers(-3, 4, group.factors + 1).astype(float)
    log2[0] = 0.0
    factors = ChannelFactors(group.how, tuple(log2[group.classes]))
    result = Smooth({str(group.root.name): factors})(model.clone())
    assert result.modified and result.refusals == ()
    return result.model


def same(model: ir.Model, other: ir.Model) -> bool:
    """Tell whether two models give the same bits: powers of two change no digit."""
    for seed in range(2):
        feeds = runtime.synthetic_feeds(model, seed)
        outputs = [runtime.Session(one, optimize=False).run(feeds) for one in (model, other)]
        if any(not np.array_equal(outputs[0][name], outputs[1][name]) for name in outputs[0]):
            return False
    return True


TEXT = "(float[2,3,8] x) => (float[2,3,8] y)"
IMAGE = "(float[1,3,6,6] x) => (y)"
FIRES = {
    "LayerNormalization": f"{TEXT} {{ n = LayerNormalization (x, g, b) y = MatMul(n, w) }}",
    "norm of several nodes": f"""{TEXT} {{ q = Pow(x, _two) m = ReduceMean(q, last) a = Add(m, _epsilon) r = Sqrt(a)
        i = Reciprocal(r) z = Mul(x, i)
        n = Mul(z, g) y = MatMul(n, w) }}""",
    "MatMul and bias": f"{TEXT} {{ h = MatMul(x, w) n = Add(h, b) y = MatMul(n, w1) }}",
    "Gemm": "(float[3,8] x) => (y) { n = Gemm(x, w, b) y = Gemm <transB = 1> (n, w1, b1) }",
    "Conv": f"{IMAGE} {{ n = Conv(x, c, b) y = Conv(n, c1, b1) }}",
    "depthwise Conv": f"{IMAGE} {{ h = Conv(x, c, b) d0 = Conv <group = 8> (h, d) n = Relu(d0) y = Conv(n, c1) }}",
    "grouped Conv": f"{IMAGE} {{ h = Conv(x, c, b) n = Relu(h) y = Conv <group = 2> (n, grouped) }}",
    "ConvTranspose": f"{IMAGE} {{ n = Conv(x, c, b) y = ConvTranspose(n, up) }}",
    "behind ConvTranspose": f"{IMAGE} {{ h = Conv(x, c, b) n = ConvTranspose(h, c2) y = Conv(n, c1) }}",
    "BatchNormalization": f"""{IMAGE} {{ h = Conv(x, c) r = Relu(h) n = BatchNormalization(r, g, b, v, mean)
        y = Conv(n, c1) }}""",
    "table": "(int64[3] x) => (y) { n = Gather(table, x) y = MatMul(n, w) }",
    "Relu": f"{TEXT} {{ h = MatMul(x, w) n = Relu(h) y = MatMul(n, w1) }}",
    "LeakyRelu": f"{TEXT} {{ h = MatMul(x, w) n = LeakyRelu <alpha = 0.1> (h) y = MatMul(n, w1) }}",
    "PRelu": f"{IMAGE} {{ h = Conv(x, c) n = PRelu(h, slope) y = Conv(n, c1) }}",
    "MaxPool": f"{IMAGE} {{ h = Conv(x, c) n = MaxPool <kernel_shape = [2, 2]> (h) y = Conv(n, c1) }}",
    "AveragePool": f"{IMAGE} {{ h = Conv(x, c) n = AveragePool <kernel_shape = [2, 2]> (h) y = Conv(n, c1) }}",
    "GlobalAveragePool": f"{IMAGE} {{ h = Conv(x, c) n = GlobalAveragePool(h) y = Conv(n, c1) }}",
    "mean over space": f"""{IMAGE} {{ h = Conv(x, c) n = ReduceMean <keepdims = 0> (h, space)
        y = Gemm(n, w) }}""",
    "Pad": f"{IMAGE} {{ h = Conv(x, c) n = Pad(h, pads) y = Conv(n, c1) }}",
    "Resize": f"""{IMAGE} {{ h = Conv(x, c) n = Resize <mode = "linear"> (h, , _lengths) y = Conv(n, c1) }}""",
    "residual Add": f"{IMAGE} {{ h = Conv(x, c) r = Relu(h) s = Conv(r, c1) n = Add(r, s) y = Conv(n, c2) }}",
    "Sub of a constant": f"{TEXT} {{ h = MatMul(x, w) n = Sub(v, h) y = MatMul(n, w1) }}",
    "Max with a constant": f"{TEXT} {{ h = MatMul(x, w) n = Max(h, v) y = MatMul(n, w1) }}",
    "Where with zero": """(float[2,3,8] x, bool[2,3,1] m) => (y) { h = MatMul(x, w) n = Where(m, h, _zero)
        y = MatMul(n, w1) }""",
    "Mul by a constant per channel": f"{TEXT} {{ t0 = Tanh(x) n = Mul(t0, v) y = MatMul(n, w) }}",
    "Mul by a number": f"""{TEXT} {{ h = MatMul(x, w) n = Mul(h, _half)
        y = MatMul(n, w1) }}""",
    "Div by a constant": f"{TEXT} {{ h = MatMul(x, w) n = Div(h, v) y = MatMul(n, w1) }}",
    "reader behind a Mul": f"{TEXT} {{ n = MatMul(x, w) u = Mul(n, v) r = Tanh(u) a = MatMul(n, w1) y = Add(a, r) }}",
    "gated": f"""{TEXT} {{ a = MatMul(x, w) s = Sigmoid(a) u = MatMul(x, w1) n = Mul(s, u) y = MatMul(n, w2) }}""",
    "SiLU gate": f"""{TEXT} {{ a = MatMul(x, w) s = Sigmoid(a) g0 = Mul(a, s) u = MatMul(x, w1) n = Mul(u, g0)
        y = MatMul(n, w2) }}""",
    "squeeze and excitation": f"""{IMAGE} {{ h = Conv(x, c) p = GlobalAveragePool(h) q = Conv(p, c1) s = Sigmoid(q)
        n = Mul(h, s) y = Conv(n, c2) }}""",
    "Reshape and Transpose": f"""{TEXT} {{ h = MatMul(x, w) r = Reshape(h, heads) t0 = Transpose <perm = [0,2,1,3]> (r)
        u = Transpose <perm = [0,2,1,3]> (t0) n = Reshape(u, merged) y = MatMul(n, w1) }}""",
    "Flatten": "(float[1,3,2,2] x) => (y) { h = Conv <kernel_shape=[1,1]> (x, c3) n = Flatten(h) y = Gemm(n, w32) }",
    "Split": f"{TEXT} {{ h = MatMul(x, wide) a, n, z = Split <axis = -1> (h, thirds) m = Add(a, z) r = Tanh(m) "
    "p = MatMul(n, w1) y = Add(p, r) }",
    "Slice": f"{TEXT} {{ h = MatMul(x, wide) n = Slice(h, zero, eight, last) y = MatMul(n, w1) }}",
    "Concat of channels": f"""{TEXT} {{ a = MatMul(x, narrow) z = MatMul(x, narrow2) n = Concat <axis = -1> (a, z)
        y = MatMul(n, w1) }}""",
    "Concat of tokens": "(float[2,3,8] x) => (y) { a = MatMul(x, w) z = MatMul(x, w1) n = Concat <axis = 1> (a, z) "
    "y = MatMul(n, w2) }",
    "one part of a Concat": f"""{TEXT} {{ n = MatMul(x, narrow) m = MatMul(n, small) s = Sigmoid(x)
        k = Concat <axis = -1> (n, s) o = MatMul(k, tall) y = Add(m, o) }}""",
    "attention's values": f"""{TEXT} {{ q = MatMul(x, w) k = MatMul(x, w1) v0 = MatMul(x, w2)
        qh = Reshape(q, heads) qt = Transpose <perm = [0,2,1,3]> (qh) kh = Reshape(k, heads)
        kt = Transpose <perm = [0,2,3,1]> (kh) vh = Reshape(v0, heads) vt = Transpose <perm = [0,2,1,3]> (vh)
        a = MatMul(qt, kt) p = Softmax(a) o = MatMul(p, vt) ot = Transpose <perm = [0,2,1,3]> (o)
        n = Reshape(ot, merged) y = MatMul(n, w3) }}""",
}  # fmt: skip
SHAPES |= {"c3": (8, 3, 1, 1), "w32": (32, 8), "narrow2": (8, 4), "small": (4, 8), "tall": (12, 8)}


@pytest.mark.parametrize("row", FIRES)
def test_factors_fold(row: str, built: Build, random: np.random.Generator) -> None:
    model = built(FIRES[row])
    group = group_at(model, "n")
    assert isinstance(group, ScaleGroup), group
    assert group.factors == (8 if row not in ("one part of a Concat",) else 4)
    other = smoothed(model, group, random)
    assert same(model, other)
    assert len(other.graph) == len(model.graph)
    changed = [name for name, value in model.graph.initializers.items()
               if name not in other.graph.initializers or not np.array_equal(
                   value.const_value.numpy(), other.graph.initializers[name].const_value.numpy())]  # fmt: skip
    assert len(changed) >= 2, "something is divided and something multiplied"


@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 8]))
def test_a_norm_and_what_reads_it_compute_the_same(model_of: Build, seed: int, steps: int) -> None:
    """In float64, with random factors s: (γ/s, β/s) and s · W are (γ, β) and W; codes are those of a scale per channel.

    That is the reparameterization of RepQ-ViT (Li et al. 2023, equations 6 to 10) without its shift.
    """
    random = np.random.default_rng(seed)
    constants = {name: random.normal(size=SHAPES[name]).astype(np.float32) for name in ("g", "b", "w", "w1")}
    model = model_of(
        "(float[2,3,8] x) => (y, z) { n = LayerNormalization(x, g, b) y = MatMul(n, w) z = MatMul(n, w1) }", 21,
        **constants,
    )  # fmt: skip
    InferShapes()(model)
    FixNames()(model)
    log2 = random.integers(-4 * steps, 4 * steps + 1, 8) / steps
    result = Smooth({"n": ChannelFactors(How.FOLD, tuple(map(float, log2)))})(model.clone())
    assert result.refusals == ()
    x = random.normal(size=(6, 8))
    normal = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-5)

    def computed(by: ir.Model) -> tuple[Array, list[Array]]:
        g, b, *weights = (by.graph.initializers[name].const_value.numpy().astype(np.float64) for name in constants)
        return normal * g + b, [(normal * g + b) @ weight for weight in weights]

    (before, outputs), (behind, others) = computed(model), computed(result.model)
    terms = np.abs(normal * constants["g"]) + np.abs(constants["b"])
    for name, one, other in zip(("w", "w1"), outputs, others, strict=True):
        # Whole powers of two change no digit; other factors, and what takes them in, are rounded to float32 once each.
        bound = 0.0 if steps == 1 else 2.0**-22 * terms @ np.abs(constants[name])
        assert (np.abs(other - one) <= bound).all()
    if steps == 1:
        scale = np.abs(behind).max() / 127
        np.testing.assert_array_equal(np.rint(behind / scale), np.rint(before / (scale * np.exp2(log2))))


def test_query_heads_that_share_values_share_factors(built: Build, random: np.random.Generator) -> None:
    """Three query heads to each of two heads of values, which are repeated by Expand (Ainslie et al. 2023)."""
    model = built(
        """(float[1,5,8] x, float[1,6,5,5] p) => (y) { v0 = MatMul(x, w) vh = Reshape(v0, heads)
        vt = Transpose <perm = [0,2,1,3]> (vh) vu = Unsqueeze(vt, two) ve = Expand(vu, shared) vr = Reshape(ve, six)
        o = MatMul(p, vr) ot = Transpose <perm = [0,2,1,3]> (o) n = Reshape(ot, side) y = MatMul(n, w24) }"""
    )
    group = group_at(model, "n")
    assert isinstance(group, ScaleGroup) and group.classes.size == 24 and group.factors == 8
    heads = group.classes.reshape(6, 4)
    assert (heads[0] == heads[1]).all() and (heads[0] == heads[2]).all() and (heads[0] != heads[3]).all()
    assert same(model, smoothed(model, group, random))


NUMBERS |= {"six": [1, 6, 5, 4], "side": [1, 5, 24], "shared": [1, 1, 3, 1, 1]}
SHAPES |= {"w24": (24, 8)}

REFUSES = {
    "the input": (f"{TEXT} {{ y = MatMul(x, w) }}", "x", "'x' is fed to the model"),
    "Sigmoid": (
        f"{TEXT} {{ h = MatMul(x, w) n = Sigmoid(h) y = MatMul(n, w1) }}", "n", "no factor passes this Sigmoid",
    ),
    "Softmax": (
        f"{TEXT} {{ h = MatMul(x, w) n = Softmax(h) y = MatMul(n, w1) }}", "n", "no factor passes this Softmax",
    ),
    "Clip": (
        f"""{IMAGE} {{ h = Conv(x, c)
        n = Clip(h, _zero, _six) y = Conv(n, c1) }}""", "n", "no factor passes this Clip",
    ),
    "GELU": (
        f"""{TEXT} {{ h = MatMul(x, w)
        q = Div(h, _root) e = Erf(q) a = Add(e, _one) n = Mul(h, a) y = MatMul(n, w1) }}""", "n",
        "no factor passes this Erf",
    ),
    "an output": (
        "(float[2,3,8] x) => (n, y) { n = MatMul(x, w) y = MatMul(n, w1) }", "n", "'n' is an output of the model",
    ),
    "another reader": (
        f"{TEXT} {{ n = MatMul(x, w) r = Tanh(n) m = MatMul(n, w1) y = Add(m, r) }}", "n", "no factor passes this Tanh",
    ),
    "a norm that reads": (
        f"{TEXT} {{ n = MatMul(x, w) r = LayerNormalization(n, g, b) m = MatMul(n, w1) y = Add(m, r) }}", "n",
        "no factor passes this LayerNormalization",
    ),
    "an unrelated branch": (
        f"{TEXT} {{ h = MatMul(x, w) n = Add(h, x) y = MatMul(n, w1) }}", "n", "'x' is fed to the model",
    ),
    "weights of two writers": (
        f"{TEXT} {{ h = MatMul(x, w) n = Relu(h) k = MatMul(n, w1) s = MatMul(x, w) y = Add(k, s) }}", "n",
        "its weights 'w' are read elsewhere too",
    ),
    "weights of two readers": (
        f"{TEXT} {{ n = MatMul(x, w) k = MatMul(n, w1) s = MatMul(x, w1) y = Add(k, s) }}", "n",
        "its weights 'w1' are read elsewhere too",
    ),
    "a norm without factors": (
        f"""{TEXT} {{ q = Pow(x, _two)
        m = ReduceMean(q, last) a = Add(m, _epsilon) r = Sqrt(a) n = Div(x, r) y = MatMul(n, w) }}""", "n",
        "its norm has no factors of its own",
    ),
    "a square": (f"{TEXT} {{ h = MatMul(x, w) n = Mul(h, h) y = MatMul(n, w1) }}", "n", "it squares"),
    "a divisor": (
        f"{TEXT} {{ n = MatMul(x, w) d0 = Div(x, n) m = MatMul(n, w1) y = Add(m, d0) }}", "n", "it divides by it",
    ),
    "both factors": (
        f"{TEXT} {{ n = MatMul(x, w) k = Mul(n, n) m = MatMul(n, w1) y = Add(m, k) }}", "n",
        "no factor passes this square",
    ),
    "a Pad of ones": (
        f"{IMAGE} {{ h = Conv(x, c) n = Pad(h, pads, _one) y = Conv(n, c1) }}", "n",
        "it pads with another number than zero",
    ),
    "indices of a MaxPool": (
        "(float[1,3,6,6] x) => (y, i) { h = Conv(x, c) n, j = MaxPool <kernel_shape = [2, 2]> (h) y = Conv(n, c1) "
        "i = Add(j, j) }", "n", "what this MaxPool mixes is not known",
    ),
    "an operand that is fed": (
        "(float[2,3,8] x, float[8] k) => (y) { h = MatMul(x, w) n = Add(h, k) y = MatMul(n, w1) }", "n",
        "'k' is fed to the model",
    ),
    "parameters that are fed": (
        "(float[2,3,8] x, float[8] k) => (y) { n = LayerNormalization(x, g, k) y = MatMul(n, w) }", "n",
        "LayerNormalization has parameters that are not constant",
    ),
    "a subgraph that reads": (
        """(float[2,3,8] x, bool q) => (y) { n = MatMul(x, w) m = MatMul(n, w1)
        r = If (q) <then_branch = a () => (o) { o = Tanh(n) }, else_branch = e () => (o1) { o1 = Relu(x) }>
        y = Add(m, r) }""", "n", "'n' is read inside a subgraph",
    ),
}  # fmt: skip


@pytest.mark.parametrize("row", REFUSES)
def test_nothing_folds(row: str, built: Build) -> None:
    text, name, reason = REFUSES[row]
    found = group_at(built(text), name)
    assert isinstance(found, Refusal), found
    assert found.reason == reason and found.node


def test_an_expanded_channel_is_one_factor(built: Build, random: np.random.Generator) -> None:
    """Channels that an operator mixes share a factor rather than none: here those of each head, through a mean."""
    model = built(
        f"""{TEXT} {{ h = MatMul(x, w) r = Reshape(h, heads) m = ReduceMean <keepdims = 0> (r, last)
        k = MatMul(m, two_to_eight) s = Tanh(k) o = Relu(h) z = MatMul(o, w1) y = Add(z, s) }}"""
    )
    group = group_at(model, "m")
    assert isinstance(group, ScaleGroup) and group.factors == 2
    assert same(model, smoothed(model, group, random))


SHAPES |= {"two_to_eight": (2, 8)}

POST_NORM = f"""{TEXT} {{ n = LayerNormalization(x, g, b) h = MatMul(n, w) k = MatMul(n, w1) s = Add(h, k) a = Add(s, n)
    y = LayerNormalization(a, v, b1) }}"""


def test_the_residual_branch_is_restored_by_one_mul(built: Build, random: np.random.Generator) -> None:
    model = built(POST_NORM)
    assert isinstance(group_at(model, "n"), Refusal)
    group = group_at(model, "n", How.RESTORE)
    assert isinstance(group, ScaleGroup) and [node.op_type for node in group.spared] == ["Add"]
    other = smoothed(model, group, random)
    assert same(model, other)
    assert len(other.graph) == len(model.graph) + 1
    [mul] = [node for node in other.graph if node.op_type == "Mul"]
    assert [node.op_type for node in mul.outputs[0].consumers()] == ["Add"]
    assert not any(node.inputs[0] is mul.outputs[0] for node in other.graph if node.op_type == "MatMul")


def test_nothing_is_restored_where_all_readers_fold(built: Build) -> None:
    found = group_at(built(FIRES["LayerNormalization"]), "n", How.RESTORE)
    assert isinstance(found, Refusal) and found.reason == "nothing is to be restored"


@pytest.mark.parametrize("row", [row for row in REFUSES if row not in ("weights of two readers",)])
def test_a_mul_divides_where_nothing_folds(row: str, built: Build, random: np.random.Generator) -> None:
    text, name, _ = REFUSES[row]
    model = built(text)
    group = group_at(model, name, How.BRANCH)
    assert isinstance(group, ScaleGroup) and all(fold.exponent == 1 for fold in group.folds)
    other = smoothed(model, group, random)
    assert same(model, other)
    assert len(other.graph) == len(model.graph) + 1


def test_channels_of_unknown_number_are_refused(model_of: Build) -> None:
    model = model_of(
        "(float[1,C,4,4] x) => (y) { n = Relu(x) y = Conv(n, w) }", 17, w=np.ones((2, 3, 1, 1), np.float32)
    )
    found = group_at(model, "n")
    assert isinstance(found, Refusal) and "channels" in found.reason


@pytest.mark.parametrize("how", [How.FOLD, How.RESTORE, How.BRANCH])
def test_random_eighths_stay_close(how: How, built: Build, random: np.random.Generator) -> None:
    model = built(POST_NORM if how is not How.FOLD else FIRES["attention's values"])
    group = group_at(model, "n", how)
    assert isinstance(group, ScaleGroup)
    log2 = random.integers(-24, 25, group.factors + 1) / 8
    log2[0] = 0.0
    other = Smooth({"n": ChannelFactors(how, tuple(log2[group.classes]))})(model.clone()).model
    feeds = runtime.synthetic_feeds(model, 0)
    expected, found = (runtime.Session(one).run(feeds)["y"] for one in (model, other))
    assert 0.0 < np.max(np.abs(expected - found)) <= 1e-5 * np.max(np.abs(expected))
