"""The output folder: staged beside its place, listed in a manifest, and put there whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from qcompile.core.errors import UsageError
from qcompile.core.plan import QuantPlan
from qcompile.options import Options

MANIFEST = "manifest.json"
#: What depends on the machine, the moment, or whether a plan was made or given, and is not listed with a checksum.
UNSETTLED = ("measurements.json", "distributions.json", "report.html")


@contextlib.contextmanager
def staged(output: Path) -> Iterator[Path]:
    """Give a folder to write into; when all went well it becomes `output`, else it disappears.

    An earlier artifact at `output` is replaced; anything else there is left alone.

    Raises
    ------
    UsageError
        If `output` holds something that qcompile did not write, or cannot be written.
    """
    check_replaceable(output)
    staging: Path | None = None
    try:
        output.absolute().parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.absolute().parent))
        staging.chmod(0o777 & ~_umask())
        yield staging
        _publish(staging, output)
    except OSError as error:
        fact = f"cannot be written ({error.strerror or error})"
        raise UsageError(output, fact, "free some space or choose another folder with -o") from error
    finally:
        if staging is not None and staging.exists():
            shutil.rmtree(staging, ignore_errors=True)


def place(source: object, options: Options) -> Path:
    """Return the output folder: the one asked for, or ``<model>-<target>`` in the working directory.

    Raises
    ------
    UsageError
        If something else is in its place.
    """
    stem = Path(source).stem if isinstance(source, str | Path) else "model"
    output = options.output or Path(f"{stem}-{options.target.replace(':', '-')}")
    check_replaceable(output)
    return output


def check_replaceable(output: Path) -> None:
    """Refuse an output folder that holds anything but an earlier artifact.

    Raises
    ------
    UsageError
        Naming what is in the way.
    """
    if not output.exists() and not output.is_symlink():
        return
    remedy = "remove it or choose another folder with -o"
    if not output.is_dir() or output.is_symlink():
        raise UsageError(output, "is no folder", remedy)
    try:
        if not (output / MANIFEST).is_file():  # not ours: one look is enough, it may be a home folder
            present, listed = {path.name for path in output.iterdir()}, set()
        else:
            present = {str(path.relative_to(output)) for path in output.rglob("*") if not path.is_dir()}
            listed = set(json.loads((output / MANIFEST).read_text())["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(output, f"exists, and its {MANIFEST} cannot be read ({error})", remedy) from error
    if foreign := sorted(present - listed - {MANIFEST, *UNSETTLED}):
        raise UsageError(output, f"exists and holds '{foreign[0]}', which qcompile did not write", remedy)


def _publish(staging: Path, output: Path) -> None:
    """Move the staged folder into place, an earlier artifact out of the way first."""
    for file in staging.rglob("*"):
        if file.is_file():
            with file.open("rb") as stream:
                os.fsync(stream.fileno())
    if not output.exists():
        staging.rename(output)
        return
    retired = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.absolute().parent))
    try:
        output.rename(retired / "old")
        try:
            staging.rename(output)
        except OSError:
            (retired / "old").rename(output)
            raise
    finally:
        shutil.rmtree(retired, ignore_errors=True)


def check_own(path: Path, read: Callable[[Path], object]) -> None:
    """Refuse a file that holds anything but what an earlier run of the same stage wrote there.

    Parameters
    ----------
    path : Path
    read : callable
        Reads such a file; raises `UsageError` if it is none.

    Raises
    ------
    UsageError
        Naming what is in the way.
    """
    remedy = "remove it or name another file with -o"
    if (path.parent / MANIFEST).exists():
        raise UsageError(path, "lies in an artifact, whose manifest would no longer fit", "name another file with -o")
    if path.is_symlink() or path.is_dir():
        raise UsageError(path, "is no file", remedy)
    if path.exists():
        try:
            read(path)
        except UsageError as error:
            raise UsageError(path, "exists, and is not what would be written there", remedy) from error


def write_file(path: Path, content: bytes) -> None:
    """Write a file, whole or not at all.

    Raises
    ------
    UsageError
        If it cannot be written.
    """
    staging: Path | None = None
    try:
        path.absolute().parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.absolute().parent, prefix=f".{path.name}-", delete=False) as file:
            staging = Path(file.name)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        staging.chmod(0o666 & ~_umask())
        staging.replace(path)
    except OSError as error:
        fact = f"cannot be written ({error.strerror or error})"
        raise UsageError(path, fact, "free some space or name another file with -o") from error
    finally:
        if staging is not None:
            staging.unlink(missing_ok=True)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON that reads well and is the same text for the same content."""
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def write(
    folder: Path,
    plan: QuantPlan,
    report: Mapping[str, Any],
    distributions: Mapping[str, Any],
    measurements: Mapping[str, Any],
) -> None:
    """Write what stands beside the model: plan, report, distributions, measurements and manifest."""
    (folder / "plan.json").write_text(plan.to_json(), encoding="utf-8")
    write_json(folder / "report.json", report)
    (folder / "distributions.json").write_text(_by_line(distributions), encoding="utf-8")
    write_json(folder / "measurements.json", measurements)
    write_manifest(folder, {key: report[key] for key in ("qcompile", "target", "model", "data", "options", "versions")})


def _by_line(distributions: Mapping[str, Any]) -> str:
    """Return JSON with a tensor a line: a number a line would be thousands."""
    rows = [f"  {json.dumps(name)}: {json.dumps(content)}" for name, content in distributions["tensors"].items()]
    body = "{\n" + ",\n".join(rows) + "\n }" if rows else "{}"
    return f'{{\n "schema_version": {distributions["schema_version"]},\n "tensors": {body}\n}}\n'


def write_manifest(folder: Path, content: Mapping[str, Any]) -> None:
    """List the settled files with size and SHA-256 beside what went into them."""
    listing = {}
    for file in sorted(folder.rglob("*")):
        name = str(file.relative_to(folder))
        if file.is_file() and name not in UNSETTLED and name != MANIFEST:
            listing[name] = {"bytes": file.stat().st_size, "sha256": sha256_of(file)}
    write_json(folder / MANIFEST, {**content, "files": listing})


def sha256_of(path: Path) -> str:
    """Return the checksum of a file's content, in hexadecimal digits."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
