"""A model becomes kernels for CUDA devices, by the command line; they run here, thread by thread."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import numpy as np
import pytest

from qcompile.backends.cuda import compiler
from qcompile.backends.cuda.network import network_of
from qcompile.backends.cuda.session import InferenceSession
from qcompile.backends.integer.interpret import dequantize_output, interpret, quantize_input
from qcompile.backends.integer.lower import lower
from qcompile.core import model as models

pytest.importorskip("tvm")

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def nvrtc():
    """Skip without what compiles."""
    if not compiler.available():
        pytest.skip("neither NVRTC nor nvFatbin")


@pytest.fixture
def compiled(qcompile, resnet8, tmp_path):
    model, data, evaluation = resnet8
    output = tmp_path / "out"
    done = qcompile(model, "--target", "cuda:tvm", "--data", data, "--eval", evaluation, "--observer", "minmax",
                    "-o", output, "--json")  # fmt: skip
    assert done.code == 0, done.err
    return json.loads(done.out), output


def test_a_model_becomes_kernels_for_cuda_devices(qcompile, compiled, resnet8, tmp_path, monkeypatch):
    from emulated_cuda import emulate

    content, output = compiled
    report, measurements = content["report"], content["measurements"]
    for name, document in (("report", report), ("measurements", measurements)):
        jsonschema.validate(document, json.loads((ROOT / f"docs/schemas/{name}.schema.json").read_text()))
    assert {op["kernel"] for op in report["operators"] if op["op_type"] == "Conv"} == {"cuda"}
    assert all(measures["sqnr"] > 20 for measures in report["fidelity"]["outputs"].values())
    assert measurements["latency"] is None, "no device is here"
    assert report["placement"]["device"] == "an NVIDIA GPU" and report["placement"]["on_host"] == []
    assert report["placement"]["on_device"]["Conv"] == 9
    files = json.loads((output / "manifest.json").read_text())["files"]
    assert {"resnet8.fatbin", "resnet8.weights", "network.json", "session.py", "driver.py"} <= set(files)
    # The folder as it is, on a device that is emulated: two samples at once.
    program = lower(models.load(output / "reference.onnx"))
    monkeypatch.setenv("QCOMPILE_LIBCUDA", str(emulate.library(network_of(program), tmp_path)))
    session = InferenceSession(output, batch=2)
    (port,), (made,) = program.inputs, program.outputs
    samples = np.load(resnet8[2])[port.name][:2]
    found = session.run(None, {port.name: np.concatenate(samples)})[0]
    codes = [interpret(program, {port.name: quantize_input(program, port, sample)}) for sample in samples]
    expected = np.concatenate([dequantize_output(program, made, one[made.name]) for one in codes])
    np.testing.assert_array_equal(found, expected)
    session.close()
    # The command that runs it on a device and adds what it saw.
    done = qcompile("run", output, "--data", resnet8[2], "--samples", "1", "--json")
    assert done.code == 0, done.err
    seen = json.loads(done.out)
    assert (seen["name"], seen["runtime"]) == ("Emulated Device (sm_90)", "the driver for CUDA 12.4")
    assert seen["sqnr_of_host"] is None, "the same outputs"
    measurements = json.loads((output / "measurements.json").read_text())
    jsonschema.validate(measurements, json.loads((ROOT / "docs/schemas/measurements.schema.json").read_text()))
    assert measurements["on_device"] == seen
    done = qcompile("run", output, "--model", resnet8[0])
    assert (done.code, "--model: has kernels on no device: cuda:tvm runs artifacts alone" in done.err) == (7, True)
    monkeypatch.setenv("QCOMPILE_LIBCUDA", "libno-such-driver.so")
    done = qcompile("run", output)
    assert done.code == 7
    assert "device: there is no NVIDIA driver here (libno-such-driver.so); run it on a machine with a" in done.err


def test_bounds_on_memory_mean_nothing_there(qcompile, resnet8, tmp_path):
    done = qcompile(resnet8[0], "--target", "cuda:tvm", "--max-sram", "64KB", "-o", tmp_path / "out")
    assert done.code == 2
    assert "--max-sram: means nothing for cuda:tvm, whose devices have memory of their own; leave it out" in done.err


def test_what_is_missing_to_compile_is_named(qcompile, resnet8, tmp_path, monkeypatch):
    monkeypatch.setattr(compiler, "_file", lambda library: None)
    compiler._library.cache_clear()
    done = qcompile(resnet8[0], "--target", "cuda:tvm", "-o", tmp_path / "out")
    assert done.code == 7
    assert "nvidia-cuda-nvrtc-cu12: is not installed, which compiles kernels for CUDA devices; pip install" in done.err
