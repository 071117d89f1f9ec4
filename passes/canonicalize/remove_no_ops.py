"""Remove operators that compute nothing: Identity, Cast to the same type, Add 0, Mul 1, reshapes in a row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import onnx_ir as ir
import onnx_ir.passes.common as common_passes
from onnxscript.rewriter import RewritePass
from onnxscript.rewriter.pattern import RewriteRule
from onnxscript.rewriter.rules import common as rules

from qcompile.core.contract import Effect
from qcompile.passes import structure
from qcompile.passes.canonicalize.editing import bypass


def _neutral(op_type: str, number: float) -> RewriteRule:
    """Remove `x op number`. onnxscript's own rules allow 1e-8 around it, and so remove the ε of a normalization."""

    def is_neutral(context: Any, x: ir.Value, c: ir.Value, **_: Any) -> bool:
        array = structure.constant(c)
        return array is not None and array.ndim == 0 and bool(array == number)

    return RewriteRule(lambda op, x, c: getattr(op, op_type)(x, c), lambda op, x, **_: op.Identity(x), is_neutral)


RULES = (
    *_neutral("Add", 0).commute(),
    _neutral("Sub", 0),
    *_neutral("Mul", 1).commute(),
    _neutral("Div", 1),
    rules.no_op_cast_rule,
    rules.no_op_transpose_rule,
    rules.no_op_expand_rule,
    rules.transpose_transpose_rule,
    rules.reshape_reshape_rule,
    rules.unsqueeze_unsqueeze_rule,
)


@dataclass(frozen=True)
class RemoveNoOps(ir.passes.InPlacePass):
    """Apply onnxscript's rules for operators without effect, then drop what nobody reads."""

    effect: ClassVar[Effect] = Effect.EXACT

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite in place."""
        modified = False
        # What stood between two operators may have been all that kept them from being one.
        while _apply_rules(model):
            modified = True
        modified |= common_passes.RemoveUnusedNodesPass()(model).modified
        return ir.passes.PassResult(model, modified)


def _apply_rules(model: ir.Model) -> bool:
    modified = RewritePass(RULES)(model).modified
    # Some rules write Constant nodes, where every other pass expects initializers.
    modified |= common_passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model).modified
    modified |= remove_identities(model)
    return bool(modified)


def remove_identities(model: ir.Model) -> bool:
    """Remove Identity nodes, but for those that an interface needs, and tell whether anything changed.

    onnx-ir's own pass makes one value two outputs of a graph; see `bypass`.
    """
    modified = False
    for graph in model.graphs():
        for node in list(graph):
            if not structure.is_standard(node, "Identity") or node.inputs[0] is None:
                continue
            modified |= bypass(node, node.inputs[0])
    return modified
