"""The backend ``cpu``: a network as one shared library of kernels that TVM generates."""

from __future__ import annotations

import importlib.util
import json
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from qcompile.backends.base import Lowered, Unbounded, Unpriced, read_targets
from qcompile.backends.cpu import executable, library, segmented_session
from qcompile.backends.cpu import write_segments as segments
from qcompile.backends.cpu.emulate import EmulatedSession, emulator
from qcompile.backends.cpu.header import header
from qcompile.backends.cpu.layout import ALIGNMENT
from qcompile.backends.cpu.network import Network
from qcompile.backends.cpu.segments import cut
from qcompile.backends.cpu.session import DESCRIPTION, InferenceSession, absent, is_here
from qcompile.backends.cpu.write_segments import named, write_description, write_models
from qcompile.backends.integer.fix_length import at_length
from qcompile.backends.integer.float_operations import BlockDense, FloatDense, Gather
from qcompile.backends.integer.lower import lower
from qcompile.backends.integer.operations import Conv, Dense
from qcompile.backends.integer.program import Port, Program
from qcompile.backends.mcu.write_c import identifier
from qcompile.backends.tvm.emit import load_tvm
from qcompile.backends.tvm.schedules import aarch64, x86
from qcompile.backends.tvm.schedules.block_dense import in_halves
from qcompile.backends.tvm.schedules.vectors import Processor
from qcompile.core import model as models
from qcompile.core.errors import OperatorError, TargetError, UsageError
from qcompile.core.lengths import Lengths
from qcompile.core.plan import Precision, QuantPlan
from qcompile.core.runtime import Feeds, Outputs
from qcompile.core.target import LIMITS, Target

PROCESSORS: dict[str, Processor] = {**x86.PROCESSORS, **aarch64.PROCESSORS}
#: The quantized model that the library computes, beside it.
REFERENCE = "reference.onnx"
SESSION = "session.py"


