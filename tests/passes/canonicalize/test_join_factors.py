from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from qcompile.passes.canonicalize.join_factors import JoinFactors

Build = Callable[..., Any]
CONSTANTS = {
    "two": np.float32(2),
    "half": np.float32(0.5),
    "row": np.float32([1, 2, 3]),
    "column": np.float32([[1], [2]]),
    "zero": np.float32([1, 0, 3]),
    "huge": np.float32(1e30),
    "tiny": np.float32(1e-30),
}


@pytest.fixture
def joined(model_of: Build, rewritten: Build) -> Build:
    def joined(nodes: str, results: str = "", strict: bool = True) -> Any:
        words = set(nodes.replace(",", " ").replace("(", " ").replace(")", " ").split())
        used = {name: array for name, array in CONSTANTS.items() if name in words}
        model = model_of(f"(float[2,3] x, float[3] t) => (float[2,3] y{results}) {{ {nodes} }}", 21, **used)
        if strict:
            return rewritten(JoinFactors(), model)[0]
        JoinFactors()(model)
        return model

    return joined


@pytest.mark.parametrize(
    ("nodes", "factor"),
    [
        ("a = Mul (x, two) y = Mul (row, a)", [2, 4, 6]),
        ("a = Div (x, half) y = Mul (a, two)", 4),
        ("a = Mul (two, x) y = Div (a, row)", [2, 1, 2 / 3]),
        ("a = Div (x, two) b = Div (a, two) y = Div (b, two)", 0.125),
        ("a = Mul (x, huge) y = Mul (a, tiny)", 1),
    ],
)
def test_factors_in_a_row(nodes: str, factor: Any, joined: Build) -> None:
    [node] = joined(nodes).graph
    assert node.op_type == "Mul"
    np.testing.assert_allclose(node.inputs[1].const_value.numpy(), factor, rtol=1e-6)


@pytest.mark.parametrize(
    "nodes",
    [
        "a = Mul (x, two) y = Add (a, row)",
        "a = Add (x, two) y = Mul (a, row)",
        "a = Mul (x, t) y = Mul (a, row)",
        "a = Mul (x, two) y = Div (row, a)",
        "a = Mul (x, row) y = Mul (a, column)",
        "a = Mul (x, zero) y = Mul (a, two)",
        "a = Div (x, zero) y = Mul (a, two)",
        "a = Mul (x, huge) y = Mul (a, huge)",
        "a = Mul (x, tiny) y = Mul (a, tiny)",
        "a = Mul (x, x) y = Mul (a, two)",
    ],
)
def test_what_stays(nodes: str, joined: Build) -> None:
    # Some of these give infinities and NaN, which say nothing about a function: that nothing changes is the point.
    assert len(list(joined(nodes, strict=False).graph)) == 2


def test_types_that_differ_and_integers_stay(model_of: Build) -> None:
    model = model_of("(int32[3] x) => (int32[3] y) { a = Mul (x, k) y = Div (a, k) }", 21, k=np.int32(2))
    assert not JoinFactors()(model).modified


@pytest.mark.parametrize(("kind", "dtype"), [("float16", np.float16), ("double", np.float64)])
def test_other_floats(kind: str, dtype: type, model_of: Build, rewritten: Build, types: Build) -> None:
    model = model_of(f"({kind}[3] x) => ({kind}[3] y) {{ a = Mul (x, k) y = Div (a, k) }}", 21, k=np.asarray(3, dtype))
    model, _ = rewritten(JoinFactors(), model)
    assert types(model) == ["Mul"] and model.graph[0].inputs[1].const_value.numpy().dtype == dtype


def test_a_value_that_others_read_or_that_is_an_output_stays(joined: Build) -> None:
    twice = joined("a = Mul (x, two) y = Mul (a, row) z = Neg (a)", ", float[2,3] z")
    output = joined("a = Mul (x, two) y = Mul (a, row)", ", float[2,3] a")
    assert [[node.op_type for node in model.graph] for model in (twice, output)] == [["Mul", "Mul", "Neg"], ["Mul"] * 2]


def test_a_name_that_is_taken_is_not_given_again(joined: Build) -> None:
    model = joined("a = Mul (x, two) y = Mul (a, row) y_factor = Relu (y)", ", float[2,3] y_factor")
    assert [value.name for value in model.graph.outputs] == ["y", "y_factor"]
