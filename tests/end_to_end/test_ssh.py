"""`qcompile compare --on ssh://…` against a real sshd on loopback."""

from __future__ import annotations

import getpass
import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from qcompile.core.costs import CostTable

SSHD = shutil.which("sshd") or shutil.which("sshd", path="/usr/sbin")

pytestmark = pytest.mark.skipif(
    SSHD is None or shutil.which("ssh") is None, reason="openssh-server and openssh-client are not installed"
)


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A server of this user's own, and an `ssh` that it lets in; what is unpacked there lies in `remote`."""
    folder, remote = tmp_path / "ssh", tmp_path / "remote"
    folder.mkdir(mode=0o700)
    remote.mkdir()
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    shutil.copy(folder / "user.pub", folder / "authorized")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (folder / "sshd_config").write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {folder}/host\nAuthorizedKeysFile {folder}/authorized\n"
        f"StrictModes no\nUsePAM no\nPasswordAuthentication no\nPidFile none\nSetEnv TMPDIR={remote}\n"
    )
    if os.getuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)
    with subprocess.Popen([SSHD, "-D", "-e", "-f", folder / "sshd_config"], stderr=subprocess.DEVNULL) as process:
        commands = folder / "bin"
        commands.mkdir()
        (commands / "ssh").write_text(
            f"#!/bin/sh\necho $$ >> {folder}/connections\n"
            f"exec {shutil.which('ssh')} -F none -i {folder}/user -o StrictHostKeyChecking=no "
            f'-o UserKnownHostsFile={folder}/known -o LogLevel=ERROR "$@"\n'
        )
        (commands / "ssh").chmod(0o755)
        monkeypatch.setenv("PATH", os.pathsep.join([str(commands), os.environ["PATH"]]))
        for _ in range(100):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.05)
        yield f"ssh://{getpass.getuser()}@127.0.0.1:{port}", remote
        process.kill()


@pytest.fixture
def bundled(qcompile, small, small_artifact, tmp_path):
    file = tmp_path / "small.qbundle"
    assert qcompile("bundle", small_artifact, "--model", small.model, "--data", small.data, "-o", file).code == 0
    return file


def connections(remote: Path) -> list[int]:
    """Return the processes of this side that connected, in their order."""
    return [int(line) for line in (remote.parent / "ssh/connections").read_text().split()]


def left_behind(remote: Path) -> list[str]:
    """Return what still lies or runs on the device, once it has had the time to tidy up."""
    for _ in range(100):
        running = subprocess.run(["pgrep", "-f", f"{remote}/"], capture_output=True, text=True, check=False).stdout
        if not (found := [*(path.name for path in remote.iterdir()), *running.split()]):
            return []
        time.sleep(0.1)
    return found


def test_a_bundle_runs_on_a_device_and_leaves_nothing_behind(qcompile, bundled, server):
    device, remote = server
    done = qcompile("compare", bundled, "--on", device, "--python", sys.executable, "--json")
    here = qcompile("compare", bundled, "--json")
    assert done.code == here.code == 0, done.err
    there = json.loads(done.out)
    assert there["device"] == device and there["processor"] is None
    assert all(row["latency"] is not None for row in there["rows"])
    ratios = [sorted(str(row["sqnr"]) for row in json.loads(run.out)["rows"]) for run in (done, here)]
    assert ratios[0] == ratios[1] and not left_behind(remote)


def test_kernels_are_timed_on_the_device(qcompile, small, small_artifact, server, tmp_path):
    device, remote = server
    words = ("--model", small.model, "--data", small.data, "--on", device, "--python", sys.executable)
    done = qcompile("compare", small_artifact, *words, "--costs-out", tmp_path / "device.json")
    assert done.code == 0, done.err
    assert any(key.startswith("QLinearConv[") for key in CostTable.from_json(tmp_path / "device.json").entries)
    assert not left_behind(remote)


@pytest.mark.slow
def test_fifty_runs_leave_nothing_behind(qcompile, bundled, server):
    device, remote = server
    for _ in range(50):
        assert qcompile("compare", bundled, "--on", device, "--python", sys.executable).code == 0
    assert not left_behind(remote)


