"""The multiple-choice knapsack as a mixed-integer program: its variables and rows, and one search, exact in the bounds.

HiGHS works within tolerances that are absolute. What this file adds is scaling, bounds that are held to the last bit,
and the removal of what cannot be part of an answer.
"""

from __future__ import annotations

import itertools
import math
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import scipy.optimize
import scipy.sparse

from qcompile.passes.candidates import LOSS, Array, Measures
from qcompile.passes.highs import milp

#: What the slack of a bound is scaled to. HiGHS lets rows be broken, and optima be missed, by 1e-6 absolutely: by
#: 1e-10 of the slack.
SCALE = 1e4
#: Values are equal that differ by less than this part of what they are above their least.
TIE = 1e-9
#: Sums of doubles differ by less than this part of them.
ROUNDING = 1e-14
#: What HiGHS lets a row be broken by.
TOLERANCE = 1e-6
#: Choices that break a bound by less than HiGHS sees are cut off one by one, so many times; then all at once.
CUTS = 10
#: Choices of this many tensors' candidates are told apart by one objective.
RADIX = 10**5

#: What `scipy.optimize.milp` says of how it ended.
FINISHED, STOPPED, IMPOSSIBLE = 0, 1, 2

#: Coefficients of all columns, and the most that their sum may be.
_Row = tuple[Array, float]


@dataclass(frozen=True)
class Answer:
    """What a search found.

    Attributes
    ----------
    choice
        Among kept candidates.
    bound
        A lower bound of the weight.
    proven
        The search came to its end: no choice has less.
    scale
        What the weights were scaled by.
    """

    choice: tuple[int, ...]
    bound: float
    proven: bool
    scale: float = 1.0


@dataclass(frozen=True, eq=False)
class Relaxation:
    """The solution in fractions.

    Attributes
    ----------
    nearest
        The choice nearest to it, which breaks limits, but by a few tensors' worth; None where there is no solution.
    floors
        By column, a lower bound of the weight of all choices that have it.
    """

    nearest: tuple[int, ...] | None
    floors: Array


