"""The backend ``mcu``: a package of C for microcontrollers."""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import onnx_ir as ir

from qcompile.backends.base import Lowered, Unpriced, read_targets, require_no_segments, require_one_length
from qcompile.backends.integer import map_bits
from qcompile.backends.integer.interpret import dequantize_output, quantize_input
from qcompile.backends.integer.lower import lower
from qcompile.backends.integer.memory import MemoryPlan, assign_offsets
from qcompile.backends.integer.program import Program
from qcompile.backends.integer.strips import Point, plan_memory
from qcompile.backends.mcu import footprint as footprints
from qcompile.backends.mcu.boards import Limits, check_board
from qcompile.backends.mcu.compiler import Compiled, compile_package
from qcompile.backends.mcu.footprint import Footprint
from qcompile.backends.mcu.host import HostNetwork
from qcompile.backends.mcu.layers import Layers
from qcompile.backends.mcu.package import Example, write_package
from qcompile.backends.mcu.write_c import Source, identifier
from qcompile.backends.tvm.emit import load_tvm
from qcompile.backends.tvm.kernels import constant_bytes
from qcompile.core import model as models
from qcompile.core.errors import BudgetError
from qcompile.core.plan import Precision, QuantPlan
from qcompile.core.runtime import Feeds, Outputs
from qcompile.core.target import Target

#: The quantized model that the C computes, beside it.
REFERENCE = "reference.onnx"
#: Bytes of stack that no network has taken: with so many left nobody has to look.
MOST_STACK = 16384
#: So often bits are chosen again because the stack was larger than reckoned.
ATTEMPTS = 3
#: What code takes of flash at most, when weights' bits are chosen: it is not written yet. What it really takes is held
#: to the bound in the end.
CODE_BYTES = 16 << 10


class McuBackend(Unpriced):
    """The backend ``mcu``."""

    name: ClassVar[str] = "mcu"
    unpriced: ClassVar[str] = "has no clock here: an emulator counts instructions, which are no times"

    def targets(self) -> Iterable[Target]:
        """Return the targets of backends/mcu/targets."""
        return read_targets("qcompile.backends.mcu")

    def available(self) -> bool:
        """Tell whether TVM is installed, which generates the kernels."""
        return importlib.util.find_spec("tvm") is not None

    def check(self, target: Target) -> None:
        """Refuse a board that is none of the target's, and a machine without TVM.

        Raises
        ------
        UsageError, TargetError
        """
        require_no_segments(target)
        require_one_length(target, f"has no package of {target.name}, which is for one shape")
        if board := target.settings.get("board"):
            check_board(board, target)
        if not self.available():
            load_tvm()

    def lower(self, model: ir.Model, plan: QuantPlan, target: Target, folder: Path) -> Lowered:
        """Write the package; see docs/targets/mcu.md.

        Raises
        ------
        TargetError
            If an operator has no integer form.
        BudgetError
            If the network does not fit.
        """
        program, limits = lower(model), Limits.of(target.settings)
        built = _fitted(program, target, limits, folder)
        models.save(model, folder / REFERENCE)
        kernels = {name: "C" for name, op in plan.ops.items() if op.precision is Precision.INTEGER and not op.reason}
        sizes = {"weights, biases and multipliers": built.footprint.weight_bytes}
        measured = footprints.measured(built.footprint, built.compiled, limits)
        return Lowered((*built.files, REFERENCE), kernels, (), sizes, measured)

    def size(self, model: ir.Model) -> int:
        """Return the bytes of constants that `lower` would write, where nothing runs in strips."""
        program = lower(model)
        return sum(constant_bytes(operation, program.tensors) for operation in program.operations)

    def room(self, settings: Mapping[str, Any]) -> int | None:
        """Return the bytes of flash that are left for constants beside code."""
        flash = Limits.of(settings).flash_bytes
        return None if flash is None else flash - CODE_BYTES

    def narrowable(self, model: ir.Model, target: Target, tied: Mapping[str, str]) -> tuple[str, ...]:
        """Return the maps that may have four bits, where eight do not fit in strips either."""
        limits = Limits.of(target.settings)
        if limits.sram_bytes is None:
            return ()
        program = lower(model)
        return () if fits(program, target, limits.sram_bytes) else tuple(map_bits.narrowable(program, tied))

    def narrowed(
        self, model: ir.Model, target: Target, tied: Mapping[str, str], losses: Mapping[str, float]
    ) -> tuple[str, ...]:
        """Return the maps to store in four bits: an integer program's choice; see `map_bits`.

        Raises
        ------
        BudgetError
            If all in four bits do not fit: it names the bytes, and the operation that needs most.
        """
        limits, program = Limits.of(target.settings), lower(model)
        groups = {name: names for name, names in map_bits.narrowable(program, tied).items() if name in losses}
        if limits.sram_bytes is None or fits(program, target, limits.sram_bytes):
            return ()
        return fitting(program, groups, losses, target, limits).narrow

    def open(self, folder: Path, files: tuple[str, ...], threads: int = 1) -> Callable[[Feeds], Outputs]:
        """Compile the package for this machine and return a function that runs one sample."""
        del threads, files
        program = lower(models.load(folder / REFERENCE))
        network = HostNetwork(folder, identifier(program.name), program)

        def run(feeds: Feeds) -> Outputs:
            codes = {port.name: quantize_input(program, port, feeds[port.name]) for port in program.inputs}
            made = network.run(codes)
            return {port.name: dequantize_output(program, port, made[port.name]) for port in program.outputs}

        return run


