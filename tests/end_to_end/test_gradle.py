"""The Gradle example, without the Android SDK: qcompile runs when something changed, and only then."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

EXAMPLE = Path(__file__).parents[2] / "examples/gradle"
FEW = 8

pytestmark = pytest.mark.skipif(shutil.which("gradle") is None, reason="gradle is not installed")


@pytest.fixture
def project(tmp_path, resnet8):
    """A copy of the example, its model with few samples, and what runs it."""
    shutil.copytree(EXAMPLE, tmp_path / "project")
    models = tmp_path / "models"
    models.mkdir()
    shutil.copy(resnet8[0], models)
    for path in resnet8[1:]:
        with np.load(path) as archive:
            np.savez(models / path.name, **{name: array[:FEW] for name, array in archive.items()})
    command = tmp_path / "qcompile"
    command.write_text(f'#!/bin/sh\necho run >> "{tmp_path}/runs"\nexec {sys.executable} -m qcompile "$@"\n')
    command.chmod(0o755)

    def gradle(*words: str) -> subprocess.CompletedProcess[str]:
        # Nothing of this machine's user, and nothing in the example's folder but what it builds.
        own = ("-g", str(tmp_path / "home"), "--project-cache-dir", str(tmp_path / "cache"), "--no-daemon", "--offline")
        given = (f"-Pqcompile={command}", f"-Pmodels={models}")
        words = ("gradle", *own, *given, "-p", str(tmp_path / "project"), *words)
        return subprocess.run(
            words, capture_output=True, text=True, env=os.environ | {"HOME": str(tmp_path)}, check=False
        )

    return tmp_path, models, gradle


def test_the_example_packages_a_model_and_again_when_something_changed(project):
    folder, models, gradle = project
    first = gradle("assets")
    assert first.returncode == 0, first.stdout + first.stderr
    packed = folder / "project/build/outputs/assets.zip"
    with zipfile.ZipFile(packed) as archive:
        assert "assets/resnet8/model.ort" in archive.namelist()
        session = onnxruntime.InferenceSession(archive.read("assets/resnet8/model.ort"))
    assert session.get_inputs()[0].shape[1:] == [32, 32, 3]
    content = packed.read_bytes()
    second = gradle("assets", "--console=plain")
    assert ":qcompileResnet8 UP-TO-DATE" in second.stdout and (folder / "runs").read_text().count("run") == 1
    (models / "resnet8_eval.npz").unlink()
    np.savez(models / "resnet8_eval.npz", x=np.load(models / "resnet8_calib.npz")["x"][:3])
    assert gradle("assets").returncode == 0 and (folder / "runs").read_text().count("run") == 2
    # Another evaluation is another report, and the same model.
    assert packed.read_bytes() == content


def test_a_model_that_cannot_be_compiled_fails_the_build_with_its_line(project):
    _, models, gradle = project
    (models / "resnet8.onnx").write_bytes(b"no model")
    done = gradle("assets", "-q")
    assert done.returncode != 0 and "resnet8.onnx: is not an ONNX model" in done.stdout + done.stderr
