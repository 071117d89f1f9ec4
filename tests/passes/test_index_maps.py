from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcompile.passes.index_maps import evaluate, labels, moved, scalar

Build = Callable[..., ir.Model]


def value(model: ir.Model, name: str) -> ir.Value:
    return ir.convenience.create_value_mapping(model.graph)[name]


def test_shapes_are_computed_as_far_as_they_are_known(model_of: Build) -> None:
    text = """(float[B,6,8] x) => (float[a,b,c] y) {
        s = Shape (x) n = Gather (s, last) h = Div (n, two) u = Unsqueeze (h, zero) b = Slice (s, zero, one)
        t = Concat <axis = 0> (b, u, minus) y = Reshape (x, t)
    }"""
    numbers = {
        "last": np.int64(2),
        "two": np.int64(3),
        "zero": np.int64([0]),
        "one": np.int64([1]),
        "minus": np.int64([-1]),
    }
    model = model_of(text, **numbers)
    np.testing.assert_array_equal(evaluate(value(model, "t")), [np.nan, 2, -1])
    np.testing.assert_array_equal(evaluate(value(model, "t"), 1.0), [1, 2, -1])
    assert scalar(value(model, "h")) == 2.0, "integers are divided as integers"
    assert scalar(value(model, "t")) is None and evaluate(value(model, "x")) is None and evaluate(None) is None


def test_a_number_of_the_batch_is_not_known(model_of: Build) -> None:
    model = model_of("(float[B] x) => (float[1] y) { s = Shape (x) c = Cast <to = 1> (s) y = Sqrt (c) }")
    assert scalar(value(model, "y")) is None


def test_large_tensors_are_no_numbers(model_of: Build) -> None:
    model = model_of("(float[65] x) => (float[65] y) { y = Add (x, w) }", w=np.ones(65, np.float32))
    assert evaluate(value(model, "w")) is None


MOVES = [
    "y = Transpose <perm = [2, 0, 1]> (x)",
    "y = Transpose (x)",
    "y = Flatten <axis = 2> (x)",
    "y = Flatten <axis = 0> (x)",
    "y = Flatten <axis = -1> (x)",
    "y = Reshape (x, reshape)",
    "y = Unsqueeze (x, ends)",
    "y = Squeeze (z, first)",
    "y = Slice (x, begin, end, axes, steps)",
    "y = Slice (x, begin, end)",
    "y = Gather <axis = 1> (x, picks)",
    "y = Gather <axis = -1> (x, one)",
    "y, other = Split <axis = 2> (x)",
    "other, y = Split <axis = -1> (x, parts)",
    "y = Tile (x, repeats)",
    "y = Expand (z, wide)",
]


@pytest.mark.parametrize("nodes", MOVES)
def test_labels_move_as_the_operator_moves_elements(
    nodes: str, proto_of: Callable[..., object], model_of: Build
) -> None:
    from onnx.reference import ReferenceEvaluator

    integers = {
        "reshape": [4, 0, -1], "ends": [0, -1], "first": [0], "begin": [3, -1], "end": [-100, -3], "axes": [2, 1],
        "steps": [-1, -1], "picks": [2, 0, 0], "one": 1, "parts": [1, 3], "repeats": [1, 2, 2], "wide": [2, 1, 3, 4],
    }  # fmt: skip
    used = {name: np.int64(number) for name, number in integers.items() if name in nodes}
    if "begin" in used and "axes" not in used:
        used |= {"begin": np.int64([1, 0]), "end": np.int64([2, 2])}
    names = ", ".join(name for name in ("other",) if name in nodes)
    shape = "1,2,3,4" if "(z" in nodes else "2,3,4"
    source = "z" if "(z" in nodes else "x"
    outputs = "float[] y" + (f", float[] {names}" if names else "")
    text = f"(int64[{shape}] {source}) => ({outputs.replace('float', 'int64')}) {{ {nodes} }}"
    if "reshape" in used:
        used["reshape"] = np.int64([2, 2, -1])
    array = np.arange(24).reshape([int(n) for n in shape.split(",")])
    expected = ReferenceEvaluator(proto_of(text, **used)).run(["y"], {source: array})[0]
    node = model_of(text, **used).graph[-1]
    results = moved(node, array)
    assert results is not None
    np.testing.assert_array_equal(results[[output.name for output in node.outputs].index("y")], expected)


def test_what_is_not_known_moves_nothing(model_of: Build) -> None:
    model = model_of("(float[2,3] x, int64[2] s) => (float[a,b] y) { y = Reshape (x, s) }")
    assert moved(model.graph[0], np.arange(6).reshape(2, 3)) is None
    model = model_of("(float[A,4] x) => (float[a,b] y) { y = Reshape (x, s) }", s=np.int64([-1, 8]))
    assert moved(model.graph[0], np.arange(4).reshape(1, 4)) is None, "an open axis of 1 cannot be cut"
    text = "(float[A,4] x) => (float[a,b] y) { s = Shape <end = 1> (x) y = Slice (x, s, e, one) }"
    model = model_of(text, e=np.int64([4]), one=np.int64([1]))
    assert moved(model.graph[1], np.arange(4).reshape(1, 4)) is None, "where the slice starts is not known"
    model = model_of("(float[1,3] x) => (float[3] y) { y = Squeeze (x) }")
    assert moved(model.graph[0], np.arange(3).reshape(1, 3)) is None


@given(st.permutations(range(3)))
def test_labels_number_one_axis(order: list[int]) -> None:
    lengths: list[int | str] = [[2, 3, "open"][i] for i in order]
    x = ir.Value(name="x", shape=ir.Shape(lengths))
    for axis, length in enumerate(lengths):
        numbers = labels(x, axis)
        if length == "open":
            assert numbers is None
        else:
            assert numbers is not None and numbers.shape == tuple(1 if n == "open" else n for n in lengths)
            np.testing.assert_array_equal(np.moveaxis(numbers, axis, -1)[0, 0], range(int(length)))
    assert labels(x, 3) is None and labels(ir.Value(name="y"), 0) is None
