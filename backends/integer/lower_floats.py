"""Lower what stays in float, for targets that have floats: expressions that grow until something needs their values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx_ir as ir

from qcompile.backends.integer import expressions
from qcompile.backends.integer.expressions import Expression, FloatArray
from qcompile.backends.integer.float_operations import FloatSoftmax, Gather, Leaf, Normalize, Pointwise, Reduce
from qcompile.backends.integer.lower_linear import real_of
from qcompile.backends.integer.operations import Lookup
from qcompile.backends.integer.program import PLAIN
from qcompile.backends.integer.values import FLOAT, Codes, Grid, Pending, Writer, refuse, shape_of
from qcompile.passes import structure

#: Integers that are told from floats by nothing in an expression: exact up to 2^24.
NUMBERS = (ir.DataType.FLOAT, ir.DataType.INT64, ir.DataType.INT32, ir.DataType.BOOL)
Operand = Codes | FloatArray


@dataclass(frozen=True, eq=False)
class Real:
    """A float value that is an expression of what is stored, element by element.

    Parameters
    ----------
    shape : tuple of int
        In the model.
    operands : tuple of Codes or ndarray of float32
        What its leaves are; they broadcast to the shape.
    expression : tuple
    """

    shape: tuple[int, ...]
    operands: tuple[Operand, ...]
    expression: Expression


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows of a table of codes that wait for their scale.

    Parameters
    ----------
    node : onnx_ir.Node
    table : ndarray
    indices : Codes
    """

    node: ir.Node
    table: Any
    indices: Codes


Known = Codes | Pending | Real | Rows


def is_float(known: Known) -> bool:
    """Tell whether a value is no codes of a kind that integers are computed with."""
    return isinstance(known, Real) or (isinstance(known, Codes) and known.grid.dtype in PLAIN)


def real(writer: Writer, known: Known, node: ir.Node) -> Real:
    """Return a value as an expression."""
    if isinstance(known, Real):
        return known
    if isinstance(known, Rows):
        refuse(node, "reads codes of a table as floats", "put a DequantizeLinear behind the table's lookup")
    if isinstance(known, Pending):
        known = known.settle_real(str(node.inputs[0].name if node.inputs[0] is not None else node.name))
    codes = writer.plain(writer.settled(known), node)
    return Real(codes.shape, (codes,), expressions.leaf(0))


def stored(writer: Writer, value: Real, grid: Grid, name: str) -> Codes:
    """Return a value as codes or floats of a grid, in the order of its largest operand."""
    if value.expression == expressions.leaf(0) and isinstance(value.operands[0], Codes):
        codes = value.operands[0]
        if codes.shape == value.shape and codes.grid.same(grid):
            return codes
    order = order_of(value)
    output = writer.add_tensor(name, tuple(value.shape[axis] for axis in order), grid)
    if (source := _one_code(value)) is not None and grid.dtype == "int8":
        levels = expressions.evaluate(value.expression, [source.grid.levels()] * len(value.operands))
        table = grid.codes(np.broadcast_to(levels, (256,))).astype(np.int8)
        writer.write(Lookup(output, (source.tensor,), output, table))
        return Codes(output, value.shape, order, grid)
    inputs, leaves = leaves_of(value, order)
    writer.write(Pointwise(output, inputs, output, leaves, value.expression))
    return Codes(output, value.shape, order, grid)


def _one_code(value: Real) -> Codes | None:
    """Return the codes that a value is a function of, each for itself: a table tells it, whatever it costs."""
    found = [part for part in value.operands if isinstance(part, Codes)]
    alike = len(found) == len(value.operands) > 0 and len({(part.tensor, part.order) for part in found}) == 1
    return found[0] if alike and found[0].grid.dtype == "int8" and found[0].shape == value.shape else None


def order_of(value: Real) -> tuple[int, ...]:
    """Return the order of axes in which most of what a value is made of is stored."""
    whole = [part for part in value.operands if isinstance(part, Codes) and part.shape == value.shape]
    return whole[0].order if whole else tuple(range(len(value.shape)))


