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

from qcompile.backends.cpu import pool
from qcompile.backends.cpu.generate import generate
from qcompile.backends.cpu.layout import ALIGNMENT, THREADS, lay_out
from qcompile.backends.cpu.network import Call, Network
from qcompile.backends.cpu.phases import phases
from qcompile.backends.cpu.session import is_here
from qcompile.backends.integer.program import Port, Program, Tensor
from qcompile.backends.tvm import native
from qcompile.backends.tvm.emit import Function, load_tvm
from qcompile.backends.tvm.native import Object
from qcompile.backends.tvm.schedules.vectors import Processor
from qcompile.core.errors import TargetError, VerificationError

#: What links for this machine, the plainest first; a compiler is asked to do no more than that.
LINKERS = ("ld", "ld.lld", "cc", "gcc", "clang")
#: What links for another one, and what brings it.
CROSS_LINKERS, CROSS_PACKAGE = {"aarch64": ("ld.lld", "aarch64-linux-gnu-ld")}, {"aarch64": "lld"}
#: The same bytes whenever it is linked, and nothing visible but the functions of the header.
FLAGS = ("--build-id=none", "--gc-sections", "-z,noexecstack")

#: How a process asks Linux for the tiles of AMX: arch_prctl(ARCH_REQ_XCOMP_PERM, XTILEDATA).
ALLOW = """\
/* Ask the system for the tiles of AMX, once in a process in front of the first run; tell whether they may be used.
   ${name}_create does it. */
static inline int ${name}_allow(void)
{
    long result = 158;
    __asm__ volatile("syscall" : "+a"(result) : "D"(0x1023L), "S"(18L) : "rcx", "r11", "memory");
    return result == 0;
}

"""

#: What runs a network, and whether its inputs and outputs are floats.
RUNS = {"run": False, "run_floats": True}
#: What a library exports.
EXPORTS = (*RUNS, "start", "stop")


def network_of(program: Program, processor: Processor) -> Network:
    """Return the kernels of a program, and where its tensors lie.

    Raises
    ------
    TargetError
        If an operation has no kernel.
    """
    return generate(lay_out(program, processor.permutes), processor)


def compiled(network: Network, name: str) -> tuple[Object, ...]:
    """Return the machine code of a network: its kernels, ``NAME_run``, and threads.

    They are objects of their own, so that no kernel is expanded within another: to LLVM, buffers of different names are
    different memory, which holds within a kernel and not from one kernel to the next.
    """
    machine = network.processor.machine
    # Their calls of the ports' kernels are kernels too, so they come first.
    runs = {f"{name}_{stem}": _run(network, name, stem) for stem in RUNS}
    steps = phases(network.calls)
    run = native.compile_object(runs | {f"{name}_step": _step(network, steps, name)}, machine)
    shared = [step[-1].shared > 0 for step in steps]
    return native.compile_object(network.kernels, machine), run, pool.compiled(name, shared, machine)


def _run(network: Network, name: str, stem: str) -> Function:
    """Return the function that users call. Arguments: the workspace, each input, each output."""
    program = network.layout.program
    ports = [*program.inputs, *program.outputs]
    arguments = [*stems("in", program.inputs), *stems("out", program.outputs)]
    floats = RUNS[stem]
    taken, made = network.ports(floats)

    def body(buffers: Any) -> None:
        known = {port.name: buffers[argument] for port, argument in zip(ports, arguments, strict=True)}
        known["workspace"] = buffers["workspace"]
        if any(call.shared for call in network.calls):
            _of_pool(name, "wake", known)  # while inputs are taken in
        _call_all(taken, known)
        _of_pool(name, "compute", known)
        _call_all(made, known)

    tensors = [program.tensors[port.tensor] for port in ports]
    kinds = [
        "float32" if floats and tensor.is_codes else "uint8" if tensor.is_codes else tensor.dtype for tensor in tensors
    ]
    return native.function(f"{name}_{stem}", {"workspace": "uint8"} | dict(zip(arguments, kinds, strict=True)), body)


def _step(network: Network, steps: Sequence[Sequence[Call]], name: str) -> Function:
    """Return one share of one step. Arguments: the workspace, which step, which share, and of how many."""
    tvm = load_tvm()
    data = np.frombuffer(bytes(network.constants) or bytes(1), np.uint8)

    def body(buffers: Any) -> None:
        ir = native.builder()
        text = tvm.ir.StringImm(native.constants(data))
        with ir.attr(tvm.ir.StringImm("default"), "pragma_import_llvm", text):
            pointer = tvm.ir.PointerType(tvm.ir.PrimType("uint8"))
            start = ir.bind(ir.call_extern(pointer, native.CONSTANTS))
            known = {"constants": ir.decl_buffer((native.EXTENT,), "uint8", data=start), **buffers}
            _one_of(steps, known)

    return native.function(f"{name}_step", {"workspace": "uint8"}, body, ("step", "share", "shares"))


