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
        return common_passes.ShapeInferencePass(check_type=True, strict_mode=False, data_prop=True)(model)
