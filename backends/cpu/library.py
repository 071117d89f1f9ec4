"""One shared library of a network: its object file, the linker, and the header that says how to call it."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from qcompile.backends.cpu import pool
from qcompile.backends.cpu.generate import generate
from qcompile.backends.cpu.header import stems
from qcompile.backends.cpu.layout import NETWORK, lay_out
from qcompile.backends.cpu.network import Call, Network
from qcompile.backends.cpu.phases import phases
from qcompile.backends.cpu.session import is_here
from qcompile.backends.integer.program import Program
from qcompile.backends.tvm import native
from qcompile.backends.tvm.emit import Function, load_tvm
from qcompile.backends.tvm.native import Machine, Object
from qcompile.backends.tvm.schedules.vectors import Processor
from qcompile.calib.workers import abreast
from qcompile.core.errors import TargetError, VerificationError

#: What links for this machine, the plainest first; a compiler is asked to do no more than that.
LINKERS = ("ld", "ld.lld", "cc", "gcc", "clang")
#: What links for another one, and what brings it.
CROSS_LINKERS, CROSS_PACKAGE = {"aarch64": ("ld.lld", "aarch64-linux-gnu-ld")}, {"aarch64": "lld"}
#: The same bytes whenever it is linked, and nothing visible but the functions of the header.
FLAGS = ("--build-id=none", "--gc-sections", "-z,noexecstack")

#: Objects that kernels are dealt out to, however many processors there are: the same bytes everywhere.
PARTS = 4
#: What runs a network, and whether its inputs and outputs are floats.
RUNS = {"run": False, "run_floats": True}
#: What begins an instance, and ends it.
INSTANCES = ("start", "stop")


def network_of(program: Program, processor: Processor) -> Network:
    """Return the kernels of a program, and where its tensors lie.

    Raises
    ------
    TargetError
        If an operation has no kernel.
    """
    return generate(Network(lay_out(program, processor.permutes), processor))


def network_of_lengths(programs: Mapping[int, Program], processor: Processor) -> Network:
    """Return the network of programs that are one at several lengths: what they share is there once.

    Raises
    ------
    TargetError
        If an operation has no kernel.
    """
    # The longest one first: it has the most to compute, so its kernels say how weights are stored.
    *shorter, longest = sorted(programs)
    layouts = {length: lay_out(program, processor.permutes) for length, program in programs.items()}
    made = generate(Network(layouts[longest], processor, length=longest))
    siblings = [generate(made.another(layouts[length], length)) for length in reversed(shorter)]
    return replace(made, siblings=tuple(reversed(siblings)))


def compiled(network: Network, name: str) -> tuple[Object, ...]:
    """Return the machine code of a network: its kernels, ``NAME_run``, and threads.

    They are objects of their own, so that no kernel is expanded within another: to LLVM, buffers of different names are
    different memory, which holds within a kernel and not from one kernel to the next.
    """
    machine = network.processor.machine
    # Their calls of the ports' kernels are kernels too, so they come first.
    runs = {f"{name}_{stem}{each.suffix}": _run(network, index, name, stem)
            for index, each in enumerate(network.all) for stem in RUNS}  # fmt: skip
    steps = [phases(each.calls) for each in network.all]
    # The pool counts steps, and every run has as many: a shorter one does nothing in the last of them.
    count = max(map(len, steps))
    steps = [each + [[]] * (count - len(each)) for each in steps]
    run = native.compile_object(runs | {f"{name}_step": _step(network, steps, name)}, machine)
    shared = [any(step and step[-1].shared > 0 for step in same) for same in zip(*steps, strict=True)]
    return *_kernels(network, machine), run, pool.compiled(name, shared, machine)


def _kernels(network: Network, machine: Machine) -> list[Object]:
    """Return the machine code of the kernels, in parts that are compiled at the same time."""
    names = list(network.kernels)
    parts = [{name: network.kernels[name] for name in names[start::PARTS]} for start in range(min(PARTS, len(names)))]
    # What LLVM is told on its command line is there once for all threads.
    threads = 1 if machine.options else min(PARTS, os.cpu_count() or 1)
    return list(abreast(lambda part: native.compile_object(part, machine), parts, threads))


def _run(whole: Network, index: int, name: str, stem: str) -> Function:
    """Return the function that users call, of one of its lengths. Arguments: the workspace, each input, each output."""
    network = whole.all[index]
    program = network.layout.program
    ports = [*program.inputs, *program.outputs]
    arguments = [*stems("in", program.inputs), *stems("out", program.outputs)]
    floats = RUNS[stem]
    taken, made = network.ports(floats)

    def body(buffers: Any) -> None:
        known = {port.name: buffers[argument] for port, argument in zip(ports, arguments, strict=True)}
        known["workspace"] = buffers["workspace"]
        if whole.siblings:
            native.builder().buffer_store(buffers["workspace"], load_tvm().tirx.const(index, "uint8"), [NETWORK])
        if any(call.shared for call in network.calls):
            _of_pool(name, "wake", known)  # while inputs are taken in
        _call_all(taken, known)
        _of_pool(name, "compute", known)
        _call_all(made, known)

    tensors = [program.tensors[port.tensor] for port in ports]
    kinds = [
        "float32" if floats and tensor.is_codes else "uint8" if tensor.is_codes else tensor.dtype for tensor in tensors
    ]
    taken_in = {"workspace": "uint8"} | dict(zip(arguments, kinds, strict=True))
    return native.function(f"{name}_{stem}{network.suffix}", taken_in, body)


def _step(network: Network, steps: Sequence[Sequence[Sequence[Call]]], name: str) -> Function:
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
            for index, each in enumerate(steps):
                if len(steps) == 1:
                    _one_of(each, known)
                else:
                    with ir.If(buffers["workspace"][NETWORK] == index), ir.Then():
                        _one_of(each, known)

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
        if not step:
            ir.evaluate(0)
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


def exports(network: Network) -> list[str]:
    """Return what a library exports, behind its name."""
    return [*(f"{stem}{each.suffix}" for stem in RUNS for each in network.all), *INSTANCES]


def link(objects: Sequence[Object], name: str, library: Path, network: Network) -> None:
    """Write a shared library; see `linked`."""
    processor = network.processor
    with tempfile.TemporaryDirectory() as folder:
        visible = Path(folder) / "visible.map"
        visible.write_text(f"{{ global: {'; '.join(f'{name}_{stem}' for stem in exports(network))}; local: *; }};\n")
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
        pairs = zip(objects, sources, strict=True)
        threads = 1 if processor.machine.options else min(len(objects), os.cpu_count() or 1)
        deque(abreast(lambda pair: pair[0].write(pair[1]), pairs, threads), 0)
        arguments = [*command, *words, *map(str, sources), "-o", str(file)]
        done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    if done.returncode:
        fact = f"{command[0]}: {(done.stderr.strip().splitlines() or ['failed'])[0]}"
        raise VerificationError("shared library", fact, "report it with the model")
