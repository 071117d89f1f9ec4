"""What compiles leave behind, as end-to-end tests look at it."""

from __future__ import annotations

import json
from pathlib import Path


def settled(folder: Path) -> dict[str, bytes]:
    """Return all that must be the same bytes for the same inputs."""
    unsettled = ("measurements.json", "report.html")
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in unsettled}


def report(done) -> dict:
    assert done.code == 0, done
    return json.loads(done.out)["report"]


def sqnr(content: dict) -> float:
    return content["fidelity"]["outputs"]["y"]["sqnr"]
