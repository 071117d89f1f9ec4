"""The text of ``model.c``, ``model.h`` and ``model_weights.h``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from qcompile.backends.integer import operations as ops
from qcompile.backends.integer.program import Port, Program, Strips, Tensor
from qcompile.backends.mcu.layers import Layer, Layers
from qcompile.backends.tvm.kernels import Kernel

#: Alignment of constants and of the arena in bytes.
ALIGNMENT = 8


@dataclass(frozen=True)
class Source:
    """What the C is written from.

    Parameters
    ----------
    name : str
        Prefix of everything that a user sees; a C identifier.
    program : Program
    offsets : mapping of str to int
        Of each tensor in the arena, in bytes.
    arena_bytes : int
    layers : Layers
    """

    name: str
    program: Program
    offsets: Mapping[str, int]
    arena_bytes: int
    layers: Layers

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """The program's tensors."""
        return self.program.tensors

    @property
    def macro(self) -> str:
        """Prefix of macros."""
        return self.name.upper()


def identifier(text: str) -> str:
    """Return a name as a C identifier in lower case."""
    plain = re.sub(r"\W+", "_", text, flags=re.ASCII).strip("_").lower()
    return plain if plain and not plain[0].isdigit() else f"model_{plain}".rstrip("_")


def parameters(program: Program) -> list[tuple[str, str]]:
    """Return type and name of what ``NAME_run`` takes: each input, then each output."""
    found = []
    for ports, kind, stem in ((program.inputs, "const int8_t *", "in"), (program.outputs, "int8_t *", "out")):
        found += [(kind, stem if len(ports) == 1 else f"{stem}{index}") for index in range(len(ports))]
    return found


def header(source: Source) -> str:
    """Return ``model.h``."""
    program, macro = source.program, source.macro
    lines = [
        f"/* {source.name}: a network in 8-bit integers. Codes q stand for (q - ZERO_POINT) * SCALE. */",
        f"#ifndef {macro}_H", f"#define {macro}_H", "#include <stdint.h>", "",
        "/* The one block of memory that it works in; beside it only the stack. */",
        f"#define {macro}_ARENA_BYTES {source.arena_bytes}", "",
    ]  # fmt: skip
    for ports, kind in ((program.inputs, "INPUT"), (program.outputs, "OUTPUT")):
        for index, port in enumerate(ports):
            stem = f"{macro}_{kind}" + (str(index) if len(ports) > 1 else "")
            lines += _port(stem, port, source.tensors[port.tensor])
    arguments = ", ".join(f"{kind}{name}" for kind, name in parameters(program))
    lines += [
        "/* Run once; returns 0. Not reentrant: the arena is one. */",
        "#ifdef __cplusplus", 'extern "C" {', "#endif", f"int {source.name}_run({arguments});", "#ifdef __cplusplus",
        "}", "#endif", "#endif", "",
    ]  # fmt: skip
    return "\n".join(lines)


def _port(stem: str, port: Port, tensor: Tensor) -> list[str]:
    stored = "x".join(map(str, tensor.shape))
    given = "x".join(map(str, port.shape))
    order = (
        "" if port.axes == tuple(range(len(port.axes))) else f", the model's {given} with axes in the order {port.axes}"
    )
    minus = f"; the model's own codes less {1 << (tensor.bits - 1)}" if port.unsigned else ""
    minus += "; two codes a byte, the first in its low half" if tensor.bits == 4 else ""
    return [
        f"/* '{port.name}': {stored}{order}{minus} */",
        f"#define {stem}_BYTES {tensor.nbytes}",
        f"#define {stem}_SCALE {np.format_float_scientific(np.float32(tensor.scale), unique=True)}f",
        f"#define {stem}_ZERO_POINT ({tensor.zero_point})",
        "",
    ]


def weights(source: Source) -> str:
    """Return ``model_weights.h``: every constant, in the order in which the kernels read it."""
    guard = f"{source.macro}_WEIGHTS_H"
    blocks = [f"#ifndef {guard}\n#define {guard}\n#include <stdint.h>\n"]
    for layer in source.layers.layers:
        for kind, array in layer.constants.items():
            blocks.append(f"/* {_comment(layer.operation.name)} */\n{constant(layer.constant(kind), array)}")
    for operation in source.program.operations:
        if isinstance(operation, Strips):
            first = next(layer for layer in source.layers.layers if layer.operation is operation.operations[0])
            blocks.append(constant(f"steps_{first.index}", step_table(operation)))
    return "\n".join([*blocks, "#endif", ""])


