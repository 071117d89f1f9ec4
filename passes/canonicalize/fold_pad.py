"""Fold Pad into the Conv behind it and spell automatic padding out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir
from onnxscript.rewriter import RewritePass
from onnxscript.rewriter.rules import common as rules

from qcompile.core.contract import Effect, Refusal, Rewritten
from qcompile.passes.canonicalize.editing import remove_unused


@dataclass(frozen=True)
class FoldPad(ir.passes.InPlacePass):
    """Fold a constant zero Pad over spatial axes into its Conv's `pads`.

    A Pad in front of a quantized Conv would run in float between two quantized tensors, or not at all as an integer
    kernel; as an attribute it costs nothing.
    """

    effect: ClassVar[Effect] = Effect.EXACT

    def call(self, model: ir.Model) -> Rewritten:
        """Rewrite in place; Pads left in front of a Conv are refusals."""
        names = {node.outputs[0].name: node.name for node in model.graph.all_nodes() if node.op_type == "Conv"}
        modified = RewritePass((rules.normalize_pad_format_conv_rule, rules.fuse_pad_into_conv_rule))(model).modified
        modified |= remove_unused(model)
        for node in model.graph.all_nodes():
            # The rules write a new node; the user knows it by its old name.
            node.name = names.get(node.outputs[0].name, node.name)
        refusals = tuple(
            Refusal(str(node.name), "Pad stays in front of its Conv: not a constant zero padding of spatial axes only")
            for node in model.graph.all_nodes()
            if node.op_type == "Pad" and any(reader.op_type == "Conv" for reader in node.outputs[0].consumers())
        )
        return Rewritten(model, modified, refusals)
