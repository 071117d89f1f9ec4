"""Lower a product of two activations: both are codes, and neither is packed before it is known."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from qcompile.backends.integer.bounds import LARGEST
from qcompile.backends.integer.float_operations import Dequantize, MatMul
from qcompile.backends.integer.lower_linear import requantize
from qcompile.backends.integer.operations import Requantize
from qcompile.backends.integer.values import FLOAT, Codes, Factors, Grid, Pending, Writer, refuse, shape_of
from qcompile.passes import structure


def lower_product(writer: Writer, node: ir.Node, inputs: list[Codes]) -> Pending:
    """Lower a MatMul of two activations, over as many axes in front as they have."""
    a, b = last_where_they_are(writer, node, [writer.plain(writer.settled(value), node) for value in inputs])
    if (a.grid.dtype, b.grid.dtype) != ("int8", "int8"):
        refuse(node, f"multiplies {a.grid.dtype} by {b.grid.dtype}", "quantize both matrices to 8 bits")
    if b.grid.zero_point:
        refuse(node, "its second matrix has a zero point", "quantize it symmetrically")
    rank = max(len(a.shape), len(b.shape))
    shape = shape_of(node.outputs[0])
    order = wanted_order(node.outputs[0], rank)
    if a.shape[-1] * 255 * 128 > LARGEST:
        refuse(node, f"adds up {a.shape[-1]} products, beyond int32", "split it")
    axes = axes_of(a, rank), axes_of(b, rank), tuple(order.index(axis) for axis in range(rank))
    extents = (*shape[:-1], a.shape[-1], shape[-1])

    def pending(scale: np.float64) -> Pending:
        def write(step: Requantize | Dequantize, grid: Grid, name: str) -> str:
            output = writer.add_tensor(name, tuple(shape[axis] for axis in order), grid)
            parts = node.name or name, (a.tensor, b.tensor), output, axes, extents, a.grid.zero_point, step
            return writer.write(MatMul(*parts))

        def finish(grid: Grid, low: int, high: int, name: str) -> str:
            return write(requantize(np.array([scale / grid.scale]), grid, low, high, node), grid, name)

        def finish_real(low: float, high: float, name: str) -> str:
            return write(Dequantize(np.array([scale], np.float32), low, high), FLOAT, name)

        def affine(factor: Factors, summand: Factors) -> Pending | None:
            plain = factor.size == summand.size == 1 and not summand.any() and factor.min() > 0.0
            return pending(scale * np.float64(factor.reshape(()))) if plain else None

        return Pending(node, shape, order, finish, finish_real=finish_real, affine=affine)

    return pending(np.float64(a.grid.scale) * np.float64(b.grid.scale))


def last_where_they_are(writer: Writer, node: ir.Node, inputs: Sequence[Codes]) -> tuple[Codes, Codes]:
    """Return two matrices whose rows lie in one piece, of the second one its columns perhaps."""
    a, b = (writer.settled(value) for value in inputs)
    if min(len(a.shape), len(b.shape)) < 2:
        refuse(node, "multiplies by a vector", "give it an axis of one element")
    if a.order[-1] != len(a.shape) - 1:
        a = writer.arranged(a, (*(axis for axis in a.order if axis != len(a.shape) - 1), len(a.shape) - 1))
    if b.order[-1] < len(b.shape) - 2:
        b = writer.arranged(b, tuple(range(len(b.shape))))
    return a, b


def axes_of(value: Codes, rank: int) -> tuple[int | None, ...]:
    """Return where each axis of the product is stored; none of an axis that is repeated."""
    missing = rank - len(value.shape)
    own = (axis - missing for axis in range(rank))
    return tuple(
        None if axis < 0 or (axis < len(value.shape) - 2 and value.shape[axis] == 1) else value.place_of(axis)
        for axis in own
    )


def wanted_order(value: ir.Value, rank: int) -> tuple[int, ...]:
    """Return the order in which what reads a product wants it: as a Transpose behind it leaves it."""
    natural: Sequence[int] = range(rank)
    while (node := structure.only_reader(value)) is not None:
        if structure.is_standard(node, "Transpose"):
            permutation = node.attributes.get_ints("perm", tuple(reversed(range(rank))))
            return tuple(permutation) if permutation[-1] == rank - 1 else tuple(natural)
        if not structure.is_standard(node, "QuantizeLinear", "DequantizeLinear", "Identity"):
            break
        value = node.outputs[0]
    return tuple(natural)
