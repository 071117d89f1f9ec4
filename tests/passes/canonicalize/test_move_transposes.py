import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from qcompile.passes.canonicalize.infer_shapes import InferShapes
from qcompile.passes.canonicalize.move_transposes import MoveTransposes, regions, settle, turn

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


def test_a_pad_in_front_of_anything_else_stays_where_it_is(moved: Build) -> None:
    text = f"""(float[2,4,5,6] x) => (float[A,B,C,D] y) {{
        p = Pad (x, pads) t = {THERE} (p) h, i = Split <axis = 2> (t, halves) m = Mul (h, i)
        y = Transpose <perm = [1,3,2,0]> (m) }}"""
    assert moved(text, pads=np.int64([0, 0, 1, 0, 0, 0, 0, 2]), halves=np.int64([4, 4]))[0] == "Pad"


def test_a_transpose_whose_result_is_an_output_is_not_shared(moved: Build) -> None:
    text = f"""(float[2,3,4,5] x) => (float[A,B,C,D] y, float[2,4,5,3] z) {{
        s = Sub (x, x) a = {THERE} (s) r = Exp (a) z = {THERE} (x) y = {THERE} (r) }}"""
    assert moved(text).count("Transpose") <= 2


def test_a_transpose_that_an_interface_needs_is_an_identity(moved: Build) -> None:
    text = (
        "(float[N,3,4] x) => (float[N,3,4] y) { a = Transpose <perm = [2,0,1]> (x) y = Transpose <perm = [1,2,0]> (a) }"
    )
    assert moved(text) == ["Identity"]


def test_a_name_that_is_taken(moved: Build) -> None:
    text = f"""(float[1,3,4,5] x, float[1,3,4,5] z) => (float[1,4,5,3] y, float[1,4,5,3] c_transposed) {{
        a = {THERE} (x) b = {THERE} (z) c = Add (a, b) y = Relu (c) c_transposed = Neg (y) }}"""
    assert moved(text).count("Transpose") <= 2


@pytest.mark.parametrize(
    "between",
    [
        "r = Relu (a) b = Slice (r, one, two, last)", "b = Slice (a, one, two)",
        "b = ReduceMax <keepdims = 1> (a, axes)", "b = Pad <mode = \"reflect\"> (a, pads)",
        "c, d = Split <axis = -1> (a, sizes) b = Concat <axis = -1> (d, c)",
        "b = LogSoftmax <axis = 1> (a)", "b = PRelu (a, slope)", "b = Max (a, k2)",
    ],
)  # fmt: skip
def test_axes_counted_from_behind_and_constants_of_lower_rank(between: str, moved: Build) -> None:
    constants = {
        "one": np.int64([1]), "two": np.int64([3]), "last": np.int64([-1]), "axes": np.int64([-1, 1]),
        "pads": np.int64([0, 1, 2, 0, 0, 0, 1, 0]), "sizes": np.int64([1, 2]), "slope": np.float32([0.1, 0.2, 0.3]),
        "k2": np.linspace(-1, 1, 15).reshape(5, 3).astype(np.float32),
    }  # fmt: skip
    words = set(between.replace(",", " ").replace("(", " ").replace(")", " ").split())
    text = f"(float[4,3,4,5] x) => (float[A,B,C,D] y) {{ a = {THERE} (x) {between} y = {BACK} (b) }}"
    assert "Transpose" not in moved(text, **{name: array for name, array in constants.items() if name in words})


@pytest.mark.parametrize(
    "between",
    [
        "b = Pad (a, pads, , axes)",
        "b = ReduceMean (a, t)",
        "b = LayerNormalization (a, k)",
        "b = Slice (a, t, two, one)",
    ],
)
def test_what_does_care_stays(between: str, model_of: Build, rewritten: Build, types: Build) -> None:
    constants = {"pads": np.int64([1, 1]), "axes": np.int64([1]), "k": np.ones(3, np.float32), "one": np.int64([1]),
                 "two": np.int64([3])}  # fmt: skip
    words = set(between.replace(",", " ").replace("(", " ").replace(")", " ").split())
    given = ", int64[1] t" if "t" in words else ""
    text = f"(float[2,3,4,5] x{given}) => (float[A,B,C,D] y) {{ a = {THERE} (x) {between} y = {BACK} (b) }}"
    model = model_of(text, 21, **{name: array for name, array in constants.items() if name in words})
    InferShapes()(model)
    feeds = {"t": np.int64([1])} if given else {}
    assert types(rewritten(MoveTransposes(), model, feeds)[0]).count("Transpose") == 2


def test_two_regions_do_not_turn_back_and_forth(moved: Build) -> None:
    text = f"""(float[2,3,4,5] x) => (float[2,3,4,5] y) {{
        t = {THERE} (x) r = Relu (t) s = Sigmoid (r) a = {BACK} (r) b = {BACK} (s) y = Add (a, b) }}"""
    assert "Transpose" not in moved(text)


