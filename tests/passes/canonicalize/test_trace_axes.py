"""Axes are followed as far as they are known, and no further; what is followed is what a runtime makes of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from qcompile.core import runtime
from qcompile.passes.canonicalize.shape_contents import study

Build = Callable[..., Any]
#: What operators are given beside x; each is an initializer where the text names it.
CONSTANTS = {
    "w": np.ones((4, 6), np.float32), "turned": np.ones((6, 4), np.float32), "row": np.ones((1, 4), np.float32),
    "i": np.int64([0, 1]), "zero": np.int64([0]), "one": np.int64([1]), "two": np.int64([2]),
    "last": np.int64([-1]), "pads": np.int64([0, 1, 0, 2]), "some": np.int64([0, 1, 0, 0]),
    "spelled": np.int64([0, 2, 2]), "open": np.int64([-1, 2]), "wide": np.int64([3, 1, 4]), "end": np.int64([2]),
    "kernel": np.ones((5, 4, 1), np.float32),
}  # fmt: skip
#: An operator, and what is known of its result where x is [N, 4] and its result's rank is not declared.
OPERATORS = [
    ("Relu (x)", ("N", 4)),
    ("Add (x, row)", ("N", 4)),
    ("Transpose (x)", (4, "N")),
    ("Transpose <perm = [1,0]> (x)", (4, "N")),
    ("Reshape (x, spelled)", ("N", 2, 2)),
    ("Reshape (x, open)", (None, 2)),
    ("Expand (x, wide)", (3, "N", 4)),
    ("MatMul (x, w)", ("N", 6)),
    ("Gemm (x, w)", ("N", 6)),
    ("Gemm <transB = 1> (x, turned)", ("N", 6)),
    ("Gather (x, i)", (2, 4)),
    ("Gather <axis = 1> (x, i)", ("N", 2)),
    ("Unsqueeze (x, one)", ("N", 1, 4)),
    ("Unsqueeze (x, last)", ("N", 4, 1)),
    ("Squeeze (row, zero)", (4,)),
    ("Concat <axis = 1> (x, x)", ("N", 8)),
    ("Concat <axis = 0> (x, x)", (None, 4)),
    ("Slice (x, zero, end, one)", ("N", None)),
    ("Slice (x, zero, end, zero)", (None, 4)),
    ("Pad (x, pads)", ("N", 7)),
    ("Pad (x, some)", ("N", 5)),
    ("ReduceSum (x, one)", ("N", 1)),
    ("ReduceSum <keepdims = 0> (x, one)", ("N",)),
    ("ReduceSum (x)", None),
]  # fmt: skip


def built(operator: str, model_of: Build) -> Any:
    words = operator.replace("(", " ").replace(")", " ").replace(",", " ").split()
    used = {name: array for name, array in CONSTANTS.items() if name in words}
    return model_of(f"(float[N,4] x) => (float[A,B] o) {{ y = {operator} o = Flatten (y) }}", 17, **used)


@pytest.mark.parametrize(("operator", "expected"), OPERATORS)
def test_what_is_known_is_what_a_runtime_makes(
    operator: str, expected: tuple[Any, ...] | None, model_of: Build
) -> None:
    model = built(operator, model_of)
    axes = study(model.graph).axes.get(model.graph[0].outputs[0])
    assert axes == expected
    if axes is None:
        return
    session = runtime.Session(runtime.with_outputs(model, ["y"]), optimize=False)
    for length in (3, 5):
        made = session.run({"x": np.ones((length, 4), np.float32)})["y"].shape
        assert len(made) == len(axes)
        known = [length if axis == "N" else axis for axis in axes]
        assert all(axis is None or axis == one for axis, one in zip(known, made, strict=True)), (axes, made)


@pytest.mark.parametrize("operator", [text for text, _ in OPERATORS if "(row" not in text and "spelled" not in text
                                      and "open" not in text and "(x, i)" not in text])  # fmt: skip
def test_nothing_is_made_of_what_is_not_known(operator: str, model_of: Build) -> None:
    model = built(operator, model_of)
    model.graph.inputs[0].shape = None
    assert model.graph[0].outputs[0] not in study(model.graph).axes


SHAPES = """(float[N,4] x, int64[2] given, float[A,B] e) => (int64[C] o) {{ {nodes} o = Shape (t) }}"""


@pytest.mark.parametrize(
    "nodes",
    [
        "t = Gather (given, zero)", "s = Shape (x) t = Gather (s, given)", "s = Shape (x) t = Gather (s, two)",
        "t = Slice (given, zero, one)", "s = Shape (x) t = Slice (s, given, given)",
        "s = Shape (x) t = Slice (s, one, zero, zero, last)", "s = Shape (x) t = Equal (s, given)",
        "s = Shape (x) t = Add (s, given)",
        "c = Equal (given, given) s = Shape (x) t = Where (c, s, s)",
        "s = Shape (x) t = Cast <to = 1> (s)", "t = Cast <to = 6> (given)", "t = Identity (given)",
        "s = Shape (x) t = Div (s, zero)", "s = Size (x) t = Reshape (s, one)",
    ],
)  # fmt: skip
def test_no_numbers_of_what_the_model_is_given(nodes: str, model_of: Build) -> None:
    words = nodes.replace("(", " ").replace(")", " ").replace(",", " ").split()
    model = model_of(SHAPES.format(nodes=nodes), 17, **{n: array for n, array in CONSTANTS.items() if n in words})
    [value] = [node.outputs[0] for node in model.graph if node.outputs[0].name == "t"]
    known = study(model.graph).numbers.get(value)
    assert known is None or known.numbers is None
