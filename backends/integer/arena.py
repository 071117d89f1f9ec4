"""Run an integer program as a device does: in one arena, in rows and strips, with tensors lying on one another.

It is slow and says what `interpret` says, or the memory plan is wrong: what kernels may destroy, it does destroy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from qcompile.backends.integer import rows
from qcompile.backends.integer.interpret import Array, run
from qcompile.backends.integer.memory import MemoryPlan
from qcompile.backends.integer.operations import AveragePool, Conv, MaxPool, Resize, View
from qcompile.backends.integer.program import Operation, Step, Strips, Tensor
from qcompile.backends.integer.storage import from_bytes, to_bytes

#: What bytes hold that a kernel was free to write: no code that a computation would give by chance everywhere.
POISON = 0x5A


def run_in_arena(plan: MemoryPlan, inputs: Mapping[str, Array]) -> dict[str, Array]:
    """Return the outputs' codes for the inputs' codes, as `interpret` does.

    Parameters
    ----------
    plan : MemoryPlan
    inputs : mapping of str to ndarray
        By port name.
    """
    machine = _Machine(plan)
    for port in plan.program.inputs:
        if port.tensor in plan.offsets:
            machine.write(port.tensor, inputs[port.name])
    for operation in plan.program.operations:
        if isinstance(operation, Strips):
            machine.run_strips(operation)
        elif not isinstance(operation, View):
            machine.run_whole(operation)
    return {port.name: machine.read(port.tensor) for port in plan.program.outputs}


class _Machine:
    """An arena, and where the windows in it stand."""

    def __init__(self, plan: MemoryPlan) -> None:
        self.plan = plan
        self.tensors = plan.program.tensors
        self.bytes = np.full(plan.arena_bytes, POISON, np.uint8)
        #: The row at the top of each window.
        self.held: dict[str, int] = {}

    def _bytes(self, name: str, span: rows.Span) -> npt.NDArray[np.uint8]:
        """Return the part of the arena that some rows of a tensor lie in."""
        row = self.tensors[name].row_bytes
        start = self.plan.offsets[name] + (span[0] - self.held.get(name, 0)) * row
        return self.bytes[start : start + (span[1] - span[0]) * row]

    def read(self, name: str, span: rows.Span | None = None) -> Array:
        """Return the codes of some rows of a tensor, or of all."""
        tensor = self.tensors[name]
        first, last = span or (0, tensor.rows)
        shape = rows_of(tensor, last - first).shape if span else tensor.shape
        return from_bytes(self._bytes(name, (first, last)), tensor.dtype).reshape(shape).copy()

    def write(self, name: str, codes: Array, span: rows.Span | None = None) -> None:
        """Write the codes of some rows of a tensor, or of all."""
        self._bytes(name, span or (0, self.tensors[name].rows))[...] = to_bytes(codes, self.tensors[name].dtype)

    def spoil(self, name: str, span: rows.Span | None = None) -> None:
        """Destroy some rows of a tensor, or all: what a kernel may write before it has read its inputs."""
        self._bytes(name, span or (0, self.tensors[name].rows))[...] = POISON

    def run_whole(self, operation: Operation) -> None:
        """Run an operation, by rows or elements where kernels do so."""
        if isinstance(operation, rows.BY_ROWS):
            for row in range(self.tensors[operation.output].rows):
                self.run_rows(operation, (row, row + 1))
        elif isinstance(operation, rows.BY_ELEMENTS):
            self._run_elements(operation)
        else:
            # Nothing that it reads may lie where it writes.
            self.spoil(operation.output)
            inputs = [self.read(name) for name in operation.inputs]
            self.write(operation.output, run(operation, inputs, self.tensors[operation.output]))

    def _run_elements(self, operation: Operation) -> None:
        """Write each element as soon as it was computed: what comes later has to be there still."""
        output = self.tensors[operation.output]
        channels = output.shape[-1]
        # Codes of half a byte come in pairs: two pixels, where one has an odd number of them.
        step = channels * (2 if output.bits == 4 and channels % 2 else 1)
        for place in range(0, output.size, step):
            parts = []
            for name in operation.inputs:
                whole = self.tensors[name].shape == output.shape
                parts.append(self._codes(name, place if whole else 0, step if whole else channels))
            shape = (1,) * (len(output.shape) - 1) + (step,)
            made = run(operation, [part.reshape((*shape[:-1], -1)) for part in parts], replace(output, shape=shape))
            start = self.plan.offsets[operation.output] + place * output.bits // 8
            stored = to_bytes(made, output.dtype)
            self.bytes[start : start + stored.size] = stored

    def _codes(self, name: str, place: int, count: int) -> Array:
        """Return so many codes of a tensor from one on, which stands at the beginning of a byte or in its middle."""
        tensor = self.tensors[name]
        start, end = (self.plan.offsets[name] * 8 + at * tensor.bits for at in (place, place + count))
        found = from_bytes(self.bytes[start // 8 : -(-end // 8)], tensor.dtype)
        skipped = start % 8 // tensor.bits
        return found[skipped : skipped + count].copy()

    def run_rows(self, operation: Operation, span: rows.Span) -> None:
        """Run an operation for some rows of its output."""
        self.spoil(operation.output, span)
        needed = [rows.span(operation, index, span, self.tensors) for index in range(len(operation.inputs))]
        inputs = [self.read(name, part) for name, part in zip(operation.inputs, needed, strict=True)]
        partial = _for_rows(operation, span, needed[0][0], self.tensors[operation.inputs[0]].rows)
        made = run(partial, inputs, rows_of(self.tensors[operation.output], span[1] - span[0]))
        self.write(operation.output, made, span)

    def run_strips(self, strips: Strips) -> None:
        """Run operations strip by strip."""
        for steps in strips.strips:
            for step in steps:
                self._run_step(strips, step)
        self.held.clear()

    def _run_step(self, strips: Strips, step: Step) -> None:
        operation = strips.operations[step.operation]
        name = operation.output
        if name in strips.windows:
            if step.moved_from:
                top = self.held[name] + step.moved_from
                kept = self.read(name, (top, top + step.first - step.held))
                self.held[name] = step.held
                self.write(name, kept, (step.held, step.first))
            self.held[name] = step.held
        self.run_rows(operation, (step.first, step.last))


def rows_of(tensor: Tensor, count: int) -> Tensor:
    """Return a tensor of so many rows of another."""
    if len(tensor.shape) == 4:
        return replace(tensor, shape=(1, count, *tensor.shape[2:]))
    return replace(tensor, shape=(1, count, tensor.shape[-1]))


def _for_rows(operation: Operation, span: rows.Span, first: int, height: int) -> Operation:
    """Return what makes some rows of the output from the rows of the input that these need."""
    if isinstance(operation, Conv | AveragePool | MaxPool):
        return replace(operation, window=rows.padded(operation.window, span, height))
    if isinstance(operation, Resize):
        return replace(operation, rows=tuple(row - first for row in operation.rows[span[0] : span[1]]))
    return operation
