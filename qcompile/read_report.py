"""Read what an earlier compile wrote: a report, wherever it was kept, and the folder it belongs to."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qcompile.artifact import MANIFEST, sha256_of
from qcompile.core.errors import UsageError
from qcompile.report import SCHEMA_VERSION

REPORT = "report.json"


def read_report(place: Path) -> Mapping[str, Any]:
    """Return a report.

    Parameters
    ----------
    place : Path
        The file, or the artifact's folder.

    Raises
    ------
    UsageError
        If there is none, or it is of another version of the format.
    """
    file = place / REPORT if place.is_dir() else place
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        remedy = "give the folder that a compile wrote, or its report.json"
        raise UsageError(file, f"cannot be read ({error.strerror})", remedy) from error
    except ValueError as error:
        raise UsageError(file, "is no JSON, or is cut off", "compile again") from error
    if not isinstance(content, dict) or not {"target", "files", "operators", "fidelity", "size"} <= set(content):
        raise UsageError(file, "is no report of a compile", "give the folder that a compile wrote, or its report.json")
    if content.get("schema_version") != SCHEMA_VERSION:
        fact = f"has schema version {content.get('schema_version')}, this release reads {SCHEMA_VERSION}"
        raise UsageError(file, fact, "compile again with this release")
    return content


def require_whole(folder: Path) -> None:
    """Hold an artifact's files to its manifest.

    Raises
    ------
    UsageError
        Naming the first file that is not what was written.
    """
    remedy = "compile again"
    try:
        listed = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        for name, entry in listed.items():
            if not (folder / name).is_file():
                raise UsageError(folder / name, "is missing, though the manifest lists it", remedy)
            if sha256_of(folder / name) != entry["sha256"]:
                raise UsageError(folder / name, "is not what the compile wrote: its checksum differs", remedy)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(folder, f"has no {MANIFEST} that can be read", "give the folder of an artifact") from error
