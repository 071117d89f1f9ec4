from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from qcompile.passes.canonicalize.infer_shapes import InferShapes
from qcompile.passes.canonicalize.remove_no_ops import RemoveNoOps

Build = Callable[..., Any]

ZERO, ONE = np.float32(0), np.float32(1)
ONES, ZEROS = np.ones((4, 3), np.float32), np.zeros((4, 3), np.float32)


def between(body: str, shape: str = "float[2,3]") -> str:
    """Put a body that makes t out of s between two operators that stay."""
    return f"({shape} x) => (float y) {{ s = Neg (x) {body} y = ReduceSum <keepdims = 0> (t) }}"


@pytest.mark.parametrize(
    ("body", "weights"),
    [
        ("t = Identity (s)", {}),
        ("t = Add (s, k)", {"k": ZERO}),
        ("t = Sub (s, k)", {"k": ZERO}),
        ("t = Mul (s, k)", {"k": ONE}),
        ("t = Div (s, k)", {"k": ONE}),
        ("t = Cast <to = 1> (s)", {}),
        ("t = Add (k, s)", {"k": ZERO}),
        ("t = Mul (k, s)", {"k": ONE}),
        ("t = Transpose <perm = [0,1]> (s)", {}),
        ("a = Transpose <perm = [1,0]> (s) t = Transpose <perm = [1,0]> (a)", {}),
        ("t = Expand (s, k)", {"k": np.int64([2, 3])}),
    ],
)
def test_what_computes_nothing_is_removed(
    body: str, weights: dict[str, np.ndarray], model_of: Build, rewritten: Build, types: Build
) -> None:
    model = model_of(between(body), **weights)
    InferShapes()(model)
    assert types(rewritten(RemoveNoOps(), model)[0]) == ["Neg", "ReduceSum"]


@pytest.mark.parametrize(
    ("body", "weights"),
    [
        ("a = Reshape (s, k) t = Reshape (a, l)", {"k": np.int64([3, 2]), "l": np.int64([6])}),
        ("a = Unsqueeze (s, k) t = Unsqueeze (a, l)", {"k": np.int64([0]), "l": np.int64([0])}),
        ("a = Transpose <perm = [1,2,0]> (s) t = Transpose <perm = [1,2,0]> (a)", {}),
    ],
)
def test_two_in_a_row_become_one(
    body: str, weights: dict[str, np.ndarray], model_of: Build, rewritten: Build, types: Build
) -> None:
    shape = "float[2,3,1]" if "Transpose" in body else "float[2,3]"
    model = model_of(between(body, shape), **weights)
    InferShapes()(model)
    assert len(types(rewritten(RemoveNoOps(), model)[0])) == 3


def with_shape(body: str) -> str:
    """Put out the values and the shape of t, which a sum would not tell apart."""
    return f"(float[2,3] x) => (float[N] z, int64[R] shape) {{ {body} z = Reshape (t, flat) shape = Shape (t) }}"


@pytest.mark.parametrize(
    ("body", "weights"),
    [
        ("t = Add (s, k)", {"k": ZEROS.reshape(4, 1, 3)}),
        ("t = Mul (s, k)", {"k": ONES.reshape(4, 1, 3)}),
        ("t = Mul (s, k)", {"k": np.ones((1, 1, 1), np.float32)}),
        ("t = Add (s, k)", {"k": np.zeros((1, 1, 1), np.float32)}),
        ("t = Sub (s, k)", {"k": ZEROS.reshape(4, 1, 3)}),
        ("t = Div (s, k)", {"k": ONES.reshape(4, 1, 3)}),
        ("t = Sub (k, s)", {"k": ZERO}),
        ("t = Div (k, s)", {"k": ONE}),
        ("t = Add (s, k)", {"k": np.float32(1e-30)}),
        ("t = Mul (s, k)", {"k": np.float32(1.0000001)}),
        ("t = Cast <to = 11> (s)", {}),
        ("t = Transpose <perm = [1,0]> (s)", {}),
        ("t = Transpose (s)", {}),
        ("t = Expand (s, k)", {"k": np.int64([4, 2, 3])}),
        ("t = Expand (s, k)", {"k": np.int64([1, 2, 3])}),
        ("a = Cast <to = 6> (s) t = Cast <to = 1> (a)", {}),
    ],
)
def test_what_changes_shape_type_or_value_stays(
    body: str, weights: dict[str, np.ndarray], model_of: Build, rewritten: Build, types: Build
) -> None:
    kind = "double" if "to = 11" in body else "float"
    text = with_shape(f"s = Neg (x) {body}").replace("float[N] z", f"{kind}[N] z")
    model = model_of(text, flat=np.int64([-1]), **weights)
    InferShapes()(model)
    before = types(model)
    assert types(rewritten(RemoveNoOps(), model)[0]) == before


