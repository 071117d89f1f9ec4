"""Compute in float32 what a model computes in float16: integer kernels want float32 beside them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from qcompile.core import scratch
from qcompile.core.contract import Effect, Refusal, Rewritten
from qcompile.passes import structure

HALF, SINGLE = ir.DataType.FLOAT16, ir.DataType.FLOAT
#: Attributes that hold an element type.
TYPE_ATTRIBUTES = frozenset({
    "dtype", "output_datatype", "output_dtype", "qk_matmul_softmax_precision", "softmax_precision", "stash_type", "to",
})  # fmt: skip
#: Operators that read a value's shape, or cast it: to them its type does not matter.
INDIFFERENT = ("Cast", "Shape", "Size")
NOTE = "The model's float16 is computed in float32, which integer kernels want; inputs and outputs keep their type."


@dataclass(frozen=True)
class WidenFloat16(ir.passes.InPlacePass):
    """Turn float16 into float32 in all graphs; inputs and outputs keep their type behind one Cast each.

    Weights are widened exactly, and what rounded to float16 on the way rounds no more. It is all of the model or
    nothing: what cannot be widened is a refusal.
    """

    effect: ClassVar[Effect] = Effect.CLOSE

    def call(self, model: ir.Model) -> Rewritten:
        """Rewrite in place."""
        if not _inside(model):
            return Rewritten(model, False)
        if reason := next(_obstacles(model), None):
            return Rewritten(model, False, (Refusal("model", f"float16 is not computed in float32: {reason}"),))
        taken = {value.name for graph in model.graphs() for value in _values(graph)}
        kept = {*_cast_outputs(model.graph, taken), *_cast_inputs(model.graph, taken)}
        for graph in model.graphs():
            for value in _values(graph):
                if value not in kept:
                    _widen_value(value)
            for node in graph:
                if node.outputs[0] not in kept:
                    _widen_attributes(node)
        return Rewritten(model, True, notes=(NOTE,))


def computes_in_float16(model: ir.Model) -> bool:
    """Tell whether results round to float16 on the way; inputs, outputs and weights may be stored so all the same."""
    inner = (node for function in model.functions.values() for node in function.all_nodes())
    return any(map(_rounds, chain(model.graph.all_nodes(), inner)))


def _rounds(node: ir.Node) -> bool:
    if structure.is_standard(node, "Constant"):
        return False
    if structure.is_standard(node, "Cast"):
        return _holds_half(node) and not _is_constant(node.inputs[0]) and not node.outputs[0].is_graph_output()
    return not structure.is_standard(node, *INDIFFERENT) and (
        _holds_half(node) or any(map(_is_half, (*node.inputs, *node.outputs))) or any(map(_is_made_half, node.inputs))
    )


def _is_constant(value: ir.Value | None) -> bool:
    return structure.constant_tensor(value) is not None or structure.produced_by(value, "Constant") is not None


def _is_made_half(value: ir.Value | None) -> bool:
    """Tell whether a value is float16 by the attribute of its node: types may not be inferred yet."""
    node = structure.produced_by(value, "Cast", "Constant")
    return node is not None and _holds_half(node)


def _inside(model: ir.Model) -> bool:
    """Tell whether there is float16 anywhere but in front of the inputs' Casts and behind the outputs'."""
    main = model.graph
    for node in main.all_nodes():
        outward = structure.is_standard(node, "Cast") and node.outputs[0] in main.outputs and not node.outputs[0].uses()
        if not outward and (_holds_half(node) or any(map(_is_half, node.outputs))):
            return True
        inward = structure.is_standard(node, *INDIFFERENT)
        if any(_is_half(value) and not (inward and _stays(value, main)) for value in node.inputs if value is not None):
            return True
    return False


def _stays(value: ir.Value, main: ir.Graph) -> bool:
    """Tell whether a value is part of the interface and no node makes it."""
    return value.graph is main and value.producer() is None and (value.is_graph_input() or value.is_graph_output())


def _obstacles(model: ir.Model) -> Iterator[str]:
    """Yield why a model cannot be widened."""
    if model.functions:
        yield "it has functions that are not inlined"
    for value in (*model.graph.inputs, *model.graph.outputs):
        if value.type is not None and not isinstance(value.type, ir.TensorType) and _half_inside(value.type):
            yield f"'{value.name}' is no tensor and keeps its type"
    for node in model.graph.all_nodes():
        touched = any(map(_is_half, (*node.inputs, *node.outputs)))
        if touched and node.domain not in ("", "ai.onnx"):
            yield f"{node.op_type} of {node.domain} may need it"
        if structure.is_standard(node, "BitCast") and (touched or _holds_half(node)):
            yield "BitCast reads or writes its bits"
        kinds = (ir.AttributeType.TYPE_PROTO, ir.AttributeType.TYPE_PROTOS, ir.AttributeType.SPARSE_TENSOR)
        if any(attribute.type in kinds for attribute in node.attributes.values()):
            yield f"{node.op_type} has a type as an attribute"


def _cast_inputs(main: ir.Graph, taken: set[str | None]) -> list[ir.Value]:
    """Let readers of float16 inputs, and of constants that are outputs, read a float32 copy; return what stays."""
    ends = dict.fromkeys((*main.inputs, *main.outputs))
    kept = [value for value in ends if _is_half(value) and _stays(value, main)]
    for value in kept:
        uses = [use for use in value.uses() if not structure.is_standard(use.node, *INDIFFERENT)]
        inner = [graph for graph in _subgraphs(main) if value in graph.outputs]
        if not uses and not inner:
            continue
        cast = _cast(value, SINGLE, _free(f"{value.name}_float32", taken))
        if len(main):
            main.insert_before(main[0], cast)
        for use in uses:
            use.node.replace_input_with(use.idx, cast.outputs[0])
        for graph in inner:
            graph.outputs[:] = [cast.outputs[0] if output is value else output for output in graph.outputs]
    return kept


def _cast_outputs(main: ir.Graph, taken: set[str | None]) -> list[ir.Value]:
    """Cast to the float16 outputs at the end, from float32 values under other names; return the outputs."""
    kept: dict[ir.Value, ir.Value] = {}
    for value in main.outputs:
        if not _is_half(value) or _stays(value, main) or value in kept:
            continue
        cast = _cast(value, HALF, None)
        output, name = cast.outputs[0], value.name
        output.shape, value.name = value.shape, _free(f"{name}_float32", taken)
        output.name = name
        main.append(cast)
        kept[value] = output
    main.outputs[:] = [kept.get(value, value) for value in main.outputs]
    return list(kept.values())


def _cast(value: ir.Value, dtype: ir.DataType, name: str | None) -> ir.Node:
    node = ir.node("Cast", [value], {"to": dtype})
    node.outputs[0].name, node.outputs[0].type, node.outputs[0].shape = name, ir.TensorType(dtype), value.shape
    return node


def _free(name: str, taken: set[str | None]) -> str:
    while name in taken:
        name += "_"
    taken.add(name)
    return name


def _subgraphs(main: ir.Graph) -> Iterator[ir.Graph]:
    return (graph for graph in main.subgraphs() if graph is not main)


def _values(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from graph.inputs
    yield from graph.initializers.values()
    for node in graph:
        yield from node.outputs


def _is_half(value: ir.Value | None) -> bool:
    return value is not None and value.type is not None and _half_inside(value.type)


def _half_inside(type_: ir.TypeProtocol) -> bool:
    return type_.dtype is HALF  # a sequence answers for its elements


def _holds_half(node: ir.Node) -> bool:
    """Tell whether an attribute names float16, or holds numbers of it."""
    return any(_names_half(attribute) or _is_half_tensor(attribute) for attribute in node.attributes.values())


def _names_half(attribute: ir.Attr) -> bool:
    return attribute.name in TYPE_ATTRIBUTES and attribute.type is ir.AttributeType.INT and attribute.value == HALF


def _is_half_tensor(attribute: ir.Attr) -> bool:
    return attribute.type is ir.AttributeType.TENSOR and attribute.as_tensor().dtype is HALF


def _widen_value(value: ir.Value) -> None:
    if value.type is not None and _half_inside(value.type):
        value.type = _widened(value.type)
    tensor = value.const_value
    if tensor is not None and tensor.dtype is HALF:
        value.const_value = scratch.tensor(tensor.numpy().astype(np.float32), value.name)


def _widened(type_: ir.TypeProtocol) -> ir.TypeProtocol:
    """Return the same type of float32: a new one, since copies of a model share their types."""
    if isinstance(type_, ir.SequenceType):
        return ir.SequenceType(_widened(type_.elem_type))
    return ir.OptionalType(_widened(type_.elem_type)) if isinstance(type_, ir.OptionalType) else ir.TensorType(SINGLE)


def _widen_attributes(node: ir.Node) -> None:
    if not structure.is_standard(node, node.op_type):
        return
    for attribute in list(node.attributes.values()):
        if _names_half(attribute):
            node.attributes[attribute.name] = ir.AttrInt64(attribute.name, int(SINGLE))
        elif _is_half_tensor(attribute):
            array = attribute.as_tensor().numpy().astype(np.float32)
            node.attributes[attribute.name] = ir.AttrTensor(attribute.name, ir.tensor(array))
