"""Write weights of four bits as what they are products of, in blocks that DequantizeLinear has scales for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompile.core import packing, scratch
from qcompile.core.contract import Effect
from qcompile.passes import structure


@dataclass(frozen=True)
class FourBitBlocks(ir.passes.InPlacePass):
    """Turn packed int8 codes of matrix products in float into int4 with a scale for each block of 16 rows.

    The multiple that a block's numbers have in common (`core/packing.py`) goes into its scale: the numbers are the
    same, but for one rounding of the scale to float32. A product of activations in codes keeps codes of eight bits.
    """

    effect: ClassVar[Effect] = Effect.CLOSE

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite in place."""
        modified = False
        for node in list(model.graph):
            if structure.is_standard(node, "DequantizeLinear") and _feeds_float_products(node):
                modified |= _write(model.graph, node)
        return ir.passes.PassResult(model, modified)


def _feeds_float_products(node: ir.Node) -> bool:
    """Tell whether constant codes are the weights of matrix products alone, whose activations are no codes."""
    readers = structure.readers(node.outputs[0])
    return bool(readers) and all(
        structure.is_standard(reader, "MatMul", "Gemm")
        and reader.inputs[structure.WEIGHT_INPUT] is node.outputs[0]
        and structure.produced_by(reader.inputs[0], "DequantizeLinear") is None
        for reader in readers
    )


def _write(graph: ir.Graph, node: ir.Node) -> bool:
    """Write the blocks of one matrix, its sums along whichever axis has no scale; tell whether there are such."""
    codes, scale = structure.constant(node.inputs[0]), structure.constant(node.inputs[1])
    if codes is None or scale is None or codes.dtype != np.int8 or codes.ndim != 2 or not scale.ndim:
        return False
    channels = node.attributes.get_int("axis", 1)
    summed = 1 - channels
    sums_there = all(summed == 1 - structure.weight_axis(reader) for reader in structure.readers(node.outputs[0]))
    found = packing.unpacked(codes, channels) if codes.shape[summed] % packing.BLOCK == 0 and sums_there else None
    if found is None:
        return False
    numbers, multiples = found
    rows = numbers.reshape(codes.shape[channels], -1)
    scales = np.asarray(scale, np.float32).reshape(-1, 1) * multiples[..., 0].astype(np.float32)
    name = structure.name_of(node.outputs[0])

    def constant(what: str, array: npt.NDArray[Any]) -> ir.Value:
        kept = np.ascontiguousarray(array if channels == 0 else array.T)
        stored = ir.Value(name=f"{name}_{what}", const_value=scratch.tensor(kept, f"{name}_{what}"))
        stored.dtype, stored.shape = ir.DataType.from_numpy(kept.dtype), ir.Shape(kept.shape)
        graph.register_initializer(stored)
        return stored

    operands = [constant("numbers", rows.astype(ml_dtypes.int4)), constant("block_scales", scales)]
    made = ir.node("DequantizeLinear", operands, {"axis": summed, "block_size": packing.BLOCK}, name=f"{name}_blocks")
    made.outputs[0].type, made.outputs[0].shape = node.outputs[0].type, node.outputs[0].shape
    graph.insert_before(node, made)
    ir.convenience.replace_all_uses_with(node.outputs[0], made.outputs[0])
    graph.remove(node, safe=True)
    made.outputs[0].name = name
    return True
