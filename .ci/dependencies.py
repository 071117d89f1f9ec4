"""Packages, what they require and under which licence they stand, by their own metadata."""

from __future__ import annotations

import importlib.metadata
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
#: Licences that are told as a text have more characters than a name.
LONGEST_NAME = 40


@dataclass(frozen=True)
class Package:
    """One distribution: its licence, and its requirements as they are written there."""

    name: str
    version: str
    licence: str
    requires: tuple[str, ...]

    @classmethod
    def of(cls, metadata: Mapping[str, Any]) -> Package:
        """Read the core metadata in the form that JSON has of it (PEP 566)."""
        told = metadata.get("license") or ""
        classified = (entry for entry in metadata.get("classifier", ()) if entry.startswith("License ::"))
        names = " and ".join(entry.rpartition(" :: ")[2] for entry in classified)
        named = (
            metadata.get("license_expression") or (told if len(told) <= LONGEST_NAME else "") or names or "not stated"
        )
        return cls(metadata["name"], metadata["version"], named, tuple(metadata.get("requires_dist", ())))


def installed() -> dict[str, Package]:
    """Return what is installed here, by normalized name."""
    found = (Package.of(each.metadata.json) for each in importlib.metadata.distributions())
    return {canonicalize_name(package.name): package for package in found}


def bundled() -> list[tuple[str, str, str]]:
    """Return name, version and licence of what the wheel carries of others."""
    head = (ROOT / "qcompile/web/chart.umd.min.js").read_text(encoding="utf-8")[:200]
    [version] = [line.rpartition(" v")[2].strip() for line in head.splitlines() if "Chart.js v" in line]
    assert "MIT License" in head
    return [("Chart.js", version, "MIT")]


def project() -> dict[str, Any]:
    """Return what pyproject.toml tells of the project."""
    table: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return table


def reached(packages: Mapping[str, Package], extras: Iterable[str]) -> dict[str, set[str]]:
    """Return what qcompile requires with some extras, directly or not: names, and for each those that it requires."""
    table = project()
    wanted = [*table["dependencies"], *(line for extra in extras for line in table["optional-dependencies"][extra])]
    found: dict[str, set[str]] = {}
    seen: set[tuple[str, str]] = set()
    queue = [("qcompile", Requirement(line), "") for line in wanted]
    while queue:
        reader, requirement, extra = queue.pop()
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
            continue
        name = canonicalize_name(requirement.name)
        found.setdefault(reader, set()).add(name)
        for asked in ("", *requirement.extras):
            if (name, asked) in seen:
                continue
            seen.add((name, asked))
            lines = table["optional-dependencies"][asked] if name == "qcompile" and asked else ()
            if name != "qcompile":
                found.setdefault(name, set())
                lines = packages[name].requires
            queue += [(name, Requirement(line), asked) for line in lines]
    return {name: {each for each in needs if each != "qcompile"} for name, needs in found.items()}
