"""Hold an artifact to the report of an earlier one: what got larger, slower or less faithful than it may."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from math import copysign, inf, isfinite, isinf, isnan, nan
from pathlib import Path
from typing import Any

from qcompile.core.errors import BudgetError, UsageError
from qcompile.read_report import read_report, require_whole

Report = Mapping[str, Any]


@dataclass(frozen=True)
class Figure:
    """One number, then and now.

    Parameters
    ----------
    name, unit : str
    before, now : float
        An SQNR is infinite where the outputs are equal to the last bit, and no number where it is undefined.
    grows : bool
        Whether more of it is worse.
    """

    name: str
    unit: str
    before: float
    now: float
    grows: bool

    @property
    def worse_by(self) -> float:
        """By what part of the earlier number it got worse; below 0 where it got better."""
        if self.before == self.now or isnan(self.before):
            return 0.0
        if isnan(self.now) or isinf(self.before):
            return inf
        change = self.now - self.before if self.grows else self.before - self.now
        return change / abs(self.before) if self.before else copysign(inf, change)

    def as_json(self) -> dict[str, Any]:
        """Return it JSON-ready: null is what is no finite number."""
        content = asdict(self) | {"worse_by": self.worse_by}
        return {key: None if isinstance(value, float) and not isfinite(value) else value
                for key, value in content.items()}  # fmt: skip


@dataclass(frozen=True)
class Checked:
    """An artifact beside an earlier report.

    Parameters
    ----------
    output : Path
    figures : tuple of Figure
    notes : tuple of str
        What makes figures hard to compare.
    allowed : float
        By what part of itself a figure may be worse.
    """

    output: Path
    figures: tuple[Figure, ...]
    notes: tuple[str, ...]
    allowed: float

    @property
    def worse(self) -> tuple[Figure, ...]:
        """The figures that got worse by more than is allowed."""
        return tuple(figure for figure in self.figures if figure.worse_by > self.allowed)

    def as_json(self) -> dict[str, Any]:
        """Return it JSON-ready."""
        figures = [one.as_json() | {"too_much": one in self.worse} for one in self.figures]
        return {"output": str(self.output), "allowed": self.allowed, "notes": list(self.notes), "figures": figures}

    def require(self) -> None:
        """Raise where something got worse.

        Raises
        ------
        BudgetError
            Naming every such figure.
        """
        if not self.worse:
            return
        facts = ", ".join(f"{one.name} {text(one.now, one.unit)}, was {text(one.before, one.unit)}"
                          for one in self.worse)  # fmt: skip
        fact = f"worse than the earlier report by more than {self.allowed:.3g} of it: {facts}"
        remedy = "find out why, or commit the new report.json if that is wanted"
        raise BudgetError(self.output, fact, remedy)


def check(output: Path, against: Path, allowed: float) -> Checked:
    """Compare an artifact with an earlier report: size, predicted latency, and the fidelity of every output.

    Parameters
    ----------
    output : Path
        The artifact's folder; its files are held to its manifest first.
    against : Path
        The earlier report.json, or the folder that it lies in.
    allowed : float
        By what part of the earlier figure a later one may be worse.

    Raises
    ------
    UsageError
        If one of them cannot be read, or they are of different targets or outputs.
    """
    require_whole(output)
    before, now = read_report(against), read_report(output)
    if before["target"] != now["target"]:
        fact = f"is of target {before['target']}, {output} of {now['target']}"
        raise UsageError(against, fact, "compare artifacts of one target")
    outputs = before["fidelity"]["outputs"], now["fidelity"]["outputs"]
    if gone := [name for name in outputs[0] if name not in outputs[1]]:
        raise UsageError(output, f"has no output '{gone[0]}'", "commit the report of the model as it is now")
    return Checked(output, tuple(_figures(before, now)), tuple(_notes(before, now)), allowed)


def earlier(output: Path) -> Report | None:
    """Return the report of the artifact that is at a place, if there is one that can be read."""
    try:
        return read_report(output)
    except UsageError:
        return None


def changes(before: Report | None, now: Report) -> tuple[Figure, ...]:
    """Return the figures of an earlier report beside a later one's; none where they are not of one thing."""
    if before is None or before["target"] != now["target"] or before["model"]["sha256"] != now["model"]["sha256"]:
        return ()
    return tuple(_figures(before, now))


def _figures(before: Report, now: Report) -> Iterator[Figure]:
    yield Figure("size", "bytes", before["size"]["artifact_bytes"], now["size"]["artifact_bytes"], grows=True)
    if before["predicted_latency"] and now["predicted_latency"]:
        then, later = (report["predicted_latency"]["artifact_us"] for report in (before, now))
        yield Figure("predicted latency", "us", then, later, grows=True)
    accuracies = [report["fidelity"]["accuracy"] for report in (before, now)]
    if all(accuracies):
        then, later = (accuracy["artifact_correct"] / accuracy["labelled"] for accuracy in accuracies)
        yield Figure("accuracy", "", then, later, grows=False)
    for name, measures in before["fidelity"]["outputs"].items():
        measured = now["fidelity"]["outputs"][name]
        if measures["equal"] is None:
            yield Figure(f"SQNR of {name}", "dB", _decibels(measures), _decibels(measured), grows=False)
        for key, label in (("top1", "same argmax"), ("equal", "equal values")):
            if measures[key] is not None:
                yield Figure(f"{label} of {name}", "", measures[key], _number(measured[key]), grows=False)


def _decibels(measures: Report) -> float:
    return inf if measures["exact"] else _number(measures["sqnr"])


def _number(value: float | None) -> float:
    return nan if value is None else value


def _notes(before: Report, now: Report) -> Iterator[str]:
    if before["model"]["sha256"] != now["model"]["sha256"]:
        yield "The model is another one."
    if before["data"]["sha256"] != now["data"]["sha256"]:
        yield "The data are others, or serve for other things: fidelity was measured on something else."
    if bool(before["predicted_latency"]) != bool(now["predicted_latency"]):
        yield "One of the two has no predicted latency: it was compiled without costs."
    changed = [name for name, version in now["versions"].items() if before["versions"].get(name) != version]
    if changed:
        versions = ", ".join(f"{name} {before['versions'].get(name, 'none')} -> {now['versions'][name]}"
                             for name in changed)  # fmt: skip
        yield f"Versions differ: {versions}."


def text(number: float, unit: str) -> str:
    """Return a figure as a person reads it."""
    if not isfinite(number):
        return "exact" if isinf(number) else "undefined"
    return f"{number:,.0f} {unit}" if unit == "bytes" else f"{number:.4g} {unit}".rstrip()
