"""What was measured of one model under all quantizers, and what follows from it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

#: Less than this share of the time, more than these dB: what counts as faster, and as more faithful.
FASTER, MORE_FAITHFUL = 0.97, 0.3
OURS = "qcompile"


@dataclass(frozen=True)
class Row:
    """One quantizer's setting on one model.

    Parameters
    ----------
    peer, setting : str
        `OURS` for qcompile itself.
    failure : str, optional
        Why there is nothing to measure; the fields below are None then.
    sqnr : float, optional
        In dB, of the output that loses most; None if every output is float's own, minus infinity if one is broken.
    agreement : float, optional
        How often it has float's argmax, for models that classify.
    latency : float, optional
        Over float's: the median over rounds of the ratio in a round, whose runs have the same input.
    size : int, optional
        Of the file, in bytes.
    seconds : float
        What quantizing took.
    """

    peer: str
    setting: str
    failure: str | None = None
    sqnr: float | None = None
    agreement: float | None = None
    latency: float | None = None
    size: int | None = None
    seconds: float = 0.0

    @property
    def name(self) -> str:
        """Peer and setting."""
        return f"{self.peer}: {self.setting}"

    @property
    def ratio(self) -> float:
        """The latency over float's.

        Raises
        ------
        ValueError
            If it failed.
        """
        if self.latency is None:
            raise ValueError(f"{self.name} was not measured")
        return self.latency

    @property
    def decibel(self) -> float:
        """The SQNR, infinite where nothing was lost."""
        return float("inf") if self.sqnr is None else self.sqnr


@dataclass(frozen=True)
class Result:
    """All rows of one model.

    Parameters
    ----------
    model : str
    machine : str
    versions : tuple of str
        Of the peers.
    float_ms : float
    float_bytes : int
    calibrated, evaluated, rounds : int
        Samples of either kind, and how often each contender was timed.
    rows : tuple of Row
        qcompile's default first.
    """

    model: str
    machine: str
    versions: tuple[str, ...]
    float_ms: float
    float_bytes: int
    calibrated: int
    evaluated: int
    rounds: int
    rows: tuple[Row, ...]

    @property
    def ours(self) -> Row:
        """The row of qcompile's default."""
        return self.rows[0]

    def save(self, path: Path) -> None:
        """Write it, so that a page of several models can be written again when one was measured anew."""
        rows = [{key: value for key, value in asdict(row).items() if value is not None} for row in self.rows]
        path.write_text(json.dumps(asdict(self) | {"rows": rows}, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Result:
        """Read what `save` wrote."""
        table: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        rows = tuple(Row(**row) for row in table["rows"])
        return cls(**(table | {"rows": rows, "versions": tuple(table["versions"])}))


@dataclass(frozen=True)
class Verdict:
    """Whether qcompile's default stands.

    Parameters
    ----------
    failure : str, optional
        Why there is no default to judge.
    slower : bool
        Whether float is faster than it.
    better : tuple of Row
        What is both faster and more faithful.
    """

    failure: str | None
    slower: bool
    better: tuple[Row, ...]

    @property
    def holds(self) -> bool:
        """No setting is both faster and more faithful, and float is not faster."""
        return not (self.failure or self.slower or self.better)


def is_better(row: Row, ours: Row) -> bool:
    """Tell whether a row is both faster and more faithful than ours, each by more than noise."""
    if row.latency is None or ours.latency is None:
        return False
    return row.latency < FASTER * ours.latency and row.decibel > ours.decibel + MORE_FAITHFUL


def judge(result: Result) -> Verdict:
    """Hold qcompile's default to all that was measured beside it."""
    ours = result.ours
    if ours.latency is None:
        return Verdict(ours.failure or "was not measured", False, ())
    better = tuple(row for row in result.rows[1:] if row.peer != OURS and is_better(row, ours))
    return Verdict(None, ours.latency * FASTER > 1.0, better)
