"""Trials that workers are given by tests: functions of a module, for other processes to import."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path

from qcompile.core.errors import ModelError


def times(factor: int, trials: Mapping[str, int]) -> dict[str, tuple[int, int]]:
    """Return each number times the factor, and who found it."""
    return {name: (factor * number, os.getpid()) for name, number in trials.items()}


def counts(content: bytes, trials: Mapping[str, int]) -> dict[str, int]:
    """Return how many bytes arrived."""
    return dict.fromkeys(trials, len(content))


def dies_once(marker: Path, trials: Mapping[str, int]) -> dict[str, int]:
    """End the process the first time that somebody is asked for the number 3."""
    if 3 in trials.values() and not marker.exists():
        marker.touch()
        os._exit(9)
    return dict(trials)


def dies(trials: Mapping[str, int]) -> dict[str, int]:
    """End the process whenever somebody is asked for the number 3."""
    if 3 in trials.values():
        os._exit(9)
    return dict(trials)


def fails(trials: Mapping[str, int]) -> dict[str, int]:
    """Raise what a model that does not load raises."""
    raise ModelError("model", "does not load", "export it again")


def waits(folder: Path, trials: Mapping[str, int]) -> dict[str, int]:
    """Tell who waits, and wait."""
    (folder / str(os.getpid())).touch()
    time.sleep(600.0)
    return {}


def somebody() -> str:
    """Return another identity in every process."""
    return str(os.getpid())
