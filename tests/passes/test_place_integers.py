"""Which operators a target without floats takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from qcompile.core.target import OpKind, OpRule, Target
from qcompile.passes.place import place

Build = Callable[..., Any]
INTEGER, FLOAT = ("integer", ""), "float"


def image(body: str, outputs: str = "float[1,4,6,6] y") -> str:
    return f"(float[1,3,6,6] x) => ({outputs}) {{ [conv] c = Conv <pads = [1,1,1,1]> (x, w) {body} }}"


def test_a_target_without_floats_takes_all_in(w: np.ndarray, model_of: Build, eager: Target, decided: Build) -> None:
    elementwise = OpRule(OpKind.ELEMENTWISE)
    target = replace(eager, ops={**eager.ops, "Sigmoid": elementwise, "Mul": elementwise}, integer_only=True)
    # A constant beside an activation, what no integer operator reads, and an input that none quantizes for itself.
    model = model_of(image("[mul] m = Mul (c, two) [last] y = Sigmoid (m)"), w=w, two=np.float32(2.0))
    assert decided(model, target) == {"conv": INTEGER, "mul": INTEGER, "last": INTEGER}
    alone = model_of("(float[1,4] x) => (float[1,4] y) { [first] y = Sigmoid (x) }")
    assert decided(alone, target) == {"first": INTEGER}
    assert decided(alone, replace(target, integer_only=False))["first"][0] == FLOAT


def test_a_target_without_floats_takes_a_pool_as_the_model_has_it(
    w: np.ndarray, model_of: Build, eager: Target, decided: Build
) -> None:
    pool = "[pool] p = AveragePool <kernel_shape = [2,2], strides = [4,4], ceil_mode = 1> (c) [last] y = Conv (p, v)"
    model = model_of(image(pool, "float[1,2,2,2] y"), w=w, v=np.ones((2, 4, 1, 1), np.float32))
    assert decided(model, replace(eager, integer_only=True)) == {"conv": INTEGER, "pool": INTEGER, "last": INTEGER}
    assert decided(model, eager)["pool"][0] == FLOAT


def test_floats_take_back_what_no_integer_reads(w: np.ndarray, model_of: Build, eager: Target, decided: Build) -> None:
    elementwise = OpRule(OpKind.ELEMENTWISE)
    rules = {**eager.ops, "Sigmoid": elementwise, "Mul": elementwise}
    target = replace(eager, ops=rules, integer_only=True, floats=("Mul",))
    body = "[mul] m = Mul (c, two) [odd] e = Erf (m) [last] y = Sigmoid (e)"
    model = model_of(image(body), w=w, two=np.float32(2.0))
    assert decided(model, target)["mul"][0] == FLOAT
    # There is no kernel in float for it, or it ends the model: what is handed over stays codes.
    assert decided(model, replace(target, floats=("Erf",)))["mul"] == INTEGER
    ending = model_of(image("[last] y = Mul (c, two)"), w=w, two=np.float32(2.0))
    assert decided(ending, target)["last"] == INTEGER


def test_products_of_activations_are_integers_where_there_is_a_kernel(
    model_of: Build, eager: Target, decided: Build
) -> None:
    model = model_of(
        "(float[2,4,4] x, float[2,4,4] u) => (float[2,4,4] y)"
        "{ t = Transpose <perm = [0, 2, 1]> (u) [product] y = MatMul (x, t) }"
    )
    assert decided(model, eager)["product"] == (FLOAT, "both operands are activations")
    products = OpRule(OpKind.LINEAR, quantized_output=False, activations=True)
    target = replace(eager, ops={**eager.ops, "MatMul": products}, integer_only=True, floats=("Add",))
    assert decided(model, target)["product"] == INTEGER
    placement = place(model, target, True, True)
    # The second operand's codes lie around zero, and so do those that it is moved from.
    assert placement.symmetric == {"u"} and set(placement.activations) == {"x", "u"}
