from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from qcompile.passes.patterns import Attention, Patterns

Find = Callable[..., Patterns]

PROJECT = "q0 = MatMul (x, wq) k0 = MatMul (x, wk) v0 = MatMul (x, wv) "
HEADS = (
    "q1 = Reshape (q0, split) q = Transpose <perm = [0, 2, 1, 3]> (q1) k1 = Reshape (k0, split) "
    "k = Transpose <perm = [0, 2, 3, 1]> (k1) v1 = Reshape (v0, split) v = Transpose <perm = [0, 2, 1, 3]> (v1) "
)
SCORES = "s = MatMul (q, k) "
MIX = "p = Softmax <axis = -1> (s) m = MatMul (p, v) "
MERGE = "m1 = Transpose <perm = [0, 2, 1, 3]> (m) m2 = Reshape (m1, merge) y = MatMul (m2, wo)"


@pytest.fixture
def found(recognised: Callable[..., Patterns], random: np.random.Generator) -> Find:
    """Recognise what makes y of x `[B, 3, 8]` with two heads of 4."""

    def found(
        nodes: str, inputs: str = "", outputs: str = "", batch: str = "B", opset: int = 17, **others: Any
    ) -> Patterns:
        text = f"(float[{batch},3,8] x{inputs}) => (float[{batch},3,8] y{outputs}) {{ {nodes} }}"
        matrices = {name: random.normal(size=(8, 8)).astype(np.float32) for name in ("wq", "wk", "wv", "wo")}
        shapes = {"split": np.int64([0, 0, 2, 4]), "merge": np.int64([0, 0, 8])}
        words = nodes.replace(",", " ").replace(")", " ").replace("(", " ").split()
        weights = {name: array for name, array in {**matrices, **shapes, **others}.items() if name in words}
        return recognised(text, opset, **weights)

    return found


def only(patterns: Patterns) -> Attention:
    assert patterns.refusals == ()
    [attention] = patterns.attentions
    return attention


@pytest.mark.parametrize("batch", ["B", "1", "2"])
def test_heads_and_channels(batch: str, found: Find) -> None:
    if batch == "2":  # the values of a batch of two are no rows of one sample
        return
    attention = only(found(PROJECT + HEADS + SCORES + MIX + MERGE, batch=batch))
    assert (attention.heads, attention.kv_heads, attention.head_dim, attention.scale) == (2, 2, 4, 1.0)
    assert attention.masks == () and attention.rope is None
    for operand, name in ((attention.query, "q0"), (attention.key, "k0"), (attention.value, "v0")):
        assert operand.projection is not None and operand.projection.result.name == name
        assert operand.channels is not None and operand.channels.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert attention.output is not None and attention.output_channels is not None
    assert attention.output_channels.tolist() == list(range(8))
    assert len(attention.nodes) == 11


@pytest.mark.parametrize(
    ("nodes", "scale", "numbers"),
    [
        ("s0 = MatMul (q, k) s = Div (s0, n) ", 0.5, {"n": 2}),
        ("s0 = MatMul (q, k) s = Mul (n, s0) ", 0.5, {"n": 0.5}),
        ("q9 = Mul (q, n) s = MatMul (q9, k) ", 0.5, {"n": 0.5}),
        ("q9 = Mul (q, n) k9 = Mul (n, k) s = MatMul (q9, k9) ", 0.5, {"n": 0.5**0.5}),
        ("q9 = Div (q, n) s0 = MatMul (q9, k) s = Mul (s0, n) ", 1.0, {"n": 3}),
    ],
)
def test_the_scale_is_the_product_of_all_factors(
    nodes: str, scale: float, numbers: dict[str, float], found: Find
) -> None:
    numbers = {name: np.float32([number]) for name, number in numbers.items()}
    attention = only(found(PROJECT + HEADS + nodes + MIX + MERGE, **numbers))
    assert attention.scale == pytest.approx(scale)


