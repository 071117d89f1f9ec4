"""What activations lose at the outputs where their codes have four bits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from qcompile.calib.observers import Histogram, Observer, value_range


@dataclass(frozen=True)
class Clip:
    """How a range for four bits is chosen: a part of what an observer makes of it.

    Parameters
    ----------
    observer : Observer
    part : float
        Of its bounds, the lower and the upper one. What lies outside becomes the outermost code.
    """

    observer: Observer
    part: float = 1.0

    def bounds(self, histogram: Histogram, dtype: str) -> tuple[float, float]:
        """Return the range of codes of a type."""
        low, high = value_range(histogram, self.observer, dtype)
        return self.part * low, self.part * high

    def __str__(self) -> str:
        """Return it as files have it: ``mse``, or ``0.5 minmax``."""
        return self.observer.value if self.part == 1.0 else f"{self.part:g} {self.observer.value}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read what `str` wrote."""
        part, _, observer = text.rpartition(" ")
        return cls(Observer(observer), float(part or 1.0))


@dataclass(frozen=True)
class MapLosses:
    """What activations lose in four bits, each alone with everything else in eight.

    Parameters
    ----------
    noise : float
        Noise over signal at the outputs with all in eight bits.
    narrow : mapping of str to mapping of Clip to float
        The same with one in four, by how its range is chosen. Empty where nothing has to be narrow.
    """

    noise: float = 0.0
    narrow: Mapping[str, Mapping[Clip, float]] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Return it JSON-ready."""
        narrow = {name: {str(clip): noise for clip, noise in of.items()} for name, of in self.narrow.items()}
        return {"noise": self.noise, "narrow": narrow}

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> Self:
        """Read what `as_json` wrote."""
        narrow = {
            str(name): {Clip.parse(clip): float(noise) for clip, noise in of.items()}
            for name, of in entry["narrow"].items()
        }
        return cls(float(entry["noise"]), narrow)

    def best(self, name: str) -> tuple[Clip, float]:
        """Return the range with which an activation loses least, and what it loses."""
        clip = min(self.narrow[name], key=lambda one: self.narrow[name][one])
        return clip, max(0.0, self.narrow[name][clip] - self.noise)
