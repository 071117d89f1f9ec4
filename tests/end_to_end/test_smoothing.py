"""Smoothing from the command line: a model with outliers gets better, the stages agree, and the report says why not."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from end_to_end.outcomes import report, settled, sqnr, stages_agree
from onnx import numpy_helper, parser

#: Post-norm: the first norm feeds the residual as well, and behind Tanh nothing folds.
BLOCK = """
<ir_version: 10, opset_import: ["": 17]>
block (float[1, 64, WIDTH] x) => (float[1, 64, WIDTH] y)
{
    n = LayerNormalization (x, g, b)
    q = MatMul (n, wq)
    v = Add (q, bq)
    r = Relu (v)
    o = MatMul (r, wo)
    h = Add (o, n)
    m = LayerNormalization (h, g1, b)
    u = MatMul (m, wu)
    t = Tanh (u)
    s = Mul (t, outliers)
    k = Sigmoid (s)
    z = Mul (s, k)
    y = MatMul (z, wd)
}
"""


@pytest.fixture
def block(tmp_path):
    """Build such a block, some of whose channels reach fifty times as far as the others, and twelve samples."""

    def build(width: int = 64) -> tuple[Path, Path]:
        random = np.random.default_rng(5)
        proto = parser.parse_model(BLOCK.replace("WIDTH", str(width)))
        weights = {name: random.normal(0, width**-0.5, (width, width)) for name in ("wq", "wo", "wu", "wd")}
        for name in ("b", "bq"):
            weights[name] = random.normal(0, 0.1, width)
        for name in ("g", "g1", "outliers"):
            weights[name] = np.exp(random.normal(0, 0.3, width))
            weights[name][random.integers(0, width, 2)] *= 50.0
        for name, following in (("g", "wq"), ("g1", "wu"), ("outliers", "wd")):
            weights[following] = weights[following] / weights[name][:, None] ** 0.8
        for name, array in weights.items():
            proto.graph.initializer.append(numpy_helper.from_array(array.astype(np.float32), name))
        onnx.save(proto, tmp_path / "block.onnx")
        np.savez(tmp_path / "data.npz", x=random.normal(size=(12, 1, 64, width)).astype(np.float32))
        return tmp_path / "block.onnx", tmp_path / "data.npz"

    return build


def smooth_step(content: dict) -> dict | None:
    return next((step for step in content["passes"] if step["name"] == "Smooth"), None)


def refusals(content: dict) -> dict[str, str]:
    return {one["node"]: one["reason"] for one in content["refusals"] if one["stage"] == "Smooth"}


def test_outliers_are_smoothed_by_default(qcompile, block, tmp_path):
    model, data = block()
    words = (model, "--target", "cpu", "--data", data, "--json")
    plain = report(qcompile(*words, "--smoothing", "none", "-o", tmp_path / "plain"))
    smoothed = report(qcompile(*words, "-o", tmp_path / "smoothed"))
    assert smooth_step(plain) is None
    step = smooth_step(smoothed)
    assert step["nodes_before"] == step["nodes_after"] and step["relative_error"] <= 1e-4
    assert sqnr(smoothed) > sqnr(plain) + 0.5
    # Without costs nobody knows what a Mul takes.
    told = refusals(smoothed)
    assert "what a Mul takes is not known" in told["n"] and "LayerNormalization" in told["n"]
    plan = json.loads((tmp_path / "smoothed/plan.json").read_text())
    assert {name: one["how"] for name, one in plan["smoothing"].items()}["r"] == "fold"
    assert {name for name, one in plan["smoothing"].items() if one["how"] == "none"} == set(told)


def test_a_mul_is_added_where_it_pays(qcompile, block, tmp_path):
    model, data = block(256)
    words = (model, "--target", "cpu", "--data", data, "--json")
    with_muls = report(qcompile(*words, "-o", tmp_path / "muls", costs=None))
    without = report(qcompile(*words, "--no-added-nodes", "-o", tmp_path / "none", costs=None))
    plan = json.loads((tmp_path / "muls/plan.json").read_text())
    added = [name for name, one in plan["smoothing"].items() if one["how"] in ("restore", "branch")]
    step = smooth_step(with_muls)
    assert added and step["nodes_after"] - step["nodes_before"] == len(added)
    assert sqnr(with_muls) > sqnr(without) + 3.0
    step = smooth_step(without)
    assert step["nodes_after"] == step["nodes_before"]
    assert any("no node may be added" in reason for reason in refusals(without).values())


def test_the_stages_agree_with_one_compile(qcompile, block, tmp_path):
    plan = stages_agree(qcompile, *block(256), tmp_path, costs=None)
    assert "fold" in {one["how"] for one in plan["smoothing"].values()}


def test_a_cache_brings_the_factors_back(qcompile, block, tmp_path):
    model, data = block()
    words = (model, "--target", "cpu", "--data", data, "--cache", tmp_path / "cache")
    assert qcompile(*words, "-o", tmp_path / "first").code == 0
    assert qcompile(*words, "-o", tmp_path / "second").code == 0
    assert settled(tmp_path / "first") == settled(tmp_path / "second")


@pytest.mark.parametrize(
    "edit",
    [
        lambda one: one.update(log2=[0.1] * 64),
        lambda one: one.update(log2=[64.0] * 64),
        lambda one: one.update(how="somehow"),
        lambda one: one.pop("reason"),
    ],
)
def test_factors_that_are_none_are_refused(qcompile, block, tmp_path, edit):
    model, data = block()
    assert qcompile(model, "--target", "cpu", "--data", data, "-o", tmp_path / "whole").code == 0
    plan = json.loads((tmp_path / "whole/plan.json").read_text())
    edit(plan["smoothing"]["r"])
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    done = qcompile("apply", model, "--plan", tmp_path / "plan.json", "--data", data, "-o", tmp_path / "out")
    assert done.code == 2 and "plan.json" in done.err and not (tmp_path / "out").exists()


def test_nothing_is_smoothed_without_data_or_without_integers(qcompile, small, tmp_path):
    for index, words in enumerate([(), ("--activations", "none"), ("--weights", "none")]):
        given = (*words, "--data", small.data) if words else ()
        content = report(qcompile(small.model, "--target", "cpu", *given, "--json", "-o", tmp_path / f"out{index}"))
        assert smooth_step(content) is None


#: The keys are what the norm makes: what divides them multiplies the queries.
SCORES = """
<ir_version: 10, opset_import: ["": 17]>
scores (float[1, 64, 64] x) => (float[1, 64, 64] y)
{
    n = LayerNormalization (x, g, b)
    q = MatMul (n, wq)
    t = Transpose <perm = [0, 2, 1]> (n)
    a = MatMul (q, t)
    p = Softmax (a)
    v = MatMul (n, wv)
    y = MatMul (p, v)
}
"""


def test_factors_of_keys_go_to_the_queries(qcompile, tmp_path):
    random = np.random.default_rng(7)
    proto = parser.parse_model(SCORES)
    weights = {name: random.normal(0, 0.1, (64, 64)) for name in ("wq", "wv")}
    weights |= {"g": np.exp(random.normal(0, 0.3, 64)), "b": random.normal(0, 0.1, 64)}
    weights["g"][[3, 40]] *= 50.0
    for name in ("wq", "wv"):
        weights[name] = weights[name] / weights["g"][:, None] ** 0.8
    weights["wq"] = weights["wq"] / weights["g"]
    for name, array in weights.items():
        proto.graph.initializer.append(numpy_helper.from_array(array.astype(np.float32), name))
    onnx.save(proto, tmp_path / "scores.onnx")
    np.savez(tmp_path / "data.npz", x=random.normal(size=(12, 1, 64, 64)).astype(np.float32))
    words = (tmp_path / "scores.onnx", "--target", "cpu", "--data", tmp_path / "data.npz", "--json")
    plain = report(qcompile(*words, "--smoothing", "none", "-o", tmp_path / "plain"))
    smoothed = report(qcompile(*words, "-o", tmp_path / "smoothed"))
    step = smooth_step(smoothed)
    assert step["nodes_before"] == step["nodes_after"] and step["relative_error"] <= 1e-4
    plan = json.loads((tmp_path / "smoothed/plan.json").read_text())
    assert plan["smoothing"]["n"]["how"] == "fold" and len(set(plan["smoothing"]["n"]["log2"])) > 8
    assert sqnr(smoothed) > sqnr(plain) + 3.0
