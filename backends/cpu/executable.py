"""A network as a program of its own: for machines that are not here, under emulation or with nothing else on them.

It is linked from the library's objects and needs no C library. See `runner_aarch64.s` for what it reads and writes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from string import Template
from typing import Any

import numpy as np

from qcompile.backends.cpu import library
from qcompile.backends.cpu.network import Network
from qcompile.backends.integer.program import Port, Program
from qcompile.backends.tvm import native
from qcompile.backends.tvm.emit import Function, load_tvm
from qcompile.backends.tvm.native import Object

#: By architecture, the part that talks to the system.
RUNNERS = {"aarch64": "runner_aarch64.s"}


def write(objects: Sequence[Object], network: Network, name: str, file: Path) -> None:
    """Link a network's objects to a static executable.

    Parameters
    ----------
    objects : sequence of Object
        As `library.compiled` returns them.
    network : Network
    name : str
        What the library's functions are called by.
    file : Path

    Raises
    ------
    TargetError, VerificationError
        See `library.linked`.
    """
    texts = [_assembly(network, name)]
    functions = {
        f"{name}_{stem}{each.suffix}_all": _all(each, name, stem, texts.pop() if texts else "")
        for each in network.all
        for stem in library.RUNS
    }
    around = native.compile_object(functions, network.processor.machine)
    library.linked([*objects, around], file, network.processor, ["-static", "-S", "-e", "_start"])
    file.chmod(0o755)


def sizes(ports: Sequence[Port], program: Program, floats: bool) -> list[int]:
    """Return the bytes of each port, as floats or as codes."""
    if floats:
        tensors = [program.tensors[port.tensor] for port in ports]
        return [4 * tensor.size if tensor.is_codes else tensor.nbytes for tensor in tensors]
    return [program.tensors[port.tensor].nbytes for port in ports]


def _assembly(network: Network, name: str) -> str:
    kinds, most = [], [0, 0]
    for each in network.all:
        program = each.layout.program
        for stem, floats in library.RUNS.items():
            bytes_ = [sum(sizes(ports, program, floats)) for ports in (program.inputs, program.outputs)]
            kinds.append(f".xword {bytes_[0]}, {bytes_[1]}, {name}_{stem}{each.suffix}_all, 0")
            most = [max(pair) for pair in zip(most, bytes_, strict=True)]
    words = {"kinds": "\n".join(kinds), "most_in": most[0], "most_out": most[1]}
    source = Path(__file__).with_name(RUNNERS[network.processor.architecture]).read_text(encoding="utf-8")
    lines = Template(source).substitute(words, workspace=network.workspace).splitlines()
    return "\n".join(f'module asm "{line}"' for line in lines if line and not line.startswith("//"))


def _all(network: Network, name: str, stem: str, text: str) -> Function:
    """Return a function of a workspace, of all inputs and of all outputs, one behind the other in bytes."""
    tvm, program, called = load_tvm(), network.layout.program, f"{name}_{stem}{network.suffix}"

    def body(buffers: Any) -> None:
        ir = native.builder()
        floats, places = library.RUNS[stem], []
        for key, ports in (("input", program.inputs), ("output", program.outputs)):
            ends = np.cumsum([0, *sizes(ports, program, floats)]).tolist()
            places += [ir.address_of(buffers[key][at]) for at in ends[:-1]]
        call = ir.call_extern("void", called, ir.address_of(buffers["workspace"][0]), *places)
        if text:
            with ir.attr(tvm.ir.StringImm("default"), "pragma_import_llvm", tvm.ir.StringImm(text)):
                ir.evaluate(call)
        else:
            ir.evaluate(call)

    return native.function(f"{called}_all", dict.fromkeys(("workspace", "input", "output"), "uint8"), body)
