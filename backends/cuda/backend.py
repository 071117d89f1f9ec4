"""The backend ``cuda``: a network as kernels for CUDA devices, what they are launched with, and what launches them."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterable
from importlib.resources import files
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from qcompile.backends.base import (
    Lowered,
    Placed,
    Unbounded,
    Unpriced,
    read_targets,
    require_no_segments,
    require_one_length,
)
from qcompile.backends.cuda import compiler
from qcompile.backends.cuda.blocks import stored, with_halves
from qcompile.backends.cuda.linear import linear_kernel
from qcompile.backends.cuda.network import MANY, Network, network_of
from qcompile.backends.cuda.session import DESCRIPTION, InferenceSession
from qcompile.backends.integer.float_operations import FloatDense, Gather, HalfDense
from qcompile.backends.integer.interpret import dequantize_output, interpret, quantize_input
from qcompile.backends.integer.lower import lower
from qcompile.backends.integer.operations import Conv, Dense
from qcompile.backends.integer.program import Port, Program
from qcompile.backends.mcu.write_c import identifier
from qcompile.backends.tvm.emit import load_tvm
from qcompile.core import model as models
from qcompile.core.errors import OperatorError, TargetError, UsageError
from qcompile.core.plan import Precision, QuantPlan
from qcompile.core.runtime import Feeds, Outputs
from qcompile.core.target import LIMITS, Target

#: The quantized model that the kernels compute, beside them.
REFERENCE = "reference.onnx"
#: What of this package goes along with every network.
LOADER = ("session.py", "driver.py")


class CudaBackend(Unpriced, Unbounded):
    """The backend ``cuda``."""

    name: ClassVar[str] = "cuda"

    def targets(self) -> Iterable[Target]:
        """Return the targets of backends/cuda/targets."""
        return read_targets("qcompile.backends.cuda")

    def available(self) -> bool:
        """Tell whether TVM, which generates kernels, and NVRTC, which compiles them, are installed."""
        return importlib.util.find_spec("tvm") is not None and compiler.available()

    def check(self, target: Target) -> None:
        """Refuse bounds on memory, and a machine that cannot compile kernels.

        Raises
        ------
        UsageError, TargetError
        """
        require_no_segments(target)
        require_one_length(target, f"has no package of {target.name}, which is for one shape")
        for key in LIMITS:
            if target.settings.get(key) is not None:
                fact = f"means nothing for {target.name}, whose devices have memory of their own"
                raise UsageError(f"--{key.replace('_', '-')}", fact, "leave it out, or choose a microcontroller")
        load_tvm()
        compiler.require()

    def lower(self, model: ir.Model, plan: QuantPlan, target: Target, folder: Path) -> Lowered:
        """Write kernels, weights, launches and what runs them; see docs/targets/cuda-tvm.md.

        Raises
        ------
        TargetError
            If an operator has no integer form, or no kernel.
        """
        network = network_of(with_halves(lower(model, target.floats)))
        code = compiler.compile_all(network.source())
        written = write(network, identifier(network.program.name), code, folder)
        models.save(model, folder / REFERENCE)
        kernels = {node: "cuda" for node, op in plan.ops.items()
                   if op.precision is Precision.INTEGER and not op.reason}  # fmt: skip
        sizes = {"weights, biases and multipliers": len(network.constants), "code of all architectures": len(code)}
        # Everything: what has no kernel is refused.
        placed = tuple(Placed(str(node.name), node.op_type) for node in model.graph if node.name in plan.ops)
        return Lowered((*written, REFERENCE), kernels, (), sizes, placement=placed)

    def size(self, model: ir.Model) -> int:
        """Return the bytes of constants that `lower` would write."""
        try:
            program = with_halves(lower(model, self._floats))
        except OperatorError:
            # Refused in the end: weights are stored all the same.
            return models.initializer_bytes(model)
        layers = [part for part in program.operations if isinstance(part, Conv | Dense | FloatDense)]
        made = [linear_kernel(part, program.tensors[part.inputs[0]], program.tensors[part.output]) for part in layers]
        tables = sum(part.table.nbytes for part in program.operations if isinstance(part, Gather))
        tables += sum(stored(part).nbytes for part in program.operations if isinstance(part, HalfDense))
        return tables + sum(kernel.weights.nbytes + kernel.table.nbytes for kernel in made)

    @property
    def _floats(self) -> frozenset[str]:
        return frozenset().union(*(target.floats for target in self.targets()))

    def open(self, folder: Path, files: tuple[str, ...], threads: int = 1) -> Callable[[Feeds], Outputs]:
        """Return what interprets the kernels' program, so that a report is the same with a device and without."""
        del files, threads
        return _interpreted(with_halves(lower(models.load(folder / REFERENCE), self._floats)))

    def on_device(self, target: Target, fallback: bool) -> Callable[[Path], DeviceSession]:
        """Return what loads an artifact by its `network.json`; nothing of it can fall back."""
        del target, fallback
        return DeviceSession


