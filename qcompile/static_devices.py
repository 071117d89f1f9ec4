"""Static executables of networks on a device: one run after the other over ssh, or from file to file over adb."""

from __future__ import annotations

import contextlib
import io
import secrets
import shlex
import shutil
import statistics
import subprocess
import tarfile
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qcompile import runner
from qcompile.backends.cpu.wire import Wire
from qcompile.core.errors import UsageError

#: Seconds that timing one artifact may take.
SECONDS = 2.0
#: Where adb lets everybody write and execute.
SCRATCH = "/data/local/tmp"
READY = b"ready\n"


class DeviceError(Exception):
    """A device went away, or what ran there did."""


def judged(wire: Wire, bundle: Path, labels: Sequence[int | None], first: Sequence[bytes]) -> dict[str, Any]:
    """Return the fidelity of one answer for each sample, as the runner of a bundle tells it."""
    answers = iter(first)
    return runner.fidelity(lambda _: wire.answer(next(answers))[1], bundle, labels)


def rounds(once: Sequence[float]) -> int:
    """Return how often to run, by what the first runs took in milliseconds."""
    return int(min(runner.MOST, max(runner.FEWEST, SECONDS * 1e3 / max(1e-3, 2.0 * statistics.median(once)))))


def over_ssh(
    connect: Sequence[str], bundle: Path, packed: Mapping[str, Any], labels: Sequence[int | None], launcher: str,
    timeout: float,
) -> dict[str, Any]:  # fmt: skip
    """Run an artifact's executable by one connection, which takes it along; return what a bundle's runner would tell.

    What was sent is removed at the end, also when the connection is cut: the executable leaves when its input ends.

    Parameters
    ----------
    connect : sequence of str
        The command that connects, without what is to run.
    bundle : Path
    packed : mapping
        Of the artifact, what `bundle.json` says.
    labels : sequence of int or None
    launcher : str
        Command in front of the executable.
    timeout : float
        Seconds.

    Raises
    ------
    DeviceError
        If it ends before it is done.
    """
    wire, samples = Wire(bundle / packed["folder"]), runner.samples_of(bundle / "inputs.npz")
    content = _tar(wire.program)
    script = (
        "d=$(mktemp -d) && cd \"$d\" && trap 'cd / && rm -rf \"$d\"' EXIT && trap 'exit 1' HUP INT TERM && "
        f"head -c {len(content)} | tar xf - && echo ready && {launcher} ./{shlex.quote(wire.program.name)}"
    )
    with _talking([*connect, f"sh -c {shlex.quote(script)}"], timeout) as talk:
        talk.send(content)
        # Nothing of a request may be taken for what is unpacked.
        talk.hear(len(READY))
        first = [talk.ask(wire.request(feeds), wire.answer_bytes) for feeds in samples]
        times = []
        for round_ in range(rounds([wire.answer(one)[0] for one in first])):
            request = wire.request(samples[round_ % len(samples)])
            talk.ask(request, wire.answer_bytes)
            times.append(wire.answer(talk.ask(request, wire.answer_bytes))[0])
    return {"times_ms": times, "failure": "", "load_ms": None, "peak_bytes": None,
            **judged(wire, bundle, labels, first)}  # fmt: skip


@dataclass
class _Talk:
    """A process that answers."""

    process: subprocess.Popen[bytes]

    def send(self, content: bytes) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(content)
            self.process.stdin.flush()
        except OSError as error:
            raise EOFError from error

    def hear(self, count: int) -> bytes:
        assert self.process.stdout is not None
        found = self.process.stdout.read(count)
        if len(found) < count:
            raise EOFError
        return found

    def ask(self, request: bytes, count: int) -> bytes:
        self.send(request)
        return self.hear(count)


@contextlib.contextmanager
def _talking(words: Sequence[str], timeout: float) -> Iterator[_Talk]:
    """Start a process and talk with it, for so long at most; its input's end ends it."""
    pipe = subprocess.PIPE
    with (
        tempfile.TemporaryFile() as said,
        subprocess.Popen(words, stdin=pipe, stdout=pipe, stderr=said, start_new_session=True) as process,
    ):
        late = threading.Timer(timeout, process.kill)
        late.start()
        try:
            yield _Talk(process)
            assert process.stdin is not None
            process.stdin.close()
            process.wait()
        except EOFError as error:
            expired = not late.is_alive()
            with contextlib.suppress(OSError):
                process.stdin.close()  # type: ignore[union-attr]
            code = process.wait()
            said.seek(0)
            last = said.read().decode(errors="replace").strip().splitlines()
            why = f"no end after {timeout:g} s" if expired else ended(code, last)
            raise DeviceError(why) from error
        finally:
            late.cancel()
            process.kill()


def ended(code: int, said: Sequence[str]) -> str:
    """Return why a process ended, by its exit code as a shell has it, and by what it said last."""
    signal = -code if code < 0 else code - 128 if 128 < code < 160 else 0
    return f"it was ended by signal {signal}" if signal else said[-1] if said else f"it left with {code}"


def _tar(file: Path) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        about = archive.gettarinfo(str(file), file.name)
        about.mode = 0o755  # a bundle keeps no modes
        with file.open("rb") as stream:
            archive.addfile(about, stream)
    return buffer.getvalue()


