"""Apply the plan: wrap every planned value in QuantizeLinear and DequantizeLinear."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompile.core import numerics, scratch
from qcompile.core.contract import Effect
from qcompile.core.plan import Precision, QuantPlan, Role, TensorQuant
from qcompile.passes import structure
from qcompile.passes.round_weights import RoundWeights


@dataclass(frozen=True)
class InsertQdq(ir.passes.InPlacePass):
    """Wrap every planned value in QuantizeLinear and DequantizeLinear.

    A value that leaves an integer operator as codes is dequantized for all its readers, since its kernel has no float
    result to give; any other value only for the integer ones. Weights and biases become codes with a
    DequantizeLinear; a table's rows are dequantized behind the lookup.

    Parameters
    ----------
    plan : QuantPlan
    rounded : RoundWeights, optional
        What gives weights other codes than the nearest at once: where these alone, in four bits, would leave too little
        of the outputs.
    """

    plan: QuantPlan
    rounded: RoundWeights | None = None
    effect: ClassVar[Effect] = Effect.LOSSY

    def requires(self, model: ir.Model) -> None:
        """Refuse a plan that was made for another graph."""
        known = {structure.node_name(node) for node in model.graph.all_nodes()}
        if missing := sorted(set(self.plan.ops) - known):
            raise ir.passes.PreconditionError(f"the plan names node '{missing[0]}', which the model does not have")
        if missing := sorted(set(self.plan.tensors) - set(ir.convenience.create_value_mapping(model.graph))):
            raise ir.passes.PreconditionError(f"the plan names tensor '{missing[0]}', which the model does not have")
        if self.plan.tensors and (missing := sorted(known - set(self.plan.ops))):
            raise ir.passes.PreconditionError(f"the plan does not say what becomes of node '{missing[0]}'")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite in place; a plan without tensors (nothing to quantize, or a model that is) changes nothing."""
        if not self.plan.tensors:
            return ir.passes.PassResult(model, False)
        writer = _Writer(model, self.plan)
        nodes = list(model.graph)
        values = ir.convenience.create_value_mapping(model.graph)
        # In the order that JSON has as well: a plan read back gives the same bytes.
        for name, quant in sorted(self.plan.tensors.items()):
            if quant.role is Role.ACTIVATION:
                writer.wrap_activation(values[name], quant)
        for node in nodes:
            precision = self.plan.ops[structure.node_name(node)].precision
            if precision is not Precision.FLOAT:
                writer.store_weights(node)
            if precision is Precision.INTEGER:
                writer.store_bias(node)
        model.graph.sort()
        _drop_unread(model)
        if self.rounded is not None:
            self.rounded(model)
        return ir.passes.PassResult(model, True)


def dequantized_name(name: str) -> str:
    """Return the name of the value that stands for `name` behind its Q/DQ pair."""
    return f"{name}_dequantized"


def quantized_name(name: str) -> str:
    """Return the name of a value's codes."""
    return f"{name}_quantized"


def bias_scale(node: ir.Node) -> npt.NDArray[np.float32]:
    """Return what one step of an integer operator's accumulator stands for: activation scale · weight scale.

    One value, or one per output channel.
    """
    return _scale_of(node.inputs[0]) * _scale_of(node.inputs[structure.WEIGHT_INPUT])


def _scale_of(value: ir.Value | None) -> npt.NDArray[np.float32]:
    """Return the scale of the DequantizeLinear that produces a value."""
    producer = value.producer() if value is not None else None
    assert producer is not None and producer.op_type == "DequantizeLinear"
    scale = structure.constant(producer.inputs[1])
    assert scale is not None
    return scale


