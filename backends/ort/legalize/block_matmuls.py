"""Let MatMulNBits read the codes of a MatMul's weights: a GPU then moves a half or a quarter of float16's bytes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnx_ir.passes.common as common_passes

from qcompile.backends.ort.half_values import HALF, SINGLE, fits
from qcompile.core import packing, scratch
from qcompile.core.contract import Effect
from qcompile.passes import structure

DOMAIN, OP_TYPE = "com.microsoft", "MatMulNBits"
#: Lengths of blocks that its kernels take, the longest first: a scale per channel is stored once for each.
BLOCKS = (128, 64, 32, packing.BLOCK)
#: The code that stands for zero, by bits.
ZERO = {4: 8, 8: 128}


@dataclass(frozen=True)
class _Weights:
    """Weights as MatMulNBits has them.

    Parameters
    ----------
    codes : ndarray of uint8, shape (N, blocks, bytes)
        Of four bits two to a byte, the first in its low half.
    scales : ndarray of float32, shape (N · blocks,)
    rows, columns : int
        K and N of the product.
    bits, block : int
    """

    codes: npt.NDArray[np.uint8]
    scales: npt.NDArray[np.float32]
    rows: int
    columns: int
    bits: int
    block: int


@dataclass(frozen=True)
class BlockMatMuls(ir.passes.InPlacePass):
    """Write MatMul, and Gemm as a product and an Add, of integer weights as MatMulNBits.

    Codes of four bits are what `core/packing.py` makes: numbers times a multiple of their block, which goes into the
    block's scale. Weights whose rows are no multiple of 16, or whose scales float16 cannot hold, stay as they are.
    """

    effect: ClassVar[Effect] = Effect.CLOSE

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite in place."""
        modified = False
        for node in list(model.graph):
            dequantizer = _dequantizer(node)
            if dequantizer is None:
                continue
            half = structure.input_of(node, 0).dtype is HALF
            transposed = node.attributes.get_int("transB", 0) != 0
            weights = _weights(dequantizer, transposed)
            if weights is None or (half and not fits(weights.scales)):
                continue
            _replace(model.graph, node, weights, half)
            modified = True
        if modified:
            model.graph.opset_imports.setdefault(DOMAIN, 1)
        common_passes.RemoveUnusedNodesPass()(model)
        return ir.passes.PassResult(model, modified)


def _dequantizer(node: ir.Node) -> ir.Node | None:
    """Return what unpacks the weights of a plain product, None for another."""
    if not structure.is_standard(node, "MatMul", "Gemm") or structure.input_of(node, 0).dtype not in (HALF, SINGLE):
        return None
    plain = all(node.attributes.get_float(name, 1.0) == 1.0 for name in ("alpha", "beta"))
    if not plain or node.attributes.get_int("transA", 0) != 0:
        return None
    made = structure.produced_by(node.inputs[structure.WEIGHT_INPUT], "DequantizeLinear", "Cast")
    if made is not None and made.op_type == "Cast":
        made = structure.produced_by(made.inputs[0], "DequantizeLinear")
    return made


def _weights(node: ir.Node, transposed: bool) -> _Weights | None:
    """Return int8 codes with a scale per output channel in blocks; None where they are none."""
    codes, scale = structure.constant(node.inputs[0]), structure.constant(node.inputs[1])
    zero_point = structure.constant(node.inputs[2]) if len(node.inputs) > 2 else None
    if codes is None or scale is None or codes.dtype != np.int8 or codes.ndim != 2:
        return None
    if zero_point is not None and np.any(zero_point):
        return None
    columns = codes if transposed else codes.T
    if scale.ndim and node.attributes.get_int("axis", 1) != (0 if transposed else 1):
        return None
    count, rows = columns.shape
    if rows % packing.BLOCK:
        return None
    scales = np.broadcast_to(np.asarray(scale, np.float32).reshape(-1, 1), (count, 1))
    found = packing.unpacked(np.ascontiguousarray(columns), 0)
    if found is not None:
        numbers, multiples = found
        return _packed(numbers.reshape(count, rows), scales * multiples[..., 0], 4, packing.BLOCK)
    block = next(length for length in BLOCKS if rows % length == 0)
    return _packed(columns, np.broadcast_to(scales, (count, rows // block)), 8, block)


def _packed(numbers: npt.NDArray[Any], scales: npt.NDArray[np.float32], bits: int, block: int) -> _Weights:
    columns, rows = numbers.shape
    codes: npt.NDArray[np.uint8] = (numbers.astype(np.int16) + ZERO[bits]).astype(np.uint8)
    if bits == 4:
        codes = np.bitwise_or(codes[:, ::2], np.left_shift(codes[:, 1::2], np.uint8(4)), dtype=np.uint8)
    stored = np.ascontiguousarray(codes.reshape(columns, rows // block, block * bits // 8))
    return _Weights(stored, np.asarray(scales, np.float32).reshape(-1), rows, columns, bits, block)


def _replace(graph: ir.Graph, node: ir.Node, weights: _Weights, half: bool) -> None:
    result, name = node.outputs[0], structure.node_name(node)
    bias = node.inputs[structure.BIAS_INPUT] if len(node.inputs) > structure.BIAS_INPUT else None

    def constant(what: str, array: npt.NDArray[Any]) -> ir.Value:
        stored = ir.Value(name=f"{name}_{what}", const_value=scratch.tensor(array, f"{name}_{what}"))
        stored.dtype, stored.shape = ir.DataType.from_numpy(array.dtype), ir.Shape(array.shape)
        graph.register_initializer(stored)
        return stored

    scales = weights.scales.astype(np.float16) if half else weights.scales
    operands = [structure.input_of(node, 0), constant("codes", weights.codes), constant("scales", scales)]
    attributes = {"K": weights.rows, "N": weights.columns, "bits": weights.bits, "block_size": weights.block}
    made = [ir.node(OP_TYPE, operands, attributes, domain=DOMAIN, version=1, name=name)]
    if bias is not None:
        made[0].outputs[0].name = f"{name}_product"
        made[0].outputs[0].type, made[0].outputs[0].shape = result.type, result.shape
        made.append(ir.node("Add", [made[0].outputs[0], bias], name=f"{name}_bias"))
    output, given = made[-1].outputs[0], structure.name_of(result)
    output.type, output.shape = result.type, result.shape
    graph.insert_before(node, made)
    ir.convenience.replace_all_uses_with(result, output, replace_graph_outputs=True)
    graph.remove(node, safe=True)
    output.name = given
