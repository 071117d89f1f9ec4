from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from qcompile.core.plan import Precision
from qcompile.passes.place import Wish
from qcompile.passes.round_weights import RoundWeights, roundable

Build = Callable[..., Any]

ROWS = "(float[2,8] x) => (float[2,8] y) {{ {} }}"


@pytest.fixture
def m(random: np.random.Generator) -> np.ndarray:
    return random.normal(size=(8, 8)).astype(np.float32)


def found(result: Any) -> tuple[dict[str, str], dict[str, str]]:
    operators, refusals = roundable(result.float_model, result.model, result.plan)
    return ({name: str(operator.node.name) for name, operator in operators.items()},
            {refusal.node: refusal.reason for refusal in refusals})  # fmt: skip


def test_codes_take_the_place_of_codes(m: np.ndarray, model_of: Build, quantized: Build) -> None:
    result = quantized(model_of(ROWS.format("[n] y = MatMul (x, m)"), m=m))
    operators, refused = roundable(result.float_model, result.model, result.plan)
    ((name, operator),) = operators.items()
    assert not refused and operator.step == result.plan.tensors["x"].scale[0]
    before = result.model.graph.initializers[name].const_value.numpy()
    codes = (before + (before < 100)).astype(np.int8)
    rounded = RoundWeights({name: codes})(result.model.clone())
    assert rounded.modified
    np.testing.assert_array_equal(rounded.model.graph.initializers[name].const_value.numpy(), codes)
    np.testing.assert_array_equal(result.model.graph.initializers[name].const_value.numpy(), before)
    assert repr(RoundWeights({name: codes})) != repr(RoundWeights({name: before}))
    assert repr(RoundWeights({name: codes})) == repr(RoundWeights({name: codes.copy()}))


def test_codes_of_another_model_are_an_error(m: np.ndarray, model_of: Build, quantized: Build) -> None:
    result = quantized(model_of(ROWS.format("[n] y = MatMul (x, m)"), m=m))
    with pytest.raises(ir.passes.PreconditionError, match="codes are given for 'other'"):
        RoundWeights({"other": np.zeros(1, np.int8)})(result.model)


def test_weights_of_float_operators_are_rounded_by_what_they_compute_too(
    m: np.ndarray, model_of: Build, quantized: Build
) -> None:
    model = model_of(ROWS.format("[n] y = MatMul (x, m)"), m=m)
    result = quantized(model, wishes={"n": Wish(Precision.WEIGHT_ONLY, "asked")})
    operators, _ = roundable(result.float_model, result.model, result.plan)
    assert [operator.step for operator in operators.values()] == [0.0]
    wide = quantized(model_of(ROWS.format("[n] y = MatMul (x, m)"), 21, m=m),
                     wishes={"n": Wish(Precision.WEIGHT_ONLY, "asked", wide=True)})  # fmt: skip
    assert wide.plan.tensors["m"].dtype == "int16" and found(wide) == ({}, {})


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (ROWS.format("[a] t = MatMul (x, m) [b] y = MatMul (t, m)"), "they are read by another operator too"),
        (
            '(float[2,8,3] x) => (float[N,M,W] y) { [a] y = Conv <auto_pad = "SAME_UPPER"> (x, c) }',
            "its padding follows",
        ),
        ("(float[2,2,8] x) => (float[2,2,8] y) { [a] y = MatMul (x, b) }", "they have more than two axes"),
    ],
)
def test_what_is_left_at_nearest_is_said(
    text: str, reason: str, m: np.ndarray, model_of: Build, quantized: Build, random: np.random.Generator
) -> None:
    weights = {"m": m, "c": random.normal(size=(8, 8, 3)).astype(np.float32), "b": np.stack([m, m])}
    result = quantized(model_of(text, **{name: w for name, w in weights.items() if f", {name})" in text}))
    operators, refusals = found(result)
    assert not operators and reason in refusals["a"]
