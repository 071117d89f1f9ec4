"""benchmarks/cuda.py: what it takes to a device is whole, what it checks there fails, and figures are what they say."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import types
from pathlib import Path

import cuda
import cuda_ceiling
import cuda_networks
import cuda_shapes
import numpy as np
import pytest
from random_programs import random_program

from qcompile.backends.cuda import compiler
from qcompile.backends.cuda.four_bits import Gemv
from qcompile.backends.cuda.network import network_of, prelude

pytest.importorskip("tvm")


def small():
    builder = cuda_shapes.Builder("small", (1, 8, 8, 4))
    last = builder.conv(builder.max_pool(0), 8, 3)
    builder.dense(builder.average(builder.add(last, builder.conv(last, 8, 1, relu=False))), 10)
    return builder.program()


@pytest.fixture
def prepared(tmp_path, monkeypatch):
    """Return a folder as it goes to a device, with less in it."""
    if not compiler.available():
        pytest.skip("neither NVRTC nor nvFatbin")
    monkeypatch.setattr(cuda, "CASES", 1)
    monkeypatch.setattr(cuda, "PRODUCT", (64, 64, 64))
    monkeypatch.setattr(cuda, "GEMV", (16, 64))
    monkeypatch.setattr(cuda, "MATRICES", 3)
    monkeypatch.setattr(cuda_shapes, "resnet50", small)
    monkeypatch.setattr(compiler, "ARCHITECTURES", ("80",))
    cuda.prepare(tmp_path / "folder", [], None, [])
    monkeypatch.syspath_prepend(str(tmp_path / "folder"))
    monkeypatch.delitem(sys.modules, "driver", raising=False)
    return tmp_path / "folder"


def test_cases_are_checked_bit_by_bit(prepared, tmp_path, monkeypatch, capsys):
    from emulated_cuda import emulate

    library = emulate.library(network_of(random_program(0, wide=False)), tmp_path)
    monkeypatch.setenv("QCOMPILE_LIBCUDA", str(library))
    assert cuda.check(prepared) == 0
    file = prepared / "cases/0/codes.npz"
    codes = dict(np.load(file))
    codes["y"].reshape(-1)[0] ^= 1
    np.savez(file, **codes)
    assert cuda.check(prepared) == 1
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "1 of 1 random programs are the interpreter's, bit by bit"
    assert said[1].startswith("case 0: 1 of ") and said[2].startswith("0 of 1 ")


def test_what_is_missing_on_a_machine_is_one_line(prepared, tmp_path, monkeypatch):
    from emulated_cuda import emulate

    assert "was not made by 'prepare'" in cuda.obstacle(tmp_path / "nothing", False)
    monkeypatch.setenv("QCOMPILE_LIBCUDA", str(tmp_path / "absent.so"))
    said = cuda.obstacle(prepared, False)
    assert "driver" in said and "\n" not in said
    done = subprocess.run([sys.executable, prepared / "cuda.py", "check", prepared], capture_output=True, text=True)
    assert (done.returncode, done.stderr.strip()) == (1, said)
    library = emulate.library(network_of(random_program(0, wide=False)), tmp_path)
    monkeypatch.setenv("QCOMPILE_LIBCUDA", str(library))
    assert cuda.obstacle(prepared, False) == ""
    monkeypatch.setitem(sys.modules, "torch", types.ModuleType("torch"))
    sys.modules["torch"].__spec__ = importlib.util.spec_from_loader("torch", None)
    sys.modules["torch"].cuda = types.SimpleNamespace(is_available=lambda: False)
    assert "finds no device" in cuda.obstacle(prepared, True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "torch: is not installed" in cuda.obstacle(prepared, True)


def test_figures_are_of_what_they_say(prepared, tmp_path, monkeypatch):
    from emulated_cuda import emulate

    text = [prelude(emulate.REPLACED), Gemv(16, 64).kernel("gemv"), cuda_ceiling.KERNEL]
    monkeypatch.setattr(cuda_ceiling, "ROUNDS", 1)
    monkeypatch.setattr(cuda, "ROUNDS", 1)
    monkeypatch.setenv("QCOMPILE_LIBCUDA", str(emulate.built(text, tmp_path)))
    monkeypatch.setenv("QCOMPILE_STUB_LOG", str(tmp_path / "log.txt"))

    class Session:
        def __init__(self, folder: Path, batch: int) -> None:
            self.batch = batch

        def time(self, rounds: int, each: int, floats: bool, copied: bool) -> list[float]:
            assert (rounds, each, copied) == (1, 20, False)
            return [2.0 * self.batch if floats else 0.5]

        def close(self) -> None:
            pass

    asked = []
    rivals = types.ModuleType("cuda_rivals")
    rivals.product = lambda *shape: asked.append(shape)  # type: ignore[attr-defined]
    rivals.copy = lambda nbytes: None  # type: ignore[attr-defined]
    rivals.network = lambda layers, shape, batch: asked.append((len(layers), tuple(shape), batch))  # type: ignore[attr-defined]
    rivals.milliseconds = lambda run, each: 1.0  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cuda_rivals", rivals)
    monkeypatch.setattr(cuda, "session_of", Session)
    assert cuda.check_gemv(prepared) <= 1.0
    (tmp_path / "log.txt").write_text("")
    found = cuda.measure(prepared)
    assert asked == [(64, 64, 64), (6, (1, 4, 8, 8), 1), (6, (1, 4, 8, 8), 32)]
    # The emulated device has two multiprocessors, and takes a millisecond for twenty runs.
    ceiling = 2 * (2 * 8 * 32 * 16 * 8 * 32) / (1e-3 / 20) / 1e12
    assert found["int8 product"]["ceiling"] == pytest.approx(ceiling)
    assert found["int8 product"]["share of ceiling"] == pytest.approx(2 * 64**3 / 0.5e9 / ceiling)
    assert found["int8 product"]["share"] == 2.0 and found["int8 product"]["tops"] == pytest.approx(2 * 64**3 / 0.5e9)
    # The emulated clock says a millisecond for five runs of three matrices.
    nbytes = 16 * 64 // 2 + 16 * 2 * 2 + 8 * 16 + 2 * (16 + 64)
    assert found["w4a16"]["w4a16"] == pytest.approx(1.0 / 5 / 3)
    assert found["w4a16"]["share"] == pytest.approx(nbytes / (1 / 15) / (1 << 30))
    assert found["resnet50, batch 32"]["times as fast"] == 1 / 64
    launches = [line for line in (tmp_path / "log.txt").read_text().splitlines() if line.startswith("cuLaunchKernel g")]
    assert launches == ["cuLaunchKernel gemv 2 1 1 128"] * 3


def test_networks_are_held_to_what_a_compile_verified(tmp_path, capsys):
    random = np.random.default_rng(0)
    exact = [random.normal(size=(1, 50)).astype(np.float32) for _ in range(3)]
    content = {}
    for index, one in enumerate(exact):
        host = one + np.float32(0.1) * np.sign(one)
        content |= {f"{index} input x": one, f"{index} float y": one, f"{index} host y": host}
    np.savez(tmp_path / "samples.npz", **content)

    class Session:
        off = 0.1

        def get_inputs(self):
            return [types.SimpleNamespace(name="x")]

        def get_outputs(self):
            return [types.SimpleNamespace(name="y")]

        def run(self, names, feeds):
            return [feeds["x"] + self.off * np.sign(feeds["x"])]

    assert cuda_networks.check(tmp_path, Session()) == 0
    near = np.mean([10.0 * np.log10(np.square(one).mean() / 0.01) for one in exact])
    said = f"{tmp_path.name}, 'y': {near:.2f} dB from float on the device, {near:.2f} as verified\n"
    assert capsys.readouterr().out == said
    Session.off = 0.12
    assert cuda_networks.check(tmp_path, Session()) == 1
    Session.off = np.nan
    assert cuda_networks.check(tmp_path, Session()) == 1
    assert cuda_networks.sqnr(exact[0], exact[0]) == np.inf


def test_resnet50_has_its_shapes():
    program = cuda_shapes.resnet50()
    layers = [part for part in program.operations if hasattr(part, "weights")]
    work = sum(part.weights.size // len(part.weights) * program.tensors[part.output].size for part in layers)
    assert (len(layers), sum(part.weights.size for part in layers)) == (54, 25_502_912)
    assert work == pytest.approx(4.09e9, rel=0.001)
    described = cuda_shapes.layers_of(program)
    assert len(described) == len(program.operations) == 72
    assert described[0] == ("Conv", (0,), {"weights": [64, 3, 7, 7], "stride": 2, "ends": [3, 3, 3, 3], "groups": 1,
                                           "relu": True})  # fmt: skip
    json.dumps(described)
