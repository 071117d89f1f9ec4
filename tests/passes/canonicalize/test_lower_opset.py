from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest

from qcompile.core import model as models
from qcompile.core import runtime
from qcompile.core.errors import ModelError
from qcompile.passes.canonicalize.lower_opset import LowerOpset

Build = Callable[..., Any]
NEWEST = onnx.defs.onnx_opset_version()
knows_signed_shifts = pytest.mark.skipif(NEWEST < 28, reason="this onnx has no opset 28, where BitShift takes int8")


@pytest.fixture
def newest(model_of: Build) -> Callable[..., Any]:
    """Build a model of the newest opset and file format that the installed onnx knows."""

    def newest(text: str, **weights: Any) -> Any:
        model = model_of(text, NEWEST, **weights)
        model.ir_version = onnx.IR_VERSION
        return model

    return newest


def test_the_model_runs_and_stays_the_same_function(newest: Build, random: np.random.Generator) -> None:
    text = '(float[2,8] x) => (float[2,4] y) { h = MatMul (x, w) a = Einsum <equation = "ij->ij"> (h) y = Celu (a) }'
    w = random.standard_normal((8, 4)).astype(np.float32)
    opset, ir_version, name = runtime.newest_versions()
    model = LowerOpset(opset, ir_version, name)(newest(text, w=w)).model
    assert (models.opset(model), model.ir_version) == (opset, ir_version)
    x = random.standard_normal((2, 8)).astype(np.float32)
    found, h = runtime.Session(model).run({"x": x})["y"], x @ w
    np.testing.assert_allclose(found, np.where(h > 0, h, np.exp(h) - 1), rtol=1e-5, atol=1e-6)


def test_a_second_application_changes_nothing(newest: Build) -> None:
    rule = LowerOpset(22, 10, "it")
    result = rule(newest("(float[2] x) => (float[2] y) { y = Celu (x) }"))
    assert result.modified
    once = models.serialize(result.model)
    assert not rule(result.model).modified and models.serialize(result.model) == once


def test_what_the_runtime_takes_stays(model_of: Build) -> None:
    model = model_of("(float[2] x) => (float[2] y) { y = Celu (x) }", 17)
    before = models.serialize(model)
    assert not LowerOpset(22, 10, "it")(model).modified and models.serialize(model) == before


def test_weights_and_a_value_that_is_read_twice_and_an_output(newest: Build, random: np.random.Generator) -> None:
    text = """(float[2,600] x) => (float[2,600] h, float[2,600] y) {
        h = Celu (x)
        a = Mul (h, w)
        y = Add (h, a)
    }"""
    w = random.standard_normal(600).astype(np.float32)
    model = LowerOpset(*runtime.newest_versions())(newest(text, w=w)).model
    x = random.standard_normal((2, 600)).astype(np.float32)
    outputs = runtime.Session(model).run({"x": x})
    np.testing.assert_allclose(outputs["y"], outputs["h"] * (1 + w), rtol=1e-5, atol=1e-6)


@knows_signed_shifts
def test_functions_are_looked_into() -> None:
    text = f"""<ir_version: {onnx.IR_VERSION}, opset_import: ["": {NEWEST}, "local": 1]>
    g (int8[2] x) => (int8[2] y) {{ y = local.shift (x) }}
    <domain: "local", opset_import: ["": {NEWEST}]> shift (a) => (b) {{ b = BitShift <direction = "LEFT"> (a, a) }}"""
    with pytest.raises(ModelError, match="BitShift"):
        LowerOpset(26, 13, "it")(models.from_proto(onnx.parser.parse_model(text)))


@knows_signed_shifts
def test_a_type_that_the_old_operator_does_not_take(newest: Build) -> None:
    with pytest.raises(ModelError) as caught:
        LowerOpset(26, 13, "it")(newest('(int8[2] x) => (int8[2] y) { y = BitShift <direction = "LEFT"> (x, x) }'))
    line = f"model: has opset {NEWEST}; it takes 26 at most, which cannot express its BitShift; "
    assert str(caught.value).startswith(line)
