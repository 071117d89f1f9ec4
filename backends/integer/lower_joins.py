"""Lower a Concat of activations and constants, for targets that have floats: what writes a constant is a Pointwise."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from qcompile.backends.integer import expressions
from qcompile.backends.integer.expressions import FloatArray
from qcompile.backends.integer.lower_floats import Real, real, stored
from qcompile.backends.integer.lower_linear import real_of
from qcompile.backends.integer.operations import Concat
from qcompile.backends.integer.program import PLAIN
from qcompile.backends.integer.values import FLOAT, Codes, Grid, Pending, Writer, refuse, shape_of


def lower_join(writer: Writer, node: ir.Node, inputs: Sequence[Codes | None]) -> Pending | Codes:
    """Lower a Concat some of whose inputs are constants.

    Constants become codes of the result's scale, which holds them, and not of the other inputs', which may not.

    Parameters
    ----------
    writer : Writer
    node : onnx_ir.Node
    inputs : sequence of Codes or None
        None of constants.
    """
    given = [writer.plain(writer.settled(part), node) for part in inputs if part is not None]
    if any(part.grid.dtype == "int64" for part in given):
        refuse(node, "joins integers and constants", "join them before they are handed over as an input")
    order, shape = given[0].order, shape_of(node.outputs[0])
    activations = iter([writer.arranged(part, order) for part in given])
    parts = [_constant(node, index) if part is None else next(activations) for index, part in enumerate(inputs)]
    stored_shape = tuple(shape[place] for place in order)

    def write(grid: Grid, name: str) -> str:
        joined = tuple(_on_grid(writer, node, part, order, grid, f"{name}_{index}") for index, part in enumerate(parts))
        output = writer.add_tensor(name, stored_shape, grid)
        return writer.write(Concat(node.name or name, joined, output, given[0].place_of(_axis(node))))

    def finish(grid: Grid, low: int, high: int, name: str) -> str:
        if (low, high) != (grid.low, grid.high):
            refuse(node, "has a Relu or Clip behind it", "put it in front of the Concat")
        return write(grid, name)

    def finish_real(low: float, high: float, name: str) -> str:
        if (low, high) != (-np.inf, np.inf):
            refuse(node, "has a Relu or Clip behind it", "put it in front of the Concat")
        return write(FLOAT, name)

    if any(part.grid.dtype in PLAIN for part in given):
        return Codes(write(FLOAT, str(node.outputs[0].name)), shape, order, FLOAT)
    return Pending(node, shape, order, finish, finish_real=finish_real)


def _axis(node: ir.Node) -> int:
    return node.attributes.get_int("axis", 0)


def _constant(node: ir.Node, index: int) -> FloatArray:
    return np.asarray(real_of(node.inputs[index], node), np.float32)


def _on_grid(
    writer: Writer, node: ir.Node, part: Codes | FloatArray, order: Sequence[int], grid: Grid, name: str
) -> str:
    """Return the tensor of an input, or what a constant is written to, on the grid that all are joined in."""
    if not isinstance(part, Codes):
        values = part.transpose(order)
        if grid.dtype not in PLAIN:
            # Values that codes stand for: however a kernel rounds them, it comes to these.
            codes = grid.codes(values) - grid.zero_point
            values = (codes * np.float32(grid.scale)).astype(np.float32)
        return stored(writer, Real(values.shape, (values,), expressions.leaf(0)), grid, name).tensor
    if grid.dtype in PLAIN:
        return stored(writer, real(writer, part, node), grid, name).tensor
    return writer.on_grid(part, grid, name, node).tensor