@pytest.mark.parametrize(
    ("first", "second", "allowzero"),
    [
        ([0, -1], [-1], 0),
        ([3, 2], [0, -1], 0),
        ([-1, 1], [0, 1], 0),
        ([6], [3, -1], 0),
        ([0, 0], [0, 3], 0),
        ([6], [3, -1], 1),
        ([3, 2], [1, -1], 1),
    ],
)
def test_reshapes_in_a_row_keep_their_function(
    first: list[int], second: list[int], allowzero: int, model_of: Build, rewritten: Build
) -> None:
    attribute = f"<allowzero = {allowzero}>"
    text = with_shape(f"a = Reshape {attribute} (x, k) t = Reshape {attribute} (a, l)")
    model = model_of(text, k=np.int64(first), l=np.int64(second), flat=np.int64([-1]))
    InferShapes()(model)
    rewritten(RemoveNoOps(), model)


@pytest.mark.parametrize(("first", "second"), [([0], [-1]), ([-1], [0]), ([1], [1]), ([-1], [-2]), ([0, 2], [1])])
def test_unsqueezes_in_a_row_keep_their_function(
    first: list[int], second: list[int], model_of: Build, rewritten: Build
) -> None:
    text = with_shape("a = Unsqueeze (x, k) t = Unsqueeze (a, l)")
    model = model_of(text, k=np.int64(first), l=np.int64(second), flat=np.int64([-1]))
    InferShapes()(model)
    rewritten(RemoveNoOps(), model)


def test_the_epsilon_of_a_normalization_stays(model_of: Build, rewritten: Build, types: Build) -> None:
    # Where the deviation is zero, the quotient is 0 / sqrt(1e-12) with it and 0 / 0 without.
    text = """(float[2,3] x) => (float[2,3] y) {
        mean = ReduceMean <axes = [1]> (x)
        c = Sub (x, mean)
        v = Mul (c, c)
        variance = ReduceMean <axes = [1]> (v)
        safe = Add (variance, epsilon)
        deviation = Sqrt (safe)
        y = Div (c, deviation)
    }"""
    x = np.float32([[1, 2, 4], [5, 5, 5]])
    model, _ = rewritten(RemoveNoOps(), model_of(text, epsilon=np.float32(1e-12)), {"x": x})
    assert "Add" in types(model)


def test_a_no_op_between_input_and_output_keeps_both_names(model_of: Build, rewritten: Build) -> None:
    for body in ("y = Identity (x)", "y = Mul (x, one)", "t = Add (x, zero) y = Identity (t)"):
        rewritten(RemoveNoOps(), model_of(f"(float[2,3] x) => (float[2,3] y) {{ {body} }}", one=ONE, zero=ZERO))


def test_a_no_op_whose_result_is_a_graph_output_and_read(model_of: Build, rewritten: Build, types: Build) -> None:
    text = "(float[2,3] x) => (float[2,3] t, float[2,3] y) { s = Neg (x) t = Mul (s, one) y = Exp (t) }"
    model, _ = rewritten(RemoveNoOps(), model_of(text, one=ONE))
    assert "Mul" not in types(model)


def test_a_value_that_is_read_by_two(model_of: Build, rewritten: Build, types: Build) -> None:
    text = "(float[2,3] x) => (float[2,3] y, float[2,3] z) { s = Neg (x) t = Mul (s, one) y = Exp (t) z = Abs (t) }"
    model, _ = rewritten(RemoveNoOps(), model_of(text, one=ONE))
    assert types(model) == ["Neg", "Exp", "Abs"]


def test_two_transposes_of_which_the_first_is_read_elsewhere(model_of: Build, rewritten: Build) -> None:
    text = """(float[2,3] x) => (float[2,3] y, float[3,2] z) {
        a = Transpose <perm = [1,0]> (x) t = Transpose <perm = [1,0]> (a) y = Exp (t) z = Abs (a)
    }"""
    rewritten(RemoveNoOps(), model_of(text))


