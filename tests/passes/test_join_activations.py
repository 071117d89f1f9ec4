"""GELU and hard-swish become one operator, and stay several where that is not known to be the same."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from qcompile.core import model as models
from qcompile.core import runtime
from qcompile.passes.join_activations import JoinActivations


def parsed(text: str) -> ir.Model:
    return ir.from_proto(onnx.parser.parse_model(text))


def types(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def same(before: ir.Model, after: ir.Model, x: Any, tolerance: float) -> None:
    expected, found = (runtime.Session(model, optimize=False).run({"x": x}) for model in (before, after))
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=0, atol=tolerance)


@pytest.mark.parametrize(("half", "written"), [(0.5, ["Gelu"]), (1.0, ["Gelu", "Mul"])])
def test_gelu_becomes_one_operator_whatever_became_of_its_half(half: float, written: list[str]) -> None:
    text = f"""<ir_version: 10, opset_import: ["" : 21]> f (float[N,8] x) => (float[N,8] y)
        <float root = {{1.4142135}}, float one = {{1}}, float half = {{{half}}}> {{
        a = Div(x, root) b = Erf(a) c = Add(b, one) d = Mul(x, c) y = Mul(d, half) }}"""
    model = parsed(text)
    joined = model.clone()
    assert JoinActivations()(joined).modified and types(joined) in (written, [*written, "Mul"])
    same(model, joined, np.linspace(-6, 6, 24, dtype=np.float32).reshape(3, 8), 1e-6)


def test_gelu_stays_where_the_opset_has_none_or_its_inside_is_read() -> None:
    text = """<ir_version: 10, opset_import: ["" : 17]> f (float[N,8] x) => (float[N,8] y)
        <float root = {1.4142135}, float one = {1}, float half = {0.5}> {
        a = Div(x, root) b = Erf(a) c = Add(b, one) d = Mul(x, c) y = Mul(d, half) }"""
    assert not JoinActivations()(ir.from_proto(onnx.parser.parse_model(text))).modified
    text = text.replace('"" : 17', '"" : 21').replace("(float[N,8] y)", "(float[N,8] y, float[N,8] c)")
    assert not JoinActivations()(ir.from_proto(onnx.parser.parse_model(text))).modified


HARD_SWISH = """<ir_version: 10, opset_import: ["" : %d]> f (%s[N,8] x) => (%s[N,8] y%s)
    <%s three = {3}, %s low = {0}, %s high = {6}> {
    a = Add (x, three) l = Clip (a, low, high) m = Mul (x, l) y = Div (m, high) }"""


def hard_swish(opset: int = 14, kind: str = "float", outputs: str = "") -> ir.Model:
    return parsed(HARD_SWISH % (opset, kind, kind, outputs, kind, kind, kind))


@pytest.mark.parametrize("divided", [True, False])
def test_hard_swish_becomes_one_operator_whatever_became_of_its_sixth(divided: bool) -> None:
    text = HARD_SWISH % (14, "float", "float", "", "float", "float", "float")
    model = parsed(text if divided else text.replace("m = Mul (x, l) y = Div (m, high)", "y = Mul (x, l)"))
    joined = model.clone()
    result = JoinActivations()(joined)
    assert result.modified and types(joined) == (["HardSwish"] if divided else ["HardSwish", "Mul"])
    same(model, joined, np.linspace(-6, 6, 24, dtype=np.float32).reshape(3, 8), 2e-6)
    assert not JoinActivations()(joined).modified


@pytest.mark.parametrize(
    "model",
    [
        hard_swish(opset=13), hard_swish(kind="double"), hard_swish(outputs=", float[N,8] l"),
        parsed(HARD_SWISH.replace("{6}", "{5}") % (14, "float", "float", "", "float", "float", "float")),
        parsed('<ir_version: 10, opset_import: ["" : 21]> f (float[N,8] x) => (float[N,8] y) '
               "{ s = Sigmoid (x) y = Mul (x, s) }"),
        parsed('<ir_version: 10, opset_import: ["" : 21]> f (float[N,8] x) => (float[N,8] y) { y = Gelu (x) }'),
    ],
    ids=["opset", "double", "read inside", "another constant", "SiLU", "one already"],
)  # fmt: skip
def test_what_stays_as_it_is(model: ir.Model) -> None:
    before = models.serialize(model)
    assert not JoinActivations()(model).modified
    assert models.serialize(model) == before
