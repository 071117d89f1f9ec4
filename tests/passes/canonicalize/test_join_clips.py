from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from qcompile.passes.canonicalize.infer_shapes import InferShapes
from qcompile.passes.canonicalize.join_clips import JoinClips

Build = Callable[..., Any]
INF = np.inf
TYPES = {"float": np.float32, "float16": np.float16, "double": np.float64}
#: -inf as masks have it, and both zeros.
X = np.array([-INF, -2, -0.5, -0.0, 0.0, 0.5, 2, 1e4])


def constants(dtype: type = np.float32) -> dict[str, np.ndarray]:
    numbers = {"zero": 0.0, "one": 1.0, "six": 6.0, "low": -1.0}
    if np.dtype(dtype).kind == "f":
        numbers |= {"least": -INF, "most": INF}
    return {name: np.asarray(number, dtype) for name, number in numbers.items()} | {
        "row": np.asarray([1.0], dtype),
        "grid": np.asarray([[1.0]], dtype),
        "many": np.linspace(0, 1, 8).astype(dtype),
    }


@pytest.fixture
def joined(model_of: Build, rewritten: Build) -> Build:
    """Rewrite ``x → y`` and return each node that is left with its bounds."""

    def joined(nodes: str, kind: str = "float", results: str = "") -> list[tuple[str, list[float | None]]]:
        words = set(nodes.replace(",", " ").replace("(", " ").replace(")", " ").split())
        used = {name: array for name, array in constants(TYPES.get(kind, np.int32)).items() if name in words}
        rank = "1,8" if "grid" in nodes else "8"
        model = model_of(f"({kind}[8] x, {kind} t) => ({kind}[{rank}] y{results}) {{ {nodes} }}", 21, **used)
        feeds = {"x": (X if kind in TYPES else X[1:].clip(-9, 9).repeat(2)[:8]).astype(TYPES.get(kind, np.int32))}
        InferShapes()(model)
        copy, _ = rewritten(JoinClips(), model, feeds)
        return [(node.op_type, [float(v.const_value.numpy().reshape(())) if v is not None and v.const_value is not None
                 and v.const_value.size == 1 else None for v in node.inputs[1:]]) for node in copy.graph]  # fmt: skip

    return joined


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize(
    ("nodes", "left"),
    [
        ("y = Clip (x, zero)", [("Relu", [])]),
        ("y = Max (zero, x)", [("Relu", [])]),
        ("y = Min (x, six)", [("Clip", [-INF, 6])]),
        ("y = Max (x, row)", [("Clip", [1, INF])]),
        ("a = Max (x, zero) y = Min (six, a)", [("Clip", [0, 6])]),
        ("a = Relu (x) y = Clip (a, low, six)", [("Clip", [0, 6])]),
        ("a = Relu (x) b = Relu (a) y = Relu (b)", [("Relu", [])]),
        ("a = Clip (x, low, one) b = Relu (a) y = Min (b, six)", [("Clip", [0, 1])]),
        ("a = Clip (x, zero, one) y = Max (a, six)", [("Clip", [6, 6])]),
        ("a = Min (x, zero) y = Clip (a, one, six)", [("Clip", [1, 1])]),
        ("a = Neg (x) b = Clip (a, least, most) y = Neg (b)", [("Neg", []), ("Neg", [])]),
    ],
)  # fmt: skip
def test_bounds_become_one_operator(nodes: str, left: list[Any], kind: str, joined: Build) -> None:
    assert joined(nodes, kind) == left


def test_a_bound_that_is_nan_and_a_type_that_is_unknown_stay(model_of: Build) -> None:
    model = model_of("(float[3] x) => (float[3] y) { a = Min (x, one) y = Neg (a) }", 21, one=np.float32(1))
    assert not JoinClips()(model).modified  # nobody inferred the type of a
    InferShapes()(model)
    bound = model.graph.initializers["one"]
    bound.const_value = ir.tensor(np.float32(np.nan), name="one")
    assert not JoinClips()(model).modified


def test_a_clip_without_bounds_goes(model_of: Build, rewritten: Build, types: Build) -> None:
    model = model_of("(float[3] x) => (float[3] y) { a = Neg (x) b = Clip (a) y = Neg (b) }", 21)
    InferShapes()(model)
    assert types(rewritten(JoinClips(), model)[0]) == ["Neg", "Neg"]


@pytest.mark.parametrize(
    ("nodes", "kind"),
    [
        ("y = Max (x, zero)", "int32"),
        ("y = Clip (x, one, zero)", "float"),
        ("y = Clip (x, zero, t)", "float"),
        ("y = Max (x, t)", "float"),
        ("y = Max (x, many)", "float"),
        ("y = Max (x, grid)", "float"),
        ("y = Max (x, x)", "float"),
        ("y = Max (x, zero, one)", "float"),
        ("a = Clip (x, low, one) y = Clip (a, six, zero)", "float"),
    ],
)
def test_what_stays(nodes: str, kind: str, joined: Build) -> None:
    kept = [part.split("(")[0].split("=")[1].strip() for part in nodes.split(")")[:-1]]
    assert [op_type for op_type, _ in joined(nodes, kind)] == kept


def test_a_value_that_others_read_or_that_is_an_output_is_not_joined(joined: Build) -> None:
    assert joined("a = Max (x, low) y = Min (a, six) z = Neg (a)", results=", float[8] z") == [
        ("Clip", [-1, INF]), ("Clip", [-INF, 6]), ("Neg", [])]  # fmt: skip
    assert joined("a = Clip (x, low, six) y = Relu (a)", results=", float[8] a") == [("Clip", [-1, 6]), ("Relu", [])]


def test_a_branch_reads_what_stands_between(model_of: Build, rewritten: Build, types: Build) -> None:
    text = """(float[3] x, bool f) => (float[3] y, float[3] z) {
        a = Clip (x, low, six) y = Relu (a)
        z = If (f) <then_branch = t () => (float[3] p) { p = Neg (a) },
                    else_branch = e () => (float[3] q) { q = Abs (a) }>
    }"""
    model = model_of(text, 21, low=np.float32(-1), six=np.float32(6))
    InferShapes()(model)
    assert types(rewritten(JoinClips(), model)[0]).count("Clip") == 1
