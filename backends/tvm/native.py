"""Loop nests become machine code: functions of TVM's own representation, through its LLVM, as one object file.

What `emit.py` is to C this is to objects: pointers in place of buffers, nothing of TVM's runtime. Kernels for
processors with wide registers are written as loops over vectors, since what they are fast by (which sums stay in
registers, which instruction takes which operand) is what a schedule would have to find again.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qcompile.backends.tvm.emit import Function, load_tvm, on_stack

#: No buffer has an extent of its own here: offsets are known to be within the arena.
EXTENT = (1 << 31) - 1
#: What a library's constants are called inside of it.
CONSTANTS = "qc_constants"


def builder() -> Any:
    """Return TVM's builder of loops, ``T`` of its scripts."""
    load_tvm()
    from tvm.script.ir_builder import tirx

    return tirx


def function(
    name: str, arguments: Mapping[str, str], body: Callable[[Mapping[str, Any]], None], numbers: Sequence[str] = ()
) -> Function:
    """Return a function of pointers, and behind them numbers.

    Parameters
    ----------
    name : str
    arguments : mapping of str to str
        Element type of what each argument points to.
    body : callable
        Builds the statements, from a buffer for each pointer and a variable for each number.
    numbers : sequence of str
        Names of arguments that are int32.
    """
    load_tvm()
    from tvm.script.ir_builder import IRBuilder

    ir = builder()
    with IRBuilder() as written, ir.prim_func():
        ir.func_name(name)
        pointers = {key: ir.arg(key, ir.handle(dtype)) for key, dtype in arguments.items()}
        known = {key: ir.arg(key, ir.int32()) for key in numbers}
        body(known | {key: ir.decl_buffer((EXTENT,), arguments[key], data=at) for key, at in pointers.items()})
    made = written.get()
    return made.with_attr("global_symbol", name).with_attr("tirx.noalias", True)


@dataclass(frozen=True)
class Machine:
    """What LLVM is told of a processor.

    Parameters
    ----------
    cpu : str
        As LLVM names it.
    features : tuple of str
        With a sign in front.
    triple : str
    options : tuple of str
        What LLVM is told on its command line.
    """

    cpu: str
    features: tuple[str, ...] = ()
    triple: str = "x86_64-unknown-linux-gnu"
    options: tuple[str, ...] = ()


@dataclass(frozen=True)
class Object:
    """Machine code.

    Parameters
    ----------
    module : tvm.runtime.Module
    """

    module: Any

    @property
    def assembly(self) -> str:
        """Its text."""
        text: str = self.module.inspect_source("asm")
        return text

    def write(self, path: Path) -> None:
        """Write an object file."""
        self.module.write_to_file(str(path), "o")


def compile_object(functions: Mapping[str, Function], machine: Machine) -> Object:
    """Return the machine code of functions that may call one another by name."""
    tvm = load_tvm()
    tirx = tvm.tirx.transform
    settings = {"kind": "llvm", "mcpu": machine.cpu, "mattr": list(machine.features), "mtriple": machine.triple}
    settings |= {"cl-opt": list(machine.options)} if machine.options else {}
    target = tvm.target.Target(settings)
    steps = [
        tirx.BindTarget(target.with_host(target)), tirx.FlattenBuffer(), tirx.NarrowDataType(32),
        tirx.VectorizeLoop(True), tirx.UnrollLoop(), tirx.StmtSimplify(), tirx.RemoveNoOp(),
    ]  # fmt: skip
    flat = tvm.ir.transform.Sequential(steps)(tvm.IRModule(dict(functions)))
    kept = {name: _kept(each) for name, each in flat.functions.items()}
    lowered = tvm.ir.transform.Sequential([tirx.LowerTVMBuiltin(), tirx.LowerIntrin()])(tvm.IRModule(kept))
    return Object(tvm.get_global_func("target.build.llvm")(lowered, target))


def from_text(text: str) -> Object:
    """Return the machine code of LLVM's text, which names its processor itself."""
    tvm = load_tvm()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "text.ll"
        file.write_text(text, encoding="utf-8")
        return Object(tvm.get_global_func("ffi.Module.load_from_file.ll")(str(file), "ll"))


def _kept(made: Function) -> Function:
    """Return a function whose buffers are on the stack."""
    tvm = load_tvm()
    body = on_stack(made.body)
    for key, value in (("device_type", 1), ("device_id", 0)):  # what LowerTVMBuiltin asks of buffers on the stack
        body = tvm.tirx.AttrStmt(tvm.ir.StringImm("default"), key, tvm.tirx.const(value, "int32"), body)
    return made.with_body(body)


def constants(data: npt.NDArray[np.uint8]) -> str:
    """Return bytes as LLVM's text, and ``qc_constants()``, which tells where they are.

    Functions that TVM takes in as text are expanded where they are called, so they cannot be what a library exports;
    what they refer to stays.
    """
    text = data.tobytes().hex("\\")
    return (
        f'@qc_data = internal constant [{len(data)} x i8] c"\\{text}", align 64\n'
        f"define ptr @{CONSTANTS}() {{\n  ret ptr @qc_data\n}}\n"
    )