def test_a_device_that_is_cut_off_is_said_in_each_row(qcompile, bundled, server):
    device, remote = server
    ended = threading.Event()

    def cut() -> None:
        """Kill this side of the connection once the runner runs over there."""
        while not ended.is_set():
            if list(remote.glob("*/runner.py")):
                time.sleep(0.1)
                os.kill(connections(remote)[-1], signal.SIGKILL)
                return
            time.sleep(0.02)

    cutter = threading.Thread(target=cut)
    cutter.start()
    done = qcompile("compare", bundled, "--on", device, "--python", sys.executable)
    ended.set()
    cutter.join()
    assert done.code == 7 and done.out.count(f"{device} was lost") == 2 and done.err.count("\n") == 1
    assert not left_behind(remote)


EMULATED = ("--launcher", "qemu-aarch64 -cpu max")
needs_arm = pytest.mark.skipif(
    any(shutil.which(tool) is None for tool in ("qemu-aarch64", "ld.lld")) or importlib.util.find_spec("tvm") is None,
    reason="qemu-user, lld or apache-tvm is not installed",
)


@pytest.fixture(scope="module")
def library(tmp_path_factory, small_artifact):
    """What the small model became for ARM."""
    from qcompile import Options, compile

    output = tmp_path_factory.mktemp("library") / "arm"
    data = str(small_artifact.parent / "data.npz")
    compile(small_artifact.parent / "small.onnx", Options("aarch64-linux", data=data, output=output))
    return output


@needs_arm
def test_a_library_for_arm_runs_there_without_python(qcompile, small, library, server):
    """This machine stands for one of ARM by an emulator in front of the executable; float's row alone wants Python."""
    device, remote = server
    words = ("--model", small.model, "--data", small.data, "--on", device, "--python", "no-such-python", *EMULATED)
    done = qcompile("compare", library, *words, "--json")
    rows = {row["target"]: row for row in json.loads(done.out)["rows"]}
    row = rows["aarch64-linux"]
    assert done.code == 7 and rows["float"]["failed"] and not row["failed"]
    assert row["latency"]["median"] > 0.0 and row["sqnr"]["y"] > 20.0 and not left_behind(remote)


@needs_arm
def test_an_executable_that_is_cut_off_is_said_in_its_row(qcompile, small, library, server):
    device, remote = server
    ended = threading.Event()

    def cut() -> None:
        while not ended.is_set():
            if _unpacked(remote):
                os.kill(connections(remote)[-1], signal.SIGKILL)
                return
            time.sleep(0.02)

    cutter = threading.Thread(target=cut)
    cutter.start()
    words = ("--model", small.model, "--data", small.data, "--on", device, "--python", sys.executable)
    done = qcompile("compare", library, *words, "--launcher", "sleep 2; qemu-aarch64 -cpu max", "--json")
    ended.set()
    cutter.join()
    rows = {row["target"]: row for row in json.loads(done.out)["rows"]}
    assert done.code == 7 and done.err.count("\n") == 1
    assert rows["aarch64-linux"]["failed"] and rows["aarch64-linux"]["failure"].startswith(f"{device}: ")
    assert not rows["float"]["failed"] and not left_behind(remote)


def _unpacked(remote: Path) -> bool:
    """Tell whether an executable lies there, alone; a bundle begins with a folder."""
    return any([path.is_file() for path in folder.iterdir()] == [True] for folder in remote.iterdir())


@needs_arm
def test_what_the_device_cannot_execute_says_so(qcompile, small, library, server):
    device, remote = server
    words = ("--model", small.model, "--data", small.data, "--on", device, "--python", sys.executable)
    done = qcompile("compare", library, *words, "--launcher", "no-such-emulator")
    assert done.code == 7 and "no-such-emulator" in done.out and "not found" in done.out and not left_behind(remote)


@pytest.mark.parametrize("python", ["no-such-python"])
def test_a_device_without_what_it_needs_says_so(qcompile, bundled, server, python):
    device, remote = server
    done = qcompile("compare", bundled, "--on", device, "--python", python)
    assert done.code == 7 and python in done.out and "not found" in done.out and not left_behind(remote)


def test_a_device_that_is_not_there_says_so(qcompile, bundled, server):
    done = qcompile("compare", bundled, "--on", "ssh://127.0.0.1:1")
    assert done.code == 7 and "refused" in done.out


def test_interrupting_ends_both_sides(bundled, server):
    device, remote = server
    words = [sys.executable, "-m", "qcompile", "compare", bundled, "--on", device, "--python", sys.executable]
    heard = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    # Whoever runs the tests in the background may have them ignore it, and all that they start.
    hearing = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    with subprocess.Popen(words, **heard, **hearing) as process:
        while not list(remote.glob("*/runner.py")):
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
    assert not left_behind(remote)
