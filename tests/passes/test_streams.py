from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from qcompile.core import model as models
from qcompile.core import runtime
from qcompile.passes.canonicalize import Canonicalize
from qcompile.passes.patterns import Norm
from qcompile.passes.streams import Stream, StreamKind, residual_streams
from qcompile.passes.structure import constant, data_readers, is_standard

EXPORTS = Path(__file__).parent / "exports"
Find = Callable[..., tuple[Stream, ...]]


def load(name: str) -> ir.Model:
    model = models.load(EXPORTS / f"{name}.onnx")
    Canonicalize(21)(model)
    return model


@pytest.fixture
def found(model_of: Callable[..., ir.Model], random: np.random.Generator) -> Find:
    """Return the streams of ONNX text; names that begin with w are weights `[8, 8]`, others are given."""

    def found(text: str, **others: Any) -> tuple[Stream, ...]:
        words = text.replace(",", " ").replace(")", " ").replace("(", " ").split()
        weights = {w: random.normal(size=(8, 8)).astype(np.float32) for w in words if w.startswith("w")}
        model = model_of(text, 17, **weights, **others)
        Canonicalize(21)(model)
        before = models.serialize(model)
        streams = residual_streams(model.graph)
        assert models.serialize(model) == before, "a query changes nothing"
        return streams

    return found


@pytest.mark.parametrize("exporter", ["script14", "dynamo20"])
@pytest.mark.parametrize(
    ("name", "kind", "segments", "writers", "norms"),
    [
        # embedding, two branches and their biases where they have some, the class token and positions
        ("pre_norm", StreamKind.PRE_NORM, 1, 5, 3),
        ("llama", StreamKind.PRE_NORM, 1, 4, 3),
        ("vit", StreamKind.PRE_NORM, 1, 7, 3),
        ("post_norm", StreamKind.POST_NORM, 2, 6, 2),
    ],
)
def test_transformers(exporter: str, name: str, kind: StreamKind, segments: int, writers: int, norms: int) -> None:
    [stream] = residual_streams(load(f"{name}.{exporter}").graph)
    assert (stream.kind, stream.width, len(stream.segments)) == (kind, 16, segments)
    assert len(stream.writers) == writers
    assert sum(isinstance(reader, Norm) for reader in stream.readers) == norms
    reasons = [obstacle.reason for obstacle in stream.obstacles]
    assert reasons == (["a norm writes into it"] if kind is StreamKind.POST_NORM else [])
    assert len(stream.joints) == segments - 1


def orthogonal(width: int, keeps_ones: bool) -> np.ndarray:
    """Return a random rotation, which leaves the vector of ones alone if it must pass a LayerNorm."""
    random = np.random.default_rng(3)
    basis = random.normal(size=(width, width))
    basis[:, 0] = 1
    u = np.linalg.qr(basis)[0]
    inner = np.linalg.qr(random.normal(size=(width - 1, width - 1)))[0]
    kept = np.eye(width)
    kept[1:, 1:] = inner
    return u @ kept @ u.T if keeps_ones else np.linalg.qr(basis)[0]


def replace(value: ir.Value, change: Callable[[np.ndarray], np.ndarray]) -> None:
    array = constant(value)
    assert array is not None
    value.const_value = ir.tensor(change(array.astype(np.float64)).astype(np.float32), name=value.name)


def on_output(node: ir.Node, r: np.ndarray) -> None:
    if node.op_type == "Gather":
        replace(node.inputs[0], lambda w: w @ r)
    elif node.op_type == "Conv":
        replace(node.inputs[1], lambda w: np.einsum("oihw,op->pihw", w, r))
    else:
        replace(node.inputs[1], lambda w: r.T @ w if node.attributes.get_int("transB", 0) else w @ r)
    if node.op_type in ("Conv", "Gemm") and len(node.inputs) > 2:
        replace(node.inputs[2], lambda b: b @ r)


def on_input(node: ir.Node, r: np.ndarray) -> None:
    if node.op_type == "Conv":
        replace(node.inputs[1], lambda w: np.einsum("oihw,ip->ophw", w, r))
    else:
        replace(node.inputs[1], lambda w: w @ r if node.attributes.get_int("transB", 0) else r.T @ w)


def linear_readers(value: ir.Value) -> list[ir.Node]:
    found = []
    for node in data_readers(value):
        behind = node.outputs[0] if is_standard(node, "Gather", "Identity") else None
        found += [node] if behind is None else linear_readers(behind)
    return found


