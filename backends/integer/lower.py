"""Lower a QDQ model to an integer program, or say which operator has no place in one."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace

import numpy as np
import onnx_ir as ir

from qcompile.backends.integer import ports
from qcompile.backends.integer.fix_length import at_length
from qcompile.backends.integer.islands import Islands
from qcompile.backends.integer.join_tables import join_tables
from qcompile.backends.integer.lower_affine import is_affine, lower_affine
from qcompile.backends.integer.lower_elementwise import (
    FUNCTIONS,
    bounds_of,
    lower_add,
    lower_function,
    lower_mul,
    lower_softmax,
)
from qcompile.backends.integer.lower_floats import Known, Rows, is_float, real, stored
from qcompile.backends.integer.lower_linear import lower_conv, lower_gemm, lower_matmul
from qcompile.backends.integer.lower_moves import (
    lower_concat,
    lower_pick,
    lower_reshape,
    lower_slice,
    lower_split,
    lower_transpose,
)
from qcompile.backends.integer.lower_windows import (
    lower_average_pool,
    lower_global_average_pool,
    lower_max_pool,
    lower_pad,
    lower_reduce_mean,
    lower_resize,
)
from qcompile.backends.integer.program import Port, Program
from qcompile.backends.integer.storage import require_forms
from qcompile.backends.integer.values import Codes, Grid, Pending, Writer, refuse, shape_of, spanning
from qcompile.core.errors import OperatorError, TargetError
from qcompile.passes import structure
from qcompile.passes.canonicalize.infer_shapes import InferShapes

Rule = Callable[[Writer, ir.Node, list[Codes]], Codes | Pending | list[Codes]]

RULES: dict[str, Rule] = {
    "Add": lower_add,
    "AveragePool": lower_average_pool,
    "Concat": lower_concat,
    "Conv": lower_conv,
    "Flatten": lower_reshape,
    "Gather": lower_pick,
    "Gemm": lower_gemm,
    "GlobalAveragePool": lower_global_average_pool,
    "MatMul": lower_matmul,
    "MaxPool": lower_max_pool,
    "Mul": lower_mul,
    "Pad": lower_pad,
    "ReduceMean": lower_reduce_mean,
    "Reshape": lower_reshape,
    "Resize": lower_resize,
    "Slice": lower_slice,
    "Softmax": lower_softmax,
    "Split": lower_split,
    "Squeeze": lower_reshape,
    "Sub": lower_add,
    "Transpose": lower_transpose,
    "Unsqueeze": lower_reshape,
}
#: Rules that can put their weights into the order in which a flattened map is stored.
TAKES_MAPS = frozenset({"Gemm", "MatMul"})
NO_FORM = "docs/integer-kernels.md lists what has one; replace it in the model"
QUANTIZE_IT = "quantize every activation: give --data, and keep nothing in float"


def lower(model: ir.Model, floats: Collection[str] = ()) -> Program:
    """Return the integer program of a QDQ model.

    Parameters
    ----------
    model : onnx_ir.Model
        As `InsertQdq` writes it, or another tool's Q/DQ. Left alone.
    floats : collection of str
        Operators that the target takes in float.

    Raises
    ------
    TargetError
        If an operator has no integer form, is left in float, or has shapes that are not known: it names the operator
        and what would help.
    """
    static = with_batch_of_one(model)
    if any(not is_known(value) for node in static.graph for value in node.outputs):
        # Shapes that the graph computes follow from those of the inputs.
        static = at_length(static, {str(value.name): shape_of(value) for value in static.graph.inputs})
    lowering = _Lowering(static, floats)
    for value in static.graph.inputs:
        lowering.take_input(value)
    for node in static.graph:
        lowering.take(node)
    return lowering.program()


def with_batch_of_one(model: ir.Model) -> ir.Model:
    """Return a copy whose open batch is 1, with every shape that follows from that.

    Raises
    ------
    TargetError
        If other axes of an input are open.
    """
    static = model.clone()
    for value in static.graph.inputs:
        shape = value.shape
        if shape is None or any(not isinstance(length, int) for length in list(shape)[1:]):
            place = f"input '{value.name}'"
            raise TargetError(place, f"has the open shape {shape}", f"fix it: --shape {value.name}=1x...")
        if len(shape) and not isinstance(shape[0], int):
            value.shape = ir.Shape([1, *list(shape)[1:]])
    for node in static.graph:
        for value in node.outputs:
            value.shape = None
    return InferShapes()(static).model


def is_known(value: ir.Value) -> bool:
    """Tell whether all of a value's shape is known."""
    return value.shape is not None and all(isinstance(length, int) for length in value.shape)