def leaves_of(value: Real, order: Sequence[int | None], extra: int = 0) -> tuple[tuple[str, ...], tuple[Leaf, ...]]:
    """Return tensors and leaves for loops over the value's axes in an order."""
    del extra
    inputs: list[str] = []
    leaves: list[Leaf] = []
    for part in value.operands:
        missing = len(value.shape) - len(part.shape)
        axes: list[int | None] = []
        for axis in order:
            own = -1 if axis is None else axis - missing
            absent = own < 0 or part.shape[own] == 1
            axes.append(None if absent else part.place_of(own) if isinstance(part, Codes) else own)
        if isinstance(part, Codes):
            if part.tensor not in inputs:
                inputs.append(part.tensor)
            scale, zero = (1.0, 0) if part.grid.dtype in PLAIN else (part.grid.scale, part.grid.zero_point)
            leaves.append(Leaf(inputs.index(part.tensor), tuple(axes), scale, zero))
        else:
            leaves.append(Leaf(-1, tuple(axes), values=part))
    return tuple(inputs), tuple(leaves)


def combined(shape: tuple[int, ...], kind: str, parts: Sequence[Real]) -> Real:
    """Return a primitive of several values."""
    operands: list[Operand] = []
    trees = []
    for part in parts:
        trees.append(expressions.shifted(part.expression, len(operands)))
        operands.extend(part.operands)
    return Real(shape, tuple(operands), (kind, *trees))


