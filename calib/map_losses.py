"""What activations lose at the outputs where their codes have four bits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Self

from qcompile.calib.observers import Observer


@dataclass(frozen=True)
class MapLosses:
    """What activations lose in four bits, each alone with everything else in eight.

    Parameters
    ----------
    noise : float
        Noise over signal at the outputs with all in eight bits.
    narrow : mapping of str to mapping of Observer to float
        The same with one in four, by how its range is chosen. Empty where nothing has to be narrow.
    """

    noise: float = 0.0
    narrow: Mapping[str, Mapping[Observer, float]] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Return it JSON-ready."""
        return asdict(self)

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> Self:
        """Read what `as_json` wrote."""
        narrow = {
            str(name): {Observer(observer): float(noise) for observer, noise in of.items()}
            for name, of in entry["narrow"].items()
        }
        return cls(float(entry["noise"]), narrow)

    def best(self, name: str) -> tuple[Observer, float]:
        """Return the observer with which an activation loses least, and what it loses."""
        observer = min(self.narrow[name], key=lambda one: self.narrow[name][one])
        return observer, max(0.0, self.narrow[name][observer] - self.noise)
