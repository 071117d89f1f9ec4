from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest

from qcompile.core import numerics, runtime, validate
from qcompile.core.contract import Rewritten
from qcompile.core.orthogonal import Orthogonal
from qcompile.core.rotation import InputRotation
from qcompile.passes.canonicalize import Canonicalize
from qcompile.passes.rotate_inputs import RotateInputs, rotated_products
from qcompile.passes.structure import constant

TEXT = "(float[B,T,24] x) => (float[B,T,5] y%s) { h = Relu (x) %s y = MatMul (h, w) %s }"


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


@pytest.mark.parametrize("block", [24, 12, 8, 1])
def test_blocks(block: int, built: Callable[..., tuple[ir.Model, str]]) -> None:
    model, name = built()
    rotation = InputRotation(name, Orthogonal.spreading(block, 4, block=block))
    result = model.clone()
    told = RotateInputs((rotation,))(result)
    assert isinstance(told, Rewritten) and told.refusals == ()
    validate.check_model(result, "rotated")
    added = 1 if block == 24 else 3
    assert len(result.graph) - len(model.graph) == added
    assert told.notes == (f"rotation added {added} nodes in front of linear operators",)
    feeds = {"x": np.random.default_rng(1).normal(size=(2, 3, 24)).astype(np.float32)}
    before, after = (runtime.Session(m, optimize=False).run(feeds)["y"] for m in (model, result))
    assert numerics.relative_error(before, after) < 1e-6
    # What the operator reads now is what the matrix says.
    [node] = [node for node in result.graph if node.name == name]
    read = str(node.inputs[0].name) if node.inputs[0] is not None else ""
    seen = runtime.Session(runtime.with_outputs(result, [read]), optimize=False).run(feeds)[read]
    whole = np.kron(np.eye(24 // block), rotation.matrix.matrix())
    np.testing.assert_allclose(seen, np.maximum(feeds["x"], 0) @ whole, atol=1e-5)
    [product] = rotated_products((rotation,), result.graph)
    assert product == f"{name}_rotated"
    assert InputRotation.from_json(json.loads(json.dumps(rotation.to_json()))) == rotation


def test_a_batch_of_none(built: Callable[..., tuple[ir.Model, str]]) -> None:
    model, name = built()
    RotateInputs((InputRotation(name, Orthogonal.spreading(8)),))(model)
    feeds = {"x": np.zeros((0, 3, 24), np.float32)}
    assert runtime.Session(model, optimize=False).run(feeds)["y"].shape == (0, 3, 5)


def test_names_that_are_taken(built: Callable[..., tuple[ir.Model, str]]) -> None:
    """A second rotation in front of the first is one more, with other names."""
    model, name = built()
    result = model.clone()
    for seed in (1, 2):
        RotateInputs((InputRotation(name, Orthogonal.spreading(8, seed)),))(result)
        Canonicalize(21)(result)
    feeds = {"x": np.ones((1, 2, 24), np.float32)}
    before, after = (runtime.Session(m, optimize=False).run(feeds)["y"] for m in (model, result))
    assert numerics.relative_error(before, after) < 1e-6


def test_other_readers_of_the_weights_keep_them(built: Callable[..., tuple[ir.Model, str]]) -> None:
    model, name = built(TEXT % (", float[B,T,5] z", "n = Exp (x)", "z = MatMul (n, w)"))
    result = model.clone()
    assert RotateInputs((InputRotation(name, Orthogonal.spreading(8)),))(result).modified
    feeds = runtime.synthetic_feeds(model, 1, open_axis=2)
    before, after = (runtime.Session(m, optimize=False).run(feeds) for m in (model, result))
    assert all(numerics.relative_error(before[key], after[key]) < 1e-6 for key in before)
    assert len({id(constant(node.inputs[1])) for node in result.graph if node.op_type == "MatMul"}) > 1


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (TEXT % (", float[B,T,24] z", "", "z = Exp (h)"), "others read the same"),
        (TEXT % (", float[B,T,24] h", "", ""), "others read the same"),
        ("(float[B,T,K] x) => (float[B,T,L] y) { h = Relu (x) y = MatMul (h, h) }", "it is no product"),
        ("(float[1,24,4,4] x) => (float[1,5,4,4] y) { h = Relu (x) y = Conv (h, kernel) }", "it is no product"),
    ],
)
def test_refusals(text: str, reason: str, built: Callable[..., tuple[ir.Model, str]]) -> None:
    others = {"kernel": np.ones((5, 24, 1, 1), np.float32)}
    model, name = built(text, **others)
    nodes = len(model.graph)
    told = RotateInputs((InputRotation(name, Orthogonal.spreading(8)),))(model)
    assert isinstance(told, Rewritten) and not told.modified and told.notes == ()
    [refusal] = told.refusals
    assert refusal.node == name and reason in refusal.reason
    assert len(model.graph) == nodes


def test_matrices_that_do_not_divide_the_channels(built: Callable[..., tuple[ir.Model, str]]) -> None:
    model, name = built()
    told = RotateInputs((InputRotation(name, Orthogonal.spreading(7)),))(model)
    assert isinstance(told, Rewritten)
    assert told.refusals[0].reason == "what it reads is not rotated: a matrix of 7 channels does not divide 24"


def test_rotations_of_another_graph(built: Callable[..., tuple[ir.Model, str]]) -> None:
    model, _ = built()
    with pytest.raises(ir.passes.PreconditionError, match="names node 'absent'"):
        RotateInputs((InputRotation("absent", Orthogonal.spreading(8)),))(model)
