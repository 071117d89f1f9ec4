"""Join MatMul and the Add of its bias into Gemm where the operands are matrices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from qcompile.core.contract import Effect
from qcompile.passes import structure
from qcompile.passes.canonicalize.editing import remove_unused


@dataclass(frozen=True)
class JoinMatMulAdd(ir.passes.InPlacePass):
    """Write x·W + b as one Gemm, for W [K, N] and b of N numbers that are constants and x of rank 2.

    ONNX Runtime does the same before it looks for Q/DQ, and the Gemm it makes has no Q/DQ around its bias: it runs in
    float, its weights dequantized in every run.
    """

    effect: ClassVar[Effect] = Effect.CLOSE

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite in place."""
        modified = False
        for node in list(model.graph):
            found = _bias(node)
            if found is None:
                continue
            add, bias = found
            array = structure.constant(bias)
            assert array is not None
            if array.ndim != 1:
                name = f"{bias.name}_of_{add.outputs[0].name}"
                bias = ir.Value(name=name, const_value=ir.tensor(array.reshape(-1), name=name))
                bias.dtype, bias.shape = ir.DataType.FLOAT, ir.Shape((array.size,))
                model.graph.register_initializer(bias)
            gemm = ir.node("Gemm", [*node.inputs, bias], name=node.name)
            ir.convenience.replace_nodes_and_values(model.graph, add, [node, add], [gemm], add.outputs, gemm.outputs)
            modified = True
        remove_unused(model)
        return ir.passes.PassResult(model, modified)


def _bias(node: ir.Node) -> tuple[ir.Node, ir.Value] | None:
    """Return the Add behind a MatMul of matrices and the constant per column that it adds, or None."""
    if not structure.is_standard(node, "MatMul") or len(uses := list(node.outputs[0].uses())) != 1:
        return None
    add, index = uses[0]
    if not structure.is_standard(add, "Add") or add.graph is not node.graph or node.outputs[0].is_graph_output():
        return None
    x, weight, bias = node.inputs[0], structure.constant(node.inputs[1]), add.inputs[1 - index]
    constant = structure.constant(bias)
    if x is None or x.shape is None or len(x.shape) != 2 or weight is None or weight.ndim != 2 or bias is None:
        return None
    if constant is None or constant.shape not in ((weight.shape[1],), (1, weight.shape[1])):
        return None
    # A mask that is added holds infinities; a bias does not, and its codes could not.
    return (add, bias) if weight.dtype == np.float32 and np.isfinite(constant).all() else None
