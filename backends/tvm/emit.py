"""Everything that touches TVM's code generation: scheduled functions become freestanding C with raw pointers.

The steps are those of TVM's own build up to where it would wrap functions into its calling convention; in its place
each buffer becomes a plain pointer, so that the C needs ``<stdint.h>`` and nothing of TVM. See docs/targets/mcu.md.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from qcompile.core.errors import TargetError

#: A function as TVM has it: `tvm.tirx.PrimFunc`, which is untyped.
Function = Any
#: What copies codes and what fills in padding, by the codes' type.
COPIES = {"int8": ("qc_copy", "qc_fill"), "int16": ("qc_copy16", "qc_fill16")}


def load_tvm() -> ModuleType:
    """Import TVM.

    Raises
    ------
    TargetError
        If it is not installed.
    """
    try:
        import tvm
        import tvm.s_tir
        import tvm.script
        import tvm.sym  # parts of their own, which `import tvm` leaves out
    except ImportError as error:
        raise TargetError("tvm", "is not installed", "pip install 'qcompile[tvm]'") from error
    module: ModuleType = tvm
    return module


def emit_c(functions: Mapping[str, Function], packed: frozenset[str] = frozenset()) -> str:
    """Return C99 of scheduled functions, by the names that they are to have.

    Parameters
    ----------
    functions : mapping of str to tvm.tirx.PrimFunc
    packed : frozenset of str
        Parameters that have two codes a byte. The functions know of none of that: they count codes.
    """
    tvm = load_tvm()
    named = {name: function.with_attr("global_symbol", name) for name, function in functions.items()}
    target = tvm.target.Target({"kind": "c"})
    lowered = _lowered(tvm.IRModule(named), target, packed)
    source: str = tvm.get_global_func("target.build.c")(lowered, target).inspect_source()
    return _freestanding(source)


def _lowered(module: Any, target: Any, packed: frozenset[str]) -> Any:
    tvm = load_tvm()
    s, x = tvm.s_tir.transform, tvm.tirx.transform
    blocks = [
        x.BindTarget(target.with_host(target)), s.CanonicalizeLoop(), s.LowerInitBlock(),
        s.PlanAndUpdateBufferAllocationLocation(), s.ConvertBlocksToOpaque(), s.CompactBufferAllocation(),
        s.LowerMatchBuffer(), s.StmtSimplify(), s.LowerOpaqueBlock(), x.FlattenBuffer(), x.NarrowDataType(32),
        x.StmtSimplify(), x.UnrollLoop(), s.RenormalizeSplitPattern(), x.StmtSimplify(), x.RemoveNoOp(),
    ]  # fmt: skip
    flat = tvm.ir.transform.Sequential(blocks)(module)
    raw = {
        name: _raw(function.with_body(on_stack(_copied(_in_halves(function.body, packed)))))
        for name, function in flat.functions.items()
    }
    return tvm.ir.transform.Sequential([x.LowerTVMBuiltin(), x.LowerIntrin()])(tvm.IRModule(raw))


def _raw(function: Function) -> Function:
    """Return a function with a pointer in place of each buffer that it takes."""
    tvm = load_tvm()
    tirx = tvm.tirx
    parameters, bound = [], []
    for parameter in function.params:
        if not hasattr(parameter, "shape"):
            parameters.append(parameter)
            continue
        pointer = tvm.ir.PointerType(tvm.ir.PrimType(str(parameter.dtype)), "global")
        parameters.append(tirx.Var(parameter.name, pointer))
        bound.append(tirx.DeclBuffer(parameter, data=parameters[-1]))
    body = tirx.SeqStmt([*bound, function.body])
    for key, value in (("device_type", 1), ("device_id", 0)):  # what LowerTVMBuiltin asks of buffers on the stack
        body = tirx.AttrStmt(tvm.ir.StringImm("default"), key, tirx.const(value, "int32"), body)
    raw = tirx.PrimFunc(parameters, body)
    for key, value in function.attrs.items():
        raw = raw.with_attr(key, value)
    return raw


def on_stack(body: Any) -> Any:
    """Return a body whose buffers are arrays of C: larger ones would be asked of TVM's runtime."""
    tirx = load_tvm().tirx
    import tvm_ffi

    def kept(allocation: Any) -> Any:
        return tirx.AllocBuffer(allocation.buffer, {"disable_lower_builtin": tirx.const(1, "bool")})

    return tvm_ffi.structural_map(body, (tirx.AllocBuffer, kept))


def _in_halves(body: Any, packed: frozenset[str]) -> Any:
    """Return a body whose loads and stores of packed parameters are calls of qc_half and qc_pack."""
    if not packed:
        return body
    tvm = load_tvm()
    tirx = tvm.tirx
    import tvm_ffi

    def start(buffer: Any) -> Any:
        return tirx.address_of(tirx.BufferLoad(buffer, [tirx.const(0, "int32")]))

    def loaded(load: Any) -> Any:
        if load.source.name not in packed:
            return load
        return tirx.call_pure_extern("int8", "qc_half", start(load.source), load.indices[0])

    def stored(store: Any) -> Any:
        if store.buffer.name not in packed:
            return store
        value = store.value.astype("int32")
        return tirx.Evaluate(tirx.call_extern("int32", "qc_pack", start(store.buffer), store.indices[0], value))

    read = tvm_ffi.structural_map(body, (tvm.ir.TensorLoad, loaded))
    return tvm_ffi.structural_map(read, (tirx.BufferStore, stored))


