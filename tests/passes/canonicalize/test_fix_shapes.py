from collections.abc import Callable
from typing import Any

import pytest

from qcompile.core import model as models
from qcompile.core.errors import TargetError, UsageError
from qcompile.passes.canonicalize.fix_shapes import FixShapes
from qcompile.passes.canonicalize.infer_shapes import InferShapes

Build = Callable[..., Any]
TEXT = "(float[N,3,M] x, float[2] u) => (float[N,3,M] y, float[2] v) { a = Exp (x) y = Neg (a) v = Neg (u) }"


def test_open_axes_are_fixed_and_carried_on(model_of: Build) -> None:
    model = model_of(TEXT)
    result = FixShapes({"x": (1, 3, 7)})(model)
    assert result.modified
    assert list(model.graph.inputs[0].shape) == [1, 3, 7]
    InferShapes()(model)
    assert list(model.graph[0].outputs[0].shape) == [1, 3, 7]


def test_a_fixed_shape_may_be_repeated(model_of: Build, rewritten: Build) -> None:
    rewritten(FixShapes({"u": (2,)}), model_of(TEXT))


def test_fixing_twice_changes_nothing(model_of: Build) -> None:
    model = model_of(TEXT)
    FixShapes({"x": (1, 3, 7)})(model)
    once = models.serialize(model)
    FixShapes({"x": (1, 3, 7)})(model)
    assert models.serialize(model) == once


def test_nothing_asked_for_is_nothing_done(model_of: Build, rewritten: Build) -> None:
    model = model_of(TEXT)
    assert not FixShapes({})(model).modified
    rewritten(FixShapes({}), model)


def test_an_unknown_input_is_named(model_of: Build) -> None:
    with pytest.raises(UsageError, match=r"^--shape z: the model has no such input; its inputs are x, u$"):
        FixShapes({"z": (1,)})(model_of(TEXT))


@pytest.mark.parametrize(("name", "shape"), [("x", (1, 4, 7)), ("x", (1, 3)), ("u", (3,)), ("u", (1, 2))])
def test_a_shape_that_does_not_fit_is_refused(name: str, shape: tuple[int, ...], model_of: Build) -> None:
    model = model_of(TEXT)
    before = models.serialize(model)
    asked = "x".join(map(str, shape))
    with pytest.raises(UsageError, match=rf"^--shape {name}: {asked} does not fit .*; only open axes can be fixed$"):
        FixShapes({name: shape})(model)
    assert models.serialize(model) == before


def test_an_input_without_a_shape_takes_any(model_of: Build) -> None:
    model = model_of("(float x) => (float y) { y = Neg (x) }")
    model.graph.inputs[0].shape = None
    FixShapes({"x": (4, 5)})(model)
    assert list(model.graph.inputs[0].shape) == [4, 5]


def test_an_open_batch_becomes_one(model_of: Build) -> None:
    model = model_of("(float[N,3] x, float[2] u) => (float[N,3] y, float[2] v) { a = Exp (x) y = Neg (a) v = Neg (u) }")
    assert FixShapes({}, batch_of_one=True)(model).modified
    assert not FixShapes({}, batch_of_one=True)(model).modified
    InferShapes()(model)
    assert [list(value.shape) for value in (*model.graph.inputs, *model.graph.outputs)] == [[1, 3], [2]] * 2


def test_other_open_axes_are_refused_then(model_of: Build) -> None:
    with pytest.raises(TargetError, match=r"'x'.*open shape.*--shape x=1x"):
        FixShapes({}, batch_of_one=True)(model_of(TEXT))
    model = model_of(TEXT)
    assert FixShapes({"x": (1, 3, 7)}, batch_of_one=True)(model).modified
