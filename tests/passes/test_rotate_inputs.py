from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest

from qcompile.core import numerics, runtime, validate
from qcompile.core.contract import Rewritten
from qcompile.core.orthogonal import Orthogonal
from qcompile.passes.canonicalize import Canonicalize
from qcompile.passes.rotate_inputs import InputRotation, RotateInputs, kronecker, rotated_products
from qcompile.passes.structure import constant

TEXT = "(float[B,T,24] x) => (float[B,T,5] y%s) { h = Relu (x) %s y = MatMul (h, w) %s }"
FACTORS = {
    "one block of all": (24,),
    "blocks": (8,),
    "a Kronecker product": (12, 2),
    "blocks of a Kronecker product": (3, 4),
}


@pytest.fixture
def built(model_of: Callable[..., ir.Model], random: np.random.Generator) -> Callable[..., tuple[ir.Model, str]]:
    """Build a product behind a Relu, `[24, 5]`, and tell its name."""

    def built(text: str = TEXT % ("", "", ""), **others: np.ndarray) -> tuple[ir.Model, str]:
        w = random.normal(size=(24, 5)).astype(np.float32)
        used = {name: array for name, array in others.items() if name in text}
        model = model_of(text, 17, **({"w": w} if "w)" in text else {}) | used)
        Canonicalize(21)(model)
        [node] = [node for node in model.graph if node.outputs[0].name == "y"]
        return model, str(node.name)

    return built


@pytest.mark.parametrize("widths", FACTORS.values(), ids=FACTORS)
def test_every_form(widths: tuple[int, ...], built: Callable[..., tuple[ir.Model, str]]) -> None:
    model, name = built()
    factors = tuple(Orthogonal.spreading(width, seed) for seed, width in enumerate(widths))
    rotation = InputRotation(name, factors)
    whole = rotation.matrix(24)
    np.testing.assert_allclose(whole @ whole.T, np.eye(24), atol=1e-12)
    result = model.clone()
    told = RotateInputs((rotation,))(result)
    assert isinstance(told, Rewritten) and told.refusals == ()
    validate.check_model(result, "rotated")
    added = len(result.graph) - len(model.graph)
    assert added == len(widths) + (2 if widths != (24,) else 0)
    assert told.notes == (f"rotation added {added} nodes in front of linear operators",)
    feeds = {"x": np.random.default_rng(1).normal(size=(2, 3, 24)).astype(np.float32)}
    before, after = (runtime.Session(m, optimize=False).run(feeds)["y"] for m in (model, result))
    assert numerics.relative_error(before, after) < 1e-6
    # What the operator reads now is what the matrix says.
    [node] = [node for node in result.graph if node.name == name]
    read = str(node.inputs[0].name) if node.inputs[0] is not None else ""
    seen = runtime.Session(runtime.with_outputs(result, [read]), optimize=False).run(feeds)[read]
    np.testing.assert_allclose(seen, np.maximum(feeds["x"], 0) @ whole, atol=1e-5)
    assert set(rotated_products((rotation,), result.graph)) == {f"{name}_rotation_{i}" for i in range(len(widths))}


def test_other_readers_of_the_weights_keep_them(built: Callable[..., tuple[ir.Model, str]]) -> None:
    model, name = built(TEXT % (", float[B,T,5] z", "n = Exp (x)", "z = MatMul (n, w)"))
    result = model.clone()
    rotation = kronecker(name, 24)
    assert rotation is not None
    assert RotateInputs((rotation,))(result).modified
    feeds = runtime.synthetic_feeds(model, 1, open_axis=2)
    before, after = (runtime.Session(m, optimize=False).run(feeds) for m in (model, result))
    assert all(numerics.relative_error(before[key], after[key]) < 1e-6 for key in before)
    assert len({id(constant(node.inputs[1])) for node in result.graph if node.op_type == "MatMul"}) > 1


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (TEXT % (", float[B,T,24] z", "", "z = Exp (h)"), "others read the same"),
        (TEXT % (", float[B,T,24] h", "", ""), "others read the same"),
        ("(float[B,T,8] x) => (float[B,T,5] y) { h = Relu (x) y = MatMul (h, few) }", "fewer than 16 channels"),
        ("(float[1,24,4,4] x) => (float[1,5,4,4] y) { h = Relu (x) y = Conv (h, kernel) }", "it is no product"),
    ],
)
def test_refusals(text: str, reason: str, built: Callable[..., tuple[ir.Model, str]]) -> None:
    others = {"few": np.ones((8, 5), np.float32), "kernel": np.ones((5, 24, 1, 1), np.float32)}
    model, name = built(text, **others)
    nodes = len(model.graph)
    told = RotateInputs((InputRotation(name, (Orthogonal.spreading(8),)),))(model)
    assert isinstance(told, Rewritten) and not told.modified and told.notes == ()
    [refusal] = told.refusals
    assert refusal.node == name and reason in refusal.reason
    assert len(model.graph) == nodes


def test_matrices_that_do_not_divide_the_channels(built: Callable[..., tuple[ir.Model, str]]) -> None:
    model, name = built()
    told = RotateInputs((InputRotation(name, (Orthogonal.spreading(7),)),))(model)
    assert isinstance(told, Rewritten)
    assert told.refusals[0].reason == "what it reads is not rotated: matrices of 7 channels do not divide 24"


def test_rotations_of_another_graph(built: Callable[..., tuple[ir.Model, str]]) -> None:
    model, _ = built()
    with pytest.raises(ir.passes.PreconditionError, match="names node 'absent'"):
        RotateInputs((InputRotation("absent", (Orthogonal.spreading(8),)),))(model)
    with pytest.raises(ValueError, match="0 factors"):
        InputRotation("absent", ())


@pytest.mark.parametrize(
    ("width", "factors"), [(1536, (32, 48)), (3072, (48, 64)), (64, (8, 8)), (20, (20,)), (23, None)]
)
def test_the_cheapest_factors(width: int, factors: tuple[int, ...] | None) -> None:
    rotation = kronecker("n", width, 4)
    assert (rotation and tuple(factor.width for factor in rotation.factors)) == factors
    if rotation is not None:
        np.testing.assert_allclose(np.abs(rotation.matrix(width)), width**-0.5, atol=1e-12)
        assert InputRotation.from_json(json.loads(json.dumps(rotation.to_json()))) == rotation
