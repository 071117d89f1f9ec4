"""Random small integer programs: every operation, odd sizes, tails, strides, dilations, uneven padding."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from qcompile.backends.integer import interpret
from qcompile.backends.integer import operations as ops
from qcompile.backends.integer.program import Operation, Port, Program, Tensor
from qcompile.backends.integer.storage import packs
from qcompile.core import numerics

Random = np.random.Generator


class Growing:
    """A program that grows operation by operation."""

    def __init__(self, random: Random, shape: tuple[int, ...], dtype: str | None = None, wide: bool = True) -> None:
        self.random = random
        self.wide = wide
        self.tensors: dict[str, Tensor] = {}
        self.operations: list[Operation] = []
        self.last = self.tensor(shape, dtype or self.some_type())

    def tensor(self, shape: tuple[int, ...], dtype: str = "int8") -> Tensor:
        name = f"t{len(self.tensors)}"
        self.tensors[name] = Tensor(name, tuple(map(int, shape)), dtype, 0.05, int(self.random.integers(-40, 41)))
        return self.tensors[name]

    def add(
        self,
        kind: type[Operation],
        shape: tuple[int, ...],
        inputs: tuple[Tensor, ...],
        dtype: str = "int8",
        **fields: Any,
    ) -> None:
        target = self.tensor(shape, dtype)
        names = tuple(tensor.name for tensor in inputs)
        self.operations.append(kind(f"op{len(self.operations)}", names, target.name, **fields))
        self.last = target

    def some_type(self) -> str:
        """Return a type of codes."""
        return "int16" if self.wide and self.random.random() < 0.3 else "int8"

    def requantize(self, channels: int, spread: float, dtype: str = "int8") -> ops.Requantize:
        """Return one with ratios that use the codes when accumulators are about `spread`; some are above a quarter."""
        most = 60.0 if dtype == "int8" else 15000.0
        ratio = most / spread * np.exp2(self.random.uniform(-2.0, 2.0, channels))
        multiplier, shift = numerics.fixed_point(ratio)
        lowest, highest = numerics.code_range(dtype)
        bounds = self.random.integers(lowest, highest + 1, 2) if self.random.random() < 0.3 else (lowest, highest)
        return ops.Requantize(multiplier, shift, int(self.random.integers(-40, 41)), int(min(bounds)), int(max(bounds)))

    def weights(self, *shape: int, bits: int | None = None, dtype: str = "int8") -> dict[str, Any]:
        """Return the constants of a linear operation that reads `last` and writes codes of a type."""
        bias = self.random.integers(-3000, 3000, shape[0]).astype(np.int32)
        bits = bits or (4 if self.random.random() < 0.4 else 8)
        wide = self.last.dtype == "int16"
        most = min(127, 60000 // int(np.prod(shape[1:]))) if wide else 127
        low, high = (-8, 7) if bits == 4 else (-most, most)
        codes = self.random.integers(low, high + 1, shape).astype(np.int8)
        spread = 40.0 * high * np.sqrt(np.prod(shape[1:])) * (250.0 if wide else 1.0)
        return {"weights": codes, "bias": bias, "bits": bits, "requantize": self.requantize(shape[0], spread, dtype)}

    def narrow(self) -> Tensor:
        """Return `last` as codes of 8 bits."""
        if self.last.dtype != "int8":
            fields = {"zero_point": self.last.zero_point, "requantize": self.requantize(1, 15000.0)}
            self.add(ops.Rescale, self.last.shape, (self.last,), **fields)
        return self.last

    def window(self, rows: int, columns: int, padded: bool = True) -> tuple[ops.Window, int, int]:
        """Return a window that fits a map, and the rows and columns of its result."""
        pads = (
            tuple(int(n) for n in self.random.integers(0, 3, 4)) if padded and self.random.random() < 0.7 else (0,) * 4
        )
        dilations = (2, 1) if self.random.random() < 0.2 else (1, 1)
        strides = tuple(int(n) for n in self.random.integers(1, 4, 2)) if self.random.random() < 0.4 else (1, 1)
        size, result = [], []
        for axis, length in enumerate((rows, columns)):
            room = length + pads[axis] + pads[axis + 2]
            most = min(4, (room - 1) // dilations[axis] + 1)
            size.append(int(self.random.integers(1, most + 1)))
            result.append((room - (size[-1] - 1) * dilations[axis] - 1) // strides[axis] + 1)
        outside = int(self.random.integers(-128, 128))
        return ops.Window((size[0], size[1]), strides, pads, dilations, outside), result[0], result[1]

    def program(self) -> Program:
        first, last = next(iter(self.tensors.values())), self.last
        ports = [Port(name, tensor.name, tensor.shape, tuple(range(len(tensor.shape))))
                 for name, tensor in (("x", first), ("y", last))]  # fmt: skip
        return Program("random net", self.tensors, tuple(self.operations), (ports[0],), (ports[1],))


def conv(grown: Growing) -> None:
    _, rows, columns, channels = grown.last.shape
    window, height, width = grown.window(rows, columns)
    way = grown.random.random()
    groups = channels if way < 0.35 else 2 if way < 0.5 and channels % 2 == 0 else 1
    multiple = int(grown.random.integers(1, 3))
    outputs = channels * multiple if groups == channels else groups * int(grown.random.integers(1, 8))
    dtype = grown.some_type()
    fields = grown.weights(outputs, *window.size, channels // groups, dtype=dtype)
    grown.add(ops.Conv, (1, height, width, outputs), (grown.last,), dtype, **fields, window=window, groups=groups)


def pointwise(grown: Growing) -> None:
    _, rows, columns, channels = grown.last.shape
    outputs = int(grown.random.integers(1, 10))
    dtype = grown.some_type()
    fields = grown.weights(outputs, 1, 1, channels, dtype=dtype)
    grown.add(ops.Conv, (1, rows, columns, outputs), (grown.last,), dtype, **fields, window=ops.Window((1, 1)))


def dense(grown: Growing) -> None:
    outputs = int(grown.random.integers(1, 10))
    dtype = grown.some_type()
    fields = grown.weights(outputs, grown.last.shape[-1], dtype=dtype)
    grown.add(ops.Dense, (*grown.last.shape[:-1], outputs), (grown.last,), dtype, **fields)


def flattened(grown: Growing) -> None:
    grown.add(ops.View, (1, grown.last.size), (grown.last,), grown.last.dtype)
    dense(grown)
    grown.add(ops.View, (1, 1, 1, grown.last.size), (grown.last,), grown.last.dtype)


def skip(grown: Growing) -> None:
    before = grown.narrow()
    looked_up(grown)
    # Sums of 16-bit codes have as many bits less in their multipliers.
    largest = {"int8": 20, "int16": 12}
    multipliers = tuple(
        int(grown.random.integers(-(2 ** largest[one.dtype]), 2 ** largest[one.dtype])) for one in (before, grown.last)
    )
    bias, dtype = int(grown.random.integers(-(2**27), 2**27)), grown.some_type()
    low, high = numerics.code_range(dtype)
    fields = {"shift": 21 if dtype == "int8" else 14, "low": int(grown.random.integers(low, 0)), "high": high}
    operands = (before, grown.last)
    grown.add(ops.Add, before.shape, operands, dtype, multipliers=multipliers, bias=bias, **fields)


def looked_up(grown: Growing) -> None:
    before, dtype = grown.narrow(), grown.some_type()
    low, high = numerics.code_range(dtype)
    grown.add(ops.Lookup, before.shape, (before,), dtype, table=grown.random.integers(low, high + 1, 256).astype(dtype))


def rescaled(grown: Growing) -> None:
    dtype = grown.some_type()
    spread = 60.0 if grown.last.dtype == "int8" else 15000.0
    fields = {"zero_point": grown.last.zero_point, "requantize": grown.requantize(1, spread, dtype)}
    grown.add(ops.Rescale, grown.last.shape, (grown.last,), dtype, **fields)


def gate(grown: Growing) -> None:
    before = grown.narrow()
    _, rows, columns, channels = before.shape
    window = ops.Window((rows, columns))
    fields = {"window": window, "bias": 7, "requantize": grown.requantize(1, 60 * rows * columns)}
    grown.add(ops.AveragePool, (1, 1, 1, channels), (before,), **fields)
    zeros = tuple(int(n) for n in grown.random.integers(-128, 128, 2))
    grown.add(
        ops.Mul, before.shape, (before, grown.last), zero_points=zeros, requantize=grown.requantize(1, 8000)
    )  # fmt: skip


def pool(grown: Growing) -> None:
    _, rows, columns, channels = grown.last.shape
    window, height, width = grown.window(rows, columns, padded=False)
    if grown.random.random() < 0.5:
        fields = {"low": -100, "high": 100} if grown.last.dtype == "int8" else {"low": -20000, "high": 30000}
        grown.add(ops.MaxPool, (1, height, width, channels), (grown.last,), grown.last.dtype, window=window, **fields)
    else:
        dtype, each = grown.some_type(), 60 if grown.last.dtype == "int8" else 15000
        fields = {"bias": -3, "requantize": grown.requantize(1, each * window.size[0] * window.size[1], dtype)}
        grown.add(ops.AveragePool, (1, height, width, channels), (grown.last,), dtype, window=window, **fields)


def joined(grown: Growing) -> None:
    before = grown.narrow()
    looked_up(grown)
    if grown.last.dtype != "int8":
        grown.add(ops.Lookup, before.shape, (before,), "int16", table=np.arange(-128, 128, dtype=np.int16) * 200)
        before = next(grown.tensors[part.output] for part in reversed(grown.operations[:-1]))
    axis = int(grown.random.integers(1, 4))
    shape = tuple(n * 2 if place == axis else n for place, n in enumerate(before.shape))
    grown.add(ops.Concat, shape, (before, grown.last), grown.last.dtype, axis=axis)


def padded(grown: Growing) -> None:
    before, after = ((0, *(int(n) for n in grown.random.integers(0, 3, 3))) for _ in range(2))
    shape = tuple(int(sum(parts)) for parts in zip(grown.last.shape, before, after, strict=True))
    grown.add(ops.Pad, shape, (grown.last,), grown.last.dtype, before=before, after=after, code=-9)


def sliced(grown: Growing) -> None:
    starts = tuple(int(grown.random.integers(0, n)) for n in grown.last.shape)
    shape = tuple(int(-(-(n - start) // 2)) for n, start in zip(grown.last.shape, starts, strict=True))
    grown.add(ops.Slice, shape, (grown.last,), grown.last.dtype, starts=starts, steps=(2, 2, 2, 2))


def resized(grown: Growing) -> None:
    _, rows, columns, channels = grown.last.shape
    picked = [tuple((np.arange(2 * n) // 2).tolist()) for n in (rows, columns)]
    shape = (1, 2 * rows, 2 * columns, channels)
    grown.add(ops.Resize, shape, (grown.last,), grown.last.dtype, rows=picked[0], columns=picked[1])


def transposed(grown: Growing) -> None:
    axes = (0, *(1 + int(n) for n in grown.random.permutation(3)))
    shape = tuple(grown.last.shape[axis] for axis in axes)
    grown.add(ops.Transpose, shape, (grown.last,), grown.last.dtype, axes=axes)


def softmax(grown: Growing) -> None:
    grown.narrow()
    table = np.rint(2.0**15 * np.exp(-0.05 * np.arange(256))).astype(np.uint32)
    dtype = grown.some_type()
    low, high = numerics.code_range(dtype)
    shift, factor = (4, 256 << 4) if dtype == "int8" else (0, 65536)
    grown.add(ops.Softmax, grown.last.shape, (grown.last,), dtype, table=table, factor=factor, shift=shift,
              zero_point=low, low=low, high=high)  # fmt: skip


GROWTHS = (conv, conv, conv, pointwise, pointwise, dense, flattened, skip, gate, pool, joined, padded, sliced, resized,
           rescaled, transposed, softmax)  # fmt: skip
#: A map that is larger says nothing more.
LARGEST = 3000


def random_program(seed: int, wide: bool = True) -> Program:
    """Return a program of one to five random steps; of codes of 16 bits beside those of 8, or of 8 alone."""
    random = np.random.default_rng(seed)
    grown = Growing(random, (1, *(int(n) for n in random.integers(1, 9, 3))), wide=wide)
    for _ in range(int(random.integers(1, 6))):
        growth = GROWTHS[int(random.integers(len(GROWTHS)))]
        growth = looked_up if growth is rescaled and not wide else growth  # what a table does for codes of 8 bits
        if grown.last.size <= LARGEST and (growth is not softmax or grown.last.shape[-1] <= 16):
            growth(grown)
    if not grown.operations:
        conv(grown)
    return grown.program()


def plus(grown: Growing) -> None:
    """Add a map to what a pointwise convolution makes of it: both may have any bits."""
    before = grown.last
    fields = grown.weights(before.shape[-1], 1, 1, before.shape[-1])
    grown.add(ops.Conv, before.shape, (before,), **fields, window=ops.Window((1, 1)))
    # Codes of 16 bits leave less room in 32.
    most = [2**20 if tensor.dtype == "int8" else 2**12 for tensor in (before, grown.last)]
    multipliers = tuple(int(grown.random.integers(-largest, largest)) for largest in most)
    bias = int(grown.random.integers(-(2**24), 2**24))
    grown.add(
        ops.Add, before.shape, (before, grown.last), multipliers=multipliers, bias=bias, shift=21, low=-128, high=127
    )


def random_maps(seed: int) -> Growing:
    """Return a program that grew by random steps which all take maps of four bits."""
    random = np.random.default_rng(seed)
    rows, columns, channels = (int(n) for n in random.integers(1, 9, 3))
    grown = Growing(random, (1, rows, columns, channels + channels % 2))
    for _ in range(int(random.integers(1, 5))):
        growth = (conv, conv, pointwise, plus, pool)[int(random.integers(5))]
        if grown.last.size <= LARGEST:
            growth(grown)
    pointwise(grown)
    return grown


def random_narrow_program(seed: int) -> Program:
    """Return a program of random steps in which maps of four bits and of eight stand beside one another."""
    grown = random_maps(seed)
    random = grown.random
    bytewise = [tensor for tensor in grown.tensors.values() if tensor.dtype == "int8" and tensor is not grown.last]
    narrow = {tensor.name for tensor in bytewise if packs(tensor) and random.random() < 0.6}
    program = grown.program()
    tensors = {name: replace(tensor, dtype="int4", zero_point=tensor.zero_point // 8) if name in narrow else tensor
               for name, tensor in program.tensors.items()}  # fmt: skip
    operations = tuple(in_halves(part) if part.output in narrow else part for part in program.operations)
    return replace(program, tensors=tensors, operations=operations)


def in_halves(operation: Any) -> Any:
    """Return an operation whose results are codes of four bits, 16 times as far apart."""
    bounds = {key: min(max(getattr(operation, key) // 16, -8), 7) for key in ("low", "high") if hasattr(operation, key)}
    if isinstance(operation, ops.Add):
        return replace(operation, multipliers=tuple(m // 16 for m in operation.multipliers), **bounds)
    if isinstance(operation, ops.MaxPool):
        return replace(operation, **bounds)
    known = operation.requantize
    requantize = replace(known, shift=known.shift + 4, zero_point=known.zero_point // 16, low=max(known.low // 16, -8),
                         high=min(known.high // 16, 7))  # fmt: skip
    return replace(operation, requantize=requantize)


def random_codes(program: Program, seed: int) -> dict[str, Any]:
    return interpret.random_codes(program, np.random.default_rng(seed))


def wide(
    random: Random,
    channels: int,
    outputs: int,
    size: int,
    stride: int = 1,
    groups: int = 1,
    side: tuple[int, int] = (9, 11),
) -> Program:
    """Return one convolution of more channels than a register has lanes, so that tiles and what they leave are met."""
    grown = Growing(random, (1, *side, channels), wide=False)
    pad = (size - 1) // 2
    window = ops.Window((size, size), (stride, stride), (pad, pad, pad, pad), outside=int(random.integers(-128, 128)))
    shape = tuple((n + 2 * pad - size) // stride + 1 for n in side)
    fields = grown.weights(outputs, size, size, channels // groups)
    fields["requantize"] = replace(fields["requantize"], low=-128, high=127)
    grown.add(ops.Conv, (1, *shape, outputs), (grown.last,), **fields, window=window, groups=groups)
    return grown.program()


def with_table(program: Program, random: Random) -> Program:
    """Return a program with a Lookup behind its only operation."""
    last = program.tensors[program.operations[-1].output]
    made = replace(last, name="looked_up")
    table = random.integers(-128, 128, 256).astype(np.int8)
    lookup = ops.Lookup("lookup", (last.name,), made.name, table)
    tensors = {**program.tensors, made.name: made}
    ports = (replace(program.outputs[0], tensor=made.name),)
    return replace(program, tensors=tensors, operations=(*program.operations, lookup), outputs=ports)
