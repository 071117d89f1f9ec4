"""Write docs/licences.md: the licence of everything that qcompile requires or carries.

    python .ci/licences.py

Versions are those of .ci/requirements.lock, and the newest of what that does not have. uv resolves them, and pip reads
the metadata of what it would install; neither installs anything.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

from dependencies import ROOT, Package, bundled, project, reached
from packaging.utils import canonicalize_name

LOCK = ROOT / ".ci/requirements.lock"
PAGE = ROOT / "docs/licences.md"
HEAD = """# Licences

Written by `python .ci/licences.py`; do not edit. qcompile is Apache-2.0.

## What the wheel carries

| what | version | licence |
|---|---|---|
"""
DATA = """
## What the repository carries beside it

None of it is in the wheel. [models/NOTICE](../models/NOTICE) has the texts, and says what the `LicenseRef-` names are.

| file | licence | origin |
|---|---|---|
"""
PACKAGES = """
## What is installed with it

By their own metadata, on Linux with Python {python}. *Wanted by* are extras; `qcompile` is what everybody gets.

| package | version | licence | wanted by |
|---|---|---|---|
"""


def pinned() -> str:
    """Return the lock as constraints: pip takes hashes for requirements alone."""
    lines = LOCK.read_text(encoding="utf-8").splitlines()
    return "\n".join(line.removesuffix("\\").strip() for line in lines if re.match(r"[a-z0-9]", line)) + "\n"


def resolved(extras: list[str]) -> dict[str, Package]:
    """Return what would be installed, by normalized name: resolved by uv, described by pip."""
    with tempfile.TemporaryDirectory() as name:
        constraints, exact, report = (Path(name, file) for file in ("constraints.txt", "exact.txt", "report.json"))
        constraints.write_text(pinned(), encoding="utf-8")
        subprocess.run([sys.executable, "-m", "venv", f"{name}/env"], check=True)
        python = [f"{name}/env/bin/python", "-m"]
        subprocess.run([*python, "pip", "install", "--quiet", "--upgrade", "pip", "uv"], check=True)
        words = [*python, "uv", "pip", "compile", "--quiet", "--output-file", str(exact), "--generate-hashes"]
        words += ["--constraint", str(constraints), *(f"--extra={extra}" for extra in extras), "pyproject.toml"]
        subprocess.run(words, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
        words = [*python, "pip", "install", "--dry-run", "--no-deps", "--ignore-installed", "--quiet"]
        subprocess.run([*words, "--report", str(report), "--requirement", str(exact)], check=True)
        entries = json.loads(report.read_text(encoding="utf-8"))["install"]
    packages = (Package.of(entry["metadata"]) for entry in entries)
    return {canonicalize_name(package.name): package for package in packages}


def main() -> None:
    """Write the page."""
    extras = list(project()["optional-dependencies"])
    packages = resolved(extras)
    wanted: dict[str, list[str]] = {}
    for extra in ("", *extras):
        for name in reached(packages, [extra] if extra else []):
            if name != "qcompile" and wanted.get(name) != ["qcompile"]:
                wanted.setdefault(name, []).append(extra or "qcompile")
    catalog = tomllib.loads((ROOT / "models/catalog.toml").read_text(encoding="utf-8"))
    text = HEAD + "".join(f"| {' | '.join(entry)} |\n" for entry in bundled()) + DATA
    for entry in catalog["committed"]:
        file = f"models/{entry['file']}".replace("models/../", "")
        text += f"| {file} | {entry['licence']} | {entry['origin'].partition(':')[0]} |\n"
    text += PACKAGES.format(python=f"{sys.version_info.major}.{sys.version_info.minor}")
    for name in sorted(wanted):
        package = packages[name]
        text += f"| {package.name} | {package.version} | {package.licence} | {', '.join(wanted[name])} |\n"
    PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
