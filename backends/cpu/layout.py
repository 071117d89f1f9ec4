"""Where tensors lie: padding becomes a margin around the map, so that kernels read windows without asking."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from math import prod

import numpy as np

from qcompile.backends.integer import operations as ops
from qcompile.backends.integer.float_operations import BlockDense, FloatMatMul, MatMul
from qcompile.backends.integer.memory import assign_offsets
from qcompile.backends.integer.program import Operation, Program, Tensor
from qcompile.backends.tvm.schedules.block_dense import scratch_bytes
from qcompile.backends.tvm.schedules.float_products import room

#: Tensors begin at multiples of this many bytes: a line of the cache, and the widest register.
ALIGNMENT = 64
#: Outputs are packed in multiples of no more than this.
LANES = 16
#: Bytes behind the last tensor that kernels may read, and do nothing with.
SLACK = 256
#: Threads of an instance at most, bytes in front of all tensors for them, and which of these says what network is run;
#: see pool.c.
THREADS, POOL, NETWORK = 16, 2176, 4


@dataclass(frozen=True)
class Place:
    """Where a tensor's codes are. Steps are bytes.

    Parameters
    ----------
    base : str
        The tensor whose bytes they are among.
    offset : int
        From the start of those.
    row, column : int
        From one row, or column, to the next.
    """

    base: str
    offset: int
    row: int
    column: int


@dataclass(frozen=True)
class Margin:
    """What surrounds a map in its bytes.

    Parameters
    ----------
    before, after : tuple of int
        Rows and columns.
    code : int
    """

    before: tuple[int, int]
    after: tuple[int, int]
    code: int


@dataclass(frozen=True)
class Layout:
    """A program whose windows have no padding, and where its tensors lie.

    Parameters
    ----------
    program : Program
    places : mapping of str to Place
    offsets : mapping of str to int
        Of each base in the workspace.
    margins : mapping of str to Margin
        Of each tensor that lies within one.
    workspace : int
        Bytes.
    tables : mapping of str to Lookup
        By what an operation with weights writes, the table that its codes go through first.
    scratch : int
        Where in the workspace products of two activations pack one of them, each at a place of its own.
    """

    program: Program
    places: Mapping[str, Place]
    offsets: Mapping[str, int]
    margins: Mapping[str, Margin]
    workspace: int
    tables: Mapping[str, ops.Lookup] = field(default_factory=dict)
    scratch: int = 0

    def at(self, name: str) -> int:
        """Return a tensor's first byte in the workspace."""
        place = self.places[name]
        return self.offsets[place.base] + place.offset


def extents(tensor: Tensor) -> tuple[int, int, int]:
    """Return rows, columns and channels; what is no map is one row."""
    if len(tensor.shape) == 4:
        return tensor.shape[0] * tensor.shape[1], tensor.shape[2], tensor.shape[3]
    channels = max(tensor.shape[-1:], default=1)
    return 1, tensor.size // channels, channels


