"""Where bundles run: this machine, or one that ssh or adb reaches."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shlex
import shutil
import subprocess
import sys
import tarfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from qcompile.backends.cpu.session import is_here
from qcompile.bundle import RUNNER
from qcompile.core.errors import UsageError
from qcompile.static_devices import DeviceError, over_ssh, parse_adb

#: Seconds without an answer after which a connection counts as lost, and tries before that.
ALIVE, TRIES = 5, 3
#: What emulates which architecture.
EMULATORS = {"qemu-aarch64": "aarch64"}


class Device(Protocol):
    """What runs a bundle."""

    @property
    def name(self) -> str:
        """How the user named it."""
        ...

    @property
    def emulated(self) -> str:
        """Architecture that is emulated on this side, whatever runs elsewhere; none where it is empty."""
        ...

    def lines(self, folder: Path, words: Sequence[str], timeout: float) -> Iterator[dict[str, Any]]:
        """Run a bundle's runner and yield what it tells.

        Raises
        ------
        DeviceError
            If it ends before it is done.
        """
        ...

    def misplaced(self, packed: Mapping[str, Any]) -> str:
        """Return why an artifact cannot run there, as far as that is known beforehand."""
        ...

    def runs_alone(self, packed: Mapping[str, Any]) -> bool:
        """Tell whether it runs an artifact's static executable, without a bundle's runner."""
        ...

    def alone(
        self, bundle: Path, packed: Mapping[str, Any], labels: Sequence[int | None], timeout: float
    ) -> dict[str, Any]:
        """Run an artifact's executable, and return what the runner would tell of it.

        Raises
        ------
        DeviceError
            If it ends before it is done.
        """
        ...


@dataclass(frozen=True)
class Local:
    """The machine that qcompile runs on, and what is emulated there."""

    name: str = "local"
    emulated: str = ""

    def lines(self, folder: Path, words: Sequence[str], timeout: float) -> Iterator[dict[str, Any]]:
        """Run it here; see `Device`."""
        return _talk([sys.executable, str(folder / RUNNER), *words], b"", timeout)

    def misplaced(self, packed: Mapping[str, Any]) -> str:
        """Return why an artifact is for another machine."""
        architecture = packed.get("architecture", "")
        if not architecture or architecture == self.emulated or is_here(architecture):
            return ""
        emulators = "".join(f"--on {name}, or " for name, each in EMULATORS.items() if each == architecture)
        return f"is for {architecture}, and this machine is another; give {emulators}a device of that kind"

    def runs_alone(self, packed: Mapping[str, Any]) -> bool:
        """Tell that libraries are loaded here."""
        del packed
        return False

    def alone(
        self, bundle: Path, packed: Mapping[str, Any], labels: Sequence[int | None], timeout: float
    ) -> dict[str, Any]:
        """Refuse; see `runs_alone`."""
        raise DeviceError("runs no executable alone")


@dataclass(frozen=True)
class Ssh:
    """A machine that ``ssh`` reaches without asking for a password, with Python, NumPy and what its artifacts need.

    Parameters
    ----------
    host : str
        As ssh has it, with the user.
    port : int, optional
    python : str
        The command there.
    launcher : str
        Command in front of a static executable.
    """

    host: str
    port: int | None
    python: str
    launcher: str = ""

    @property
    def emulated(self) -> str:
        """Nothing: libraries run there."""
        return ""

    @property
    def name(self) -> str:
        """How the user named it."""
        return f"ssh://{self.host}{f':{self.port}' if self.port else ''}"

    def lines(self, folder: Path, words: Sequence[str], timeout: float) -> Iterator[dict[str, Any]]:
        """Send the bundle and run it there, by one connection; see `Device`.

        The bundle arrives on standard input, which then stays open. Its end tells the other side that nobody waits any
        more: the runner stops, and the shell removes what was sent.
        """
        content = _tar(folder)
        runner = " ".join(map(shlex.quote, [self.python, RUNNER, *words]))
        script = (
            "d=$(mktemp -d) && cd \"$d\" && trap 'cd / && rm -rf \"$d\"' EXIT && trap 'exit 1' HUP INT TERM && "
            f"head -c {len(content)} | tar xf - && {runner}"
        )
        return _talk([*self._connect(), f"sh -c {shlex.quote(script)}"], content, timeout)

    def _connect(self) -> list[str]:
        options = {"BatchMode": "yes", "ConnectTimeout": 10, "ServerAliveInterval": ALIVE, "ServerAliveCountMax": TRIES}
        given = [word for key, value in options.items() for word in ("-o", f"{key}={value}")]
        return ["ssh", *given, *(["-p", str(self.port)] if self.port else []), "--", self.host]

    def misplaced(self, packed: Mapping[str, Any]) -> str:
        """Return nothing: the device tells itself."""
        del packed
        return ""

    def runs_alone(self, packed: Mapping[str, Any]) -> bool:
        """Tell whether an artifact has a static executable, which wants neither Python nor NumPy."""
        return "executable" in packed

    def alone(
        self, bundle: Path, packed: Mapping[str, Any], labels: Sequence[int | None], timeout: float
    ) -> dict[str, Any]:
        """Run it there; see `Device`."""
        return over_ssh(self._connect(), bundle, packed, labels, self.launcher, timeout)


def parse_device(text: str, python: str, launcher: str = "") -> Device:
    """Read ``local``, ``qemu-aarch64``, ``adb``, ``adb:SERIAL`` or ``ssh://user@host:port``.

    Raises
    ------
    UsageError
        If it is none of these, or ssh or adb is not installed.
    """
    if text == "local":
        return Local()
    if text in EMULATORS:
        return Local(text, EMULATORS[text])
    if text == "adb" or (text.startswith("adb:") and text != "adb:"):
        return parse_adb(text, launcher)
    parts = urlsplit(text)
    if parts.scheme != "ssh" or not parts.hostname or parts.path not in ("", "/"):
        raise UsageError(
            f"--on {text}", "is no device", "give local, qemu-aarch64, adb, adb:SERIAL, or ssh://user@host:port"
        )
    if shutil.which("ssh") is None:
        raise UsageError(f"--on {text}", "ssh is not installed here", "install openssh-client")
    return Ssh(f"{parts.username}@{parts.hostname}" if parts.username else parts.hostname, parts.port, python, launcher)


def _talk(words: Sequence[str], content: bytes, timeout: float) -> Iterator[dict[str, Any]]:
    """Start a command, send it what it is to read, and yield the JSON that it prints, line by line."""
    pipe = subprocess.PIPE
    with subprocess.Popen(words, stdin=pipe, stdout=pipe, stderr=pipe, start_new_session=True) as process:
        assert process.stdin is not None and process.stdout is not None and process.stderr is not None
        said = list[bytes]()
        late = threading.Timer(timeout, process.kill)
        sending = threading.Thread(target=_send, args=(process.stdin, content), daemon=True)
        hearing = threading.Thread(target=lambda: said.append(process.stderr.read()), daemon=True)  # type: ignore[union-attr]
        for thread in (late, sending, hearing):
            thread.start()
        try:
            for line in process.stdout:
                with contextlib.suppress(ValueError):
                    yield json.loads(line)
            code = process.wait()
        finally:
            expired = not late.is_alive()
            late.cancel()
            process.kill()
        hearing.join(1.0)
        if code:
            last = b"".join(said).decode(errors="replace").strip().splitlines()
            why = f"no end after {timeout:g} s" if expired else last[-1] if last else f"it left with {code}"
            raise DeviceError(why)


def _send(stream: Any, content: bytes) -> None:
    with contextlib.suppress(OSError):
        stream.write(content)
        stream.flush()


def _tar(folder: Path) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name in sorted(os.listdir(folder)):  # noqa: PTH208  names are what tar wants
            archive.add(folder / name, name)
    return buffer.getvalue()
