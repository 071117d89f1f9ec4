"""The header of a library: what C calls, with the shapes, scales and zero points of inputs and outputs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from string import Template

import numpy as np

from qcompile.backends.cpu.layout import ALIGNMENT, THREADS
from qcompile.backends.cpu.network import Network
from qcompile.backends.integer.program import Port, Program, Tensor

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


#: What runs a network, as C sees it.
RUNS = """\
void ${name}_run${suffix}(void *workspace, $codes);

/* The same from and to the model's own floats, in the model's own order. */
void ${name}_run_floats${suffix}(void *workspace, $floats);
"""
#: The same where there are several lengths.
BY_LENGTH = """\
/* The same by length: 0, or -1 where there is none like that. */
static inline int ${name}_run(void *workspace, int length, $codes)
{
$codes_cases    return -1;
}

static inline int ${name}_run_floats(void *workspace, int length, $floats)
{
$floats_cases    return -1;
}

/* The least length that holds so much, or -1. */
static inline int ${name}_length(int count)
{
$holding    return -1;
}
"""
PADDED = """\
/* A shorter input becomes one of these lengths: zeros behind its end in '$mask', and in the other inputs anything that
   is valid. Outputs that go along the length have as much behind what counts. */

"""


def header(network: Network, name: str, mask: str = "") -> str:
    """Return ``NAME.h``.

    Parameters
    ----------
    network : Network
        With tiles of AMX, its ``NAME_create`` asks the system for them.
    name : str
        A C identifier.
    mask : str
        The input under which shorter ones are padded, where there is one.
    """
    template = Path(__file__).with_name("header.h").read_text(encoding="utf-8")
    ports = [line for each in network.all for line in _ports(each, name.upper())]
    return Template(template).substitute(
        name=name, macro=name.upper(), ports="\n".join(ports), workspace=network.workspace, alignment=ALIGNMENT,
        threads=THREADS, **asking(name, network.processor.tiles), runs=_runs(network, name, mask),
    )  # fmt: skip


def _ports(network: Network, macro: str) -> list[str]:
    program, found = network.layout.program, list[str]()
    for group, kind in ((program.inputs, "INPUT"), (program.outputs, "OUTPUT")):
        for index, port in enumerate(group):
            stem = f"{macro}_{kind}" + (str(index) if len(group) > 1 else "") + network.suffix
            found += _port(stem, port, program.tensors[port.tensor])
    return found


def _runs(network: Network, name: str, mask: str) -> str:
    """Return the functions that run it, at each length and by length."""
    parameters = {key: ", ".join(_parameters(network.layout.program, kind))
                  for key, kind in (("codes", "int8_t"), ("floats", "float"))}  # fmt: skip
    runs = "\n".join(Template(RUNS).substitute(parameters, name=name, suffix=each.suffix) for each in network.all)
    if not network.siblings:
        return runs
    program, cases = network.layout.program, dict[str, str]()
    given = ", ".join([*stems("in", program.inputs), *stems("out", program.outputs)])
    for key, stem in (("codes", "run"), ("floats", "run_floats")):
        cases[f"{key}_cases"] = "".join(
            f"    if (length == {each.length}) return {name}_{stem}{each.suffix}(workspace, {given}), 0;\n"
            for each in network.all
        )
    holding = "".join(f"    if (count <= {each.length}) return {each.length};\n" for each in network.all)
    by_length = Template(BY_LENGTH).substitute(parameters, name=name, holding=holding, **cases)
    return f"{runs}\n{Template(PADDED).substitute(mask=mask) if mask else ''}{by_length}"


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
