"""Take a factor into the scales behind it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common_passes

from qcompile.core import numerics
from qcompile.core.contract import Effect
from qcompile.passes import structure

#: A node, and which of its inputs.
Use = tuple[ir.Node, int]


@dataclass(frozen=True)
class SinkFactors(ir.passes.InPlacePass):
    """Remove a Mul by one positive number where all that reads its result has a scale or constant for it.

    A QuantizeLinear with scale s reads c·x as it reads x with scale s/c, and an operator that is linear in x with
    dequantized weights takes c into the scale of those. A Mul by a constant takes c into that, and so do the float
    weights of the MatMul that alone reads some channels of x, through Gather.
    """

    effect: ClassVar[Effect] = Effect.CLOSE

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite in place."""
        modified = False
        for node in list(model.graph):
            factor, source = _factor(node)
            if source is None or node.outputs[0].is_graph_output():
                continue
            uses = list(node.outputs[0].uses())
            if uses and all(_takes(use, factor) for use in uses):
                for use in uses:
                    _scale(model.graph, use, factor, source)
                modified = True
        common_passes.RemoveUnusedNodesPass()(model)
        return ir.passes.PassResult(model, modified)


def _factor(node: ir.Node) -> tuple[float, ir.Value | None]:
    """Return the number that a node multiplies by, and what it multiplies, or None instead of that."""
    if not structure.is_standard(node, "Mul"):
        return 0.0, None
    for value, other in (node.inputs, node.inputs[::-1]):
        number = structure.constant(other)
        if number is not None and number.size == 1 and number.dtype == np.float32 and float(number.reshape(())) > 0.0:
            rank = 0 if value is None or value.shape is None else len(value.shape)
            return float(number.reshape(())), value if number.ndim <= rank else None
    return 0.0, None


def _scale_of(use: Use) -> tuple[ir.Node, bool] | None:
    """Return the Q or DQ whose scale takes the factor of a use, and whether as divisor; None if there is none."""
    node, index = use
    if index != 0:
        return None
    if structure.is_standard(node, "QuantizeLinear"):
        return node, True
    weights = node.inputs[1] if structure.is_standard(node, "Conv", "Gemm", "MatMul") else None
    dequantize = structure.produced_by(weights, "DequantizeLinear")
    if dequantize is None or structure.constant_tensor(dequantize.inputs[0]) is None:
        return None
    return (dequantize, False) if structure.readers(dequantize.outputs[0]) == [node] else None


def _constant_of(use: Use) -> Use | None:
    """Return the use of a float constant that takes the factor of a use, None if there is none."""
    node, index = use
    if structure.is_standard(node, "Gather") and index == 0 and not node.outputs[0].is_graph_output():
        behind = list(node.outputs[0].uses())
        if len(behind) != 1 or behind[0][1] != 0 or not structure.is_standard(behind[0][0], "MatMul"):
            return None
        node, index = behind[0]
    elif not structure.is_standard(node, "Mul"):
        return None
    constant = structure.constant(node.inputs[1 - index])
    return None if constant is None or constant.dtype != np.float32 or constant.size == 1 else (node, 1 - index)


def _takes(use: Use, factor: float) -> bool:
    if (taker := _constant_of(use)) is not None:
        constant = structure.constant(taker[0].inputs[taker[1]])
        assert constant is not None
        return bool(np.isfinite(constant * np.float64(factor)).all())
    found = _scale_of(use)
    scale = None if found is None else structure.constant(found[0].inputs[1])
    if found is None or scale is None or scale.dtype != np.float32:
        return False
    new = _new_scale(scale, factor, found[1])
    return bool(np.isfinite(new).all() and (new >= numerics.SMALLEST_SCALE).all())


def _new_scale(scale: numerics.FloatArray, factor: float, divides: bool) -> numerics.FloatArray:
    with np.errstate(over="ignore"):
        exact = scale.astype(np.float64)
        return np.asarray(exact / factor if divides else exact * factor, np.float32)


def _scale(graph: ir.Graph, use: Use, factor: float, source: ir.Value) -> None:
    taker, found = _constant_of(use), _scale_of(use)
    node, at, divides = (*taker, False) if taker is not None else (found[0], 1, found[1]) if found else (None, 0, False)
    assert node is not None
    old = structure.constant(node.inputs[at])
    assert old is not None
    name = f"{structure.node_name(node)}_scale_{factor:g}"
    value = ir.Value(name=name, const_value=ir.tensor(_new_scale(old, factor, divides), name=name))
    graph.register_initializer(value)
    node.replace_input_with(at, value)
    reader, index = use
    reader.replace_input_with(index, source)
