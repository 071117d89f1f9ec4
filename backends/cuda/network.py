"""A program as kernels, constants and launches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from importlib.resources import files
from typing import Any

import numpy as np
import numpy.typing as npt

from qcompile.backends.cuda import arena, blocks, floats, products
from qcompile.backends.cuda.expressions import polynomials
from qcompile.backends.cuda.linear import LinearKernel, linear_kernel
from qcompile.backends.integer import operations as ops
from qcompile.backends.integer.float_operations import FloatDense
from qcompile.backends.integer.program import PLAIN, Operation, Port, Program, Strips
from qcompile.backends.tvm.schedules import cuda_maps
from qcompile.backends.tvm.schedules.cuda_maps import MapKernel
from qcompile.core.errors import TargetError

Array = npt.NDArray[Any]
#: Where an argument points to, and at which byte: the arena (counted for one sample), the constants; or which port.
Argument = tuple[str, int]
#: Constants begin at multiples of this.
ALIGNMENT = 256
#: From so many samples on tiles are chosen as if there were that many.
MANY = 8
#: Threads of a block of `join`.
JOINING = 256
#: In the order in which they build on one another.
SOURCES = ("arithmetic.cuh", "instructions.cuh", "linear.cuh", "gemv.cuh", "depthwise.cuh", "moves.cuh", "floats.cuh",
           "products.cuh", "w4a16.cuh")  # fmt: skip
LAYER = "const int8_t *input, const int8_t *weights, const int *table, int8_t *output, const Linear shape"
#: Kernels of these are written for their shapes, by the operation; those of the first read and write floats too.
WRITTEN = {**floats.GENERATORS, **products.GENERATORS, **blocks.GENERATORS}


@dataclass(frozen=True)
class Launch:
    """One kernel, launched.

    Parameters
    ----------
    operation : str
        Name of what it computes.
    kernel : str
    grid : tuple of int
        Blocks along x and y; along z there is one for each sample.
    threads : int
        Of a block.
    arguments : tuple of Argument
        The kernel's pointers.
    numbers : tuple of int
        The fields of the struct of int32 that follows them, if any.
    many : Launch, optional
        What takes its place from `MANY` samples on: the same in larger tiles.
    shared : int
        Bytes of shared memory beyond what the kernel declares; where a device has less, as much as it has.
    """

    operation: str
    kernel: str
    grid: tuple[int, int]
    threads: int
    arguments: tuple[Argument, ...]
    numbers: tuple[int, ...] = ()
    many: Launch | None = None
    shared: int = 0

    def as_json(self) -> dict[str, Any]:
        """Return it JSON-ready."""
        content = {
            "operation": self.operation, "kernel": self.kernel, "grid": list(self.grid), "threads": self.threads,
            "arguments": [list(argument) for argument in self.arguments], "numbers": list(self.numbers),
        }  # fmt: skip
        content |= {"shared": self.shared} if self.shared else {}
        return content if self.many is None else content | {"many": self.many.as_json()}


@dataclass
class Network:
    """Kernels, constants and launches of a program.

    Parameters
    ----------
    program : Program
    offsets : mapping of str to int
        Of each tensor in the arena.
    arena_bytes : int
        For one sample.
    """

    program: Program
    offsets: Mapping[str, int]
    arena_bytes: int
    launches: list[Launch] = field(default_factory=list)
    taking: list[Launch] = field(default_factory=list)
    giving: list[Launch] = field(default_factory=list)
    constants: bytearray = field(default_factory=bytearray)
    sources: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.tensor_bytes = self.arena_bytes

    def source(self) -> str:
        """Return the CUDA C++ of all kernels."""
        return prelude() + "\n".join(self.sources.values())

    def at(self, tensor: str) -> Argument:
        """Return where a tensor is."""
        return "arena", self.offsets[tensor]

    def constant(self, array: Array) -> Argument:
        """Place an array among the constants."""
        self.constants.extend(bytes(-len(self.constants) % ALIGNMENT))
        at = len(self.constants)
        self.constants.extend(np.ascontiguousarray(array).tobytes())
        return "constants", at

    def kernel(self, stem: str, text: str) -> str:
        """Return the name of a kernel, whose text calls it {name}; equal ones are one."""
        for name, known in self.sources.items():
            if known == text.replace("{name}", name):
                return name
        name = f"{stem}_{len(self.sources)}"
        self.sources[name] = text.replace("{name}", name)
        return name

    def add(self, operation: Operation) -> None:
        """Add an operation's launches.

        Raises
        ------
        TargetError
            If it has no kernel.
        """
        if isinstance(operation, ops.View):
            return
        _require(self.program, operation)
        tensors = self.program.tensors
        written = self._generator(operation)
        if isinstance(operation, ops.Conv | ops.Dense | FloatDense):
            self.launches.append(self._layer(operation))
        elif written is not None:
            self.launches.extend(self._written(made, operation.name) for made in written(operation, tensors))
        elif isinstance(operation, ops.Concat):
            self.launches.extend(self._joined(operation))
        else:
            made = cuda_maps.map_kernel(operation, tensors)
            places = dict(zip(("input", "other"), map(self.at, operation.inputs), strict=False))
            self.launches.append(self._mapped(made, operation.name, places | {"output": self.at(operation.output)}))

    def _generator(self, operation: Operation) -> Callable[[Any, floats.Tensors], list[floats.Kernel]] | None:
        if not self.program.tensors[operation.output].is_codes and type(operation) in floats.MOVES:
            return floats.MOVES[type(operation)]
        return WRITTEN.get(type(operation))

    def _written(self, made: floats.Kernel, operation: str) -> Launch:
        def place(argument: str | Array | floats.Scratch) -> Argument:
            if isinstance(argument, floats.Scratch):
                begin = self.tensor_bytes + -(-argument.at // ALIGNMENT) * ALIGNMENT
                self.arena_bytes = max(self.arena_bytes, begin + -(-argument.nbytes // ALIGNMENT) * ALIGNMENT)
                return "arena", begin
            return self.at(argument) if isinstance(argument, str) else self.constant(argument)

        arguments = tuple(map(place, made.arguments))
        return Launch(operation, self.kernel(made.stem, made.text), made.grid, made.threads, arguments, made.numbers)

    def _layer(self, operation: ops.Conv | ops.Dense | FloatDense) -> Launch:
        tensors = self.program.tensors
        few, many = (linear_kernel(operation, tensors[operation.inputs[0]], tensors[operation.output], samples)
                     for samples in (1, MANY))  # fmt: skip
        places = (self.at(operation.inputs[0]), self.constant(few.weights), self.constant(few.table),
                  self.at(operation.output))  # fmt: skip
        first, second = (
            Launch(operation.name, self.kernel(made.stem, layer_source(made)), made.grid, made.threads, places,
                   made.shape.numbers, shared=made.launched)
            for made in (few, many)
        )  # fmt: skip
        return replace(first, many=None if second == first else second)

    def _joined(self, operation: ops.Concat) -> list[Launch]:
        tensors, axis = self.program.tensors, operation.axis
        target, found, offset = tensors[operation.output], [], 0
        taken = "const int8_t *input, int8_t *output, const Move shape"
        head = f'extern "C" __global__ void __launch_bounds__({JOINING}) {{name}}({taken})'
        kernel = self.kernel("join", f"{head}\n{{\n    join<{JOINING}>(input, output, shape);\n}}\n")
        outer = int(np.prod(target.shape[:axis], dtype=np.int64))
        for name in operation.inputs:
            inner = tensors[name].size // outer
            grid = -(-outer * inner // JOINING), 1
            numbers = outer, inner, target.size // outer, offset
            places = self.at(name), self.at(operation.output)
            found.append(Launch(operation.name, kernel, grid, JOINING, places, numbers))
            offset += inner
        return found

    def _mapped(self, made: MapKernel, operation: str, places: Mapping[str, Argument]) -> Launch:
        stem = operation_stem(made)
        kernel = self.kernel(stem, made.source("{name}"))
        known = {name: self.constant(array) for name, array in made.constants.items()} | dict(places)
        return Launch(operation, kernel, made.grid, made.threads, tuple(known[name] for name in made.arguments))

    def port(self, port: Port, index: int, into: bool) -> Launch:
        """Return what makes codes of an input's floats, or an output's floats of codes."""
        tensor, floats = self.program.tensors[port.tensor], ("input" if into else "output", index)
        made = cuda_maps.take_kernel(port, tensor) if into else cuda_maps.give_kernel(port, tensor)
        codes = self.at(port.tensor)
        places = {"input": floats, "output": codes} if into else {"input": codes, "output": floats}
        return self._mapped(made, port.name, places)


def network_of(program: Program) -> Network:
    """Return a program's kernels, constants and launches.

    Raises
    ------
    TargetError
        If an operation has no kernel.
    """
    network = Network(program, *arena.place(program))
    for operation in program.operations:
        network.add(operation)
    network.taking, network.giving = (
        [network.port(port, index, into) for index, port in enumerate(ports) if program.tensors[port.tensor].is_codes]
        for ports, into in ((program.inputs, True), (program.outputs, False))
    )
    return network


def layer_source(made: LinearKernel) -> str:
    """Return the CUDA C++ of a layer's kernel, which it calls {name}."""
    head = f'extern "C" __global__ void __launch_bounds__({made.threads}, {made.resident}) {{name}}({LAYER})'
    text = f"{head}\n{{\n    {made.body}(input, weights, table, output, shape);\n}}\n"
    return text.replace("int8_t *output", "float *output") if made.floats else text


