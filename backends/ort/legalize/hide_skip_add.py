"""Write the Add in front of a LayerNormalization as Sum, which ONNX Runtime does not fuse with it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from qcompile.core.contract import Effect
from qcompile.passes import structure


@dataclass(frozen=True)
class HideSkipAdd(ir.passes.InPlacePass):
    """Turn residual Adds in front of a LayerNormalization into Sums.

    ONNX Runtime makes a SkipLayerNormalization of Add and LayerNormalization where it knows the shapes, and the CPU
    kernel of that takes three times as long as the two it replaces (docs/targets/cpu.md).
    """

    effect: ClassVar[Effect] = Effect.EXACT

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite in place."""
        modified = False
        for node in model.graph:
            if structure.is_standard(node, "LayerNormalization"):
                add = structure.produced_by(node.inputs[0], "Add")
                if add is not None and all(structure.constant_tensor(value) is None for value in add.inputs):
                    add.op_type = "Sum"
                    modified = True
        return ir.passes.PassResult(model, modified)
