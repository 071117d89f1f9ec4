"""What benchmarks/cuda.py runs: programs by their shapes, and the same networks as layers for another library."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from qcompile.backends.integer import operations as ops
from qcompile.backends.integer.program import Operation, Port, Program, Tensor
from qcompile.core import numerics

#: A layer: its kind, what it reads, and its numbers. Value 0 is the input; layer n makes value n + 1.
Layer = tuple[str, tuple[int, ...], Mapping[str, Any]]


@dataclass
class Builder:
    """A program of random weights, and its layers.

    Parameters
    ----------
    name : str
    shape : tuple of int
        Of the input as stored.
    seed : int
    """

    name: str
    shape: tuple[int, ...]
    seed: int = 0
    tensors: list[Tensor] = field(default_factory=list)
    operations: list[Operation] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.random = np.random.default_rng(self.seed)
        self.tensors.append(Tensor("t0", self.shape, "int8", 0.02, 3))

    def _add(self, kind: type[Operation], sources: Sequence[int], shape: tuple[int, ...], **fields: Any) -> int:
        at = len(self.tensors)
        self.tensors.append(Tensor(f"t{at}", shape, "int8", 0.02, 3))
        inputs = tuple(f"t{source}" for source in sources)
        self.operations.append(kind(f"op{at}", inputs, f"t{at}", **fields))
        return at

    def _constants(self, *shape: int, relu: bool = False) -> dict[str, Any]:
        codes = self.random.integers(-127, 128, shape).astype(np.int8)
        spread = 40.0 * 127 * np.sqrt(np.prod(shape[1:]))
        multiplier, shift = numerics.fixed_point(60.0 / spread * np.exp2(self.random.uniform(-1, 1, shape[0])))
        bias = self.random.integers(-3000, 3000, shape[0]).astype(np.int32)
        return {
            "weights": codes,
            "bias": bias,
            "requantize": ops.Requantize(multiplier, shift, 3, 3 if relu else -128, 127),
        }

    def conv(self, source: int, outputs: int, size: int, stride: int = 1, relu: bool = True) -> int:
        """Add a convolution that is padded as wide as half its window."""
        _, rows, columns, channels = self.tensors[source].shape
        pad = size // 2
        window = ops.Window((size, size), (stride, stride), (pad,) * 4, outside=3)
        shape = (1, *((n + 2 * pad - size) // stride + 1 for n in (rows, columns)), outputs)
        return self._add(ops.Conv, [source], shape, **self._constants(outputs, size, size, channels, relu=relu),
                         window=window)  # fmt: skip

    def dense(self, source: int, outputs: int) -> int:
        """Add a dense layer of every position."""
        shape = self.tensors[source].shape
        return self._add(ops.Dense, [source], (*shape[:-1], outputs), **self._constants(outputs, shape[-1]))

    def add(self, first: int, second: int) -> int:
        """Add two maps, with a Relu."""
        fields = {"multipliers": (1 << 19, 1 << 19), "bias": 1 << 19, "shift": 20, "low": 3, "high": 127}
        return self._add(ops.Add, [first, second], self.tensors[first].shape, **fields)

    def max_pool(self, source: int) -> int:
        """Halve a map."""
        _, rows, columns, channels = self.tensors[source].shape
        window = ops.Window((3, 3), (2, 2), (1, 1, 1, 1))
        return self._add(ops.MaxPool, [source], (1, (rows + 1) // 2, (columns + 1) // 2, channels), window=window,
                         low=-128, high=127)  # fmt: skip

    def average(self, source: int) -> int:
        """Average a whole map."""
        _, rows, columns, channels = self.tensors[source].shape
        multiplier, shift = numerics.fixed_point([1.0 / (rows * columns)])
        fields = {"window": ops.Window((rows, columns)), "bias": 0,
                  "requantize": ops.Requantize(multiplier, shift, 3, -128, 127)}  # fmt: skip
        return self._add(ops.AveragePool, [source], (1, 1, 1, channels), **fields)

    def program(self, map_: bool = True) -> Program:
        """Return it all; a map is the model's as [1, C, H, W]."""
        first, last = self.tensors[0], self.tensors[-1]
        shape = tuple(first.shape[axis] for axis in (0, 3, 1, 2)) if map_ else first.shape
        axes = (0, 2, 3, 1) if map_ else tuple(range(len(shape)))
        ports = (
            (Port("x", first.name, shape, axes),),
            (Port("y", last.name, last.shape, tuple(range(len(last.shape)))),),
        )
        return Program(self.name, {one.name: one for one in self.tensors}, tuple(self.operations), *ports)


def product(rows: int, depth: int, outputs: int) -> Program:
    """Return one dense layer of so many positions."""
    builder = Builder("gemm", (rows, depth))
    builder.dense(0, outputs)
    return builder.program(map_=False)


def resnet50() -> Program:
    """Return a network of ResNet-50's shapes (He et al. 2015, arXiv:1512.03385, with the stride on the 3 x 3)."""
    builder = Builder("resnet50", (1, 224, 224, 3))
    last = builder.max_pool(builder.conv(0, 64, 7, 2))
    for stage, count in enumerate((3, 4, 6, 3)):
        width = 64 << stage
        for block in range(count):
            stride = 2 if stage and not block else 1
            inner = builder.conv(builder.conv(last, width, 1), width, 3, stride)
            inner = builder.conv(inner, 4 * width, 1, relu=False)
            beside = builder.conv(last, 4 * width, 1, stride, relu=False) if not block else last
            last = builder.add(beside, inner)
    builder.dense(builder.average(last), 1000)
    return builder.program()


def layers_of(program: Program) -> list[Layer]:
    """Return a program's layers; each convolution and sum that starts at its zero point has a Relu.

    Raises
    ------
    ValueError
        If it has an operation that is none of them.
    """
    values, found = {program.inputs[0].tensor: 0}, list[Layer]()
    for operation in program.operations:
        sources = tuple(values[name] for name in operation.inputs)
        if isinstance(operation, ops.View):
            values[operation.output] = sources[0]
            continue
        zero_point = program.tensors[operation.output].zero_point
        if isinstance(operation, ops.Conv):
            outputs, rows, columns, depth = operation.weights.shape
            window = operation.window
            found.append(("Conv", sources, {
                "weights": [outputs, depth, rows, columns], "stride": window.strides[0], "ends": list(window.pads),
                "groups": operation.groups, "relu": operation.requantize.low == zero_point}))  # fmt: skip
        elif isinstance(operation, ops.Dense):
            found.append(("Dense", sources, {"weights": list(operation.weights.shape)}))
        elif isinstance(operation, ops.Add):
            found.append(("Add", sources, {"relu": operation.low == zero_point}))
        elif (
            isinstance(operation, ops.AveragePool)
            and operation.window.size == program.tensors[operation.inputs[0]].shape[1:3]
        ):
            found.append(("Average", sources, {}))
        elif isinstance(operation, ops.MaxPool) and operation.window.size == (3, 3):
            found.append(("MaxPool", sources, {}))
        else:
            raise ValueError(f"{operation.name}: {type(operation).__name__} is no layer that is known here")
        values[operation.output] = len(found)
    return found
