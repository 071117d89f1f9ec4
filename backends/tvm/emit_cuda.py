"""Scheduled functions as CUDA kernels of plain pointers: TVM's own pipeline and codegen, without a device."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from qcompile.backends.tvm.emit import Function, load_tvm

#: The oldest architecture: of what generated kernels use newer ones have nothing that would be written another way.
TARGET = {"kind": "cuda", "arch": "sm_75", "max_threads_per_block": 1024, "thread_warp_size": 32}
_KERNEL = re.compile(
    r'extern "C" __global__ void __launch_bounds__\((\d+)\) (\w+)\(([^)]*)\) \{\n(.*)^\}', re.DOTALL | re.MULTILINE
)


def emit_cuda(function: Function, name: str, offsets: Mapping[str, str], order: Sequence[str]) -> str:
    """Return the CUDA C++ of a scheduled function, as one kernel.

    Parameters
    ----------
    function : tvm.tirx.PrimFunc
        With its loops bound to blocks and threads.
    name : str
        What the kernel is to be called.
    offsets : mapping of str to str
        By parameter, what to add to its pointer first: where a sample, or a row, begins. A parameter that is no pointer
        is no parameter of the kernel but has this value.
    order : sequence of str
        Of the kernel's parameters: TVM orders them by its own lights.

    Returns
    -------
    str
        It calls functions of ``arithmetic.cuh``.
    """
    tvm = load_tvm()
    target = tvm.target.Target(TARGET).with_host(tvm.target.Target({"kind": "c"}))
    built = tvm.tirx.build(tvm.IRModule({"main": function}), target=target)
    found = _KERNEL.search(built.imports[0].inspect_source())
    assert found is not None, "TVM's CUDA has no kernel"
    parameters, lines = dict[str, str](), list[str]()
    for text in found[3].split(","):
        kind, _, written = text.strip().rpartition(" ")
        stem = written.removesuffix("_ptr")
        if "*" in kind:
            parameters[stem] = f"{kind} {written}"
            lines += [f"  {written} += {offsets[stem]};\n"] if stem in offsets else []
        else:
            lines.insert(0, f"  const {kind} {written} = {offsets[stem]};\n")
    # A row's number in a table of rows is looked up in front of TVM's own code, which knows nothing of it.
    signature = ", ".join(parameters.get(stem, f"const int *__restrict__ {stem}") for stem in order)
    assert set(parameters) <= set(order), f"TVM's CUDA takes {sorted(parameters)}, not {list(order)}"
    head = f'extern "C" __global__ void __launch_bounds__({found[1]}) {name}({signature})'
    return f"{head}\n{{\n{''.join(lines)}{found[4]}}}\n"