def test_masks_are_added(found: Find) -> None:
    nodes = "s0 = MatMul (q, k) s1 = Add (mask, s0) s = Add (s1, bias) "
    bias = np.linspace(0, 1, 18, dtype=np.float32).reshape(1, 2, 3, 3)
    attention = only(found(PROJECT + HEADS + nodes + MIX + MERGE, ", float[1,1,3,3] mask", bias=bias))
    assert [mask.name for mask in attention.masks] == ["mask", "bias"]


def test_a_condition_may_replace_scores(recognised: Callable[..., Patterns], found: Find) -> None:
    nodes = PROJECT + HEADS + "s0 = MatMul (q, k) s = Where (keep, s0, low) " + MIX + MERGE
    attention = only(
        found(nodes.replace("y = MatMul (m2, wo)", "y = Identity (m2)"), ", bool[1,1,3,3] keep", low=np.float32(-1e9))
    )
    assert [mask.name for mask in attention.masks] == ["keep"] and attention.output is None


def test_heads_may_share_keys_and_values(found: Find, random: np.random.Generator) -> None:
    """One key head for two query heads, repeated, and once more where the MatMul broadcasts."""
    narrow = {name: random.normal(size=(8, 4)).astype(np.float32) for name in ("wk", "wv")}
    shapes = {"one": np.int64([0, 0, 1, 4]), "twice": np.int64([1, 2, 1, 1])}
    heads = HEADS.replace("(k0, split)", "(k0, one)").replace("(v0, split)", "(v0, one)")
    for extra in ("", "repeated"):
        nodes = PROJECT + heads + SCORES + MIX + MERGE
        if extra:
            nodes = nodes.replace("(q, k)", "(q, k9)").replace("(p, v)", "(p, v9)")
            nodes = nodes.replace("s = MatMul", "k9 = Tile (k, twice) v9 = Tile (v, twice) s = MatMul")
        attention = only(found(nodes, **narrow, **shapes))
        assert (attention.heads, attention.kv_heads) == (2, 1)
        assert attention.key.channels is not None and attention.key.channels.tolist() == [[0, 1, 2, 3]] * 2


def test_one_projection_may_make_all_three(found: Find, random: np.random.Generator) -> None:
    nodes = (
        "a0 = MatMul (x, wa) a = Add (a0, ba) q0, k0, v0 = Split <axis = 2> (a, thirds) " + HEADS + SCORES + MIX + MERGE
    )
    attention = only(
        found(
            nodes,
            wa=random.normal(size=(8, 24)).astype(np.float32),
            ba=np.ones(24, np.float32),
            thirds=np.int64([8, 8, 8]),
        )
    )
    assert attention.value.channels is not None and attention.value.channels.min() == 16
    assert attention.query.projection is not None and attention.query.projection.bias is not None


def test_heads_may_stand_in_another_order_behind(found: Find) -> None:
    merge = MERGE.replace("[0, 2, 1, 3]", "[0, 2, 3, 1]")
    attention = only(found(PROJECT + HEADS + SCORES + MIX + merge))
    assert attention.output_channels is not None
    assert attention.output_channels.tolist() == [0, 4, 1, 5, 2, 6, 3, 7]


def test_values_may_stand_in_front_of_transposed_weights(
    recognised: Callable[..., Patterns], random: np.random.Generator
) -> None:
    """Attention over a feature map with 1 by 1 convolutions, as YOLO has it."""
    text = """(float[1,8,2,2] x) => (float[1,8,2,2] y) {
        qkv = Conv (x, wqkv) flat = Reshape (qkv, heads) q, k, v = Split <axis = 2> (flat, sizes)
        qt = Transpose <perm = [0, 1, 3, 2]> (q) s0 = MatMul (qt, k) s = Mul (s0, n) p = Softmax <axis = -1> (s)
        pt = Transpose <perm = [0, 1, 3, 2]> (p) m = MatMul (v, pt) back = Reshape (m, map) y = Conv (back, wo)
    }"""
    weights = {
        "wqkv": random.normal(size=(16, 8, 1, 1)).astype(np.float32),
        "wo": random.normal(size=(8, 8, 1, 1)).astype(np.float32),
        "heads": np.int64([1, 2, 8, 4]),
        "sizes": np.int64([2, 2, 4]),
        "map": np.int64([1, 8, 2, 2]),
        "n": np.float32(0.7),
    }
    attention = only(recognised(text, **weights))
    assert (attention.heads, attention.head_dim, attention.scale) == (2, 2, pytest.approx(0.7))
    assert attention.value.channels is not None and attention.value.channels.tolist() == [
        [4, 5, 6, 7],
        [12, 13, 14, 15],
    ]
    assert attention.output is not None and attention.output.axis == -3


