"""A graph that grows by one operator at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from hypothesis import strategies as st
from onnx import helper, numpy_helper

#: The length that an open batch axis has when a graph runs.
BATCH = 2
Dims = tuple[int | str, ...]
Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Tensor:
    """A value of the graph with what is known of it."""

    name: str
    dims: Dims

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(BATCH if isinstance(dim, str) else dim for dim in self.dims)

    @property
    def rank(self) -> int:
        return len(self.dims)


@dataclass
class Builder:
    """A graph that grows by one operator at a time."""

    draw: Callable[[st.SearchStrategy[Any]], Any]
    random: np.random.Generator
    opset: int
    half: bool
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    initializers: list[onnx.TensorProto] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    count: int = 0
    flag: bool = False

    @property
    def dtype(self) -> type[Any]:
        return np.float16 if self.half else np.float32

    def integer(self, low: int, high: int) -> int:
        return int(self.draw(st.integers(low, high)))

    def pick(self, *choices: Any) -> Any:
        return self.draw(st.sampled_from(choices))

    def name(self, what: str = "v") -> str:
        self.count += 1
        return f"{what}{self.count}"

    def constant(self, array: Array) -> str:
        """Add a constant, as an initializer or as a Constant node."""
        name = self.name("c")
        tensor = numpy_helper.from_array(np.asarray(array), name)
        if self.integer(0, 3):
            self.initializers.append(tensor)
        else:
            self.nodes.append(helper.make_node("Constant", [], [name], value=tensor))
        return name

    def ints(self, *numbers: int) -> str:
        return self.constant(np.array(numbers, np.int64))

    def weights(self, *shape: int, scale: float = 1.0) -> str:
        return self.constant((self.random.standard_normal(shape) * scale).astype(self.dtype))

    def positive(self, *shape: int) -> str:
        return self.constant((0.5 + self.random.random(shape)).astype(self.dtype))

    def raw(self, op_type: str, inputs: list[str], **attributes: Any) -> str:
        """Add a node of one result that is no operand for later operators."""
        name = self.name()
        self.nodes.append(helper.make_node(op_type, inputs, [name], name=self.name("n"), **attributes))
        return name

    def add(self, op_type: str, inputs: list[str], dims: Dims, **attributes: Any) -> Tensor:
        tensor = Tensor(self.raw(op_type, inputs, **attributes), dims)
        self.values.append(tensor)
        return tensor

    def operand(self, *ranks: int) -> Tensor | None:
        """Return a value of one of these ranks, mostly a recent one."""
        fitting = [value for value in self.values if not ranks or value.rank in ranks]
        return fitting[-1 - min(self.pick(0, 0, 0, 0, 1, 2, 5), len(fitting) - 1)] if fitting else None
