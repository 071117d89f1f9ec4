from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from qcompile.passes.canonicalize.infer_shapes import InferShapes
from qcompile.passes.canonicalize.merge_views import MergeViews

Build = Callable[..., Any]
SHAPES = {
    "first": np.int64([0]),
    "last": np.int64([-1]),
    "flat": np.int64([0, -1]),
    "known": np.int64([2, 3, 4]),
    "rest": np.int64([-1, 4]),
    "twos": np.int64([0, 2, 2, 3]),
}
X = {"x": np.arange(60, dtype=np.float32).reshape(5, 3, 4) + 1}


@pytest.fixture
def merged(model_of: Build, rewritten: Build) -> Build:
    def merged(text: str, feeds: dict[str, np.ndarray] | None = None) -> Any:
        used = {name: array for name, array in SHAPES.items() if f", {name})" in text}
        model = model_of(text, 21, **used)
        InferShapes()(model)
        return rewritten(MergeViews(), model, feeds)[0]

    return merged


@pytest.mark.parametrize(
    ("views", "shape"),
    [
        ("a = Unsqueeze (x, first) y = Reshape (a, rest)", [-1, 4]),
        ("a = Flatten (x) b = Unsqueeze (a, last) y = Squeeze (b, last)", [0, 12]),
        ("a = Reshape (x, flat) y = Reshape (a, twos)", [0, 2, 2, 3]),
        ("a = Unsqueeze (x, last) b = Transpose <perm = [0,3,1,2]> (a) y = Flatten (b)", [0, 12]),
        ("a = Unsqueeze (x, last) b = Transpose <perm = [3,0,1,2]> (a) y = Reshape (b, rest)", [-1, 4]),
    ],
)
def test_views_in_a_row_are_one_reshape(views: str, shape: list[int], merged: Build) -> None:
    axes = ",".join("A" if length == -1 else "N" if length == 0 else str(length) for length in shape)
    model = merged(f"(float[N,3,4] x) => (float[{axes}] y) {{ {views} }}", X)
    assert [node.op_type for node in model.graph] == ["Reshape"]
    assert model.graph[0].inputs[1].const_value.numpy().tolist() == shape


@pytest.mark.parametrize(
    "views",
    [
        "b = Reshape (a, known)",
        "u = Unsqueeze (a, first) b = Squeeze (u, first)",
        "u = Unsqueeze (a, last) t = Transpose <perm = [3,0,1,2]> (u) b = Squeeze (t, first)",
        "f = Flatten (a) b = Reshape (f, known)",
    ],
)
def test_a_way_there_and_back_disappears(views: str, merged: Build) -> None:
    model = merged(f"(float[2,3,4] x) => (float[2,3,4] y) {{ a = Relu (x) {views} y = Neg (b) }}")
    assert [node.op_type for node in model.graph] == ["Relu", "Neg"]


@pytest.mark.parametrize(
    ("text", "types"),
    [
        # two axes that no -1 tells apart
        ("(float[N,M,4] x) => (float[1,A,B,4] y) { a = Reshape (x, flat) r = Relu (a) y = Unsqueeze (x, first) }",
         ["Unsqueeze"]),
        ("(float[2,3,4] x) => (float[2,12] y) { a = Unsqueeze (x, first) r = Relu (a) y = Reshape (r, flat0) }",
         ["Unsqueeze", "Relu", "Reshape"]),
        ("(float[2,3,4] x) => (float[3,8] y) { t = Transpose <perm = [1,0,2]> (x) y = Flatten (t) }",
         ["Transpose", "Flatten"]),
        ("(float[2,2] x) => (float[4] y) { t = Transpose (x) y = Reshape (t, last) }", ["Transpose", "Reshape"]),
        ("(float[0,3,4] x) => (float[0,12] y) { a = Unsqueeze (x, last) y = Flatten (a) }",
         ["Unsqueeze", "Flatten"]),
    ],
)  # fmt: skip
def test_what_stays(text: str, types: list[str], model_of: Build, rewritten: Build) -> None:
    used = {name: array for name, array in SHAPES.items() if f", {name})" in text}
    used |= {"flat0": np.int64([2, 12])} if "flat0" in text else {}
    model = model_of(text, 21, **used)
    InferShapes()(model)
    if "[0," not in text:
        model, _ = rewritten(MergeViews(), model)
    else:
        MergeViews()(model)  # nothing to compare in tensors without elements
    assert [node.op_type for node in model.graph] == types


def test_a_view_that_others_read_stays_for_them(merged: Build) -> None:
    text = """(float[N,3,4] x) => (float[A,B] y, float[A,B] z) {
        a = Flatten (x) z = Relu (a) u = Unsqueeze (a, last) y = Squeeze (u, last) }"""
    model = merged(text, X)
    assert [node.op_type for node in model.graph].count("Reshape") <= 1
    assert {"Flatten", "Relu"} <= {node.op_type for node in model.graph}


def test_outputs_keep_their_names(merged: Build) -> None:
    text = "(float[2,3,4] x) => (float[2,3,4] y, float[2,12] a) { a = Flatten (x) y = Reshape (a, known) }"
    model = merged(text)
    assert [node.op_type for node in model.graph] == ["Flatten", "Identity"]


def test_a_branch_reads_a_view(merged: Build) -> None:
    text = """(float[2,3,4] x, bool f) => (float[2,12] y) {
        a = Unsqueeze (x, first) b = Flatten <axis = 2> (a)
        y = If (f) <then_branch = t () => (float[2,12] p) { p = Relu (b) },
                    else_branch = e () => (float[2,12] q) { q = Neg (b) }> }"""
    model = merged(text, {"f": np.array(True)})
    assert [node.op_type for node in model.graph][-1] == "If"