def lay_out(program: Program, joins: bool = False) -> Layout:
    """Return where a program's tensors lie.

    Parameters
    ----------
    program : Program
    joins : bool
        Whether a kernel with weights may look its codes up in a table.
    """
    program, tables = with_tables(program) if joins else (program, {})
    program = with_pads(program)
    within = _absorbed(program)
    places: dict[str, Place] = {}
    margins: dict[str, Margin] = {}
    for name, tensor in program.tensors.items():
        _, columns, channels = extents(tensor)
        places[name] = Place(name, 0, columns * channels, channels)
        if name in within:
            pad = within[name]
            row = program.tensors[pad.output].shape[2] * channels
            places[name] = Place(pad.output, pad.before[1] * row + pad.before[2] * channels, row, channels)
            margins[name] = Margin((pad.before[1], pad.before[2]), (pad.after[1], pad.after[2]), pad.code)
    kept = tuple(part for part in program.operations if part not in within.values())
    plan = assign_offsets(_planned(replace(program, operations=kept), places), overlap=False, exact=False)
    offsets = {name: POOL + at for name, at in plan.offsets.items()}
    workspace = POOL + plan.arena_bytes + SLACK
    scratch = -(-workspace // ALIGNMENT) * ALIGNMENT
    packed = max(map(partial(_scratch, program), kept), default=0)
    kept_program = replace(program, operations=kept)
    return Layout(kept_program, places, offsets, margins, scratch + packed if packed else workspace, tables, scratch)


def _scratch(program: Program, part: Operation) -> int:
    """Return the bytes beside its tensors that an operation works in."""
    if isinstance(part, MatMul):
        return packed_bytes(part) * prod(part.extents[:-3])
    if isinstance(part, FloatMatMul):
        return packed_floats(part) * prod(part.extents[:-3])
    if isinstance(part, BlockDense):
        length = part.weights.shape[1]
        return scratch_bytes(program.tensors[part.inputs[0]].size // length, length, part.block)
    return 0


def packed_floats(part: FloatMatMul) -> int:
    """Return what a product's second matrix takes with its outputs side by side."""
    return room(*part.extents[-2:])


def packed_bytes(part: MatMul) -> int:
    """Return what a product's second matrix takes at most, with biases and scales."""
    deep, wide = part.extents[-2:]
    groups, lanes = -(-deep // 4), -(-wide // LANES) * LANES
    # Tiles have up to sixteen groups of four, all the same.
    groups += -(-groups // LANES)
    return -(-lanes * (groups * 4 + 3 * 4) // ALIGNMENT) * ALIGNMENT


def with_tables(program: Program) -> tuple[Program, dict[str, ops.Lookup]]:
    """Return a program in which operations with weights write what a table makes of their codes, and those tables."""
    readers: dict[str, list[Operation]] = {}
    for part in program.operations:
        for name in part.inputs:
            readers.setdefault(name, []).append(part)
    seen = {port.tensor for port in program.outputs}
    found: dict[str, ops.Lookup] = {}
    operations: list[Operation] = []
    for part in program.operations:
        behind = readers.get(part.output, [])
        if isinstance(part, ops.Conv | ops.Dense) and len(behind) == 1 and part.output not in seen:
            (reader,) = behind
            if isinstance(reader, ops.Lookup):
                found[reader.output] = reader
                part = replace(part, output=reader.output)
        operations.append(part)
    kept = tuple(part for part in operations if not isinstance(part, ops.Lookup) or part not in found.values())
    used = {name for part in kept for name in (*part.inputs, part.output)} | seen
    used |= {port.tensor for port in program.inputs}
    tensors = {name: tensor for name, tensor in program.tensors.items() if name in used}
    return replace(program, operations=kept, tensors=tensors), found


def with_pads(program: Program) -> Program:
    """Return a program in which padding is an operation of its own, once for all that read the same."""
    tensors, operations = dict(program.tensors), list[Operation]()
    made: dict[tuple[object, ...], str] = {}
    for operation in program.operations:
        if isinstance(operation, ops.Conv | ops.AveragePool | ops.MaxPool):
            window, source = operation.window, program.tensors[operation.inputs[0]]
            before, after = _needed(window, source, program.tensors[operation.output])
            code = -128 if isinstance(operation, ops.MaxPool) else window.outside
            if any((*before, *after)):
                key = (source.name, before, after, code)
                if key not in made:
                    made[key] = name = f"{source.name}#{len(made)}"
                    shape = (source.shape[0], *_grown(source.shape[1:3], before, after), source.shape[3])
                    tensors[name] = replace(source, name=name, shape=shape)
                    pad = ops.Pad(operation.name, (source.name,), name, (0, *before, 0), (0, *after, 0), code)
                    operations.append(pad)
                bare = replace(window, pads=(0, 0, 0, 0))
                operation = replace(operation, inputs=(made[key], *operation.inputs[1:]), window=bare)
        operations.append(operation)
    return replace(program, tensors=tensors, operations=tuple(operations))


def _grown(shape: tuple[int, ...], before: tuple[int, int], after: tuple[int, int]) -> tuple[int, int]:
    rows, columns = (n + more + less for n, more, less in zip(shape, before, after, strict=True))
    return rows, columns


def _needed(window: ops.Window, source: Tensor, target: Tensor) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return the margin that windows reach into: before, and behind."""
    reach = [
        (target.shape[axis + 1] - 1) * window.strides[axis] + (window.size[axis] - 1) * window.dilations[axis] + 1
        for axis in (0, 1)
    ]
    behind = [max(0, reach[axis] - window.pads[axis] - source.shape[axis + 1]) for axis in (0, 1)]
    return (window.pads[0], window.pads[1]), (behind[0], behind[1])


def _absorbed(program: Program) -> dict[str, ops.Pad]:
    """Return for each tensor that can be written into its margin at once the operation that would copy it there."""
    viewed = {name for part in program.operations if isinstance(part, ops.View) for name in (*part.inputs, part.output)}
    outputs = {port.tensor for port in program.outputs}
    # A port's floats are gone through along its own axes, which have to be the map's.
    reshaped = {port.tensor for port in (*program.inputs, *program.outputs)
                if tuple(port.shape[axis] for axis in port.axes) != program.tensors[port.tensor].shape}  # fmt: skip
    viewed |= reshaped
    found: dict[str, ops.Pad] = {}
    for part in program.operations:
        if isinstance(part, ops.Pad) and len(part.before) == 4:
            source = part.inputs[0]
            plain = not any((part.before[0], part.before[3], part.after[0], part.after[3]))
            free = source not in found and source not in viewed and part.output not in viewed
            # What lies in a margin that is itself padded would move with it: one level is enough.
            apart = part.output not in outputs and source not in {pad.output for pad in found.values()}
            if plain and free and apart and program.tensors[source].shape[0] == 1:
                found[source] = part
    inner = {pad.output for pad in found.values()}
    return {name: pad for name, pad in found.items() if name not in inner and pad.output not in found}


def _planned(program: Program, places: Mapping[str, Place]) -> Program:
    """Return the program as the memory planner is to see it: bases only, of whole lines."""

    def base(name: str) -> str:
        return places[name].base

    def renamed(part: Operation) -> Operation:
        return replace(part, inputs=tuple(dict.fromkeys(map(base, part.inputs))), output=base(part.output))

    used = {base(name) for part in program.operations for name in (*part.inputs, part.output)}
    used |= {base(port.tensor) for port in (*program.inputs, *program.outputs)}
    tensors = {}
    for name in sorted(used):
        lines = -(-program.tensors[name].nbytes // ALIGNMENT) * ALIGNMENT
        tensors[name] = replace(program.tensors[name], shape=(lines,), dtype="int8")
    ports = [
        tuple(replace(port, tensor=base(port.tensor)) for port in group) for group in (program.inputs, program.outputs)
    ]
    return replace(
        program, tensors=tensors, operations=tuple(map(renamed, program.operations)), inputs=ports[0], outputs=ports[1]
    )


def strides(layout: Layout, tensor: Tensor) -> tuple[int, ...]:
    """Return how many elements, bytes of codes, are from one to the next along each axis."""
    if len(tensor.shape) == 4:
        place = layout.places[tensor.name]
        return tensor.shape[1] * place.row, place.row, place.column, 1
    return tuple(int(np.prod(tensor.shape[axis + 1 :], dtype=np.int64)) for axis in range(len(tensor.shape)))
