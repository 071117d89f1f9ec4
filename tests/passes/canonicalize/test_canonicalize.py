from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from qcompile.core import model as models
from qcompile.passes.canonicalize import Canonicalize

Build = Callable[..., Any]


def test_a_real_model(root: Path, rewritten: Build, types: Build) -> None:
    original = models.load(root / "models" / "resnet8.onnx")
    with np.load(root / "models" / "resnet8_eval.npz") as data:
        sample = {"x": data["x"][0]}
    model, refusals = rewritten(Canonicalize(21), original, sample)
    assert models.opset(model) == 21
    assert "BatchNormalization" not in types(model) and refusals == ()
    convolutions = [node.name for node in original.graph if node.op_type == "Conv"]
    assert sorted(node.name for node in model.graph if node.op_type == "Conv") == sorted(convolutions)


@pytest.mark.parametrize("opset", [9, 11, 13, 17])
def test_old_opsets_end_in_the_same_form(
    opset: int, model_of: Build, rewritten: Build, types: Build, random: np.random.Generator
) -> None:
    pad = 'p = Pad <mode = "constant", pads = [0,0,1,1,0,0,1,1]> (x)' if opset < 11 else "p = Pad (x, pads)"
    text = f"""(float[1,3,6,6] x) => (float[1,4,6,6] y) {{
        {pad}
        c = Conv (p, w)
        n = BatchNormalization (c, gamma, beta, mean, var)
        i = Identity (n)
        y = Relu (i)
    }}"""
    channels = {name: random.random(4).astype(np.float32) for name in ("gamma", "beta", "mean", "var")}
    pads = {} if opset < 11 else {"pads": np.int64([0, 0, 1, 1, 0, 0, 1, 1])}
    w = random.standard_normal((4, 3, 3, 3)).astype(np.float32)
    model, refusals = rewritten(Canonicalize(21), model_of(text, opset, w=w, **channels, **pads))
    assert types(model) == ["Conv", "Relu"] and refusals == ()
    assert all(node.name for node in model.graph)


def test_refusals_of_the_rules_are_handed_on(model_of: Build, rewritten: Build, random: np.random.Generator) -> None:
    text = """(float[1,3,6,6] x) => (float[1,4,N,M] y) {
        [border] p = Pad <mode = "reflect"> (x, pads)
        c = Conv (p, w)
        r = Relu (c)
        [norm] y = BatchNormalization (r, gamma, beta, mean, var)
    }"""
    channels = {name: random.random(4).astype(np.float32) for name in ("gamma", "beta", "mean", "var")}
    w = random.standard_normal((4, 3, 3, 3)).astype(np.float32)
    pads = np.int64([0, 0, 1, 1, 0, 0, 1, 1])
    _, refusals = rewritten(Canonicalize(21), model_of(text, w=w, pads=pads, **channels))
    assert [refusal.node for refusal in refusals] == ["border", "norm"]


def test_no_constant_nodes_are_left(model_of: Build, rewritten: Build, types: Build) -> None:
    text = """(float[2,3] x) => (float[A,B,C,D] y) {
        k = Constant <value_ints = [0]> ()
        a = Unsqueeze (x, k)
        b = Unsqueeze (a, k)
        y = Exp (b)
    }"""
    assert types(rewritten(Canonicalize(21), model_of(text))[0]) == ["Unsqueeze", "Exp"]


def test_fixed_shapes_reach_the_outputs(model_of: Build, types: Build) -> None:
    text = """(float[N,3] x) => (float[N,3] y) { s = Shape (x) r = Reshape (x, s) y = Exp (r) }"""
    model = model_of(text)
    Canonicalize(21, {"x": (5, 3)})(model)
    assert list(model.graph.outputs[0].shape) == [5, 3]
    assert types(model) == ["Exp"]


@pytest.mark.parametrize(
    "text",
    [
        # The open axis behind the Slice gets its name once the Slice is gone, and with it the Reshape loses its use.
        """(float[N,5] x) => (float[N,5] y) {
            s = Slice (x, zero, most, zero) e = Exp (s) t = Shape (x) r = Reshape (e, t) y = Neg (r) }""",
        "(float[N,5] x) => (float[N,5] y) { s = Slice (x, zero, most, zero) e = Exp (s) y = Neg (e) }",
        # What remains for the sake of a name.
        """(float[N,3,6,6] x) => (float[N,3,6,6] y, float[N,6,6,3] z) {
            t = Transpose <perm = [0,2,3,1]> (x) z = HardSwish (t) y = Transpose <perm = [0,3,1,2]> (t) }""",
    ],
)
def test_a_model_that_is_written_and_read_again_stays_as_it_is(text: str, model_of: Build) -> None:
    constants = {"zero": np.int64([0]), "most": np.int64([2**63 - 1])} if "zero" in text else {}
    model = model_of(text, 21, **constants)
    Canonicalize(21)(model)
    once = models.serialize(model)
    again = models.from_proto(onnx.ModelProto.FromString(once))
    Canonicalize(21)(again)
    assert models.serialize(again) == once
