"""Name every node and every value once: plans and reports refer to both by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir
import onnx_ir.passes.common as common_passes

from qcompile.core.contract import Effect


@dataclass(frozen=True)
class FixNames(ir.passes.InPlacePass):
    """Give unnamed nodes ``<op type>_<n>`` and make duplicate names differ; inputs and outputs keep theirs."""

    effect: ClassVar[Effect] = Effect.EXACT

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rename in place."""
        taken = {node.name for node in model.graph.all_nodes()}
        seen: set[str] = set()
        modified = False
        for index, node in enumerate(model.graph.all_nodes()):
            # Nodes inside subgraphs as well: they stand in the same plan.
            if not node.name or node.name in seen:
                name = node.name or f"{node.op_type}_{index}"
                while name in taken:
                    name += "_"
                node.name = name
                taken.add(name)
                modified = True
            seen.add(node.name)
        modified |= common_passes.NameFixPass()(model).modified
        return ir.passes.PassResult(model, modified)
