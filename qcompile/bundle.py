"""Bundles: artifacts of one model with inputs, what the float model makes of these, and what runs them on a device."""

from __future__ import annotations

import json
import shutil
import stat
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import onnx_ir as ir

from qcompile import artifact
from qcompile.backends.base import find_target
from qcompile.calib.data import input_specs, open_data
from qcompile.core import model as models
from qcompile.core import runtime
from qcompile.core.errors import QcompileError, UsageError
from qcompile.read_report import read_report, require_whole

SCHEMA_VERSION = 1
DESCRIPTION, RUNNER = "bundle.json", "runner.py"
SUFFIX = ".qbundle"
#: What a device loads of each backend's artifact.
KINDS = {"ort": "onnx", "cpu": "library", "mcu": "package"}
#: Every member's time: the same content gives the same bytes.
EPOCH = (1980, 1, 1, 0, 0, 0)


@dataclass(frozen=True)
class Failed:
    """An artifact that cannot be packed, and why."""

    output: Path
    reason: str


def fill(
    folder: Path, outputs: Sequence[Path], model: Path, data: str, count: int
) -> tuple[dict[str, Any], list[Failed]]:
    """Put into an empty folder what a device needs.

    Parameters
    ----------
    folder : Path
    outputs : sequence of Path
        What compiles of one model wrote.
    model : Path
        That model.
    data : str
        As ``--data`` of a compile.
    count : int
        Samples at most.

    Returns
    -------
    dict, list of Failed
        What `bundle.json` holds, and the artifacts that are not in it.

    Raises
    ------
    QcompileError
        If the model or the data cannot be used.
    """
    loaded = models.load(model)
    pairs = list(islice(open_data(data, input_specs(loaded)).labelled(), count))
    samples, reference = [feeds for feeds, _ in pairs], runtime.Session(loaded)
    _save(folder / "inputs.npz", samples)
    _save(folder / "expected.npz", [reference.run(feeds) for feeds in samples])
    digest, failed = models.content_hash(loaded), list[Failed]()
    packed = [_float(folder, loaded, model)]
    for output in outputs:
        try:
            packed.append(_pack(folder, output, digest, len(packed)))
        except QcompileError as error:
            failed.append(Failed(output, f"{error.fact}; {error.remedy}"))
    shutil.copyfile(str(files("qcompile") / RUNNER), folder / RUNNER)
    content = {
        "schema_version": SCHEMA_VERSION,
        "model_sha256": digest,
        "labels": [label for _, label in pairs],
        "artifacts": packed,
    }
    artifact.write_json(folder / DESCRIPTION, content)
    return content, failed


def write(file: Path, folder: Path) -> None:
    """Write a filled folder as one file, the same bytes for the same content.

    Raises
    ------
    UsageError
        If it cannot be written.
    """
    with tempfile.TemporaryFile() as stream:
        with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
            for path in sorted(path for path in folder.rglob("*") if path.is_file()):
                member = zipfile.ZipInfo(path.relative_to(folder).as_posix(), EPOCH)
                member.compress_type, member.external_attr = zipfile.ZIP_DEFLATED, (stat.S_IFREG | 0o644) << 16
                archive.writestr(member, path.read_bytes())
        stream.seek(0)
        artifact.write_file(file, stream.read())


@contextmanager
def opened(file: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Give a bundle's folder and description.

    Raises
    ------
    UsageError
        If it is no bundle, or holds a name that leaves its folder.
    """
    remedy = "write it anew with 'qcompile bundle'"
    with tempfile.TemporaryDirectory(prefix="qcompile-") as temporary:
        folder = Path(temporary)
        try:
            with zipfile.ZipFile(file) as archive:
                for member in archive.infolist():
                    name = PurePosixPath(member.filename)
                    if name.is_absolute() or ".." in name.parts or "\\" in member.filename or _is_link(member):
                        raise UsageError(file, f"holds '{member.filename}', which leaves its folder", remedy)
                archive.extractall(folder)
            content = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
            if content["schema_version"] != SCHEMA_VERSION:
                fact = f"has schema version {content['schema_version']}, this release reads {SCHEMA_VERSION}"
                raise UsageError(file, fact, remedy)
        except (OSError, zipfile.BadZipFile, ValueError, KeyError, TypeError) as error:
            raise UsageError(file, f"is no bundle ({error})", remedy) from error
        yield folder, content


def _is_link(member: zipfile.ZipInfo) -> bool:
    return stat.S_ISLNK(member.external_attr >> 16)


def _float(folder: Path, loaded: ir.Model, model: Path) -> dict[str, Any]:
    place = folder / "artifacts/0"
    place.mkdir(parents=True)
    models.save(loaded, place / "model.onnx")
    size = models.file_bytes(loaded)
    return {"name": str(model), "target": "float", "kind": "onnx", "entry": "model.onnx", "bytes": size,
            "folder": "artifacts/0"}  # fmt: skip


def _pack(folder: Path, output: Path, model: str, index: int) -> dict[str, Any]:
    require_whole(output)
    report = read_report(output)
    if report["model"]["sha256"] != model:
        raise UsageError(output, "was compiled from another model", "give the model that it was compiled from")
    target, backend = find_target(report["target"])
    if backend.name not in KINDS:
        raise UsageError(output, f"is of backend '{backend.name}', which no runner loads", "leave it out")
    place = folder / f"artifacts/{index}"
    place.mkdir(parents=True)
    for name in report["files"]:
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(output / name, place / name)
    return {"name": str(output), "target": target.name, "kind": KINDS[backend.name], "entry": report["files"][0],
            "bytes": report["size"]["artifact_bytes"], "folder": f"artifacts/{index}",
            **({"device": target.device} if target.device else _architecture(place))}  # fmt: skip


def _architecture(artifact: Path) -> dict[str, str]:
    """Return what machine an artifact is for, what of it runs alone, and which runtime it needs, where it says so."""
    try:
        about = json.loads((artifact / "network.json").read_text(encoding="utf-8"))
        found = {"architecture": str(about["architecture"])}
        if "segments" in about:
            return found | {"needs": "onnxruntime"}
        return found | ({"executable": str(about["executable"])} if about.get("executable") else {})
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _save(file: Path, samples: Sequence[Mapping[str, Any]]) -> None:
    arrays = {f"{index}/{name}": array for index, each in enumerate(samples) for name, array in each.items()}
    np.savez_compressed(file, **arrays)