def prelude(replaced: str = "") -> str:
    """Return what all kernels build on, but for one file."""
    return "\n".join([polynomials(), *(template(name) for name in SOURCES if name != replaced)])


def template(name: str) -> str:
    """Return a file of backends/cuda/kernels."""
    return (files("qcompile.backends.cuda") / "kernels" / name).read_text(encoding="utf-8")


def operation_stem(made: MapKernel) -> str:
    """Return what a kernel without weights is called by."""
    return "map" if "table" not in made.arguments else "table"


def _require(program: Program, operation: Operation) -> None:
    """Refuse what only other backends have, and codes of other than eight bits."""
    kind, dtypes = type(operation), {program.tensors[name].dtype for name in (*operation.inputs, operation.output)}
    takes_floats = kind in WRITTEN or kind in floats.MOVES or kind is FloatDense
    on_codes = isinstance(operation, (ops.Conv, ops.Dense, ops.Concat, *cuda_maps.GENERATORS))
    if not (takes_floats or on_codes) or isinstance(operation, Strips):
        fact = f"{kind.__name__} has no kernel for CUDA devices"
        raise TargetError(operation.name, fact, "choose --target cuda, or keep it out of the model")
    for dtype in sorted(dtypes - {"int8", *(PLAIN if takes_floats else ())}):
        fact = f"reads or writes {dtype}, and its kernel for CUDA devices has codes of 8 bits"
        raise TargetError(operation.name, fact, "leave --activations out, or choose --target cuda")
