"""Q/DQ where TensorRT fuses them: not between a Conv and the Add behind it, and in front of a Concat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir
import onnx_ir.passes.common as common_passes

from qcompile.core import scratch
from qcompile.core.contract import Effect
from qcompile.passes import structure


@dataclass(frozen=True)
class FloatBiases(ir.passes.InPlacePass):
    """Write biases as floats: TensorRT dequantizes no int32, and adds a float to the accumulator's real value."""

    effect: ClassVar[Effect] = Effect.CLOSE

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite in place."""
        modified = False
        for node in list(model.graph):
            codes = (
                structure.constant_tensor(node.inputs[0]) if structure.is_standard(node, "DequantizeLinear") else None
            )
            if codes is None or codes.dtype is not ir.DataType.INT32:
                continue
            scale = structure.constant(node.inputs[1])
            assert scale is not None
            value, name = node.outputs[0], structure.name_of(node.outputs[0])
            array = (codes.numpy().astype("float64") * scale.astype("float64")).astype("float32")
            stored = ir.Value(name=f"{name}_float", const_value=scratch.tensor(array, f"{name}_float"))
            stored.dtype, stored.shape = ir.DataType.FLOAT, ir.Shape(array.shape)
            model.graph.register_initializer(stored)
            ir.convenience.replace_all_uses_with(value, stored)
            model.graph.remove(node, safe=True)
            modified = True
        common_passes.RemoveUnusedNodesPass()(model)
        return ir.passes.PassResult(model, modified)


@dataclass(frozen=True)
class DequantizeTables(ir.passes.InPlacePass):
    """Dequantize a table in front of its lookup instead of the rows behind it: there is no lookup of codes.

    It is unpacked when the model is loaded then, and the rows are the same numbers.
    """

    effect: ClassVar[Effect] = Effect.EXACT

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite in place."""
        modified = False
        for node in list(model.graph):
            table = structure.constant_tensor(node.inputs[0]) if structure.is_standard(node, "Gather") else None
            if table is None or table.dtype is not ir.DataType.INT8 or len(table.shape) < 2:
                continue
            behind = structure.only_reader(node.outputs[0])
            scale = structure.constant(behind.inputs[1]) if behind is not None else None
            along = node.attributes.get_int("axis", 0) % len(table.shape)
            if behind is None or not structure.is_standard(behind, "DequantizeLinear") or scale is None:
                continue
            if scale.ndim and along == len(table.shape) - 1:
                continue  # the axis of the scales is the one that is looked up
            _dequantize_in_front(model.graph, node, behind, len(table.shape) - 1)
            modified = True
        return ir.passes.PassResult(model, modified)


def _dequantize_in_front(graph: ir.Graph, lookup: ir.Node, behind: ir.Node, axis: int) -> None:
    table, rows, real = structure.input_of(lookup, 0), lookup.outputs[0], behind.outputs[0]
    name = structure.name_of(real)
    made = ir.node(
        "DequantizeLinear", [table, *behind.inputs[1:]], {"axis": axis}, name=f"{name}_table_DequantizeLinear"
    )
    made.outputs[0].name, made.outputs[0].shape = f"{name}_table", table.shape
    made.outputs[0].dtype = ir.DataType.FLOAT
    graph.insert_before(lookup, made)
    lookup.replace_input_with(0, made.outputs[0])
    rows.type = ir.TensorType(ir.DataType.FLOAT)
    ir.convenience.replace_all_uses_with(real, rows, replace_graph_outputs=True)
    graph.remove(behind, safe=True)
    rows.name = name


@dataclass(frozen=True)
class FreeResiduals(ir.passes.InPlacePass):
    """Take the Q/DQ away that stand between a Conv and the Add that its kernel does as it goes.

    The other operand of the Add stays quantized, without which the sum is no part of the Conv's kernel. What is taken
    away was a rounding: the result is nearer to float's.
    """

    effect: ClassVar[Effect] = Effect.LOSSY

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite in place."""
        modified = False
        for node in list(model.graph):
            if structure.is_standard(node, "Add") and (found := _quantized_product(node)) is not None:
                index, source = found
                node.replace_input_with(index, source)
                modified = True
        common_passes.RemoveUnusedNodesPass()(model)
        return ir.passes.PassResult(model, modified)


def _quantized_product(node: ir.Node) -> tuple[int, ir.Value] | None:
    """Return which operand of an Add is a Conv's result behind Q/DQ of its own, and that result."""
    sources = [_behind_pair(value) for value in node.inputs]
    if len(sources) != 2 or any(source is None for source in sources):
        return None
    for index, source in enumerate(sources):
        made = structure.produced_by(source, "Conv")
        if source is None or made is None or structure.produced_by(made.inputs[0], "DequantizeLinear") is None:
            continue
        pair = structure.produced_by(node.inputs[index], "DequantizeLinear")
        assert pair is not None
        quantizer = pair.inputs[0].producer() if pair.inputs[0] is not None else None
        if structure.only_reader(source) is quantizer and structure.only_reader(pair.outputs[0]) is node:
            return index, source
    return None


def _behind_pair(value: ir.Value | None) -> ir.Value | None:
    """Return what a value was before it went through Q and DQ, None where it did not."""
    dequantizer = structure.produced_by(value, "DequantizeLinear")
    quantizer = structure.produced_by(dequantizer.inputs[0], "QuantizeLinear") if dequantizer is not None else None
    return None if quantizer is None else quantizer.inputs[0]


@dataclass(frozen=True)
class QuantizeConcats(ir.passes.InPlacePass):
    """Repeat the Q/DQ behind a Concat in front of it: each operand leaves its kernel as codes, which are only moved.

    Rounding a second time to the same grid changes nothing.
    """

    effect: ClassVar[Effect] = Effect.EXACT

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite in place."""
        modified = False
        for node in list(model.graph):
            if not structure.is_standard(node, "Concat"):
                continue
            quantizer = structure.only_reader(node.outputs[0])
            if quantizer is None or not structure.is_standard(quantizer, "QuantizeLinear"):
                continue
            for index, value in enumerate(node.inputs):
                if value is None or structure.constant_tensor(value) is not None or _same_pair(value, quantizer):
                    continue
                node.replace_input_with(index, _pair(model.graph, node, index, value, quantizer))
                modified = True
        return ir.passes.PassResult(model, modified)


def _same_pair(value: ir.Value, quantizer: ir.Node) -> bool:
    """Tell whether a value comes from Q/DQ of the parameters that another Q has."""
    dequantizer = structure.produced_by(value, "DequantizeLinear")
    return dequantizer is not None and list(dequantizer.inputs[1:]) == list(quantizer.inputs[1:])


def _pair(graph: ir.Graph, node: ir.Node, index: int, value: ir.Value, like: ir.Node) -> ir.Value:
    name, parameters = f"{structure.node_name(node)}_{index}", like.inputs[1:]
    codes = ir.node("QuantizeLinear", [value, *parameters], name=f"{name}_QuantizeLinear")
    codes.outputs[0].name, codes.outputs[0].shape = f"{name}_quantized", value.shape
    codes.outputs[0].type = like.outputs[0].type
    real = ir.node("DequantizeLinear", [codes.outputs[0], *parameters], name=f"{name}_DequantizeLinear")
    real.outputs[0].name, real.outputs[0].shape = f"{name}_dequantized", value.shape
    real.outputs[0].dtype = ir.DataType.FLOAT
    graph.insert_before(node, [codes, real])
    return real.outputs[0]
