"""Lower what multiplies floats: by constant weights with a scale per block, channel or tensor, and by one another."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompile.backends.integer.float_operations import BlockDense, FloatMatMul
from qcompile.backends.integer.lower_linear import read_weights, real_of, rows_of
from qcompile.backends.integer.lower_products import axes_of, last_where_they_are, wanted_order
from qcompile.backends.integer.values import FLOAT, Codes, Factors, Grid, Pending, Writer, refuse, shape_of
from qcompile.core import packing
from qcompile.passes import structure

Single = npt.NDArray[np.float32]
#: Inputs that have a step in common where weights have a scale per channel.
BLOCK = 128
#: Scales from here to there have eleven bits in sixteen.
SMALLEST_HALF, LARGEST_HALF = 2.0**-14, 65504.0
#: Inputs of a block whose sums float32 holds exactly.
LONGEST = 1024


def lower_blocks(writer: Writer, node: ir.Node, value: Codes) -> Pending:
    """Lower a MatMul or Gemm of floats by constant weights of four or eight bits."""
    gemm = node.op_type == "Gemm"
    if gemm and node.attributes.get_int("transA", 0) != 0:
        refuse(node, "transposes its first matrix", "put a Transpose in front of it")
    transposed = gemm and node.attributes.get_int("transB", 0) != 0
    codes, scale, block = _weights(node, 0 if transposed else 1)
    x, codes = rows_of(writer, writer.settled(value), codes)
    if block > LONGEST:
        refuse(node, f"has blocks of {block} inputs", f"give its weights blocks of {LONGEST} or less")
    bits = 4 if codes.min(initial=0) >= -8 and codes.max(initial=0) <= 7 else 8
    alpha, beta = (node.attributes.get_float(key, 1.0) if gemm else 1.0 for key in ("alpha", "beta"))
    bias = np.zeros(len(codes))
    if gemm and len(node.inputs) > structure.BIAS_INPUT and node.inputs[structure.BIAS_INPUT] is not None:
        real = real_of(node.inputs[structure.BIAS_INPUT], node)
        assert real is not None
        bias = np.broadcast_to(real.reshape(-1), (len(codes),)) * beta
    return _pending(writer, node, x, (codes, scale * alpha, bias, block, bits))


_Parts = tuple[npt.NDArray[np.int8], npt.NDArray[np.float64], npt.NDArray[np.float64], int, int]


def _pending(writer: Writer, node: ir.Node, x: Codes, parts: _Parts) -> Pending:
    codes, scale, bias, block, bits = parts
    shape = (*x.shape[:-1], len(codes))

    def finish_real(low: float, high: float, name: str) -> str:
        output = writer.add_tensor(name, tuple(shape[axis] for axis in x.order), FLOAT)
        numbers = _in_halves(scale), bias.astype(np.float32), block, bits, low, high
        return writer.write(BlockDense(node.name or name, (x.tensor,), output, np.ascontiguousarray(codes), *numbers))

    def affine(factor: Factors, summand: Factors) -> Pending | None:
        if factor.size not in (1, len(codes)) or summand.size not in (1, len(codes)):
            return None
        scaled, more = scale * factor.reshape(-1, 1), bias * factor.reshape(-1) + summand.reshape(-1)
        return _pending(writer, node, x, (codes, scaled, more, block, bits))

    return Pending(node, shape, x.order, _no_codes(node), finish_real=finish_real, affine=affine)


def _no_codes(node: ir.Node) -> Callable[[Grid, int, int, str], str]:
    def finish(grid: Grid, low: int, high: int, name: str) -> str:
        del grid, low, high, name
        refuse(node, "computes in float, and has a Relu or Clip and codes behind it", "quantize its input")

    return finish


def _weights(node: ir.Node, axis: int) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float64], int]:
    """Return codes, shape (out, in), scales, shape (out, blocks), and the inputs of a block."""
    dequantize = structure.produced_by(node.inputs[structure.WEIGHT_INPUT], "DequantizeLinear")
    block = dequantize.attributes.get_int("block_size", 0) if dequantize is not None else 0
    if dequantize is not None and block:
        codes, scale = _blocked(node, dequantize, block, 1 - axis)
        return (codes.T, scale.T, block) if axis == 1 else (codes, scale, block)
    weights = read_weights(node, axis)
    codes = weights.codes.T if axis == 1 else weights.codes
    scale = weights.per(len(codes))[:, np.newaxis]
    if weights.bits == 8 and (found := packing.unpacked(np.ascontiguousarray(codes), 0)) is not None:
        numbers, multiples = found
        length = packing.block_length(codes.shape[1], packing.BLOCK)
        whole = packing.from_blocks(numbers, codes.shape, 0)
        return whole.astype(np.int8), scale * multiples[..., 0].astype(np.float64), length
    block = min(BLOCK, codes.shape[1])
    return codes, np.repeat(scale, -(-codes.shape[1] // block), axis=1), block


def _blocked(
    node: ir.Node, dequantize: ir.Node, block: int, axis: int
) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float64]]:
    """Return the codes and scales of a DequantizeLinear whose blocks go along the inputs, which are an axis."""
    codes, scale = structure.constant(dequantize.inputs[0]), structure.constant(dequantize.inputs[1])
    if codes is None or scale is None or codes.ndim != 2:
        refuse(node, "its weights are no constant matrix", "export the model with its constants folded")
    if dequantize.attributes.get_int("axis", 1) % 2 != axis:
        refuse(node, "the blocks of its weights go along its outputs", "give blocks of inputs a scale each")
    zero = structure.constant(dequantize.inputs[2]) if len(dequantize.inputs) > 2 else None
    wide = codes.astype(np.int64)
    if zero is not None:
        wide -= np.repeat(zero.astype(np.int64), block, axis=axis).take(np.arange(codes.shape[axis]), axis=axis)
    if wide.min(initial=0) < -128 or wide.max(initial=0) > 127:
        refuse(node, "its weights less their zero points do not fit int8", "store them as int4 or int8")
    return wide.astype(np.int8), scale.astype(np.float64)


def _in_halves(scale: npt.NDArray[np.float64]) -> Single:
    """Return scales rounded to eleven bits, if all of them have as many in sixteen: half the bytes, off by 2^-12."""
    single = scale.astype(np.float32)
    used = np.abs(single[single != 0.0])
    if used.size and used.min() >= SMALLEST_HALF and used.max() <= LARGEST_HALF:
        return single.astype(np.float16).astype(np.float32)
    return single


def lower_float_product(writer: Writer, node: ir.Node, inputs: list[Codes]) -> Pending:
    """Lower a MatMul of two activations in float, over as many axes in front as they have."""
    a, b = last_where_they_are(writer, node, inputs)
    rank, shape = max(len(a.shape), len(b.shape)), shape_of(node.outputs[0])
    order = wanted_order(node.outputs[0], rank)
    axes = axes_of(a, rank), axes_of(b, rank), tuple(order.index(axis) for axis in range(rank))
    extents = (*shape[:-1], a.shape[-1], shape[-1])

    def pending(scale: float) -> Pending:
        def finish_real(low: float, high: float, name: str) -> str:
            output = writer.add_tensor(name, tuple(shape[axis] for axis in order), FLOAT)
            parts = node.name or name, (a.tensor, b.tensor), output, axes, extents
            return writer.write(FloatMatMul(*parts, float(np.float32(scale)), low, high))

        def affine(factor: Factors, summand: Factors) -> Pending | None:
            plain = factor.size == summand.size == 1 and not summand.any()
            return pending(scale * float(factor.reshape(()))) if plain else None

        return Pending(node, shape, order, _no_codes(node), finish_real=finish_real, affine=affine)

    return pending(1.0)
