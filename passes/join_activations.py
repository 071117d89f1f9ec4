"""Write GELU and hard-swish as the one operator that runtimes have a kernel or a fusion for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common_passes

from qcompile.core import model as models
from qcompile.core.contract import Effect
from qcompile.passes import structure
from qcompile.passes.patterns.activations import Activation, ActivationKind, activations

#: Operator of each kind, and the first opset that has it.
OPERATORS: Mapping[ActivationKind, tuple[str, int]] = {
    ActivationKind.GELU: ("Gelu", 20),
    ActivationKind.HARD_SWISH: ("HardSwish", 14),
}


@dataclass(frozen=True)
class JoinActivations(ir.passes.InPlacePass):
    """Write an activation of several operators as one.

    ONNX Runtime joins GELU by itself only where its ½ has not gone into the weights behind it, and takes a HardSwish
    into the float Conv in front of it, but not the four operators that older opsets write it with.
    """

    effect: ClassVar[Effect] = Effect.CLOSE

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite in place."""
        opset = models.opset(model)
        found = [one for one in activations(model.graph)
                 if one.kind in OPERATORS and opset >= OPERATORS[one.kind][1]
                 and len(one.nodes) > 1 and not one.shared and structure.is_float32(one.source)]  # fmt: skip
        for one in found:
            _join(model.graph, one)
        common_passes.RemoveUnusedNodesPass()(model)
        return ir.passes.PassResult(model, bool(found))


def _join(graph: ir.Graph, one: Activation) -> None:
    last, name, op_type = one.result.producer(), structure.name_of(one.result), OPERATORS[one.kind][0]
    assert last is not None
    new = [ir.node(op_type, [one.source], name=f"{name}_{op_type}")]
    if one.factor != 1.0:
        factor = ir.Value(name=f"{name}_factor", const_value=ir.tensor(np.float32(one.factor), name=f"{name}_factor"))
        graph.register_initializer(factor)
        new[0].outputs[0].name = f"{name}_unscaled"
        new.append(ir.node("Mul", [new[0].outputs[0], factor], name=f"{name}_Mul"))
    ir.convenience.replace_nodes_and_values(graph, last, [last], new, [one.result], [new[-1].outputs[0]])
