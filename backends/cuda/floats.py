"""Kernels of what computes in float32: element by element, along rows, over axes, and lookups of rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from qcompile.backends.cuda.expressions import literal, statements
from qcompile.backends.integer import float_operations as ops
from qcompile.backends.integer import operations as moves
from qcompile.backends.integer.program import Operation, Tensor

Array = npt.NDArray[Any]
Tensors = Mapping[str, Tensor]
#: Threads of a block of what goes element by element, and the most of a row.
THREADS, WIDEST = 256, 512
#: Up to so many columns a warp has a row of its own, of so many in a block.
NARROW, ROWS = 256, 4
#: From so many terms on a warp adds them up, if there are no more results than this.
TERMS, RESULTS = 32, 1 << 14
TYPES = {"float32": "float", "int8": "int8_t", "int64": "wide_t"}


@dataclass(frozen=True)
class Scratch:
    """Bytes that kernels of one operation hand on to one another.

    Parameters
    ----------
    at : int
        Of a sample: the first one.
    nbytes : int
    """

    at: int
    nbytes: int


@dataclass(frozen=True, eq=False)
class Kernel:
    """A kernel and what it is launched with.

    Parameters
    ----------
    stem : str
        What kernels of its kind are called by.
    text : str
        Its CUDA C++, which calls it {name}.
    arguments : tuple of str, ndarray or Scratch
        Its pointers: tensors by name, constants, and what only the operation's own kernels use.
    grid : tuple of int
        Blocks along x and y.
    threads : int
    numbers : tuple of int
        The fields of the struct behind its pointers.
    """

    stem: str
    text: str
    arguments: tuple[str | Array | Scratch, ...]
    grid: tuple[int, int]
    threads: int
    numbers: tuple[int, ...] = ()


def bits(value: float) -> int:
    """Return the bits of a float32 as a number of 32 bits."""
    return int(np.float32(value).view(np.int32))


def row_major(shape: Sequence[int]) -> tuple[int, ...]:
    """Return how many elements are from one to the next along each axis."""
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def joined(extents: Sequence[int], steps: Sequence[Sequence[int]]) -> tuple[list[int], list[list[int]]]:
    """Return loops with axes joined that all arrays go through as one."""
    found: list[tuple[int, list[int]]] = []
    for axis, extent in enumerate(extents):
        here = [each[axis] for each in steps]
        if extent == 1:
            continue
        if found and all(a == extent * b for a, b in zip(found[-1][1], here, strict=True)):
            found[-1] = found[-1][0] * extent, here
        else:
            found.append((extent, here))
    return [extent for extent, _ in found], [[each[place] for _, each in found] for place in range(len(steps))]


class Writing:
    """What reads the leaves of an expression within a kernel: its parameters and its text.

    Parameters
    ----------
    operation : FloatOperation
    tensors : mapping of str to Tensor
    """

    def __init__(self, operation: ops.FloatOperation, tensors: Tensors) -> None:
        self.operation, self.output = operation, tensors[operation.output]
        self.arguments: list[str | Array] = []
        self.numbers: list[int] = []
        self.parameters: list[str] = []
        self.begins: list[str] = []
        self.steps: list[tuple[int, ...]] = []
        self._scales: list[int] = []
        for index, leaf in enumerate(operation.leaves):
            self._take(index, leaf, None if leaf.values is not None else tensors[operation.inputs[leaf.source]])

    def _take(self, index: int, leaf: ops.Leaf, tensor: Tensor | None) -> None:
        dtype = "float32" if tensor is None else tensor.dtype
        values = np.ascontiguousarray(0.0 if leaf.values is None else leaf.values, np.float32)
        shape = values.shape if tensor is None else tensor.shape
        self.arguments.append(values if tensor is None else tensor.name)
        self.parameters.append(f"const {TYPES[dtype]} *__restrict__ x{index}")
        if tensor is not None:
            self.begins.append(f"x{index} += (wide_t)blockIdx.z * {tensor.size};")
        own = row_major(shape)
        self.steps.append(tuple(0 if axis is None else own[axis] for axis in leaf.axes))
        self._scales.append(len(self.numbers))
        if tensor is not None and tensor.is_codes:
            self.numbers += [bits(leaf.scale), leaf.zero_point]

    def leaf(self, index: int, place: Sequence[tuple[str, int]]) -> str:
        """Return what reads a leaf, its place as names of indices and their steps."""
        at = " + ".join(f"{name} * {step}" for name, step in place if step) or "0"
        dtype = self.parameters[index].split()[1]
        if dtype == "int8_t":
            scale = self._scales[index]
            return f"qc_dequantize(x{index}[{at}], numbers.real({scale}), numbers.bits[{scale + 1}])"
        return f"{'(float)' if dtype == 'wide_t' else ''}x{index}[{at}]"

    def value(self, steps: Sequence[Sequence[int]], names: Sequence[str]) -> tuple[list[str], str]:
        """Return statements and the name of the expression's value at the place that indices name."""
        return statements(
            self.operation.expression, lambda index: self.leaf(index, list(zip(names, steps[index], strict=True)))
        )

    @property
    def written(self) -> str:
        """Return the scale and zero point of what is written, as they are passed on."""
        at = len(self.numbers)
        if self.output.is_codes:
            self.numbers += [bits(self.output.scale), self.output.zero_point]
            return f"numbers.real({at}), numbers.bits[{at + 1}]"
        return "1.0f, 0"

    def kernel(self, stem: str, body: Sequence[str], more: Mapping[str, Array], grid: int, threads: int) -> Kernel:
        """Return the kernel of a body; `more` are constants behind the leaves."""
        names = [f"const float *__restrict__ {name}" for name in more]
        parameters = [*self.parameters, *names, f"{TYPES[self.output.dtype]} *__restrict__ output"]
        parameters += [f"const Numbers<{len(self.numbers)}> numbers"] if self.numbers else []
        text = function(threads, parameters, [*self.begins, *body])
        arguments = (*self.arguments, *more.values(), self.output.name)
        return Kernel(stem, text, arguments, (grid, 1), threads, tuple(self.numbers))