@dataclass(frozen=True)
class Adb:
    """A device that ``adb`` reaches: it runs static executables, and has no Python.

    Parameters
    ----------
    serial : str
        Which one, where there are several.
    launcher : str
        Command in front of an executable, such as ``taskset f0``.
    """

    serial: str = ""
    launcher: str = ""
    #: Nothing is emulated on this side.
    emulated: str = ""

    @property
    def name(self) -> str:
        """How the user named it."""
        return f"adb:{self.serial}" if self.serial else "adb"

    def lines(self, folder: Path, words: Sequence[str], timeout: float) -> Iterator[dict[str, Any]]:
        """Say nothing: a bundle's runner wants Python."""
        del folder, words, timeout
        yield from ()

    def misplaced(self, packed: Mapping[str, Any]) -> str:
        """Return why an artifact has nothing to run there."""
        if packed["target"] == "float":
            return "is not run there, which wants Python"
        return "" if "executable" in packed else "has no static executable; compile it for aarch64-android"

    def runs_alone(self, packed: Mapping[str, Any]) -> bool:
        """Tell that all do."""
        del packed
        return True

    def alone(
        self, bundle: Path, packed: Mapping[str, Any], labels: Sequence[int | None], timeout: float
    ) -> dict[str, Any]:
        """Push an artifact's executable with its inputs, run it, pull what it made, and remove all that.

        Raises
        ------
        DeviceError
            If the device goes away, or what runs there does.
        """
        wire, samples = Wire(bundle / packed["folder"]), runner.samples_of(bundle / "inputs.npz")
        there, pushed = f"{SCRATCH}/qcompile-{secrets.token_hex(8)}", f"./{shlex.quote(wire.program.name)}"
        try:
            self._do(timeout, "shell", f"mkdir {there}")
            self._do(timeout, "push", str(wire.program), f"{there}/{wire.program.name}")
            self._do(timeout, "shell", f"cd {there} && chmod 755 {pushed}")
            first, _ = self._run(there, pushed, wire, [wire.request(feeds) for feeds in samples], timeout)
            count = rounds([wire.answer(one)[0] for one in first])
            # Each twice: the first brings its input into the caches.
            requests = [wire.request(samples[place // 2 % len(samples)]) for place in range(2 * count)]
            answers, peak = self._run(there, pushed, wire, requests, timeout)
        finally:
            with contextlib.suppress(DeviceError):
                self._do(timeout, "shell", f"rm -rf {there}")
        times = [wire.answer(one)[0] for one in answers[1::2]]
        return {"times_ms": times, "failure": "", "load_ms": None, "peak_bytes": peak,
                **judged(wire, bundle, labels, first)}  # fmt: skip

    def _run(
        self, there: str, program: str, wire: Wire, requests: Sequence[bytes], timeout: float
    ) -> tuple[list[bytes], int | None]:
        """Run from a file of requests to one of answers; return these, and the bytes of memory at the peak."""
        with tempfile.TemporaryDirectory(prefix="qcompile-") as scratch:
            asked, answered = Path(scratch) / "requests", Path(scratch) / "answers"
            asked.write_bytes(b"".join(requests))
            self._do(timeout, "push", str(asked), f"{there}/requests")
            # Its memory is asked for as long as it runs; what is said last was so at the end.
            said = self._do(timeout, "shell", (
                f"cd {there}; {self.launcher} {program} < requests > answers & p=$!; "
                "while grep VmHWM /proc/$p/status 2>/dev/null; do sleep 0.05; done; wait $p; echo exit $?"
            )).split()  # fmt: skip
            code = int(said[-1]) if said[-2:-1] == ["exit"] else 1
            if code:
                raise DeviceError(ended(code, ()))
            self._do(timeout, "pull", f"{there}/answers", str(answered))
            content = answered.read_bytes()
        size = wire.answer_bytes
        if len(content) != size * len(requests):
            raise DeviceError(f"it made {len(content)} of {size * len(requests)} bytes")
        peaks = [int(said[at + 1]) for at, word in enumerate(said[:-1]) if word == "VmHWM:"]
        found = [content[at : at + size] for at in range(0, len(content), size)]
        return found, 1024 * peaks[-1] if peaks else None

    def _do(self, timeout: float, *words: str) -> str:
        """Have adb do something, and return what it said."""
        command = ["adb", *(["-s", self.serial] if self.serial else []), *words]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=timeout)
        except subprocess.TimeoutExpired as error:
            raise DeviceError(f"no end after {timeout:g} s") from error
        if done.returncode:
            last = (done.stderr or done.stdout).strip().splitlines()
            raise DeviceError(last[-1] if last else f"adb {words[0]} left with {done.returncode}")
        return done.stdout


def parse_adb(text: str, launcher: str) -> Adb:
    """Read ``adb`` or ``adb:SERIAL``.

    Raises
    ------
    UsageError
        If adb is not installed.
    """
    if shutil.which("adb") is None:
        raise UsageError(f"--on {text}", "adb is not installed here", "apt-get install adb")
    return Adb(text.partition(":")[2], launcher)
