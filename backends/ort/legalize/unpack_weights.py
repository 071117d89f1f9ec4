"""Let ONNX Runtime unpack the integer weights of float operators once, when it loads the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common_passes

from qcompile.core import numerics
from qcompile.core.contract import Effect
from qcompile.passes import structure

#: Types of weights; int32 is for biases.
WEIGHTS = (ir.DataType.INT8, ir.DataType.INT16)
#: What makes codes of activations.
QUANTIZERS = ("QuantizeLinear", "DynamicQuantizeLinear")


@dataclass(frozen=True)
class UnpackWeightsAtLoad(ir.passes.InPlacePass):
    """Turn the DequantizeLinear of a float operator's weights into Cast · Mul, which the runtime folds when it loads.

    ONNX Runtime leaves a DequantizeLinear of a constant alone, so that Q/DQ patterns can be recognised, and then
    computes it anew in every run: a Conv with integer weights and float activations takes 1.4 times float's time. A
    Cast and a Mul of constants are folded into plain float weights once: float's speed, integer's size on disk.

    Of a MatMul with float activations it makes MatMulNBits, which rounds these to codes. Where other operators have
    codes, this one was left in float so as not to have them, and its weights are unpacked too.

    Parameters
    ----------
    leave_float : bool
        Every kernel on codes may leave in float, so that only operators with float activations are float operators.
    """

    leave_float: bool = False
    effect: ClassVar[Effect] = Effect.EXACT

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite in place."""
        modified = False
        spared = any(structure.is_standard(node, *QUANTIZERS) for node in model.graph)
        for node in list(model.graph):
            if structure.is_standard(node, "DequantizeLinear"):
                readers = _float_operators(node, spared, self.leave_float)
                _unpack(model.graph, node, readers)
                modified |= bool(readers)
        common_passes.RemoveUnusedNodesPass()(model)
        return ir.passes.PassResult(model, modified)


def _float_operators(node: ir.Node, spared: bool, leave_float: bool) -> list[ir.Node]:
    """Return the operators that read constant weights of a DequantizeLinear and whose other operands are to stay float.

    Where others read these codes as codes, they stay for all; but for what knows no codes of weights alone.
    """
    codes = structure.constant_tensor(node.inputs[0])
    zero_point = structure.constant(node.inputs[2]) if len(node.inputs) > 2 else None
    # Shifted codes belong to integer operators.
    if codes is None or codes.dtype not in WEIGHTS or zero_point is None or np.any(zero_point):
        return []
    readers = structure.readers(node.outputs[0])
    found = [reader for reader in readers if _is_float_operator(reader, codes, spared, leave_float)]
    return found if leave_float or len(found) == len(readers) else []


def _is_float_operator(node: ir.Node, codes: ir.TensorProtocol, spared: bool, leave_float: bool) -> bool:
    """Tell whether an operator is to have weights in float: no kernel reads codes of them, or it rounds more."""
    if codes.dtype is not ir.DataType.INT8:
        return True
    if leave_float:
        return not any(_is_dequantized_activation(value) for value in node.inputs)
    product = node.op_type == "MatMul" and len(codes.shape) == 2
    if not any(_is_dequantized_activation(value) for value in node.inputs):
        return spared or not product
    return node.op_type == "Conv" and not leaves_as_codes(node.outputs[0])


def leaves_as_codes(value: ir.Value) -> bool:
    """Tell whether a result is quantized, behind the activation that an integer kernel absorbs: it has no other."""
    behind = structure.readers(value)
    if len(behind) == 1 and structure.is_standard(behind[0], "Relu", "Clip"):
        behind = structure.readers(behind[0].outputs[0])
    return any(structure.is_standard(node, "QuantizeLinear") for node in behind)


def _is_dequantized_activation(value: ir.Value | None) -> bool:
    producer = value.producer() if value is not None else None
    if producer is None or producer.op_type != "DequantizeLinear":
        return False
    return structure.constant_tensor(producer.inputs[0]) is None


def _unpack(graph: ir.Graph, node: ir.Node, readers: Sequence[ir.Node]) -> None:
    """Give some of a DequantizeLinear's readers its result as Cast · Mul."""
    if not readers:
        return
    codes, scale = node.inputs[0], structure.constant(node.inputs[1])
    assert codes is not None and codes.shape is not None and scale is not None
    axis = node.attributes.get_int("axis", 1) if scale.ndim else None
    kept = len(readers) < len(structure.readers(node.outputs[0]))
    name = f"{structure.name_of(node.outputs[0])}{'_float' if kept else ''}"
    factor = numerics.along_axis(scale, axis, len(codes.shape))
    stored = ir.Value(name=f"{name}_factor", const_value=ir.tensor(factor, name=f"{name}_factor"))
    graph.register_initializer(stored)
    cast = ir.node("Cast", [codes], {"to": ir.DataType.FLOAT}, name=f"{name}_Cast")
    cast.outputs[0].name = f"{name}_codes"
    product = ir.node("Mul", [cast.outputs[0], stored], name=f"{name}_Mul")
    product.outputs[0].shape, product.outputs[0].dtype = node.outputs[0].shape, ir.DataType.FLOAT
    graph.insert_before(node, [cast, product])
    for reader in readers:
        for index, value in enumerate(reader.inputs):
            if value is node.outputs[0]:
                reader.replace_input_with(index, product.outputs[0])
    if not kept:
        graph.remove(node, safe=True)
    product.outputs[0].name = name
