"""The CMake package: the example builds, links and passes, and qcompile runs when something changed, and only then."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

EXAMPLE = Path(__file__).parents[2] / "examples/cmake"
#: Where pip puts the commands of this environment.
COMMANDS = str(Path(sys.executable).parent)
FEW = 8

pytestmark = [
    pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc is not installed"),
    pytest.mark.skipif(shutil.which("cmake", path=COMMANDS) is None, reason="cmake is not installed"),
    pytest.mark.skipif(shutil.which("qcompile", path=COMMANDS) is None, reason="qcompile is not installed"),
]


@pytest.fixture
def models(tmp_path, resnet8):
    """The example's model, with few samples."""
    folder = tmp_path / "models"
    folder.mkdir()
    shutil.copy(resnet8[0], folder)
    for path in resnet8[1:]:
        with np.load(path) as archive:
            np.savez(folder / path.name, **{name: array[:FEW] for name, array in archive.items()})
    return folder


def cmake(*words: object) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([COMMANDS, os.environ["PATH"]])
    return subprocess.run(list(map(str, words)), env=os.environ | {"PATH": path}, capture_output=True, text=True)


@pytest.mark.parametrize("generator", ["Ninja", "Unix Makefiles"])
def test_the_example_builds_and_builds_again_when_something_changed(generator, models, tmp_path):
    if generator == "Unix Makefiles" and shutil.which("make") is None:
        pytest.skip("make is not installed")
    build = tmp_path / "build"
    configured = cmake("cmake", "-G", generator, "-S", EXAMPLE, "-B", build, f"-Dmodels={models}")
    assert configured.returncode == 0, configured.stderr
    first, second = (cmake("cmake", "--build", build) for _ in range(2))
    assert first.returncode == 0 and "Compiling" in first.stdout, first.stdout + first.stderr
    assert second.returncode == 0 and "Compiling" not in second.stdout
    tested = cmake("ctest", "--test-dir", build)
    assert tested.returncode == 0 and "100% tests passed out of 2" in tested.stdout, tested.stdout
    (models / "resnet8_calib.npz").touch()
    assert "Compiling" in cmake("cmake", "--build", build).stdout
    assert "Compiling" not in cmake("cmake", "--build", build).stdout


def test_a_model_that_cannot_be_compiled_fails_the_build_with_its_line(models, tmp_path):
    (models / "resnet8.onnx").write_bytes(b"no model")
    build = tmp_path / "build"
    assert cmake("cmake", "-G", "Ninja", "-S", EXAMPLE, "-B", build, f"-Dmodels={models}").returncode == 0
    failed = cmake("cmake", "--build", build)
    assert failed.returncode != 0 and "resnet8.onnx: is not an ONNX model" in failed.stdout


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ("MODEL m.onnx QTARGET cpu", "TARGET is missing"),
        ("TARGET t MODEL m.onnx QTARGET cpu MAX_SIZE 1", "'MAX_SIZE;1' is no argument"),
    ],
)
def test_a_call_that_says_too_little_or_too_much_stops_the_configuration(arguments, line, tmp_path):
    (tmp_path / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.20)\nproject(p NONE)\nfind_package(qcompile REQUIRED)\n"
        f"qcompile_add_model({arguments})\n"
    )
    found = cmake("qcompile", "--cmake-dir").stdout.strip()
    done = cmake("cmake", "-G", "Ninja", "-S", tmp_path, "-B", tmp_path / "build", f"-Dqcompile_DIR={found}")
    assert done.returncode != 0 and line in done.stderr
