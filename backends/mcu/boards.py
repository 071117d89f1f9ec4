"""Boards: what memory there is. A TOML file in boards/ is one."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from qcompile.core.errors import TargetError, UsageError
from qcompile.core.target import Target


@dataclass(frozen=True)
class Board:
    """A board.

    Parameters
    ----------
    name, summary : str
    target : str
        The target that its processor is.
    sram_bytes, flash_bytes : int
        What a program can have in one piece.
    """

    name: str
    summary: str
    target: str
    sram_bytes: int
    flash_bytes: int


@dataclass(frozen=True)
class Limits:
    """What the network may take; None where nothing is said.

    Parameters
    ----------
    sram_bytes, flash_bytes : int, optional
    sram_place, flash_place : str
        Who says so, for messages.
    """

    sram_bytes: int | None = None
    flash_bytes: int | None = None
    sram_place: str = ""
    flash_place: str = ""

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Limits:
        """Return the tighter of a board's and the user's bounds; see `with_limits`."""
        board = find_board(settings["board"]) if settings.get("board") else None
        found: dict[str, Any] = {}
        for kind in ("sram", "flash"):
            asked = settings.get(f"max_{kind}")
            given = [] if asked is None else [(asked, f"--max-{kind}")]
            given += [] if board is None else [(getattr(board, f"{kind}_bytes"), f"--board {board.name}")]
            if given:
                found[f"{kind}_bytes"], found[f"{kind}_place"] = min(given)
        return cls(**found)


def boards() -> dict[str, Board]:
    """Return the boards by name."""
    found = {}
    for entry in sorted((files("qcompile.backends.mcu") / "boards").iterdir(), key=lambda entry: entry.name):
        if entry.name.endswith(".toml"):
            try:
                board = Board(**tomllib.loads(entry.read_text(encoding="utf-8")))
            except (ValueError, TypeError) as error:
                raise TargetError(entry.name, f"is not a board file ({error})", "see docs/targets/mcu.md") from error
            found[board.name] = board
    return found


def find_board(name: str) -> Board:
    """Return a board by name.

    Raises
    ------
    UsageError
        If there is none.
    """
    known = boards()
    if name not in known:
        raise UsageError(f"--board {name}", "there is no such board", f"use one of {', '.join(known)}")
    return known[name]


def check_board(name: str, target: Target) -> None:
    """Refuse a board whose processor is not the target's.

    Raises
    ------
    UsageError
        Naming the target that it is.
    """
    board = find_board(name)
    if board.target != target.name:
        raise UsageError(f"--board {name}", f"has a {board.target}, not a {target.name}", f"--target {board.target}")
