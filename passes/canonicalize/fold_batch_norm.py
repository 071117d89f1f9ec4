"""Fold BatchNormalization into the Conv, ConvTranspose or Gemm in front of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir
from onnxscript.rewriter import RewritePass
from onnxscript.rewriter.rules import common as rules

from qcompile.core.contract import Effect, Refusal, Rewritten
from qcompile.passes.canonicalize.editing import remove_unused

FOLDS_INTO = frozenset({"Conv", "ConvTranspose", "Gemm"})
RULES = (
    rules.fuse_batchnorm_into_conv_rule,
    rules.fuse_batchnorm_into_conv_transpose_rule,
    rules.fuse_batchnorm_into_gemm_rule,
)


@dataclass(frozen=True)
class FoldBatchNorm(ir.passes.InPlacePass):
    """Scale the weights by γ/√(σ²+ε) and shift the bias, so that the normalization disappears.

    Ioffe and Szegedy 2015, section 3.1, read at inference: an affine map per channel.
    """

    effect: ClassVar[Effect] = Effect.CLOSE

    def call(self, model: ir.Model) -> Rewritten:
        """Rewrite in place; normalizations that stay are refusals."""
        sources = {node.outputs[0].name: node.inputs[0].producer() for node in model.graph.all_nodes()
                   if node.op_type == "BatchNormalization" and node.inputs[0] is not None}  # fmt: skip
        # The rules do not look at the mode, and in training the statistics are those of the batch.
        training = any(_trains(node) for node in model.graph.all_nodes())
        modified = RewritePass(RULES)(model).modified if not training else False
        for node in model.graph.all_nodes():
            # The rules write a new node; the user knows it by its old name.
            if node.op_type in FOLDS_INTO and (source := sources.get(node.outputs[0].name)) is not None:
                node.name = source.name
        modified |= remove_unused(model)
        refusals = tuple(
            Refusal(str(node.name), f"BatchNormalization stays: {_reason(node)}")
            for node in model.graph.all_nodes()
            if node.op_type == "BatchNormalization"
        )
        return Rewritten(model, modified, refusals)


def _reason(node: ir.Node) -> str:
    source = node.inputs[0]
    producer = source.producer() if source is not None else None
    if any(_trains(other) for other in node.graph or ()):
        return "the model was exported in training mode"
    if producer is None:
        return "it stands at an input of the model"
    if producer.op_type not in FOLDS_INTO:
        return f"it follows {producer.op_type} '{producer.name}', which has no weights to fold it into"
    if source is not None and (len(source.uses()) > 1 or source.is_graph_output()):
        return f"the result of {producer.op_type} '{producer.name}' is also read elsewhere"
    return f"weights of {producer.op_type} '{producer.name}' are shared or not constant"


def _trains(node: ir.Node) -> bool:
    return node.op_type == "BatchNormalization" and node.attributes.get_int("training_mode", 0) != 0
