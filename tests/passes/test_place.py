"""Which operators are taken as integers, why the others are not, and what wishes change about it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from qcompile.core.plan import Precision, Role
from qcompile.core.target import OpKind, OpRule, Target
from qcompile.passes.place import FEWEST_ROWS, Wish

Build = Callable[..., Any]
NOT_ABSORBED = "not absorbed by the operator in front of it"
INTEGER, FLOAT, WEIGHT_ONLY = ("integer", ""), "float", "weight_only"


def image(body: str, outputs: str = "float[1,4,6,6] y") -> str:
    return f"(float[1,3,6,6] x) => ({outputs}) {{ [conv] c = Conv <pads = [1,1,1,1]> (x, w) {body} }}"


def rows(body: str, inputs: str = "float[1,8] x", outputs: str = "float[1,8] y") -> str:
    return f"({inputs}) => ({outputs}) {{ {body} }}"


def test_a_conv_and_the_relu_behind_it(w: np.ndarray, model_of: Build, quantized: Build) -> None:
    result = quantized(model_of(image("[relu] y = Relu (c)"), w=w))
    assert result.ops == {"conv": INTEGER, "relu": ("integer", "absorbed by Conv 'conv'")}
    assert result.placement.activations == ("x", "y")
    assert set(result.plan.tensors) == {"x", "y", "w"}
    assert result.plan.ops["conv"].output == "y"
    assert result.plan.tensors["y"].zero_point == (0,)


@pytest.mark.parametrize(("low", "high", "absorbed"), [(0, 6, True), (0, 1, True), (-1, 1, False)])
def test_a_clip_behind_a_conv(
    low: float, high: float, absorbed: bool, w: np.ndarray, model_of: Build, quantized: Build
) -> None:
    bounds = {"low": np.float32(low), "high": np.float32(high)}
    result = quantized(model_of(image("[clip] y = Clip (c, low, high)"), w=w, **bounds))
    if absorbed:
        assert result.ops["clip"] == ("integer", "absorbed by Conv 'conv'")
        assert result.placement.activations == ("x", "y")
    else:
        assert result.ops["clip"] == (FLOAT, NOT_ABSORBED)
        assert result.placement.activations == ("x", "c")


def test_a_relu_whose_conv_has_a_second_reader_stays(w: np.ndarray, model_of: Build, quantized: Build) -> None:
    text = image("[relu] y = Relu (c) [tanh] z = Tanh (c)", "float[1,4,6,6] y, float[1,4,6,6] z")
    result = quantized(model_of(text, w=w))
    assert result.ops == {
        "conv": INTEGER, "relu": (FLOAT, NOT_ABSORBED), "tanh": (FLOAT, "cpu has no integer Tanh"),
    }  # fmt: skip
    assert result.placement.activations == ("x", "c")


def test_a_relu_whose_conv_is_a_graph_output_stays(w: np.ndarray, model_of: Build, quantized: Build) -> None:
    result = quantized(model_of(image("[relu] y = Relu (c)", "float[1,4,6,6] y, float[1,4,6,6] c"), w=w))
    assert result.plan.ops["conv"].output == "c" and result.ops["relu"][0] == FLOAT


def test_gemm_and_matmul_leave_in_float(m: np.ndarray, model_of: Build, quantized: Build) -> None:
    result = quantized(model_of(rows("[mm] t = MatMul (x, v) [gemm] y = Gemm (t, m)"), v=m, m=m.T.copy()))
    assert result.ops == {"mm": INTEGER, "gemm": INTEGER}
    assert [result.plan.ops[name].output for name in ("mm", "gemm")] == ["", ""]
    assert result.placement.activations == ("x", "t")


def test_weights_of_several_axes_are_stored_alone(m: np.ndarray, model_of: Build, decided: Build) -> None:
    text = rows("[n] y = MatMul (x, m)", "float[2,1,8] x", "float[2,1,8] y")
    assert decided(model_of(text, m=np.stack([m, m])))["n"] == ("weight_only", "its weights have 3 axes")


@pytest.mark.parametrize(
    ("text", "weights", "reason"),
    [
        (rows("[n] y = MatMul (x, v)", "float[1,8] x, float[8,8] v"), "", "both operands are activations"),
        (rows("[n] y = Gemm (x, v)", "float[1,8] x, float[8,8] v"), "", "its weights are not constant"),
        (rows("[n] y = MatMul (x, m)", "double[1,8] x", "double[1,8] y"), "f8", "its weights are double, not float32"),
        (rows("[n] y = MatMul (x, m)", "float[2,1,8] x", "float[2,1] y"), "vector", "its weights are a vector"),
        (rows("[n] t = MatMul (k, m) y = Add (x, t)"), "k", "it computes on constants only"),
        (
            rows("[n] y = Gemm <transA = 1> (x, m)", "float[8,1] x"),
            "m",
            "Gemm with transA or alpha has no integer kernel",
        ),
        (rows("[n] y = Gemm <alpha = 0.5> (x, m)"), "m", "Gemm with transA or alpha has no integer kernel"),
        (rows("[n] y = Gemm <beta = 0.5> (x, m, b)"), "b", "Gemm with beta has no integer kernel"),
        (rows("[n] y = Gemm (x, m, v)", "float[1,8] x, float[8] v"), "m", "its bias is not a constant per channel"),
        (rows("[n] y = Gemm (x, m, one)"), "one", "its bias is not a constant per channel"),
        (rows("[n] y = Softmax (x)"), "", "cpu has no integer Softmax"),
        (rows("[n] y = Add (x, x)"), "", "not between integer operators"),
        (rows("[n] y = Flatten (x)"), "", "not between integer operators"),
    ],
)
def test_why_an_operator_stays_in_float(
    text: str, weights: str, reason: str, m: np.ndarray, model_of: Build, decided: Build
) -> None:
    parameters = {
        "": {},
        "m": {"m": m},
        "f8": {"m": m.astype(np.float64)},
        "vector": {"m": m[0]},
        "k": {"m": m, "k": m[:1]},
        "b": {"m": m, "b": m[0]},
        "one": {"m": m, "one": np.ones(1, np.float32)},
    }[weights]
    assert decided(model_of(text, **parameters))["n"] == (FLOAT, reason)


def test_a_target_may_leave_small_operators_in_float(
    m: np.ndarray, eager: Target, model_of: Build, decided: Build
) -> None:
    text = rows("[small] t = MatMul (x, m) [large] y = MatMul (t, n)", outputs="float[1,9] y")
    model = model_of(text, m=m, n=np.ones((8, 9), np.float32))
    target = replace(eager, ops={"MatMul": replace(eager.ops["MatMul"], fewest_weights=65)})
    ops = decided(model, target)
    assert ops == {"small": (FLOAT, "its 64 weights are too few to gain from integers"), "large": INTEGER}


def test_a_gemm_without_bias_may_have_any_beta(m: np.ndarray, model_of: Build, decided: Build) -> None:
    assert decided(model_of(rows("[n] y = Gemm <beta = 0.5> (x, m)"), m=m))["n"] == INTEGER


def test_weights_that_a_caller_may_replace_are_not_constant(m: np.ndarray, model_of: Build, decided: Build) -> None:
    model = model_of(rows("[n] y = Gemm (x, m)", "float[1,8] x, float[8,8] m"), m=m)
    assert decided(model)["n"] == (FLOAT, "its weights are an input with a default, which a caller may replace")


def test_an_operator_of_another_domain_stays(m: np.ndarray, proto_of: Build, decided: Build) -> None:
    model = ir.from_proto(proto_of(rows("[n] y = MatMul (x, m)"), m=m))
    model.opset_imports["com.example"] = 1
    model.graph[0].domain = "com.example"
    model.graph[0].outputs[0].dtype = ir.DataType.FLOAT
    assert decided(model)["n"] == (FLOAT, "cpu has no integer MatMul")


def test_inside_a_subgraph_operators_stay(m: np.ndarray, model_of: Build, decided: Build) -> None:
    text = """(bool b, float[1,8] x) => (float[1,8] y) {
        [if] y = If (b) <then_branch = t () => (float[1,8] p) { [inner] p = MatMul (x, m) },
                         else_branch = e () => (float[1,8] q) { [add] q = Add (x, x) }>
    }"""
    assert decided(model_of(text, m=m)) == {
        "if": (FLOAT, "cpu has no integer If"),
        "inner": (FLOAT, "it stands inside a subgraph"),
        "add": (FLOAT, "it stands inside a subgraph"),
    }


@pytest.mark.parametrize("kind", ["MatMul", "Conv", "Gemm"])
def test_weights_alone(kind: str, w: np.ndarray, m: np.ndarray, model_of: Build, quantized: Build) -> None:
    model = model_of(image("y = Relu (c)"), w=w) if kind == "Conv" else model_of(rows(f"[conv] y = {kind} (x, m)"), m=m)
    result = quantized(model, activations=False)
    assert result.ops["conv"] == (WEIGHT_ONLY, "activations stay in float")
    assert result.placement.activations == ()
    assert {quant.role for quant in result.plan.tensors.values()} == {Role.WEIGHT}


def test_neither_weights_nor_activations(w: np.ndarray, model_of: Build, quantized: Build) -> None:
    result = quantized(model_of(image("y = Relu (c)"), w=w), weights=False)
    assert result.ops["conv"] == (FLOAT, "weights stay in float as asked")
    assert result.plan.tensors == {}


def test_a_target_without_weight_only_kernels(w: np.ndarray, eager: Target, model_of: Build, decided: Build) -> None:
    target = replace(eager, ops={"Conv": OpRule(OpKind.LINEAR)})
    assert decided(model_of(image("y = Relu (c)"), w=w), target, activations=False)["conv"][0] == FLOAT


RESIDUAL = image(
    """[relu] r = Relu (c)
    [second] d = Conv <pads = [1,1,1,1]> (r, v)
    [add] a = Add (r, d)
    [last] s = Relu (a)
    [third] y = Conv <pads = [1,1,1,1]> (s, v)"""
)


def test_an_add_between_integer_operators_is_taken_in(w: np.ndarray, model_of: Build, quantized: Build) -> None:
    v = np.random.default_rng(3).standard_normal((4, 4, 3, 3)).astype(np.float32)
    result = quantized(model_of(RESIDUAL, w=w, v=v))
    assert result.ops == {
        "conv": INTEGER, "relu": ("integer", "absorbed by Conv 'conv'"), "second": INTEGER, "add": INTEGER,
        "last": ("integer", "absorbed by Add 'add'"), "third": INTEGER,
    }  # fmt: skip
    assert result.plan.ops["add"].output == "s"
    assert result.placement.activations == ("x", "r", "d", "s", "y")


def test_an_add_that_no_integer_operator_reads_is_given_back(w: np.ndarray, model_of: Build, quantized: Build) -> None:
    v = np.random.default_rng(3).standard_normal((4, 4, 3, 3)).astype(np.float32)
    text = RESIDUAL.replace("[third] y = Conv <pads = [1,1,1,1]> (s, v)", "[soft] y = Softmax (s)")
    result = quantized(model_of(text, w=w, v=v))
    assert result.ops["add"] == (FLOAT, "no integer operator reads its result")
    assert result.ops["last"] == (FLOAT, NOT_ABSORBED)
    assert result.ops["second"] == INTEGER


def test_a_chain_that_ends_in_float_is_given_back_to_its_start(w: np.ndarray, model_of: Build, decided: Build) -> None:
    text = image("[a] a = MaxPool <kernel_shape = [2,2]> (c) [b] b = GlobalAveragePool (a) [s] y = Softmax (b)")
    ops = decided(model_of(text.replace("float[1,4,6,6] y", "float[1,4,1,1] y"), w=w))
    assert ops["a"] == ops["b"] == (FLOAT, "no integer operator reads its result")


def test_an_add_with_one_float_side_stays(w: np.ndarray, model_of: Build, decided: Build) -> None:
    text = image("[soft] s = Softmax (c) [add] a = Add (c, s) y = Conv <pads = [1,1,1,1]> (a, v)")
    v = np.ones((4, 4, 3, 3), np.float32)
    assert decided(model_of(text, w=w, v=v))["add"] == (FLOAT, "not between integer operators")


def test_an_add_of_a_constant_stays(w: np.ndarray, model_of: Build, decided: Build) -> None:
    text = image("[add] a = Add (c, k) y = Conv <pads = [1,1,1,1]> (a, v)")
    v, k = np.ones((4, 4, 3, 3), np.float32), np.ones((1, 4, 1, 1), np.float32)
    assert decided(model_of(text, w=w, v=v, k=k))["add"] == (FLOAT, "not between integer operators")


def test_operators_that_move_codes_share_the_scale_of_their_input(
    w: np.ndarray, m: np.ndarray, model_of: Build, quantized: Build
) -> None:
    text = image(
        """[relu] r = Relu (c)
        [pool] p = MaxPool <kernel_shape = [5,5]> (r)
        [turn] t = Transpose <perm = [0,2,3,1]> (p)
        [flat] f = Flatten (t)
        [gemm] y = Gemm (f, m)""",
        "float[1,8] y",
    )
    result = quantized(model_of(text, w=w, m=np.random.default_rng(0).standard_normal((16, 8)).astype(np.float32)))
    assert {name: ops[0] for name, ops in result.ops.items()} == dict.fromkeys(result.ops, "integer")
    assert result.placement.same_scale == {"p": "r", "t": "r", "f": "r"}
    assert result.placement.activations == ("x", "r")
    assert result.plan.tensors["p"] is result.plan.tensors["r"] is result.plan.tensors["f"]


def test_codes_are_moved_in_front_of_an_integer_operator(m: np.ndarray, model_of: Build, quantized: Build) -> None:
    text = rows("[turn] t = Transpose <perm = [1,0]> (x) [mm] y = MatMul (t, m)", "float[8,1] x")
    result = quantized(model_of(text, m=m))
    assert result.ops == {"turn": INTEGER, "mm": INTEGER}
    assert result.placement.same_scale == {"t": "x"} and result.placement.activations == ("x",)


@pytest.mark.parametrize(
    ("body", "outputs"),
    [
        ("[turn] t = Transpose <perm = [1,0]> (x) y = MatMul (t, m) z = Exp (t)", "float[1,8] y, float[1,8] z"),
        ("[turn] t = Transpose <perm = [1,0]> (x) y = MatMul (t, m)", "float[1,8] y, float[1,8] t"),
        ("[turn] t = Transpose <perm = [1,0]> (x) y = Exp (t)", "float[1,8] y"),
    ],
)
def test_codes_are_not_moved_where_somebody_wants_floats(
    body: str, outputs: str, m: np.ndarray, model_of: Build, decided: Build
) -> None:
    ops = decided(model_of(rows(body, "float[8,1] x", outputs), m=m))
    assert ops["turn"] == (FLOAT, "not between integer operators")


def test_activations_measured_are_those_that_integer_operators_read_or_write(
    m: np.ndarray, model_of: Build, quantized: Build
) -> None:
    result = quantized(model_of(rows("a = Exp (x) b = MatMul (a, m) c = Tanh (b) y = MatMul (c, m)"), m=m))
    assert result.placement.activations == ("a", "c")


def table(count: int, columns: int = 4) -> np.ndarray:
    return np.random.default_rng(4).standard_normal((count, columns)).astype(np.float32)


LOOKUP = "(int64[1,5] i) => (float[1,5,4] y) { [gather] g = Gather (t, i) y = Exp (g) }"


def test_a_large_table_is_stored_as_integers(model_of: Build, quantized: Build) -> None:
    result = quantized(model_of(LOOKUP, t=table(FEWEST_ROWS)))
    assert result.ops["gather"] == (WEIGHT_ONLY, "a table lookup: rows are dequantized")
    assert result.plan.tensors["t"].axis == 1 and len(result.plan.tensors["t"].scale) == 4


@pytest.mark.parametrize(
    ("text", "count", "reason"),
    [
        (LOOKUP, FEWEST_ROWS - 1, "its table is too small to be worth scales"),
        (
            LOOKUP.replace("(t, i)", "<axis = 1> (t, i)").replace("[1,5,4]", "[A,B,C]"),
            300,
            "its table is not float32 rows",
        ),
        (LOOKUP.replace("y = Exp (g)", "u = Exp (t) y = Exp (g)"), 300, "its table is read by another operator too"),
        (
            LOOKUP.replace("[1,5] i)", "[1,5] i, float[300,4] v)").replace("(t, i)", "(v, i)"),
            300,
            "it picks from an activation",
        ),
    ],
)
def test_tables_that_stay_in_float(text: str, count: int, reason: str, model_of: Build, decided: Build) -> None:
    assert decided(model_of(text, t=table(count)))["gather"] == (FLOAT, reason)


def test_a_table_of_integers_stays(model_of: Build, decided: Build) -> None:
    text = "(int64[5] i) => (int64[5,4] y) { [gather] y = Gather (t, i) }"
    ops = decided(model_of(text, t=table(300).astype(np.int64)))
    assert ops["gather"] == (FLOAT, "its table is not float32 rows")


def test_two_lookups_in_one_table_stay(model_of: Build, decided: Build) -> None:
    text = "(int64[5] i) => (float[5,4] y) { [a] g = Gather (t, i) [b] h = Gather (t, i) y = Add (g, h) }"
    ops = decided(model_of(text, t=table(300)))
    assert ops["a"] == ops["b"] == (FLOAT, "its table is read by another operator too")


def kept(precision: Precision, *names: str) -> dict[str, Wish]:
    return dict.fromkeys(names, Wish(precision, "as wished"))


def v() -> np.ndarray:
    return np.random.default_rng(3).standard_normal((4, 4, 3, 3)).astype(np.float32)


def test_an_operator_that_is_to_stay_in_float_does(w: np.ndarray, model_of: Build, quantized: Build) -> None:
    wishes = kept(Precision.FLOAT, "second")
    result = quantized(model_of(RESIDUAL, w=w, v=v()), wishes=wishes)
    assert result.ops["second"] == (FLOAT, "as wished")
    assert result.ops["conv"] == result.ops["third"] == INTEGER
    # One side of the Add arrives in float now, so it stays there too, and what it would have absorbed with it.
    assert result.ops["add"] == (FLOAT, "not between integer operators")
    assert result.ops["last"] == (FLOAT, NOT_ABSORBED)
    assert result.placement.activations == ("x", "r", "s", "y")


def test_an_activation_that_is_to_stay_in_float_is_not_absorbed(
    w: np.ndarray, model_of: Build, quantized: Build
) -> None:
    result = quantized(model_of(image("[relu] y = Relu (c)"), w=w), wishes=kept(Precision.FLOAT, "relu"))
    assert result.ops == {"conv": INTEGER, "relu": (FLOAT, "as wished")}
    assert result.plan.ops["conv"].output == "c"


def test_an_add_that_is_to_stay_in_float_is_not_taken_in(w: np.ndarray, model_of: Build, quantized: Build) -> None:
    result = quantized(model_of(RESIDUAL, w=w, v=v()), wishes=kept(Precision.FLOAT, "add"))
    assert result.ops["add"] == (FLOAT, "as wished")
    assert result.ops["second"] == result.ops["third"] == INTEGER


def test_codes_are_not_moved_by_what_is_to_stay_in_float(m: np.ndarray, model_of: Build, quantized: Build) -> None:
    text = rows("[turn] t = Transpose <perm = [1,0]> (x) [mm] y = MatMul (t, m)", "float[8,1] x")
    result = quantized(model_of(text, m=m), wishes=kept(Precision.FLOAT, "turn"))
    assert result.ops == {"turn": (FLOAT, "as wished"), "mm": INTEGER}
    assert result.placement.activations == ("t",)


def test_weights_may_be_integers_where_the_arithmetic_stays_in_float(
    w: np.ndarray, model_of: Build, quantized: Build
) -> None:
    result = quantized(model_of(RESIDUAL, w=w, v=v()), wishes=kept(Precision.WEIGHT_ONLY, "conv", "relu"))
    assert result.ops["conv"] == (WEIGHT_ONLY, "as wished") and result.ops["relu"] == (FLOAT, "as wished")
    assert result.plan.tensors["w"].role is Role.WEIGHT
    assert "x" not in result.plan.tensors and result.ops["second"] == INTEGER


@pytest.mark.parametrize("precision", [Precision.INTEGER, Precision.WEIGHT_ONLY])
def test_a_wish_for_integer_weights_counts_however_few_they_are(
    precision: Precision, m: np.ndarray, cpu: Target, model_of: Build, quantized: Build
) -> None:
    text = rows("[a] t = MatMul (x, m) [b] y = MatMul (t, m)")
    result = quantized(model_of(text, m=m), cpu, wishes=kept(precision, "a"))
    assert result.ops["a"] == (precision.value, "" if precision is Precision.INTEGER else "as wished")
    assert result.ops["b"] == (FLOAT, "its 64 weights are too few to gain from integers")


def test_a_wish_for_integer_weights_counts_where_all_others_stay_in_float(
    m: np.ndarray, model_of: Build, quantized: Build
) -> None:
    text = rows("[a] t = MatMul (x, m) [b] y = MatMul (t, m)")
    result = quantized(model_of(text, m=m), weights=False, wishes=kept(Precision.INTEGER, "a"))
    assert result.ops == {"a": INTEGER, "b": (FLOAT, "weights stay in float as asked")}
    result = quantized(model_of(text, m=m), weights=False, activations=False, wishes=kept(Precision.INTEGER, "a"))
    assert result.ops["a"] == (WEIGHT_ONLY, "activations stay in float")


def test_a_wish_for_a_table_counts_however_few_rows_it_has(model_of: Build, quantized: Build) -> None:
    result = quantized(model_of(LOOKUP, t=table(5)), wishes=kept(Precision.INTEGER, "gather"))
    assert result.ops["gather"] == (WEIGHT_ONLY, "a table lookup: rows are dequantized")


@pytest.mark.parametrize(
    ("precision", "reason"),
    [
        (Precision.INTEGER, "both operands are activations"),
        (Precision.WEIGHT_ONLY, "as wished, weights too: both operands are activations"),
    ],
)
def test_a_wish_makes_no_integers_of_what_cannot_be(
    precision: Precision, reason: str, model_of: Build, quantized: Build
) -> None:
    text = rows("[n] y = MatMul (x, k)", "float[1,8] x, float[8,8] k")
    assert quantized(model_of(text), wishes=kept(precision, "n")).ops["n"] == (FLOAT, reason)


def test_integer_weights_in_float_arithmetic_are_refused_where_the_target_takes_none(
    w: np.ndarray, eager: Target, model_of: Build, quantized: Build
) -> None:
    target = replace(eager, ops={"Conv": OpRule(OpKind.LINEAR)})
    result = quantized(model_of(image("y = Relu (c)"), w=w), target, wishes=kept(Precision.WEIGHT_ONLY, "conv"))
    reason = "as wished, weights too: cpu takes no integer weights for a Conv in float"
    assert result.ops["conv"] == (FLOAT, reason)
    assert result.plan.tensors == {}


def test_weights_shared_with_an_operator_that_stays_in_float(m: np.ndarray, model_of: Build, quantized: Build) -> None:
    text = rows("[a] t = MatMul (x, m) [b] y = MatMul (t, m)")
    result = quantized(model_of(text, m=m), wishes=kept(Precision.FLOAT, "a"))
    assert result.ops == {"a": (FLOAT, "as wished"), "b": INTEGER}
    assert {"m", "m_quantized"} <= set(result.model.graph.initializers)


SUM_OF_CONVS = """(float[1,3,6,6] x) => (float[1,4,6,6] y) {{
    [first] a = Conv <pads = [1,1,1,1]> (x, w) [relu] b = Relu (a) [second] c = Conv <pads = [1,1,1,1]> (b, v)
    [add] d = Add ({operands}) {more} }}"""


@pytest.mark.parametrize(
    ("operands", "more", "taken"),
    [
        ("c, b", "[end] y = Relu (d)", True),
        ("b, c", "[end] y = Relu (d)", True),
        ("c, b", "[neg] e = Neg (c) [end] y = Sum (d, e)", False),  # somebody else reads the product
        ("b, b", "[end] y = Sum (c, d)", False),
        ("c, k", "[end] y = Relu (d)", False),  # a constant is a bias
    ],
)
def test_what_a_conv_adds_as_it_goes_is_read_as_codes(
    w: np.ndarray, model_of: Build, operands: str, more: str, taken: bool
) -> None:
    from qcompile.backends.base import find_target
    from qcompile.passes.canonicalize import Canonicalize
    from qcompile.passes.place import place

    weights = {"w": w, "v": np.ones((4, 4, 3, 3), np.float32), "k": np.ones((1, 4, 1, 1), np.float32)}
    model = Canonicalize(21, {})(model_of(SUM_OF_CONVS.format(operands=operands, more=more), 21, **weights)).model
    found = place(model, find_target("cuda:tensorrt")[0], True, True)
    adds = [op.precision for op in found.ops.values() if op.op_type == "Add"]
    assert adds == ([Precision.INTEGER] if taken else [Precision.FLOAT] * len(adds))
    assert all(op.output == "" for op in found.ops.values()) and found.dynamic == frozenset()
