"""Which maps have four bits, so that a network fits its SRAM: an integer program over the steps of a schedule.

With the order of operations fixed, each step has some buffers at once. Their bytes are a sum over tensors of what the
chosen bits come to, less what an output may lie on its input, which depends on the bits of the two: a budget for each
step, linear in the choice (docs/allocation.md). Every way to run the first operations in strips is a schedule.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from qcompile.backends.integer.memory import Layout, MemoryPlan, aligned, assign_offsets
from qcompile.backends.integer.program import Program
from qcompile.backends.integer.rows import gap
from qcompile.backends.integer.storage import NARROW, packs
from qcompile.backends.integer.strips import Schedule, schedules
from qcompile.passes.integer_program import Candidate, InfeasibleError, Pair, allocate

#: So often a budget is lowered by what the arena came to above what its steps need.
ATTEMPTS = 5
#: Of the multiply-accumulates of whole maps: schedules that take more are looked at where no other fits.
MOST_WORK = 1.4

#: Tensors by the name of what they share their bits with.
Groups = Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class Fitting:
    """Maps in four bits with which a program fits.

    Parameters
    ----------
    narrow : tuple of str
        Groups.
    loss : float
        What they lose, added up.
    plan : MemoryPlan
        Of the program with them, whose numbers are still those of eight bits.
    """

    narrow: tuple[str, ...]
    loss: float
    plan: MemoryPlan


def narrowable(program: Program, tied: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """Return the groups all of whose tensors may have four bits.

    Parameters
    ----------
    program : Program
        Without strips.
    tied : mapping of str to str
        By tensor, its group; what is not there keeps its bits.
    """
    kept = {port.tensor for port in program.outputs}
    for operation in program.operations:
        if not isinstance(operation, NARROW):
            kept |= {*operation.inputs, *operation.outputs}
    groups: dict[str, list[str]] = {}
    for name in program.tensors:
        if name in tied:
            groups.setdefault(tied[name], []).append(name)
    able = {name for name, tensor in program.tensors.items()
            if packs(tensor) and tensor.dtype == "int8" and name not in kept}  # fmt: skip
    return {group: tuple(names) for group, names in groups.items() if able.issuperset(names)}


def in_four_bits(program: Program, names: Iterable[str]) -> Program:
    """Return the program as memory sees it, with tensors in four bits: what it computes is not looked at."""
    tensors = {**program.tensors, **{name: replace(program.tensors[name], dtype="int4") for name in names}}
    return replace(program, tensors=tensors)


def fit(program: Program, groups: Groups, losses: Mapping[str, float], max_bytes: int) -> Fitting | None:
    """Choose the maps in four bits, and the strips, with which a program loses least within its bytes.

    Parameters
    ----------
    program : Program
        Without strips.
    groups : mapping of str to tuple of str
        What may have four bits.
    losses : mapping of str to float
        Of each group in four bits.
    max_bytes : int
        Of the arena.

    Returns
    -------
    Fitting or None
        Of choices that lose the same, the one with the least work; None where all groups in four bits do not fit.
    """
    ways = list(schedules(program))
    whole = ways[0].macs
    for dear in (False, True):
        best: Fitting | None = None
        for way in ways:
            if (way.macs > MOST_WORK * whole) == dear:
                best = _better(way, groups, losses, max_bytes, best)
        if best is not None:
            return best
    # Steps do not tell all that placing takes: where no choice by them fits, all in four bits may.
    last = least(program, groups)
    loss = sum(losses[group] for group in groups)
    return Fitting(tuple(groups), loss, last) if last.arena_bytes <= max_bytes else None


def least(program: Program, groups: Groups) -> MemoryPlan:
    """Return the plan with fewest bytes of arena: every group in four bits, and the strips that take least."""
    names = [name for group in groups.values() for name in group]
    plans = (assign_offsets(in_four_bits(way.program, names), exact=False) for way in schedules(program))
    return min(plans, key=lambda plan: plan.arena_bytes)


def _better(
    way: Schedule, groups: Groups, losses: Mapping[str, float], max_bytes: int, best: Fitting | None
) -> Fitting | None:
    """Return what a schedule fits with, if that loses less than the best one so far."""
    steps, limit = _Steps(way.program, groups), max_bytes
    for _ in range(ATTEMPTS):
        if best is not None and steps.least_loss(losses, limit) >= best.loss:
            return best
        chosen = steps.choose(losses, limit)
        if chosen is None:
            return best
        names = [name for group in chosen for name in groups[group]]
        plan = assign_offsets(in_four_bits(way.program, names), exact=False)
        if plan.arena_bytes <= max_bytes:
            found = Fitting(chosen, sum(losses[group] for group in chosen), plan)
            return found if best is None or found.loss < best.loss else best
        limit -= plan.arena_bytes - max_bytes
    return best


class _Steps:
    """What each step of a schedule needs, by the bits of each group."""

    def __init__(self, program: Program, groups: Groups) -> None:
        self.eight = Layout(program)
        self.four = Layout(in_four_bits(program, [name for names in groups.values() for name in names]))
        self.group = {name: group for group, names in groups.items() for name in names if name in self.eight.buffers}
        self.order = sorted(set(self.group.values()), key=list(groups).index)
        self.needs = [
            (time, together) for time in range(len(program.operations)) for together in self.eight.together(time)
        ]
        count = len(self.needs)
        self.fixed = np.zeros(count)
        #: [groups, bits, steps] and, by two groups, [steps, bits of one, bits of the other].
        self.costs = np.zeros((len(self.order), 2, count))
        self.savings: dict[tuple[str, str], np.ndarray] = {}
        for row, (time, together) in enumerate(self.needs):
            self._add_sizes(row, together)
            self._add_saving(row, time)

    def _add_sizes(self, row: int, together: Iterable[str]) -> None:
        for name in together:
            eight, four = self.eight.buffers[name].size, self.four.buffers[name].size
            if name in self.group:
                self.costs[self.order.index(self.group[name]), :, row] += (eight, four)
            else:
                self.fixed[row] += eight

    def _add_saving(self, row: int, time: int) -> None:
        """Count what the output may lie on an input: of several, on the one where that is most in eight bits."""
        operation = self.eight.program.operations[time]
        lying = [index for index, _ in enumerate(operation.inputs) if (time, index) in self.eight.lying]
        if not lying:
            return
        index = max(lying, key=lambda one: self._saving(time, one, 0, 0))
        source, output = self.eight.owner[operation.inputs[index]], self.eight.owner[operation.output]
        table = np.array([[self._saving(time, index, a, b) for b in (0, 1)] for a in (0, 1)], np.float64)
        first, second = self.group.get(source), self.group.get(output)
        if first is not None and second is not None and first != second:
            known = self.savings.setdefault((first, second), np.zeros((len(self.needs), 2, 2)))
            known[row] -= table
        elif first is not None:
            self.costs[self.order.index(first), :, row] -= table.diagonal() if second else table[:, 0]
        elif second is not None:
            self.costs[self.order.index(second), :, row] -= table[0]
        else:
            self.fixed[row] -= table[0, 0]

    def _saving(self, time: int, index: int, source_bits: int, output_bits: int) -> int:
        """Return the bytes that an output shares with an input, in eight bits (0) or four (1) each."""
        operation = self.eight.program.operations[time]
        layouts = (self.eight, self.four)
        source, output = operation.inputs[index], operation.output
        tensors = {**self.eight.program.tensors, source: layouts[source_bits].program.tensors[source],
                   output: layouts[output_bits].program.tensors[output]}  # fmt: skip
        below = layouts[source_bits].buffers[self.eight.owner[source]].size
        above = layouts[output_bits].buffers[self.eight.owner[output]].size
        return above + below - max(above, aligned(gap(operation, index, tensors)) + below)

    def least_loss(self, losses: Mapping[str, float], limit: float) -> float:
        """Return a bound of what is lost at least: for the worst step alone, with parts of maps in four bits."""
        most = np.array([losses[group] for group in self.order])
        bound = 0.0
        for row in range(len(self.needs)):
            saved = self.costs[:, 0, row] - self.costs[:, 1, row]
            shared = sum(float(-table[row].min()) for table in self.savings.values())
            missing = self.fixed[row] + self.costs[:, 0, row].sum() - shared - limit
            found = 0.0
            for group in sorted(np.flatnonzero(saved > 0), key=lambda one: most[one] / saved[one]):
                if missing <= 0:
                    break
                part = min(1.0, missing / saved[group])
                found, missing = found + part * most[group], missing - saved[group]
            bound = max(bound, np.inf if missing > 0 else found)
        return float(bound)

    def choose(self, losses: Mapping[str, float], limit: float) -> tuple[str, ...] | None:
        """Return the groups in four bits that lose least while no step needs more than so many bytes."""
        binding = [row for row in range(len(self.needs))
                   if self.fixed[row] + self.costs[:, :, row].max(axis=1).sum() > limit]  # fmt: skip
        if not binding:
            return ()
        if not self.order:
            return None
        tensors = [[Candidate(0.0, tuple(table[0, binding])), Candidate(losses[group], tuple(table[1, binding]))]
                   for group, table in zip(self.order, self.costs, strict=True)]  # fmt: skip
        pairs = [Pair(self.order.index(one), self.order.index(other), np.zeros((2, 2)), table[binding])
                 for (one, other), table in self.savings.items() if np.any(table[binding])]  # fmt: skip
        try:
            found = allocate(tensors, tuple(limit - self.fixed[binding]), pairs)
        except InfeasibleError:
            return None
        return tuple(group for group, at in zip(self.order, found.choice, strict=True) if at)
