"""float16 where it fits: what is computed in it, what is not and why, and where the Casts stand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcompile.backends.ort.half import Halve, float_values
from qcompile.backends.ort.half_values import fits
from qcompile.backends.ort.round_halves import rounded
from qcompile.core import model as models
from qcompile.core import runtime
from qcompile.passes.canonicalize import Canonicalize

Build = Callable[..., ir.Model]
W = np.random.default_rng(0).standard_normal((8, 8)).astype(np.float32)


def halved(
    model: ir.Model, x: np.ndarray, headroom: float = 4.0, **options: Any
) -> tuple[ir.Model, dict[str, str], dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Return the model in float16, why nodes are not, and the outputs before and after; inputs stay as they were."""
    model = Canonicalize(21, {})(model).model
    names = float_values(model)
    seen = runtime.Session(runtime.with_outputs(model, names), optimize=False).run({"x": x}) | {"x": x}
    reach = {name: float(np.max(np.abs(seen[name]))) for name in names}
    before = {value.name: seen[value.name] for value in model.graph.outputs if value.name}
    found = Halve(reach, headroom, **options)(model)
    assert [value.dtype for value in model.graph.outputs] == [ir.DataType.FLOAT] * len(model.graph.outputs)
    after = runtime.Session(model, optimize=False).run({"x": x})
    reasons = {model.graph.node(refusal.node).op_type: refusal.reason for refusal in found.refusals}
    return model, reasons, before, after


