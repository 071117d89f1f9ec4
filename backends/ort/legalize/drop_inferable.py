"""Leave out of the file what ONNX Runtime knows without it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir
import onnx_ir.passes.common as common_passes

from qcompile.core.contract import Effect
from qcompile.passes import structure


@dataclass(frozen=True)
class DropInferable(ir.passes.InPlacePass):
    """Drop types and shapes of inner values, names of Q/DQ nodes, notes, and constants that are there twice.

    Half a small model's file is such text, and zero points are mostly the same zeros. Names of operators stay: the
    report speaks of them.
    """

    effect: ClassVar[Effect] = Effect.EXACT

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite in place."""
        common_passes.ClearMetadataAndDocStringPass()(model)
        for node in model.graph:
            if structure.is_standard(node, "QuantizeLinear", "DequantizeLinear"):
                node.name = ""
        inner = (*model.graph.initializers.values(), *(value for node in model.graph for value in node.outputs))
        for value in inner:
            if not value.is_graph_input() and not value.is_graph_output():
                value.type = value.shape = None
        common_passes.DeduplicateInitializersPass(size_limit=MOST_BYTES)(model)
        return ir.passes.PassResult(model, True)


#: Larger constants than this are weights, which hardly ever are the same twice.
MOST_BYTES = 1 << 16
