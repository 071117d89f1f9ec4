"""What a network takes of a device: flash, SRAM, multiply-accumulates, layer by layer."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from qcompile.backends.integer.memory import MemoryPlan
from qcompile.backends.integer.program import Program, Strips, Tensor
from qcompile.backends.integer.strips import Point, trade_off
from qcompile.backends.mcu.boards import Limits
from qcompile.backends.mcu.compiler import Compiled
from qcompile.backends.mcu.layers import Layer, Layers, macs, weight_bytes
from qcompile.core.errors import BudgetError


@dataclass(frozen=True)
class Row:
    """What one layer takes.

    Parameters
    ----------
    name, operation : str
    shape : tuple of int
        Of its output, as stored.
    bits : int
        Of each code of its output.
    macs : int
    weight_bytes : int
        With biases and multipliers.
    weight_bits : int
        That a weight takes in flash: 4 where two share a byte; 0 without weights.
    function : str
        Its C function.
    kernels : tuple of str
        The C functions that this calls, which other layers may share.
    """

    name: str
    operation: str
    shape: tuple[int, ...]
    bits: int
    macs: int
    weight_bytes: int
    weight_bits: int
    function: str
    kernels: tuple[str, ...]

    @classmethod
    def of(cls, layer: Layer, output: Tensor, count: int) -> Row:
        """Return what a layer with so many multiply-accumulates takes."""
        operation, size = layer.operation, weight_bytes([layer])
        kind = type(operation).__name__
        return cls(
            operation.name, kind, output.shape, output.bits, count, size, layer.weight_bits, layer.function, layer.names
        )  # fmt: skip


@dataclass(frozen=True)
class Footprint:
    """What a network takes, as far as it follows from the program alone.

    Parameters
    ----------
    name, target : str
        The network's prefix in C, and what it was compiled for.
    arena_bytes, arena_bound : int
        Of the arena, and what no placement stays below.
    weight_bytes : int
        Every constant.
    recomputed_macs : int
        That strips add.
    layers : tuple of Row
    trade_off : tuple of Point
        What strips take instead, each in less arena than those in front of it; empty where nobody asked.
    """

    name: str
    target: str
    arena_bytes: int
    arena_bound: int
    weight_bytes: int
    recomputed_macs: int
    layers: tuple[Row, ...]
    trade_off: tuple[Point, ...] = ()

    @classmethod
    def of(
        cls, name: str, target: str, plan: MemoryPlan, layers: Layers, trade_off: tuple[Point, ...] = ()
    ) -> Footprint:
        """Add up a program's layers."""
        tensors = plan.program.tensors
        rows = tuple(
            Row.of(layer, tensors[layer.operation.output], macs(layer.operation, tensors)) for layer in layers.layers
        )
        again = sum(part.recomputed for part in plan.program.operations if isinstance(part, Strips))
        return cls(name, target, plan.arena_bytes, plan.bound, weight_bytes(layers.layers), again, rows, trade_off)

    def require(self, limits: Limits, compiled: Compiled | None) -> None:
        """Hold it to what the device has.

        Raises
        ------
        BudgetError
            Naming what takes most, by how many bytes it is over, and what would help.
        """
        code, stack = (compiled.code_bytes, compiled.stack_bytes) if compiled else (0, 0)
        flash, sram = self.weight_bytes + code, self.arena_bytes + stack
        if limits.flash_bytes is not None and flash > limits.flash_bytes:
            largest = max(self.layers, key=lambda row: row.weight_bytes)
            fact = (
                f"the network takes {flash} bytes of flash, {flash - limits.flash_bytes} more than there are; "
                f"layer '{largest.name}' has {largest.weight_bytes} of them"
            )
            raise BudgetError(limits.flash_place, fact, "give it more flash, or train a smaller network")
        if limits.sram_bytes is not None and sram > limits.sram_bytes:
            fact = (
                f"the network takes {self.arena_bytes} bytes of arena and {stack} of stack, "
                f"{sram - limits.sram_bytes} more than there are"
            )
            raise BudgetError(limits.sram_place, fact, "give it more SRAM, or smaller maps in its first layers")

    def as_json(self) -> str:
        """Return it as ``footprint.json`` has it."""
        return json.dumps(asdict(self), indent=1) + "\n"

    def as_markdown(self) -> str:
        """Return tables for ``README.md``."""
        total = sum(row.macs for row in self.layers) + self.recomputed_macs
        head = [
            f"- {self.weight_bytes:,} bytes of constants in flash, besides the code",
            f"- {self.arena_bytes:,} bytes of arena in SRAM, besides the stack",
            f"- {total:,} multiply-accumulates",
        ]
        return "\n".join([*head, "", *_table(self.layers), *_curve(self.trade_off)])


