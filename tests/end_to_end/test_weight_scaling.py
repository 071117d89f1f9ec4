"""Weights of four bits beside activations in float, from the command line: loud channels get finer weights."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from end_to_end.outcomes import report, settled, sqnr, stages_agree
from onnx import numpy_helper, parser

#: Pre-norm: what both products read comes from a norm, behind Tanh nothing folds.
BLOCK = """
<ir_version: 10, opset_import: ["": 17]>
block (float[1, 32, 128] x) => (float[1, 32, 128] y)
{
    n = LayerNormalization (x, g, b)
    h = MatMul (n, w)
    i = Add (h, x)
    m = LayerNormalization (i, g1, b1)
    u = MatMul (m, w1)
    t = Tanh (u)
    y = MatMul (t, w2)
}
"""
WORDS = ("--weights", "4", "--activations", "none")


@pytest.fixture
def block(tmp_path):
    """Build such a block and sixteen samples. Loud: a few channels behind the norms are forty times the others."""

    def build(loud: bool = True) -> tuple[Path, Path]:
        random = np.random.default_rng(11)
        proto = parser.parse_model(BLOCK)
        weights = {name: random.normal(0, 128**-0.5, (128, 128)) for name in ("w", "w1", "w2")}
        for name in ("g", "g1"):
            weights[name], weights[name.replace("g", "b")] = np.ones(128), random.normal(0, 0.01, 128)
            if loud:
                weights[name][random.integers(0, 128, 3)] *= 40.0
        for name, array in weights.items():
            proto.graph.initializer.append(numpy_helper.from_array(array.astype(np.float32), name))
        onnx.save(proto, tmp_path / "block.onnx")
        np.savez(tmp_path / "data.npz", x=random.normal(size=(16, 1, 32, 128)).astype(np.float32))
        return tmp_path / "block.onnx", tmp_path / "data.npz"

    return build


def smoothing_of(folder: Path) -> dict[str, dict]:
    return json.loads((folder / "plan.json").read_text())["smoothing"]


def test_loud_channels_are_scaled(qcompile, block, tmp_path):
    model, data = block()
    words = (model, "--target", "cpu", "--data", data, *WORDS, "--json")
    plain = report(qcompile(*words, "--smoothing", "none", "-o", tmp_path / "plain"))
    scaled = report(qcompile(*words, "-o", tmp_path / "scaled"))
    assert smoothing_of(tmp_path / "plain") == {}
    chosen = smoothing_of(tmp_path / "scaled")
    assert {name: one["how"] for name, one in chosen.items()} == {"n": "fold", "m": "fold", "t": "none"}
    assert "Tanh" in chosen["t"]["reason"]
    [step] = [step for step in scaled["passes"] if step["name"] == "Smooth"]
    assert step["nodes_before"] == step["nodes_after"] and step["relative_error"] <= 1e-4
    assert {one["node"]: one["reason"] for one in scaled["refusals"] if one["stage"] == "Smooth"} == {
        "t": chosen["t"]["reason"]
    }
    assert sqnr(scaled) > sqnr(plain) + 1.0


def test_even_channels_are_not(qcompile, block, tmp_path):
    model, data = block(loud=False)
    content = report(qcompile(model, "--target", "cpu", "--data", data, *WORDS, "--json", "-o", tmp_path / "out"))
    assert {one["how"] for one in smoothing_of(tmp_path / "out").values()} == {"none"}
    told = {one["node"]: one["reason"] for one in content["refusals"] if one["stage"] == "Smooth"}
    assert told.keys() == {"n", "m", "t"}
    assert "no factors lower the noise" in told["n"] or "samples held out from them" in told["n"]


def test_other_bits_and_no_data_leave_it_out(qcompile, block, tmp_path):
    model, data = block()
    for index, words in enumerate((("--data", data, "--weights", "8", "--activations", "none"), WORDS)):
        content = report(qcompile(model, "--target", "cpu", *words, "--json", "-o", tmp_path / f"out{index}"))
        assert smoothing_of(tmp_path / f"out{index}") == {}
        assert "Smooth" not in {step["name"] for step in content["passes"]}


def test_the_stages_agree_with_one_compile(qcompile, block, tmp_path):
    plan = stages_agree(qcompile, *block(), tmp_path, *WORDS)
    assert plan["smoothing"]["n"]["how"] == "fold"


def test_a_cache_brings_the_factors_back(qcompile, block, tmp_path):
    model, data = block()
    words = (model, "--target", "cpu", "--data", data, *WORDS, "--cache", tmp_path / "cache")
    for name in ("first", "second"):
        assert qcompile(*words, "-o", tmp_path / name).code == 0
    assert settled(tmp_path / "first") == settled(tmp_path / "second")
    # Weights of eight bits have another model: it is not taken for theirs.
    eight = (model, "--target", "cpu", "--data", data, "--weights", "8", "--activations", "none")
    assert qcompile(*eight, "--cache", tmp_path / "cache", "-o", tmp_path / "eight").code == 0
    assert smoothing_of(tmp_path / "eight") == {}
