"""Models with If, Loop and Scan: what stands inside stays as it is and in float, and the report says so."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest

HEAD = '<ir_version: 8, opset_import: ["": 17]>'
CONV = "c = Conv <pads = [1, 1, 1, 1]> (x, w) r = Relu (c) d = Conv <pads = [1, 1, 1, 1]> (r, v)"
IF = f"""{HEAD} g (float[1, 8, 6, 6] x, bool flag) => (float[1, 8, 6, 6] y) {{
    {CONV}
    y = If (flag) <then_branch = t () => (float[1, 8, 6, 6] a) {{ e = Exp (d) a = Conv <pads = [1, 1, 1, 1]> (e, u) }},
                   else_branch = e () => (float[1, 8, 6, 6] b) {{ b = Conv <pads = [1, 1, 1, 1]> (d, u) }}>
}}"""
LOOP = f"""{HEAD} g (float[1, 8, 6, 6] x, int64 n) => (float[1, 8, 6, 6] y, float[L, 1, 8, 6, 6] each) {{
    {CONV}
    y, each = Loop (n, , d) <body = b (int64 i, bool go, float[1, 8, 6, 6] s) =>
        (bool on, float[1, 8, 6, 6] k, float[1, 8, 6, 6] z) {{
            on = Identity (go) h = Conv <pads = [1, 1, 1, 1]> (s, u) k = Tanh (h) z = Add (k, x)
        }}>
}}"""
SCAN = f"""{HEAD} g (float[1, 8, 6, 6] x, float[8, 6, 6] start) => (float[8, 6, 6] y, float[1, 8, 6, 6] each) {{
    {CONV}
    y, each = Scan <num_scan_inputs = 1,
        body = b (float[8, 6, 6] s, float[8, 6, 6] p) => (float[8, 6, 6] k, float[8, 6, 6] z) {{
            h = Add (s, p) k = Tanh (h) z = Identity (k)
        }}> (start, d)
}}"""


@pytest.fixture
def compiled(tmp_path, qcompile, random):
    """Compile a model for the CPU with random data; return it, the artifact and the report."""

    def compiled(text: str, **others: np.ndarray):
        proto = onnx.parser.parse_model(text)
        for name in "wvu":
            array = (random.standard_normal((8, 8, 3, 3)) / 9).astype(np.float32)
            proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
        if "u)" not in text:
            del proto.graph.initializer[-1]
        onnx.save(proto, tmp_path / "model.onnx")
        x = random.standard_normal((12, 1, 8, 6, 6)).astype(np.float32)
        np.savez(tmp_path / "data.npz", x=x, **{name: np.stack(list(array) * 6) for name, array in others.items()})
        output = tmp_path / "out"
        done = qcompile(tmp_path / "model.onnx", "--target", "cpu", "--data", tmp_path / "data.npz", "-o", output)
        assert done.code == 0, done.err
        assert "it stands inside a subgraph" in " ".join(done.out.split())
        artifact, report = onnx.load(output / "model.onnx"), json.loads((output / "report.json").read_text())
        onnx.checker.check_model(artifact, full_check=True)
        return proto, artifact, report

    return compiled


def bodies(model: onnx.ModelProto):
    """Return the subgraphs by attribute, with the types and shapes of what goes in and out."""

    def ends(values):
        types = [value.type.tensor_type for value in values]
        return [(t.elem_type, [dim.dim_value for dim in t.shape.dim]) for t in types]

    found = {a.name: a.g for node in model.graph.node for a in node.attribute if a.type == onnx.AttributeProto.GRAPH}
    return {name: (ends(graph.input), ends(graph.output)) for name, graph in found.items()}


@pytest.mark.parametrize(
    ("text", "others", "inside"),
    [
        (IF, {"flag": np.array([True, False])}, ["Conv", "Conv", "Exp"]),
        (LOOP, {"n": np.int64([2, 3])}, ["Add", "Conv", "Tanh"]),
        (SCAN, {"start": np.zeros((2, 8, 6, 6), np.float32)}, ["Add", "Tanh"]),
    ],
    ids=["if", "loop", "scan"],
)
def test_inside_stays_and_outside_is_quantized(text, others, inside, compiled):
    original, artifact, report = compiled(text, **others)
    assert bodies(artifact) == bodies(original)
    reasons = [op for op in report["operators"] if op["reason"] == "it stands inside a subgraph"]
    assert sorted(op["op_type"] for op in reasons if op["op_type"] != "Identity") == inside
    assert all(op["precision"] == "float" for op in reasons)
    integer = [op["kernel"] for op in report["operators"] if op["precision"] == "integer" and op["op_type"] == "Conv"]
    assert integer == ["QLinearConv", "QLinearConv"]
    assert all(output["sqnr"] > 20 for output in report["fidelity"]["outputs"].values())
