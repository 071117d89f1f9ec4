"""Which operators of a model are lowered in float, and how their values meet those of integers."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompile.backends.integer import ports
from qcompile.backends.integer.lower_affine import is_affine
from qcompile.backends.integer.lower_blocks import lower_blocks, lower_float_product
from qcompile.backends.integer.lower_elementwise import bounds_of
from qcompile.backends.integer.lower_floats import Floats, Known, Real, Rows, is_float, real, stored
from qcompile.backends.integer.lower_joins import lower_join
from qcompile.backends.integer.lower_linear import real_of
from qcompile.backends.integer.lower_moves import picks_one
from qcompile.backends.integer.lower_products import lower_product
from qcompile.backends.integer.program import Port
from qcompile.backends.integer.values import FLOAT, Codes, Grid, Pending, Writer, refuse, shape_of
from qcompile.passes import structure

Array = npt.NDArray[np.float64]
#: What moves elements, whatever they are.
MOVES = (*ports.MOVES, "Concat", "Slice", "Split")
#: What multiplies by constant weights, in integers alone.
LINEAR = ("Conv", "Gemm", "MatMul")
TYPES = {ir.DataType.FLOAT: "float32", ir.DataType.INT64: "int64"}
#: What goes into a scale and a bias: factor and summand.
FOLDED: Mapping[str, Callable[[Array], tuple[Array, Array]]] = {
    "Add": lambda numbers: (np.ones(1), numbers),
    "Div": lambda numbers: (1.0 / numbers, np.zeros(1)),
    "Mul": lambda numbers: (numbers, np.zeros(1)),
    "Sub": lambda numbers: (np.ones(1), -numbers),
}
NO_KERNEL = "docs/targets/cpu-tvm.md lists what has one; replace it in the model"
IN_INTEGERS = "quantize its input: leave it out of what is kept in float"


class Islands:
    """Lowers operators in float, next to a lowering of integers.

    Parameters
    ----------
    writer : Writer
    known : dict of Value to Known
        That of the lowering, which this one reads and fills.
    allowed : collection of str
        Operators that the target takes in float.
    integers : collection of str
        Operators that have a form in integers.
    """

    def __init__(
        self, writer: Writer, known: dict[ir.Value, Known], allowed: Collection[str], integers: Collection[str]
    ) -> None:
        self.writer, self.known, self.allowed, self.integers = writer, known, allowed, integers
        self.floats = Floats(writer)

    def input_port(self, value: ir.Value) -> tuple[Codes, Port] | None:
        """Return an input that is handed over as it is; None of one that is codes to all that read it."""
        dtype = TYPES.get(value.dtype) if value.dtype is not None else None
        if dtype is None or (dtype == "float32" and _quantized_alone(value)):
            return None
        name, shape = structure.name_of(value), shape_of(value)
        order = tuple(range(len(shape)))
        grid = Grid(1.0, 0, dtype)
        return Codes(self.writer.add_tensor(name, shape, grid), shape, order, grid), Port(name, name, shape, order)

    def take(self, node: ir.Node) -> bool:
        """Lower a node, or tell that it is one of integers."""
        inputs = [self._known(value) for value in node.inputs]
        if not any(known is not None for known in inputs):
            return False
        if node.op_type in MOVES or picks_one(node):
            self._settle(node)
            return node.op_type == "Concat" and self._joins_constants(node)
        if (folded := self._folded(node, inputs)) is not None:
            self.known[node.outputs[0]] = folded
        elif node.op_type == "MatMul" and all(known is not None for known in inputs):
            self.known[node.outputs[0]] = self._product(node)
        elif node.op_type in ("Gemm", "MatMul") and self._multiplies_floats(node, inputs):
            self.known[node.outputs[0]] = lower_blocks(self.writer, node, self._as_floats(node, 0))
        elif self._is_of_integers(node, inputs):
            return False
        else:
            rule = self.floats.rules.get(node.op_type)
            if rule is None or node.op_type not in self.allowed:
                refuse(node, "has no kernel in float", NO_KERNEL)
            self.known[node.outputs[0]] = rule(node, inputs)
        return True

    def _is_of_integers(self, node: ir.Node, inputs: list[Known | None]) -> bool:
        """Tell whether integers compute a node: from codes, where codes are made of its result."""
        plain = all(known is None or (isinstance(known, Codes) and not is_float(known)) for known in inputs)
        if node.op_type in LINEAR:
            if not plain:
                refuse(node, "reads floats, and has no kernel for them", IN_INTEGERS)
            return True
        if isinstance(inputs[0], Pending) and bounds_of(node) is not None:
            return True
        has_form = node.op_type in self.integers or is_affine(node)
        return plain and has_form and (_is_quantized(node) or node.op_type not in self.floats.rules)

    def _known(self, value: ir.Value | None) -> Known | None:
        return None if value is None or structure.constant_tensor(value) is not None else self.known.get(value)

    def _settle(self, node: ir.Node) -> None:
        """Give what is moved its place in memory: as the codes that it becomes, where nothing wants more of it."""
        for value in node.inputs:
            known = self._known(value)
            if value is None or not isinstance(known, Pending | Real):
                continue
            grid = _grid_behind(node.outputs[0])
            name = str(value.name)
            if isinstance(known, Pending) and grid is not None and len(node.outputs) == 1:
                self.known[value] = known.settle(grid, name)
            elif isinstance(known, Pending):
                self.known[value] = known.settle_real(name)
            else:
                self.known[value] = stored(self.writer, known, FLOAT, name)

    def _joins_constants(self, node: ir.Node) -> bool:
        """Lower a Concat of activations and constants, or tell that there are none of these."""
        parts = [known if isinstance(known := self._known(value), Codes) else None for value in node.inputs]
        if all(part is not None for part in parts):
            return False
        self.known[node.outputs[0]] = lower_join(self.writer, node, parts)
        return True

    def _folded(self, node: ir.Node, inputs: list[Known | None]) -> Pending | None:
        """Return the operation in front with a factor or a summand in it, if that still waits for its scale."""
        places = [place for place, known in enumerate(inputs) if isinstance(known, Pending)]
        if node.op_type not in FOLDED or len(inputs) != 2 or len(places) != 1:
            return None
        pending, other = inputs[places[0]], node.inputs[1 - places[0]]
        assert isinstance(pending, Pending)
        bounded = (pending.low, pending.high) != (-np.inf, np.inf)
        turned = node.op_type in ("Sub", "Div") and places[0] == 1
        if pending.affine is None or bounded or turned or inputs[1 - places[0]] is not None:
            return None
        array = real_of(other, node)
        if (
            array is None
            or array.size != max(array.shape[-1:], default=1)
            or (node.op_type == "Div" and not array.all())
        ):
            return None
        found = pending.affine(*FOLDED[node.op_type](array.reshape(-1)))
        return found if found is not None and found.shape == shape_of(node.outputs[0]) else None

    def _product(self, node: ir.Node) -> Pending:
        found = [known for known in map(self._known, node.inputs) if isinstance(known, Codes)]
        if len(found) != 2 or any(is_float(codes) for codes in found):
            return lower_float_product(self.writer, node, [self._as_floats(node, index) for index in range(2)])
        return lower_product(self.writer, node, found)

    def _multiplies_floats(self, node: ir.Node, inputs: list[Known | None]) -> bool:
        """Tell whether a node multiplies what is no codes by constants that are."""
        first = inputs[0]
        constant = structure.produced_by(node.inputs[structure.WEIGHT_INPUT], "DequantizeLinear") is not None
        return constant and first is not None and not (isinstance(first, Codes) and not is_float(first))

    def _as_floats(self, node: ir.Node, index: int) -> Codes:
        """Return an operand as floats that are stored."""
        value = structure.input_of(node, index)
        known = self.known[value]
        if isinstance(known, Pending):
            known = known.settle_real(str(value.name))
        if not (isinstance(known, Codes) and is_float(known)):
            known = stored(self.writer, real(self.writer, known, node), FLOAT, f"{value.name}_float")
        self.known[value] = known
        return known

    def dequantized_rows(self, node: ir.Node, rows: Rows) -> Codes:
        """Return the floats of rows of a table."""
        scale = structure.constant(node.inputs[1])
        zero = structure.constant(node.inputs[2]) if len(node.inputs) > 2 else None
        rank, axis = len(rows.indices.shape) + 1, node.attributes.get_int("axis", 1)
        if scale is None or (zero is not None and zero.any()) or (scale.size > 1 and axis % rank != rank - 1):
            refuse(node, "has a zero point, or scales by row", "store the table symmetrically, with scales by column")
        return self.floats.rows(rows, scale)

    def keep_shared(self, node: ir.Node) -> None:
        """Store what several operators read, so that it is computed once."""
        for value in node.outputs:
            known = self.known.get(value)
            if len(value.uses()) + value.is_graph_output() < 2:
                continue
            if isinstance(known, Pending) and known.finish_real is not None:
                self.known[value] = known.settle_real(str(value.name))
            elif isinstance(known, Real) and known.expression[0] not in ("leaf", "number"):
                self.known[value] = stored(self.writer, known, FLOAT, str(value.name))

    def output(self, value: ir.Value) -> Known | None:
        """Return what a model's output is: floats where nothing makes codes of it."""
        known = self.known.get(value)
        if isinstance(known, Rows):
            refuse(known.node, f"leaves the model as codes of a table, '{value.name}'", "dequantize them")
        if isinstance(known, Real):
            return stored(self.writer, known, FLOAT, str(value.name))
        if isinstance(known, Pending) and known.natural is None and known.finish_real is not None:
            return known.settle_real(str(value.name))
        return known


