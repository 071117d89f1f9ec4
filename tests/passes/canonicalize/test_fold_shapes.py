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


@pytest.mark.parametrize(
    ("nodes", "numbers"),
    [
        ("s = Shape (x) g = Gather (s, last) u = Unsqueeze (g, axis) t = Concat <axis = 0> (minus, u)", [-1, 4]),
        ("s = Shape <start = 1> (x) t = Concat <axis = 0> (minus, s)", [-1, 3, 4]),
        # What is not followed stays as it is, on numbers where those are known.
        ("s = Shape (x) g = Slice (s, one, end) p = ReduceProd (g) t = Concat <axis = 0> (minus, p)", None),
        ("s = Shape (x) i = Cast <to = 6> (s) m = Mul (i, ones) t = Cast <to = 7> (m)", [0, 3, 4]),
        ("z = Size (row) u = Reshape (z, axis1) t = Concat <axis = 0> (minus, u)", [-1, 4]),
    ],
)  # fmt: skip
def test_ways_to_write_a_shape(nodes: str, numbers: list[int] | None, folded: Build) -> None:
    constants = {
        "last": np.int64(-1), "axis": np.int64([0]), "minus": np.int64([-1]), "one": np.int64([1]),
        "end": np.int64([2**63 - 1]), "ones": np.int32([1, 1, 1]), "row": np.ones(4, np.float32),
        "axis1": np.int64([1]),
    }  # fmt: skip
    words = set(nodes.replace(",", " ").replace("(", " ").replace(")", " ").split())
    rank = "A,B,C" if numbers is not None and len(numbers) == 3 else "A,B"
    text = f"(float[N,3,4] x) => (float[{rank}] y) {{ {nodes} y = Reshape (x, t) }}"
    used = {name: array for name, array in constants.items() if name in words}
    model = folded(text, {"x": np.ones((5, 3, 4), np.float32)}, **used)
    shape = model.graph[-1].inputs[1].const_value
    assert (None if shape is None else shape.numpy().tolist()) == numbers


def test_a_zero_that_means_none_is_not_copied(folded: Build) -> None:
    text = "(float[N,3] x, float[M,0] e) => (float[P,Q] y) { s = Shape (e) y = Reshape <allowzero = 1> (x0, s) }"
    model = folded(text, {"x": np.ones((2, 3), np.float32), "e": np.ones((2, 0), np.float32)},
                   x0=np.zeros((0, 3), np.float32))  # fmt: skip
    assert [node.op_type for node in model.graph][-1] == "Reshape"


def test_a_shape_that_two_read(folded: Build) -> None:
    text = """(float[N,3,4] x, float[N,12] z) => (float[N,12] y, float[N,12] w) {
        s = Shape (x) g = Gather <axis = 0> (s, zero) u = Unsqueeze (g, axis) t = Concat <axis = 0> (u, rest)
        y = Reshape (x, t) w = Reshape (z, t) }"""
    feeds = {"x": np.ones((5, 3, 4), np.float32), "z": np.ones((5, 12), np.float32)}
    assert [node.op_type for node in folded(text, feeds, rest=np.int64([12]), **INDEX).graph] == ["Reshape", "Reshape"]


def test_numbers_that_no_axis_has_stay(folded: Build) -> None:
    text = """(float[4] x) => (int64[1] y) {
        s = Shape (x) a = Mul (s, big) b = Mul (a, big) y = Add (b, s) }"""
    folded(text, big=np.int64([2**40]))