def constant(name: str, array: npt.NDArray[Any]) -> str:
    """Return an array as C."""
    numbers = [_literal(int(number), array.dtype) for number in array.reshape(-1)]
    rows = [", ".join(numbers[start : start + 16]) for start in range(0, len(numbers), 16)]
    body = ",\n    ".join(rows)
    return f"static const {array.dtype}_t {name}[{len(numbers)}] = {{\n    {body}\n}};\n"


def _literal(number: int, dtype: np.dtype[Any]) -> str:
    if dtype == np.uint32:
        return f"{number}u"
    return "(-2147483647 - 1)" if number == -(2**31) else str(number)


def _comment(text: str) -> str:
    return text.replace("*/", "* /").replace("/*", "/ *")


def body(source: Source) -> str:
    """Return ``model.c``."""
    parts = [
        f"/* {source.name}: C99, no allocation, no floating point. See README.md. */",
        '#include "model.h"\n#include "model_weights.h"\n#include "qc_kernels.h"\n',
        "static union {\n    uint64_t aligned;\n    int8_t codes[" + f"{source.macro}_ARENA_BYTES];\n}} arena;\n",
        *source.layers.sources.values(),
        *(_layer(source, layer) for layer in source.layers.layers),
        _run(source),
    ]
    return "\n".join(parts)


def _layer(source: Source, layer: Layer) -> str:
    """Return the function of one layer: its kernels over all rows, or the rows from `first` to `last`."""
    operation = layer.operation
    inputs = "".join(f"const int8_t *{_input(index)}, " for index in range(len(operation.inputs)))
    rows = ", int32_t first, int32_t last" if layer.takes_rows else ""
    if isinstance(operation, ops.Concat):
        code = _concat(source, operation)
    elif layer.by_row:
        calls = "".join(f"        {_call(source, layer, index)}\n" for index in range(len(layer.kernels)))
        code = f"    for (int32_t y = first; y < last; ++y) {{\n{_rows(layer)}{calls}    }}\n"
    else:
        code = "".join(f"    {_call(source, layer, index)}\n" for index in range(len(layer.kernels)))
    title = f"/* {_comment(operation.name)}: {type(operation).__name__} */\n"
    return f"{title}QC_LAYER static void {layer.function}({inputs}int8_t *output{rows})\n{{\n{code}}}\n"


def _input(index: int) -> str:
    return ("input", "other")[index] if index < 2 else f"input_{index}"


def _rows(layer: Layer) -> str:
    """Return the table of input rows of a layer that picks them."""
    picked = layer.kernels[0].input_rows
    if not picked:
        return ""
    numbers = ", ".join(map(str, picked))
    return f"        static const int16_t rows[{len(picked)}] = {{{numbers}}};\n"


def _call(source: Source, layer: Layer, index: int) -> str:
    """Return the call of one kernel."""
    kernel, operation = layer.kernels[index], layer.operation
    first, target = source.tensors[operation.inputs[0]], source.tensors[operation.output]
    other = source.tensors[operation.inputs[-1]]
    input_row, other_row, counted = (
        f"first * {tensor.row_bytes}" if layer.counted else "" for tensor in (first, other, target)
    )
    row = f"y * {target.row_bytes}" if kernel.by_row else counted
    values = {
        "input": _pointer("input", _row_of_input(kernel, first) or input_row, kernel.input_offset, first),
        "other": _pointer("other", other_row if other.size == first.size else "", 0, other),
        "output": _pointer("output", row, kernel.output_offset, target),
        "y": "y" if kernel.by_row else "0",
        "count": f"(last - first) * {target.row_codes}",
        **{kind: layer.constant(kind) for kind in ("weights", "channels", "table")},
    }
    return f"{layer.names[index]}({', '.join(values[name] for name in kernel.arguments)});"


def _row_of_input(kernel: Kernel, tensor: Tensor) -> str:
    if kernel.input_rows:
        return f"rows[y] * {tensor.row_bytes}"
    return f"y * {tensor.row_bytes}" if kernel.input_row else ""