def _table(layers: Iterable[Row]) -> list[str]:
    lines = ["| | layer | operation | output | multiply-accumulates | bits of weights | bytes |"]
    lines.append("|---|---|---|---|---|---|---|")
    for index, row in enumerate(layers):
        shape = "x".join(map(str, row.shape)) + ("" if row.bits == 8 else f", {row.bits} bits a code")
        name = row.name.replace("|", "/")
        bits = row.weight_bits or ""
        lines.append(f"| {index} | {name} | {row.operation} | {shape} | {row.macs:,} | {bits} | {row.weight_bytes:,} |")
    return lines


def front(program: Program) -> tuple[Point, ...]:
    """Return ways to run a program in strips: by rising work, each in less arena than all in front of it."""
    found: list[Point] = []
    for point, _ in trade_off(program):
        if not found or point.arena_bytes < found[-1].arena_bytes:
            found.append(point)
    return tuple(found)


def _curve(points: Sequence[Point]) -> list[str]:
    if not points:
        return []
    lines = ["", "Less arena for more work, as `--max-sram` chooses among:", ""]
    lines += ["| arena | layers in strips | rows | multiply-accumulates | bytes moved |", "|---|---|---|---|---|"]
    for point in points:
        rows = f"{point.height}, {'computed again' if point.recomputes else 'kept'}" if point.depth else ""
        lines.append(f"| {point.arena_bytes:,} | {point.depth} | {rows} | {point.macs:,} | {point.moved_bytes:,} |")
    return lines


def instructions_by_layer(layers: Sequence[Mapping[str, Any]], counted: Mapping[str, int]) -> list[int]:
    """Return the instructions of each layer from those of each function.

    Parameters
    ----------
    layers : sequence of mapping
        As ``footprint.json`` has them.
    counted : mapping of str to int
        Executed instructions by the compiler's names of functions, which may end in ``.constprop.0`` and the like.

    Notes
    -----
    A kernel that several layers share has one shape, so each of them takes an equal part of its instructions.
    """
    found = dict.fromkeys((layer["function"] for layer in layers), 0)
    for symbol, count in counted.items():
        name = symbol.partition(".")[0]
        callers = [layer["function"] for layer in layers if name == layer["function"] or name in layer["kernels"]]
        for caller in callers:
            found[caller] += count // len(callers)
    return list(found.values())


def measured(footprint: Footprint, compiled: Compiled | None, limits: Limits) -> dict[str, Any]:
    """Return what this machine's cross compiler adds, JSON-ready."""
    if compiled is None:
        return {"compiler": None}
    flash, sram = footprint.weight_bytes + compiled.code_bytes, footprint.arena_bytes + compiled.stack_bytes
    return {
        "compiler": compiled.compiler,
        "code_bytes": compiled.code_bytes,
        "stack_bytes": compiled.stack_bytes,
        "flash_bytes": flash,
        "sram_bytes": sram,
        "flash_left": None if limits.flash_bytes is None else limits.flash_bytes - flash,
        "sram_left": None if limits.sram_bytes is None else limits.sram_bytes - sram,
    }