class Program:
    """The variables and rows that all searches share.

    A variable x of each kept candidate, whole; then a variable y of each combination of a pair. Coefficients are
    what a candidate or combination is above the least of its tensor or pair, so that none is negative; `base` is the
    sum of these least, by measure.
    """

    def __init__(self, found: Measures) -> None:
        self.found = found
        tables = [*found.alone, *(table.reshape(found.count, -1) for _, _, table in found.pairs)]
        lows = np.stack([table.min(axis=1) for table in tables])
        self.base = [math.fsum(column) for column in lows.T]
        self.magnitude = np.abs(lows).sum(axis=0)
        self.coefficients = np.concatenate([table - low[:, None] for table, low in zip(tables, lows, strict=True)], 1)
        self.starts = np.cumsum([0, *(table.shape[1] for table in tables)])
        self.columns, self.whole = int(self.starts[-1]), int(self.starts[len(found.alone)])
        self.choices = self._choices()
        self.orders = tuple(self._order(first, second) for first, second in self._equal())
        self.cuts: list[tuple[int, npt.NDArray[np.intp]]] = []

    def block(self, at: int) -> npt.NDArray[np.intp]:
        """Return the columns of a tensor, or behind all tensors of a pair."""
        return np.arange(self.starts[at], self.starts[at + 1])

    def rounding(self, measure: int, limit: float = 0.0) -> float:
        """Return by how much sums of this measure may differ for no other reason than their order."""
        return ROUNDING * max(float(self.magnitude[measure]), abs(limit))

    def ceiling(self, measure: int, choice: Sequence[int]) -> float:
        """Return the most that counts as equal to what a choice is."""
        total = self.found.totals(choice)[measure]
        return total + TIE * (total - self.base[measure]) + self.rounding(measure, total)

    def slack(self, measure: int, limit: float) -> float:
        """Return what a limit leaves above the least."""
        return limit - self.base[measure] + self.rounding(measure, limit)

    def allowed(self, limits: Sequence[float]) -> npt.NDArray[np.bool_]:
        """Return which columns limits leave possible, each tensor and each pair looked at by itself."""
        allowed, before = np.ones(self.columns, bool), -1
        sizes = np.diff(self.starts)
        while before != (before := int(allowed.sum())):
            for measure, limit in enumerate(limits):
                if limit < math.inf and self._possible(allowed):
                    coefficients = self.coefficients[measure]
                    lows = np.minimum.reduceat(np.where(allowed, coefficients, math.inf), self.starts[:-1])
                    rest = np.repeat(lows.sum() - lows, sizes)
                    allowed &= rest + coefficients <= self.slack(measure, limit) * (1.0 + ROUNDING)
        return allowed

    def _possible(self, allowed: npt.NDArray[np.bool_]) -> bool:
        return bool(np.logical_or.reduceat(allowed, self.starts[:-1]).all())

    def digits(self, allowed: npt.NDArray[np.bool_]) -> Iterator[list[int]]:
        """Yield the tensors that have a choice, in order, by as many as one objective can tell apart."""
        group, size = list[int](), 1
        for tensor, kept in enumerate(self.found.kept):
            if allowed[self.block(tensor)].sum() < 2:
                continue
            if group and size * len(kept) > RADIX:
                yield group
                group, size = [], 1
            group.append(tensor)
            size *= len(kept)
        if group:
            yield group

    def numbered(self, tensors: Sequence[int]) -> Array:
        """Return weights by which choices are ordered as by the indices of these tensors' candidates, first to last."""
        weights, place = np.zeros(self.columns), 1
        for tensor in reversed(tensors):
            columns = self.block(tensor)
            weights[columns] = place * np.arange(len(columns))
            place *= len(columns)
        return weights

    def relax(self, weights: Array, limits: Sequence[float]) -> Relaxation | None:
        """Solve in fractions; None where even these break the limits.

        For any prices of the rows (none negative for a row with a bound) the least of each tensor and pair at weights
        plus prices, summed up, is a bound of the weight, and so is that sum with one column instead of its least. So
        the floors hold whatever the tolerance of the solver; its prices make them good ones.
        """
        allowed = self.allowed(limits)
        if not self._possible(allowed):
            return None
        rows = [*self._bounds(limits, allowed), *self.orders]
        weights = np.where(allowed, weights, 0.0)
        scale = float(weights.max()) or 1.0
        bounds = np.stack([np.zeros(self.columns), allowed.astype(np.float64)], axis=1)
        matrix = scipy.sparse.csr_array(np.stack([row for row, _ in rows])) if rows else None
        sides = np.array([side for _, side in rows])
        result = scipy.optimize.linprog(
            weights * (SCALE / scale),
            matrix,
            None if matrix is None else sides,
            self.choices.A,
            self.choices.lb,
            bounds,
        )
        if result.status != FINISHED:
            return None if result.status == IMPOSSIBLE else Relaxation(None, np.zeros(self.columns))
        prices, marginals = np.minimum(result.ineqlin.marginals, 0.0), result.eqlin.marginals
        priced = weights * (SCALE / scale) - self.choices.A.T @ marginals
        if matrix is not None:
            priced -= matrix.T @ prices
        lows = np.minimum.reduceat(np.where(allowed, priced, math.inf), self.starts[:-1])
        offset = float(marginals @ self.choices.lb + prices @ sides)
        floors = priced + np.repeat(lows.sum() - lows, np.diff(self.starts)) + (offset - TIE * SCALE)
        return Relaxation(self._chosen(result.x), np.where(allowed, floors * (scale / SCALE), math.inf))

    def search(
        self,
        weights: Array,
        limits: Sequence[float],
        exact: Sequence[float],
        deadline: float,
        allowed: npt.NDArray[np.bool_] | None = None,
        other_than: Sequence[int] | None = None,
    ) -> Answer | None:
        """Return the choice of least weight within limits, or None where there is none.

        Parameters
        ----------
        weights : ndarray
            By column, none negative.
        limits : sequence of float
            Held within HiGHS's tolerance.
        exact : sequence of float
            Held to the last bit: what breaks one is cut off and searched again.
        deadline : float
            On the clock of `time.monotonic`.
        allowed : ndarray or None
            Columns that may be chosen; None leaves it to the limits.
        other_than : sequence of int or None
            A choice that is not wanted.

        Raises
        ------
        TimeoutError
            No choice was found in time.
        """
        allowed = self.allowed(limits) if allowed is None else allowed
        if not self._possible(allowed):
            return None
        rows = [*self._bounds(limits, allowed), *self.orders]
        weights = np.where(allowed, weights, 0.0)
        scale, bound = float(weights.max()) or 1.0, 0.0
        if other_than is not None:
            rows.append(
                (self._one_hot(self.starts[: len(other_than)] + np.array(other_than, np.intp)), len(other_than) - 1.0)
            )
        for attempt in itertools.count():
            margin = 0.0 if attempt <= CUTS else TOLERANCE * 2.0 ** (attempt - CUTS)
            tried = [(row, side - margin * (side == SCALE)) for row, side in rows] + list(self._cuts(exact))
            result = _milp(weights * (SCALE / scale), self.whole, allowed, self.choices, tried, deadline)
            if result.status == IMPOSSIBLE and not margin:
                return None
            if result.x is None:
                raise TimeoutError("no choice within all bounds was found in time")
            if not margin:
                bound = max(bound, float(result.mip_dual_bound) * scale / SCALE)
            choice = self._chosen(result.x)
            if self.found.holds(choice, exact):
                return Answer(choice, bound, result.status == FINISHED, scale)
            self._cut_off(choice, exact)
        raise AssertionError("unreachable")

    def _chosen(self, values: Array) -> tuple[int, ...]:
        return tuple(int(np.argmax(values[self.block(at)])) for at in range(len(self.found.alone)))

    def _bounds(self, limits: Sequence[float], allowed: npt.NDArray[np.bool_]) -> Iterator[_Row]:
        """Yield the rows of the limits, each slack scaled to one number."""
        for measure, limit in enumerate(limits):
            coefficients = np.where(allowed, self.coefficients[measure], 0.0)
            slack = self.slack(measure, limit)
            if slack < math.inf and coefficients.any():
                yield coefficients * (SCALE / slack), SCALE

    def _cuts(self, exact: Sequence[float]) -> Iterator[_Row]:
        for measure, columns in self.cuts:
            if exact[measure] < math.inf:
                yield self._one_hot(columns), len(self.found.alone) - 1.0

    def _cut_off(self, choice: Sequence[int], exact: Sequence[float]) -> None:
        """Forbid a choice that breaks a budget, and with it all that are nowhere cheaper."""
        totals = self.found.totals(choice)
        measure = next(m for m, total in enumerate(totals) if total > exact[m])
        columns = self.starts[: len(choice)] + np.array(choice, np.intp)
        if not any(table[measure].any() for _, _, table in self.found.pairs):
            costs = self.coefficients[measure]
            columns = np.concatenate([
                block[costs[block] >= costs[column]]
                for column, block in zip(columns, map(self.block, range(len(choice))), strict=True)
            ])  # fmt: skip
        self.cuts.append((measure, columns))

    def _one_hot(self, columns: npt.NDArray[np.intp]) -> Array:
        row = np.zeros(self.columns)
        row[columns] = 1.0
        return row

    def _choices(self) -> scipy.optimize.LinearConstraint:
        """Return the rows that make x a choice, and y the product of two."""
        rows, sides = list[tuple[npt.NDArray[np.intp], Array]](), list[float]()
        for tensor in range(len(self.found.alone)):
            columns = self.block(tensor)
            rows.append((columns, np.ones(len(columns))))
            sides.append(1.0)
        for at, (first, second, table) in enumerate(self.found.pairs, len(self.found.alone)):
            grid = self.block(at).reshape(table[LOSS].shape)
            for tensor, lines in ((first, grid), (second, grid.T)):
                for line, column in zip(lines, self.block(tensor), strict=True):
                    rows.append((np.append(line, column), np.append(np.ones(len(line)), -1.0)))
                    sides.append(0.0)
        pointers = np.cumsum([0, *(len(columns) for columns, _ in rows)])
        columns, values = (np.concatenate(parts) for parts in zip(*rows, strict=True))
        matrix = scipy.sparse.csr_array((values, columns, pointers), shape=(len(rows), self.columns))
        return scipy.optimize.LinearConstraint(matrix, sides, sides)

    def _order(self, first: int, second: int) -> _Row:
        row, index = np.zeros(self.columns), np.arange(len(self.found.kept[first]))
        row[self.block(first)], row[self.block(second)] = index, -index
        return row, 0.0

    def _equal(self) -> Iterable[tuple[int, int]]:
        """Yield neighbours among tensors with the same numbers: swapping their candidates changes nothing.

        Their order is a rule of ties, and proofs would go through all swaps without it.
        """
        paired = {tensor for first, second, _ in self.found.pairs for tensor in (first, second)}
        alike = defaultdict[bytes, list[int]](list)
        for tensor, table in enumerate(self.found.alone):
            if tensor not in paired and table.shape[1] > 1:
                alike[table.tobytes()].append(tensor)
        for group in alike.values():
            yield from itertools.pairwise(group)


def _milp(
    weights: Array,
    whole: int,
    allowed: npt.NDArray[np.bool_],
    choices: scipy.optimize.LinearConstraint,
    rows: Sequence[_Row],
    deadline: float,
) -> scipy.optimize.OptimizeResult:
    """Solve with HiGHS: the first columns whole, each row at most its number."""
    constraints = [choices]
    if rows:
        matrix = scipy.sparse.csr_array(np.stack([row for row, _ in rows]))
        constraints.append(scipy.optimize.LinearConstraint(matrix, -math.inf, [most for _, most in rows]))
    integrality = (np.arange(len(weights)) < whole).astype(np.int64)
    for presolve in (True, False):
        options = {"mip_rel_gap": 0.0, "presolve": presolve, "time_limit": max(deadline - time.monotonic(), 0.0)}
        bounds = (0.0, allowed.astype(np.float64))
        result = milp(weights, integrality=integrality, bounds=bounds, constraints=constraints, options=options)
        if result.status in (FINISHED, STOPPED, IMPOSSIBLE):
            return result
    raise RuntimeError(f"HiGHS: {result.message}")
