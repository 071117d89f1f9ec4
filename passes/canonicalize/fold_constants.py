"""Compute once, at compile time, what does not depend on the inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common_passes
from onnxscript import optimizer

from qcompile.core.contract import Effect, Refusal, Rewritten
from qcompile.core.errors import first_line
from qcompile.passes.canonicalize.editing import release_removed
from qcompile.passes.canonicalize.remove_no_ops import remove_identities

#: These turn stored weights into stored weights of the same size: folding them never makes the model larger.
SIZE_KEEPING = frozenset({"Cast", "Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"})
#: Q/DQ of constants are the quantized model's content, not arithmetic left over by an exporter.
KEPT = frozenset({"DequantizeLinear", "QuantizeLinear"})
#: Other constants are folded up to this many bytes, so that an Expand of a scalar does not become a large weight.
SIZE_LIMIT = 1 << 20


@dataclass(frozen=True)
class FoldConstants(ir.passes.InPlacePass):
    """Fold constant subgraphs and no-ops with onnxscript's optimizer; constants become initializers."""

    effect: ClassVar[Effect] = Effect.CLOSE

    def call(self, model: ir.Model) -> Rewritten:
        """Inline functions, fold to a fixed point, then lift constants; what cannot be computed here is a refusal."""
        common_passes.InlinePass()(model)
        refusals: tuple[Refusal, ...] = ()
        folded = model.clone()  # a failure in the middle must not leave a graph half folded
        try:
            count = -1
            while count != (count := sum(node.op_type != "Constant" for node in folded.graph.all_nodes())):
                optimizer.fold_constants_ir(
                    folded, input_size_limit=SIZE_LIMIT, output_size_limit=SIZE_LIMIT, should_fold=_should_fold
                )
                remove_identities(folded)
                common_passes.RemoveUnusedNodesPass()(folded)
                release_removed(folded)
            model.graph = folded.graph
        except Exception as error:  # onnxscript computes with onnx's reference operators, which raise what they like
            refusals = (Refusal("model", f"constants are not folded: {first_line(error)}"),)
        remove_identities(model)
        common_passes.RemoveUnusedNodesPass()(model)
        release_removed(model)
        common_passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
        return Rewritten(model, True, refusals)


def _should_fold(node: ir.Node) -> bool | None:
    if node.op_type in KEPT:
        return False
    if node.op_type == "ConstantOfShape":
        # onnxscript leaves these alone whatever their size; the opset converter builds the pads of a Pad from them.
        shape = ir.convenience.get_const_tensor(node.inputs[0]) if node.inputs[0] is not None else None
        return shape is not None and int(np.prod(shape.numpy(), dtype=np.int64)) <= SIZE_LIMIT // 8
    return True if node.op_type in SIZE_KEEPING else None
