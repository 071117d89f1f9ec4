"""Write a QDQ model in the forms that ONNX Runtime runs fastest, without changing what it computes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common_passes

from qcompile.core import model as models
from qcompile.core import numerics
from qcompile.core.contract import Effect
from qcompile.passes import structure
from qcompile.passes.patterns.activations import Activation, ActivationKind, activations

#: Operators for which the runtime has a kernel that reads integer weights itself, given a DequantizeLinear.
READS_INTEGER_WEIGHTS = frozenset({"MatMul"})
#: The first opset that has Gelu.
GELU_OPSET = 20


@dataclass(frozen=True)
class UnpackWeightsAtLoad(ir.passes.InPlacePass):
    """Turn the DequantizeLinear of a float operator's weights into Cast · Mul, which the runtime folds when it loads.

    ONNX Runtime leaves a DequantizeLinear of a constant alone, so that Q/DQ patterns can be recognised, and then
    computes it anew in every run: a Conv with integer weights and float activations takes 1.4 times float's time. A
    Cast and a Mul of constants are folded into plain float weights once: float's speed, integer's size on disk.
    """

    effect: ClassVar[Effect] = Effect.EXACT

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite in place."""
        modified = False
        for node in list(model.graph):
            if structure.is_standard(node, "DequantizeLinear") and _feeds_float_operators(node):
                _unpack(model.graph, node)
                modified = True
        common_passes.RemoveUnusedNodesPass()(model)
        return ir.passes.PassResult(model, modified)


@dataclass(frozen=True)
class KeepMatMulFromGemm(ir.passes.InPlacePass):
    """Store the constant behind an integer MatMul as [1, N], which MatMulAddFusion does not recognise.

    With static shapes ONNX Runtime turns MatMul and Add into Reshape, Gemm, Reshape before it looks for Q/DQ, and the
    Gemm then runs in float with its weights dequantized in every run: MiniLM-L6 takes 3.2 times float's time. With open
    axes it does not, and the constant stays as it is: fusions of a bias with what is behind it want [N].
    """

    effect: ClassVar[Effect] = Effect.EXACT

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite in place."""
        modified = False
        for node in model.graph:
            if structure.is_standard(node, "MatMul") and _is_dequantized_activation(node.inputs[0]):
                for reader, index in list(node.outputs[0].uses()):
                    if _would_be_fused(node, reader):
                        modified |= _store_as_row(model.graph, reader, 1 - index)
        common_passes.RemoveUnusedNodesPass()(model)
        return ir.passes.PassResult(model, modified)


@dataclass(frozen=True)
class JoinGelu(ir.passes.InPlacePass):
    """Write GELU of several operators as one (opset 20): its kernel reads and writes each element once.

    ONNX Runtime joins it by itself only where its ½ has not gone into the weights behind it.
    """

    effect: ClassVar[Effect] = Effect.CLOSE

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite in place."""
        found = [one for one in activations(model.graph)
                 if one.kind is ActivationKind.GELU and len(one.nodes) > 1 and not one.shared
                 and structure.is_float32(one.source)]  # fmt: skip
        if models.opset(model) < GELU_OPSET:
            return ir.passes.PassResult(model, False)
        for one in found:
            _join_gelu(model.graph, one)
        common_passes.RemoveUnusedNodesPass()(model)
        return ir.passes.PassResult(model, bool(found))


def _join_gelu(graph: ir.Graph, one: Activation) -> None:
    last, name = one.result.producer(), structure.name_of(one.result)
    assert last is not None
    new = [ir.node("Gelu", [one.source], name=f"{name}_Gelu")]
    if one.factor != 1.0:
        factor = ir.Value(name=f"{name}_factor", const_value=ir.tensor(np.float32(one.factor), name=f"{name}_factor"))
        graph.register_initializer(factor)
        new[0].outputs[0].name = f"{name}_unscaled"
        new.append(ir.node("Mul", [new[0].outputs[0], factor], name=f"{name}_Mul"))
    ir.convenience.replace_nodes_and_values(graph, last, [last], new, [one.result], [new[-1].outputs[0]])


def _would_be_fused(node: ir.Node, reader: ir.Node) -> bool:
    shape = node.outputs[0].shape
    return structure.is_standard(reader, "Add") and shape is not None and len(shape) > 2 and shape.is_static()


def _store_as_row(graph: ir.Graph, node: ir.Node, index: int) -> bool:
    value = node.inputs[index]
    array = structure.constant(value)
    if value is None or array is None or array.ndim != 1:
        return False
    name = f"{structure.name_of(value)}_{structure.node_name(node)}_row"
    row = ir.Value(name=name, const_value=ir.tensor(array.reshape(1, -1), name=name))
    graph.register_initializer(row)
    node.replace_input_with(index, row)
    return True


def _feeds_float_operators(node: ir.Node) -> bool:
    """Tell whether a DequantizeLinear unpacks constant weights for operators whose other operands are float."""
    codes = structure.constant_tensor(node.inputs[0])
    zero_point = structure.constant(node.inputs[2]) if len(node.inputs) > 2 else None
    # Only symmetric int8 weights: biases (int32) and shifted codes belong to integer operators.
    if codes is None or codes.dtype is not ir.DataType.INT8 or zero_point is None or np.any(zero_point):
        return False
    readers = structure.readers(node.outputs[0])
    return bool(readers) and all(_is_float_operator(reader) for reader in readers)


def _is_float_operator(node: ir.Node) -> bool:
    if node.op_type in READS_INTEGER_WEIGHTS:
        return False
    return not any(_is_dequantized_activation(value) for value in node.inputs)


def _is_dequantized_activation(value: ir.Value | None) -> bool:
    producer = value.producer() if value is not None else None
    if producer is None or producer.op_type != "DequantizeLinear":
        return False
    return structure.constant_tensor(producer.inputs[0]) is None


def _unpack(graph: ir.Graph, node: ir.Node) -> None:
    codes, scale = node.inputs[0], structure.constant(node.inputs[1])
    assert codes is not None and codes.shape is not None and scale is not None
    axis = node.attributes.get_int("axis", 1) if scale.ndim else None
    name = structure.name_of(node.outputs[0])
    factor = numerics.along_axis(scale, axis, len(codes.shape))
    stored = ir.Value(name=f"{name}_factor", const_value=ir.tensor(factor, name=f"{name}_factor"))
    graph.register_initializer(stored)
    cast = ir.node("Cast", [codes], {"to": ir.DataType.FLOAT}, name=f"{name}_Cast")
    cast.outputs[0].name = f"{name}_codes"
    product = ir.node("Mul", [cast.outputs[0], stored], name=f"{name}_Mul")
    product.outputs[0].shape, product.outputs[0].dtype = node.outputs[0].shape, ir.DataType.FLOAT
    graph.insert_before(node, [cast, product])
    ir.convenience.replace_all_uses_with(node.outputs[0], product.outputs[0])
    graph.remove(node, safe=True)
    product.outputs[0].name = name