class QdqWriter:
    """Writes codes, parameters and Q/DQ nodes into one graph, under names that the model's own values do not have.

    Nodes are appended: the graph must be sorted afterwards.
    """

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self.taken = set(ir.convenience.create_value_mapping(graph))

    def _free(self, name: str) -> str:
        """Return a name that the model's own values do not have."""
        while name in self.taken:
            name += "_"
        self.taken.add(name)
        return name

    def write_bias(self, node: ir.Node, bias: npt.NDArray[Any]) -> None:
        """Give an integer operator a bias as int32 codes in steps of (activation scale · weight scale).

        Parameters
        ----------
        node : onnx_ir.Node
            One of `structure.BIASED_OPS` whose activation and weights come from DequantizeLinear.
        bias : ndarray of float, shape (channels,)
        """
        scale = np.broadcast_to(bias_scale(node), bias.shape)
        zero_point = np.zeros(bias.shape, np.int32)
        codes = numerics.quantize(bias, scale, zero_point, "int32", 0)
        # The node's name: two operators may share a bias, but not the steps that it is counted in.
        name = f"{structure.node_name(node)}_bias"
        parameters = [self._initializer(f"{name}_scale", np.array(scale)),
                      self._initializer(f"{name}_zero_point", zero_point)]  # fmt: skip
        stored = self._initializer(quantized_name(name), codes)
        real = self._dequantize(stored, parameters, dequantized_name(name), ir.Shape(bias.shape), 0)
        if len(node.inputs) <= structure.BIAS_INPUT:
            node.resize_inputs(structure.BIAS_INPUT + 1)
        node.replace_input_with(structure.BIAS_INPUT, real)

    def _initializer(self, name: str, array: npt.NDArray[Any]) -> ir.Value:
        name = self._free(name)
        value = ir.Value(name=name, const_value=scratch.tensor(np.asarray(array, order="C"), name))
        value.shape = ir.Shape(array.shape)
        value.dtype = ir.DataType.from_numpy(array.dtype)
        self.graph.register_initializer(value)
        return value

    def _dequantize(
        self, codes: ir.Value, parameters: list[ir.Value], name: str, shape: ir.Shape | None, axis: int | None
    ) -> ir.Value:
        # Axis is ignored for a scalar scale; writing it only where it counts keeps the graph readable.
        attributes = {} if axis is None or parameters[0].shape == () else {"axis": axis}
        return self._node("DequantizeLinear", [codes, *parameters], name, shape, "float32", attributes)

    def _node(
        self,
        op_type: str,
        inputs: list[ir.Value],
        output: str,
        shape: ir.Shape | None,
        dtype: str,
        attributes: dict[str, int] | None = None,
        results: int = 1,
    ) -> ir.Value:
        output = self._free(output)
        node = ir.node(op_type, inputs, attributes or {}, num_outputs=results, name=f"{output}_{op_type}")
        value = node.outputs[0]
        value.name = output
        value.shape = shape
        value.dtype = ir.DataType.from_numpy(np.dtype(dtype))
        self.graph.append(node)
        return value