class _Lowering:
    """The state of one lowering: what is known of each float value so far."""

    def __init__(self, model: ir.Model, floats: Collection[str] = ()) -> None:
        self.model = model
        self.writer = Writer()
        self.known: dict[ir.Value, Known] = {}
        self.islands = Islands(self.writer, self.known, floats, {*RULES, *FUNCTIONS}) if floats else None
        self.inputs: list[Port] = []

    def take_input(self, value: ir.Value) -> None:
        """Give an input the codes that the model rounds it to first: the rounding is the caller's."""
        if not value.uses():
            return
        taken = self.islands.input_port(value) if self.islands is not None else None
        taken = taken or ports.input_port(self.writer, value)
        if taken is not None:
            self.known[value] = taken[0]
            self.inputs.append(taken[1])

    def take(self, node: ir.Node) -> None:
        """Lower one node."""
        if structure.is_standard(node, "QuantizeLinear"):
            self.known[node.outputs[0]] = self.quantized(node)
        elif structure.is_standard(node, "DequantizeLinear"):
            if structure.constant_tensor(node.inputs[0]) is None:
                self.known[node.outputs[0]] = self.dequantized(node)
        elif any(structure.is_float32(value) for value in node.outputs) or self._reads_known(node):
            self.compute(node)
            if self.islands is not None:
                self.islands.keep_shared(node)

    def _reads_known(self, node: ir.Node) -> bool:
        return any(value in self.known for value in node.inputs if value is not None)

    def quantized(self, node: ir.Node) -> Codes:
        """Return a value as the codes that a QuantizeLinear makes of it."""
        value = structure.input_of(node, 0)
        known, grid = self.known.get(value), ports.grid_of(node)
        if known is None:
            refuse(node, f"quantizes '{value.name}', which is no activation", "fold constants first")
        name = str(node.outputs[0].name)
        if is_float(known):
            return stored(self.writer, real(self.writer, known, node), grid, name)
        if isinstance(known, Pending):
            return known.settle(grid, name)
        assert isinstance(known, Codes)
        return self.writer.on_grid(known, grid, name, node)

    def dequantized(self, node: ir.Node) -> Codes:
        """Return what a DequantizeLinear makes of codes: mostly what they were made of."""
        value = structure.input_of(node, 0)
        codes = self.known.get(value)
        if self.islands is not None and isinstance(codes, Rows):
            return self.islands.dequantized_rows(node, codes)
        grid = ports.grid_of(node)
        if not isinstance(codes, Codes):
            refuse(node, f"reads '{value.name}', which is not made of codes", QUANTIZE_IT)
        if codes.grid.same(grid):
            return codes
        if codes.grid.dtype != "int8":
            refuse(node, f"reads {codes.grid.dtype} codes at another scale", "give both the same, or 8 bits")
        return replace(codes, levels=grid.levels())

    def compute(self, node: ir.Node) -> None:
        """Lower a node that computes."""
        if node.domain not in ("", "ai.onnx"):
            refuse(node, f"is of the domain {node.domain}", "only standard ONNX operators have an integer form")
        self._require_shapes(node)
        if self.islands is not None and self.islands.take(node):
            return
        if structure.is_standard(node, "Dropout") and len(node.inputs) > 2:
            refuse(node, "drops values at random", "export the model for inference")
        value = node.inputs[0] if node.inputs else None
        known = self.known.get(value) if value is not None else None
        if structure.is_standard(node, *ports.MOVES) and known is None:
            return  # what reads it says that it is float
        if structure.is_standard(node, "Identity", "Dropout") and known is not None:
            self.known[node.outputs[0]] = known
            return
        if self._clipped(node):
            return
        rule = lower_affine if is_affine(node) else RULES.get(node.op_type)
        if rule is None and node.op_type not in FUNCTIONS:
            refuse(node, "has no integer form", NO_FORM)
        inputs, opset = self.activations(node), self.model.opset_imports.get("", 21)
        result: Known | list[Codes] | None = None
        if rule is not lower_affine:
            result = lower_function(self.writer, node, inputs, opset)
        if result is None:
            if rule is None:
                refuse(node, "is a function of several activations that has no integer form", NO_FORM)
            result = rule(self.writer, node, inputs)
        results = result if isinstance(result, list) else [result]
        self.known.update(zip(node.outputs, results, strict=False))

    def _require_shapes(self, node: ir.Node) -> None:
        for value in node.outputs:
            if not is_known(value):
                refuse(node, f"has the open shape {value.shape}", "fix the shapes of the inputs with --shape")

    def _clipped(self, node: ir.Node) -> bool:
        """Take a Relu or Clip into the operation in front of it, if that still waits for its scale."""
        value = node.inputs[0] if node.inputs else None
        known = self.known.get(value) if value is not None else None
        bounds = bounds_of(node)
        if not isinstance(known, Pending) or bounds is None:
            return False
        self.known[node.outputs[0]] = known.clipped(*bounds)
        return True

    def activations(self, node: ir.Node) -> list[Codes]:
        """Return the inputs of a node that are codes; the others are constants."""
        found = []
        for value in node.inputs:
            if value is None or structure.constant_tensor(value) is not None:
                continue
            known = self.known.get(value)
            if isinstance(known, Pending):
                fact = f"reads '{value.name}' in float, the result of {known.node.op_type} '{known.node.name}'"
                refuse(node, fact, QUANTIZE_IT)
            if isinstance(known, Codes):
                found.append(known if node.op_type in TAKES_MAPS else self.writer.settled(known))
            elif structure.produced_by(value, "DequantizeLinear") is None:
                refuse(node, f"reads '{value.name}' in float", QUANTIZE_IT)
        if not found:
            refuse(node, "reads no activation", "fold constants first")
        return found

    def program(self) -> Program:
        """Close the program at the model's outputs."""
        outputs = tuple(self._output(value) for value in self.model.graph.outputs)
        name = self.model.graph.name or "model"
        writer = self.writer
        written = Program(name, writer.tensors, tuple(writer.operations), tuple(self.inputs), outputs)
        return require_forms(join_tables(written))

    def _output(self, value: ir.Value) -> Port:
        known, producer = self.known.get(value), value.producer()
        if self.islands is not None:
            known = self.islands.output(value)
        if known is None or producer is None:
            fact, remedy = "is a constant or an input handed through", "remove it from the model's outputs"
            if producer is not None:
                raise OperatorError("output of", structure.node_name(producer), fact, remedy)
            raise TargetError(f"output '{value.name}'", fact, remedy)
        if isinstance(known, Pending):
            if known.natural is None or (known.low, known.high) != (-np.inf, np.inf):
                fact = f"leaves the model in float as '{value.name}'"
                refuse(known.node, fact, "quantize its result: a QuantizeLinear and DequantizeLinear behind it")
            known = known.settle(known.natural, str(value.name))
        elif isinstance(known, Codes) and known.levels is not None:
            grid = self._natural(producer, known)
            known = self.writer.on_grid(known, grid, str(value.name), producer)
        assert isinstance(known, Codes)
        known = self.writer.settled(known)
        unsigned = value.dtype in (ir.DataType.UINT8, ir.DataType.UINT16)
        return Port(str(value.name), known.tensor, known.shape, known.order, unsigned)

    def _natural(self, producer: ir.Node, known: Codes) -> Grid:
        assert known.levels is not None
        fixed = {"Sigmoid": Grid(1.0 / 256.0, -128), "Tanh": Grid(1.0 / 128.0, 0)}
        return fixed.get(producer.op_type) or spanning(known.levels)
