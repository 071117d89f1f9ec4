"""Store scales and biases in sixteen bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from qcompile.core import halves
from qcompile.core.contract import Effect
from qcompile.passes import structure

#: Where a MatMulIntegerToFloat has its bias.
MATMUL_BIAS = 6


@dataclass(frozen=True)
class StoreHalves(ir.passes.InPlacePass):
    """Write float32 constants that are halves times a power of two as Cast(halves) · power; round biases to such.

    Scales of weights are made to be of that kind (`passes/allocate_bits.py`). Rounding moves a bias by 2^-11 of itself
    at most, far less than the codes that it is added to are off; float operators keep theirs as they are. ONNX Runtime
    folds constants when it loads a model.
    """

    effect: ClassVar[Effect] = Effect.CLOSE

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite in place."""
        modified = False
        for value in list(model.graph.initializers.values()):
            tensor = value.const_value
            if (
                tensor is None
                or tensor.dtype is not ir.DataType.FLOAT
                or tensor.size < halves.FEWEST
                or not value.uses()
            ):
                continue
            if value.is_graph_output() or value.is_graph_input():
                continue
            numbers = np.asarray(tensor.numpy(), np.float32)
            if all(_is_bias_of_integers(reader, index) for reader, index in value.uses()):
                numbers = halves.nearest(numbers) if np.all(np.isfinite(numbers)) else numbers
            if (found := halves.packed(numbers)) is not None:
                _unpack(model.graph, value, *found)
                modified = True
        return ir.passes.PassResult(model, modified)


def _is_bias_of_integers(node: ir.Node, index: int) -> bool:
    """Tell whether an operator on codes has its bias there."""
    if node.op_type == "MatMulIntegerToFloat":
        return index == MATMUL_BIAS
    operands = node.inputs[: structure.BIAS_INPUT]
    on_codes = all(structure.produced_by(value, "DequantizeLinear") is not None for value in operands)
    return structure.is_standard(node, "Conv") and index == structure.BIAS_INPUT and on_codes


def _unpack(graph: ir.Graph, value: ir.Value, numbers: np.ndarray, power: int) -> None:
    """Compute a value from its halves."""
    name, shape = structure.name_of(value), value.shape

    def constant(what: str, array: np.ndarray) -> ir.Value:
        stored = ir.Value(name=f"{name}_{what}", const_value=ir.tensor(array, name=f"{name}_{what}"))
        graph.register_initializer(stored)
        return stored

    made = [ir.node("Cast", [constant("half", numbers)], {"to": int(ir.DataType.FLOAT)}, name=f"{name}_Cast")]
    if power:
        made[0].outputs[0].name = f"{name}_single"
        made.append(ir.node("Mul", [made[0].outputs[0], constant("power", np.array(2.0**power, np.float32))],
                            name=f"{name}_Mul"))  # fmt: skip
    graph.insert_before(graph[0], made)
    result = made[-1].outputs[0]
    ir.convenience.replace_all_uses_with(value, result)
    result.shape, result.dtype = shape, ir.DataType.FLOAT
    del graph.initializers[name]
    result.name = name
