"""Drop an activation whose bounds are where the codes behind it end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common_passes

from qcompile.backends.ort.phones.units import left_codes
from qcompile.core import numerics
from qcompile.core.contract import Effect
from qcompile.passes import structure


@dataclass(frozen=True)
class DropAbsorbed(ir.passes.InPlacePass):
    """Let a quantizer saturate in place of the Relu or Clip in front of it, so that operator and codes stand together.

    Providers match an operator between its DequantizeLinear and QuantizeLinear, and some nothing in between.
    """

    effect: ClassVar[Effect] = Effect.EXACT

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite in place."""
        modified = False
        for node in list(model.graph):
            if structure.is_standard(node, "Relu", "Clip") and _is_behind_an_operator(node) and _saturates(node):
                ir.convenience.replace_all_uses_with(node.outputs[0], structure.input_of(node, 0))
                model.graph.remove(node, safe=True)
                modified = True
        common_passes.RemoveUnusedNodesPass()(model)
        return ir.passes.PassResult(model, modified)


def _is_behind_an_operator(node: ir.Node) -> bool:
    """Tell whether it reads what an operator makes for it alone, and not codes: then it is a unit of its own."""
    value = node.inputs[0]
    maker = value.producer() if value is not None else None
    alone = value is not None and not value.is_graph_output() and structure.readers(value) == [node]
    return maker is not None and alone and not structure.is_standard(maker, "DequantizeLinear")


def _saturates(node: ir.Node) -> bool:
    codes = left_codes(node.outputs[0])
    if codes is None or codes.scale.size != 1 or codes.scale.dtype != np.float32:
        return False
    bounds = [0.0, None] if node.op_type == "Relu" else [_bound(node, 1), _bound(node, 2)]
    for bound, end in zip(bounds, numerics.code_range(codes.dtype), strict=True):
        if bound is not None:
            found = numerics.quantize(np.full(1, bound, np.float32), codes.scale, codes.zero_point, codes.dtype)
            if int(found[0]) != end:
                return False
    return True


def _bound(node: ir.Node, index: int) -> float | None:
    """Return a bound of a Clip: none where there is none, and NaN, which no codes end at, where nobody knows it."""
    if len(node.inputs) <= index or node.inputs[index] is None:
        return None
    known = structure.constant(node.inputs[index])
    return float(known.reshape(())) if known is not None and known.size == 1 else float("nan")
