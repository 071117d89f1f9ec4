"""Rotation from the command line: what is chosen, what is not, and that the stages agree."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from end_to_end.outcomes import report, settled, sqnr, stages_agree
from onnx import numpy_helper, parser

WIDTH, WIDE, ROWS = 128, 256, 200
#: Pre-norm: two feed-forward blocks on a stream; what FFN-down reads stands behind a power, which nothing folds into.
STREAM = """
<ir_version: 10, opset_import: ["": 17]>
block (int64[1, 48] x) => (float[1, 48, 24] y)
{
    h = Gather (table, x)
    n = LayerNormalization (h, g, b)
    u = MatMul (n, wu)
    t = Mul (u, u)
    s = Mul (t, u)
    d = MatMul (s, wd)
    i = Add (h, d)
    n1 = LayerNormalization (i, g1, b1)
    u1 = MatMul (n1, wu1)
    t1 = Mul (u1, u1)
    s1 = Mul (t1, u1)
    d1 = MatMul (s1, wd1)
    j = Add (i, d1)
    m = LayerNormalization (j, g2, b2)
    y = MatMul (m, wy)
}
"""


@pytest.fixture
def stream(tmp_path):
    """Build such a model and twelve samples.

    Loud: each token has another channel that reaches far, which no factors of channels even out.
    """

    def build(loud: bool = True) -> tuple[Path, Path]:
        random = np.random.default_rng(7)
        proto = parser.parse_model(STREAM)
        shapes = {"wu": (WIDTH, WIDE), "wd": (WIDE, WIDTH), "wy": (WIDTH, 24)}
        shapes |= {"wu1": (WIDTH, WIDE), "wd1": (WIDE, WIDTH)}
        weights = {name: random.normal(0, shape[0] ** -0.5, shape) for name, shape in shapes.items()}
        weights["table"] = random.normal(size=(ROWS, WIDTH))
        for name in ("g", "g1", "g2"):
            weights[name], weights[name.replace("g", "b")] = np.ones(WIDTH), random.normal(0, 0.01, WIDTH)
        if loud:
            weights["table"][np.arange(ROWS), random.integers(0, WIDTH, ROWS)] *= 40.0
        for name, array in weights.items():
            proto.graph.initializer.append(numpy_helper.from_array(array.astype(np.float32), name))
        onnx.save(proto, tmp_path / "stream.onnx")
        np.savez(tmp_path / "data.npz", x=random.integers(0, ROWS, (12, 1, 48)))
        return tmp_path / "stream.onnx", tmp_path / "data.npz"

    return build


def steps(content: dict) -> dict[str, dict]:
    return {step["name"]: step for step in content["passes"]}


def rotation_of(folder: Path) -> dict:
    return json.loads((folder / "plan.json").read_text())["rotation"]


def test_a_loud_stream_is_rotated(qcompile, stream, tmp_path):
    model, data = stream()
    words = (model, "--target", "cpu", "--data", data, "--json")
    plain = report(qcompile(*words, "--rotation", "none", "-o", tmp_path / "plain"))
    rotated = report(qcompile(*words, "-o", tmp_path / "rotated"))
    assert "Rotate" not in steps(plain) and rotation_of(tmp_path / "plain")["folded"] == []
    [place] = rotation_of(tmp_path / "rotated")["folded"]
    assert (place["site"], place["width"], place["keeps_ones"]) == ("stream", WIDTH, True)
    step = steps(rotated)["Rotate"]
    assert step["nodes_before"] == step["nodes_after"] and step["relative_error"] <= 1e-4
    # What is left is the noise in front of FFN-down, which no stream is.
    assert sqnr(rotated) > sqnr(plain) + 2.0
    # Without costs nobody knows what a product takes.
    assert "RotateInputs" not in steps(rotated)


def test_a_quiet_stream_is_not(qcompile, stream, tmp_path):
    model, data = stream(loud=False)
    content = report(qcompile(model, "--target", "cpu", "--data", data, "--json", "-o", tmp_path / "out"))
    rotation = rotation_of(tmp_path / "out")
    assert rotation["folded"] == [] and rotation["inputs"] == []
    told = [one for one in content["refusals"] if one["stage"] == "Rotate"]
    assert told and all("it is not rotated: " in one["reason"] for one in told)
    assert [{key: one[key] for key in ("node", "reason")} for one in told] == rotation["refused"]


def test_products_are_added_only_where_they_may_be(qcompile, stream, tmp_path, monkeypatch):
    # On a model as small as this a product takes as much time as what it saves noise for.
    monkeypatch.setattr("qcompile.outcome.NOISE", 1.0)
    model, data = stream()
    words = (model, "--target", "cpu", "--data", data, "--json")
    allowed = report(qcompile(*words, "-o", tmp_path / "allowed", costs=None))
    refused = report(qcompile(*words, "--no-added-nodes", "-o", tmp_path / "refused", costs=None))
    inputs = rotation_of(tmp_path / "allowed")["inputs"]
    step = steps(allowed)["RotateInputs"]
    assert inputs and step["nodes_after"] - step["nodes_before"] == 3 * len(inputs)
    assert any("rotation added" in warning for warning in allowed["warnings"])
    assert rotation_of(tmp_path / "refused")["inputs"] == [] and "RotateInputs" not in steps(refused)
    # The products stay in float, what they make is quantized.
    rows = {row["name"]: row for row in allowed["operators"]}
    for one in inputs:
        assert rows[f"{one['node']}_rotated"]["precision"] == "float" and rows[one["node"]]["precision"] == "integer"


@pytest.mark.parametrize("costs", [None, "none"])
def test_the_stages_agree_with_one_compile(qcompile, stream, tmp_path, monkeypatch, costs):
    monkeypatch.setattr("qcompile.outcome.NOISE", 1.0)
    rotation = stages_agree(qcompile, *stream(), tmp_path, costs=costs)["rotation"]
    assert rotation["folded"] and bool(rotation["inputs"]) == (costs is None)


def test_a_cache_brings_the_matrices_back(qcompile, stream, tmp_path):
    model, data = stream()
    words = (model, "--target", "cpu", "--data", data, "--cache", tmp_path / "cache")
    assert qcompile(*words, "-o", tmp_path / "first").code == 0
    assert qcompile(*words, "-o", tmp_path / "second").code == 0
    assert rotation_of(tmp_path / "first")["folded"]
    assert settled(tmp_path / "first") == settled(tmp_path / "second")


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (lambda one: one.update(node="absent"), "'absent', which the model does not have"),
        (lambda one: one.update(site="values"), "rotates the values"),
        (lambda one: one.update(keeps_ones=False), "rotates the stream"),
        (lambda one: one.update(width=64), "not a quantization plan"),
        (lambda one: one.update(site="somewhere"), "not a quantization plan"),
        (lambda one: one.pop("matrices"), "not a quantization plan"),
        (lambda one: one["matrices"][0].update(block=96), "not a quantization plan"),
        (lambda one: one["matrices"][0].update(kind="stored", stored="AAAA"), "not a quantization plan"),
        (lambda one: one["matrices"][0].update(kind="stored", stored="AAAAAAAAAAA=" * 128 * 128), "not a quantization"),
    ],
)
def test_rotations_that_are_none_are_refused(qcompile, stream, tmp_path, edit, says):
    model, data = stream()
    assert qcompile(model, "--target", "cpu", "--data", data, "-o", tmp_path / "whole").code == 0
    plan = json.loads((tmp_path / "whole/plan.json").read_text())
    edit(plan["rotation"]["folded"][0])
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    done = qcompile("apply", model, "--plan", tmp_path / "plan.json", "--data", data, "-o", tmp_path / "out")
    assert done.code == 2 and "plan.json" in done.err and says in done.err and not (tmp_path / "out").exists()


def test_nothing_is_rotated_without_data_or_without_integers(qcompile, stream, tmp_path):
    model, data = stream()
    for index, words in enumerate([(), ("--activations", "none"), ("--weights", "none")]):
        given = (*words, "--data", data) if words else ()
        content = report(qcompile(model, "--target", "cpu", *given, "--json", "-o", tmp_path / f"out{index}"))
        assert not {"Rotate", "RotateInputs"} & set(steps(content))
