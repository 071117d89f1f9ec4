"""A folder of finished stages, addressed by what went into them, so that a compile that was cut off can go on."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import os
import tempfile
from collections.abc import Iterable
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path

import qcompile
from qcompile.core.errors import UsageError

#: Distributions whose version can change what a stage computes.
INGREDIENTS = ("ml_dtypes", "numpy", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "onnxruntime-gpu")


class Cache:
    """Entries under keys; an entry that is damaged is as good as none.

    Parameters
    ----------
    folder : Path
        Made if it does not exist.

    Raises
    ------
    UsageError
        If it cannot be made.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.failure = ""
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(
                f"--cache {folder}", f"cannot be used ({error.strerror})", "name another folder"
            ) from error

    def get(self, key: str) -> bytes | None:
        """Return an entry's content, or None if there is none or its checksum does not fit."""
        try:
            content = self._path(key).read_bytes()
        except OSError:
            return None
        checksum, payload = content[:32], content[32:]
        return payload if _checksum(key, payload) == checksum else None

    def put(self, key: str, payload: bytes) -> None:
        """Store an entry; it appears whole or not at all. A folder that takes no entry is noted, not raised."""
        path = self._path(key)
        try:
            path.parent.mkdir(exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".", delete=False) as file:
                try:
                    file.write(_checksum(key, payload) + payload)
                    file.flush()
                    os.fsync(file.fileno())
                    Path(file.name).replace(path)
                except OSError:
                    with contextlib.suppress(OSError):
                        Path(file.name).unlink()
                    raise
        except OSError as error:
            self.failure = f"{self.folder}: {error.strerror or error}"

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / key


def _checksum(key: str, payload: bytes) -> bytes:
    """Return a hash that tells of both: an entry under another's name is damaged too."""
    return hashlib.sha256(key.encode() + payload).digest()


def open_cache(folder: Path | None) -> Cache | None:
    """Open the cache that the user asked for, if any."""
    return None if folder is None else Cache(folder)


def key(*parts: str) -> str:
    """Return the key for a list of ingredients; no two lists run together."""
    return hashlib.sha256(b"\0".join(hashlib.sha256(part.encode()).digest() for part in parts)).hexdigest()


def versions() -> dict[str, str]:
    """Return the versions of the installed libraries that take part in a compile."""
    found = {"qcompile": qcompile.__version__}
    for name in INGREDIENTS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


@functools.cache
def code_digest() -> str:
    """Return a hash over qcompile's own sources: a changed pass must not find its old results."""
    digest = hashlib.sha256()
    for file in sorted(_sources(files("qcompile")), key=str):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def identity() -> str:
    """Return a key for our sources and libraries: who has the same computes the same, on the same kind of processor."""
    return key(code_digest(), *(f"{name} {version}" for name, version in sorted(versions().items())))


def _sources(folder: Traversable) -> Iterable[Traversable]:
    for entry in folder.iterdir():
        if entry.is_dir():
            yield from _sources(entry)
        elif entry.name.endswith((".py", ".toml")):
            yield entry
