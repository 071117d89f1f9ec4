"""Bad luck in the middle of a compile: the outcome is the right artifact or one line, never a half or a wrong one.

What other tests have: a process that is killed at any stage and a cache on a full disk (test_compile.py), trials that
workers of a pool and of a cluster die over (calib/test_workers.py), devices that are cut off (test_ssh.py).
"""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from end_to_end.outcomes import settled

#: Compiles with the words behind the first two, and gets a signal when so many results were kept, or before the folder
#: that is written whole gets its name.
SIGNALLED = """
import os, signal, sys
from qcompile import artifact, cache, cli
number, left = int(sys.argv.pop(1)), int(sys.argv.pop(1))
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell takes from what it starts in the background

def signalled(function, last=False):
    def wrapper(*args, **kwargs):
        global left
        left -= 1
        if left == 0 or last:
            os.kill(os.getpid(), number)
        return function(*args, **kwargs)
    return wrapper

cache.Cache.put = signalled(cache.Cache.put)
artifact._publish = signalled(artifact._publish, last=True)
cli.main()
"""

#: Compiles with the words behind the first, where no file may have more bytes than that says.
SHORT = """
import resource, sys
limit = int(sys.argv.pop(1))
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
from qcompile import cli
cli.main()
"""


#: Compiles, and hears Ctrl-C, which a shell takes from what it starts in the background.
LISTENING = """
import signal
from qcompile import cli
signal.signal(signal.SIGINT, signal.default_int_handler)
cli.main()
"""


def words_for(small) -> list[object]:
    return [small.model, "--target", "cpu", "--data", small.data, "--quiet", "--costs", "none"]


@pytest.fixture
def right(small) -> dict[str, bytes]:
    """What comes out where nothing goes wrong."""
    words = [sys.executable, "-m", "qcompile", *words_for(small), "-o", small.folder / "right"]
    subprocess.run(words, check=True)
    return settled(small.folder / "right")


def left_behind(folder: Path) -> set[str]:
    """Return what nobody asked for."""
    return {path.name for path in folder.iterdir()} - {"small.onnx", "data.npz", "right", "cache"}


@pytest.mark.parametrize("stage", [1, 9, 0])
@pytest.mark.parametrize(
    ("number", "code", "said"), [(signal.SIGTERM, 143, "terminated"), (signal.SIGINT, 130, "interrupted")]
)
def test_signals_leave_one_line_and_nothing_else(small, number, code, said, stage) -> None:
    words = [*words_for(small), "--cache", small.folder / "cache", "-o", small.folder / "out"]
    command = [sys.executable, "-c", SIGNALLED, str(int(number)), str(stage), *words]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == code
    [line] = done.stderr.strip().split("\n")  # the terminal's ^C stands in a line of its own
    assert line.startswith(f"{said}: nothing was written; ")
    assert left_behind(small.folder) == set()


