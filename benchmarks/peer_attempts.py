"""A peer's attempt at a model: in an environment of its own, a process of its own, within a time and a memory.

What an attempt made is kept under a hash of all that went into it (model, samples, setting, the packages that are
really installed, the scripts), and so is the reason of one that failed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from qcompile.core.runtime import Feeds

HERE = Path(__file__).parent
SCRIPTS = HERE / "peer_scripts"
#: Characters of a reason for failing that a table has room for.
LONGEST = 160
#: Seconds that a step of an installation may take.
LONGEST_INSTALLATION = 1800.0
#: An environment's list of packages; written last, so its presence means that the environment is complete.
INSTALLED = "installed.txt"


class PeerError(Exception):
    """A peer cannot do what it was asked for; the message is one line."""


@dataclass(frozen=True)
class Limits:
    """What one attempt may take.

    Parameters
    ----------
    seconds : float
    gigabytes : float
        Of address space.
    """

    seconds: float = 900.0
    gigabytes: float = 10.0


@dataclass(frozen=True)
class Setting:
    """One way of using a peer.

    Parameters
    ----------
    name : str
    arguments : mapping
        What its script is told.
    script : str, optional
        Another file of peer_scripts/ than its peer's.
    needs : str, optional
        The type of operator without which there is nothing to do for it.
    """

    name: str
    arguments: Mapping[str, Any]
    script: str | None = None
    needs: str | None = None

    @classmethod
    def read(cls, name: str, table: Mapping[str, Any]) -> Setting:
        """Read a setting: what is not for us is for its script."""
        arguments = dict(table)
        return cls(name, script=arguments.pop("script", None), needs=arguments.pop("needs", None), arguments=arguments)


@dataclass(frozen=True)
class Peer:
    """Another quantizer.

    Parameters
    ----------
    name : str
    requirements : tuple of str
        What pip installs for it, with versions.
    script : str
        The file of peer_scripts/ that runs in its environment.
    settings : tuple of Setting
    """

    name: str
    requirements: tuple[str, ...]
    script: str
    settings: tuple[Setting, ...]

    @property
    def version(self) -> str:
        """Name and version: the first requirement."""
        return self.requirements[0].replace("==", " ")


def read_peers(path: Path = HERE / "peers.toml") -> dict[str, Peer]:
    """Read the peers and their settings."""
    peers = {}
    for name, table in tomllib.loads(path.read_text(encoding="utf-8")).items():
        settings = tuple(Setting.read(label, arguments) for label, arguments in table["settings"].items())
        peers[name] = Peer(name, tuple(table["requirements"]), table["script"], settings)
    return peers


@dataclass(frozen=True)
class Material:
    """What all peers are given.

    Parameters
    ----------
    model : Path
    samples : Path
        A folder of archives, a sample each.
    count : int
        How many they are.
    digest : str
        Of the content of both.
    """

    model: Path
    samples: Path
    count: int
    digest: str

    @classmethod
    def lay_out(cls, model: Path, calibration: Sequence[Feeds], folder: Path) -> Material:
        """Write the calibration samples where peers find them, however the data came."""
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True)
        digest = hashlib.sha256(model.read_bytes())
        for index, feeds in enumerate(calibration):
            for name, array in sorted(feeds.items()):
                digest.update(f"{name} {array.dtype} {array.shape}\n".encode() + np.ascontiguousarray(array).tobytes())
            np.savez(folder / f"{index:06}.npz", allow_pickle=False, **feeds)
        return cls(model, folder, len(calibration), digest.hexdigest())


@dataclass(frozen=True)
class Attempt:
    """What came of one peer, one setting and one model.

    Parameters
    ----------
    model : Path, optional
        The quantized model, if there is one.
    seconds : float
        What the process took.
    failure : str, optional
        Why there is none, in one line.
    """

    model: Path | None
    seconds: float = 0.0
    failure: str | None = None


@dataclass(frozen=True)
class Workshop:
    """The folder of environments and of what was made in them.

    Parameters
    ----------
    folder : Path
    limits : Limits
    """

    folder: Path
    limits: Limits

    @cached_property
    def _interpreters(self) -> dict[str, Path | PeerError]:
        return {}

    def interpreter(self, peer: Peer) -> Path:
        """Return the Python of a peer's environment, which is made the first time that it is asked for.

        Raises
        ------
        PeerError
            If its packages cannot be installed; asked again in the same run, without another try.
        """
        if peer.name not in self._interpreters:
            try:
                self._interpreters[peer.name] = self._install(peer)
            except PeerError as error:
                self._interpreters[peer.name] = error
        found = self._interpreters[peer.name]
        if isinstance(found, PeerError):
            raise found
        return found

    def environment(self, peer: Peer) -> Path:
        """Return the folder of a peer's environment, another one for other requirements."""
        wanted = hashlib.sha256(repr((peer.requirements, sys.version_info[:2])).encode()).hexdigest()
        return self.folder / "environments" / f"{peer.name}-{wanted[:16]}"

    def _install(self, peer: Peer) -> Path:
        folder = self.environment(peer)
        python = folder / "bin" / "python"
        if not (folder / INSTALLED).exists():
            print(f"{peer.name}: installing {' '.join(peer.requirements)}", file=sys.stderr, flush=True)
            pip = [str(python), "-m", "pip", "--disable-pip-version-check"]
            _told([sys.executable, "-m", "venv", "--clear", str(folder)])
            _told([*pip, "install", "--quiet", *peer.requirements])
            (folder / INSTALLED).write_text(_told([*pip, "freeze"]), encoding="utf-8")
        return python

    def attempt(self, peer: Peer, setting: Setting, material: Material) -> Attempt:
        """Let a peer quantize a model, or return what it made of it before."""
        try:
            python = self.interpreter(peer)
        except PeerError as error:
            return Attempt(None, 0.0, str(error))
        folder = self.folder / "attempts" / self._key(peer, setting, material)
        output, record = folder / "model.onnx", folder / "attempt.json"
        limits = [self.limits.seconds, self.limits.gigabytes]
        if record.exists():
            known = json.loads(record.read_text(encoding="utf-8"))
            if known["failure"] is None:
                return Attempt(output, known["seconds"])
            if known["limits"] == limits:
                return Attempt(None, known["seconds"], known["failure"])
        folder.mkdir(parents=True, exist_ok=True)
        job = {"model": material.model.resolve(), "samples": material.samples.resolve(), "output": output.resolve()}
        told = {key: str(path) for key, path in job.items()} | {"setting": dict(setting.arguments)}
        (folder / "job.json").write_text(json.dumps(told), encoding="utf-8")
        start = time.perf_counter()
        failure = run([str(python.absolute()), str(_script(peer, setting)), "job.json"], folder, self.limits)
        if failure is None and not output.exists():
            failure = "says that it succeeded, but wrote no model"
        seconds = time.perf_counter() - start
        _tidy(folder)
        found = {"peer": peer.name, "setting": setting.name, "seconds": seconds, "failure": failure, "limits": limits}
        record.write_text(json.dumps(found), encoding="utf-8")
        return Attempt(None if failure else output, seconds, failure)

    def _key(self, peer: Peer, setting: Setting, material: Material) -> str:
        digest = hashlib.sha256(material.digest.encode())
        digest.update(json.dumps(setting.arguments, sort_keys=True).encode())
        for path in (self.environment(peer) / INSTALLED, SCRIPTS / "job.py", _script(peer, setting)):
            digest.update(path.read_bytes())
        return digest.hexdigest()[:32]


