"""Targets for phones from the command line: what they write, and what the report says of it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from qcompile.backends.ort.phones.mobile import in_order

TARGETS = ("qnn", "xnnpack", "coreml", "aarch64-android:ort")


def compiled(qcompile, small, target: str, output: Path, *words: object) -> dict:
    done = qcompile(small.model, "--target", target, "--data", small.data, "-o", output, "--json", *words)
    assert done.code == 0, done.err
    return json.loads(done.out)["report"]


@pytest.mark.parametrize("target", TARGETS)
def test_a_model_becomes_what_the_device_takes(qcompile, small, tmp_path, target):
    report = compiled(qcompile, small, target, tmp_path / "out")
    assert report["warnings"][0].startswith("Not run on ")
    assert report["fidelity"]["outputs"]["y"]["sqnr"] > 25.0
    assert json.loads((tmp_path / "out/measurements.json").read_text())["latency"] is None
    if target != "aarch64-android:ort":
        assert report["placement"]["on_device"]["Conv"] == 1


@pytest.mark.parametrize("target", TARGETS)
def test_the_same_inputs_give_the_same_bytes(qcompile, small, tmp_path, target):
    for name in ("one", "two"):
        compiled(qcompile, small, target, tmp_path / name)
    one, two = (json.loads((tmp_path / name / "manifest.json").read_text()) for name in ("one", "two"))
    assert one == two


def test_all_of_a_network_is_in_codes_for_qnn(qcompile, small, tmp_path):
    report = compiled(qcompile, small, "qnn", tmp_path / "out")
    assert report["placement"]["on_host"] == [] and not [op for op in report["operators"] if op["precision"] == "float"]
    graph = onnx.load(tmp_path / "out/model.onnx").graph
    # Codes are made once, of the input, and read once, for the output.
    assert graph.node[0].op_type == "QuantizeLinear" and graph.node[-1].op_type == "DequantizeLinear"
    assert not [value for value in graph.input if any(d.dim_param for d in value.type.tensor_type.shape.dim)]


def test_activations_of_16_bits_for_qnn(qcompile, small, tmp_path):
    narrow = compiled(qcompile, small, "qnn", tmp_path / "narrow")
    wide = compiled(qcompile, small, "qnn", tmp_path / "wide", "--activations", 16)
    assert wide["placement"]["on_host"] == []
    # What is left is the error of weights of eight bits.
    assert wide["fidelity"]["outputs"]["y"]["sqnr"] > narrow["fidelity"]["outputs"]["y"]["sqnr"]
    graph = onnx.load(tmp_path / "wide/model.onnx").graph
    types = {tensor.name: tensor.data_type for tensor in graph.initializer}
    zero_points = [types[node.input[2]] for node in graph.node if node.op_type == "QuantizeLinear"]
    assert zero_points and set(zero_points) == {onnx.TensorProto.UINT16}


def test_shapes_that_are_open_are_refused_at_once_for_qnn(qcompile, small, tmp_path):
    proto = onnx.ModelProto.FromString(small.proto.SerializeToString())
    proto.graph.input[0].type.tensor_type.shape.dim[2].dim_param = "H"
    model = small.save(proto, "open.onnx")
    done = qcompile(model, "--target", "qnn", "--data", small.data, "-o", tmp_path / "out")
    assert done.code == 7 and "--shape x=1x" in done.err and done.err.count("\n") == 1
    done = qcompile(model, "--target", "qnn", "--data", small.data, "-o", tmp_path / "out", "--shape", "x=1x3x8x8")
    assert done.code == 0, done.err


def test_arithmetic_is_float16_for_coreml(qcompile, small, tmp_path):
    compiled(qcompile, small, "coreml", tmp_path / "out")
    graph = onnx.load(tmp_path / "out/model.onnx").graph
    types = {tensor.name: tensor.data_type for tensor in graph.initializer}
    assert onnx.TensorProto.FLOAT16 in types.values() and onnx.TensorProto.INT8 in types.values()
    assert not {"QuantizeLinear", "DequantizeLinear"} & {node.op_type for node in graph.node}


def test_a_reduced_build_is_told_what_it_must_have(qcompile, small, tmp_path):
    report = compiled(qcompile, small, "aarch64-android:ort", tmp_path / "out")
    assert report["files"] == ["model.ort", "required_operators_and_types.config"]
    needed = (tmp_path / "out/required_operators_and_types.config").read_text()
    assert needed.startswith("# Needed by model.ort\n") and str(tmp_path) not in needed
    assert 'QLinearConv{"inputs": {"0": ["int8_t"]}}' in needed
    assert sum(report["size"]["by_cause"].values()) == (tmp_path / "out/model.ort").stat().st_size


def test_the_order_of_a_file_changes_nothing_else(qcompile, small, tmp_path):
    compiled(qcompile, small, "aarch64-android:ort", tmp_path / "out")
    content = (tmp_path / "out/model.ort").read_bytes()
    assert in_order(content) == content
    session, feeds = onnxruntime.InferenceSession(content), {"x": small.samples[0]}
    reference = onnxruntime.InferenceSession(small.model).run(None, feeds)[0]
    found = session.run(None, feeds)[0]
    assert np.abs(found - reference).max() < 0.1 * np.abs(reference).max()