class CpuBackend(Unpriced, Unbounded):
    """The backend ``cpu``."""

    name: ClassVar[str] = "cpu"

    def targets(self) -> Iterable[Target]:
        """Return the targets of backends/cpu/targets."""
        for target in read_targets("qcompile.backends.cpu"):
            yield replace(target, timed_here=target.timed_here and not _is_emulated(_processor(target)))

    def available(self) -> bool:
        """Tell whether TVM is installed, which generates the kernels."""
        return importlib.util.find_spec("tvm") is not None

    def check(self, target: Target) -> None:
        """Refuse bounds on memory, and a machine that cannot build or run the library.

        Raises
        ------
        UsageError, TargetError
        """
        for key in LIMITS:
            if target.settings.get(key) is not None:
                fact = f"means nothing for {target.name}, whose library works in memory that its caller gives it"
                raise UsageError(f"--{key.replace('_', '-')}", fact, "leave it out, or choose a microcontroller")
        load_tvm()
        processor = _processor(target)
        library.linker(processor.architecture)
        if _is_emulated(processor):
            emulator(processor.architecture)
        elif missing := absent(processor.flags):
            fact = f"this machine's processor has no {missing[0]}, so that the result could not be verified"
            raise TargetError(
                f"--target {target.name}", fact, "compile on a machine that has it, or choose --target cpu"
            )

    def lower(self, model: ir.Model, plan: QuantPlan, target: Target, folder: Path) -> Lowered:
        """Write the library and what goes with it; see docs/targets/cpu-tvm.md.

        Raises
        ------
        TargetError
            If an operator has no integer form, or no kernel, and segments are not allowed, or there is none without.
        """
        if target.settings.get("allow_ort_segments"):
            return self._lower_segments(model, plan, target, folder)
        try:
            return self._lower(model, plan, target, folder)
        except OperatorError as error:
            remedy = f"{error.remedy}, or let ONNX Runtime run it: --allow-ort-segments"
            raise TargetError(error.place, error.fact, remedy) from error

    def _lower(self, model: ir.Model, plan: QuantPlan, target: Target, folder: Path) -> Lowered:
        lengths: Lengths | None = target.settings.get("lengths")
        network = _network(model, target, lengths)
        name, processor = identifier(network.layout.program.name), network.processor
        written = write(network, name, folder, lengths)
        models.save(model, folder / REFERENCE)
        kernels = {node: processor.name for node, op in plan.ops.items()
                   if op.precision is Precision.INTEGER and not op.reason}  # fmt: skip
        stored = len(network.constants)
        code = (folder / written[0]).stat().st_size - stored
        sizes = {"weights, biases and multipliers": stored, "code": code}
        return Lowered((*written, REFERENCE), kernels, (), sizes)

    def _lower_segments(self, model: ir.Model, plan: QuantPlan, target: Target, folder: Path) -> Lowered:
        """Write libraries, and ONNX models of what is between; one library where nothing is."""
        processor = _processor(target)
        static, parts = cut(model, target.floats, lambda program: library.network_of(program, processor))
        if len(parts) == 1:
            return self._lower(model, plan, target, folder)
        name, written, sizes = identifier(model.graph.name or "model"), list[str](), Counter[str]()
        for index, network in enumerate(part.network for part in parts):
            if network is not None:
                (folder / named(index)).mkdir()
                made = write(network, f"{name}_{index}", folder / named(index))
                written += [f"{named(index)}/{file}" for file in made]
                stored = len(network.constants)
                sizes["weights, biases and multipliers"] += stored
                sizes["code"] += (folder / written[-len(made)]).stat().st_size - stored
        between = write_models(parts, folder)
        sizes["models that ONNX Runtime runs"] = sum((folder / file).stat().st_size for file in between[:-1])
        described = write_description(folder, segments.describe(parts, static, processor, name))
        models.save(model, folder / REFERENCE)
        in_library = {node for part in parts if part.network is not None for node in part.operators}
        kernels = {node: processor.name if node in in_library else "onnxruntime" for node, op in plan.ops.items()
                   if op.precision is Precision.INTEGER and not op.reason}  # fmt: skip
        files = (described, *between, *written, REFERENCE)
        return Lowered(files, kernels, (), sizes, segments=segments.told(parts, static))

    def size(self, model: ir.Model) -> int:
        """Return the bytes of constants that `lower` would write, but for rounding up to whole vectors."""
        try:
            operations = lower(model, self._floats).operations
        except OperatorError:
            # Refused in the end, or in segments: weights are stored all the same.
            return models.initializer_bytes(model)
        weighted = [part for part in operations if isinstance(part, Conv | Dense | FloatDense)]
        others = sum(part.table.nbytes for part in operations if isinstance(part, Gather))
        others += sum(block_bytes(part) for part in operations if isinstance(part, BlockDense))
        return others + sum(stored_bytes(part) + 6 * part.bias.nbytes for part in weighted)

    @property
    def _floats(self) -> frozenset[str]:
        """Return what any of the targets takes in float: what an operator is stored in does not depend on that."""
        return frozenset().union(*(target.floats for target in self.targets()))

    def open(self, folder: Path, files: tuple[str, ...], threads: int = 1) -> Callable[[Feeds], Outputs]:
        """Load the library, or the executable where processors are emulated; return a function that runs one sample."""
        del files
        session = opened(folder, threads)
        names = [port.name for port in session.get_outputs()]
        return lambda feeds: dict(zip(names, session.run(None, feeds), strict=True))


def _network(model: ir.Model, target: Target, lengths: Lengths | None) -> Network:
    """Return the network of a model, at all lengths that it may have."""
    if lengths is None:
        return library.network_of(lower(model, target.floats), _processor(target))
    programs = {size: lower(at_length(model, lengths.at(size)), target.floats) for size in lengths.sizes}
    return library.network_of_lengths(programs, _processor(target))


def stored_bytes(part: Conv | Dense | FloatDense) -> int:
    """Return the bytes of a layer's weights in the library: two of four bits to a byte, but for depthwise ones."""
    depthwise = isinstance(part, Conv) and part.groups > 1 and part.weights.shape[-1] == 1
    in_halves = part.bits == 4 and not depthwise and not isinstance(part, FloatDense)
    return part.weights.nbytes // 2 if in_halves else part.weights.nbytes


def block_bytes(part: BlockDense) -> int:
    """Return the bytes of a layer with a scale per block: weights, scales of sixteen bits where these do, biases."""
    weights = part.weights.nbytes // 2 if part.bits == 4 else part.weights.nbytes
    return weights + part.scale.nbytes // (2 if in_halves(part.scale) else 1) + part.bias.nbytes


