from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from qcompile.passes.canonicalize.infer_shapes import InferShapes
from qcompile.passes.canonicalize.move_transposes import MoveTransposes

Build = Callable[..., Any]
THERE, BACK = "Transpose <perm = [0,2,3,1]>", "Transpose <perm = [0,3,1,2]>"


@pytest.fixture
def moved(model_of: Build, rewritten: Build, types: Build) -> Callable[..., list[str]]:
    def moved(text: str, **constants: np.ndarray) -> list[str]:
        model = model_of(text, 18, **constants)
        InferShapes()(model)
        found: list[str] = types(rewritten(MoveTransposes(), model)[0])
        return found

    return moved


@pytest.mark.parametrize(
    "between",
    ["u = Relu (t)", "u = Add (t, k)", "u = Mul (k, t)",
     "a = Sigmoid (t) u = Mul (t, a)", "u = Softmax <axis = -1> (t)",
     "u = Concat <axis = 3> (t, t)", "u = Concat <axis = -1> (t, k4)", "u = Pad (t, pads)",
     "u = Slice (t, one, two, one)",
     "u = Where (m, t, k)", "u = ReduceMean (t, axes)"],
)  # fmt: skip
def test_a_pair_disappears_around_what_does_not_care(between: str, moved: Build) -> None:
    text = f"(float[2,3,4,5] x) => (float[A,B,C,D] y) {{ t = {THERE} (x) {between} y = {BACK} (u) }}"
    constants = {
        "k": np.linspace(1, 2, 3, dtype=np.float32),
        "k4": np.ones((2, 4, 5, 3), np.float32),
        "pads": np.int64([0, 1, 2, 0, 0, 0, 1, 0]),
        "one": np.int64([1]),
        "two": np.int64([2]),
        "axes": np.int64([1, -1]),
        "m": np.array([True, False, True]),
    }
    used = {name: array for name, array in constants.items() if f" {name})" in between or f"({name}," in between
            or f", {name}," in between}  # fmt: skip
    assert "Transpose" not in moved(text, **used)


def test_two_transposed_branches_become_one(moved: Build) -> None:
    text = f"""(float[1,3,4,5] x, float[1,3,4,5] z) => (float[1,4,5,3] y) {{
        a = {THERE} (x) b = {THERE} (z) c = Add (a, b) y = Relu (c) }}"""
    assert moved(text).count("Transpose") == 1


def test_a_reduction_takes_the_last_one_in(moved: Build) -> None:
    text = f"""(float[1,3,4,5] x) => (float[1,3] y) {{
        t = {THERE} (x) r = Relu (t) y = ReduceMean <keepdims = 0> (r, axes) }}"""
    assert "Transpose" not in moved(text, axes=np.int64([1, 2]))


def test_a_pad_comes_to_stand_in_front_of_its_conv(moved: Build) -> None:
    text = f"(float[1,5,5,3] x) => (float[1,2,N,M] y) {{ p = Pad (x, pads) t = {BACK} (p) y = Conv (t, w) }}"
    constants = {"pads": np.int64([0, 1, 1, 0, 0, 1, 1, 0]), "w": np.ones((2, 3, 3, 3), np.float32)}
    assert moved(text, **constants) == ["Transpose", "Pad", "Conv"]


@pytest.mark.parametrize(
    "text",
    [
        f"(float[1,3,4,5] x) => (float[1,4,5,3] y) {{ t = {THERE} (x) y = Relu (t) }}",
        f"(float[1,3,4,5] x, float[4,5,3] z) => (float[1,3,4,5] y) {{ t = {THERE} (x) a = Add (t, z) y = {BACK} (a) }}",
        f"(float[1,3,4,5] x) => (float[1,4,15] y) {{ t = {THERE} (x) r = Relu (t) y = Reshape (r, s) }}",
    ],
)
def test_what_would_not_get_fewer_stays(text: str, moved: Build) -> None:
    before = text.count("Transpose")
    assert moved(text, **({"s": np.int64([1, 4, 15])} if "(r, s)" in text else {})).count("Transpose") == before


def test_values_read_twice_and_outputs_keep_their_names(moved: Build) -> None:
    text = f"""(float[1,3,4,5] x) => (float[1,3,4,5] y, float[1,4,5,3] u, float[1,4,5,3] t) {{
        t = {THERE} (x) u = Relu (t) y = {BACK} (u) }}"""
    assert moved(text).count("Transpose") <= 2
