"""Each guard of `rotatable`: a graph that passes but for one thing, and the reason that is given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from qcompile.core import model as models
from qcompile.core.rotation import Place, Site
from qcompile.passes.canonicalize import Canonicalize
from qcompile.passes.rotations import Rotatable, rotatable

Array = np.ndarray[Any, np.dtype[Any]]
Find = Callable[..., Rotatable]


@pytest.fixture
def found(model_of: Callable[..., ir.Model], random: np.random.Generator) -> Find:
    """Ask of ONNX text; names that begin with w are weights `[8, 8]`, others are given."""

    def found(text: str, **others: Any) -> Rotatable:
        words = text.replace(",", " ").replace(")", " ").replace("(", " ").split()
        weights = {w: random.normal(size=(8, 8)).astype(np.float32) for w in words if w.startswith("w")}
        used = {name: array for name, array in others.items() if name in words}
        model = model_of(text, 17, **weights | used)
        Canonicalize(21)(model)
        before = models.serialize(model)
        result = rotatable(model.graph)
        assert models.serialize(model) == before, "a query changes nothing"
        return result

    return found


def vector(*shape: int) -> Array:
    return np.linspace(1, 2, int(np.prod(shape)), dtype=np.float32).reshape(shape)


STREAM = """(float[B,3,8] x, float[B,3,8] u) => (float[B,3,8] y%s) {
    e = MatMul (x, we)
    n = LayerNormalization (e, gamma, beta) b = MatMul (n, wb)
    %s y = MatMul (o, wo)
}"""
NORM = {"gamma": vector(8), "beta": vector(8)}


def test_a_stream(found: Find) -> None:
    result = found(STREAM % ("", "o = Add (b, e)"), **NORM)
    [site] = result.streams
    assert result.refusals == () and result.values == ()
    assert result.places == (Place(Site.STREAM, site.place.node, 8, keeps_ones=True),)
    [norm] = site.norms
    assert len(norm.readers) == 1 and not norm.absorbs and len(site.written_by) == 2


def test_any_rotation_passes_a_stream_without_layer_norm(found: Find) -> None:
    [place] = found("(float[B,8] x) => (float[B,8] y) { e = MatMul (x, we) b = MatMul (e, wb) o = Add (b, e) "
                    "y = MatMul (o, wo) }").places  # fmt: skip
    assert not place.keeps_ones


def test_a_norm_behind_moves_and_means(found: Find) -> None:
    text = STREAM.replace("b = MatMul (n, wb)", "m = ReduceMean <axes = [1]> (n) b = MatMul (m, wb)")
    [site] = found(text % ("", "o = Add (b, e)"), **NORM).streams
    assert len(site.norms[0].readers) == 1


@pytest.mark.parametrize(
    ("outputs", "nodes", "given", "reason"),
    [
        # What the segment itself names.
        ("", "s = Mul (b, scale) p = Add (s, e) k = MatMul (b, wk) o = Add (p, k)", {"scale": vector(8)},
         "Mul by a constant of each channel writes into it"),
        ("", "s = Add (b, e) r = Softmax (s) o = Add (r, s)", {}, "Softmax"),
        (", float[B,3,8] o", "o = Add (b, e)", {}, "it is an output of the model"),
        ("", "r = Relu (b) o = Add (r, e)", {}, "an activation writes into it"),
        ("", "o = Add (n, e)", {}, "a norm writes into it"),
        # What reads the norm.
        ("", "r = Exp (n) k = MatMul (r, wk) s = Add (k, e) o = Add (s, b)", {}, "Exp reads a norm of it"),
        ("", "r = Add (n, u) k = MatMul (r, wk) s = Add (k, e) o = Add (s, b)", {}, "Add reads a norm of it"),
        ("", "r = Mul (n, scale) k = MatMul (r, wk) j = Relu (r) l = MatMul (j, wl) s = Add (k, e) t = Add (s, l) "
         "o = Add (t, b)", {"scale": vector(8)}, "Mul reads a norm of it"),
        (", float[B,3,8] n", "o = Add (b, e)", {}, "what a norm makes of it is an output of the model"),
        # γ and β.
        ("", "o = Add (b, e)", {"gamma": np.float32([0, 1, 2, 3, 4, 5, 6, 7])}, "γ of a norm is zero where β is not"),
    ],
)  # fmt: skip
def test_streams_that_are_refused(outputs: str, nodes: str, given: dict[str, Array], reason: str, found: Find) -> None:
    result = found(STREAM % (outputs, nodes), **NORM | given)
    assert result.streams == ()
    reasons = [refusal.reason for refusal in result.refusals]
    assert all(text.startswith("the residual stream it belongs to is not rotated: ") for text in reasons)
    assert any(reason in text for text in reasons), reasons


RMS = """(float[B,3,8] x) => (float[B,3,8] y) {
    e = MatMul (x, we)
    q = Mul (e, e) m = ReduceMean <axes = [-1]> (q) v = Add (m, eps) r = Sqrt (v) z = Div (e, r) n = Mul (z, gamma)
    b = MatMul (n, wb) %s y = MatMul (o, wo)
}"""


@pytest.mark.parametrize(
    ("nodes", "gamma", "reason"),
    [
        ("t = Exp (z) k = MatMul (t, wk) s = Add (b, e) o = Add (s, k)", vector(8), "Exp reads a norm of it"),
        ("t = Exp (r) k = Mul (b, t) j = MatMul (k, wj) o = Add (j, e)", vector(8), "inside of a norm"),
        ("o = Add (b, e)", vector(3, 8), "γ or β of a norm is not one number per channel"),
    ],
)  # fmt: skip
def test_decomposed_norms_that_are_refused(nodes: str, gamma: Array, reason: str, found: Find) -> None:
    result = found(RMS % nodes, gamma=gamma, eps=np.float32(1e-5))
    assert result.streams == ()
    assert any(reason in refusal.reason for refusal in result.refusals), result.refusals


def test_a_decomposed_norm_is_no_obstacle(found: Find) -> None:
    assert len(found(RMS % "o = Add (b, e)", gamma=vector(8), eps=np.float32(1e-5)).streams) == 1


def test_post_norm_says_so(found: Find) -> None:
    text = """(float[B,3,8] x) => (float[B,3,8] y) {
        e = MatMul (x, we) b = MatMul (e, wb) s = Add (b, e) n = LayerNormalization (s, gamma, beta)
        c = MatMul (n, wc) t = Add (c, n) m = LayerNormalization (t, gamma, beta) y = MatMul (m, wo)
    }"""
    result = found(text, **NORM)
    assert result.streams == ()
    assert ["γ is on the way" in refusal.reason for refusal in result.refusals] == [False, True]


def test_biases_that_are_computed(found: Find) -> None:
    text = """(float[B,8] x, float[B,8] u) => (float[B,8] y) {
        e = MatMul (x, we) b = Gemm (e, wb, u) o = Add (b, e) y = MatMul (o, wo)
    }"""
    [refusal] = found(text).refusals
    assert "the bias of Gemm is not one number per channel" in refusal.reason


def test_other_types(model_of: Callable[..., ir.Model]) -> None:
    text = """(double[B,8] x) => (double[B,8] y) {
        e = MatMul (x, a) b = MatMul (e, a) o = Add (b, e) y = MatMul (o, a)
    }"""
    model = model_of(text, a=np.eye(8) + 1)
    Canonicalize(21)(model)
    [refusal] = rotatable(model.graph).refusals
    assert "is not known to compute in float32" in refusal.reason


CONSTANT = """(float[B,3,8] x, int64[1] length) => (float[B,3,8] y, float[A,3,8] z) {
    e = MatMul (x, we) b = MatMul (e, wb) s = Add (b, e)
    batch = Concat <axis = 0> (length, lengths) c = Expand (token, batch) o = Add (s, c) y = MatMul (o, wo)
    %s
}"""


def test_a_constant_that_is_moved(found: Find) -> None:
    given = {"token": vector(1, 3, 8), "lengths": np.int64([3, 8])}
    [site] = found(CONSTANT % "z = Identity (x)", **given).streams
    [(node, index, axis)] = site.constants
    assert (node.op_type, index, axis) == ("Expand", 0, -1)
    result = found(CONSTANT % "z = Exp (c)", **given)
    assert result.streams == () and "a constant of it is moved for others too" in result.refusals[0].reason


def test_a_reader_in_a_subgraph(found: Find) -> None:
    text = """(float[B,3,8] x, bool c) => (float[B,3,8] y, float[B,3,8] z) {
        e = MatMul (x, we) b = MatMul (e, wb) o = Add (b, e) y = MatMul (o, wo)
        z = If (c) <then_branch = t () => (float[B,3,8] p) { p = MatMul (o, wo) },
                    else_branch = f () => (float[B,3,8] q) { q = Neg (y) }>
    }"""
    result = found(text)
    assert result.streams == () and len(result.refusals) == 1


ATTENTION = """(float[B,3,8] x, float[B,2,3,4] u) => (float[B,3,8] y%s) {
    q0 = MatMul (x, wq) q1 = Reshape (q0, split) q = Transpose <perm = [0,2,1,3]> (q1)
    k0 = MatMul (x, wk) k1 = Reshape (k0, split) k = Transpose <perm = [0,2,3,1]> (k1)
    v0 = MatMul (x, wv) v1 = Reshape (v0, split) v = Transpose <perm = [0,2,1,3]> (v1)
    s = MatMul (q, k) p = Softmax <axis = -1> (s) m = MatMul (p, %s)
    t = Transpose <perm = [0,2,1,3]> (m) c = Reshape (t, join) %s
}"""
SHAPES = {"split": np.int64([0, 0, 2, 4]), "join": np.int64([0, 0, 8])}


def test_values_of_an_attention(found: Find) -> None:
    [site] = found(ATTENTION % ("", "v", "y = MatMul (c, wo)"), **SHAPES).values
    assert site.place == Place(Site.VALUES, site.attention.softmax.name or "", 4, copies=2)
    np.testing.assert_array_equal(site.columns, np.arange(8).reshape(2, 4))
    np.testing.assert_array_equal(np.concatenate(site.rows), np.arange(8).reshape(2, 4))


@pytest.mark.parametrize(
    ("outputs", "value", "nodes", "reason"),
    [
        ("", "u", "y = MatMul (c, wo)", "they come from no linear operator"),
        ("", "v", "y = Exp (c)", "no linear operator reads all heads side by side"),
        ("", "v", "d = Relu (c) y = MatMul (d, wo)", "no linear operator reads all heads side by side"),
        (", float[B,2,3,4] v", "v", "y = MatMul (c, wo)", "they are an output of the model"),
        (", float[B,3,2,4] z", "v", "z = Exp (v1) y = MatMul (c, wo)", "Exp reads them too"),
        (", float[B,3,8] z", "v", "z = Exp (v0) y = MatMul (c, wo)", "Exp reads them too"),
        ("", "r", "y = MatMul (c, wo)", "a norm or a rotary embedding stands on their way"),
    ],
)
def test_values_that_are_refused(outputs: str, value: str, nodes: str, reason: str, found: Find) -> None:
    text = ATTENTION % (outputs, value, nodes)
    if value == "r":
        text = text.replace("s = MatMul", "r = LayerNormalization (v, four, four) s = MatMul")
    result = found(text, four=vector(4), **SHAPES)
    assert result.values == ()
    [refusal] = result.refusals
    assert refusal.reason.startswith("the values of its attention are not rotated: ") and reason in refusal.reason


def test_keys_that_are_the_values(found: Find) -> None:
    text = ATTENTION.replace("k0 = MatMul (x, wk) k1 = Reshape (k0, split) k = Transpose <perm = [0,2,3,1]> (k1)", "")
    text = text.replace("s = MatMul", "k = Transpose <perm = [0,1,3,2]> (v) s = MatMul")
    [refusal] = found(text % ("", "v", "y = MatMul (c, wo)"), **SHAPES).refusals
    assert "its queries or keys are the same channels" in refusal.reason
