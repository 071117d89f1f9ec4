"""Shifting from the command line: channels that lie off zero are moved there, no node is added, the stages agree."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from end_to_end.outcomes import report, sqnr, stages_agree
from onnx import numpy_helper, parser

#: A post-norm block: the norm feeds a product and the residual, which meets the bias of the branch.
BLOCK = """
<ir_version: 10, opset_import: ["": 17]>
block (float[1, 64, 64] x) => (float[1, 64, 64] y)
{
    n = LayerNormalization (x, g, b)
    u = MatMul (n, wu)
    p = Add (u, bu)
    t = Tanh (p)
    d = MatMul (t, wd)
    v = Add (d, bd)
    h = Add (v, n)
    y = LayerNormalization (h, g, b1)
}
"""


@pytest.fixture
def block(tmp_path) -> tuple[Path, Path]:
    """Build such a block, whose norm has channels around -6 to 6, and twelve samples."""
    random = np.random.default_rng(7)
    proto = parser.parse_model(BLOCK)
    weights = {name: random.normal(0, 0.125, (64, 64)) for name in ("wu", "wd")}
    weights |= {name: random.normal(0, 0.1, 64) for name in ("bu", "bd", "b1")}
    weights |= {"g": random.uniform(0.5, 1.0, 64), "b": random.uniform(-6.0, 6.0, 64)}
    weights["bu"] = weights["bu"] - weights["b"] @ weights["wu"]
    for name, array in weights.items():
        proto.graph.initializer.append(numpy_helper.from_array(array.astype(np.float32), name))
    onnx.save(proto, tmp_path / "block.onnx")
    np.savez(tmp_path / "data.npz", x=random.normal(size=(12, 1, 64, 64)).astype(np.float32))
    return tmp_path / "block.onnx", tmp_path / "data.npz"


def test_channels_off_zero_are_shifted(qcompile, block, tmp_path):
    model, data = block
    words = (model, "--target", "cpu", "--data", data, "--no-added-nodes", "--rotation", "none", "--json")
    plain = report(qcompile(*words, "--smoothing", "none", "-o", tmp_path / "plain"))
    shifted = report(qcompile(*words, "-o", tmp_path / "shifted"))
    plan = json.loads((tmp_path / "shifted/plan.json").read_text())
    beta = numpy_helper.to_array(next(t for t in onnx.load(model).graph.initializer if t.name == "b"))
    # The norm's rows have zero mean and unit variance: what lies in the middle of a channel is near its β.
    assert np.max(np.abs(np.array(plan["smoothing"]["n"]["shift"]) - beta)) < 1.0
    step = next(step for step in shifted["passes"] if step["name"] == "Smooth")
    assert step["nodes_before"] == step["nodes_after"] and step["relative_error"] <= 1e-4
    assert sqnr(shifted) > sqnr(plain) + 3.0


def test_the_stages_agree_with_one_compile(qcompile, block, tmp_path):
    assert stages_agree(qcompile, *block, tmp_path)["smoothing"]["n"]["shift"]


def test_a_shift_that_does_not_fit_is_said(qcompile, block, tmp_path):
    model, data = block
    assert qcompile(model, "--target", "cpu", "--data", data, "-o", tmp_path / "whole").code == 0
    plan = json.loads((tmp_path / "whole/plan.json").read_text())
    plan["smoothing"]["n"]["shift"].pop()
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    words = ("apply", model, "--plan", tmp_path / "plan.json", "--data", data, "--json", "-o", tmp_path / "out")
    content = report(qcompile(*words))
    assert any("not shifted" in one["reason"] for one in content["refusals"] if one["stage"] == "Smooth")