def _pointer(name: str, row: str, offset: int, tensor: Tensor) -> str:
    """Return a pointer to codes, `offset` of them behind a row that begins so many bytes behind the tensor."""
    moved = " + ".join(part for part in (row, str(offset * tensor.bits // 8) if offset else "") if part)
    return f"{name} + ({moved})" if moved else name


def _concat(source: Source, operation: ops.Concat) -> str:
    """Return copies of each input, a run of codes behind one another at a time."""
    target = source.tensors[operation.output]
    runs = int(np.prod(target.shape[: operation.axis], dtype=np.int64))
    step, at, lines = target.size // runs, 0, []
    for index, name in enumerate(operation.inputs):
        length = source.tensors[name].size // runs
        lines.append(
            f"    for (int32_t i = 0; i < {runs}; ++i) {{\n"
            f"        qc_copy(&output[i * {step} + {at}], &{_input(index)}[i * {length}], {length});\n    }}\n"
        )
        at += length
    return "".join(lines)


def _run(source: Source) -> str:
    program = source.program
    given = parameters(program)
    lines = []
    for port, (_, name) in zip(program.inputs, given, strict=False):
        lines.append(f"    qc_copy({_at(source, port.tensor)}, {name}, {source.tensors[port.tensor].nbytes});")
    by_operation = {id(layer.operation): layer for layer in source.layers.layers}
    for operation in program.operations:
        if isinstance(operation, Strips):
            lines += _strips(source, operation, by_operation)
        elif id(operation) in by_operation:
            lines.append(_layer_call(source, by_operation[id(operation)]))
    for port, (_, name) in zip(program.outputs, given[len(program.inputs) :], strict=True):
        lines.append(f"    qc_copy({name}, {_at(source, port.tensor)}, {source.tensors[port.tensor].nbytes});")
    arguments = ", ".join(f"{kind}{name}" for kind, name in given)
    return f"int {source.name}_run({arguments})\n{{\n" + "\n".join(lines) + "\n    return 0;\n}\n"


def _at(source: Source, tensor: str) -> str:
    return f"&arena.codes[{source.offsets[tensor]}]"


def _layer_call(source: Source, layer: Layer) -> str:
    operation = layer.operation
    places = [_at(source, name) for name in (*operation.inputs, operation.output)]
    rows = [f"0, {source.tensors[operation.output].rows}"] if layer.takes_rows else []
    return f"    {layer.function}({', '.join([*places, *rows])});"


def _strips(source: Source, strips: Strips, layers: Mapping[int, Layer]) -> list[str]:
    """Return a loop over the steps, and each operation's call with pointers to where row 0 would be."""
    name = f"steps_{layers[id(strips.operations[0])].index}"
    table = step_table(strips)
    cases = []
    for index, operation in enumerate(strips.operations):
        held = {operation.output: "step[3]"}
        held |= {tensor: f"step[{6 + at}]" for at, tensor in enumerate(operation.inputs)}
        places = [_row_zero(source, tensor, held[tensor], strips) for tensor in (*operation.inputs, operation.output)]
        layer = layers[id(operation)]
        row, at = source.tensors[operation.output].row_bytes, source.offsets[operation.output]
        keep = (
            f"            (void)memmove(&arena.codes[{at}], &arena.codes[{at} + step[5] * {row}], "
            f"(uint32_t)(step[4] * {row}));\n"
        )
        cases.append(
            f"        case {index}:\n{keep if operation.output in strips.windows else ''}"
            f"            {layer.function}({', '.join(places)}, step[1], step[2]);\n            break;\n"
        )
    columns = table.shape[1]
    return [
        f"    for (int32_t i = 0; i < {len(table)}; ++i) {{\n"
        f"        const int16_t *const step = &{name}[i * {columns}];\n"
        f"        switch (step[0]) {{\n{''.join(cases)}        default:\n            break;\n        }}\n    }}"
    ]


def step_table(strips: Strips) -> npt.NDArray[np.int16]:
    """Return a row per step: operation, first, last, held, rows kept, moved from, and the row atop each input."""
    held: dict[str, int] = {}
    most = max(len(operation.inputs) for operation in strips.operations)
    rows = []
    for step in (step for strip in strips.strips for step in strip):
        operation = strips.operations[step.operation]
        inputs = [held.get(tensor, 0) for tensor in operation.inputs]
        held[operation.output] = step.held if operation.output in strips.windows else 0
        kept = step.first - step.held if step.moved_from else 0
        padded = inputs + [0] * (most - len(inputs))
        rows.append([step.operation, step.first, step.last, held[operation.output], kept, step.moved_from, *padded])
    return np.array(rows, np.int16)


def _row_zero(source: Source, tensor: str, held: str, strips: Strips) -> str:
    if tensor not in strips.windows:
        return _at(source, tensor)
    return f"{_at(source, tensor)} - {held} * {source.tensors[tensor].row_bytes}"
