"""A plan that comes back as it was made is left as it is; one that was edited is settled, or refused with one line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from qcompile.core.errors import UsageError
from qcompile.core.orthogonal import Orthogonal
from qcompile.core.plan import OpPlan, Precision, QuantPlan, Role, TensorQuant
from qcompile.core.rotation import InputRotation, Place, Rotation, Rotations, Site
from qcompile.core.target import OpKind, OpRule, Target
from qcompile.passes.canonicalize import Canonicalize
from qcompile.passes.check_plan import check_plan, check_rotations
from qcompile.passes.rotations import rotatable

Build = Callable[..., Any]

RESIDUAL = """(float[1,3,6,6] x) => (float[1,4,6,6] y) {
    [conv] c = Conv <pads = [1,1,1,1]> (x, w)
    [relu] r = Relu (c)
    [second] d = Conv <pads = [1,1,1,1]> (r, v)
    [add] a = Add (r, d)
    [last] s = Relu (a)
    [third] y = Conv <pads = [1,1,1,1]> (s, v)
}"""
MOVED = """(float[8,1] x) => (float[1,8] y) {
    [turn] t = Transpose <perm = [1,0]> (x) [mm] u = MatMul (t, m) [soft] s = Softmax (u) [gemm] y = Gemm (s, m)
}"""
LOOKUP = "(int64[1,5] i) => (float[1,5,4] y) { [gather] g = Gather (table, i) y = Exp (g) }"
BRANCHES = """(bool b, float[1,8] x) => (float[1,8] y) {
    [if] y = If (b) <then_branch = t () => (float[1,8] p) { [inner] p = MatMul (x, m) },
                     else_branch = e () => (float[1,8] q) { [add] q = Add (x, x) }>
}"""


@pytest.fixture
def made(model_of: Build, quantized: Build, w: np.ndarray, m: np.ndarray) -> Callable[..., tuple[ir.Model, QuantPlan]]:
    """Make a model and its plan, as that comes back from JSON."""

    def made(text: str, **options: Any) -> tuple[ir.Model, QuantPlan]:
        v = np.random.default_rng(3).standard_normal((4, 4, 3, 3)).astype(np.float32)
        table = np.random.default_rng(4).standard_normal((300, 4)).astype(np.float32)
        weights = {"w": w, "v": v, "m": m, "table": table}
        used = {name: array for name, array in weights.items() if f" {name})" in text or f"({name}," in text}
        result = quantized(model_of(text, **used), **options)
        return result.float_model, QuantPlan.from_json(result.plan.to_json())

    return made


def with_op(plan: QuantPlan, name: str, **fields: Any) -> QuantPlan:
    return replace(plan, ops={**plan.ops, name: replace(plan.ops[name], **fields)})


@pytest.mark.parametrize("options", [{}, {"activations": False}, {"weights": False}])
@pytest.mark.parametrize("text", [RESIDUAL, MOVED, LOOKUP, BRANCHES])
def test_a_plan_that_nobody_edited_comes_back_as_it_is(
    text: str, options: dict[str, bool], made: Build, eager: Target
) -> None:
    model, plan = made(text, **options)
    assert check_plan(model, plan, eager) == plan


def test_what_follows_from_an_operator_in_float(made: Build, eager: Target) -> None:
    model, plan = made(RESIDUAL)
    found = check_plan(model, with_op(plan, "conv", precision=Precision.FLOAT), eager)
    assert found.ops["conv"] == OpPlan("Conv", Precision.FLOAT, "as the plan asks")
    assert found.ops["relu"].precision is Precision.FLOAT
    assert {name: found.ops[name] for name in ("second", "add", "last", "third")} == {
        name: plan.ops[name] for name in ("second", "add", "last", "third")
    }
    assert set(plan.tensors) - set(found.tensors) == {"x", "w"}, "r is still read as codes"
    assert check_plan(model, found, eager) == found


def test_weights_that_another_operator_has_as_integers_keep_their_scales(made: Build, eager: Target) -> None:
    model, plan = made(RESIDUAL)
    found = check_plan(model, with_op(plan, "third", precision=Precision.FLOAT), eager)
    assert "v" in found.tensors and set(plan.tensors) - set(found.tensors) == {"y"}


def test_a_reason_that_was_written_is_kept(made: Build, eager: Target) -> None:
    model, plan = made(MOVED)
    found = check_plan(model, with_op(plan, "mm", precision=Precision.FLOAT, reason="I know better"), eager)
    assert found.ops["mm"].reason == "I know better"


@pytest.mark.parametrize(
    ("text", "name", "fields", "fact"),
    [
        (MOVED, "soft", {"precision": Precision.INTEGER}, "cpu has no integer Softmax"),
        (MOVED, "turn", {"precision": Precision.WEIGHT_ONLY}, "it has no constant weights"),
        (LOOKUP, "gather", {"precision": Precision.INTEGER}, "it looks rows up"),
        (BRANCHES, "inner", {"precision": Precision.INTEGER}, "it stands inside a subgraph"),
        (RESIDUAL, "relu", {"precision": Precision.FLOAT}, "the operator in front of it absorbs it"),
        (RESIDUAL, "conv", {"output": "s"}, "lets 's' leave operator 'conv' as codes, which is not its result"),
        (RESIDUAL, "conv", {"output": "c"}, "has no scale for tensor 'c', which operator 'conv' needs as codes"),
    ],
)
def test_what_an_operator_cannot_be(
    text: str, name: str, fields: dict[str, Any], fact: str, made: Build, eager: Target
) -> None:
    model, plan = made(text)
    with pytest.raises(UsageError, match=fact):
        check_plan(model, with_op(plan, name, **fields), eager)


def test_an_operator_without_a_faithful_integer_kernel(model_of: Build, quantized: Build, eager: Target) -> None:
    text = "(float[1,8] x) => (float[1,8] y) { [n] y = Gemm <alpha = 0.5> (x, m) }"
    result = quantized(model_of(text, m=np.ones((8, 8), np.float32)))
    plan = with_op(result.plan, "n", precision=Precision.INTEGER)
    with pytest.raises(UsageError, match=r"'n' \(Gemm\) cannot be integer: Gemm with transA or alpha"):
        check_plan(result.float_model, plan, eager)


def test_integer_weights_in_float_arithmetic_where_the_target_takes_none(made: Build, eager: Target) -> None:
    model, plan = made(RESIDUAL)
    target = replace(eager, ops={**eager.ops, "Conv": OpRule(OpKind.LINEAR, fuses=("Relu",))})
    assert check_plan(model, plan, target) == plan
    with pytest.raises(UsageError, match="cpu takes no integer weights for a Conv in float"):
        check_plan(model, with_op(plan, "third", precision=Precision.WEIGHT_ONLY), target)


def test_a_shape_that_the_scales_do_not_fit(made: Build, eager: Target) -> None:
    model, plan = made(MOVED)
    for axis, count, fact in (
        (0, 3, "3 scales for 8 channels along axis 0"),
        (2, 8, r"no axis 2, its shape is \[8, 8\]"),
    ):
        quant = TensorQuant(Role.WEIGHT, "int8", (0.5,) * count, (0,) * count, axis)
        with pytest.raises(UsageError, match=fact):
            check_plan(model, replace(plan, tensors={**plan.tensors, "m": quant}), eager)


def test_a_range_of_each_run_is_for_operators_that_take_one(made: Build, eager: Target) -> None:
    model, plan = made(MOVED)
    dynamic = TensorQuant(Role.ACTIVATION, "uint8", (), ())
    with pytest.raises(UsageError, match=r"tensor 's' has no scale, and operator 'gemm' takes none at run time"):
        check_plan(model, replace(plan, tensors={**plan.tensors, "s": dynamic}), eager)
    text = "(float[2,8] x) => (float[2,8] y) { e = Exp (x) [mm] y = MatMul (e, m) }"
    model, plan = made(text)
    plan = replace(plan, tensors={**plan.tensors, "e": dynamic})
    assert check_plan(model, plan, eager) == plan


def test_activations_in_four_bits_are_for_targets_without_a_runtime(made: Build, eager: Target) -> None:
    model, plan = made(MOVED)
    quant = TensorQuant(Role.ACTIVATION, "uint4", (0.5,), (3,))
    edited = replace(plan, tensors={**plan.tensors, "s": quant})
    with pytest.raises(UsageError, match=r"tensor 's' is uint4, .* takes uint8"):
        check_plan(model, edited, eager)
    assert check_plan(model, edited, replace(eager, integer_only=True)).tensors["s"] == quant
    wider = replace(plan, tensors={**plan.tensors, "s": replace(quant, dtype="int4")})
    with pytest.raises(UsageError, match="tensor 's' is int4"):
        check_plan(model, wider, replace(eager, integer_only=True))


@pytest.mark.parametrize(
    ("edited", "fact"),
    [
        (lambda plan: replace(plan, ops={**plan.ops, "sofd": plan.ops["soft"]}),
         r"names operator 'sofd', which the model does not have; did you mean 'soft'\?"),
        (lambda plan: replace(plan, ops={**plan.ops, "unlike any": plan.ops["soft"]}),
         "names operator 'unlike any', which the model does not have; correct the plan"),
        (lambda plan: with_op(plan, "soft", op_type="Exp"), "has operator 'soft' as Exp, the model as Softmax"),
        (lambda plan: with_op(plan, "gemm", output="nowhere"), "names tensor 'nowhere', which the model does not"),
        (lambda plan: replace(plan, tensors={**plan.tensors, "elsewhere": plan.tensors["m"]}),
         "names tensor 'elsewhere', which the model does not have"),
        (lambda plan: replace(plan, ops={name: op for name, op in plan.ops.items() if name != "mm"}),
         "does not say what becomes of operator 'mm'"),
        (lambda plan: replace(plan, tensors={**plan.tensors, "m": plan.tensors["s"]}),
         "tensor 'm' is activation in it, operator 'mm' reads it as weight"),
        (lambda plan: replace(plan, tensors={**plan.tensors, "s": plan.tensors["m"]}),
         "tensor 's' is weight in it, operator 'gemm' reads it as activation"),
        (lambda plan: replace(plan, tensors={name: q for name, q in plan.tensors.items() if name != "m"}),
         "has no scale for tensor 'm', which operator 'mm' needs as codes"),
        (lambda plan: replace(plan, tensors={**plan.tensors, "s": TensorQuant(
            Role.ACTIVATION, "uint8", (0.5,) * 8, (0,) * 8, 1)}),
         "tensor 's' has scales along axis 1, an activation has one scale"),
    ],
)  # fmt: skip
def test_a_plan_that_does_not_fit_the_model(edited: Build, fact: str, made: Build, eager: Target) -> None:
    model, plan = made(MOVED)
    with pytest.raises(UsageError, match=f"^mine.json: .*{fact}"):
        check_plan(model, edited(plan), eager, "mine.json")


def test_an_activation_that_is_not_absorbed_any_more(made: Build, eager: Target) -> None:
    model, plan = made(RESIDUAL)
    assert plan.ops["relu"].reason.startswith("absorbed by")
    edited = with_op(plan, "conv", output="c")
    edited = replace(edited, tensors={**plan.tensors, "c": plan.tensors["r"]})
    found = check_plan(model, edited, eager)
    assert found.ops["relu"] == OpPlan("Relu", Precision.FLOAT, "the operator in front of it does not absorb it")
    assert found.ops["conv"].output == "c" and "r" in found.tensors


STREAM = """(float[2,3,8] x) => (float[2,3,8] y) {
    [e] e = MatMul (x, a) [b] b = MatMul (e, c) [sum] o = Add (b, e) [last] y = MatMul (o, d) }"""


def of(place: Place) -> Rotation:
    return Rotation(place, (Orthogonal.spreading(place.width, keeps_ones=place.keeps_ones),))


def test_what_a_plan_rotates_is_there_to_be_rotated(model_of: Build, random: np.random.Generator) -> None:
    weights = {name: random.normal(size=(8, 8)).astype(np.float32) for name in "acd"}
    model = model_of(STREAM, 21, **weights)
    Canonicalize(21)(model)
    [place] = rotatable(model.graph).places
    check_rotations(model, Rotations())
    check_rotations(model, Rotations((of(place),), (InputRotation("b", Orthogonal.spreading(8)),)))
    with pytest.raises(UsageError, match="rotates at operator 'lost', which the model does not have; did you mean"):
        check_rotations(model, Rotations(inputs=(InputRotation("lost", Orthogonal.spreading(8)),)))
    for wrong, fact in (
        (replace(place, node="last"), "rotates the stream at operator 'last', with 8 channels, where none can be"),
        (replace(place, width=4), f"rotates the stream at operator '{place.node}', with 4 channels, where none can"),
        (replace(place, site=Site.VALUES), f"rotates the values at operator '{place.node}'"),
        (
            replace(place, node="lost"),
            r"rotates at operator 'lost', which the model does not have; did you mean 'last'",
        ),
    ):
        with pytest.raises(UsageError, match=f"^mine.json: {fact}"):
            check_rotations(model, Rotations((of(wrong),)), "mine.json")
