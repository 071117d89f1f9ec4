"""Infer the type and shape of every value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir
import onnx_ir.passes.common as common_passes

from qcompile.core.contract import Effect


@dataclass(frozen=True)
class InferShapes(ir.passes.InPlacePass):
    """Run ONNX shape inference, open axes kept.

    Strict mode is off: it gives up on the whole graph at the first operator without an inference function, such as a
    contrib operator, while the rest of the shapes serve well.
    """

    effect: ClassVar[Effect] = Effect.EXACT

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Annotate the values in place."""
        untyped = [value for node in model.graph.all_nodes() if _makes_sequences(node) for value in node.outputs
                   if value.type is None]  # fmt: skip
        result = common_passes.ShapeInferencePass(check_type=True, strict_mode=False, data_prop=True)(model)
        for value in untyped:
            # onnx-ir notes the type of a sequence's elements as if it were the value's own.
            value.type = None
        return result


def _makes_sequences(node: ir.Node) -> bool:
    return "Sequence" in node.op_type or "Optional" in node.op_type