def _one_of(steps: Sequence[Sequence[Call]], buffers: Mapping[str, Any], first: int = 0) -> None:
    """Emit the step that is asked for, found by halves."""
    ir = native.builder()
    if len(steps) > 1:
        half = len(steps) // 2
        with ir.If(buffers["step"] < first + half):
            with ir.Then():
                _one_of(steps[:half], buffers, first)
            with ir.Else():
                _one_of(steps[half:], buffers, first + half)
        return
    for step in steps:
        alone, shared = ([call for call in step if bool(call.shared) == kind] for kind in (False, True))
        if alone:
            with ir.If(buffers["share"] == 0), ir.Then():
                _call_all(alone, buffers)
        _call_all(shared, buffers)


def _of_pool(name: str, stem: str, buffers: Mapping[str, Any]) -> None:
    """Emit a call of a function of pool.c."""
    ir = native.builder()
    ir.evaluate(ir.call_extern("void", f"{name}_{stem}", ir.address_of(buffers["workspace"][0])))


def _call_all(calls: Sequence[Call], buffers: Mapping[str, Any]) -> None:
    ir = native.builder()
    for call in calls:
        given = [ir.address_of(buffers[kind][at]) for kind, at in call.arguments]
        if call.shared:
            ends = (buffers["share"], buffers["share"] + 1)
            given += [ir.truncdiv(call.shared * end, buffers["shares"]) for end in ends]
        ir.evaluate(ir.call_extern("void", call.kernel, *given))


def linker(architecture: str) -> list[str]:
    """Return the command that links for processors of an architecture.

    Raises
    ------
    TargetError
        If there is none.
    """
    other = not is_here(architecture) and architecture in CROSS_LINKERS
    names = CROSS_LINKERS[architecture] if other else LINKERS
    found = next((name for name in names if shutil.which(name)), None)
    if found is None:
        package = CROSS_PACKAGE[architecture] if other else "binutils"
        fact = f"needs a linker{f' for {architecture}' if other else ''}, and there is none on this machine"
        raise TargetError("shared library", fact, f"apt-get install {package}")
    plain = _is_plain(found)
    flags = [part for flag in FLAGS for part in (flag.split(",") if plain else [f"-Wl,{flag}"])]
    return [found, *flags] if plain else [found, "-nostdlib", *flags]


def _is_plain(linker: str) -> bool:
    """Tell whether it is a linker, not a compiler that calls one."""
    return linker.startswith("ld") or linker.endswith("-ld")


def link(objects: Sequence[Object], name: str, library: Path, processor: Processor) -> None:
    """Write a shared library; see `linked`."""
    with tempfile.TemporaryDirectory() as folder:
        visible = Path(folder) / "visible.map"
        visible.write_text(f"{{ global: {'; '.join(f'{name}_{stem}' for stem in EXPORTS)}; local: *; }};\n")
        words = [f"--version-script={visible}", f"-soname={library.name}", *processor.linked]
        words = words if _is_plain(linker(processor.architecture)[0]) else [f"-Wl,{word}" for word in words]
        words += [str(_stub(name, Path(folder), processor)) for name in processor.needs]
        linked(objects, library, processor, ["-shared", "-s", *words])


def _stub(name: str, folder: Path, processor: Processor) -> Path:
    """Return an empty library that has the name of one that a device has, for the linker to write down."""
    empty = native.from_text(f'target triple = "{processor.machine.triple}"\n')
    linked([empty], folder / name, processor, ["-shared", f"-soname={name}"])
    return folder / name


def linked(objects: Sequence[Object], file: Path, processor: Processor, words: Sequence[str]) -> None:
    """Write what a linker makes of objects.

    Raises
    ------
    TargetError
        If there is no linker.
    VerificationError
        If it refuses the objects.
    """
    command = linker(processor.architecture)
    with tempfile.TemporaryDirectory() as folder:
        sources = [Path(folder) / f"{index}.o" for index in range(len(objects))]
        for made, source in zip(objects, sources, strict=True):
            made.write(source)
        arguments = [*command, *words, *map(str, sources), "-o", str(file)]
        done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    if done.returncode:
        fact = f"{command[0]}: {(done.stderr.strip().splitlines() or ['failed'])[0]}"
        raise VerificationError("shared library", fact, "report it with the model")


def header(program: Program, name: str, workspace: int, tiles: bool = False) -> str:
    """Return ``NAME.h``; with `tiles`, its ``NAME_create`` asks the system for those of AMX."""
    template = Path(__file__).with_name("header.h").read_text(encoding="utf-8")
    macro, ports = name.upper(), []
    for group, kind in ((program.inputs, "INPUT"), (program.outputs, "OUTPUT")):
        for index, port in enumerate(group):
            ports += _port(
                f"{macro}_{kind}" + (str(index) if len(group) > 1 else ""), port, program.tensors[port.tensor]
            )
    return Template(template).substitute(
        name=name, macro=macro, ports="\n".join(ports), workspace=workspace, alignment=ALIGNMENT,
        threads=THREADS, **asking(name, tiles),
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


def asking(name: str, tiles: bool) -> dict[str, str]:
    """Return what a header says of the system's leave to use tiles: nothing where none are used."""
    if not tiles:
        return dict.fromkeys(("allow", "refused", "ask"), "")
    return {
        "allow": Template(ALLOW).substitute(name=name),
        "refused": ", the system keeps the tiles of AMX to itself",
        "ask": f"    if (!{name}_allow()) return NULL;\n",
    }


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