def fits(program: Program, target: Target, sram_bytes: int) -> bool:
    """Tell whether arena and stack fit with every map in eight bits."""
    try:
        plan = plan_memory(program, sram_bytes)
        if plan.arena_bytes + MOST_STACK > sram_bytes:
            plan_memory(program, sram_bytes - stack_of(plan, target))
    except BudgetError:
        return False
    return True


def fitting(
    program: Program, groups: map_bits.Groups, losses: Mapping[str, float], target: Target, limits: Limits
) -> map_bits.Fitting:
    """Return what loses least while arena and stack fit; the stack is that of kernels with four bits.

    Raises
    ------
    BudgetError
        See `McuBackend.narrowed`.
    """
    assert limits.sram_bytes is not None
    stack = 0
    for _ in range(ATTEMPTS):
        found = map_bits.fit(program, groups, losses, limits.sram_bytes - stack)
        if found is None:
            break
        needed = stack_of(found.plan, target)
        if found.plan.arena_bytes + needed <= limits.sram_bytes:
            return found
        stack = max(stack, needed)
    plain, least = assign_offsets(program), map_bits.least(program, groups).arena_bytes
    beside = f", with {stack} of stack beside them" if stack else ""
    fact = f"{plain.arena_bytes} bytes of activations do not fit, nor {least} in strips with maps in four bits{beside}"
    remedy = f"allow {least + stack}, or make smaller what needs most: '{plain.peak}' needs {plain.bound}"
    raise BudgetError(limits.sram_place, fact, remedy)


def stack_of(plan: MemoryPlan, target: Target) -> int:
    """Return the bytes of stack that a plan's kernels take, 0 where no compiler is here to tell."""
    with tempfile.TemporaryDirectory() as folder:
        compiled = _written(plan, target, Path(folder), ()).compiled
    return compiled.stack_bytes if compiled else 0


@dataclass(frozen=True)
class Built:
    """A package as it was written, and what it takes."""

    source: Source
    footprint: Footprint
    compiled: Compiled | None
    files: tuple[str, ...]


def _fitted(program: Program, target: Target, limits: Limits, folder: Path) -> Built:
    """Write the package; with less arena, if arena and stack do not fit otherwise."""
    plan = _planned(program, limits)
    curve = footprints.front(program) if limits.sram_bytes is not None else ()
    built = _written(plan, target, folder, curve)
    stack = built.compiled.stack_bytes if built.compiled else 0
    if limits.sram_bytes is not None and plan.arena_bytes + stack > limits.sram_bytes:
        built = _written(_planned(program, limits, stack), target, folder, curve)
    built.footprint.require(limits, built.compiled)
    return built


def _planned(program: Program, limits: Limits, stack: int = 0) -> MemoryPlan:
    """Plan the arena; what does not fit is told of the bound that the user gave."""
    most = None if limits.sram_bytes is None else limits.sram_bytes - stack
    try:
        return plan_memory(program, most)
    except BudgetError as error:
        beside = f", with {stack} of stack beside them" if stack else ""
        raise BudgetError(limits.sram_place, error.fact + beside, error.remedy) from error


def _written(plan: MemoryPlan, target: Target, folder: Path, curve: tuple[Point, ...]) -> Built:
    layers = Layers.of(plan.program, plan.offsets)
    source = Source(identifier(plan.program.name), plan.program, plan.offsets, plan.arena_bytes, layers)
    footprint = Footprint.of(source.name, target.name, plan, layers, curve)
    written = write_package(source, footprint, Example.of(source), folder)
    return Built(source, footprint, compile_package(folder, target.settings), written)
