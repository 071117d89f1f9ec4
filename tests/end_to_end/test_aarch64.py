"""A model becomes a library for aarch64, by the command line, and is verified by running it."""

from __future__ import annotations

import json

import numpy as np
import pytest

from qcompile.backends.cpu import emulate, library
from qcompile.backends.cpu.backend import opened
from qcompile.core.errors import TargetError

pytest.importorskip("tvm")


@pytest.fixture(autouse=True)
def emulation():
    """Skip where aarch64 cannot be linked for, or emulated."""
    try:
        library.linker("aarch64")
        emulate.emulator("aarch64")
    except TargetError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("target", ["aarch64-linux", "aarch64-android"])
def test_a_model_becomes_a_library_that_was_run(qcompile, resnet8, tmp_path, target):
    model, data, evaluation = resnet8
    output = tmp_path / "out"
    done = qcompile(model, "--target", target, "--data", data, "--eval", evaluation, "--observer", "minmax",
                    "-o", output, "--json")  # fmt: skip
    assert done.code == 0, done.err
    report, measurements = (json.loads(done.out)[key] for key in ("report", "measurements"))
    assert all(measures["sqnr"] > 20 for measures in report["fidelity"]["outputs"].values())
    assert measurements["latency"] is None, "emulation has no time"
    manifest = json.loads((output / "manifest.json").read_text())
    assert {"libresnet8.so", "resnet8_runner", "network.json", "session.py", "resnet8.h"} <= set(manifest["files"])
    weights = report["size"]["by_cause"]["weights, biases and multipliers"]
    assert (output / "libresnet8.so").stat().st_size <= weights + 300 * 1024
    # The folder can be run again, and gives what the reference in floats comes close to.
    session = opened(output)
    (port,) = session.get_inputs()
    found = session.run(None, {port.name: np.load(evaluation)[port.name][0]})[0]
    assert found.shape == (1, 10) and found.sum() == pytest.approx(1.0, abs=0.1)


def test_without_an_emulator_nothing_is_compiled(qcompile, resnet8, tmp_path, monkeypatch):
    model, data, _ = resnet8

    def absent(architecture):
        raise TargetError(architecture, "needs qemu-aarch64", "apt-get install qemu-user")

    monkeypatch.setattr("qcompile.backends.cpu.backend.emulator", absent)
    done = qcompile(model, "--target", "aarch64-linux", "--data", data, "-o", tmp_path / "out")
    assert done.code == 7 and "apt-get install qemu-user" in done.err and done.err.count("\n") == 1
    assert not (tmp_path / "out").exists()
