"""Decide: with which scales the operators run that `place` chose. The graph stays as it is.

`place` says which tensors must be measured; `allocate_bits` turns the measurements into the plan. Between the two lies
the one calibration run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

import numpy as np
import onnx_ir as ir

from qcompile.calib.collect import Statistics
from qcompile.calib.map_losses import Clip
from qcompile.calib.observers import Observer
from qcompile.core import halves, numerics, packing, scratch
from qcompile.core.plan import Precision, QuantPlan, Role, TensorQuant
from qcompile.core.target import Target
from qcompile.passes import structure
from qcompile.passes.place import Placement

#: Bits of weights that are packed (`core/packing.py`), but for what their block has in common.
PACKED = 4
#: The types of four bits beside those of eight.
HALVES = {"int8": "int4", "uint8": "uint4"}
#: What is left above the highest score seen, as far as scores also lie below zero: e^8 is 3,000 times as likely.
HEADROOM = 8.0


def allocate_bits(
    model: ir.Model,
    placement: Placement,
    statistics: Statistics,
    target: Target,
    observers: Mapping[str, Observer],
    bits: Mapping[str, int] = MappingProxyType({}),
    narrow: Mapping[str, Clip] = MappingProxyType({}),
) -> QuantPlan:
    """Turn a placement and measurements into the plan.

    Parameters
    ----------
    model : onnx_ir.Model
        The model that was placed and measured.
    placement : Placement
    statistics : Statistics
        Has every value of ``placement.activations``.
    target : Target
    observers : mapping of str to Observer
        How the range of each value of ``placement.activations`` is chosen. A dynamic one needs no statistics where the
        placement allows it.
    bits : mapping of str to int
        By name of a weight, how many it is to be stored in: 8, or 4, and where the target has no type of four bits a
        part of what its block has in common.
    narrow : mapping of str to Clip
        By name of an activation whose codes are to have four bits, how its range is chosen then.
    """
    tensors: dict[str, TensorQuant] = {}
    scores = scores_of(model) if target.integer_only else frozenset()
    for name in placement.activations:
        if observers[name] is Observer.DYNAMIC and name in placement.dynamic:
            tensors[name] = TensorQuant(Role.ACTIVATION, target.activation_dtype, (), ())
            continue
        dtype = HALVES[target.activation_dtype] if name in narrow else target.activation_dtype
        seen = statistics.histograms[name].mirrored() if target.symmetric else statistics.histograms[name]
        low, high = narrow.get(name, Clip(observers[name])).bounds(seen, dtype)
        if name in scores:
            high = max(high, min(-low, high + HEADROOM))
        if target.symmetric or (name in placement.symmetric and numerics.code_range(dtype)[0] < 0):
            high = max(abs(low), abs(high))
            scale, zero_point = numerics.symmetric_scale([high], dtype), np.zeros(1, np.int64)
        else:
            scale, zero_point = numerics.affine_scale([low], [high], dtype)
        tensors[name] = TensorQuant(Role.ACTIVATION, dtype, (float(scale[0]),), (int(zero_point[0]),))
    for name, source in placement.same_scale.items():
        tensors[name] = tensors[source]
    for node in model.graph:
        rule = target.ops.get(node.op_type)
        op = placement.ops.get(structure.node_name(node))
        if rule is None or op is None or op.precision is Precision.FLOAT:
            continue
        for value, axis in structure.stored_weights(node, rule.kind):
            weight = structure.name_of(value)
            wide = all(structure.node_name(reader) in placement.wide for reader in structure.readers(value))
            dtype, block = _stored_as(target, wide, bits.get(weight) == PACKED, op.precision)
            quant = _weight_quant(node, value, axis, dtype, target.per_channel and not rule.per_tensor, tensors, block)
            if weight in tensors:
                # Two operators share these weights, and either may need room for its bias.
                both = zip(quant.scale, tensors[weight].scale, strict=True)
                quant = replace(quant, scale=tuple(map(max, both)))
            tensors[weight] = quant
    return QuantPlan(tensors, placement.ops)


def _stored_as(target: Target, wide: bool, packed: bool, precision: Precision) -> tuple[str, int]:
    """Return the type that weights are stored in, and the length of the blocks that have a scale each, or 0."""
    dtype = target.wide_weight_dtype if wide else target.weight_dtype
    if not packed or dtype != target.weight_dtype:
        return dtype, 0
    # Operators in float take what a block has in common into its scale, and tables are rows of bytes.
    if not target.narrow_weight_dtype or precision is Precision.WEIGHT_ONLY:
        return dtype, packing.BLOCK
    return target.narrow_weight_dtype, 0


def scores_of(model: ir.Model) -> frozenset[str]:
    """Return the values that a Softmax at the model's end reads.

    Their highest decide, and are those that calibration may not have seen: samples of no class, or of few, have no
    score as high as a sure one has. Clipped, two classes that are likely become one another's equal.
    """
    ends = (value.producer() for value in model.graph.outputs)
    return frozenset(
        structure.name_of(structure.input_of(node, 0))
        for node in ends
        if node is not None and structure.is_standard(node, "Softmax")
    )


def round_to_codes(model: ir.Model, plan: QuantPlan) -> ir.Model:
    """Return the model with its weights as they will be dequantized from their codes, everything else in float."""
    copy = model.clone()
    for name, quant in plan.tensors.items():
        if quant.role is Role.WEIGHT and name in copy.graph.initializers:
            value = copy.graph.initializers[name]
            weight = structure.constant(value)
            assert weight is not None
            value.const_value = scratch.tensor(quant.dequantize(quant.quantize(weight)), name)
    return copy


def _weight_quant(
    node: ir.Node,
    value: ir.Value,
    axis: int,
    dtype: str,
    per_channel: bool,
    tensors: Mapping[str, TensorQuant],
    block: int,
) -> TensorQuant:
    """Give weights a symmetric scale per channel of an axis; a linear operator's have one for all on some targets."""
    weight = structure.constant(value)
    assert weight is not None
    others = tuple(a for a in range(weight.ndim) if a != axis)
    by_channel = per_channel or not structure.is_linear(node)
    absmax = np.max(np.abs(weight), axis=others if by_channel else None).reshape(-1)
    if block:
        scale = packing.packed_scale(absmax)
    elif numerics.bits_of(dtype) == PACKED:
        rows = np.moveaxis(weight, axis, 0) if by_channel else weight
        scale = numerics.clipped_scale(rows.reshape(absmax.size, -1), dtype)
    else:
        scale = numerics.symmetric_scale(absmax, dtype)
    biased = node.op_type in structure.BIASED_OPS and len(node.inputs) > structure.BIAS_INPUT
    activation = tensors.get(structure.name_of(node.inputs[0])) if biased and node.inputs[0] is not None else None
    bias = structure.constant(node.inputs[structure.BIAS_INPUT]) if biased else None
    if activation is not None and bias is not None:
        # The scale of dead weights is arbitrary: it becomes the finest that has room for the bias, all that is left.
        alive = np.where(np.float64(absmax) >= scale, scale, np.float32(0.0))
        scale = _room_for_bias(alive, activation.scale[0], bias)
    channels = axis if scale.size > 1 else None
    if scale.size >= halves.FEWEST:
        scale = halves.above(scale)  # half the bytes to store; no step is longer by more than a thousandth
    return TensorQuant(Role.WEIGHT, dtype, tuple(map(float, scale)), (0,) * scale.size, channels, block)


def _room_for_bias(
    scale: numerics.FloatArray, activation_scale: float, bias: numerics.FloatArray
) -> numerics.FloatArray:
    """Raise weight scales until the bias fits int32 in steps of (activation scale · weight scale).

    A channel of nearly dead weights has a tiny scale, and a bias of ordinary size in its steps overflows the
    accumulator's type; coarser steps for weights that small cost nothing.
    """
    least = np.abs(np.float64(bias)) / (activation_scale * float(2**31 - 1) * 0.5)
    room = np.maximum(scale, least.astype(np.float32) if scale.size > 1 else np.float32(least.max()))
    return np.where(room >= numerics.SMALLEST_SCALE, room, np.float32(1.0))
