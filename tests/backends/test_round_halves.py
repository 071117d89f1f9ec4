"""float16 by a processor: each result is what a device would store."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from qcompile.backends.ort.half import Halve, float_values
from qcompile.backends.ort.legalize import CUDA_RULES, legalize
from qcompile.backends.ort.round_halves import rounded
from qcompile.core import runtime
from qcompile.passes.canonicalize import Canonicalize

Build = Callable[..., ir.Model]
Array = np.ndarray[Any, np.dtype[Any]]


def halved(model: ir.Model) -> ir.Model:
    """Return a model in float16 as it is written, as if all its values were known to fit."""
    model = Canonicalize(21, {})(model).model
    Halve(dict.fromkeys(float_values(model), 1.0))(model)
    return legalize(model, CUDA_RULES)


def half(array: Array) -> Array:
    with np.errstate(over="ignore"):
        return array.astype(np.float16).astype(np.float32)


def test_each_result_is_rounded_once(model_of: Build, random: np.random.Generator) -> None:
    text = """(float[4,32] x) => (float[4,16] y) {
        a = MatMul (x, w) b = Relu (a) c = Mul (b, b) d = Transpose <perm = [0, 1]> (c) y = Add (d, k) }"""
    w, k = random.standard_normal((32, 16)).astype(np.float32), random.standard_normal(16).astype(np.float32)
    x = random.standard_normal((4, 32)).astype(np.float32)
    found = runtime.Session(rounded(halved(model_of(text, w=w, k=k)))).run({"x": x})["y"]
    products = half(half(x) @ half(w))
    expected = half(half(np.square(np.maximum(products, 0))) + half(k))
    # Sums in another order may fall to the other side of a rounding: one step, of 2^-11, squared.
    np.testing.assert_allclose(found, expected, rtol=2.0**-8, atol=2.0**-9)
    assert np.mean(found == expected) > 0.9
    assert not np.array_equal(found, np.square(np.maximum(x @ w, 0)) + k)


def test_overflow_is_seen_where_the_processor_alone_would_hide_it(model_of: Build) -> None:
    text = "(float[1,8] x) => (float[1,8] y) { a = MatMul (x, w) b = Mul (a, a) c = Sqrt (b) y = MatMul (c, w) }"
    model = halved(model_of(text, w=np.eye(8, dtype=np.float32)))
    x = np.full((1, 8), 300.0, np.float32)
    assert np.isfinite(runtime.Session(model).run({"x": x})["y"]).all()
    assert not np.isfinite(runtime.Session(rounded(model)).run({"x": x})["y"]).any()


def test_codes_of_products_stay_codes(model_of: Build, random: np.random.Generator) -> None:
    text = """(float[2,32] x) => (float[2,8] h, float[2,8] y) {
        w = DequantizeLinear <axis = 1> (q, s, z) h = MatMul (x, w) y = Softmax (h) }"""
    codes, scale = random.integers(-127, 128, (32, 8)).astype(np.int8), np.full(8, 2.0**-6, np.float32)
    model = halved(model_of(text, 21, q=codes, s=scale, z=np.zeros(8, np.int8)))
    assert "MatMulNBits" in {node.op_type for node in model.graph}
    x = random.standard_normal((2, 32)).astype(np.float32)
    found = runtime.Session(rounded(model)).run({"x": x})
    np.testing.assert_allclose(found["h"], half(half(x) @ (codes * scale)), rtol=2.0**-10, atol=1e-3)
    np.testing.assert_array_equal(found["h"], half(found["h"]))


def test_float32_stays_as_it_is(model_of: Build, random: np.random.Generator) -> None:
    model = model_of("(float[2,8] x) => (float[2,8] y) { y = Exp (x) }")
    same = rounded(model)
    assert [node.op_type for node in same.graph] == ["Exp"]
    x = random.standard_normal((2, 8)).astype(np.float32)
    np.testing.assert_array_equal(
        runtime.Session(same).run({"x": x})["y"], runtime.Session(model).run({"x": x})["y"])  # fmt: skip


@pytest.mark.parametrize("opset", [17, 21])
def test_inputs_and_outputs_of_float16_keep_their_type(proto_of: Callable[..., Any], opset: int) -> None:
    model = ir.from_proto(
        proto_of("(float16[2,8] x) => (float16[2,8] y) { a = Exp (x) y = Cast <to = 10> (a) }", opset)
    )
    found = runtime.Session(rounded(model)).run({"x": np.ones((2, 8), np.float16)})["y"]
    assert found.dtype == np.float16
    np.testing.assert_array_equal(found, np.full((2, 8), np.e).astype(np.float16))
