"""A lock file: what an artifact was made from, and what came of it, so that nothing is compiled when nothing changed.

It is the artifact's manifest, kept where it can be committed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from qcompile import artifact, cache, report
from qcompile.core.contract import Track
from qcompile.core.errors import UsageError, VerificationError
from qcompile.driver import CompileResult
from qcompile.driver import compile as compile_model
from qcompile.job import Job
from qcompile.options import Options
from qcompile.read_report import require_whole


def compile_locked(model: Path, options: Options, lock: Path, frozen: bool, track: Track[Any]) -> CompileResult | None:
    """Compile if something changed since the lock was written, and write it anew.

    Parameters
    ----------
    model : Path
    options : Options
    lock : Path
    frozen : bool
        Refuse to compile anything but what is locked, and leave the lock as it is.
    track : callable

    Returns
    -------
    CompileResult or None
        None where the artifact is there and whole, and nothing that it was made from changed.

    Raises
    ------
    UsageError
        If the lock cannot be read, or it is to be kept and something changed.
    VerificationError
        If what is locked came out with other bytes.
    """
    locked, output = _read(lock), artifact.place(model, options)
    if frozen and locked is None:
        raise UsageError(lock, "does not exist", "write it by a compile without --locked")
    if locked is not None:
        changed = list(_changes(locked, Job.begin(model, options, track)))
        if frozen and changed:
            raise UsageError(lock, f"is of something else: {'; '.join(changed)}", "compile without --locked")
        if not changed and _holds(output, locked):
            return None
    result = compile_model(model, options, track)
    made = _manifest(output)
    if not frozen:
        artifact.write_file(lock, (output / artifact.MANIFEST).read_bytes())
    elif other := [name for name, entry in (locked or made)["files"].items() if made["files"].get(name) != entry]:
        fact = f"'{other[0]}' came out with other bytes than are locked, from the same inputs"
        raise VerificationError(output, fact, "compare the machines; compile without --locked to accept it")
    return result


def _changes(locked: Mapping[str, Any], job: Job) -> Iterator[str]:
    """Yield what a compile would be made from now that is not what is locked."""
    if locked["model"]["sha256"] != report.describe(job.model)["sha256"]:
        yield "the model is another"
    if locked["data"]["sha256"] != cache.key(job.evidence.digest):
        yield "the data are others"
    for what, now in (("options", job.options.decisive()), ("versions", cache.versions())):
        for name in sorted({*now, *locked[what]}):
            before, after = locked[what].get(name), json.loads(json.dumps(now.get(name)))
            if before != after:
                yield f"{name} was {before}, is {after}"


def _holds(output: Path, locked: Mapping[str, Any]) -> bool:
    """Tell whether a folder has just what is locked."""
    try:
        require_whole(output)
        return _manifest(output) == locked
    except UsageError:
        return False


def _manifest(folder: Path) -> dict[str, Any]:
    return json.loads((folder / artifact.MANIFEST).read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def _read(lock: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(lock.read_text(encoding="utf-8"))
        if not {"model", "data", "options", "versions", "files"} <= set(content):
            raise ValueError("keys are missing")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        raise UsageError(lock, f"is no lock of qcompile ({error})", "name another file, or remove it") from error
    return content  # type: ignore[no-any-return]
