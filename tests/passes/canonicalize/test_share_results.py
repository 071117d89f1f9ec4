from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from qcompile.passes.canonicalize.share_results import SMALL, ShareResults

Build = Callable[..., Any]


@pytest.fixture
def shared(model_of: Build, rewritten: Build, types: Build) -> Build:
    def shared(text: str, **constants: np.ndarray) -> list[str]:
        found: list[str] = types(rewritten(ShareResults(), model_of(text, 21, **constants))[0])
        return found

    return shared


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("Relu (x)", "Relu (x)"),
        ("Add (x, k)", "Add (x, same)"),
        ("Transpose <perm = [1,0]> (x)", "Transpose <perm = [1,0]> (x)"),
        ("Clip (x, , k0)", "Clip (x, , k0)"),
        ("LeakyRelu <alpha = 0.5> (x)", "LeakyRelu <alpha = 0.5> (x)"),
    ],
)
def test_equal_operators_on_equal_operands(first: str, second: str, shared: Build) -> None:
    text = f"(float[3,3] x) => (float[3,3] y) {{ a = {first} b = {second} y = Mul (a, b) }}"
    constants = {"k": np.ones(3, np.float32), "same": np.ones(3, np.float32), "k0": np.float32(0.5)}
    words = set(text.replace(",", " ").replace("(", " ").replace(")", " ").split())
    found = shared(text, **{name: array for name, array in constants.items() if name in words})
    assert found == [first.split()[0], "Mul"]


def test_what_follows_from_equal_results_is_equal(shared: Build) -> None:
    text = """(float[3,3] x) => (float[3,3] y) {
        a = Relu (x) b = Relu (x) c = Exp (a) d = Exp (b) y = Mul (c, d) }"""
    assert shared(text) == ["Relu", "Exp", "Mul"]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("Sub (x, k)", "Sub (k, x)"),
        ("Add (x, k)", "Add (x, other)"),
        ("Add (x, k)", "Add (x, row)"),
        ("Div (k, x)", "Div (minus, x)"),
        ("LeakyRelu <alpha = 0.5> (x)", "LeakyRelu <alpha = 0.25> (x)"),
        ("Transpose <perm = [1,0]> (x)", "Transpose <perm = [0,1]> (x)"),
        ("Relu (x)", "Neg (x)"),
    ],
)
def test_what_differs_stays(first: str, second: str, shared: Build) -> None:
    text = f"(float[3,3] x) => (float[3,3] y) {{ a = {first} b = {second} y = Max (a, b) }}"
    constants = {
        "k": np.zeros(3, np.float32),
        "other": np.ones(3, np.float32),
        "row": np.zeros((1, 3), np.float32),
        "minus": -np.zeros(3, np.float32),
    }
    words = set(text.replace(",", " ").replace("(", " ").replace(")", " ").split())
    assert len(shared(text, **{name: array for name, array in constants.items() if name in words})) == 3


def test_types_are_told_apart(shared: Build) -> None:
    text = "(float[2] x) => (float[2] y, double[2] z) { y = CastLike (x, f) z = CastLike (x, d) }"
    assert len(shared(text, f=np.float32(0), d=np.float64(0))) == 2


@pytest.mark.parametrize("random", ["Bernoulli", "RandomNormalLike", "RandomUniformLike"])
def test_random_operators_stay(random: str, model_of: Build, types: Build) -> None:
    text = f"(float[3] x) => (float[3] y) {{ a = {random} (x) b = {random} (x) y = Sub (a, b) }}"
    model = model_of(text, 21)
    assert not ShareResults()(model).modified and len(types(model)) == 3


def test_operators_with_subgraphs_tensors_or_two_results_stay(model_of: Build, types: Build) -> None:
    branches = "then_branch = t () => (float[2] p) { p = Neg (x) }, else_branch = e () => (float[2] q) { q = Abs (x) }"
    text = f"""(float[2] x, bool f, int64[1] n) => (float[2] y, float[N] z, float[2] w) {{
        a = If (f) <{branches}> b = If (f) <{branches}> y = Mul (a, b)
        c = ConstantOfShape <value = float[1] {{2.0}}> (n) d = ConstantOfShape <value = float[1] {{3.0}}> (n)
        z = Sub (c, d)
        g, h = Split <num_outputs = 2> (x) i, j = Split <num_outputs = 2> (x) w = Concat <axis = 0> (g, j) }}"""
    model = model_of(text, 21)
    before = types(model)
    ShareResults()(model)
    assert types(model) == before


def test_an_attribute_that_is_a_type_stays(model_of: Build, types: Build) -> None:
    model = model_of("(float[2] x) => (float[2] y) { y = Relu (x) }", 21)
    kind = ir.TypeAndShape(ir.OptionalType(ir.TensorType(ir.DataType.FLOAT)), None)
    for _ in range(2):
        node = ir.node("Optional", [], {"type": ir.AttrTypeProto("type", kind)})
        model.graph.append(node)
        model.graph.append(ir.node("OptionalHasElement", node.outputs))
        model.graph.outputs.append(model.graph[-1].outputs[0])
    ShareResults()(model)
    assert types(model).count("Optional") == 2


def test_large_constants_are_compared_by_which_they_are(shared: Build) -> None:
    text = "(float[65] x) => (float[65] y) { a = Add (x, k) b = Add (x, %s) y = Mul (a, b) }"
    k = np.ones(SMALL + 1, np.float32)
    assert shared(text % "k", k=k) == ["Add", "Mul"]
    assert shared(text % "same", k=k, same=k) == ["Add", "Add", "Mul"]


def test_outputs_keep_their_names(shared: Build) -> None:
    assert shared("(float[3] x) => (float[3] a, float[3] b) { a = Relu (x) b = Relu (x) }") == ["Relu", "Identity"]
    text = "(float[3] x) => (float[3] b, float[3] y) { a = Relu (x) b = Relu (x) y = Neg (a) }"
    assert shared(text) == ["Relu", "Neg"]