class DeviceSession:
    """An artifact on a device.

    Parameters
    ----------
    description : Path
        Its `network.json`.

    Raises
    ------
    TargetError
        If that is another file, or there is no device.
    """

    provider = "kernels of its own"

    def __init__(self, description: Path) -> None:
        if description.name != DESCRIPTION:
            raise TargetError("--model", "has kernels on no device: cuda:tvm runs artifacts alone", "leave it out")
        try:
            self._session = InferenceSession(description.parent)
        except OSError as error:
            fact, _, remedy = str(error).removeprefix("cuda: ").partition("; ")
            raise TargetError("device", fact, remedy or "compile for the device's architecture") from error
        self.device = f"{self._session.driver.name} ({self._session.driver.capability})"
        self.runtime = f"the driver for CUDA {self._session.driver.version}"

    def run(self, feeds: Feeds) -> Outputs:
        """Run one sample, inputs and outputs in the host's memory."""
        names = [port.name for port in self._session.get_outputs()]
        return dict(zip(names, self._session.run(None, feeds), strict=True))


def write(network: Network, name: str, code: bytes, folder: Path) -> tuple[str, ...]:
    """Write a network's files and return their names, the first of them what a user loads.

    Parameters
    ----------
    network : Network
    name : str
        An identifier.
    code : bytes
        What `compiler.compile_all` makes of its source.
    folder : Path
    """
    names = {"kernels": f"{name}.fatbin", "constants": f"{name}.weights"}
    (folder / names["kernels"]).write_bytes(code)
    (folder / names["constants"]).write_bytes(bytes(network.constants))
    content = describe(network, name) | names
    (folder / DESCRIPTION).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    for module in LOADER:
        text = (files("qcompile.backends.cuda") / module).read_text(encoding="utf-8")
        (folder / module).write_text(text, encoding="utf-8")
    return DESCRIPTION, *names.values(), *LOADER


def describe(network: Network, name: str) -> dict[str, Any]:
    """Return what `network.json` holds but for names of files: ports, memory, and what is launched in which order."""
    program = network.program
    return {
        "name": name,
        "architectures": list(compiler.ARCHITECTURES),
        "compiler": f"NVRTC {compiler.version()}",
        "arena_bytes": network.arena_bytes,
        "many": MANY,
        "inputs": [_port(network, port) for port in program.inputs],
        "outputs": [_port(network, port) for port in program.outputs],
        "taking": [launch.as_json() for launch in network.taking],
        "launches": [launch.as_json() for launch in network.launches],
        "giving": [launch.as_json() for launch in network.giving],
    }


def _port(network: Network, port: Port) -> dict[str, Any]:
    tensor = network.program.tensors[port.tensor]
    return {
        "name": port.name, "shape": list(port.shape), "stored": list(tensor.shape), "axes": list(port.axes),
        "scale": float(np.float32(tensor.scale)), "zero_point": tensor.zero_point,
        "code_offset": 128 if port.unsigned else 0, "at": network.offsets[port.tensor], "dtype": tensor.dtype,
    }  # fmt: skip


def _interpreted(program: Program) -> Callable[[Feeds], Outputs]:
    def run(feeds: Feeds) -> Outputs:
        codes = {port.name: quantize_input(program, port, feeds[port.name]) for port in program.inputs}
        made = interpret(program, codes)
        return {port.name: dequantize_output(program, port, made[port.name]) for port in program.outputs}

    return run