@pytest.mark.parametrize(
    "text",
    [
        "(float[4,4,4] x) => (float[4,4,4] y) { r = Exp (x) t = Transpose <perm = [1,2,0]> (r) a = Sub (r, t)"
        " y = Transpose <perm = [2,0,1]> (a) }",
        "(float[4,4] x) => (float[4,4] y) { r = Exp (x) t = Transpose (r) a = Add (r, t) y = Transpose (a) }",
        "(float[4,4] x) => (float[4] y) { t = Transpose (x) a = Sub (x, t) y = ReduceSum <keepdims = 0> (a, axes) }",
    ],
)
def test_a_value_and_what_a_transpose_makes_of_it_stay_two(text: str, moved: Build) -> None:
    constants = {"axes": np.int64([1])} if "axes" in text else {}
    assert "Transpose" in moved(text, **constants)


def test_a_region_that_reads_one_value_in_two_layouts(moved: Build) -> None:
    text = """(float[4,4,4] x) => (float[4,4,4] y) {
        t = Transpose <perm = [1,2,0]> (x) a = Sub (x, t) y = Transpose <perm = [2,0,1]> (a) }"""
    assert moved(text) == ["Transpose", "Sub"]


def test_a_transpose_in_a_branch_stays_there(moved: Build) -> None:
    text = f"""(float[2,3,4,5] x, bool c) => (float[A,B,C,D] y) {{
        t = {THERE} (x) r = Relu (t)
        y = If (c) <then_branch = then () => (float[2,3,4,5] u) {{ u = {BACK} (r) }},
                    else_branch = other () => (float[2,3,4,5] v) {{ n = Neg (x) v = Exp (n) }}> }}"""
    assert moved(text).count("Transpose") == 2


def test_a_reduction_without_a_region_takes_a_transpose_in(moved: Build) -> None:
    text = f"(float[1,3,4,5] x) => (float[1,3] y) {{ t = {THERE} (x) y = ReduceMean <keepdims = 0> (t, axes) }}"
    assert moved(text, axes=np.int64([1, 2])) == ["ReduceMean"]


def test_equal_transposes_are_one(moved: Build) -> None:
    text = f"""(float[2,3,4,5] x) => (float[2,4,5,3] y, float[2,60] z) {{
        a = {THERE} (x) z = Flatten (a) y = {THERE} (x) }}"""
    assert moved(text) == ["Transpose", "Flatten"]


def test_equal_transposes_that_are_both_outputs(moved: Build) -> None:
    text = f"(float[2,3,4,5] x) => (float[2,4,5,3] y, float[2,4,5,3] z) {{ y = {THERE} (x) z = {THERE} (x) }}"
    assert moved(text) == ["Transpose", "Identity"]


def test_a_reduction_behind_an_equal_transpose_takes_it_in(moved: Build) -> None:
    text = """(float[3,4] x) => (float[4,3] y, float[3] z) {
        a = Transpose (x) b = Transpose (a) y = Transpose (b) z = ReduceMax <keepdims = 0> (y, axes) }"""
    assert moved(text, axes=np.int64([0])) == ["Transpose", "ReduceMax"]


@pytest.mark.parametrize(
    "text",
    [
        "t = Transpose <perm = [1,2,0]> (x) a = Sub (x, t) y = Transpose <perm = [2,0,1]> (a)",
        "r = Exp (x) t = Transpose <perm = [1,2,0]> (r) a = Sub (r, t) s = Softmax (x) y = Max (a, s)",
        "t = Transpose <perm = [1,0,2]> (x) a = Add (x, t) r = ReduceSum <keepdims = 0> (a, axes) y = Mul (a, r)",
        "t = Transpose <perm = [2,1,0]> (x) r = Exp (t) u = Transpose <perm = [1,2,0]> (r) s = Sigmoid (u)"
        " c = CumSum (s, one) d = Transpose <perm = [0,2,1]> (r) y = Add (c, d)",
    ],
)
def test_a_turn_removes_as_many_transposes_as_it_says(text: str, model_of: Build, types: Build) -> None:
    constants = {"axes": np.int64([1]), "one": np.array(1)}
    used = {name: array for name, array in constants.items() if f", {name})" in text}
    model = model_of(f"(float[3,3,3] x) => (float[3,3,3] y) {{ {text} }}", 18, **used)
    InferShapes()(model)
    settle(model.graph)
    before = types(model).count("Transpose")
    ways = [(i, p) for i, _ in enumerate(regions(model.graph)) for p in itertools.permutations(range(3))]
    for index, p in ways:
        copy = model.clone()
        region = list(regions(copy.graph))[index]
        gain = region.gain(p)
        turn(region, p)
        settle(copy.graph)
        assert before - types(copy).count("Transpose") == gain
    assert ways
