"""`qcompile compare --on qemu-aarch64`: libraries for ARM beside what runs here, never timed; documented commands."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from qcompile.backends.cpu import emulate, library
from qcompile.backends.cpu.session import absent
from qcompile.backends.mcu.emulate import missing
from qcompile.core.errors import TargetError

pytest.importorskip("tvm")

ROOT = Path(__file__).parents[2]
ELSEWHERE = pytest.mark.skipif(platform.machine() == "aarch64", reason="runs them itself")


@pytest.fixture(autouse=True)
def emulation():
    """Skip where aarch64 cannot be linked for, or emulated."""
    try:
        library.linker("aarch64")
        emulate.emulator("aarch64")
    except TargetError as error:
        pytest.skip(str(error))


@pytest.fixture
def outputs(qcompile, small, tmp_path):
    """Two artifacts of the small model, and what every comparison of them needs."""
    made = [tmp_path / target for target in ("cpu", "aarch64-linux")]
    for output in made:
        done = qcompile(small.model, "--target", output.name, "--data", small.data, "-o", output, "--quiet")
        assert done.code == 0, done.err
    return made, ("--model", small.model, "--data", small.data)


def rows(done) -> dict[str, dict]:
    return {row["target"]: row for row in json.loads(done.out)["rows"]}


@ELSEWHERE
def test_a_library_for_arm_has_fidelity_size_and_instructions_and_no_time(qcompile, outputs):
    made, words = outputs
    done = qcompile("compare", *made, *words, "--on", "qemu-aarch64", "--json")
    assert done.code == 0, done.err
    found = rows(done)
    emulated, native = found["aarch64-linux"], found["cpu"]
    assert json.loads(done.out)["device"] == "qemu-aarch64"
    assert emulated["latency"] is None and emulated["load_ms"] is None and emulated["peak_bytes"] is None
    report = json.loads((made[1] / "report.json").read_text())
    assert emulated["bytes"] == report["size"]["artifact_bytes"] and emulated["sqnr"]["y"] > 10
    assert emulated["instructions"] > 100 and not emulated["failed"]
    assert native["latency"]["median"] > 0 and native["instructions"] is None


@ELSEWHERE
def test_a_bundle_brings_the_executable_along(qcompile, outputs, tmp_path):
    made, words = outputs
    bundle = tmp_path / "small.qbundle"
    assert qcompile("bundle", *made, *words, "-o", bundle).code == 0
    with zipfile.ZipFile(bundle) as archive:
        [program] = [name for name in archive.namelist() if name.endswith("_runner")]
        assert archive.read(program) == (made[1] / Path(program).name).read_bytes()
    packed = rows(qcompile("compare", bundle, "--on", "qemu-aarch64", "--json"))["aarch64-linux"]
    folders = rows(qcompile("compare", *made, *words, "--on", "qemu-aarch64", "--json"))["aarch64-linux"]
    keys = ("bytes", "sqnr", "instructions", "failure")
    assert [packed[key] for key in keys] == [folders[key] for key in keys]


@ELSEWHERE
def test_without_emulation_the_row_says_what_it_is_for(qcompile, outputs):
    made, words = outputs
    done = qcompile("compare", *made, *words)
    assert done.code == 7 and f"the library is for aarch64, and this is {platform.machine()}" in done.out
    assert rows(qcompile("compare", *made, *words, "--json"))["cpu"]["latency"] is not None


@ELSEWHERE
def test_an_emulator_or_a_compiler_that_is_not_here_is_said_in_the_row(qcompile, outputs, monkeypatch):
    made, words = outputs
    which = shutil.which
    monkeypatch.setattr(shutil, "which", lambda name, *rest: None if name == "gcc" else which(name, *rest))
    row = rows(qcompile("compare", *made, *words, "--on", "qemu-aarch64", "--json"))["aarch64-linux"]
    assert row["sqnr"]["y"] > 10 and row["instructions"] is None and row["failure"] == "needs gcc"
    monkeypatch.setattr(shutil, "which", lambda name, *rest: None if "qemu" in name else which(name, *rest))
    done = qcompile("compare", *made, *words, "--on", "qemu-aarch64")
    assert done.code == 7 and "apt-get install qemu-user" in done.out


def commands(page: str) -> list[str]:
    """Return the commands behind the marker of a page."""
    [block] = re.findall(r"<!-- two commands -->\n```bash\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    return block.splitlines()


def test_readme_and_page_have_the_same_two_commands():
    assert commands("README.md") == commands("docs/comparing.md") and len(commands("README.md")) == 2


@pytest.mark.skipif(missing() != "", reason=f"needs {missing()}")
@pytest.mark.skipif(bool(absent(["avx512_vnni", "avx512vbmi"])), reason="the processor has no AVX512-VNNI and VBMI")
def test_two_commands_take_a_model_to_a_table(tmp_path):
    """As they are documented, but for the virtual environment, which is this one."""
    (tmp_path / "models").symlink_to(ROOT / "models")
    installed, compared = commands("README.md")
    head, loop = installed.split(" && for ")
    assert "pip install" in head
    lines = [line.replace(".venv/bin/qcompile", f"{sys.executable} -m qcompile") for line in (f"for {loop}", compared)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "80"}
    first = subprocess.run(["bash", "-c", lines[0]], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert first.returncode == 0, first.stderr
    second = subprocess.run(["bash", "-c", f"{lines[1]} --json"], cwd=tmp_path, env=environment, capture_output=True)
    assert second.returncode == 0, second.stderr
    found = {row["target"]: row for row in json.loads(second.stdout)["rows"]}
    assert set(found) == {"float", "cpu", "cpu:tvm", "aarch64-linux", "cortex-m4"}
    for name in ("cpu", "cpu:tvm", "aarch64-linux", "cortex-m4"):
        assert min(found[name]["sqnr"].values()) > 20
        assert found[name]["bytes"] < found["float"]["bytes"] and found[name]["accuracy"] >= 0.8
    timed = {name for name, row in found.items() if row["latency"]}
    counted = {name for name, row in found.items() if row["instructions"]}
    assert timed == {"float", "cpu", "cpu:tvm"} and counted == {"aarch64-linux", "cortex-m4"}
    # The integer targets compute the same codes.
    [ratios] = {np.round(min(found[name]["sqnr"].values()), 3) for name in ("cpu:tvm", "aarch64-linux", "cortex-m4")}
    assert ratios > 20
