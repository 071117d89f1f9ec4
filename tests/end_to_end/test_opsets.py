"""Opsets at both ends: a model that is newer than the runtime, and a target whose runtime reads older ones."""

from __future__ import annotations

import importlib.resources
import json
from dataclasses import replace
from pathlib import Path

import jsonschema
import numpy as np
import onnx
import pytest

from qcompile.backends.ort.lower import OrtBackend
from qcompile.core import runtime
from qcompile.core.target import Target


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """Give the backend a target file of its own: the CPU's, with a runtime of an opset."""

    def toy(opset: int) -> None:
        here = importlib.resources.files("qcompile.backends.ort")
        text = (here / "targets/cpu.toml").read_text(encoding="utf-8")
        path = tmp_path / "toy.toml"
        path.write_text(f"deployed_opset = {opset}\n" + text.replace('name = "cpu"', 'name = "toy"'), encoding="utf-8")
        target = replace(Target.from_toml(path, here / "costs"), costs=None)
        monkeypatch.setattr(OrtBackend, "targets", lambda self: [target])

    return toy


@pytest.mark.parametrize("opset", [13, 17])
def test_the_artifact_is_of_the_older_opset_and_verified(opset, toy, tmp_path, qcompile, resnet8):
    model, data, evaluation = resnet8
    words = ("--target", "toy", "--data", data, "--eval", evaluation)
    fidelity = {}
    for each, folder in ((21, "newest"), (opset, "out")):
        toy(each)
        done = qcompile(model, *words, "-o", tmp_path / folder)
        assert done.code == 0, done.err
        report = json.loads((tmp_path / folder / "report.json").read_text())
        fidelity[each] = report["fidelity"]["outputs"]["probabilities"]["sqnr"]
    artifact = onnx.load(tmp_path / "out/model.onnx")
    onnx.checker.check_model(artifact, full_check=True)
    assert [(entry.domain, entry.version) for entry in artifact.opset_import] == [("", opset)]
    scales = {tensor.name: tensor.dims for tensor in artifact.graph.initializer}
    assert any(len(scales[node.input[1]]) == 1 for node in artifact.graph.node if node.op_type == "DequantizeLinear")
    assert report["passes"][-1]["name"] == "LowerOpset" and report["passes"][-1]["relative_error"] == 0
    assert ("Conv", "QLinearConv") in {(op["op_type"], op["kernel"]) for op in report["operators"]}
    assert fidelity[opset] == pytest.approx(fidelity[21], abs=0.1) and fidelity[opset] > 20


@pytest.mark.parametrize(
    ("opset", "reason"), [(12, "DequantizeLinear with a scale per channel"), (13, "LayerNormalization")]
)
def test_what_cannot_be_expressed_is_one_line(opset, reason, toy, tmp_path, qcompile, resnet8, random):
    toy(opset)
    text = """<ir_version: 8, opset_import: ["": 17]> g (float[4, 64] x) => (float[4, 96] y)
        { n = LayerNormalization (x, k) y = MatMul (n, w) }"""
    proto = onnx.parser.parse_model(text)
    for name, array in {"k": np.ones(64), "w": random.standard_normal((64, 96))}.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array.astype(np.float32), name))
    onnx.save(proto, tmp_path / "norm.onnx")
    np.savez(tmp_path / "data.npz", x=random.standard_normal((8, 4, 64)).astype(np.float32))
    model, data = (resnet8[0], resnet8[1]) if opset == 12 else (tmp_path / "norm.onnx", tmp_path / "data.npz")
    done = qcompile(model, "--target", "toy", "--data", data, "-o", tmp_path / "out")
    assert done.code == 3 and done.err.count("\n") == 1
    assert f"target toy takes {opset} at most, which cannot express its {reason}" in done.err
    assert not (tmp_path / "out").exists()


@pytest.fixture
def newest(tmp_path, resnet8) -> Path:
    """Label ResNet-8 with the newest opset that onnx knows; no operator of it has changed since."""
    proto = onnx.version_converter.convert_version(onnx.load(resnet8[0]), onnx.defs.onnx_opset_version())
    proto.ir_version = onnx.IR_VERSION
    onnx.save(proto, tmp_path / "newest.onnx")
    return tmp_path / "newest.onnx"


def test_a_model_that_is_newer_than_the_runtime_is_said_to_be(newest, tmp_path, qcompile, resnet8, monkeypatch):
    # Whatever is installed: a runtime that takes less than this onnx knows.
    monkeypatch.setattr(runtime, "newest_versions", lambda: (22, 10, "onnxruntime 1.21"))
    line = f"The model's opset {onnx.defs.onnx_opset_version()} is newer than onnxruntime 1.21's 22: it is lowered"
    done = qcompile(newest, "--target", "cpu", "--data", resnet8[1], "-o", tmp_path / "out")
    assert done.code == 0, done.err
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["warnings"][0].startswith(line) and line in " ".join(done.out.split())
    assert report["passes"][0]["name"] == "LowerOpset" and report["passes"][0]["relative_error"] is None
    schema = json.loads((Path(__file__).parents[2] / "docs/schemas/report.schema.json").read_text())
    jsonschema.validate(report, schema)


def test_a_model_that_is_not_newer_says_nothing(tmp_path, qcompile, resnet8):
    assert qcompile(resnet8[0], "--target", "cpu", "--data", resnet8[1], "-o", tmp_path / "out").code == 0
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert "LowerOpset" not in {step["name"] for step in report["passes"]}
    assert not any("lowered" in warning for warning in report["warnings"])
