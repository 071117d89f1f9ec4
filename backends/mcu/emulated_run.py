"""Run a package on an emulated microcontroller, hold it against the specification, and count its instructions."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qcompile.backends.integer.interpret import interpret, quantize_input, random_codes
from qcompile.backends.integer.lower import lower
from qcompile.backends.integer.program import Program
from qcompile.backends.integer.storage import to_bytes
from qcompile.backends.mcu import write_c
from qcompile.backends.mcu.backend import REFERENCE, McuBackend
from qcompile.backends.mcu.emulate import MACHINES, emulate
from qcompile.backends.mcu.footprint import instructions_by_layer
from qcompile.core import model as models
from qcompile.core.errors import TargetError, UsageError, VerificationError
from qcompile.core.runtime import Feeds

Codes = Mapping[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class EmulatedRun:
    """What was seen.

    Parameters
    ----------
    processor : str
    samples : int
        Inputs that were run; every output was the specification's, bit by bit.
    instructions : int
        Executed per input, by the network alone.
    layers : sequence of mapping
        As ``footprint.json`` has them, with ``instructions`` of each.
    """

    processor: str
    samples: int
    instructions: int
    layers: Sequence[Mapping[str, Any]]


def run_package(folder: Path, samples: Sequence[Feeds] = (), count: int = 1) -> EmulatedRun:
    """Run a package under emulation and check its outputs.

    Parameters
    ----------
    folder : Path
        As `McuBackend.lower` writes it.
    samples : sequence of Feeds
        The model's own inputs; without them random codes.
    count : int
        How many inputs to run at most.

    Raises
    ------
    UsageError
        If it is no package.
    TargetError
        If the tools are not here, or there is no emulator for its processor.
    VerificationError
        If an output is not what the integer program says.
    """
    try:
        footprint = json.loads((folder / "footprint.json").read_text(encoding="utf-8"))
        processor, name = footprint["target"], footprint["name"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        fact = "holds no footprint.json of a microcontroller's package"
        raise UsageError(folder, fact, "give the folder that a compile for a microcontroller wrote") from error
    if processor not in MACHINES:
        raise TargetError(f"run {folder}", f"no emulator has a {processor}", f"use one of {', '.join(MACHINES)}")
    program = lower(models.load(folder / REFERENCE))
    inputs = [_quantized(program, feeds) for feeds in samples[:count]] or _random(program, count)
    expected = [interpret(program, codes) for codes in inputs]
    return _checked(folder, footprint, program, inputs, expected, name)


def _quantized(program: Program, feeds: Feeds) -> Codes:
    return {port.name: quantize_input(program, port, feeds[port.name]) for port in program.inputs}


def _random(program: Program, count: int) -> list[Codes]:
    random = np.random.default_rng(0)
    return [random_codes(program, random) for _ in range(count)]


def _checked(
    folder: Path, footprint: Mapping[str, Any], program: Program, inputs: Sequence[Codes], expected: Sequence[Codes],
    name: str,
) -> EmulatedRun:  # fmt: skip
    given = b"".join(to_bytes(codes[port.name], program.tensors[port.tensor].dtype).tobytes()
                     for codes in inputs for port in program.inputs)  # fmt: skip
    wanted = b"".join(codes[port.name].tobytes() for codes in expected for port in program.outputs)
    processor = footprint["target"]
    target = next(target for target in McuBackend().targets() if target.name == processor)
    with tempfile.TemporaryDirectory() as scratch:
        main = Path(scratch) / "main.c"
        main.write_text(driver(program, name, len(inputs)), encoding="utf-8")
        sources = (folder / "model.c", main)
        seen = emulate(sources, processor, {"in.bin": given}, target.settings["compiler"], include=folder)
    made = seen.files.get("out.bin", b"")
    if seen.status or made != wanted:
        wrong = int(np.count_nonzero(np.frombuffer(made, np.int8) != np.frombuffer(wanted, np.int8))) \
            if len(made) == len(wanted) else len(wanted)  # fmt: skip
        fact = f"{wrong} of {len(wanted)} codes are not the integer program's (it left with {seen.status})"
        raise VerificationError(f"{folder} on {processor}", fact, "report it with the model")
    counts = instructions_by_layer(footprint["layers"], seen.instructions)
    layers = [{**layer, "instructions": each // len(inputs)}
              for layer, each in zip(footprint["layers"], counts, strict=True)]  # fmt: skip
    outside = {"main", "host_open", "host_read", "host_write", "host_close", "semihosting", "reset_handler", "strlen"}
    whole = sum(number for symbol, number in seen.instructions.items() if symbol.partition(".")[0] not in outside)
    return EmulatedRun(processor, len(inputs), whole // len(inputs), layers)


def driver(program: Program, name: str, count: int) -> str:
    """Return a main that reads inputs from ``in.bin``, runs the network, and writes its outputs to ``out.bin``."""
    given = write_c.parameters(program)
    ports = [*program.inputs, *program.outputs]
    tensors = [program.tensors[port.tensor] for port in ports]
    sizes = [tensor.nbytes for tensor in tensors]
    buffers = [f"static {one.array_dtype}_t {each}[{one.size}];" for (_, each), one in zip(given, tensors, strict=True)]
    inside = list(zip(given, sizes, strict=True))
    reads = [f"        (void)host_read(from, {each}, {size}u);" for (_, each), size in inside[: len(program.inputs)]]
    writes = [f"        (void)host_write(to, {each}, {size}u);" for (_, each), size in inside[len(program.inputs) :]]
    call = f"        {name}_run({', '.join(each for _, each in given)});"
    lines = [
        '#include "model.h"', '#include "semihosting.h"', *buffers, "int main(void)", "{",
        '    const int32_t from = host_open("in.bin", 1u), to = host_open("out.bin", 5u);',
        f"    for (int32_t i = 0; i < {count}; ++i) {{", *reads, call, *writes, "    }",
        "    (void)host_close(from);", "    return host_close(to);", "}", "",
    ]  # fmt: skip
    return "\n".join(lines)