def function(threads: int, parameters: Sequence[str], body: Sequence[str]) -> str:
    """Return a kernel that is called {name}."""
    # With a bound on blocks, if of 1, the assembler takes as many registers as it needs.
    head = f'extern "C" __global__ void __launch_bounds__({threads}, 1) {{name}}({", ".join(parameters)})'
    return f"{head}\n{{\n" + "".join(f"    {line}\n" for line in body) + "}\n"


def indices(extents: Sequence[int], rest: str) -> tuple[list[str], list[str]]:
    """Return statements that take a number apart into indices, and what these are called."""
    lines, names = [], []
    for axis in range(len(extents) - 1, -1, -1):
        names.append(f"i{axis}")
        inner = math.prod(extents[axis + 1 :])
        over = f"{rest} / {inner}" if inner > 1 else rest
        lines.append(f"const int i{axis} = {over}{f' % {extents[axis]}' if axis else ''};")
    return lines[::-1], names[::-1]


def _pointwise(operation: ops.Pointwise, tensors: Tensors) -> list[Kernel]:
    writing = Writing(operation, tensors)
    count = writing.output.size
    extents, steps = joined(writing.output.shape, writing.steps)
    places, names = indices(extents, "at")
    lines, value = writing.value(steps, names)
    body = [
        f"const int at = blockIdx.x * {THREADS} + threadIdx.x;", f"if (at >= {count}) {{", "    return;", "}", *places,
        *lines, f"put(output + (wide_t)blockIdx.z * {count} + at, {value}, {writing.written});",
    ]  # fmt: skip
    return [writing.kernel("pointwise", body, {}, -(-count // THREADS), THREADS)]


def _rows(operation: Any, tensors: Tensors, call: str, more: Mapping[str, Array]) -> list[Kernel]:
    """Return a kernel that calls a function of floats.cuh for each row; {} in its call are WIDTH and THREADS."""
    writing = Writing(operation, tensors)
    *outer, width = writing.output.shape
    count, threads = math.prod(outer), min(WIDEST, -(-width // NARROW) * 32) if width > NARROW else 32
    each = ROWS if threads == 32 else 1
    extents, steps = joined(outer, [each[:-1] for each in writing.steps])
    places, names = indices(extents, "row")
    along = [(*own, whole[-1]) for own, whole in zip(steps, writing.steps, strict=True)]
    lines, value = writing.value(along, [*names, "column"])
    place = f"output + ((wide_t)blockIdx.z * {count} + row) * {width}"
    body = [
        f"const int row = blockIdx.x * {each} + threadIdx.x / {threads};", f"if (row >= {count}) {{", "    return;",
        "}", *places, "const auto value = [&](int column) {", *(f"    {line}" for line in lines),
        f"    return {value};", "};", call.format(f"{width}, {threads}", place, writing.written),
    ]  # fmt: skip
    return [writing.kernel("rows", body, more, -(-count // each), threads * each)]


def _normalize(operation: ops.Normalize, tensors: Tensors) -> list[Kernel]:
    more = {"weight": np.asarray(operation.weight, np.float32), "bias": np.asarray(operation.bias, np.float32)}
    centred = "true" if operation.centred else "false"
    call = f"normalize<{{}}, {centred}>(value, weight, bias, {literal(operation.epsilon)}, {{}}, {{}});"
    return _rows(operation, tensors, call, more)


def _softmax(operation: ops.FloatSoftmax, tensors: Tensors) -> list[Kernel]:
    return _rows(operation, tensors, "softmax<{}>(value, {}, {});", {})


def _reduce(operation: ops.Reduce, tensors: Tensors) -> list[Kernel]:
    writing = Writing(operation, tensors)
    kept, gone = writing.output.shape, operation.extents
    count, terms = math.prod(kept), math.prod(gone)
    warp = terms >= TERMS and count <= RESULTS
    outer, over = (joined(part, [each[cut] for each in writing.steps])
                   for part, cut in ((kept, slice(len(kept))), (gone, slice(len(kept), None))))  # fmt: skip
    places, names = indices(outer[0], "at")
    inner, within = indices(over[0], "k")
    within = [f"k{name[1:]}" for name in within]
    inner = [line.replace("const int i", "const int k") for line in inner]
    steps = [(*first, *second) for first, second in zip(outer[1], over[1], strict=True)]
    lines, value = writing.value(steps, [*names, *within])
    start, combine = ("LEAST", "Most()") if operation.kind == "max" else ("0.0f", "Sum()")
    each, first = ("32", "threadIdx.x % 32") if warp else ("1", "0")
    threads = ROWS * 32 if warp else THREADS
    results = ROWS if warp else THREADS
    folded = [f"found = folded<32>(found, {combine});", "if (threadIdx.x % 32) {", "    return;", "}"] if warp else []
    body = [
        f"const int at = blockIdx.x * {results} + threadIdx.x / {each};", f"if (at >= {count}) {{", "    return;", "}",
        *places, f"float found = {start};", f"for (int k = {first}; k < {terms}; k += {each}) {{",
        *(f"    {line}" for line in (*inner, *lines)), f"    found = {combine}(found, {value});", "}", *folded,
        f"put(output + (wide_t)blockIdx.z * {count} + at, found * {literal(operation.factor)}, {writing.written});",
    ]  # fmt: skip
    return [writing.kernel("reduce", body, {}, -(-count // results), threads)]


def _gather(operation: ops.Gather, tensors: Tensors) -> list[Kernel]:
    source, target, table = tensors[operation.inputs[0]], tensors[operation.output], operation.table
    rows, width = table.shape
    count = target.size
    parameters = ["const wide_t *__restrict__ indices", f"const {TYPES[str(table.dtype)]} *__restrict__ table",
                  "const float *__restrict__ scale", "float *__restrict__ output"]  # fmt: skip
    body = [
        f"const int at = blockIdx.x * {THREADS} + threadIdx.x;", f"if (at >= {count}) {{", "    return;", "}",
        f"const wide_t index = indices[(wide_t)blockIdx.z * {source.size} + at / {width}];",
        f"const wide_t row = index < 0 ? 0 : index > {rows - 1} ? {rows - 1} : index;",
        f"const float value = (float)table[row * {width} + at % {width}];",
        f"output[(wide_t)blockIdx.z * {count} + at] = value * scale[at % {width}];",
    ]  # fmt: skip
    scale = np.ascontiguousarray(operation.scale, np.float32)
    arguments = (source.name, np.ascontiguousarray(table), scale, target.name)
    return [Kernel("gather", function(THREADS, parameters, body), arguments, (-(-count // THREADS), 1), THREADS)]


def moved(
    source: Tensor, target: Tensor, extents: Sequence[int], read: tuple[int, Sequence[int]],
    write: tuple[int, Sequence[int]],
) -> Kernel:  # fmt: skip
    """Return what copies elements along axes: of what is read and written, the first place and steps."""
    count = math.prod(extents)
    kept, (steps, into) = joined(extents, [read[1], write[1]])
    places, names = indices(kept, "at")
    here, there = (
        " + ".join([str(start), *(f"{name} * {step}" for name, step in zip(names, each, strict=True) if step)])
        for start, each in ((read[0], steps), (write[0], into))
    )
    kind = TYPES[source.dtype]
    body = [
        f"const int at = blockIdx.x * {THREADS} + threadIdx.x;", f"if (at >= {count}) {{", "    return;", "}", *places,
        f"output[(wide_t)blockIdx.z * {target.size} + {there}] = input[(wide_t)blockIdx.z * {source.size} + {here}];",
    ]  # fmt: skip
    text = function(THREADS, [f"const {kind} *__restrict__ input", f"{kind} *__restrict__ output"], body)
    return Kernel("move", text, (source.name, target.name), (-(-count // THREADS), 1), THREADS)


def _transpose(operation: moves.Transpose, tensors: Tensors) -> list[Kernel]:
    source, target = tensors[operation.inputs[0]], tensors[operation.output]
    steps = [row_major(source.shape)[axis] for axis in operation.axes]
    return [moved(source, target, target.shape, (0, steps), (0, row_major(target.shape)))]


def _slice(operation: moves.Slice, tensors: Tensors) -> list[Kernel]:
    source, target = tensors[operation.inputs[0]], tensors[operation.output]
    own = row_major(source.shape)
    start = sum(first * step for first, step in zip(operation.starts, own, strict=True))
    steps = [step * each for step, each in zip(own, operation.steps, strict=True)]
    return [moved(source, target, target.shape, (start, steps), (0, row_major(target.shape)))]


def _concat(operation: moves.Concat, tensors: Tensors) -> list[Kernel]:
    target, found, offset = tensors[operation.output], [], 0
    into = row_major(target.shape)
    for name in operation.inputs:
        source = tensors[name]
        place = (offset * into[operation.axis], into)
        found.append(moved(source, target, source.shape, (0, row_major(source.shape)), place))
        offset += source.shape[operation.axis]
    return found


GENERATORS: Mapping[type[Operation], Callable[[Any, Tensors], list[Kernel]]] = {
    ops.FloatSoftmax: _softmax,
    ops.Gather: _gather,
    ops.Normalize: _normalize,
    ops.Pointwise: _pointwise,
    ops.Reduce: _reduce,
}
#: What only moves elements, where these are no codes.
MOVES: Mapping[type[Operation], Callable[[Any, Tensors], list[Kernel]]] = {
    moves.Concat: _concat,
    moves.Slice: _slice,
    moves.Transpose: _transpose,
}
