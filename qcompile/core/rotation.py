"""What is rotated, as frozen data: places of a graph, and the matrices for them. JSON in and out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any, Self

from qcompile.core.contract import Refusal
from qcompile.core.orthogonal import Matrix, Orthogonal


class Site(StrEnum):
    """What is rotated."""

    STREAM = "stream"
    """All values of a residual stream (R1)."""
    VALUES = "values"
    """The values of each head of an attention (R2)."""


@dataclass(frozen=True)
class Place:
    """One place that can be rotated without another node.

    Parameters
    ----------
    site : Site
    node : str
        The first sum of a stream, the softmax of an attention.
    width : int
        How many channels a matrix has.
    copies : int
        How many matrices there can be: one for each head of values.
    keeps_ones : bool
        A LayerNorm stands behind it, so R·1 must be 1.
    """

    site: Site
    node: str
    width: int
    copies: int = 1
    keeps_ones: bool = False


@dataclass(frozen=True)
class Rotation:
    """One place and the matrices for it.

    Parameters
    ----------
    place : Place
    matrices : tuple of Orthogonal
        One, or one for each of the place's copies.
    """

    place: Place
    matrices: tuple[Orthogonal, ...]

    def __post_init__(self) -> None:
        """Refuse matrices that do not fit the place."""
        if len(self.matrices) not in (1, self.place.copies):
            raise ValueError(f"{self.place.node}: {len(self.matrices)} matrices for {self.place.copies} copies")
        for matrix in self.matrices:
            if matrix.width != self.place.width or (self.place.keeps_ones and not matrix.keeps_ones):
                raise ValueError(f"{self.place.node}: a matrix of {matrix.width} does not fit {self.place}")

    def of(self, copy: int) -> Matrix:
        """Compute the matrix of one copy."""
        return self.matrices[copy if len(self.matrices) > 1 else 0].matrix()

    def to_json(self) -> dict[str, Any]:
        """Return the rotation as JSON's types."""
        place = {**asdict(self.place), "site": self.place.site.value}
        return place | {"matrices": [matrix.to_json() for matrix in self.matrices]}

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> Self:
        """Read what `to_json` returned."""
        place = Place(
            Site(entry["site"]),
            str(entry["node"]),
            int(entry["width"]),
            int(entry["copies"]),
            bool(entry["keeps_ones"]),
        )
        return cls(place, tuple(Orthogonal.from_json(matrix) for matrix in entry["matrices"]))


@dataclass(frozen=True)
class InputRotation:
    """A linear operator, and the matrix that rotates what it reads, by a product in front of it (R4).

    Parameters
    ----------
    node : str
    matrix : Orthogonal
        Of b channels, all or as many as divide those that are read.
    """

    node: str
    matrix: Orthogonal

    def to_json(self) -> dict[str, Any]:
        """Return the rotation as JSON's types."""
        return {"node": self.node, "matrix": self.matrix.to_json()}

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> Self:
        """Read what `to_json` returned."""
        return cls(str(entry["node"]), Orthogonal.from_json(entry["matrix"]))


@dataclass(frozen=True)
class Rotations:
    """All that is rotated, and why the rest is not.

    Parameters
    ----------
    folded : tuple of Rotation
        Streams and values of attentions; weights take the matrices in. Applied in front of smoothing, which then evens
        out what is rotated.
    inputs : tuple of InputRotation
        What linear operators read. Applied behind smoothing: factors go into what makes the input, then, and not into
        the product.
    refused : tuple of Refusal
        Places that cannot be rotated, or lose no less then.
    """

    folded: tuple[Rotation, ...] = ()
    inputs: tuple[InputRotation, ...] = ()
    refused: tuple[Refusal, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return all of it as JSON's types."""
        return {
            "folded": [rotation.to_json() for rotation in self.folded],
            "inputs": [rotation.to_json() for rotation in self.inputs],
            "refused": [asdict(refusal) for refusal in self.refused],
        }

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> Self:
        """Read what `to_json` returned.

        Raises
        ------
        ValueError, KeyError, TypeError
            If it is no such thing.
        """
        return cls(
            tuple(Rotation.from_json(each) for each in entry["folded"]),
            tuple(InputRotation.from_json(each) for each in entry["inputs"]),
            tuple(Refusal(str(each["node"]), str(each["reason"])) for each in entry["refused"]),
        )
