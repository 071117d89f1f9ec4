"""Drop a Min or Max whose bounds the quantizers behind it have anyway."""

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
class DropBounds(ir.passes.InPlacePass):
    """Let quantizers read what a Min or Max with constants reads, where its bounds get the outermost code.

    Beyond them the quantizers saturate. `passes/set_aside.py` writes such bounds.
    """

    effect: ClassVar[Effect] = Effect.EXACT

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite in place."""
        modified = False
        for node in reversed(list(model.graph)):
            if not structure.is_standard(node, "Min", "Max") or len(node.inputs) != 2:
                continue
            bounds, uses = structure.constant(node.inputs[1]), list(node.outputs[0].uses())
            if bounds is None or bounds.ndim > 1 or node.outputs[0].is_graph_output() or not uses:
                continue
            if all(index == 0 and _saturates(reader, bounds, node.op_type == "Min") for reader, index in uses):
                for reader, _ in uses:
                    reader.replace_input_with(0, node.inputs[0])
                model.graph.remove(node, safe=True)
                modified = True
        common_passes.RemoveUnusedNodesPass()(model)
        return ir.passes.PassResult(model, modified)


def _saturates(reader: ir.Node, bounds: numerics.FloatArray, above: bool) -> bool:
    """Tell whether a quantizer gives all bounds its highest code, or its lowest."""
    if not structure.is_standard(reader, "QuantizeLinear") or len(reader.inputs) < 3:
        return False
    scale, zero_point = structure.constant(reader.inputs[1]), structure.constant(reader.inputs[2])
    if scale is None or zero_point is None or scale.size != 1 or scale.dtype != np.float32 or not bounds.size:
        return False
    dtype, zero = str(zero_point.dtype), zero_point.reshape(1).astype(np.int64)
    with np.errstate(over="ignore"):
        codes = numerics.quantize(bounds.reshape(-1), scale.reshape(1), zero, dtype)
    return bool((codes == numerics.code_range(dtype)[int(above)]).all())
