"""The loader against a driver that writes down what is called, holds it to the rules, and runs it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from random_programs import random_codes, random_program, wide

from qcompile.backends.cuda import linear
from qcompile.backends.cuda.network import network_of
from qcompile.backends.cuda.session import InferenceSession
from qcompile.backends.integer.interpret import dequantize_output, interpret, quantize_input


@pytest.fixture
def log(tmp_path, monkeypatch):
    file = tmp_path / "log.txt"
    monkeypatch.setenv("QCOMPILE_STUB_LOG", str(file))
    return file


def test_a_run_is_one_graph_captured_once(load, log):
    program = random_program(4, wide=False)
    session = load(program, batch=3)
    codes = np.concatenate([random_codes(program, draw)["x"] for draw in range(3)])
    for _ in range(2):
        session.run_codes([codes])
    calls = log.read_text().splitlines()
    network, begin, end = network_of(program), calls.index("cuStreamBeginCapture"), calls.index("cuStreamEndCapture")
    given, made = (program.tensors[port.tensor].nbytes for port in (program.inputs[0], program.outputs[0]))
    launched = [f"cuLaunchKernel {one.kernel} {one.grid[0]} {one.grid[1]} 3 {one.threads}" for one in network.launches]
    assert len(launched) > 4
    copies = [f"cuMemcpyHtoDAsync {3 * given}", f"cuMemcpyDtoHAsync {3 * made}"]
    assert calls[begin + 1 : end] == [copies[0], *launched, copies[1]]
    assert calls[end + 1 :] == ["cuGraphLaunch"] * 2, "nothing is captured, copied or launched again"
    assert f"cuMemAlloc {3 * network.arena_bytes}" in calls[:begin]
    assert f"cuMemcpyHtoD {len(network.constants)}" in calls[:begin]


def test_many_samples_have_larger_tiles(load, log):
    program = wide(np.random.default_rng(1), 64, 64, 3, side=(14, 14))
    (launch,) = network_of(program).launches
    assert launch.many is not None and launch.many.grid < launch.grid and launch.many.arguments == launch.arguments
    for batch, expected in ((7, launch), (8, launch.many)):
        log.write_text("")
        session = load(program, batch=batch)
        codes = [random_codes(program, draw)["x"] for draw in range(batch)]
        found = session.run_codes([np.concatenate(codes)])[0]
        np.testing.assert_array_equal(found, np.concatenate([interpret(program, {"x": one})["y"] for one in codes]))
        line = f"cuLaunchKernel {expected.kernel} {expected.grid[0]} {expected.grid[1]} {batch} {expected.threads}"
        assert line in log.read_text().splitlines()


def test_floats_have_a_graph_of_their_own(load, log):
    program = wide(np.random.default_rng(1), 8, 12, 3)
    session = load(program, batch=2)
    (port,), (made,) = program.inputs, program.outputs
    real = np.random.default_rng(0).normal(size=(2, *port.shape[1:])).astype(np.float32)
    found = session.run(["y"], {"x": real})[0]
    expected = [interpret(program, {"x": quantize_input(program, port, one[None])})["y"] for one in real]
    np.testing.assert_array_equal(found, np.concatenate([dequantize_output(program, made, one) for one in expected]))
    begin = (calls := log.read_text().splitlines()).index("cuStreamBeginCapture")
    kinds = [re.sub(r" .*", "", call) for call in calls[begin:]]
    launches = ["cuLaunchKernel"] * 3
    assert kinds == ["cuStreamBeginCapture", "cuMemcpyHtoDAsync", *launches, "cuMemcpyDtoHAsync", "cuStreamEndCapture",
                     "cuGraphLaunch"]  # fmt: skip
    assert session.time(3) == [1.0] * 3
    log.write_text("")
    assert session.time(2, each=4, floats=False, copied=False) == [0.25] * 2
    calls = log.read_text().splitlines()
    assert calls[:3] == ["cuStreamBeginCapture", calls[1], "cuStreamEndCapture"] and calls[1].startswith(
        "cuLaunchKernel"
    )
    assert calls[3:] == ["cuGraphLaunch"] * 8


def test_the_models_own_codes_are_taken_too(load):
    from dataclasses import replace

    program = wide(np.random.default_rng(1), 8, 12, 3)
    program = replace(program, inputs=(replace(program.inputs[0], unsigned=True),))
    codes = random_codes(program, 0)["x"]
    found = load(program).run(None, {"x": (codes.astype(np.int16) + 128).astype(np.uint8)})[0]
    expected = dequantize_output(program, program.outputs[0], interpret(program, {"x": codes})["y"])
    np.testing.assert_array_equal(found, expected)


def test_everything_is_given_back(load, log):
    session = load(random_program(4, wide=False))
    session.graph(True), session.graph(False)
    session.close()
    assert log.read_text().splitlines()[-1] == "left 0"


def test_wrong_inputs_are_refused(load):
    session = load(wide(np.random.default_rng(1), 8, 12, 3))
    with pytest.raises(ValueError, match="input 'x' is missing"):
        session.run(None, {})
    with pytest.raises(ValueError, match=r"input 'x' has shape \(1, 2\), not \(1, 9, 11, 8\)"):
        session.run(None, {"x": np.zeros((1, 2), np.float32)})
    with pytest.raises(ValueError, match="input 'x' has 792 codes of uint8, not int8"):
        session.run_codes([np.zeros((1, 9, 11, 8), np.uint8)])


def test_without_a_driver_device_or_kernels_one_line_says_so(load, tmp_path, monkeypatch):
    load(wide(np.random.default_rng(1), 8, 12, 3))
    for variable, said in (
        ("QCOMPILE_STUB_EMPTY", r"cuda: the NVIDIA driver here has no device; run it on a machine with a CUDA device"),
        ("QCOMPILE_STUB_FOREIGN", r"the kernels are for sm_75, .*sm_90a, and this is Emulated Device \(sm_90\) \("),
    ):
        monkeypatch.setenv(variable, "1")
        with pytest.raises(OSError, match=said):
            InferenceSession(tmp_path)
        monkeypatch.delenv(variable)
    with pytest.raises(OSError, match="cuda: there is no device 1, of 1; choose another one"):
        InferenceSession(tmp_path, device=1)
    monkeypatch.setenv("QCOMPILE_LIBCUDA", "libno-such-driver.so")
    with pytest.raises(OSError, match=r"cuda: there is no NVIDIA driver here \(libno-such-driver.so\); run it on"):
        InferenceSession(tmp_path)


def test_a_folder_needs_numpy_and_nothing_else(load, tmp_path):
    program = wide(np.random.default_rng(1), 8, 12, 3)
    load(program)
    codes = random_codes(program, 0)["x"]
    np.save(tmp_path / "codes.npy", codes)
    text = ("import sys, numpy; from session import InferenceSession\n"
            "numpy.save('made.npy', InferenceSession('.').run_codes([numpy.load('codes.npy')])[0])\n"
            "assert not any(name.split('.')[0] in ('qcompile', 'tvm') for name in sys.modules)\n")  # fmt: skip
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    subprocess.run([sys.executable, "-c", text], cwd=tmp_path, env=environment, check=True)
    np.testing.assert_array_equal(np.load(tmp_path / "made.npy"), interpret(program, {"x": codes})["y"])
    assert not [line for name in ("session.py", "driver.py") for line in Path(tmp_path / name).read_text().splitlines()
                if "qcompile." in line and "import" in line]  # fmt: skip


def test_the_largest_tile_is_given_shared_memory(load, log, monkeypatch):
    monkeypatch.setattr(linear, "tile_of", lambda shape, samples, form: linear.TILES[0])
    program = wide(np.random.default_rng(1), 16, 24, 1, side=(5, 5))
    (launch,) = network_of(program).launches
    assert launch.as_json()["shared"] == launch.shared == 3 * (128 + 256) * 64
    session = load(program)
    assert f"cuFuncSetAttribute {launch.kernel} {launch.shared}" in log.read_text().splitlines()
    codes = random_codes(program, 0)["x"]
    np.testing.assert_array_equal(session.run_codes([codes])[0], interpret(program, {"x": codes})["y"])
    # A device that has less gives what it has: Turing, whose kernel wants no more.
    assert session.driver.give_shared(session._functions[launch.kernel], 1 << 20) == 101376
    monkeypatch.setattr(session.driver, "attribute", lambda which: 2)
    assert session.driver.give_shared(session._functions[launch.kernel], launch.shared) == 2
    with pytest.raises(OSError, match="cuLaunchKernel: invalid argument"):
        session.graph(False, copied=False)
