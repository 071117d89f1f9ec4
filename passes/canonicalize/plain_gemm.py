"""Fold alpha and beta of Gemm into its constants and give every bias one form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from qcompile.core.contract import Effect
from qcompile.passes import structure
from qcompile.passes.canonicalize.editing import add_constant, remove_unused, rounded


@dataclass(frozen=True)
class PlainGemm(ir.passes.InPlacePass):
    """Write Gemm with constant weights as x·W + b, alpha and beta 1, b one number per output channel."""

    effect: ClassVar[Effect] = Effect.CLOSE

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite the main graph in place."""
        modified = False
        for node in model.graph:
            if structure.is_standard(node, "Gemm") and structure.constant_tensor(node.inputs[1]) is not None:
                modified |= _fold_alpha(model.graph, node)
                modified |= _flatten_bias(model.graph, node)
        remove_unused(model)
        return ir.passes.PassResult(model, modified)


def _fold_alpha(graph: ir.Graph, node: ir.Node) -> bool:
    alpha, value = node.attributes.get_float("alpha", 1.0), node.inputs[1]
    if alpha == 1.0 or value is None or len(value.uses()) != 1:
        return False
    weights = structure.constant(value)
    assert weights is not None
    if weights.dtype.kind != "f" or (scaled := rounded(weights.astype(np.float64) * alpha, weights.dtype)) is None:
        return False
    node.replace_input_with(1, add_constant(graph, f"{value.name}_scaled", scaled))
    node.attributes.pop("alpha")
    return True


def _flatten_bias(graph: ir.Graph, node: ir.Node) -> bool:
    value = node.inputs[2] if len(node.inputs) > 2 else None
    bias, weights = structure.constant(value), structure.constant_tensor(node.inputs[1])
    if value is None or bias is None or weights is None or bias.dtype.kind != "f":
        return False
    channels, beta = weights.shape[structure.weight_axis(node)], node.attributes.get_float("beta", 1.0)
    assert isinstance(channels, int)
    rows = bias.shape[:-1]
    if any(length != 1 for length in rows) or bias.shape[-1:] not in ((), (1,), (channels,)):
        return False
    if bias.shape == (channels,) and beta == 1.0:
        return False
    scaled = rounded(bias.astype(np.float64) * beta, bias.dtype)
    if scaled is None:
        return False
    flat = np.ascontiguousarray(np.broadcast_to(scaled.reshape(-1), (channels,)))
    node.replace_input_with(2, add_constant(graph, f"{value.name}_of_{node.outputs[0].name}", flat))
    node.attributes.pop("beta", None)
    return True