def rotate(stream: Stream) -> None:
    """Rotate the channels of a stream without norms' γ and β, as a pass would that trusts what is said of it."""
    [segment] = stream.segments
    assert segment.obstacles == ()
    r = orthogonal(stream.width, any(norm.kind == "layer" for norm in segment.norms))
    for writer in segment.writers:
        node = writer.producer()
        if constant(writer) is not None:
            replace(writer, lambda b: b @ r)
        elif node is not None and node.op_type == "Expand":
            replace(node.inputs[0], lambda b: b @ r)
        elif node is not None:
            on_output(node, r)
    for reader in segment.readers:
        for node in linear_readers(reader.result) if isinstance(reader, Norm) else [reader]:
            on_input(node, r)


@pytest.mark.parametrize("name", ["pre_norm", "llama", "vit", "bottlenecks"])
@pytest.mark.parametrize("exporter", ["script14", "dynamo20"])
def test_a_stream_without_obstacles_can_be_rotated(name: str, exporter: str) -> None:
    """Nothing is left out of its writers and readers: then the function stays when all of them are rotated."""
    model = load(f"{name}.{exporter}")
    [stream] = residual_streams(model.graph)
    for norm in stream.segments[0].norms:
        for parameter, number in ((norm.gamma, 1.0), (norm.beta, 0.0)):
            if parameter is not None:
                replace(parameter, lambda array, number=number: np.full_like(array, number))
    feeds = runtime.synthetic_feeds(model, 4)
    [expected] = runtime.Session(model, optimize=False).run(feeds).values()
    rotate(stream)
    [rotated] = runtime.Session(model, optimize=False).run(feeds).values()
    np.testing.assert_allclose(rotated, expected, atol=1e-4 * np.abs(expected).max())
    assert np.ptp(expected) > 0.01


BRANCH = "(float[B,3,8] x, float[B,3,8] u) => (float[B,3,8] y) { e = MatMul (x, we) %s y = MatMul (o, wo) }"


def test_a_shortcut_past_linear_operators(found: Find) -> None:
    [stream] = found(BRANCH % "b = MatMul (e, wb) o = Add (b, e)")
    assert stream.kind is StreamKind.LINEAR and stream.obstacles == ()
    assert [value.producer().op_type for value in stream.writers] == ["MatMul", "MatMul"]
    assert len(stream.readers) == 2 and set(stream.segments[0].axes.values()) == {-1}


def test_branches_past_which_nothing_goes(found: Find) -> None:
    [stream] = found(BRANCH % "b = MatMul (u, wb) o = Add (b, e)")
    assert stream.kind is StreamKind.SUM


def test_a_sum_with_a_constant_is_none(found: Find) -> None:
    assert found(BRANCH % "o = Add (e, c)", c=np.ones(8, np.float32)) == ()


def test_a_constant_in_two_streams_does_not_join_them(found: Find) -> None:
    both = "a = MatMul (e, wa) s = Add (a, e) s1 = Add (s, c) t = Relu (s1) k = MatMul (t, wk) l = MatMul (k, wl) "
    streams = found(BRANCH % (both + "p = Add (k, l) o = Add (p, c)"), c=np.ones((3, 8), np.float32))
    assert len(streams) == 2
    assert all(sum(constant(value) is not None for value in stream.writers) == 1 for stream in streams)


