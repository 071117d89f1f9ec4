"""Which kernel a dense layer or convolution has: tiles, vectors with weights of four or eight bits, or those of ARM."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any

from qcompile.backends.cpu.network import Network
from qcompile.backends.tvm.schedules import aarch64_linear, linear
from qcompile.backends.tvm.schedules import x86_amx as amx
from qcompile.backends.tvm.schedules import x86_nibbles as nibbles
from qcompile.backends.tvm.schedules.aarch64 import DOT, Aarch64
from qcompile.backends.tvm.schedules.vectors import Processor
from qcompile.backends.tvm.schedules.x86_cycles import choose_tile, cycles


def product_form(shape: linear.Linear, processor: Processor) -> tuple[Any, linear.Linear, linear.Tile, float]:
    """Return what multiplies two activations: its emitter, the shape that it has, its tile, and the cycles."""
    vectors = -(-shape.outputs // processor.lanes)
    if isinstance(processor, Aarch64):
        plain = replace(processor, instruction=DOT if processor.instruction else "")
        tile = aarch64_linear.choose_tile(shape, plain)
        return aarch64_linear.dots, shape, tile, cycles(shape, tile, vectors)
    block = amx.choose_block(shape, processor) if processor.tiles else None
    if block:
        return amx.emit, amx.whole(shape, block), block, amx.cycles(shape, block, vectors)
    tile = choose_tile(shape, processor)
    return linear.emit, shape, tile, cycles(shape, tile, vectors)


def form(shape: linear.Linear, processor: Processor) -> tuple[Any, Any, linear.Tile, Any]:
    """Return what packs a layer's weights, what computes it, its tile, and what counts its cycles."""
    block = amx.choose_block(shape, processor) if processor.tiles else None
    if block:
        return amx.pack, amx.tiles_kernel, block, amx.cycles
    if isinstance(processor, Aarch64):
        arm = aarch64_linear
        if shape.nibbles:
            plain = replace(processor, instruction=DOT if processor.instruction else "")
            return nibbles.pack, arm.nibbles_kernel, arm.choose_tile(shape, plain), cycles
        return arm.pack, arm.linear_kernel, arm.choose_tile(shape, processor), cycles
    tile = choose_tile(shape, processor)
    if shape.nibbles:
        return nibbles.pack, nibbles.nibbles_kernel, tile, cycles
    return linear.pack, linear.linear_kernel, tile, cycles


def packed_form(
    network: Network, layer: tuple[Any, ...], shape: linear.Linear, weights: Any, numbers: tuple[Any, ...]
) -> tuple[Any, linear.Tile, Any, Any, Any]:
    """Return a layer's kernel, its tile, what counts its cycles, its weights and its table.

    Where another length of the network has the layer, weights are stored once: if this one would store them in another
    way, it takes the other's kernel and as much of the tile as it has outputs for.

    Parameters
    ----------
    network : Network
    layer : tuple
        Which one it is, at all lengths.
    shape : Linear
    weights, numbers
        As `linear.pack` takes them.
    """
    pack, kernel, tile, cost = form(shape, network.processor)
    packed, table = pack(shape, tile, network.processor, weights, numbers)
    digest = hashlib.sha256(packed.tobytes()).digest()
    pack, kernel_there, tile_there, cost_there, stored = network.forms.setdefault(
        layer, (pack, kernel, tile, cost, digest)
    )
    if (kernel_there, stored) == (kernel, digest):
        return kernel, tile, cost, packed, table
    columns = min(tile_there.columns, shape.columns)
    rows = min(tile_there.rows, shape.rows) if columns == shape.columns else 1
    tile = replace(tile_there, rows=rows, columns=columns)
    return kernel_there, tile, cost_there, *pack(shape, tile, network.processor, weights, numbers)
