from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from qcompile.passes.canonicalize.infer_shapes import InferShapes
from qcompile.passes.canonicalize.merge_casts import MergeCasts

Build = Callable[..., Any]
CODES = {
    "float": 1,
    "uint8": 2,
    "int8": 3,
    "int32": 6,
    "int64": 7,
    "bool": 9,
    "float16": 10,
    "double": 11,
    "uint32": 12,
}
#: Numbers that a way through a narrower type would change.
VALUES = np.array([-300.7, -1.5, 0.1, 1.9, 7.0, 70000.3])


@pytest.fixture
def cast(model_of: Build, rewritten: Build) -> Build:
    """Cast along a way of types and return what types are cast to in the end."""

    def cast(*way: str) -> list[int]:
        names = ["x", *(f"v{index}" for index in range(len(way) - 2)), "y"]
        steps = zip(names, names[1:], way[1:], strict=False)
        nodes = " ".join(f"{new} = Cast <to = {CODES[kind]}> ({old})" for old, new, kind in steps)
        model = model_of(f"({way[0]}[6] x) => ({way[-1]}[6] y) {{ {nodes} }}", 21)
        InferShapes()(model)
        with np.errstate(all="ignore"):
            dtype = np.dtype({"float": "f4", "double": "f8"}.get(way[0], way[0]))
            x = (np.abs(VALUES) % 100 if dtype.kind in "iub" else VALUES % 60000).astype(dtype)
        merged, _ = rewritten(MergeCasts(), model, {"x": x})
        return [node.attributes.get_int("to", 0) for node in merged.graph if node.op_type == "Cast"]

    return cast


@pytest.mark.parametrize(
    ("way", "left"),
    [
        (("float16", "float", "float16"), []),
        (("float", "double", "float"), []),
        (("int32", "int64", "int32"), []),
        (("uint8", "int32", "uint8"), []),
        (("float16", "float", "double"), ["double"]),
        (("float", "double", "float16"), ["float16"]),
        (("int8", "int32", "float"), ["float"]),
        (("uint8", "int64", "bool"), ["bool"]),
        (("float16", "float", "double", "float", "float16"), []),
        # What loses digits, or changes its kind, stays.
        (("float", "float16", "float"), ["float16", "float"]),
        (("float", "int32", "float"), ["int32", "float"]),
        (("int64", "int32", "int64"), ["int32", "int64"]),
        (("int8", "uint8", "int8"), ["uint8", "int8"]),
        (("int8", "uint32", "int64"), ["uint32", "int64"]),
        (("int32", "float", "int32"), ["float", "int32"]),
        (("int32", "double", "int32"), ["double", "int32"]),
        (("bool", "float", "bool"), ["float", "bool"]),
    ],
)
def test_ways_of_types(way: tuple[str, ...], left: list[str], cast: Build) -> None:
    expected = [CODES[kind] for kind in left]
    # An input is no output: what remains of a way there and back at the border is an Identity.
    assert cast(*way) == expected


def test_a_middle_that_others_read_or_that_is_an_output_stays(model_of: Build, rewritten: Build, types: Build) -> None:
    twice = """(float16[6] x) => (float16[6] y, float[6] z) {
        r = Relu (x) a = Cast <to = 1> (r) b = Cast <to = 10> (a) y = Neg (b) z = Neg (a) }"""
    output = """(float16[6] x) => (float16[6] y, float[6] a) {
        r = Relu (x) a = Cast <to = 1> (r) b = Cast <to = 10> (a) y = Neg (b) }"""
    for text in (twice, output):
        model = model_of(text, 21)
        InferShapes()(model)
        assert types(rewritten(MergeCasts(), model)[0]).count("Cast") == 1


def test_a_source_of_unknown_type_stays(model_of: Build, types: Build) -> None:
    model = model_of(
        "(float16[6] x) => (double[6] y) { r = Relu (x) a = Cast <to = 1> (r) y = Cast <to = 11> (a) }", 21
    )
    model.graph[0].outputs[0].type = None
    assert not MergeCasts()(model).modified and types(model) == ["Relu", "Cast", "Cast"]
