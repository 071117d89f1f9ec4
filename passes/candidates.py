"""Candidates: what each way to treat each tensor loses and costs, as numbers that an allocation is chosen from.

The names are those of a multiple-choice knapsack: every tensor takes exactly one candidate; what a choice loses, and
each of what it costs, is the sum over tensors and over pairs of tensors. Loss is measure 0, budget k is measure k + 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

#: The measure that is the loss.
LOSS = 0


@dataclass(frozen=True)
class Candidate:
    """One way to treat one tensor, or a group of tensors that are tied.

    Parameters
    ----------
    loss : float
        What it loses: noise over signal at the outputs, or anything else that adds up.
    costs : tuple of float
        One for each budget, in the budget's unit: bytes, microseconds, bit operations.
    """

    loss: float
    costs: tuple[float, ...] = ()


@dataclass(frozen=True, eq=False)
class Pair:
    """What two tensors do together beyond what they do alone.

    Loss of errors that meet (Deng et al. 2023, *CLADO*, arXiv 2307.05657), and the price of a conversion where two
    neighbours are unlike.

    Parameters
    ----------
    first, second : int
        Two different tensors.
    loss : ndarray
        `[candidates of first, candidates of second]`; may be negative.
    costs : ndarray or None
        `[budgets, candidates of first, candidates of second]`; None is nothing.
    """

    first: int
    second: int
    loss: npt.NDArray[np.floating]
    costs: npt.NDArray[np.floating] | None = None


class InfeasibleError(ValueError):
    """No choice holds all bounds.

    Parameters
    ----------
    index : int or None
        A budget that cannot be met; None is the bound of the loss.
    least : float
        The least that can be reached of it under the bounds that the choice was then held to.
    """

    def __init__(self, index: int | None, least: float) -> None:
        name = "the loss" if index is None else f"budget {index}"
        super().__init__(f"{name} cannot be less than {least:.6g}")
        self.index = index
        self.least = least


@dataclass(frozen=True)
class Allocation:
    """One candidate for each tensor.

    Attributes
    ----------
    choice
        By tensor, the index of its candidate.
    loss, costs
        What they come to, pairs included.
    bound
        A proven lower bound of what was minimized.
    minimized
        Which of the costs was minimized; None is the loss.
    """

    choice: tuple[int, ...]
    loss: float
    costs: tuple[float, ...]
    bound: float
    minimized: int | None = None

    @property
    def objective(self) -> float:
        """Return what was minimized."""
        return self.loss if self.minimized is None else self.costs[self.minimized]

    @property
    def gap(self) -> float:
        """Return by which part of it the objective can at most be above the least possible; 0 is proven optimal."""
        above = self.objective - self.bound
        return above / abs(self.objective) if above > 0 and self.objective else max(above, 0.0)


@dataclass(frozen=True, eq=False)
class Measures:
    """The numbers of candidates and pairs as arrays, without candidates that can never be chosen.

    Attributes
    ----------
    kept
        By tensor, the indices of the candidates that are left, ascending.
    alone
        By tensor, `[measures, candidates]`.
    pairs
        Two tensors, and `[measures, candidates of the first, candidates of the second]`.
    """

    kept: tuple[npt.NDArray[np.intp], ...]
    alone: tuple[Array, ...]
    pairs: tuple[tuple[int, int, Array], ...]

    @property
    def count(self) -> int:
        """Return how many measures there are: the loss and the budgets."""
        return len(self.alone[0]) if self.alone else 1

    def totals(self, choice: Sequence[int]) -> list[float]:
        """Return each measure of a choice among kept candidates, rounded once."""
        return [
            math.fsum([
                *(float(table[measure, at]) for table, at in zip(self.alone, choice, strict=True)),
                *(float(table[measure, choice[i], choice[j]]) for i, j, table in self.pairs),
            ])
            for measure in range(self.count)
        ]  # fmt: skip

    def holds(self, choice: Sequence[int], limits: Sequence[float]) -> bool:
        """Say whether no measure of a choice is above its limit, to the last bit."""
        return all(total <= limit for total, limit in zip(self.totals(choice), limits, strict=True))

    def allocation(self, choice: Sequence[int], bound: float, minimized: int | None) -> Allocation:
        """Return a choice among kept candidates as one among all."""
        loss, *costs = self.totals(choice)
        objective = loss if minimized is None else costs[minimized]
        original = tuple(int(kept[at]) for kept, at in zip(self.kept, choice, strict=True))
        return Allocation(original, loss, tuple(costs), min(bound, objective), minimized)


def measures(tensors: Sequence[Sequence[Candidate]], budgets: int, pairs: Sequence[Pair] = ()) -> Measures:
    """Check candidates and pairs, and drop the candidates that others dominate.

    A candidate is dominated where another of its tensor is nowhere more, and is less somewhere or comes earlier. What
    a pair says of a tensor may favour any of its candidates: such tensors keep all.

    Raises
    ------
    ValueError
        A tensor without candidates, a number that is not finite, or a shape that does not fit.
    """
    paired = {tensor for pair in pairs for tensor in (pair.first, pair.second)}
    kept, alone = [], []
    for tensor, candidates in enumerate(tensors):
        table = _table(tensor, candidates, budgets)
        left = np.arange(len(candidates)) if tensor in paired else _undominated(table)
        kept.append(left)
        alone.append(table[:, left])
    return Measures(tuple(kept), tuple(alone), tuple(_joint(pair, tensors, budgets) for pair in pairs))


def _table(tensor: int, candidates: Sequence[Candidate], budgets: int) -> Array:
    if not candidates:
        raise ValueError(f"tensor {tensor} has no candidates")
    if any(len(candidate.costs) != budgets for candidate in candidates):
        raise ValueError(f"tensor {tensor}: a candidate has not one cost for each of {budgets} budgets")
    table = np.array([(candidate.loss, *candidate.costs) for candidate in candidates], np.float64).T
    if not np.isfinite(table).all():
        raise ValueError(f"tensor {tensor}: a loss or cost is not finite")
    return table


def _undominated(table: Array) -> npt.NDArray[np.intp]:
    no_more = (table[:, :, None] <= table[:, None, :]).all(axis=0)
    earlier = np.tri(table.shape[1], k=-1, dtype=bool).T
    beats = no_more & (~no_more.T | earlier)
    return np.flatnonzero(~beats.any(axis=0))


def _joint(pair: Pair, tensors: Sequence[Sequence[Candidate]], budgets: int) -> tuple[int, int, Array]:
    name = f"pair of tensors {pair.first} and {pair.second}"
    if pair.first == pair.second or not {pair.first, pair.second} <= set(range(len(tensors))):
        raise ValueError(f"{name}: these are not two tensors")
    shape = (len(tensors[pair.first]), len(tensors[pair.second]))
    costs = np.zeros((budgets, *shape)) if pair.costs is None else np.asarray(pair.costs, np.float64)
    loss = np.asarray(pair.loss, np.float64)
    if loss.shape != shape or costs.shape != (budgets, *shape):
        raise ValueError(f"{name}: shapes {loss.shape} and {costs.shape} do not fit {shape} for {budgets} budgets")
    table = np.concatenate([loss[None], costs])
    if not np.isfinite(table).all():
        raise ValueError(f"{name}: a loss or cost is not finite")
    return pair.first, pair.second, table
