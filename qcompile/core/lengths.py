"""Several lengths of one axis: what inputs may have, and how a shorter one is padded to the next."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np

from qcompile.core.errors import DataError, UsageError

#: One input's shape as asked for; an axis that may have several lengths has them all.
Shape = tuple[int | tuple[int, ...], ...]
#: Every length is a network of its own, by a number of one byte.
MOST = 64


@dataclass(frozen=True)
class Padding:
    """How inputs that are shorter than a length are padded to it.

    Parameters
    ----------
    mask : str
        The input that tells which positions count.
    outputs : mapping of str to tuple of int
        Of each output, the axes that are as long as the inputs: what stands behind these is cut.
    """

    mask: str
    outputs: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Lengths:
    """The lengths that an axis may have.

    Parameters
    ----------
    sizes : tuple of int
        Rising.
    shapes : mapping of str to Shape
        Of all inputs that have a shape.
    padding : Padding, optional
        Without it inputs have one of these lengths.
    """

    sizes: tuple[int, ...]
    shapes: Mapping[str, Shape]
    padding: Padding | None = None

    @classmethod
    def of(cls, shapes: Mapping[str, Shape]) -> Self | None:
        """Return the lengths that shapes ask for, or None where every axis has one.

        Raises
        ------
        UsageError
            If two axes have different ones, or they do not rise.
        """
        lists = {name: size for name, shape in shapes.items() for size in shape if isinstance(size, tuple)}
        if not lists:
            return None
        sizes = next(iter(lists.values()))
        for name, other in lists.items():
            if other != sizes:
                fact = f"has the lengths {_said(other)} where another axis has {_said(sizes)}"
                raise UsageError(f"--shape {name}", fact, "give every axis with several lengths the same ones")
            if list(other) != sorted(set(other)) or len(other) > MOST:
                raise UsageError(f"--shape {name}", f"has the lengths {_said(other)}", f"give up to {MOST} that rise")
        return cls(sizes, dict(shapes))

    def at(self, length: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes of inputs at one length."""
        return {
            name: tuple(length if isinstance(size, tuple) else size for size in shape)
            for name, shape in self.shapes.items()
        }

    def axes(self, name: str) -> tuple[int, ...]:
        """Return which axes of an input have the length."""
        return tuple(axis for axis, size in enumerate(self.shapes.get(name, ())) if isinstance(size, tuple))

    def of_sample(self, feeds: Mapping[str, Any], place: str) -> int:
        """Return the length that a sample has.

        Raises
        ------
        DataError
            If its inputs differ in it.
        """
        found = {int(np.shape(feeds[name])[axis]) for name in feeds for axis in self.axes(name)}
        if len(found) > 1:
            raise DataError(place, f"its inputs have the lengths {_said(sorted(found))}", "give all of them the same")
        return found.pop()

    def holding(self, length: int) -> int | None:
        """Return the length that an input of this length is run at, or None where there is none."""
        held = next((size for size in self.sizes if size >= length), None)
        return held if held == length or self.padding is not None else None

    def require(self, length: int, place: str) -> int:
        """Return the length that an input of this length is run at.

        Raises
        ------
        DataError
            If there is none.
        """
        if (held := self.holding(length)) is not None:
            return held
        if length > self.sizes[-1]:
            raise DataError(place, f"has length {length}, and --shape has {self}", "shorten it, or add its length")
        fact = f"has length {length}, --shape has {self}, and no mask keeps out what would be padded"
        raise DataError(place, fact, "leave it out, or add its length")

    def __str__(self) -> str:
        return _said(self.sizes)


def _said(sizes: Any) -> str:
    return ", ".join(map(str, sizes))