def test_nobody_reads_it(model_of: Build, rewritten: Build, types: Build) -> None:
    model = model_of("(float[2,3] x) => (float[2,3] y) { y = Neg (x) u = Exp (x) v = Add (u, w) }", w=ONE)
    model, _ = rewritten(RemoveNoOps(), model)
    assert types(model) == ["Neg"]


def test_a_default_that_a_caller_may_replace_is_no_constant(model_of: Build, rewritten: Build, types: Build) -> None:
    model = model_of("(float[2,3] x, float k) => (float[2,3] y) { s = Neg (x) y = Mul (s, k) }", k=ONE)
    model, _ = rewritten(RemoveNoOps(), model, {"k": np.array(3, np.float32)})
    assert types(model) == ["Neg", "Mul"]


def test_a_subgraph_is_left_intact(model_of: Build, rewritten: Build, types: Build) -> None:
    text = """(bool c, float[2,3] x) => (float[2,3] y) {
        s = Mul (x, one)
        y = If (c) <then_branch = t () => (float[2,3] a) { a = Exp (s) },
                    else_branch = e () => (float[2,3] b) { b = Identity (s) }>
    }"""
    for branch in (True, False):
        model, _ = rewritten(RemoveNoOps(), model_of(text, one=ONE), {"c": np.array(branch)})
        assert types(model)[0] == "If" and "Exp" in types(model)


@pytest.mark.parametrize("opset", [9, 11, 13])
def test_older_opsets(opset: int, model_of: Build, rewritten: Build, types: Build) -> None:
    text = "(float[2,3] x) => (float[2,3] y) { s = Neg (x) m = Mul (s, one) t = Cast <to = 1> (m) y = Exp (t) }"
    model = model_of(text, opset, one=ONE)
    InferShapes()(model)
    model, _ = rewritten(RemoveNoOps(), model)
    assert types(model) == ["Neg", "Exp"]


def test_the_body_of_a_loop_keeps_its_outputs_apart(model_of: Build, rewritten: Build) -> None:
    """What is carried on is also collected: with one value as both outputs, ONNX Runtime reads freed memory."""
    text = """(float i, float[5] x) => (float y, float[5] z) {
        y, z = Scan <num_scan_inputs = 1, body = b (float s, float n) => (float t, float u) {
            t = Add (s, n)
            u = Identity (t)
        }> (i, x)
    }"""
    model, _ = rewritten(RemoveNoOps(), model_of(text))
    scan = next(node for node in model.graph if node.op_type == "Scan")
    carried, collected = scan.attributes["body"].as_graph().outputs
    assert carried is not collected


@pytest.mark.parametrize(
    ("nodes", "left"),
    [
        ("a = Transpose <perm = [1,2,0]> (x) b = Transpose <perm = [2,0,1]> (a) c = Transpose <perm = [0,2,1]> (b)"
         " d = Transpose <perm = [0,2,1]> (c) y = Neg (d)", ["Neg"]),
        ("a = Transpose <perm = [1,2,0]> (x) b = Mul (a, one) c = Transpose <perm = [2,0,1]> (b) d = Add (c, zero)"
         " e = Transpose <perm = [2,1,0]> (d) f = Transpose <perm = [2,1,0]> (e) y = Neg (f)", ["Neg"]),
        ("a = Reshape (x, s) b = Reshape (a, t) c = Reshape (b, s) d = Reshape (c, t) y = Neg (d)", ["Reshape", "Neg"]),
    ],
)  # fmt: skip
def test_pairs_behind_pairs(nodes: str, left: list[str], model_of: Build, rewritten: Build, types: Build) -> None:
    constants = {"one": np.float32(1), "zero": np.float32(0), "s": np.int64([6, 4]), "t": np.int64([2, 3, 4])}
    used = {name: array for name, array in constants.items() if f", {name})" in nodes}
    model, _ = rewritten(RemoveNoOps(), model_of(f"(float[2,3,4] x) => (float[2,3,4] y) {{ {nodes} }}", 21, **used))
    assert types(model) == left


def test_what_comes_to_stand_in_a_row_is_joined_too(model_of: Build, rewritten: Build, types: Build) -> None:
    text = """(float[2,3] x) => (float[2,3,1,1] y) {
        a = Unsqueeze (x, k) t = Transpose <perm = [2,1,0]> (a) u = Transpose <perm = [2,1,0]> (t) y = Unsqueeze (u, l)
    }"""
    model, _ = rewritten(RemoveNoOps(), model_of(text, k=np.int64([2]), l=np.int64([3])))
    assert types(model) == ["Unsqueeze"]
