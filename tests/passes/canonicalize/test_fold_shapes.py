from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from qcompile.passes.canonicalize.fold_shapes import FoldShapes
from qcompile.passes.canonicalize.infer_shapes import InferShapes

Build = Callable[..., Any]
CHAIN = """(float[%s] x) => (float[%s] y) {
    s = Shape (x) g = Gather (s, zero) u = Unsqueeze (g, axis) t = Concat <axis = 0> (u, rest) y = Reshape (x, t)
}"""
INDEX = {"zero": np.int64(0), "axis": np.int64([0])}


@pytest.fixture
def folded(model_of: Build, rewritten: Build) -> Build:
    def folded(text: str, feeds: dict[str, np.ndarray] | None = None, **constants: np.ndarray) -> Any:
        model = model_of(text, 17, **constants)
        InferShapes()(model)
        return rewritten(FoldShapes(), model, feeds)[0]

    return folded


@pytest.mark.parametrize(
    ("rest", "spelled"), [([12], [0, 12]), ([-1], [0, -1]), ([2, 6], [0, 2, 6]), ([3, 2, 2], [0, 3, 2, 2])]
)
def test_an_axis_that_is_copied_becomes_0(rest: list[int], spelled: list[int], folded: Build) -> None:
    dims = ",".join("NABC"[: len(rest) + 1])
    feeds = {"x": np.ones((5, 3, 4), np.float32)}
    model = folded(CHAIN % ("N,3,4", dims), feeds, rest=np.int64(rest), **INDEX)
    assert [node.op_type for node in model.graph] == ["Reshape"]
    assert model.graph[0].inputs[1].const_value.numpy().tolist() == spelled


def test_known_axes_become_numbers(folded: Build) -> None:
    model = folded(CHAIN % ("2,3,4", "2,12"), rest=np.int64([12]), **INDEX)
    assert model.graph[0].inputs[1].const_value.numpy().tolist() == [2, 12]


def test_two_axes_that_nothing_is_known_of_stay(folded: Build) -> None:
    text = "(float[N,M] x, float[A,B] z) => (float[P,Q] y) { s = Shape (z) y = Reshape (x, s) }"
    feeds = {"x": np.ones((2, 6), np.float32), "z": np.ones((3, 4), np.float32)}
    assert [node.op_type for node in folded(text, feeds).graph] == ["Shape", "Reshape"]


def test_expand_to_its_own_shape_and_beyond(folded: Build) -> None:
    text = """(float[N,1,4] x) => (float[N,P,4] y) {
        s = Shape (x) g = Gather (s, zero) u = Unsqueeze (g, axis)
        t = Concat <axis = 0> (u, rest) y = Expand (x, t) }"""
    model = folded(text, {"x": np.ones((5, 1, 4), np.float32)}, rest=np.int64([3, 4]), **INDEX)
    assert model.graph[0].inputs[1].const_value.numpy().tolist() == [1, 3, 4]


def test_integers_are_divided_toward_zero(folded: Build) -> None:
    text = """(float[7] x) => (int64[1] y) {
        s = Shape (x) n = Neg (s) m = Sub (zero1, s) d = Div (m, two) y = Add (d, n) }"""
    folded(text, zero1=np.int64([0]), two=np.int64([2]))


def test_a_shape_that_is_an_output_is_kept(folded: Build) -> None:
    text = "(float[2,3] x) => (float[2,3] y, int64[2] s) { s = Shape (x) y = Reshape (x, s) }"
    assert "s" in [value.name for value in folded(text).graph.outputs]
