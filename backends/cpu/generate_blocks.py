"""From dense layers with a scale per block, and products of two activations in float, to kernels and their calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from qcompile.backends.cpu.layout import packed_floats, strides
from qcompile.backends.cpu.network import Network
from qcompile.backends.integer import float_operations as ops
from qcompile.backends.integer.program import Operation
from qcompile.backends.tvm.schedules import block_dense, float_products, shares
from qcompile.backends.tvm.schedules.x86_products import Batch

#: Cycles that making a code of an activation takes.
ROUNDED = 1.0


def _block_dense(network: Network, operation: ops.BlockDense) -> None:
    outputs, length = operation.weights.shape
    processor, rows = network.processor, network.tensor(operation.inputs[0]).size // length
    halves, bounds = block_dense.in_halves(operation.scale), (operation.low, operation.high)
    shape = block_dense.Blocks(rows, length, outputs, operation.block, operation.bits == 4, halves, bounds)
    tile = block_dense.choose_tile(shape, processor)
    # Where another length of the network has the layer, weights are stored as it has them, once.
    (wide,) = network.forms.setdefault((operation.output, "blocks"), (tile.vectors,))
    tile = block_dense.choose_tile(shape, processor, wide)
    weights, scale = block_dense.pack(shape, tile, processor, operation.weights, operation.scale)
    room = -(-outputs // processor.lanes) * processor.lanes - outputs
    scratch = network.layout.scratch
    steps = scratch + rows * shape.row_bytes
    made = [("workspace", scratch), ("workspace", steps), ("workspace", steps + 4 * rows * shape.count)]
    several = rows if rows > 1 and rows * length * ROUNDED >= shares.WORTH else 0
    given = [network.at(operation.inputs[0]), *made]
    network.add(block_dense.blocks_kernel, (shape, processor, several > 0), given, operation.name, several)
    loop, iterations = block_dense.share(shape, tile, processor)
    constants = [network.constant(array) for array in (weights, scale, np.pad(operation.bias, (0, room)))]
    arguments = (replace(shape, shared=loop), tile, processor)
    given = [*made, *constants, network.at(operation.output)]
    kernel = network.add(block_dense.dense_kernel, arguments, given, operation.name, iterations)
    network.tiles[kernel] = tile


def _float_matmul(network: Network, operation: ops.FloatMatMul) -> None:
    *batch, m, k, n = operation.extents
    names = (*operation.inputs, operation.output)
    steps = [_steps(axes, strides(network.layout, network.tensor(name)))
             for axes, name in zip(operation.axes, names, strict=True)]  # fmt: skip
    shape = float_products.FloatProduct(
        m, k, n, steps[0][-2], steps[1][-2], steps[1][-1], steps[2][-2],
        operation.scale, (operation.low, operation.high),
    )  # fmt: skip
    along = tuple(zip(*(side[:-2] for side in steps), strict=True))
    each = Batch(tuple(batch), along, packed_floats(operation))
    several = each.count if each.count > 1 else 0
    several = several if several * float_products.cycles(shape, network.processor) >= shares.WORTH else 0
    places = [network.at(names[0]), network.at(names[1]), ("workspace", network.layout.scratch), network.at(names[2])]
    arguments = (shape, replace(each, shared=several > 0), network.processor)
    network.add(float_products.float_product_kernel, arguments, places, operation.name, several)


def _steps(axes: Sequence[int | None], of: Sequence[int]) -> tuple[int, ...]:
    return tuple(0 if axis is None else of[axis] for axis in axes)


GENERATORS: Mapping[type[Operation], Callable[[Network, Any], None]] = {
    ops.BlockDense: _block_dense,
    ops.FloatMatMul: _float_matmul,
}
