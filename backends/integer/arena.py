"""Run an integer program as a device does: in one arena, in rows and strips, with tensors lying on one another.

It is slow and says what `interpret` says, or the memory plan is wrong: what kernels may destroy, it does destroy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from qcompile.backends.integer import rows
from qcompile.backends.integer.interpret import Array, run
from qcompile.backends.integer.memory import MemoryPlan
from qcompile.backends.integer.operations import AveragePool, Conv, MaxPool, Resize, View
from qcompile.backends.integer.program import Operation, Step, Strips, Tensor

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
            machine.whole(port.tensor)[...] = inputs[port.name]
    for operation in plan.program.operations:
        if isinstance(operation, Strips):
            machine.run_strips(operation)
        elif not isinstance(operation, View):
            machine.run_whole(operation)
    return {port.name: machine.whole(port.tensor).copy() for port in plan.program.outputs}


class _Machine:
    """An arena, and where the windows in it stand."""

    def __init__(self, plan: MemoryPlan) -> None:
        self.plan = plan
        self.tensors = plan.program.tensors
        self.bytes = np.full(plan.arena_bytes, POISON, np.uint8)
        #: The row at the top of each window.
        self.held: dict[str, int] = {}

    def whole(self, name: str) -> npt.NDArray[Any]:
        """Return a tensor as it lies in the arena."""
        tensor = self.tensors[name]
        start = self.plan.offsets[name]
        return self.bytes[start : start + tensor.nbytes].view(tensor.dtype).reshape(tensor.shape)

    def part(self, name: str, span: rows.Span) -> npt.NDArray[Any]:
        """Return some rows of a tensor as they lie in the arena, shape (1, rows, ...)."""
        tensor = self.tensors[name]
        start = self.plan.offsets[name] + (span[0] - self.held.get(name, 0)) * tensor.row_bytes
        taken = self.bytes[start : start + (span[1] - span[0]) * tensor.row_bytes]
        return taken.view(tensor.dtype).reshape(rows_of(tensor, span[1] - span[0]).shape)

    def run_whole(self, operation: Operation) -> None:
        """Run an operation, by rows or elements where kernels do so."""
        if isinstance(operation, rows.BY_ROWS):
            for row in range(self.tensors[operation.output].rows):
                self.run_rows(operation, (row, row + 1))
        elif isinstance(operation, rows.BY_ELEMENTS):
            self._run_elements(operation)
        else:
            # Nothing that it reads may lie where it writes.
            output = self.whole(operation.output)
            output[...] = np.full(8, POISON, np.uint8).view(output.dtype)[0]
            output[...] = run(
                operation, [self.whole(name) for name in operation.inputs], self.tensors[operation.output]
            )

    def _run_elements(self, operation: Operation) -> None:
        """Write each element as soon as it was computed: what comes later has to be there still."""
        output, inputs = self.whole(operation.output), [self.whole(name) for name in operation.inputs]
        per_channel = [value.shape != output.shape for value in inputs]
        flat = [value.reshape(-1, value.shape[-1]) for value in inputs]
        for place, line in enumerate(output.reshape(-1, output.shape[-1])):
            parts = [value[0 if whole else place] for value, whole in zip(flat, per_channel, strict=True)]
            shape = (1,) * (output.ndim - 1) + line.shape
            single = replace(self.tensors[operation.output], shape=shape)
            line[...] = run(operation, [part.reshape(shape).copy() for part in parts], single).reshape(-1)

    def run_rows(self, operation: Operation, span: rows.Span) -> None:
        """Run an operation for some rows of its output."""
        output = self.part(operation.output, span)
        output[...] = np.full(8, POISON, np.uint8).view(output.dtype)[0]
        needed = [rows.span(operation, index, span, self.tensors) for index in range(len(operation.inputs))]
        inputs = [self.part(name, part) for name, part in zip(operation.inputs, needed, strict=True)]
        partial = _for_rows(operation, span, needed[0][0], self.tensors[operation.inputs[0]].rows)
        output[...] = run(
            partial, [value.copy() for value in inputs], rows_of(self.tensors[operation.output], len(output[0]))
        )

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
                kept = self.part(
                    name,
                    (self.held[name] + step.moved_from, self.held[name] + step.moved_from + step.first - step.held),
                ).copy()
                self.held[name] = step.held
                self.part(name, (step.held, step.first))[...] = kept
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