def rounded_run(model: ir.Model, x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return what a device computes: each result rounded to its type."""
    return np.asarray(runtime.Session(rounded(model.clone()), optimize=False).run({"x": x})["y"])


def types(model: ir.Model) -> dict[str, ir.DataType | None]:
    return {node.op_type: node.outputs[0].dtype for node in model.graph if node.op_type != "Cast"}


def casts(model: ir.Model) -> int:
    return sum(node.op_type == "Cast" for node in model.graph)


HALF, SINGLE = ir.DataType.FLOAT16, ir.DataType.FLOAT


def test_a_network_is_halves_between_two_casts(model_of: Build, random: np.random.Generator) -> None:
    text = "(float[2,8] x) => (float[2,8] y) { a = MatMul (x, w) b = Relu (a) c = MatMul (b, w) y = Softmax (c) }"
    x = random.standard_normal((2, 8)).astype(np.float32)
    model, reasons, before, after = halved(model_of(text, w=W), x)
    assert not reasons and set(types(model).values()) == {HALF} and casts(model) == 2
    np.testing.assert_allclose(after["y"], before["y"], atol=2e-2)
    assert sum(value.dtype is HALF for value in model.graph.initializers.values()) == 1  # w, once for both


def test_what_overflows_stays_and_nothing_else(model_of: Build, random: np.random.Generator) -> None:
    text = """(float[2,8] x) => (float[2,8] y) {
        a = MatMul (x, w) b = Mul (a, k) c = Exp (b) d = Log (c) e = MatMul (d, w) y = Relu (e) }"""
    x = random.uniform(-1, 1, (2, 8)).astype(np.float32)
    model, reasons, before, after = halved(model_of(text, w=W, k=np.float32(16.0)), x)
    assert set(reasons) == {"Exp", "Log"} and "float16 holds 65504" in reasons["Exp"]
    assert types(model) == {"MatMul": HALF, "Mul": HALF, "Exp": SINGLE, "Log": SINGLE, "Relu": HALF}
    assert np.isfinite(after["y"]).all()
    np.testing.assert_allclose(after["y"], before["y"], atol=3e-2 * np.max(np.abs(before["y"])))


def test_headroom_is_for_what_was_not_seen(model_of: Build) -> None:
    text = "(float[2,8] x) => (float[2,8] y) { a = MatMul (x, w) y = Relu (a) }"
    x = np.full((2, 8), 5000.0, np.float32)
    for headroom, half in ((4.0, True), (14.0, False)):
        model, *_ = halved(model_of(text, w=np.eye(8, dtype=np.float32)), x, headroom)
        assert (types(model)["MatMul"] is HALF) is half


def test_small_constants_are_not_lost(model_of: Build) -> None:
    text = """(float[2,8] x) => (float[2,8] y) {
        a = MatMul (x, w) b = Add (a, e) c = Sqrt (b) d = Div (a, c) y = MatMul (d, w) }"""
    _, reasons, _, after = halved(model_of(text, w=W, e=np.float32(1e-12)), np.zeros((2, 8), np.float32))
    assert "Add" in reasons and "does not hold" in reasons["Add"]
    assert np.isfinite(after["y"]).all()


#: Rows that are zero, beside others that are not: what measurements of the largest value do not tell.
ZEROS = np.concatenate([np.zeros((1, 8)), np.linspace(1.0, 9.0, 8)[None]]).astype(np.float32)


@pytest.mark.parametrize(
    ("nodes", "kept"),
    [
        ("b = Add (a, e) c = Log (b)", "Log"),
        ("b = Max (a, e) c = Div (a, b)", "Div"),
        ("b = Clip (a, e) r = Reshape (b, s) c = Div (a, r)", "Div"),
        ("b = Add (e, a) r = Sqrt (b) c = Div (a, r)", "Sqrt"),
    ],
)
def test_a_constant_that_float16_has_no_number_for_keeps_what_it_guards_in_single_precision(
    model_of: Build, nodes: str, kept: str
) -> None:
    text = f"(float[2,8] x) => (float[2,8] y) {{ a = MatMul (x, w) {nodes} d = Tanh (c) y = MatMul (d, w) }}"
    model, reasons, before, after = halved(
        model_of(text, w=np.eye(8, dtype=np.float32), e=np.float32(1e-10), s=np.array([2, 8])), ZEROS, 1.0
    )
    assert "zero in float16" in reasons[kept]
    assert "Tanh" not in reasons and np.isfinite(before["y"]).all()
    assert np.isfinite(rounded_run(model, ZEROS)).all()
    np.testing.assert_allclose(after["y"], before["y"], atol=2e-2)


def test_a_constant_that_float16_has_a_number_for_guards_there_too(model_of: Build) -> None:
    text = """(float[2,8] x) => (float[2,8] y) {
        a = MatMul (x, w) b = Add (a, e) c = Log (b) d = Tanh (c) y = MatMul (d, w) }"""
    for least, stays in ((2.0**-20, False), (2.0**-26, True)):
        model = model_of(text, w=np.eye(8, dtype=np.float32), e=np.float32(least))
        _, reasons, *_ = halved(model, ZEROS, 1.0)
        assert ("Log" in reasons) is stays


def test_what_is_all_below_normal_numbers_stays(model_of: Build) -> None:
    text = "(float[2,8] x) => (float[2,8] y) { a = MatMul (x, w) y = Relu (a) }"
    _, reasons, before, after = halved(model_of(text, w=W), np.full((2, 8), 1e-7, np.float32))
    assert "few digits" in reasons["MatMul"]
    np.testing.assert_array_equal(before["y"], after["y"])


def test_angles_keep_their_digits(model_of: Build) -> None:
    text = "(float[2,8] x) => (float[2,8] y) { a = MatMul (x, w) b = Mul (a, k) c = Cos (b) y = MatMul (c, w) }"
    x = np.full((2, 8), 1.0, np.float32)
    model, reasons, *_ = halved(model_of(text, w=W, k=np.float32(300.0)), x)
    assert "angle" in reasons["Mul"] and "angle" in reasons["Cos"] and types(model)["Cos"] is SINGLE
    assert types(halved(model_of(text, w=W, k=np.float32(0.1)), x)[0])["Cos"] is HALF


def test_integers_beyond_2048_stay_exact(model_of: Build) -> None:
    text = "(float[2,8] x, int64[2,1] n) => (float[2,8] y) { f = Cast <to = 1> (n) a = Add (x, f) y = MatMul (a, w) }"
    for largest, half in ((2048.0, True), (2049.0, False)):
        model = Canonicalize(21, {})(model_of(text, w=W)).model
        Halve({"x": 1.0, "f": largest, "a": largest, "y": 9.0})(model)
        made = next(node for node in model.graph if node.op_type == "Cast" and node.inputs[0].name == "n")
        assert (made.outputs[0].dtype is HALF) is half


def test_a_kernel_that_is_missing_is_a_reason(model_of: Build, random: np.random.Generator) -> None:
    text = "(float[2,8] x) => (float[2,8] y) { a = MatMul (x, w) b = Gelu (a) y = MatMul (b, w) }"
    x = random.standard_normal((2, 8)).astype(np.float32)
    model, reasons, *_ = halved(model_of(text, 21, w=W), x, has_kernel=lambda node: node.op_type != "Gelu")
    assert reasons == {"Gelu": "there is no Gelu in float16"}
    assert casts(model) == 4


def test_islands_are_left(model_of: Build) -> None:
    text = "(float[2,8] x) => (float[2,8] y) { a = Exp (x) b = Neg (a) y = Exp (b) }"
    model, reasons, *_ = halved(
        model_of(text), np.zeros((2, 8), np.float32), has_kernel=lambda node: node.op_type != "Exp"
    )
    assert reasons["Neg"] == "all around it is float32" and casts(model) == 0


def test_a_value_that_several_read_is_cast_once_and_an_output_keeps_its_name(
    model_of: Build, random: np.random.Generator
) -> None:
    text = """(float[2,8] x) => (float[2,8] h, float[2,8] y, float[2,8] z) {
        h = MatMul (x, w) a = Exp (h) b = Exp (h) y = Mul (a, b) z = MatMul (h, w) }"""
    x = random.standard_normal((2, 8)).astype(np.float32)
    model, _, before, after = halved(model_of(text, w=W), x, has_kernel=lambda node: node.op_type != "Exp")
    assert [value.name for value in model.graph.outputs] == ["h", "y", "z"]
    assert casts(model) == 3  # x, h for caller and both Exp, z
    for name in before:
        np.testing.assert_allclose(after[name], before[name], rtol=2e-2, atol=2e-2)


def test_integer_weights_are_unpacked_in_single_precision(model_of: Build, random: np.random.Generator) -> None:
    text = """(float[2,8] x) => (float[2,8] y) {
        c = DequantizeLinear <axis = 1> (q, s, z) y = MatMul (x, c) }"""
    given = {"q": random.integers(-127, 128, (8, 8)).astype(np.int8), "z": np.zeros(8, np.int8)}
    x = random.standard_normal((2, 8)).astype(np.float32)
    for scale, half in ((1e-3, True), (1e-7, False)):
        model, reasons, before, after = halved(model_of(text, 21, s=np.full(8, scale, np.float32), **given), x)
        assert types(model) == {"DequantizeLinear": SINGLE, "MatMul": HALF if half else SINGLE}
        assert ("MatMul" in reasons) is not half
        np.testing.assert_allclose(after["y"], before["y"], atol=2e-2 * scale * 1e3)


def test_a_subgraph_reads_single_precision(model_of: Build, random: np.random.Generator) -> None:
    text = """(float[2,8] x, bool t) => (float[2,8] y) { a = MatMul (x, w)
        b = If (t) <then_branch = th () => (float[2,8] u) { u = Neg (a) },
                    else_branch = el () => (float[2,8] v) { v = Identity (a) }>
        y = MatMul (b, w) }"""
    model = Canonicalize(21, {})(model_of(text, w=W)).model
    x = random.standard_normal((2, 8)).astype(np.float32)
    feeds = {"x": x, "t": np.array(True)}
    before = runtime.Session(model).run(feeds)["y"]
    Halve({"x": 4.0, "a": 9.0, "b": 9.0, "y": 9.0})(model)
    assert types(model)["MatMul"] is HALF and types(model)["If"] is SINGLE
    np.testing.assert_allclose(runtime.Session(model).run(feeds)["y"], before, atol=5e-2)


def test_a_second_application_changes_nothing(model_of: Build, random: np.random.Generator) -> None:
    text = "(float[2,8] x) => (float[2,8] y) { a = MatMul (x, w) y = Relu (a) }"
    x = random.standard_normal((2, 8)).astype(np.float32)
    model, *_ = halved(model_of(text, w=W), x)
    again = Halve({"x": 4.0, "a": 9.0, "y": 9.0})(model)
    assert not again.modified


def test_nothing_known_changes_nothing(model_of: Build) -> None:
    model = Canonicalize(21, {})(model_of("(float[2,8] x) => (float[2,8] y) { y = MatMul (x, w) }", w=W)).model
    found = Halve({})(model)
    assert not found.modified and "not known" in found.refusals[0].reason


@given(st.lists(st.floats(-1e5, 1e5, width=32), min_size=1, max_size=40), st.integers(-40, 8))
def test_what_fits_keeps_eleven_bits(numbers: list[float], power: int) -> None:
    array = np.ldexp(np.array(numbers, np.float32), power).astype(np.float32)
    with np.errstate(over="ignore"):
        rounded = array.astype(np.float16).astype(np.float64)
    error = np.sum((array.astype(np.float64) - rounded) ** 2)
    assert fits(array) == bool(np.isfinite(rounded).all() and error <= 2.0**-22 * np.sum(array.astype(np.float64) ** 2))
    if np.all((np.abs(array) >= 2.0**-14) & (np.abs(array) <= 65504)):
        assert fits(array)


@pytest.mark.parametrize("text", ["y = Range (x, x, x)", "y = Identity (x)"])
def test_what_has_no_float16_by_the_schema_stays(model_of: Build, text: str) -> None:
    model = model_of(f"(float x) => (float y) {{ {text} }}" if "Identity" in text
                     else f"(float x) => (float[n] y) {{ {text} }}", 21)  # fmt: skip
    assert not Halve({"x": 1.0, "y": 1.0}, has_kernel=lambda node: False)(model).modified


def test_what_was_float16_is_read_as_it_was(proto_of: Callable[..., Any], random: np.random.Generator) -> None:
    text = "(float16[2,8] x) => (float16[2,8] y) { a = Cast <to = 1> (x) b = MatMul (a, w) y = Cast <to = 10> (b) }"
    model = Canonicalize(21, {}, widen=True)(models.from_proto(proto_of(text, 21, w=W))).model
    x = random.standard_normal((2, 8)).astype(np.float16)
    before = runtime.Session(model).run({"x": x})["y"]
    Halve(dict.fromkeys(float_values(model), 4.0))(model)
    product = next(node for node in model.graph if node.op_type == "MatMul")
    assert product.inputs[0] is model.graph.inputs[0] and casts(model) <= 1
    np.testing.assert_allclose(runtime.Session(model).run({"x": x})["y"], before, atol=5e-2)
