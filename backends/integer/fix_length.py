"""A quantized model whose axes are open, at one length: what depends on shapes alone becomes constants."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from qcompile.core import model as models
from qcompile.passes.canonicalize.fix_shapes import FixShapes
from qcompile.passes.canonicalize.fold_constants import FoldConstants
from qcompile.passes.canonicalize.fold_shapes import FoldShapes
from qcompile.passes.canonicalize.infer_shapes import InferShapes
from qcompile.passes.canonicalize.remove_no_ops import RemoveNoOps

#: Shapes tell constants, and constants that were folded tell more shapes.
ROUNDS = 3


def at_length(model: ir.Model, shapes: Mapping[str, tuple[int, ...]]) -> ir.Model:
    """Return a copy of a model with inputs of these shapes; scales, zero points and codes stay what they are.

    Parameters
    ----------
    model : onnx_ir.Model
        Float or QDQ.
    shapes : mapping of str to tuple of int
        By input.

    Raises
    ------
    UsageError
        See `FixShapes`.
    """
    fixed = FixShapes(shapes)(model.clone()).model
    for _ in range(ROUNDS):
        _forget_shapes(fixed)
        for rule in (InferShapes(), FoldConstants(), FoldShapes(), FoldConstants()):
            fixed = rule(fixed).model
    _forget_shapes(fixed)
    return RemoveNoOps()(InferShapes()(fixed).model).model


def _forget_shapes(model: ir.Model) -> None:
    """Leave no shape but those of inputs and constants: what was said of an open axis is not looked at again."""
    for node in model.graph.all_nodes():
        for value in node.outputs:
            value.shape = None
    for value in models.initializers(model):
        if value.const_value is not None:
            value.shape = ir.Shape(value.const_value.numpy().shape)
