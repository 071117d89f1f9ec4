"""Multiply once by what is multiplied twice."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompile.core.contract import Effect
from qcompile.passes import structure
from qcompile.passes.canonicalize.editing import add_constant, only_reader, remove_unused, replace


@dataclass(frozen=True)
class JoinFactors(ir.passes.InPlacePass):
    """Join Mul and Div by constants in a row into one Mul.

    Sums stay: x + 1e8 - 1e8 rounds x, x + 0 does not.
    """

    effect: ClassVar[Effect] = Effect.CLOSE

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite the main graph in place."""
        modified = False
        for node in list(model.graph):
            outer = _factor(node)
            first = outer[0].producer() if outer is not None and only_reader(outer[0]) is node else None
            inner = _factor(first) if first is not None else None
            if outer is None or inner is None or inner[1].dtype != outer[1].dtype:
                continue
            with np.errstate(all="ignore"):
                product = (inner[2] * outer[2]).astype(inner[1].dtype)
            # A row by a column is a matrix, which costs more than it saves.
            if product.size > max(inner[1].size, outer[1].size):
                continue
            # A product that leaves the type's normal range has lost its digits.
            if not np.all(np.abs(product) >= np.finfo(product.dtype).tiny) or not np.isfinite(product).all():
                continue
            constant = add_constant(model.graph, f"{node.outputs[0].name}_factor", product)
            replace(node, ir.node("Mul", [inner[0], constant]))
            modified = True
        modified |= remove_unused(model)
        return ir.passes.PassResult(model, modified)


def _factor(node: ir.Node) -> tuple[ir.Value, npt.NDArray[Any], npt.NDArray[np.float64]] | None:
    """Return what a node multiplies, the constant as it stands and the factor, or None."""
    if not structure.is_standard(node, "Mul", "Div"):
        return None
    index = 0 if structure.constant_tensor(node.inputs[1]) is not None else 1
    value, constant = node.inputs[index], structure.constant(node.inputs[1 - index])
    if value is None or constant is None or structure.constant_tensor(value) is not None or constant.dtype.kind != "f":
        return None
    wide = constant.astype(np.float64)
    if node.op_type == "Mul":
        return value, constant, wide
    return (value, constant, 1.0 / wide) if index == 0 and np.all(wide) else None