class _Writer(QdqWriter):
    """Writes what a plan says into one model."""

    def __init__(self, model: ir.Model, plan: QuantPlan) -> None:
        super().__init__(model.graph)
        self.plan = plan
        #: What is stored once however many operators read it, by the name that it is derived from.
        self.stored: dict[str, ir.Value] = {}
        self.leaving = {op.output for op in plan.ops.values() if op.output}

    def wrap_activation(self, value: ir.Value, quant: TensorQuant) -> None:
        """Insert Q → DQ behind an activation; where its range is that of each run, the Q tells it."""
        name = structure.name_of(value)
        users = [
            (node, index) for node, index in value.uses() if name in self.leaving or self._reads_codes(node, value)
        ]
        if quant.is_dynamic:
            codes, *parameters = self._dynamic(value)
        else:
            parameters = self._parameters(name, quant)
            codes = self._node("QuantizeLinear", [value, *parameters], quantized_name(name), value.shape, quant.dtype)
        real = self._dequantize(codes, parameters, dequantized_name(name), value.shape, None)
        for node, index in users:
            node.replace_input_with(index, real)
        if value.is_graph_output() and name in self.leaving:
            outputs = self.graph.outputs
            # The model's interface keeps its names: the float value that nobody reads any more gives its own away.
            value.name = self._free(f"{name}_float")
            real.name = name
            for index, output in enumerate(outputs):
                if output is value:
                    outputs[index] = real

    def _dynamic(self, value: ir.Value) -> tuple[ir.Value, ...]:
        """Return codes, scale and zero point by a DynamicQuantizeLinear."""
        name = structure.name_of(value)
        codes = self._node("DynamicQuantizeLinear", [value], quantized_name(name), value.shape, "uint8", results=3)
        node = codes.producer()
        assert node is not None
        scale, zero_point = node.outputs[1:]
        scale.name, scale.dtype, scale.shape = self._free(f"{name}_scale"), ir.DataType.FLOAT, ir.Shape(())
        zero_point.name, zero_point.dtype = self._free(f"{name}_zero_point"), ir.DataType.UINT8
        zero_point.shape = ir.Shape(())
        return codes, scale, zero_point

    def _reads_codes(self, node: ir.Node, value: ir.Value) -> bool:
        op = self.plan.ops.get(node.name or "")
        return op is not None and op.precision is Precision.INTEGER and value in structure.activation_inputs(node)

    def store_weights(self, node: ir.Node) -> None:
        """Replace a node's constant weights by codes."""
        for index, value in enumerate(node.inputs):
            if value is None or structure.constant_tensor(value) is None:
                continue
            quant = self.plan.tensors.get(structure.name_of(value))
            if quant is None or quant.role is not Role.WEIGHT:
                continue
            codes, parameters = self._weight_codes(value, quant)
            if node.op_type == "Gather":
                self._dequantize_behind(node, index, codes, parameters)
                continue
            real = self.stored.get(dequantized_name(structure.name_of(value)))
            if real is None:
                name = dequantized_name(structure.name_of(value))
                real = self._dequantize(codes, parameters, name, value.shape, quant.axis)
                self.stored[name] = real
            node.replace_input_with(index, real)

    def _dequantize_behind(self, node: ir.Node, index: int, codes: ir.Value, parameters: list[ir.Value]) -> None:
        """Look codes up and dequantize only the rows that were asked for."""
        rows = node.outputs[0]
        uses = list(rows.uses())
        node.replace_input_with(index, codes)
        name = structure.name_of(rows)
        last = len(rows.shape) - 1 if rows.shape is not None else -1
        real = self._dequantize(rows, parameters, dequantized_name(name), rows.shape, last)
        # A new type object: clones of a model share the old one.
        rows.type = codes.type
        for user, position in uses:
            user.replace_input_with(position, real)
        if rows.is_graph_output():
            outputs = self.graph.outputs
            rows.name, real.name = self._free(quantized_name(name)), name
            for index, output in enumerate(outputs):
                if output is rows:
                    outputs[index] = real

    def store_bias(self, node: ir.Node) -> None:
        """Replace an integer operator's constant bias, where it has one, by codes."""
        if node.op_type not in structure.BIASED_OPS or len(node.inputs) <= structure.BIAS_INPUT:
            return
        bias = structure.constant(node.inputs[structure.BIAS_INPUT])
        if bias is not None:
            self.write_bias(node, bias)

    def _weight_codes(self, value: ir.Value, quant: TensorQuant) -> tuple[ir.Value, list[ir.Value]]:
        name = structure.name_of(value)
        weight = structure.constant(value)
        assert weight is not None
        codes = self._once(quantized_name(name), quant.quantize(weight))
        return codes, self._parameters(name, quant)

    def _once(self, name: str, array: npt.NDArray[Any]) -> ir.Value:
        if name not in self.stored:
            self.stored[name] = self._initializer(name, array)
        return self.stored[name]

    def _parameters(self, name: str, quant: TensorQuant) -> list[ir.Value]:
        shape: tuple[int, ...] = () if quant.axis is None else (len(quant.scale),)
        zero_point = quant.zero_points.astype(quant.dtype)
        return [
            self._once(f"{name}_scale", quant.scales.reshape(shape)),
            self._once(f"{name}_zero_point", zero_point.reshape(shape)),
        ]


def _drop_unread(model: ir.Model) -> None:
    """Remove float weights that codes have replaced."""
    for name, value in list(model.graph.initializers.items()):
        if not value.uses() and not value.is_graph_output() and not value.is_graph_input():
            del model.graph.initializers[name]