def _script(peer: Peer, setting: Setting) -> Path:
    return SCRIPTS / (setting.script or peer.script)


def _told(words: Sequence[str]) -> str:
    """Run a step of an installation and return what it says."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=LONGEST_INSTALLATION)
    except subprocess.TimeoutExpired as error:
        raise PeerError(f"does not install within {error.timeout:g} s") from error
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        raise PeerError(f"does not install: {last_line(errors[0] if errors else done.stderr)}")
    return done.stdout


def _tidy(folder: Path) -> None:
    """Remove what a peer left beside its result: copies of the model, which add up."""
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif not path.name.startswith("model.onnx") and path.suffix not in (".json", ".txt"):
            path.unlink()


def run(words: Sequence[str], folder: Path, limits: Limits) -> str | None:
    """Run a command in a folder, its output in log.txt there; return why it failed, or None.

    The whole group of processes ends with it.
    """
    space = int(limits.gigabytes * 2**30)
    with (folder / "log.txt").open("w+", encoding="utf-8", errors="replace") as log:
        process = subprocess.Popen(
            words,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (space, space)),
        )
        try:
            code = process.wait(limits.seconds)
        except subprocess.TimeoutExpired:
            return f"took more than {limits.seconds:g} s"
        finally:
            _end(process)
        log.seek(0)
        said = log.read()
    if code < 0:
        return f"ended by {signal.Signals(-code).name}"
    return None if code == 0 else last_line(said)


def _end(process: subprocess.Popen[bytes]) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


def last_line(text: str) -> str:
    """Return the last line that a program wrote, fit for a cell of a table and without this machine's paths."""
    lines = [" ".join(line.split()) for line in text.splitlines() if line.strip()]
    line = re.sub(r"(?:/[\w.+-]+)+/", "", lines[-1] if lines else "failed without a word").replace("|", "/")
    return line if len(line) <= LONGEST else f"{line[:LONGEST].rsplit(' ', 1)[0]} …"
