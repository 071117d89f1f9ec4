"""Weights rounded with regard to one another, from the command line: where it helps, where it is left, and the same
bytes stage by stage."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from end_to_end.outcomes import report, sqnr, stages_agree
from onnx import numpy_helper, parser

from qcompile import compensation

MODEL = """
<ir_version: 10, opset_import: ["": 21]>
g (float[1, 32, 64] x) => (float[1, 32, 64] y) { [n] y = MatMul (x, w) }
"""


@pytest.fixture
def linear(tmp_path):
    """Build one MatMul and samples whose channels come from a few; if moving, later ones from others."""

    def build(rank: int, moving: bool = False) -> tuple[Path, Path]:
        random = np.random.default_rng(5)
        proto = parser.parse_model(MODEL)
        weights = random.normal(size=(64, 64)).astype(np.float32)
        weights[0] *= 20.0  # coarse steps: what weights lose is more than what activations do
        proto.graph.initializer.append(numpy_helper.from_array(weights, "w"))
        onnx.save(proto, tmp_path / "linear.onnx")
        x = random.normal(size=(16, 1, 32, rank)) @ random.normal(size=(rank, 64))
        if moving:
            x[10:] = random.normal(size=(6, 1, 32, rank)) @ random.normal(size=(rank, 64))
        x[..., 0] *= 0.01
        np.savez(tmp_path / "data.npz", x=x.astype(np.float32))
        return tmp_path / "linear.onnx", tmp_path / "data.npz"

    return build


def compiled(qcompile, folder: Path, model: Path, data: Path) -> dict:
    return report(qcompile(model, "--target", "cpu", "--data", data, "--smoothing", "none", "--json", "-o", folder))


def test_codes_make_up_for_one_another_where_inputs_go_together(qcompile, linear, tmp_path, monkeypatch):
    together = compiled(qcompile, tmp_path / "together", *linear(4))
    assert "RoundWeights" in {step["name"] for step in together["passes"]}
    assert not [one for one in together["refusals"] if one["stage"] == "RoundWeights"]
    monkeypatch.setattr(compensation, "roundable", lambda *_: ({}, ()))
    nearest = compiled(qcompile, tmp_path / "nearest", *linear(4))
    assert "RoundWeights" not in {step["name"] for step in nearest["passes"]}
    assert sqnr(together) > sqnr(nearest) + 6.0


def test_where_it_is_worse_weights_stay_at_nearest_and_the_report_says_so(qcompile, linear, tmp_path):
    moving = compiled(qcompile, tmp_path / "moving", *linear(4, moving=True))
    told = [one["reason"] for one in moving["refusals"] if one["stage"] == "RoundWeights"]
    assert told == ["weights rounded with regard to one another lost more on samples held out from it"]


def test_the_stages_agree_with_one_compile(qcompile, linear, tmp_path):
    stages_agree(qcompile, *linear(4), tmp_path)


def test_a_cache_brings_the_codes_back(qcompile, linear, tmp_path):
    model, data = linear(4)
    words = (model, "--target", "cpu", "--data", data, "--quiet", "--cache", tmp_path / "cache")
    assert qcompile(*words, "-o", tmp_path / "first").code == 0
    assert qcompile(*words, "-o", tmp_path / "second").code == 0
    assert (tmp_path / "first/model.onnx").read_bytes() == (tmp_path / "second/model.onnx").read_bytes()
