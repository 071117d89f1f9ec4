"""Strips: the first operations of a program run through together, some rows at a time (MCUNetV2's patches, by rows).

Rows that the next strip needs again are kept in their windows, at no multiply-accumulate more (as in StreamNet), or
computed again, as patches do (Lin et al. 2021, MCUNetV2, arXiv:2110.15352).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from qcompile.backends.integer import rows
from qcompile.backends.integer.memory import MemoryPlan, assign_offsets
from qcompile.backends.integer.operations import Add, AveragePool, Conv, Lookup, MaxPool, Mul
from qcompile.backends.integer.program import Operation, Program, Step, Strips
from qcompile.core.errors import BudgetError

#: What can be a part of strips.
PARTS = (Conv, MaxPool, AveragePool, Add, Mul, Lookup)
#: Rows of a strip that are tried, as the stage's output counts them.
HEIGHTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)


@dataclass(frozen=True)
class Point:
    """One way to run the first operations.

    Parameters
    ----------
    depth : int
        How many operations run in strips; 0 is none.
    height : int
        Rows of the last one's output in a strip.
    recomputes : bool
        Whether rows that the next strip needs are computed again, or kept.
    arena_bytes : int
    macs : int
        Multiply-accumulates of the whole program.
    moved_bytes : int
        Bytes of rows that are moved to the top of their windows.
    """

    depth: int
    height: int
    recomputes: bool
    arena_bytes: int
    macs: int
    moved_bytes: int


@dataclass(frozen=True)
class Schedule:
    """One way to run the first operations, before anything is placed; see `Point`."""

    depth: int
    height: int
    recomputes: bool
    macs: int
    moved_bytes: int
    program: Program


def schedules(program: Program) -> Iterator[Schedule]:
    """Yield the program as it is, and then every depth and height of strips, those with fewest operations to do first.

    Parameters
    ----------
    program : Program
        Without strips.
    """
    whole = sum(rows.macs(operation, program.tensors) for operation in program.operations)
    yield Schedule(0, 0, False, whole, 0, program)
    ways = []
    for depth in range(2, _deepest(program) + 1):
        last = program.tensors[program.operations[depth - 1].output].rows
        heights = [height for height in HEIGHTS if height < last] if _closes(program, depth) else []
        ways += [(depth, height, again) for height in heights for again in (False, True)]
    for cost, way, striped in sorted(
        ((_cost(striped := in_strips(program, *way)), way, striped) for way in ways), key=lambda found: found[:2]
    ):
        yield Schedule(*way, whole + cost[0], cost[1], striped)


def trade_off(program: Program, overlap: bool = True) -> Iterator[tuple[Point, MemoryPlan]]:
    """Yield what strips of each depth and height take, those with fewest operations to do first.

    Parameters
    ----------
    program : Program
        Without strips. What it takes itself is the first point.
    overlap : bool
        As of `memory.assign_offsets`.
    """
    for way in schedules(program):
        plan = assign_offsets(way.program, overlap, exact=not way.depth)
        yield Point(way.depth, way.height, way.recomputes, plan.arena_bytes, way.macs, way.moved_bytes), plan


def plan_memory(program: Program, max_sram: int | None = None, overlap: bool = True) -> MemoryPlan:
    """Place a program in an arena, in strips where it does not fit otherwise.

    Parameters
    ----------
    program : Program
    max_sram : int, optional
        Bytes that the arena may have.
    overlap : bool
        As of `memory.assign_offsets`.

    Returns
    -------
    MemoryPlan
        Of what fits that with the fewest multiply-accumulates, and then with the fewest bytes moved.

    Raises
    ------
    BudgetError
        If nothing fits: it names the operation that needs most.
    """
    found = None
    for _, plan in trade_off(program, overlap):
        if max_sram is None or plan.arena_bytes <= max_sram:
            return plan
        found = plan if found is None or plan.arena_bytes < found.arena_bytes else found
    assert found is not None and max_sram is not None
    plain = assign_offsets(program, overlap)
    fact = f"{plain.arena_bytes} bytes of activations do not fit"
    if found.arena_bytes < plain.arena_bytes:
        fact += f", nor {found.arena_bytes} in strips"
    remedy = f"allow {found.arena_bytes}, or make smaller what needs most: '{plain.peak}' needs {plain.bound}"
    raise BudgetError(f"--max-sram {max_sram}", fact, remedy)


def front(points: Iterable[Point]) -> list[Point]:
    """Return the points that none other beats in bytes, multiply-accumulates and moved bytes together."""
    kept = list(points)
    return [one for one in kept if not any(_beats(other, one) for other in kept)]


def _beats(one: Point, other: Point) -> bool:
    a, b = ((point.arena_bytes, point.macs, point.moved_bytes) for point in (one, other))
    return a != b and all(x <= y for x, y in zip(a, b, strict=True))


def _cost(program: Program) -> tuple[int, int]:
    """Return the multiply-accumulates that strips add, and the bytes that they move."""
    strips = program.operations[0]
    assert isinstance(strips, Strips)
    return strips.recomputed, moved_bytes(strips, program)


def _deepest(program: Program) -> int:
    """Return how many operations from the first on can be run by rows."""
    for depth, operation in enumerate(program.operations):
        output = program.tensors[operation.output]
        by_rows = isinstance(operation, PARTS) and len(output.shape) == 4
        same = all(program.tensors[name].shape == output.shape for name in operation.inputs)
        if not by_rows or (isinstance(operation, rows.BY_ELEMENTS) and not same):
            return depth
    return len(program.operations)


def _closes(program: Program, depth: int) -> bool:
    """Tell whether of the first operations' results only the last one's is read behind them."""
    made = {operation.output for operation in program.operations[: depth - 1]}
    read = {name for operation in program.operations[depth:] for name in operation.inputs}
    return not made & (read | {port.tensor for port in program.outputs})


def in_strips(program: Program, depth: int, height: int, recomputes: bool) -> Program:
    """Return the program with its first operations in strips.

    Parameters
    ----------
    program : Program
    depth : int
        How many operations.
    height : int
        Rows of the last one's output in each strip, but for the last strip.
    recomputes : bool
    """
    group = program.operations[:depth]
    inner = {operation.output for operation in group[:-1]}
    schedule = _Schedule(program, group, inner, recomputes)
    last = program.tensors[group[-1].output].rows
    strips = tuple(schedule.strip((start, min(start + height, last))) for start in range(0, last, height))
    sources = tuple(dict.fromkeys(name for part in group for name in part.inputs if name not in inner))
    name = f"{group[0].name}...{group[-1].name}"
    joined = Strips(name, sources, group[-1].output, group, schedule.windows, strips, schedule.recomputed())
    return replace(program, operations=(joined, *program.operations[depth:]))


class _Schedule:
    """Which rows every operation computes in each strip."""

    def __init__(self, program: Program, group: Sequence[Operation], inner: set[str], recomputes: bool) -> None:
        self.tensors = program.tensors
        self.group, self.inner, self.recomputes = group, inner, recomputes
        self.windows: dict[str, int] = {}
        #: By tensor, the row at its window's top and the one behind the last that is there.
        self.state: dict[str, rows.Span] = {}
        self.computed = [0] * len(group)

    def strip(self, wanted: rows.Span) -> tuple[Step, ...]:
        """Return the steps that make some rows of the output."""
        needed = {self.group[-1].output: wanted}
        steps = []
        for place in reversed(range(len(self.group))):
            operation = self.group[place]
            span = needed.get(operation.output)
            if span is None or (step := self._step(place, operation.output, span)) is None:
                continue
            steps.append(step)
            for index, name in enumerate(operation.inputs):
                part = rows.span(operation, index, (step.first, step.last), self.tensors)
                known = needed.get(name, part)
                needed[name] = min(known[0], part[0]), max(known[1], part[1])
        return tuple(reversed(steps))

    def _step(self, place: int, name: str, span: rows.Span) -> Step | None:
        """Return what has to be computed and kept so that some rows are there; None where they are already."""
        top, end = self.state.get(name, (0, 0))
        kept = name in self.inner and not self.recomputes and top <= span[0] < end
        first = max(span[0], end) if kept else span[0]
        if first >= span[1]:
            return None
        moved = span[0] - top if kept else 0
        self.computed[place] += span[1] - first
        if name in self.inner:
            self.state[name] = span
            self.windows[name] = max(self.windows.get(name, 0), span[1] - span[0])
        return Step(place, first, span[1], span[0], moved)

    def recomputed(self) -> int:
        """Return the multiply-accumulates of rows that were computed more than once."""
        again = zip(self.group, self.computed, strict=True)
        return sum(
            rows.macs_per_row(operation, self.tensors) * max(count - self.tensors[operation.output].rows, 0)
            for operation, count in again
        )


def moved_bytes(strips: Strips, program: Program) -> int:
    """Return how many bytes are moved to the top of windows in a run."""
    return sum(
        (step.first - step.held) * program.tensors[strips.operations[step.operation].output].row_bytes
        for steps in strips.strips
        for step in steps
        if step.moved_from
    )
