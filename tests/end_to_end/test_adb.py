"""`qcompile compare --on adb` with a stand-in for adb: its device is a folder, and runs ARM's code by QEMU."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from qcompile.static_devices import ended

MISSING = [tool for tool in ("qemu-aarch64", "ld.lld") if shutil.which(tool) is None]
MISSING += [] if importlib.util.find_spec("tvm") else ["apache-tvm"]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"{', '.join(MISSING)} not installed")

#: What adb does of what is asked of it here. FAIL says what goes wrong: offline, full, killed, cut.
ADB = """
    #!{python}
    import os, pathlib, shutil, signal, subprocess, sys, time
    here, fail = pathlib.Path({folder!r}), os.environ.get("ADB_FAIL", "")
    words = sys.argv[1:]
    with (here / "log").open("a") as log:
        log.write(" ".join(words) + "\\n")
    if words[:1] == ["-s"]:
        if words[1] != "pixel":
            sys.exit("error: device '" + words[1] + "' not found")
        words = words[2:]
    count = sum("shell" in line for line in (here / "log").read_text().splitlines())
    if fail == "offline":
        sys.exit("error: no devices/emulators found")
    there = lambda text: text.replace("/data/local/tmp", str(here / "device"))
    if words[0] == "push":
        if fail == "full" and words[2].endswith("requests"):
            sys.exit("adb: error: failed to copy: remote write failed: No space left on device")
        shutil.copyfile(words[1], there(words[2]))
    elif words[0] == "pull":
        if fail == "cut":
            sys.exit("adb: error: device offline")
        shutil.copyfile(there(words[1]), words[2])
    elif words[0] == "shell":
        command = there(words[1])
        if fail == "killed" and "requests" in command:
            command = command.replace("p=$!;", "p=$!; kill -9 $p;")
        sys.exit(subprocess.run(["sh", "-c", command], stdin=subprocess.DEVNULL).returncode)
    else:
        sys.exit("adb: unknown command " + words[0])
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory, small_artifact):
    """What the small model became for ARM, packed with its data and, beside it, what ONNX Runtime runs."""
    from qcompile import Options, compile

    folder = tmp_path_factory.mktemp("library")
    model, data = small_artifact.parent / "small.onnx", small_artifact.parent / "data.npz"
    compile(model, Options("aarch64-android", data=str(data), output=folder / "phone"))
    return folder / "phone", model, data


@pytest.fixture
def adb(tmp_path, monkeypatch):
    """Put the stand-in in front of everything; return the folder of its device."""
    (tmp_path / "adb/device").mkdir(parents=True)
    program = tmp_path / "adb/adb"
    text = textwrap.dedent(ADB).lstrip().format(python=sys.executable, folder=str(tmp_path / "adb"))
    program.write_text(text)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", os.pathsep.join([str(program.parent), os.environ["PATH"]]))
    return tmp_path / "adb/device"


def compared(qcompile, library, *more: object) -> tuple[int, dict[str, dict], str]:
    output, model, data = library
    words = ("--model", model, "--data", data, "--launcher", "qemu-aarch64 -cpu max", "--json")
    done = qcompile("compare", output, *more, *words)
    rows = {row["target"] or row["output"]: row for row in json.loads(done.out)["rows"]}
    return done.code, rows, done.err


def test_a_phone_runs_the_executable_and_keeps_nothing(qcompile, library, adb):
    code, rows, err = compared(qcompile, library, "--on", "adb:pixel")
    assert code == 0, err
    row, report = rows["aarch64-android"], json.loads((library[0] / "report.json").read_text())
    assert row["latency"]["median"] > 0.0 and row["peak_bytes"] > 0 and not row["failed"]
    # The same code on the same samples, here and there.
    here = json.loads(qcompile("compare", library[0], "--model", library[1], "--data", library[2], "--on",
                               "qemu-aarch64", "--json").out)["rows"]  # fmt: skip
    assert row["sqnr"] == pytest.approx(next(one["sqnr"] for one in here if one["target"] == "aarch64-android"))
    assert row["sqnr"]["y"] > 20.0 and row["bytes"] == report["size"]["artifact_bytes"]
    assert "wants Python" in rows["float"]["failure"] and not rows["float"]["failed"]
    assert not list(adb.iterdir())
    assert all(line.startswith("-s pixel ") for line in (adb.parent / "log").read_text().splitlines())


@pytest.mark.parametrize(
    ("fail", "why"),
    [("offline", "no devices/emulators found"), ("full", "No space left on device"),
     ("killed", "it was ended by signal 9"), ("cut", "device offline")],
)  # fmt: skip
def test_what_goes_wrong_is_said_in_the_row(qcompile, library, adb, monkeypatch, fail, why):
    monkeypatch.setenv("ADB_FAIL", fail)
    code, rows, err = compared(qcompile, library, "--on", "adb")
    assert code == 7 and err.count("\n") == 1 and why in err
    row = rows["aarch64-android"]
    assert row["failed"] and why in row["failure"] and row["failure"].startswith("adb: ") and row["latency"] is None
    assert not list(adb.iterdir())


def test_a_device_of_another_name_is_not_there(qcompile, library, adb):
    code, rows, _ = compared(qcompile, library, "--on", "adb:tablet")
    assert code == 7 and "device 'tablet' not found" in rows["aarch64-android"]["failure"]


def test_what_has_no_executable_says_so_and_the_rest_goes_on(qcompile, library, adb, small_artifact):
    code, rows, _ = compared(qcompile, library, small_artifact, "--on", "adb")
    assert code == 7 and "has no static executable" in rows["cpu"]["failure"]
    assert not rows["aarch64-android"]["failed"] and rows["aarch64-android"]["latency"] is not None


def test_a_phone_that_does_not_end_is_given_up(qcompile, library, adb):
    output, model, data = library
    words = ("--model", model, "--data", data, "--launcher", "sleep 30;", "--timeout", 2, "--on", "adb", "--json")
    done = qcompile("compare", output, *words)
    rows = {row["target"]: row for row in json.loads(done.out)["rows"]}
    assert done.code == 7 and "no end after 2 s" in rows["aarch64-android"]["failure"] and not list(adb.iterdir())


def test_without_adb_it_is_refused(qcompile, library, monkeypatch):
    monkeypatch.setenv("PATH", "")
    output, model, data = library
    done = qcompile("compare", output, "--model", model, "--data", data, "--on", "adb")
    assert done.code == 2 and "adb is not installed here" in done.err


@pytest.mark.parametrize(
    ("code", "said", "why"),
    [(137, ["x"], "it was ended by signal 9"), (-15, [], "it was ended by signal 15"),
     (126, ["sh: ./n: not executable: 64-bit ELF file"], "sh: ./n: not executable: 64-bit ELF file"),
     (1, [], "it left with 1"), (255, ["Connection closed"], "Connection closed")],
)  # fmt: skip
def test_why_a_process_ended(code, said, why):
    assert ended(code, said) == why


def test_the_stand_in_runs_what_a_device_would(adb):
    """The stand-in's shell is a real one, in the device's folder."""
    words = ["adb", "shell", "mkdir /data/local/tmp/x && echo exit $?"]
    assert subprocess.run(words, capture_output=True, text=True, check=True).stdout == "exit 0\n"
    assert [path.name for path in Path(adb).iterdir()] == ["x"]