def _is_quantized(node: ir.Node) -> bool:
    """Tell whether nothing but codes is made of a result, perhaps behind a Relu or Clip, or it leaves the model."""
    return all(value.is_graph_output() or _becomes_codes(value) for value in node.outputs)


def _becomes_codes(value: ir.Value) -> bool:
    readers = structure.readers(value)
    return bool(readers) and all(
        structure.is_standard(reader, "QuantizeLinear") or (bounds_of(reader) is not None and _is_quantized(reader))
        for reader in readers
    )


def _grid_behind(value: ir.Value) -> Grid | None:
    """Return the codes that a value becomes, behind what moves it, where nothing else is made of it."""
    found: list[Grid] = []
    for reader in structure.readers(value):
        if structure.is_standard(reader, "QuantizeLinear"):
            found.append(ports.grid_of(reader))
        elif structure.is_standard(reader, *ports.MOVES) and (grid := _grid_behind(reader.outputs[0])) is not None:
            found.append(grid)
        else:
            return None
    if value.is_graph_output() or not found or not all(grid.same(found[0]) for grid in found):
        return None
    return found[0]


def _quantized_alone(value: ir.Value) -> bool:
    """Tell whether all that reads a value reads codes of it."""
    readers = structure.readers(value)
    return bool(readers) and all(
        structure.is_standard(reader, "QuantizeLinear")
        or (structure.is_standard(reader, *ports.MOVES) and _quantized_alone(reader.outputs[0]))
        for reader in readers
    )