def write(network: Network, name: str, folder: Path, lengths: Lengths | None = None) -> tuple[str, ...]:
    """Write a network's library, header, description and session, and return their names.

    Parameters
    ----------
    network : Network
    name : str
        A C identifier.
    folder : Path
    lengths : Lengths, optional
        Which it has, and how inputs are padded to them.
    """
    shared = f"lib{name}.so"
    objects, alone = library.compiled(network, name), tuple[str, ...]()
    library.link(objects, name, folder / shared, network)
    if network.processor.emulated:
        alone = (f"{name}_runner",)
        executable.write(objects, network, name, folder / alone[0])
    mask = lengths.padding.mask if lengths is not None and lengths.padding is not None else ""
    (folder / f"{name}.h").write_text(header(network, name, mask), encoding="utf-8")
    description = describe(network, name, lengths)
    (folder / DESCRIPTION).write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")
    session = files("qcompile.backends.cpu") / SESSION
    (folder / SESSION).write_text(session.read_text(encoding="utf-8"), encoding="utf-8")
    return shared, f"{name}.h", DESCRIPTION, SESSION, *alone


def opened(folder: Path, threads: int = 1) -> InferenceSession | segmented_session.InferenceSession:
    """Return a session of what a compile wrote: here, or where this machine is another, emulated."""
    about = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
    if "segments" in about:
        return segmented_session.InferenceSession(folder, threads, opened)
    emulated = _is_emulated(PROCESSORS[about["processor"]])
    return EmulatedSession(folder) if emulated else InferenceSession(folder, threads)


def _is_emulated(processor: Processor) -> bool:
    """Tell whether a processor's code runs under emulation: it can, and this machine cannot."""
    return bool(processor.emulated) and (not is_here(processor.architecture) or bool(absent(processor.flags)))


def describe(network: Network, name: str, lengths: Lengths | None = None) -> dict[str, Any]:
    """Return what `network.json` holds: ports, memory, and which kernel computes which operation, in which tile."""
    return {
        "name": name,
        "library": f"lib{name}.so",
        "architecture": network.processor.architecture,
        "processor": network.processor.name,
        "instructions": list(network.processor.flags),
        **_executable(network, name),
        "workspace_bytes": network.workspace,
        "alignment": ALIGNMENT,
        **_at_one_length(network),
        **({} if lengths is None else _at_all(network, lengths)),
    }


def _at_all(network: Network, lengths: Lengths) -> dict[str, Any]:
    """Return what there is to say of several lengths; what stands beside that is of the longest one."""
    padding = lengths.padding
    return {
        "lengths": {str(each.length): _at_one_length(each) for each in network.all},
        "axes": {name: list(lengths.axes(name)) for name in lengths.shapes},
        "padding": None if padding is None else {"mask": padding.mask, "outputs": {
            name: list(axes) for name, axes in padding.outputs.items()}},
    }  # fmt: skip


def _at_one_length(network: Network) -> dict[str, Any]:
    program = network.layout.program
    return {
        "inputs": [_port(program, port) for port in program.inputs],
        "outputs": [_port(program, port) for port in program.outputs],
        "kernels": [
            {"operation": call.operation, "kernel": call.kernel, "tile": vars(network.tiles[call.kernel])}
            if call.kernel in network.tiles else {"operation": call.operation, "kernel": call.kernel}
            for call in network.calls
        ],
    }  # fmt: skip


def _executable(network: Network, name: str) -> dict[str, str]:
    emulated = network.processor.emulated
    return {"executable": f"{name}_runner", "emulated": emulated} if emulated else {}


def _port(program: Program, port: Port) -> dict[str, Any]:
    tensor = program.tensors[port.tensor]
    return {
        "name": port.name, "shape": list(port.shape), "stored": list(tensor.shape), "axes": list(port.axes),
        "dtype": tensor.dtype, "scale": float(np.float32(tensor.scale)), "zero_point": tensor.zero_point,
        "offset": x86.OFFSET if port.unsigned else 0,
    }  # fmt: skip


def _processor(target: Target) -> Processor:
    return PROCESSORS[target.settings["processor"]]
