"""Outlier channels behind GELU, split from the command line: nothing is added to what the runtime executes."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest
from end_to_end.outcomes import report, sqnr, stages_agree
from onnx import numpy_helper, parser

FEED_FORWARD = """
<ir_version: 10, opset_import: ["": 17]>
feed_forward (float[1, 128, 256] x) => (float[1, 128, 256] y)
{
    m = MatMul (x, w)
    h = Add (m, b)
    d = Div (h, root)
    e = Erf (d)
    f = Add (e, one)
    p = Mul (h, f)
    g = Mul (p, half)
    o = MatMul (g, v)
    y = Add (o, x)
}
"""


@pytest.fixture
def feed_forward(tmp_path):
    """Build it, with three of 1024 channels that reach twenty times as far as the others, and twelve samples."""
    random = np.random.default_rng(11)
    proto = parser.parse_model(FEED_FORWARD)
    weights = {"w": random.normal(0, 1 / 16, (256, 1024)), "b": random.normal(0, 0.1, 1024)}
    weights |= {"v": random.normal(0, 1 / 32, (1024, 256)), "root": np.array(2**0.5)}
    weights |= {"one": np.array(1.0), "half": np.array(0.5)}
    weights["b"][[5, 600, 901]] += [60.0, 45.0, 50.0]
    for name, array in weights.items():
        proto.graph.initializer.append(numpy_helper.from_array(array.astype(np.float32), name))
    onnx.save(proto, tmp_path / "model.onnx")
    np.savez(tmp_path / "data.npz", x=random.normal(size=(12, 1, 128, 256)).astype(np.float32))
    return tmp_path / "model.onnx", tmp_path / "data.npz"


def test_outliers_behind_gelu_become_several_channels(qcompile, feed_forward, tmp_path):
    model, data = feed_forward
    words = (model, "--target", "cpu", "--data", data, "--json")
    plain = report(qcompile(*words, "--smoothing", "none", "-o", tmp_path / "plain", costs=None))
    content = report(qcompile(*words, "-o", tmp_path / "split", costs=None))
    plan = json.loads((tmp_path / "split/plan.json").read_text())
    [chosen] = [one for one in plan["smoothing"].values() if one["how"] == "split"]
    assert set(chosen["channels"]) >= {5, 600, 901} and len(chosen["channels"]) == len(chosen["log2"])
    assert "Split" in [step["name"] for step in content["passes"]]
    assert sqnr(content) > sqnr(plain) + 6.0
    graph = onnx.load(tmp_path / "split/model.onnx").graph
    assert not any(node.op_type == "Min" for node in graph.node)
    shapes = [list(one.dims) for one in graph.initializer if one.data_type == onnx.TensorProto.INT8]
    assert [256, 1024 + len(chosen["channels"])] in shapes


def test_the_stages_agree_with_one_compile(qcompile, feed_forward, tmp_path):
    plan = stages_agree(qcompile, *feed_forward, tmp_path, costs=None)
    assert "split" in {one["how"] for one in plan["smoothing"].values()}


def test_nothing_is_split_where_nothing_may_be_smoothed(qcompile, feed_forward, tmp_path):
    model, data = feed_forward
    words = (model, "--target", "cpu", "--data", data, "--smoothing", "none", "--json")
    content = report(qcompile(*words, "-o", tmp_path / "none", costs=None))
    assert "Split" not in [step["name"] for step in content["passes"]]