def test_keys_from_a_cache_have_no_projection(found: Find) -> None:
    nodes = PROJECT.replace("k0 = MatMul (x, wk)", "") + HEADS.replace("k1 = Reshape (k0, split) ", "").replace(
        "(k1)", "(cache)"
    )
    attention = only(
        found(
            nodes + SCORES + MIX + MERGE.replace("y = MatMul (m2, wo)", "y = Identity (m2)"), ", float[B,3,2,4] cache"
        )
    )
    assert attention.key.projection is None and attention.key.channels is None and attention.heads == 2


def test_projections_with_a_norm_for_each_head(found: Find) -> None:
    nodes = HEADS.replace(
        "k = Transpose <perm = [0, 2, 3, 1]> (k1)",
        "kn = LayerNormalization <axis = -1> (k1, g) k = Transpose <perm = [0, 2, 3, 1]> (kn)",
    )
    attention = only(found(PROJECT + nodes + SCORES + MIX + MERGE, g=np.float32([1, 2, 0.5, 1])))
    assert attention.key.norm is not None and attention.query.norm is None and attention.key.projection is not None


@pytest.mark.parametrize(
    ("nodes", "reason"),
    [
        (HEADS + SCORES + MIX.replace("-1", "2") + MERGE, "not over the last axis"),
        (HEADS + "s0 = MatMul (q, k) s1 = Tanh (s0) s = Mul (s1, n) " + MIX + MERGE, "no product of two activations"),
        (HEADS + 's = Einsum <equation = "bhid,bhdj->bhij"> (q, k) ' + MIX + MERGE, "come from an Einsum"),
        (HEADS + SCORES + MIX.replace("MatMul", 'Einsum <equation = "bhij,bhjd->bhid">') + MERGE, "go into an Einsum"),
        # attention over the heads of each token
        (
            HEADS.replace("[0, 2, 1, 3]", "[0, 1, 2, 3]").replace("[0, 2, 3, 1]", "[0, 1, 3, 2]")
            + SCORES + MIX + MERGE.replace("[0, 2, 1, 3]", "[0, 1, 2, 3]"),
            "do not stand on the axes",
        ),
    ],
)  # fmt: skip
def test_what_looks_like_one_but_is_none_is_said(nodes: str, reason: str, found: Find) -> None:
    weights = {"n": np.float32(30)} if "(s1, n)" in nodes else {}
    patterns = found(PROJECT + nodes, **weights)
    assert patterns.attentions == ()
    [refusal] = patterns.refusals
    assert reason in refusal.reason


@pytest.mark.parametrize("end", ["y = Softmax <axis = -1> (a)", "p = Softmax <axis = -1> (a) y = MatMul (p, wo)"])
def test_other_softmaxes_are_not_spoken_of(end: str, found: Find) -> None:
    patterns = found("a = MatMul (x, wq) " + end)
    assert patterns.attentions == () and patterns.refusals == ()


def test_weights_that_are_read_elsewhere_are_fine(found: Find) -> None:
    attention = only(found(PROJECT + HEADS + SCORES + MIX + MERGE + " z = Exp (p)", outputs=", float[B,2,3,3] z"))
    assert attention.heads == 2


def test_heads_that_are_read_elsewhere_have_no_output(found: Find) -> None:
    attention = only(found(PROJECT + HEADS + SCORES + MIX + MERGE + " z = Exp (m)", outputs=", float[B,2,3,4] z"))
    assert attention.output is None and attention.output_channels is None
