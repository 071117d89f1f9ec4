"""Join what depends on one code alone into one table: x · HardSigmoid(x) is HardSwish, whatever the scales between."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from qcompile.backends.integer.interpret import Array, run
from qcompile.backends.integer.operations import Lookup
from qcompile.backends.integer.program import Operation, Program, Tensor
from qcompile.backends.integer.rows import BY_ELEMENTS

EVERY_CODE: Array = np.arange(-128, 128, dtype=np.int8).reshape(1, 256)


def join_tables(program: Program) -> Program:
    """Return the same program with as few tables as there can be, bit by bit the same function.

    Parameters
    ----------
    program : Program
        Without strips.
    """
    #: By tensor that is a function of one other tensor's codes, that tensor and the function.
    functions: dict[str, tuple[str, Array]] = {}
    joined: list[Operation] = []
    for operation in program.operations:
        source = _source(operation, functions, program.tensors)
        if source is None:
            joined.append(operation)
            continue
        inputs = [functions[name][1] if name != source else EVERY_CODE for name in operation.inputs]
        output = replace(program.tensors[operation.output], shape=EVERY_CODE.shape)
        table = run(operation, inputs, output).astype(np.int8)
        functions[operation.output] = source, table
        joined.append(Lookup(operation.name, (source,), operation.output, table.reshape(256)))
    return without_unread(replace(program, operations=tuple(joined)))


def _source(
    operation: Operation, functions: Mapping[str, tuple[str, Array]], tensors: Mapping[str, Tensor]
) -> str | None:
    """Return the one tensor whose codes tell an operation's result, element by element; None where there is none."""
    if not isinstance(operation, BY_ELEMENTS):
        return None
    shapes = {tensors[name].shape for name in (*operation.inputs, operation.output)}
    behind = {functions[name][0] if name in functions else name for name in operation.inputs}
    whole = all(tensors[name].dtype == "int8" for name in (*behind, *operation.inputs, operation.output))
    return behind.pop() if len(behind) == 1 and len(shapes) == 1 and whole else None


def without_unread(program: Program) -> Program:
    """Return the program without operations whose results nothing reads, and without tensors that nothing has."""
    needed = {port.tensor for port in program.outputs}
    operations = []
    for operation in reversed(program.operations):
        if needed.intersection(operation.outputs):
            needed.update(operation.inputs)
            operations.append(operation)
    needed.update(port.tensor for port in program.inputs)
    tensors = {name: tensor for name, tensor in program.tensors.items() if name in needed}
    return replace(program, tensors=tensors, operations=tuple(reversed(operations)))
