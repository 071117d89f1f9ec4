"""A network as its library has it: kernels, the calls of them, what each reads and writes, and constants."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from qcompile.backends.cpu.layout import ALIGNMENT, Layout, extents, strides
from qcompile.backends.integer.program import Port, Tensor
from qcompile.backends.tvm.emit import Function
from qcompile.backends.tvm.schedules import codes, linear
from qcompile.backends.tvm.schedules.vectors import Processor
from qcompile.backends.tvm.schedules.x86_float_kernels import move_kernel

Array = npt.NDArray[Any]
#: Where an argument points to: the workspace, the constants, or an input or output by its name; and at which byte.
Argument = tuple[str, int]


@dataclass(frozen=True)
class Call:
    """One kernel, called.

    Parameters
    ----------
    kernel : str
    arguments : tuple of Argument
    operation : str
        Name of what it computes.
    shared : int
        Iterations that threads share; without them one thread does it all.
    apart : bool
        Whether the call behind it may run at the same time.
    """

    kernel: str
    arguments: tuple[Argument, ...]
    operation: str
    shared: int = 0
    apart: bool = False


@dataclass
class Network:
    """Kernels, constants and calls of a program.

    Parameters
    ----------
    layout : Layout
    processor : Processor
    kernels : dict of str to Function
        Those that compute alike are one.
    calls : list of Call
    constants : bytearray
    tiles : dict of str to Tile
        By kernel.
    length : int
        Which of several lengths it is at; 0 where there is one.
    siblings : tuple of Network
        The same at shorter lengths: kernels, constants and tiles are shared.
    forms : dict
        By layer, how the length that came first stores its weights.
    """

    layout: Layout
    processor: Processor
    kernels: dict[str, Function] = field(default_factory=dict)
    calls: list[Call] = field(default_factory=list)
    constants: bytearray = field(default_factory=bytearray)
    tiles: dict[str, linear.Tile] = field(default_factory=dict)
    length: int = 0
    siblings: tuple[Network, ...] = ()
    forms: dict[tuple[Any, ...], tuple[Any, ...]] = field(default_factory=dict)
    _names: dict[tuple[Any, ...], str] = field(default_factory=dict)
    _stored: dict[bytes, list[int]] = field(default_factory=dict)

    def another(self, layout: Layout, length: int) -> Network:
        """Return a network at another length, with no calls yet."""
        return replace(self, layout=layout, calls=[], length=length)

    @property
    def all(self) -> tuple[Network, ...]:
        """The network at each of its lengths, which rise."""
        return (*self.siblings, self)

    @property
    def suffix(self) -> str:
        """What names of its functions end with."""
        return f"_{self.length}" if self.length else ""

    @property
    def workspace(self) -> int:
        """Bytes that any of its lengths works in."""
        return max(each.layout.workspace for each in self.all)

    def ports(self, floats: bool) -> tuple[list[Call], list[Call]]:
        """Return the calls that take inputs in, and those that give outputs out."""
        program = self.layout.program
        given = ((program.inputs, True), (program.outputs, False))
        taken, made = ([self.port(port, into, not floats) for port in ports] for ports, into in given)
        return taken, made

    def tensor(self, name: str) -> Tensor:
        """Return a tensor by name."""
        return self.layout.program.tensors[name]

    def surround(self, name: str, operation: str, apart: bool = True) -> None:
        """Fill the margin around a tensor that is about to be written: `apart` from that, or before it."""
        if name not in self.layout.margins:
            return
        margin, place, (rows, columns, channels) = (
            self.layout.margins[name],
            self.layout.places[name],
            extents(self.tensor(name)),
        )
        base = self.layout.offsets[place.base]
        top, bottom = (count * place.row for count in (margin.before[0], margin.after[0]))
        left, right = (count * channels for count in (margin.before[1], margin.after[1]))
        inner = base + top
        # The right margin of a row and the left one of the next are neighbours.
        for start, count, width in (
            (base, 1, top + left), (inner + left + columns * channels, rows - 1, right + left),
            (inner + rows * place.row - right, 1, right + bottom),
        ):  # fmt: skip
            if count and width:
                arguments = (count, width, place.row, margin.code + self.processor.offset, self.processor)
                made = self.call(codes.fill_kernel, arguments, [("workspace", start)], operation)
                self.calls.append(replace(made, apart=apart))

    def port(self, port: Port, into: bool, codes_: bool) -> Call:
        """Return the call that takes an input in, or gives an output out: as the program's codes, or as floats."""
        tensor = self.tensor(port.tensor)
        here, there = self.at(port.tensor), (port.name, 0)
        given = [there, here] if into else [here, there]
        if not tensor.is_codes:
            shape = tuple(port.shape[axis] for axis in port.axes)
            model = tuple(row_major(port.shape)[axis] for axis in port.axes)
            axes = collapsed(shape, *((model, row_major(shape)) if into else (row_major(shape), model)))
            return self.call(move_kernel, (*axes, tensor.dtype), given, port.name)
        if codes_:
            rows, columns, channels = extents(tensor)
            width, step = columns * channels, self.layout.places[port.tensor].row
            rows, width = (1, rows * width) if step == width else (rows, width)
            steps = (width, step) if into else (step, width)
            return self.call(codes.copy_kernel, (rows, width, steps, self.processor.offset), given, port.name)
        shape = tuple(port.shape[axis] for axis in port.axes)
        stored = strides(self.layout, tensor) if shape == tensor.shape else row_major(shape)
        model = tuple(row_major(port.shape)[axis] for axis in port.axes)
        axes = collapsed(shape, *((model, stored) if into else (stored, model)))
        numbers = (float(np.float32(tensor.scale)), tensor.zero_point + self.processor.offset, self.processor)
        return self.call(
            codes.quantize_kernel if into else codes.dequantize_kernel, (*axes, *numbers), given, port.name
        )

    def constant(self, array: Array, behind: int = 0) -> Argument:
        """Place an array among the constants, unless it is there already, if only as the beginning of a longer one.

        Parameters
        ----------
        array : ndarray
        behind : int
            Bytes behind it that may be read, too.
        """
        content = np.ascontiguousarray(array).tobytes()
        known = self._stored.setdefault(content[:ALIGNMENT], [])
        for at in known:
            if self.constants.startswith(content, at) and at + len(content) + behind <= len(self.constants):
                return "constants", at
        self.constants.extend(bytes(-len(self.constants) % ALIGNMENT))
        known.append(len(self.constants))
        self.constants.extend(content + bytes(behind))
        return "constants", known[-1]

    def at(self, name: str, offset: int = 0) -> Argument:
        """Return where a tensor is."""
        return "workspace", self.layout.at(name) + offset

    def add(
        self,
        generate: Callable[..., Function],
        arguments: tuple[Any, ...],
        given: Sequence[Argument],
        operation: str,
        shared: int = 0,
    ) -> str:
        """Add a call and return the kernel's name; see `call`. Threads share so many of its iterations."""
        self.calls.append(replace(self.call(generate, arguments, given, operation), shared=shared))
        return self.calls[-1].kernel

    def call(
        self, generate: Callable[..., Function], arguments: tuple[Any, ...], given: Sequence[Argument], operation: str
    ) -> Call:
        """Return a call of the kernel that `generate` returns for a name and these arguments."""
        key = (generate.__name__, *map(repr, arguments))
        if key not in self._names:
            name = f"{generate.__name__.removesuffix('_kernel')}_{len(self._names)}"
            self._names[key] = name
            self.kernels[name] = generate(name, *arguments)
        return Call(self._names[key], tuple(given), operation)


def row_major(shape: Sequence[int]) -> tuple[int, ...]:
    """Return how many elements are from one to the next along each axis."""
    return tuple(int(np.prod(shape[axis + 1 :], dtype=np.int64)) for axis in range(len(shape)))


def collapsed(shape: Sequence[int], source: Sequence[int], target: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """Return extents and steps with axes joined that both go through as one."""
    axes = [(n, a, b) for n, a, b in zip(shape, source, target, strict=True) if n > 1] or [(1, 0, 0)]
    found = axes[:1]
    for extent, a, b in axes[1:]:
        outer, step, other = found[-1]
        if (step, other) == (extent * a, extent * b):
            found[-1] = (outer * extent, a, b)
        else:
            found.append((extent, a, b))
    return tuple(zip(*found, strict=True))
