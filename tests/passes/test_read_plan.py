"""What a model that was quantized before computes on codes, operator by operator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from qcompile.core.errors import UsageError
from qcompile.core.plan import OpPlan, Precision, QuantPlan
from qcompile.core.target import Target
from qcompile.passes.canonicalize.infer_shapes import InferShapes
from qcompile.passes.check_plan import check_plan
from qcompile.passes.read_plan import is_quantized, read_ops

Build = Callable[..., Any]
FLOAT = "float in the model that came in"
QDQ = """(float[1,8] x) => (float[1,8] y) {
    q = QuantizeLinear (x, s, z) a = DequantizeLinear (q, s, z) c = DequantizeLinear (w, s, o)
    [both] m = MatMul (a, c) [half] h = MatMul (m, c) [sum] u = Add (a, a) [soft] y = Softmax (%s) }"""
CODES = {"s": np.float32(0.05), "z": np.uint8(7), "o": np.int8(0)}


def coded(model_of: Build, last: str = "h") -> Any:
    model = model_of(QDQ % last, 21, w=np.arange(64, dtype=np.int8).reshape(8, 8), **CODES)
    InferShapes()(model)
    return model


def test_an_operator_computes_on_codes_where_all_that_it_reads_was_codes(model_of: Build, eager: Target) -> None:
    model = coded(model_of)
    assert is_quantized(model)
    assert read_ops(model, eager) == {
        "both": OpPlan("MatMul", Precision.INTEGER),
        "half": OpPlan("MatMul", Precision.FLOAT, FLOAT),
        "sum": OpPlan("Add", Precision.INTEGER),
        "soft": OpPlan("Softmax", Precision.FLOAT, FLOAT),
    }


def test_what_the_target_has_no_kernel_for_is_float_whatever_it_reads(model_of: Build, eager: Target) -> None:
    ops = read_ops(coded(model_of, "a"), eager)
    assert ops["soft"] == OpPlan("Softmax", Precision.FLOAT, FLOAT)


def test_a_model_without_codes(model_of: Build, eager: Target) -> None:
    model = model_of("(float[1,8] x, int64[1,8] i) => (float[1,8] y, int64[1,8] j) { [a] y = Add (x, x) "
                     "[b] j = Add (i, i) }")  # fmt: skip
    assert not is_quantized(model)
    assert {op.precision for op in read_ops(model, eager).values()} == {Precision.FLOAT}


def test_codes_inside_of_a_branch_count(model_of: Build) -> None:
    text = """(bool b, float[1,8] x) => (float[1,8] y) {
        y = If (b) <then_branch = t () => (float[1,8] p) { [inner] q = QuantizeLinear (x, s, z)
                    p = DequantizeLinear (q, s, z) }, else_branch = e () => (float[1,8] r) { r = Add (x, x) }> }"""
    assert is_quantized(model_of(text, 21, s=CODES["s"], z=CODES["z"]))


def test_a_plan_for_a_quantized_model_says_what_the_model_says(model_of: Build, eager: Target) -> None:
    model = coded(model_of)
    ops = read_ops(model, eager)
    assert check_plan(model, QuantPlan({}, ops), eager) == QuantPlan({}, ops)
    edited = QuantPlan({}, {**ops, "both": OpPlan("MatMul", Precision.FLOAT, "as the plan asks")})
    with pytest.raises(UsageError, match="decides for a model that is quantized already, whose own decisions stand"):
        check_plan(model, edited, eager)