class Floats:
    """Rules of operators in float. Each takes the node and what is known of its inputs, None of constants."""

    def __init__(self, writer: Writer) -> None:
        self.writer = writer
        self.rules = {
            "Cast": self.cast, "Clip": self.clip, "Expand": self.expand, "Gather": self.gather,
            "LayerNormalization": self.normalize, "Pow": self.power, "ReduceL2": self.reduce, "ReduceMax": self.reduce,
            "ReduceMean": self.reduce, "ReduceSum": self.reduce, "RMSNormalization": self.normalize,
            "GlobalAveragePool": self.reduce, "Softmax": self.softmax, "Where": self.where,
            **dict.fromkeys(expressions.FUNCTIONS, self.function), **dict.fromkeys(expressions.PAIRS, self.pair),
        }  # fmt: skip

    def operand(self, node: ir.Node, index: int, known: Known | None) -> Real:
        """Return one input as an expression."""
        if known is not None:
            return real(self.writer, known, node)
        array = np.asarray(real_of(node.inputs[index], node), np.float32)
        if array.size == 1:
            return Real(array.shape, (), expressions.number(float(array.reshape(()))))
        return Real(array.shape, (array,), expressions.leaf(0))

    def function(self, node: ir.Node, known: list[Known | None]) -> Real:
        """Lower a function of one value."""
        x = self.operand(node, 0, known[0])
        attributes = {key: attribute.value for key, attribute in node.attributes.items()}
        return replace(x, expression=expressions.FUNCTIONS[node.op_type](x.expression, attributes))

    def pair(self, node: ir.Node, known: list[Known | None]) -> Real:
        """Lower a function of two values, or of more, in turn."""
        shape = shape_of(node.outputs[0])
        parts = [self.operand(node, index, each) for index, each in enumerate(known)]
        found = parts[0]
        for other in parts[1:]:
            kind = expressions.PAIRS[node.op_type]
            if kind == "div" and (inverse := expressions.inverse(other.expression)) is not None:
                kind, other = "mul", replace(other, expression=inverse)
            found = combined(shape, kind, [found, other])
        return replace(found, shape=shape)

    def where(self, node: ir.Node, known: list[Known | None]) -> Real:
        """Lower a choice."""
        parts = [self.operand(node, index, each) for index, each in enumerate(known)]
        return combined(shape_of(node.outputs[0]), "where", parts)

    def cast(self, node: ir.Node, known: list[Known | None]) -> Real:
        """Lower a Cast between types whose numbers a float32 holds."""
        x = self.operand(node, 0, known[0])
        types = node.inputs[0].dtype if node.inputs[0] is not None else None, node.outputs[0].dtype
        if any(kind not in NUMBERS for kind in types):
            refuse(node, f"casts {types[0]} to {types[1]}", "export the model in float32")
        if types[1] is ir.DataType.BOOL:
            equal = ("equal", x.expression, expressions.number(0.0))
            return replace(x, expression=("sub", expressions.number(1.0), equal))
        if types[0] is ir.DataType.FLOAT and types[1] is not ir.DataType.FLOAT:
            refuse(node, "makes integers of floats", "leave them in float")
        return x

    def clip(self, node: ir.Node, known: list[Known | None]) -> Real:
        """Lower a Clip."""
        found = self.operand(node, 0, known[0])
        for index, kind in ((1, "max"), (2, "min")):
            if len(node.inputs) > index and node.inputs[index] is not None:
                bound = self.operand(node, index, known[index])
                found = combined(found.shape, kind, [found, bound])
        return found

    def expand(self, node: ir.Node, known: list[Known | None]) -> Real:
        """Lower an Expand, which is how its readers go over it."""
        return replace(self.operand(node, 0, known[0]), shape=shape_of(node.outputs[0]))

    def power(self, node: ir.Node, known: list[Known | None]) -> Real:
        """Lower a square or a square root."""
        x, constant = self.operand(node, 0, known[0]), structure.constant(node.inputs[1])
        exponent = None if constant is None or constant.size != 1 else float(constant.reshape(()))
        if exponent == 2.0:
            return replace(x, expression=("mul", x.expression, x.expression))
        if exponent == 0.5:
            return replace(x, expression=("sqrt", x.expression))
        return refuse(node, "has an exponent other than 2 and 0.5", "replace it in the model")

    def gather(self, node: ir.Node, known: list[Known | None]) -> Rows | Codes:
        """Lower a lookup of rows."""
        table, indices = structure.constant(node.inputs[0]), known[1]
        if table is None or table.ndim != 2 or node.attributes.get_int("axis", 0) % table.ndim != 0:
            refuse(node, "picks from what is no table of rows", "only rows of a constant table have a kernel")
        if not isinstance(indices, Codes) or indices.grid.dtype != "int64":
            refuse(node, "picks what is computed", "hand its indices over as an input of int64")
        if table.dtype != np.float32:
            return Rows(node, table, indices)
        return self.rows(Rows(node, table, indices), np.ones(table.shape[1], np.float32))

    def rows(self, rows: Rows, scale: Any) -> Codes:
        """Write a lookup whose scale is known: one for all, or one per column."""
        node, table = rows.node, rows.table
        if str(table.dtype) not in ("int8", "float32"):
            refuse(node, f"has a table of {table.dtype}", "store it as int8, symmetric")
        scales = np.broadcast_to(np.asarray(scale, np.float32).reshape(-1), (table.shape[1],))
        shape = (*rows.indices.shape, table.shape[1])
        output = self.writer.add_tensor(str(node.outputs[0].name), shape, FLOAT)
        self.writer.write(Gather(node.name or output, (rows.indices.tensor,), output, table, scales))
        return Codes(output, shape, tuple(range(len(shape))), FLOAT)

    def normalize(self, node: ir.Node, known: list[Known | None]) -> Pending:
        """Lower a LayerNormalization or RMSNormalization over the last axis."""
        x = self.operand(node, 0, known[0])
        axis = node.attributes.get_int("axis", -1) % len(x.shape)
        if math.prod(x.shape[axis:]) != x.shape[-1]:
            refuse(node, "goes over several axes", "only the last axis has a kernel")
        width = x.shape[-1]
        weight, bias = (
            np.broadcast_to(np.asarray(real_of(node.inputs[index], node), np.float32).reshape(-1), (width,))
            if len(node.inputs) > index and node.inputs[index] is not None
            else np.full(width, float(index == 1), np.float32)
            for index in (1, 2)
        )
        more = weight, bias, node.attributes.get_float("epsilon", 1e-5), node.op_type == "LayerNormalization"
        return self.by_rows(node, x, Normalize, more)

    def softmax(self, node: ir.Node, known: list[Known | None]) -> Pending:
        """Lower a Softmax along any axis."""
        x = self.operand(node, 0, known[0])
        return self.by_rows(node, x, FloatSoftmax, (), node.attributes.get_int("axis", -1) % len(x.shape))

    def by_rows(self, node: ir.Node, x: Real, kind: Any, more: tuple[Any, ...], axis: int = -1) -> Pending:
        """Return what goes along one axis, which is stored last."""
        axis %= len(x.shape)
        order = (*(other for other in order_of(x) if other != axis), axis)
        inputs, leaves = leaves_of(x, order)

        def finish(grid: Grid, low: int, high: int, name: str) -> str:
            if (low, high) != (grid.low, grid.high):
                refuse(node, "has a Relu or Clip behind it", "quantize its result without")
            return write(grid, name)

        def write(grid: Grid, name: str) -> str:
            output = self.writer.add_tensor(name, tuple(x.shape[place] for place in order), grid)
            return self.writer.write(kind(node.name or name, inputs, output, leaves, x.expression, *more))

        def finish_real(low: float, high: float, name: str) -> str:
            if (low, high) != (-np.inf, np.inf):
                refuse(node, "has a Relu or Clip behind it", "leave it out")
            return write(FLOAT, name)

        return Pending(node, x.shape, order, finish, finish_real=finish_real)

    def reduce(self, node: ir.Node, known: list[Known | None]) -> Real:
        """Lower a sum, mean, maximum or norm over some axes."""
        x = self.operand(node, 0, known[0])
        rank = len(x.shape)
        axes = sorted(axis % rank for axis in reduced_axes(node, rank))
        kept = [axis for axis in order_of(x) if axis not in axes]
        if node.op_type == "ReduceL2":
            x = replace(x, expression=("mul", x.expression, x.expression))
        inputs, leaves = leaves_of(x, [*kept, *axes])
        extents = tuple(x.shape[axis] for axis in axes)
        factor = 1.0 / math.prod(extents) if node.op_type in ("ReduceMean", "GlobalAveragePool") else 1.0
        shape = tuple(x.shape[axis] for axis in kept)
        output = self.writer.add_tensor(str(node.outputs[0].name), shape, FLOAT)
        kind = "max" if node.op_type == "ReduceMax" else "sum"
        name = node.name or output
        self.writer.write(Reduce(name, inputs, output, leaves, x.expression, extents, kind, factor))
        # Axes that are gone over stay with one element, in front; without keepdims a view drops them.
        whole = tuple(1 if axis in axes else length for axis, length in enumerate(x.shape))
        codes = Codes(self.writer.viewed(output, (*extents_of_one(axes), *shape)), whole, (*axes, *kept), FLOAT)
        target = shape_of(node.outputs[0])
        if target != whole:
            places = [axis for axis in range(rank) if axis not in axes]
            order = tuple(places.index(axis) for axis in kept)
            codes = Codes(output, target, order, FLOAT)
        found = Real(codes.shape, (codes,), expressions.leaf(0))
        return replace(found, expression=("sqrt", found.expression)) if node.op_type == "ReduceL2" else found


def extents_of_one(axes: Sequence[int]) -> tuple[int, ...]:
    """Return an axis of one element for each."""
    return (1,) * len(axes)


def reduced_axes(node: ir.Node, rank: int) -> tuple[int, ...]:
    """Return the axes that a reduction goes over."""
    if node.op_type == "GlobalAveragePool":
        return tuple(range(2, rank))
    told = len(node.inputs) > 1 and node.inputs[1] is not None
    axes = structure.constant(node.inputs[1]) if told else None
    if told and axes is None:
        refuse(node, "goes over axes that the data say", "export the model with constant axes")
    given = node.attributes.get_ints("axes", ()) if axes is None else axes.reshape(-1)
    return tuple(int(axis) for axis in given) or tuple(range(rank))
