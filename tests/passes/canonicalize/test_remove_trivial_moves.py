from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from qcompile.passes.canonicalize.infer_shapes import InferShapes
from qcompile.passes.canonicalize.remove_trivial_moves import RemoveTrivialMoves

Build = Callable[..., Any]
CONSTANTS = {
    "zeros": np.int64([0] * 4),
    "nothing": np.zeros(0, np.int64),
    "ones": np.int64([1, 1]),
    "own": np.int64([1, 4]),
    "zero": np.int64([0]),
    "one": np.int64([1]),
    "two": np.int64([2]),
    "minus": np.int64([-1]),
    "four": np.int64([4]),
    "end": np.int64([2**63 - 1]),
    "end32": np.int32([2**31 - 1]),
    "zero32": np.int32([0]),
    "grown": np.int64([3, 1, 1]),
    "pads": np.int64([0, 0, 0, 1]),
    "axes": np.int64([0, 1]),
}


@pytest.fixture
def moved(model_of: Build, rewritten: Build, types: Build) -> Build:
    def moved(text: str, feeds: dict[str, np.ndarray] | None = None) -> list[str]:
        words = set(text.replace(",", " ").replace("(", " ").replace(")", " ").split())
        model = model_of(text, 21, **{name: array for name, array in CONSTANTS.items() if name in words})
        InferShapes()(model)
        found: list[str] = types(rewritten(RemoveTrivialMoves(), model, feeds)[0])
        return found

    return moved


@pytest.mark.parametrize(
    "move",
    [
        "b = Slice (a, zero, end, one)", "b = Slice (a, zero, four, minus)", "b = Slice (a, zero32, end32)",
        "b = Slice (a, zero, end, zero, one)", "b = Pad (a, zeros)", "b = Pad <mode = 'edge'> (a, zeros)",
        "b = Pad (a, nothing, , nothing)", "b = Expand (a, ones)", "b = Expand (a, own)", "b = Expand (a, nothing)",
        "b = Tile (a, ones)", "b = Concat <axis = -1> (a)", "b = Sum (a)", "b = Max (a)",
        "b = Split <axis = 1, num_outputs = 1> (a)",
    ],
)  # fmt: skip
def test_what_moves_nothing_goes(move: str, moved: Build) -> None:
    if "nothing, ," in move:
        move = "b = Pad (a, nothing)" if False else move
    text = f"(float[N,4] x) => (float[N,4] y) {{ a = Relu (x) {move} y = Neg (b) }}".replace("'", '"')
    assert moved(text) == ["Relu", "Neg"]


@pytest.mark.parametrize(
    "move",
    [
        "b = Slice (a, one, end, one)", "b = Slice (a, zero, two, one)", "b = Slice (a, zero, end, one, two)",
        "b = Slice (a, zero, four, zero)", "b = Slice (a, minus, end, one)", "b = Pad (a, pads)",
        "b = Expand (a, grown)", "b = Tile (a, two2)", "b = Slice (a, s, end, one)",
    ],
)  # fmt: skip
def test_what_moves_something_stays(move: str, model_of: Build, rewritten: Build, types: Build) -> None:
    given = ", int64[1] s" if "(a, s," in move else ""
    rank = "float[A,B,C] y" if "grown" in move else "float[A,B] y"
    text = f"(float[N,4] x{given}) => ({rank}) {{ a = Relu (x) {move} y = Neg (b) }}"
    constants = CONSTANTS | {"two2": np.int64([2, 2])}
    model = model_of(text, 21, **{name: array for name, array in constants.items() if f" {name}" in move})
    InferShapes()(model)
    feeds = {"x": np.arange(20, dtype=np.float32).reshape(5, 4)} | ({"s": np.int64([0])} if given else {})
    assert types(rewritten(RemoveTrivialMoves(), model, feeds)[0]) == types(model)


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("a = Slice (x, one, end, zero) y = Slice (a, one, end, one)", ["Slice"]),
        ("a = Slice (x, zero, two, zero) y = Slice (a, minus, zero, one, minus)", ["Slice"]),
        ("a = Slice (x, zero, two, minus) b = Slice (a, one, end, zero) y = Slice (b, zero, one, one)",
         ["Slice", "Slice"]),
        ("a = Slice (x, one, end, one) y = Slice (a, one, end, minus)", ["Slice", "Slice"]),
        ("a = Concat <axis = 1> (x, x) y = Concat <axis = -1> (a, x)", ["Concat"]),
        ("a = Concat <axis = 0> (x, x) y = Concat <axis = 1> (a, a)", ["Concat", "Concat"]),
        ("a = Concat <axis = 1> (x, x) y = Concat <axis = 1> (a, a)", ["Concat", "Concat"]),
    ],
)  # fmt: skip
def test_moves_in_a_row(text: str, left: list[str], moved: Build) -> None:
    assert moved(f"(float[3,4] x) => (float[A,B] y) {{ {text} }}") == left


@pytest.mark.parametrize("move", ["Slice (x, one, end, zero)", "Concat <axis = 1> (x, x)"])
def test_a_nested_result_that_is_read_twice_or_an_output_stays(move: str, moved: Build) -> None:
    behind = "Slice (a, one, end, one)" if "Slice" in move else "Concat <axis = 1> (a, x)"
    kind = move.split()[0]
    twice = f"(float[3,4] x) => (float[A,B] y, float[C,D] z) {{ a = {move} y = {behind} z = Relu (a) }}"
    output = f"(float[3,4] x) => (float[A,B] y, float[C,D] a) {{ a = {move} y = {behind} }}"
    assert moved(twice).count(kind) == 2 and moved(output).count(kind) == 2


def test_an_output_keeps_its_name(moved: Build) -> None:
    assert moved("(float[3,4] x) => (float[3,4] y) { y = Pad (x, zeros) }") == ["Identity"]
    assert moved("(float[3,4] x) => (float[3,4] y) { a = Relu (x) y = Pad (a, zeros) }") == ["Relu"]
