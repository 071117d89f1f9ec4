"""Which operators a target without floats takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from qcompile.core.target import OpKind, OpRule, Target

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
