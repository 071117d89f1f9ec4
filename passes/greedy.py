"""Greedy allocation: what the integer program is held against, and falls back on where time ran out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from qcompile.passes.candidates import LOSS, Allocation, Array, Candidate, Measures, Pair, measures


def greedy(
    tensors: Sequence[Sequence[Candidate]], budgets: Sequence[float], pairs: Sequence[Pair] = ()
) -> Allocation | None:
    """Start from each tensor's least loss; take the step that loses least for what it saves until the budgets hold.

    Parameters
    ----------
    tensors : sequence of sequence of Candidate
        By tensor, its candidates.
    budgets : sequence of float
        The most of each cost. What a step saves is counted in each broken budget's excess, and added up.
    pairs : sequence of Pair
        A step counts with what it does to them.

    Returns
    -------
    Allocation or None
        Its bound is the sum of least losses. None where no step led on; that proves nothing.
    """
    found = measures(tensors, len(budgets), pairs)
    choice = descend(found, LOSS, (np.inf, *budgets))
    least = sum(float(table[LOSS].min()) for table in (*found.alone, *(table for _, _, table in found.pairs)))
    return None if choice is None else found.allocation(choice, least, None)


def descend(
    found: Measures, objective: int, limits: Sequence[float], start: Sequence[int] | None = None
) -> tuple[int, ...] | None:
    """Return a choice among kept candidates that holds the limits, by the same steps for any measure, or None."""
    bounds = np.asarray(limits, np.float64)
    choice = [int(np.argmin(table[objective])) for table in found.alone] if start is None else list(start)
    marginals = _Marginals(found, choice)
    while not found.holds(choice, limits):
        change = marginals.changes()
        total = np.array(found.totals(choice))
        broken = total > bounds
        excess = (total - bounds)[broken]
        saved = -np.einsum("m,mtc->tc", 1.0 / excess, change[broken])
        keeps = (total[~broken, None, None] + change[~broken] <= bounds[~broken, None, None]).all(axis=0)
        helps = keeps & (saved > 0) & marginals.exist
        if not helps.any():
            return None
        price = np.divide(change[objective], saved, out=np.full(saved.shape, np.inf), where=helps)
        tensor, candidate = np.unravel_index(np.argmin(price), price.shape)
        marginals.step(int(tensor), int(candidate))
    return tuple(choice)


class _Marginals:
    """What each measure would be of each candidate, all other tensors staying as they are: `[measures, tensors, …]`."""

    def __init__(self, found: Measures, choice: list[int]) -> None:
        self.choice = choice
        width = max((table.shape[1] for table in found.alone), default=1)
        self.exist: npt.NDArray[np.bool_] = np.zeros((len(choice), width), bool)
        self.values: Array = np.zeros((found.count, len(choice), width))
        self.partners: list[list[tuple[int, Array]]] = [[] for _ in choice]
        for tensor, table in enumerate(found.alone):
            self.exist[tensor, : table.shape[1]] = True
            self.values[:, tensor, : table.shape[1]] = table
        for first, second, table in found.pairs:
            self.partners[first].append((second, table))
            self.partners[second].append((first, table.swapaxes(1, 2)))
            self._meet(first, table[:, :, choice[second]])
            self._meet(second, table[:, choice[first], :])

    def _meet(self, tensor: int, values: Array) -> None:
        self.values[:, tensor, : values.shape[1]] += values

    def changes(self) -> Array:
        """Return what a step to each candidate adds to each measure."""
        chosen = np.take_along_axis(self.values, np.array(self.choice, np.intp)[None, :, None], axis=2)
        return np.asarray(self.values - chosen)

    def step(self, tensor: int, candidate: int) -> None:
        """Move a tensor to another candidate."""
        before = self.choice[tensor]
        for other, table in self.partners[tensor]:
            self._meet(other, table[:, candidate, :] - table[:, before, :])
        self.choice[tensor] = candidate
