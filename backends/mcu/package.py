"""Write the package: the network's C, a self-test, what builds it, and a page that says how to use it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
import numpy.typing as npt

from qcompile.backends.integer.interpret import interpret, random_codes
from qcompile.backends.integer.storage import to_bytes
from qcompile.backends.mcu import write_c
from qcompile.backends.mcu.footprint import Footprint
from qcompile.backends.mcu.write_c import Source

#: Of the self-test's input.
SEED = 0


@dataclass(frozen=True, eq=False)
class Example:
    """One input's codes, and the outputs' that the interpreter makes of them.

    Parameters
    ----------
    inputs, outputs : mapping of str to ndarray of int8 or int16
        By port, in the ports' order; of four bits two codes in each.
    """

    inputs: Mapping[str, npt.NDArray[Any]]
    outputs: Mapping[str, npt.NDArray[Any]]

    @classmethod
    def of(cls, source: Source) -> Example:
        """Return the interpreter's outputs for random codes."""
        tensors = {port.name: source.tensors[port.tensor] for port in source.program.inputs}
        inputs = random_codes(source.program, np.random.default_rng(SEED))
        given = {name: to_bytes(codes, tensors[name].dtype).view(tensors[name].array_dtype)
                 for name, codes in inputs.items()}  # fmt: skip
        return cls(given, interpret(source.program, inputs))


def write_package(source: Source, footprint: Footprint, example: Example, folder: Path) -> tuple[str, ...]:
    """Write every file of a package and return their names.

    Parameters
    ----------
    source : Source
    footprint : Footprint
    example : Example
    folder : Path
    """
    resources = files("qcompile.backends.mcu") / "package"
    named = {"name": source.name, "macro": source.macro}
    written = {
        "model.c": write_c.body(source),
        "model.h": write_c.header(source),
        "model_weights.h": write_c.weights(source),
        **{name: (resources / name).read_text(encoding="utf-8") for name in write_c.headers(source)},
        "selftest.c": selftest(source, example),
        "CMakeLists.txt": Template((resources / "CMakeLists.txt").read_text(encoding="utf-8")).substitute(named),
        "README.md": Template((resources / "README.md").read_text(encoding="utf-8")).substitute(
            named, call=_example_call(source), footprint=footprint.as_markdown()
        ),
        "footprint.json": footprint.as_json(),
    }
    for name, text in written.items():
        (folder / name).write_text(text, encoding="utf-8", newline="\n")
    return tuple(written)


def _example_call(source: Source) -> str:
    ports = [*source.program.inputs, *source.program.outputs]
    given = write_c.parameters(source.program)
    lines = [
        f"{tensor.array_dtype}_t {name}[{tensor.size}];"
        for tensor, (_, name) in zip((source.tensors[port.tensor] for port in ports), given, strict=True)
    ]
    return "\n".join([*lines, f"{source.name}_run({', '.join(name for _, name in given)});"])


def selftest(source: Source, example: Example) -> str:
    """Return ``selftest.c``: main returns 0 if the outputs are the interpreter's."""
    given = write_c.parameters(source.program)
    inputs = [name for _, name in given[: len(example.inputs)]]
    outputs = [name for _, name in given[len(example.inputs) :]]
    parts = [
        f"/* Runs {source.name} on one input and compares the outputs with the specification's: 0 is success. */",
        '#include "model.h"\n',
    ]
    parts += [write_c.constant(name, codes) for name, codes in zip(inputs, example.inputs.values(), strict=True)]
    expected = [f"expected_{name}" for name in outputs]
    parts += [write_c.constant(name, codes) for name, codes in zip(expected, example.outputs.values(), strict=True)]
    sizes = [codes.size for codes in example.outputs.values()]
    types = [codes.dtype for codes in example.outputs.values()]
    parts += [f"static {kind}_t {name}[{size}];" for kind, name, size in zip(types, outputs, sizes, strict=True)]
    parts += ["", *_main(source.name, [*inputs, *outputs], list(zip(outputs, expected, sizes, strict=True)))]
    return "\n".join(parts)


def _main(name: str, arguments: Sequence[str], compared: Sequence[tuple[str, str, int]]) -> list[str]:
    loops = [
        f"    for (int i = 0; i < {size}; ++i) {{\n        wrong += ({output}[i] != {expected}[i]) ? 1 : 0;\n    }}"
        for output, expected, size in compared
    ]
    run = f"    int wrong = {name}_run({', '.join(arguments)});"
    return ["int main(void)", "{", run, *loops, "    return (wrong == 0) ? 0 : 1;", "}", ""]
