"""Resources: what bits of weights take beside the loss, each a sum over weights, and the most that there is of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Resource:
    """Something that there is only so much of. Of fewer bits it takes no more.

    Parameters
    ----------
    what : str
        In words.
    fixed : float
        What is taken of it whatever is chosen.
    taken : mapping of str to mapping of int to float
        By the name of a weight and its bits, what is taken beyond that.
    most : float
        The budget.
    """

    what: str
    fixed: float
    taken: Mapping[str, Mapping[int, float]]
    most: float = math.inf

    @property
    def least(self) -> float:
        """Return what is taken at least."""
        return self.fixed + math.fsum(min(of.values()) for of in self.taken.values())

    @property
    def left(self) -> float:
        """What there is for what is chosen."""
        return self.most - self.fixed

    def of(self, bits: Mapping[str, int]) -> float:
        """Return what a choice takes, which names each weight."""
        return self.fixed + math.fsum(of[bits[name]] for name, of in self.taken.items())