@pytest.mark.parametrize(
    ("nodes", "reason"),
    [
        ("b = MatMul (e, wb) r = Relu (b) o = Add (r, e)", "an activation writes into it"),
        ("b = MatMul (e, wb) r = Mul (b, u) o = Add (r, e)", "Mul writes into it"),
        ("b = MatMul (e, wb) r = Mul (b, scale) s = Add (r, e) o = Add (s, b)",
         "Mul by a constant of each channel writes into it"),
        ("b = MatMul (e, wb) s = Add (b, e) o = Softmax (s)", "Softmax reads it"),
        ("b = MatMul (e, wb) s = Add (b, e) o = Concat <axis = 2> (s, s, s)", "Concat reads it"),
        ("b = MatMul (e, wb) s = Add (b, e) o = Slice (s, i0, i4, i2)", "Slice reads it"),
        ("b = MatMul (e, wb) s = Add (b, e) o = Transpose <perm = [0, 2, 1]> (s)", "MatMul reads it"),
        ("b = MatMul (e, wb) s = Add (b, e) o = Add (s, one)", "Add reads it"),
        ("e1 = LayerNormalization (e, scale) b = MatMul (e1, wb) o = Add (b, e1)", "a norm writes into it"),
        ("b = MatMul (e, wb) s = Add (b, e) n = Transpose <perm = [0, 2, 1]> (s) "
         "o = LayerNormalization <axis = -1> (n, three)", "reads it"),
        ("b = MatMul (u, wb) o = Add (b, u)", "it is fed to the model"),
    ],
)  # fmt: skip
def test_obstacles_are_named(nodes: str, reason: str, found: Find) -> None:
    text = BRANCH % nodes
    others: dict[str, np.ndarray] = {"scale": np.linspace(1, 2, 8, dtype=np.float32), "one": np.float32([1])}
    others |= {"i0": np.int64([0]), "i4": np.int64([4]), "i2": np.int64([2]), "three": np.ones(3, np.float32)}
    if any(op in nodes for op in ("perm", "axis = 2", "i4")):
        # What follows has other lengths.
        text = text.replace("y = MatMul (o, wo)", "y = Exp (o)").replace("(float[B,3,8] y)", "(float[B,K,L] y)")
    used = {name: array for name, array in others.items() if f", {name}" in nodes}
    if "perm" in nodes and "Norm" not in nodes:
        text = text.replace("y = Exp (o)", "y = MatMul (o, v)")
        used["v"] = np.ones((3, 2), np.float32)
    [stream] = found(text, **used)
    assert reason in " ".join(obstacle.reason for obstacle in stream.obstacles)
    assert stream.kind is not StreamKind.LINEAR


def test_an_output_of_the_model_is_an_obstacle(found: Find) -> None:
    text = "(float[B,3,8] x) => (float[B,3,8] y, float[B,3,8] o) { e = MatMul (x, we) b = MatMul (e, wb) "
    [stream] = found(text + "o = Add (b, e) y = MatMul (o, wo) }")
    assert [obstacle.reason for obstacle in stream.obstacles] == ["it is an output of the model"]


@pytest.mark.parametrize(
    "between",
    [
        "t = Transpose <perm = [0, 2, 1]> (e) f = Transpose <perm = [0, 2, 1]> (t)",
        "t = Reshape (e, flat) f = Reshape (t, back)",
        "t = Unsqueeze (e, at) f = Squeeze (t, at)",
        "f = Mul (e, number)",
        "f = Mul (e, token)",
        "f = Neg (e)",
        "f = Slice (e, i0, i3, i1)",
    ],
)
def test_a_stream_goes_on_through_what_leaves_its_channels_alone(between: str, found: Find) -> None:
    others: dict[str, np.ndarray] = {"flat": np.int64([-1, 8]), "back": np.int64([-1, 3, 8]), "at": np.int64([1])}
    others |= {"number": np.float32(3), "token": np.linspace(1, 2, 3, dtype=np.float32).reshape(3, 1)}
    others |= {"i0": np.int64([0]), "i3": np.int64([3]), "i1": np.int64([1])}
    used = {name: array for name, array in others.items() if f", {name}" in between}
    [stream] = found(BRANCH % f"{between} b = MatMul (f, wb) o = Add (b, f)", **used)
    assert stream.obstacles == () and len(stream.writers) == 2


def test_a_cnn_with_a_depthwise_convolution_and_activations(model_of: Callable[..., ir.Model]) -> None:
    text = """(float[1,4,6,6] x) => (float[1,4,6,6] y) {
        a = Conv (x, p) b = Conv <group = 4, pads = [1,1,1,1]> (a, d) s = Add (a, b) r = Relu (s)
        c = Conv (r, p) t = Add (c, r) y = Relu (t)
    }"""
    model = model_of(text, p=np.ones((4, 4, 1, 1), np.float32), d=np.ones((4, 1, 3, 3), np.float32))
    Canonicalize(21)(model)
    [stream] = residual_streams(model.graph)
    assert stream.kind is StreamKind.CONVOLUTIONAL and len(stream.segments) == 2 and len(stream.joints) == 1
    reasons = [obstacle.reason for obstacle in stream.obstacles]
    assert "grouped Conv writes into it" in reasons and "grouped Conv reads it" in reasons
    assert set(stream.segments[0].axes.values()) == {-3}