@pytest.mark.parametrize("limit", [0, 1000])
def test_files_that_cannot_be_written_whole_are_not_there(small, right, limit: int) -> None:
    """As on a full disk: the system takes no more bytes, wherever that is."""
    command = [sys.executable, "-c", SHORT, str(limit), *words_for(small), "-o", small.folder / "out"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode != 0
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert left_behind(small.folder) == set()


def test_a_full_disk_leaves_the_artifact_before(small, right) -> None:
    command = [sys.executable, "-c", SHORT, "1000", *words_for(small), "-o", small.folder / "right"]
    assert subprocess.run(command, capture_output=True).returncode != 0
    assert settled(small.folder / "right") == right


def test_compiles_that_share_a_cache_come_to_the_same(small, right) -> None:
    """At one time, from nothing: each finds what the others have kept so far."""
    words = [*words_for(small), "--cache", small.folder / "cache"]
    outputs = [small.folder / f"out{index}" for index in range(2)]
    running = [subprocess.Popen([sys.executable, "-m", "qcompile", *words, "-o", output]) for output in outputs]
    assert [process.wait(120) for process in running] == [0, 0]
    assert all(settled(output) == right for output in outputs)
    assert not list((small.folder / "cache").rglob(".*"))


def entries(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def flip(kept: dict[Path, bytes]) -> None:
    for path, content in kept.items():
        path.write_bytes(content[:-3] + bytes([content[-3] ^ 1]) + content[-2:])


def cut(kept: dict[Path, bytes]) -> None:
    for number, (path, content) in enumerate(kept.items()):
        path.write_bytes(content[: (0, 31, 32, len(content) // 2, len(content) - 1)[number % 5]])


def swap(kept: dict[Path, bytes]) -> None:
    """Each has the content of another, whole."""
    for path, other in zip(kept, [*list(kept)[1:], next(iter(kept))], strict=True):
        path.write_bytes(kept[other])


def stand_in_the_way(kept: dict[Path, bytes]) -> None:
    for path in kept:
        path.unlink()
        (path / "folder").mkdir(parents=True)


@pytest.mark.parametrize("damage", [flip, cut, swap, stand_in_the_way])
def test_damaged_cache_entries_are_as_good_as_none(qcompile, small, right, damage) -> None:
    words = [*words_for(small), "--cache", small.folder / "cache"]
    assert qcompile(*words, "-o", small.folder / "first").code == 0
    kept = entries(small.folder / "cache")
    assert len(kept) >= 5 and len(set(kept.values())) == len(kept)
    damage(kept)
    done = qcompile(*words, "-o", small.folder / "second")
    assert done.code == 0, done.err
    assert settled(small.folder / "first") == settled(small.folder / "second") == right
    if damage is not stand_in_the_way:
        assert entries(small.folder / "cache") == kept, "they were made again"


@pytest.mark.parametrize("error", [errno.EROFS, errno.EACCES])
def test_a_cache_that_can_only_be_read(qcompile, small, right, monkeypatch: pytest.MonkeyPatch, error: int) -> None:
    """What it has is used, what it lacks is computed, and the report says that nothing was kept."""
    cache = small.folder / "cache"
    words = [*(word for word in words_for(small) if word != "--quiet"), "--cache", cache]
    assert qcompile(*words, "-o", small.folder / "first").code == 0
    kept = entries(cache)
    lost = list(kept)[::2]
    for path in lost:
        path.unlink()
    left = entries(cache)

    def refused(name: str) -> Callable[..., object]:
        function = getattr(os, name)

        def one(path, *given, **named):
            if Path(path).is_relative_to(cache) and (name == "mkdir" or given[0] & (os.O_WRONLY | os.O_RDWR)):
                raise OSError(error, os.strerror(error), str(path))
            return function(path, *given, **named)

        return one

    for name in ("open", "mkdir"):
        monkeypatch.setattr(os, name, refused(name))
    done = qcompile(*words, "-o", small.folder / "second")
    assert done.code == 0, done.err
    assert os.strerror(error) in " ".join(done.out.split()) and "takes no entries" in " ".join(done.out.split())
    found = settled(small.folder / "second")
    assert all(found[name] == right[name] for name in ("model.onnx", "plan.json"))
    assert entries(cache) == left


def test_a_clock_that_jumps_changes_nothing(qcompile, small, right, monkeypatch: pytest.MonkeyPatch) -> None:
    """Back by an hour, then ahead by a year, each time that it is looked at."""
    jumps = count()

    def jumping(clock: Callable[[], float]) -> Callable[[], float]:
        return lambda: clock() + (-3600.0 if next(jumps) % 2 else 3.2e7)

    for name in ("time", "perf_counter", "monotonic", "process_time"):
        monkeypatch.setattr(time, name, jumping(getattr(time, name)))
    done = qcompile(*words_for(small), "--cache", small.folder / "cache", "-o", small.folder / "out")
    assert done.code == 0, done.err
    assert settled(small.folder / "out") == right


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], list[int]]]:
    """Let the runtime raise at its n-th run, as it does where memory ends or a kernel gives up."""
    run = onnxruntime.InferenceSession.run

    def at(number: int) -> list[int]:
        seen = [0]

        def one(self, *given, **named):
            seen[0] += 1
            if seen[0] == number:
                raise RuntimeError("[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : bad allocation")
            return run(self, *given, **named)

        monkeypatch.setattr(onnxruntime.InferenceSession, "run", one)
        return seen

    yield at


def test_a_runtime_that_raises_in_the_middle(qcompile, small, right, failing) -> None:
    """At its first run, at its last and at some between; the same command with the same cache then gets there."""
    words = [*words_for(small), "--threads", "1"]
    seen = failing(-1)
    assert qcompile(*words, "-o", small.folder / "out").code == 0
    runs = seen[0]
    assert runs > 50
    for number in np.unique(np.linspace(1, runs, 7).astype(int)):
        output, cache = small.folder / f"out-{number}", ("--cache", small.folder / "cache")
        failing(number)
        done = qcompile(*words, "-o", output)
        if done.code:
            assert done.err.startswith("error: ") and done.err.count("\n") == 1
            assert "bad allocation" in done.err and "internal error" not in done.err
            assert not output.exists()
        else:  # latency is measured beside the artifact
            assert settled(output) == right
        failing(number)
        qcompile(*words, *cache, "-o", output)
        failing(-1)
        assert qcompile(*words, *cache, "-o", output).code == 0
        assert settled(output) == right
    assert left_behind(small.folder) == {"out", *(path.name for path in small.folder.glob("out-*"))}


def processes_of(pid: int) -> list[int]:
    """Return the pool's processes that a process has started, but not what multiprocessing keeps beside them."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return [int(child) for child in children if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]
    except OSError:
        return []


def runs(pid: int) -> bool:
    """Tell whether a process runs; one that ended and that nobody asked about yet does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def begun(small, output: Path) -> tuple[subprocess.Popen[str], list[int]]:
    """Begin a compile with two processes beside it, and wait until there is one."""
    words = [*words_for(small), "--workers", "2", "-o", output]
    command = [sys.executable, "-c", LISTENING, *words]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while process.poll() is None and not processes_of(process.pid):
        time.sleep(0.01)
    return process, processes_of(process.pid)


def prepared(pid: int) -> bool:
    """Tell whether a process of the pool hears Ctrl-C, which is what it does as it begins to work."""
    try:
        [blocked] = re.findall(r"SigBlk:\s*(\w+)", Path(f"/proc/{pid}/status").read_text())
    except OSError:
        return True
    return not int(blocked, 16) & 1 << signal.SIGINT - 1


def come(moment: float | None, workers: list[int]) -> None:
    """Wait for a moment: so many seconds, or until a process is at work."""
    if moment is not None:
        time.sleep(moment)
    while moment is None and not prepared(workers[0]):
        time.sleep(0.001)


#: Seconds after which a process is still being started, or none for when it is at work.
MOMENTS = pytest.mark.parametrize("moment", [0.0, 0.05, None])


@MOMENTS
def test_a_process_of_the_pool_that_is_killed_is_replaced(small, right, moment: float | None) -> None:
    process, workers = begun(small, small.folder / "out")
    come(moment, workers)
    os.kill(workers[0], signal.SIGKILL)
    _, error = process.communicate(timeout=300)
    assert process.returncode == 0, error
    assert settled(small.folder / "out") == right


@MOMENTS
def test_ctrl_c_ends_the_pool_too(small, moment: float | None) -> None:
    """A terminal sends it to all of them."""
    process, workers = begun(small, small.folder / "out")
    come(moment, workers)
    os.killpg(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=300)
    assert process.returncode == 130
    [line] = error.strip().splitlines()
    assert line.startswith("interrupted: nothing was written; ")
    assert left_behind(small.folder) == set()
    end = time.monotonic() + 60.0
    while any(map(runs, workers)) and time.monotonic() < end:
        time.sleep(0.05)
    assert workers and not any(map(runs, workers))
