"""Budgets: bounds that the user sets on what the artifact takes, absolute or in parts of float."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Self

from qcompile.core.errors import BudgetError, UsageError

#: Bytes, microseconds, and bit operations, of a unit.
UNITS = {
    "--max-size": {"B": 1.0, "KB": 1024.0, "MB": 1024.0**2, "GB": 1024.0**3},
    "--max-sram": {"B": 1.0, "KB": 1024.0, "MB": 1024.0**2},
    "--max-flash": {"B": 1.0, "KB": 1024.0, "MB": 1024.0**2},
    "--max-memory": {"B": 1.0, "KB": 1024.0, "MB": 1024.0**2, "GB": 1024.0**3},
    "--max-latency": {"us": 1.0, "ms": 1e3, "s": 1e6},
    "--max-bops": {"M": 1e6, "G": 1e9, "T": 1e12},
}
EXAMPLES = {
    "--max-size": "0.2x of float, or 5MB", "--max-latency": "0.6x of float, or 12ms",
    "--max-bops": "0.05x of float, or 20G",
    "--max-sram": "a number of bytes with a unit, 64KB", "--max-flash": "a number of bytes with a unit, 512KB",
    "--max-memory": "a number of bytes with a unit, 4GB",
}  # fmt: skip
#: Bounds that are not in parts of float's: the device's memory is what it is.
ABSOLUTE = ("--max-sram", "--max-flash", "--max-memory")


@dataclass(frozen=True)
class Budget:
    """A bound.

    Parameters
    ----------
    text : str
        As the user wrote it.
    amount : float
        Bytes, microseconds or bit operations, or parts of what float takes.
    relative : bool
        Whether it is the latter.
    """

    text: str
    amount: float
    relative: bool

    @classmethod
    def parse(cls, text: str, flag: str) -> Self:
        """Read ``0.2x``, or a number with a unit.

        Raises
        ------
        UsageError
            If it is none.
        """
        found = re.fullmatch(r"\s*([0-9.]+(?:e[+-]?[0-9]+)?)\s*([A-Za-z]*)\s*", text)
        units = UNITS[flag] | ({} if flag in ABSOLUTE else {"x": 1.0})
        try:
            number = float(found[1]) if found else math.nan
        except ValueError:
            number = math.nan
        if not found or found[2] not in units or not 0.0 < number < math.inf:
            raise UsageError(f"{flag} {text}", "is not a budget", f"give {EXAMPLES[flag]}")
        return cls(text, number * units[found[2]], found[2] == "x")

    def of(self, whole: float) -> float:
        """Return the bound on something of which float takes `whole`."""
        return self.amount * whole if self.relative else self.amount


def require_size(text: str | None, float_bytes: int, artifact_bytes: int) -> None:
    """Hold what was written to its budget: what was added behind the choice of bits (biases) was not in it.

    Raises
    ------
    BudgetError
        If the file is larger.
    """
    if text is not None and artifact_bytes > (limit := Budget.parse(text, "--max-size").of(float_bytes)):
        fact = f"is missed by what was written: {artifact_bytes} of {limit:.0f} bytes"
        raise BudgetError(f"--max-size {text}", fact, "give a budget that is smaller by as much")
