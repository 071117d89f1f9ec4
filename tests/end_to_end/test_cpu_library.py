"""A model becomes a shared library, by the command line, and a whole folder that runs without qcompile."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import jsonschema
import numpy as np
import pytest

from qcompile.backends.cpu.session import InferenceSession, absent

pytest.importorskip("tvm")

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def processor():
    """Skip where the processor lacks the instructions."""
    if absent(["avx512_vnni"]):
        pytest.skip("the processor has no AVX512-VNNI")


@pytest.fixture
def compiled(qcompile, resnet8, tmp_path):
    model, data, evaluation = resnet8
    output = tmp_path / "out"
    done = qcompile(model, "--target", "cpu:tvm", "--data", data, "--eval", evaluation, "--observer", "minmax",
                    "-o", output, "--json")  # fmt: skip
    assert done.code == 0, done.err
    return json.loads(done.out), output


def test_a_model_becomes_a_library(compiled, resnet8):
    content, output = compiled
    report, measurements = content["report"], content["measurements"]
    for name, document in (("report", report), ("measurements", measurements)):
        jsonschema.validate(document, json.loads((ROOT / f"docs/schemas/{name}.schema.json").read_text()))
    assert {op["kernel"] for op in report["operators"] if op["op_type"] == "Conv"} == {"avx512-vnni"}
    assert all(measures["sqnr"] > 20 for measures in report["fidelity"]["outputs"].values())
    assert measurements["latency"] is not None, "the device is here"
    manifest = json.loads((output / "manifest.json").read_text())
    (library,) = [name for name in manifest["files"] if name.endswith(".so")]
    weights = report["size"]["by_cause"]["weights, biases and multipliers"]
    assert (output / library).stat().st_size <= weights + 300 * 1024
    # What the folder holds is enough: a process that knows nothing of qcompile gives the same.
    feeds = np.load(resnet8[2])
    name = InferenceSession(output).get_inputs()[0].name
    sample = feeds[name][0]
    script = (
        "import sys, numpy; sys.path.insert(0, '.'); from session import InferenceSession\n"
        f"x = numpy.frombuffer(sys.stdin.buffer.read(), numpy.float32).reshape({sample.shape})\n"
        f"sys.stdout.buffer.write(InferenceSession('.').run(None, {{'{name}': x}})[0].tobytes())\n"
        "assert not [part for part in sys.modules if part.split('.')[0] in ('qcompile', 'onnxruntime', 'tvm')]\n"
    )
    done = subprocess.run([sys.executable, "-c", script], input=sample.tobytes(), cwd=output, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == InferenceSession(output).run(None, {name: sample})[0].tobytes()


def test_what_has_no_integer_form_is_refused_by_name(qcompile, tmp_path):
    import onnx.parser

    model = tmp_path / "erf.onnx"
    text = '<ir_version: 10, opset_import: ["": 21]> g (float[1,8] x) => (float[1,8] y) { [odd] y = CumSum (x, a) }'
    text = text.replace("{ [odd]", "<int64 a = {1}> { [odd]")
    onnx.save(onnx.parser.parse_model(text), model)
    np.savez(tmp_path / "calib.npz", x=np.random.default_rng(0).normal(size=(8, 1, 8)).astype(np.float32))
    done = qcompile(model, "--target", "cpu:tvm", "--data", tmp_path / "calib.npz", "-o", tmp_path / "out")
    assert done.code == 7 and "CumSum" in done.err, done.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("bits", "least"), [("4", 15), ("8", 30)])
def test_weights_alone_have_kernels_between_floats(qcompile, tmp_path, bits, least):
    import onnx.parser

    random, model = np.random.default_rng(0), tmp_path / "layers.onnx"
    text = '<ir_version: 10, opset_import: ["": 21]> g (float[1,5,64] x) => (float[1,5,64] y) {'
    made = onnx.parser.parse_model(text + "m = MatMul (x, a) e = Gelu (m) n = MatMul (e, b) y = Add (n, x) }")
    for name, shape in (("a", (64, 256)), ("b", (256, 64))):
        array = (random.normal(size=shape) / 8).astype(np.float32)
        made.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    onnx.save(made, model)
    words = ("--target", "cpu:tvm", "--weights", bits, "--activations", "none", "-o", tmp_path / "out", "--json")
    done = qcompile(model, *words)
    assert done.code == 0, done.err
    report = json.loads(done.out)["report"]
    assert [op["precision"] for op in report["operators"] if op["op_type"] == "MatMul"] == ["weight_only"] * 2
    assert all(measures["sqnr"] > least for measures in report["fidelity"]["outputs"].values())
    kernels = json.loads((tmp_path / "out/network.json").read_text())["kernels"]
    assert [kernel["kernel"].split("_")[0] for kernel in kernels].count("dense") == 2
    # Five bits each with their scales, or eight and a bit.
    stored = report["size"]["by_cause"]["weights, biases and multipliers"]
    assert stored <= 2 * 64 * 256 * (5 if bits == "4" else 9) / 8 + 4096


def test_convolutions_by_weights_alone_are_refused_by_name(qcompile, resnet8, tmp_path):
    done = qcompile(resnet8[0], "--target", "cpu:tvm", "--activations", "none", "-o", tmp_path / "out")
    assert done.code == 7 and "Conv" in done.err and "float" in done.err


def test_bounds_on_memory_mean_nothing_there(qcompile, resnet8, tmp_path):
    model, data, _ = resnet8
    done = qcompile(model, "--target", "cpu:tvm", "--data", data, "--max-sram", "64KB", "-o", tmp_path / "out")
    assert done.code == 2 and "--max-sram: means nothing for cpu:tvm" in done.err
