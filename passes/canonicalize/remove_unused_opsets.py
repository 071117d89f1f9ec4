"""Import the operator sets that are used, and no others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir
import onnx_ir.passes.common as common_passes

from qcompile.core.contract import Effect


@dataclass(frozen=True)
class RemoveUnusedOpsets(ir.passes.InPlacePass):
    """Drop imports of domains that no operator is of; runtimes refuse domains that they do not know, used or not."""

    effect: ClassVar[Effect] = Effect.EXACT

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Change the imports in place; the default domain's stays."""
        return common_passes.RemoveUnusedOpsetsPass()(model)
