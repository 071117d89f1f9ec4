from collections.abc import Callable
from typing import Any

import pytest

from qcompile.core import model as models
from qcompile.core import runtime
from qcompile.passes.canonicalize.fix_names import FixNames

Build = Callable[..., Any]


def node_names(model: Any) -> list[str]:
    return [node.name for node in model.graph.all_nodes()]


def test_unnamed_nodes_are_named_after_their_type(model_of: Build, rewritten: Build) -> None:
    model, _ = rewritten(
        FixNames(), model_of("(float[3] x) => (float[3] y) { a = Exp (x) [neg] b = Neg (a) y = Exp (b) }")
    )
    assert node_names(model) == ["Exp_0", "neg", "Exp_2"]


def test_a_name_that_is_taken_is_avoided(model_of: Build, rewritten: Build) -> None:
    text = "(float[3] x) => (float[3] y) { a = Exp (x) [Exp_0] b = Neg (a) [Exp_0_] y = Exp (b) }"
    model, _ = rewritten(FixNames(), model_of(text))
    assert len(set(node_names(model))) == 3
    assert node_names(model)[1:] == ["Exp_0", "Exp_0_"], "names that were there stay"


def test_two_nodes_of_one_name_are_told_apart(model_of: Build) -> None:
    # ONNX allows it; ONNX Runtime refuses to load it.
    model = model_of("(float[3] x) => (float[3] y) { [n] a = Exp (x) [n] b = Neg (a) [n] y = Exp (b) }")
    FixNames()(model)
    assert len(set(node_names(model))) == 3
    assert node_names(model)[0] == "n"
    assert not FixNames()(model).modified
    runtime.Session(model)


def test_nodes_inside_subgraphs_are_told_apart_from_those_outside(model_of: Build, rewritten: Build) -> None:
    text = """(bool c, float[2] x) => (float[2] z) {
        [n] y = If (c) <then_branch = t () => (float[2] a) { [n] a = Exp (x) },
                    else_branch = e () => (float[2] b) { b = Neg (x) }>
        z = Neg (y)
    }"""
    model, _ = rewritten(FixNames(), model_of(text))
    names = node_names(model)
    assert len(names) == 4 and len(set(names)) == 4 and all(names)


def test_named_nodes_stay_as_they_are(model_of: Build) -> None:
    model = model_of("(float[3] x) => (float[3] y) { [a] t = Exp (x) [b] y = Neg (t) }")
    before = models.serialize(model)
    assert not FixNames()(model).modified
    assert models.serialize(model) == before


@pytest.mark.parametrize("opset", [9, 11, 17])
def test_opsets(opset: int, model_of: Build, rewritten: Build) -> None:
    model, _ = rewritten(FixNames(), model_of("(float[3] x) => (float[3] y) { y = Exp (x) }", opset))
    assert node_names(model) == ["Exp_0"]
