"""Models of float16: integer kernels inside, float16 at the ends, and a report that says what was done."""

from __future__ import annotations

import json

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

HALF = onnx.TensorProto.FLOAT16
TEXT = """
<ir_version: 8, opset_import: ["": %d]>
g (float16[1, 8, 8, 8] x) => (float16[1, 32] y)
{
    c = Conv <pads = [1, 1, 1, 1]> (x, w, b)
    r = Relu (c)
    d = Conv <pads = [1, 1, 1, 1]> (r, v)
    f = Flatten (d)
    y = Gemm (f, g, k)
}
"""
SHAPES = {"w": (16, 8, 3, 3), "b": (16,), "v": (4, 16, 3, 3), "g": (256, 32), "k": (32,)}


def written(output):
    model = onnx.load(output / "model.onnx")
    return model, json.loads((output / "report.json").read_text())


def kernels(report):
    return {(op["op_type"], op["kernel"]) for op in report["operators"] if op["precision"] == "integer"}


def elements(values):
    return [value.type.tensor_type.elem_type for value in values]


@pytest.mark.parametrize("opset", [9, 13, 17])
def test_a_float16_network_gets_integer_kernels(opset, tmp_path, qcompile, random):
    model = onnx.parser.parse_model(TEXT % opset)
    for name, shape in SHAPES.items():
        scale = 1 / np.sqrt(np.prod(shape[1:] or (16,)))
        array = (random.standard_normal(shape) * scale).astype(np.float16)
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    onnx.save(model, tmp_path / "half.onnx")
    samples = random.standard_normal((24, 1, 8, 8, 8)).astype(np.float16)
    np.savez(tmp_path / "data.npz", x=samples)
    output = tmp_path / "out"
    done = qcompile(tmp_path / "half.onnx", "--target", "cpu", "--data", tmp_path / "data.npz", "-o", output)
    assert done.code == 0, done.err
    assert "float16 is computed in float32" in " ".join(done.out.split())
    compiled, report = written(output)
    assert {("Conv", "QLinearConv")} <= kernels(report)
    assert report["fidelity"]["outputs"]["y"]["sqnr"] > 25
    assert elements(compiled.graph.input) == elements(compiled.graph.output) == [HALF]
    assert not any(tensor.data_type == HALF for tensor in compiled.graph.initializer)
    session = onnxruntime.InferenceSession(output / "model.onnx", providers=["CPUExecutionProvider"])
    [y] = session.run(None, {"x": samples[0]})
    assert y.dtype == np.float16 and np.isfinite(y).all()


def in_half(model: ir.Model) -> ir.Model:
    """Make everything float16 that is float32."""
    for graph in model.graphs():
        values = [*graph.inputs, *graph.initializers.values(), *(value for node in graph for value in node.outputs)]
        for value in values:
            if value.dtype is ir.DataType.FLOAT:
                value.type = ir.TensorType(ir.DataType.FLOAT16)
            if value.const_value is not None and value.const_value.dtype is ir.DataType.FLOAT:
                value.const_value = ir.tensor(value.const_value.numpy().astype(np.float16), name=value.name)
    return model


def test_resnet8_in_float16(tmp_path, qcompile, resnet8):
    source, data, evaluation = resnet8
    ir.save(in_half(ir.load(source)), tmp_path / "half.onnx")
    for path in (data, evaluation):
        arrays = dict(np.load(path))
        np.savez(tmp_path / path.name, **{k: a.astype("f2") if a.dtype == np.float32 else a for k, a in arrays.items()})
    words = ("--data", tmp_path / data.name, "--eval", tmp_path / evaluation.name, "-o", tmp_path / "out")
    done = qcompile(tmp_path / "half.onnx", "--target", "cpu", *words)
    assert done.code == 0, done.err
    compiled, report = written(tmp_path / "out")
    assert {("Conv", "QLinearConv"), ("Add", "QLinearAdd")} <= kernels(report)
    assert elements(compiled.graph.input) == elements(compiled.graph.output) == [HALF]
    accuracy = report["fidelity"]["accuracy"]
    assert abs(accuracy["artifact_correct"] - accuracy["float_correct"]) <= 1


def test_nothing_is_widened_where_nothing_is_quantized(tmp_path, qcompile, resnet8):
    ir.save(in_half(ir.load(resnet8[0])), tmp_path / "half.onnx")
    words = ("--weights", "none", "--activations", "none", "-o", tmp_path / "out")
    done = qcompile(tmp_path / "half.onnx", "--target", "cpu", *words)
    assert done.code == 0, done.err
    compiled, report = written(tmp_path / "out")
    assert any(tensor.data_type == HALF for tensor in compiled.graph.initializer)
    assert not any("float16" in warning for warning in report["warnings"])


def test_stages_write_the_same(tmp_path, qcompile, resnet8):
    ir.save(in_half(ir.load(resnet8[0])), tmp_path / "half.onnx")
    arrays = {name: array.astype("f2") for name, array in np.load(resnet8[1]).items()}
    np.savez(tmp_path / "data.npz", **arrays)
    common = (tmp_path / "half.onnx", "--target", "cpu", "--data", tmp_path / "data.npz")
    assert qcompile(*common, "-o", tmp_path / "whole").code == 0
    measured, planned = tmp_path / "calibration.npz", tmp_path / "plan.json"
    for words in (
        ("calibrate", *common, "-o", measured),
        ("plan", tmp_path / "half.onnx", "--calibration", measured, "-o", planned),
        ("apply", *common, "--plan", planned, "-o", tmp_path / "parts"),
    ):
        done = qcompile(*words)
        assert done.code == 0, done.err
    assert (tmp_path / "whole/model.onnx").read_bytes() == (tmp_path / "parts/model.onnx").read_bytes()