def _copied(body: Any) -> Any:
    """Return a body where loops that copy codes in order, or padding in their place, are calls of qc_copy and qc_fill.

    A compiler at -O2 asks of each code anew whether it is padding; the question is one for the whole loop.
    """
    tvm = load_tvm()
    import tvm_ffi

    return tvm_ffi.structural_map(body, (tvm.tirx.For, _copy))


def _copy(loop: Any) -> Any:
    tvm = load_tvm()
    tirx = tvm.tirx
    store = loop.body
    if not isinstance(store, tirx.BufferStore) or str(store.buffer.dtype) not in COPIES:
        return loop
    moved, filled = COPIES[str(store.buffer.dtype)]
    value, condition, code = store.value, None, None
    if getattr(getattr(value, "op", None), "name", "") in ("prim.if_then_else", "tirx.if_then_else"):
        condition, value, code = value.args
    if _called(value, "qc_half"):
        return _unpacking(store, loop, value, condition, code)
    if (
        not isinstance(value, tvm.ir.TensorLoad)
        or str(value.source.dtype) != str(store.buffer.dtype)
        or value.source.same_as(store.buffer)
    ):
        return loop
    variable = loop.loop_var
    if not (_in_order(store.indices, variable) and _in_order(value.indices, variable)):
        return loop
    if condition is not None and (_reads(condition, variable) or _reads(code, variable)):
        return loop
    count, target = loop.extent, _address(store.buffer, store.indices, variable)
    copy = tirx.Evaluate(
        tirx.call_extern("int32", moved, target, _address(value.source, value.indices, variable), count)
    )
    return _or_fill(copy, filled, target, condition, code, count)


def _or_fill(copy: Any, filled: str, target: Any, condition: Any, code: Any, count: Any) -> Any:
    """Return a copy, or where a condition decides between it and padding, that choice."""
    tirx = load_tvm().tirx
    if condition is None or code is None:
        return copy
    return tirx.IfThenElse(
        condition, copy, tirx.Evaluate(tirx.call_extern("int32", filled, target, code.astype("int32"), count))
    )


def _unpacking(store: Any, loop: Any, half: Any, condition: Any, code: Any) -> Any:
    """Return a loop over codes of four bits in order as a call of qc_unpack."""
    tvm = load_tvm()
    tirx, variable, indices = tvm.tirx, loop.loop_var, half.args[2:]
    if not (_in_order(store.indices, variable) and _in_order(indices, variable)):
        return loop
    if condition is not None and (_reads(condition, variable) or _reads(code, variable)):
        return loop
    target = _address(store.buffer, store.indices, variable)
    first = tvm.sym.Analyzer().simplify(_at(indices[0], variable, 0))
    unpacked = tirx.Evaluate(tirx.call_extern("int32", "qc_unpack", target, half.args[1], first, loop.extent))
    _, filled = COPIES["int8"]
    return _or_fill(unpacked, filled, target, condition, code, loop.extent)


def _called(value: Any, name: str) -> bool:
    """Tell whether an expression is a call of a C function."""
    arguments = list(getattr(value, "args", ()))
    return bool(arguments) and getattr(arguments[0], "value", None) == name


def _at(expression: Any, variable: Any, place: int) -> Any:
    tvm = load_tvm()
    import tvm_ffi

    def replaced(found: Any) -> Any:
        return tvm.tirx.const(place, "int32") if found.same_as(variable) else found

    return tvm_ffi.structural_map(expression, (tvm.tirx.Var, replaced))


def _in_order(indices: Any, variable: Any) -> bool:
    tvm = load_tvm()
    step = _at(indices[0], variable, 1) - _at(indices[0], variable, 0)
    found = tvm.sym.Analyzer().simplify(step)
    return len(indices) == 1 and getattr(found, "value", None) == 1


def _reads(expression: Any, variable: Any) -> bool:
    import tvm_ffi

    return not tvm_ffi.structural_equal(_at(expression, variable, 0), expression, map_free_vars=False)


def _address(buffer: Any, indices: Any, variable: Any) -> Any:
    tvm = load_tvm()
    index = tvm.sym.Analyzer().simplify(_at(indices[0], variable, 0))
    return tvm.tirx.address_of(tvm.tirx.BufferLoad(buffer, [index]))


def _freestanding(source: str) -> str:
    """Return C without TVM's headers and without declarations of what is called; what is only read is const."""
    kept = re.sub(r"^(#.*|//.*|void\* __tvm_ffi__library_ctx.*|extern \"C\")\n", "", source, flags=re.MULTILINE)
    kept = re.sub(r"^TVM_DLL [^{]*?;\n", "", kept, flags=re.MULTILINE)
    kept = kept.replace("TVM_DLL ", "static ")
    for name in ("input", "other", "weights", "channels", "table"):
        kept = re.sub(rf"(int8_t|int16_t|int32_t|uint32_t)\* {name}\b", rf"const \1 *{name}", kept)
    return (
        re.sub(r"^static void \w+\((.*?)\) \{\n(.*?)^\}", _without_unused, kept.strip(), flags=re.MULTILINE | re.DOTALL)
        + "\n"
    )


def _without_unused(function: re.Match[str]) -> str:
    """Return a function that mentions every parameter: a part of a convolution may be all padding."""
    names = [re.split(r"[ *]", parameter)[-1] for parameter in function[1].split(",")]
    unused = [name for name in names if not re.search(rf"\b{name}\b", function[2])]
    text = function[0]
    start = function.start(2) - function.start(0)
    return text[:start] + "".join(f"  (void){name};\n" for name in unused) + text[start:]
