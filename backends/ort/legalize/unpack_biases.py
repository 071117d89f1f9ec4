"""Store the biases of integer convolutions as floats, which ONNX Runtime quantizes itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common_passes

from qcompile.core import numerics
from qcompile.core.contract import Effect
from qcompile.passes import structure


@dataclass(frozen=True)
class UnpackBiases(ir.passes.InPlacePass):
    """Turn the DequantizeLinear of a Conv's bias into the floats that it gives.

    The bias of an integer Conv is in steps of activation scale · weight scale, so its scales say nothing new: ONNX
    Runtime reckons them when it loads the model, and per channel eight bytes of scale and zero point are saved. (A
    Gemm's bias it leaves in float, and the Gemm with it.)
    """

    effect: ClassVar[Effect] = Effect.CLOSE

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite in place."""
        modified = False
        for node in list(model.graph):
            if structure.is_standard(node, "DequantizeLinear") and _is_bias_of_conv(node):
                _unpack(model.graph, node)
                modified = True
        common_passes.RemoveUnusedNodesPass()(model)
        return ir.passes.PassResult(model, modified)


def _is_bias_of_conv(node: ir.Node) -> bool:
    codes, uses = structure.constant_tensor(node.inputs[0]), list(node.outputs[0].uses())
    if codes is None or codes.dtype is not ir.DataType.INT32 or node.outputs[0].is_graph_output():
        return False
    zero_point = structure.constant(node.inputs[2]) if len(node.inputs) > 2 else np.zeros(1)
    shifted = zero_point is None or bool(np.any(zero_point))
    known = structure.constant(node.inputs[1]) is not None
    return known and not shifted and all(
        structure.is_standard(reader, "Conv") and index == structure.BIAS_INPUT for reader, index in uses
    )  # fmt: skip


def _unpack(graph: ir.Graph, node: ir.Node) -> None:
    codes, scale = structure.constant(node.inputs[0]), structure.constant(node.inputs[1])
    assert codes is not None and scale is not None
    axis = node.attributes.get_int("axis", 1) if scale.ndim else None
    real = codes.astype(np.float64) * numerics.along_axis(scale, axis, codes.ndim).astype(np.float64)
    name = structure.name_of(node.outputs[0])
    stored = ir.Value(name=f"{name}_real", const_value=ir.tensor(real.astype(np.float32), name=f"{name}_real"))
    graph.register_initializer(stored)
    ir.convenience.replace_all_uses_with(node.outputs[0], stored)
    graph.remove(node, safe=True)
