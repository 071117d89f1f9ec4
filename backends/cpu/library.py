"""One shared library of a network: its object file, the linker, and the header that says how to call it."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any

import numpy as np

from qcompile.backends.cpu.generate import generate
from qcompile.backends.cpu.layout import ALIGNMENT, lay_out
from qcompile.backends.cpu.network import Call, Network
from qcompile.backends.integer.program import Port, Program, Tensor
from qcompile.backends.tvm import native
from qcompile.backends.tvm.emit import Function, load_tvm
from qcompile.backends.tvm.native import Object
from qcompile.backends.tvm.schedules.x86 import Processor
from qcompile.core.errors import TargetError, VerificationError

#: What links, the plainest first; a compiler is asked to do no more than that.
LINKERS = ("ld", "ld.lld", "cc", "gcc", "clang")
#: The same bytes whenever it is linked, and nothing visible but the functions of the header.
FLAGS = ("--build-id=none", "--strip-all", "--gc-sections", "-z,noexecstack")


#: What a library exports, and whether its inputs and outputs are floats.
RUNS = {"run": False, "run_floats": True}


def network_of(program: Program, processor: Processor) -> Network:
    """Return the kernels of a program, and where its tensors lie.

    Raises
    ------
    TargetError
        If an operation has no kernel.
    """
    return generate(lay_out(program, processor.permutes), processor)


def compiled(network: Network, name: str) -> tuple[Object, ...]:
    """Return the machine code of a network: its kernels, and ``NAME_run``.

    They are objects of their own, so that no kernel is expanded within another: to LLVM, buffers of different names are
    different memory, which holds within a kernel and not from one kernel to the next.
    """
    machine = network.processor.machine
    # Their calls of the ports' kernels are kernels too, so they come first.
    runs = {f"{name}_{stem}": _run(network, name, stem) for stem in RUNS}
    run = native.compile_object(runs | {f"{name}_compute": _compute(network, f"{name}_compute")}, machine)
    return native.compile_object(network.kernels, machine), run


def _run(network: Network, name: str, stem: str) -> Function:
    """Return the function that users call. Arguments: the workspace, each input, each output."""
    program = network.layout.program
    ports = [*program.inputs, *program.outputs]
    arguments = [*stems("in", program.inputs), *stems("out", program.outputs)]
    floats = RUNS[stem]
    taken, made = network.ports(floats)

    def body(buffers: Any) -> None:
        ir = native.builder()
        known = {port.name: buffers[argument] for port, argument in zip(ports, arguments, strict=True)}
        known["workspace"] = buffers["workspace"]
        _call_all(taken, known)
        ir.evaluate(ir.call_extern("void", f"{name}_compute", ir.address_of(buffers["workspace"][0])))
        _call_all(made, known)

    tensors = [program.tensors[port.tensor] for port in ports]
    kinds = [
        "float32" if floats and tensor.is_codes else "uint8" if tensor.is_codes else tensor.dtype for tensor in tensors
    ]
    return native.function(f"{name}_{stem}", {"workspace": "uint8"} | dict(zip(arguments, kinds, strict=True)), body)


def _compute(network: Network, name: str) -> Function:
    """Return the function that calls all kernels. Argument: the workspace."""
    tvm = load_tvm()
    data = np.frombuffer(bytes(network.constants) or bytes(1), np.uint8)

    def body(buffers: Any) -> None:
        ir = native.builder()
        text = tvm.ir.StringImm(native.constants(data))
        with ir.attr(tvm.ir.StringImm("default"), "pragma_import_llvm", text):
            pointer = tvm.ir.PointerType(tvm.ir.PrimType("uint8"))
            start = ir.bind(ir.call_extern(pointer, native.CONSTANTS))
            _call_all(network.calls, {"constants": ir.decl_buffer((native.EXTENT,), "uint8", data=start), **buffers})

    return native.function(name, {"workspace": "uint8"}, body)


def _call_all(calls: Sequence[Call], buffers: Mapping[str, Any]) -> None:
    ir = native.builder()
    for call in calls:
        ir.evaluate(
            ir.call_extern("void", call.kernel, *(ir.address_of(buffers[kind][at]) for kind, at in call.arguments))
        )


def linker() -> list[str]:
    """Return the command that links.

    Raises
    ------
    TargetError
        If there is none.
    """
    found = next((name for name in LINKERS if shutil.which(name)), None)
    if found is None:
        fact = "needs a linker, and there is none on this machine"
        raise TargetError("shared library", fact, "apt-get install binutils")
    plain = found.startswith("ld")
    flags = [part for flag in FLAGS for part in (flag.split(",") if plain else [f"-Wl,{flag}"])]
    return [found, *flags] if plain else [found, "-nostdlib", *flags]


def link(objects: Sequence[Object], name: str, library: Path) -> None:
    """Write a shared library.

    Raises
    ------
    TargetError
        If there is no linker.
    VerificationError
        If it refuses the object.
    """
    command = linker()
    with tempfile.TemporaryDirectory() as folder:
        sources, visible = [Path(folder) / f"{index}.o" for index in range(len(objects))], Path(folder) / "visible.map"
        for made, source in zip(objects, sources, strict=True):
            made.write(source)
        visible.write_text(f"{{ global: {'; '.join(f'{name}_{stem}' for stem in RUNS)}; local: *; }};\n")
        script = f"--version-script={visible}"
        script = script if command[0].startswith("ld") else f"-Wl,{script}"
        arguments = [*command, "-shared", script, *map(str, sources), "-o", str(library)]
        done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    if done.returncode:
        fact = f"{command[0]}: {(done.stderr.strip().splitlines() or ['failed'])[0]}"
        raise VerificationError("shared library", fact, "report it with the model")


def header(program: Program, name: str, workspace: int) -> str:
    """Return ``NAME.h``."""
    template = Path(__file__).with_name("header.h").read_text(encoding="utf-8")
    macro, ports = name.upper(), []
    for group, kind in ((program.inputs, "INPUT"), (program.outputs, "OUTPUT")):
        for index, port in enumerate(group):
            ports += _port(
                f"{macro}_{kind}" + (str(index) if len(group) > 1 else ""), port, program.tensors[port.tensor]
            )
    return Template(template).substitute(
        name=name, macro=macro, ports="\n".join(ports), workspace=workspace, alignment=ALIGNMENT,
        codes=", ".join(_parameters(program, "int8_t")), floats=", ".join(_parameters(program, "float")),
    )  # fmt: skip


#: What values that are no codes are in C.
C_TYPES = {"float32": "float", "int64": "int64_t"}


def _parameters(program: Program, codes: str) -> list[str]:
    """Return a run's parameters behind the workspace, codes being of a type in C."""
    found = []
    for prefix, stem, ports in (("const ", "in", program.inputs), ("", "out", program.outputs)):
        for port, name in zip(ports, stems(stem, ports), strict=True):
            found.append(f"{prefix}{C_TYPES.get(program.tensors[port.tensor].dtype, codes)} *{name}")
    return found


def stems(stem: str, ports: Sequence[Port]) -> list[str]:
    """Return a parameter's name for each port."""
    return [stem if len(ports) == 1 else f"{stem}{index}" for index in range(len(ports))]


def _port(stem: str, port: Port, tensor: Tensor) -> list[str]:
    stored, given = ("x".join(map(str, shape)) for shape in (tensor.shape, port.shape))
    if not tensor.is_codes:
        kind = C_TYPES[tensor.dtype]
        return [
            f"/* '{port.name}': {given} of {kind}, as the model has it */",
            f"#define {stem}_BYTES {tensor.nbytes}",
            "",
        ]
    ordered = port.axes == tuple(range(len(port.axes)))
    order = "" if ordered else f", the model's {given} with axes in the order {port.axes}"
    minus = "; the model's own codes less 128" if port.unsigned else ""
    return [
        f"/* '{port.name}': {stored}{order}{minus} */",
        f"#define {stem}_BYTES {tensor.nbytes}",
        f"#define {stem}_SCALE {np.format_float_scientific(np.float32(tensor.scale), unique=True)}f",
        f"#define {stem}_ZERO_POINT ({tensor.zero_point})",
        "",
    ]
