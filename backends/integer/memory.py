"""Where tensors lie in one static arena: liveness, what may overlap, and offsets that reach the least bytes possible.

An output may lie on an input that is read for the last time, as far as its rows are written behind the rows that are
still read (`rows.gap`): the diagonal memory optimisation of Blacker et al. 2020, arXiv:2010.01668, by rows.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import networkx

from qcompile.backends.integer import rows
from qcompile.backends.integer.exact_offsets import exact_offsets
from qcompile.backends.integer.operations import View
from qcompile.backends.integer.program import Operation, Program, Strips

#: Offsets are multiples of this many bytes: kernels load four codes at once.
ALIGNMENT = 4
#: Orders in which buffers are placed, beyond those that mostly serve.
ATTEMPTS = 40


@dataclass(frozen=True)
class MemoryPlan:
    """Where each tensor lies.

    Parameters
    ----------
    program : Program
        In the order, and with the strips, that it is planned for.
    arena_bytes : int
    offsets : mapping of str to int
        By tensor, its first byte; of a tensor between the operations of `Strips` its window's.
    bound : int
        Bytes that no placement stays below with this order of operations.
    disjoint_bound : int
        What that would be if no two tensors that live at one time overlapped.
    peak : str
        Name of the operation that needs most.
    optimal : bool
        Whether it is known that no placement takes fewer bytes, with this order of operations.
    """

    program: Program
    arena_bytes: int
    offsets: Mapping[str, int]
    bound: int
    disjoint_bound: int
    peak: str = ""
    optimal: bool = False


@dataclass(frozen=True)
class Buffer:
    """Bytes that one or several tensors lie in: views share their input's.

    Parameters
    ----------
    name : str
        Of the first tensor in it.
    size : int
    born, dies : int
        Operations that write it first and read it last; -1 and their number for inputs and outputs of the program.
    """

    name: str
    size: int
    born: int
    dies: int

    def lives_with(self, other: Buffer) -> bool:
        """Tell whether both are needed during some operation."""
        return self.born <= other.dies and other.born <= self.dies


def aligned(count: int) -> int:
    """Return a number of bytes rounded up to the alignment."""
    return -(-count // ALIGNMENT) * ALIGNMENT


def owners(program: Program) -> dict[str, str]:
    """Return for each tensor the one whose bytes it has: itself, or what it is a view of."""
    found = {name: name for name in program.tensors}
    for operation in program.operations:
        for part in operation.operations if isinstance(operation, Strips) else (operation,):
            if isinstance(part, View):
                found[part.output] = found[part.inputs[0]]
    return found


class Layout:
    """What has to be placed, and what stands against it.

    Parameters
    ----------
    program : Program
    overlap : bool
        Whether an output may overlap an input at all.
    """

    def __init__(self, program: Program, overlap: bool = True) -> None:
        self.program, self.overlap = program, overlap
        self.owner = owners(program)
        self.buffers = self._lifetimes()
        #: Directed: bytes that the second buffer begins above the first at least, if it lies above.
        self.gaps: dict[tuple[str, str], int] = {}
        #: Times and indices of inputs that an output may lie on.
        self.lying: set[tuple[int, int]] = set()
        self.graph = self._interference()

    def _lifetimes(self) -> dict[str, Buffer]:
        born = {self.owner[port.tensor]: -1 for port in self.program.inputs}
        dies: dict[str, int] = {}
        sizes: dict[str, int] = {}
        for time, operation in enumerate(self.program.operations):
            windows = operation.windows if isinstance(operation, Strips) else {}
            for name in windows:
                sizes[name] = windows[name] * self.program.tensors[name].row_bytes
            for name in (*operation.inputs, *operation.outputs, *windows):
                born.setdefault(self.owner[name], time)
                dies[self.owner[name]] = time
        end = len(self.program.operations)
        dies |= {self.owner[port.tensor]: end for port in self.program.outputs}
        return {
            name: Buffer(name, aligned(sizes.get(name, self.program.tensors[name].nbytes)), time, dies.get(name, time))
            for name, time in born.items()
        }

    def _interference(self) -> networkx.Graph:
        graph = networkx.Graph()
        graph.add_nodes_from(self.buffers)
        names = list(self.buffers)
        for index, name in enumerate(names):
            for other in names[index + 1 :]:
                if self.buffers[name].lives_with(self.buffers[other]):
                    graph.add_edge(name, other)
                    self.gaps[name, other] = self.buffers[name].size
                    self.gaps[other, name] = self.buffers[other].size
        for time, operation in enumerate(self.program.operations):
            if isinstance(operation, Strips):
                self._share_windows(graph, operation)
            if self.overlap:
                self._overlap(time, operation)
        return graph

    def _overlap(self, time: int, operation: Operation) -> None:
        """Let an output lie on inputs that nothing reads later."""
        output = self.owner[operation.output]
        for index, name in enumerate(operation.inputs):
            source = self.owner[name]
            ends_here = self.buffers[source].dies == time and self.buffers[output].born == time
            reads = [place for place, other in enumerate(operation.inputs) if self.owner[other] == source]
            if ends_here and source != output and len(reads) == 1:
                self.gaps[output, source] = aligned(rows.gap(operation, index, self.program.tensors))
                self.lying.add((time, index))

    def _share_windows(self, graph: networkx.Graph, strips: Strips) -> None:
        """Let windows share bytes that are never held at one time."""
        lives = _window_steps(strips)
        names = [name for name in strips.windows if name in lives]
        for index, name in enumerate(names):
            for other in names[index + 1 :]:
                apart = lives[name][1] < lives[other][0] or lives[other][1] < lives[name][0]
                if apart and graph.has_edge(name, other):
                    graph.remove_edge(name, other)
                    del self.gaps[name, other], self.gaps[other, name]

    def bound(self) -> tuple[int, str]:
        """Return the most bytes that any one operation needs, and which one that is."""
        found = [(self.needed(time), operation.name) for time, operation in enumerate(self.program.operations)]
        return max(found, key=lambda one: one[0], default=(0, ""))

    def holds(self, offsets: Mapping[str, int]) -> bool:
        """Tell whether offsets are aligned and keep all buffers as far apart as they have to be."""
        apart = (
            offsets[other] >= offsets[one] + self.gaps[one, other]
            or offsets[one] >= offsets[other] + self.gaps[other, one]
            for one, other in self.graph.edges
        )
        return all(offset >= 0 and offset % ALIGNMENT == 0 for offset in offsets.values()) and all(apart)

    def together(self, time: int) -> list[list[str]]:
        """Return the sets of buffers that an operation has at one time: several, where windows take turns."""
        operation = self.program.operations[time]
        alive = [name for name, buffer in self.buffers.items() if buffer.born <= time <= buffer.dies]
        windows = set(operation.windows).intersection(alive) if isinstance(operation, Strips) else set[str]()
        whole = [name for name in alive if name not in windows]
        cliques = sorted(map(sorted, networkx.find_cliques(self.graph.subgraph(windows)))) if windows else [[]]
        return [[*whole, *clique] for clique in cliques]

    def needed(self, time: int) -> int:
        """Return the bytes of what lives during an operation."""
        operation = self.program.operations[time]
        alive = {name: buffer.size for name, buffer in self.buffers.items() if buffer.born <= time <= buffer.dies}
        total = max(sum(alive[name] for name in together) for together in self.together(time))
        output = self.owner[operation.output]
        savings = [0]
        for name in operation.inputs:
            source = self.owner[name]
            if (output, source) in self.gaps:
                together = max(alive[output], self.gaps[output, source] + alive[source])
                savings.append(alive[output] + alive[source] - together)
        return total - max(savings)


def _window_steps(strips: Strips) -> dict[str, tuple[int, int]]:
    """Return for each window the first and last step of a strip that need it; all, where rows are kept in it."""
    whole = (0, len(strips.operations))
    made = [strips.operations[step.operation].output for steps in strips.strips for step in steps
            if step.held == step.first]  # fmt: skip
    # A strip that does not make all rows that its window holds has some from the strip before.
    kept = {name for name in strips.windows if made.count(name) < len(strips.strips)}
    found: dict[str, tuple[int, int]] = {}
    for place, operation in enumerate(strips.operations):
        for name in (*operation.inputs, operation.output):
            if name in strips.windows:
                first = found.get(name, (place, place))[0]
                found[name] = whole if name in kept else (first, place)
    return found


def assign_offsets(program: Program, overlap: bool = True, exact: bool = True) -> MemoryPlan:
    """Place every tensor of a program in an arena.

    Parameters
    ----------
    program : Program
    overlap : bool
        Whether an output may overlap an input that is read for the last time. The kernels have to keep
        docs/integer-kernels.md's rules of rows and elements then.
    exact : bool
        Whether to look for the fewest bytes, and prove them, where what is quickly found does not reach the bound.
    """
    layout = Layout(program, overlap)
    bound, peak = layout.bound()
    best: dict[str, int] | None = None
    least = 0
    for order in _orders(layout):
        placed = _placed(layout, order)
        extent = max((offset + layout.buffers[name].size for name, offset in placed.items()), default=0)
        if best is None or extent < least:
            best, least = placed, extent
        if least <= bound:
            break
    best = best or {}
    optimal = least <= bound
    if not optimal and exact:
        best, optimal = exact_offsets(layout, best, least)
        least = max(offset + layout.buffers[name].size for name, offset in best.items())
    offsets = {name: best[owner] for name, owner in layout.owner.items() if owner in best}
    disjoint = bound if not overlap else Layout(program, overlap=False).bound()[0]
    return MemoryPlan(program, least, offsets, bound, disjoint, peak, optimal)


def _orders(layout: Layout) -> list[list[str]]:
    """Return orders in which to place buffers: by size, by time, along the conflicts, and random ones."""
    buffers = layout.buffers
    by_size = sorted(buffers, key=lambda name: (-buffers[name].size, buffers[name].born))
    by_time = sorted(buffers, key=lambda name: (buffers[name].born, -buffers[name].size))
    by_weight = sorted(buffers, key=lambda name: -buffers[name].size * (buffers[name].dies - buffers[name].born + 1))
    # From the operation that needs most outward: what is tightest is placed while everything is free.
    needs = [layout.needed(time) for time in range(len(layout.program.operations))]
    peak = needs.index(max(needs)) if needs else 0
    by_distance = sorted(
        buffers, key=lambda name: (max(buffers[name].born - peak, peak - buffers[name].dies, 0), -buffers[name].size)
    )
    orders = [by_distance, by_size, by_time, by_weight, by_time[::-1]]
    source = random.Random(0)
    for attempt in range(ATTEMPTS):
        other = list(orders[attempt % 4])
        for _ in range(1 + attempt % 3):
            a, b = source.randrange(len(other)), source.randrange(len(other))
            other[a], other[b] = other[b], other[a]
        orders.append(other)
    return orders


def _placed(layout: Layout, order: Sequence[str]) -> dict[str, int]:
    """Place buffers one by one where the arena grows least; offsets may go below 0 until all are placed."""
    placed: dict[str, int] = {}
    low = high = 0
    for name in order:
        size = layout.buffers[name].size
        against = [other for other in layout.graph.neighbors(name) if other in placed]
        candidates = {low, high - size}
        for other in against:
            candidates |= {placed[other] + layout.gaps[other, name], placed[other] - layout.gaps[name, other]}
        free = [offset for offset in candidates if _is_free(layout, placed, name, offset, against)]
        offset = min(free, key=lambda start: (max(high, start + size) - min(low, start), start))
        placed[name] = offset
        low, high = (min(low, offset), max(high, offset + size)) if len(placed) > 1 else (offset, offset + size)
    return {name: offset - low for name, offset in placed.items()}


def _is_free(layout: Layout, placed: Mapping[str, int], name: str, offset: int, against: Sequence[str]) -> bool:
    return all(
        offset >= placed[other] + layout.gaps[other, name] or placed[other] >= offset + layout.gaps[name, other]
        for other in against
    )
