"""One tree of errors: each is one line `place: fact; remedy` and knows the exit code of the command line."""

from __future__ import annotations

from typing import ClassVar


class QcompileError(Exception):
    """An error that a user can act on.

    Parameters
    ----------
    place : str
        What the fact is about: a file, a tensor, an option.
    fact : str
        What is the case there.
    remedy : str
        What to do about it.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, place: object, fact: str, remedy: str) -> None:
        super().__init__(place, fact, remedy)
        self.place = str(place)
        self.fact = fact
        self.remedy = remedy

    def __str__(self) -> str:
        return " ".join(f"{self.place}: {self.fact}; {self.remedy}".split())


class UsageError(QcompileError):
    """The command line, an option or the output folder cannot be used as asked."""

    exit_code = 2


class ModelError(QcompileError):
    """The input model is not one that can be compiled."""

    exit_code = 3


class DataError(QcompileError):
    """The calibration or evaluation data do not fit the model."""

    exit_code = 4


class BudgetError(QcompileError):
    """A budget or a fidelity bound cannot be met."""

    exit_code = 5


class VerificationError(QcompileError):
    """A pass or a backend changed what the model computes by more than it may."""

    exit_code = 6


class TargetError(QcompileError):
    """The target is unknown, or what it needs is not available here."""

    exit_code = 7


class OperatorError(TargetError):
    """An operator has no form on the target.

    Parameters
    ----------
    op_type : str
    operator : str
        Its name.
    fact, remedy : str
    """

    def __init__(self, op_type: str, operator: str, fact: str, remedy: str) -> None:
        super().__init__(f"{op_type} '{operator}'", fact, remedy)
        self.operator = operator


class WorkerError(QcompileError):
    """What measures elsewhere cannot be reached, or died."""

    exit_code = 8


def first_line(error: BaseException, limit: int = 240) -> str:
    """Return the first line with content of another library's error, cut to `limit` characters."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return shortened(lines[0] if lines else type(error).__name__, limit)


def shortened(text: str, limit: int = 240) -> str:
    """Return a text cut to `limit` characters."""
    return text if len(text) <= limit else text[: limit - 1] + "…"
