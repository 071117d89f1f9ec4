"""Where floats end: the scales of a model's Q/DQ, and the layout in which its inputs arrive."""

from __future__ import annotations

import onnx_ir as ir

from qcompile.backends.integer.lower_elementwise import FUNCTIONS
from qcompile.backends.integer.program import Port
from qcompile.backends.integer.values import Codes, Grid, Writer, channels_last, refuse, shape_of
from qcompile.passes import structure

#: What the signed codes are below those that a model writes.
OFFSETS = {"int8": ("int8", 0), "uint8": ("int8", 128), "int16": ("int16", 0), "uint16": ("int16", 32768),
           "int4": ("int4", 0), "uint4": ("int4", 8)}  # fmt: skip
#: What a value keeps its codes through.
MOVES = ("Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity", "Dropout")
#: What reads maps channels last.
READS_MAPS = frozenset({"Conv", "MaxPool", "AveragePool", "GlobalAveragePool", "Resize"})
#: What leaves axes as they are.
KEEPS_AXES = FUNCTIONS | {"QuantizeLinear", "DequantizeLinear", "Identity", "Dropout", "BatchNormalization", "Pad"}


def grid_of(node: ir.Node) -> Grid:
    """Return the grid of a QuantizeLinear or DequantizeLinear of an activation.

    Raises
    ------
    TargetError
        If its scale is no single constant, or its type has no integer kernels.
    """
    scale, zero_point = structure.constant(node.inputs[1]), None
    if scale is None or scale.size != 1:
        refuse(node, "has a scale that is no single constant", "quantize activations per tensor, with static scales")
    kind = node.attributes.get_int("output_dtype", 0)
    dtype = ir.DataType(kind).name.lower() if kind else "uint8"
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        zero_point = structure.constant(node.inputs[2])
        if zero_point is None:
            refuse(node, "has a zero point that is no constant", "quantize activations with static zero points")
        dtype = str(zero_point.dtype)
    elif node.op_type == "DequantizeLinear" and node.inputs[0] is not None and node.inputs[0].dtype is not None:
        dtype = node.inputs[0].dtype.name.lower()
    if dtype not in OFFSETS:
        refuse(node, f"has codes of {dtype}", "quantize activations to 4, 8 or 16 bits")
    signed, offset = OFFSETS[dtype]
    zero = 0 if zero_point is None else int(zero_point.reshape(-1)[0])
    return Grid(float(scale.reshape(-1)[0]), zero - offset, signed, offset != 0)


def input_port(writer: Writer, value: ir.Value) -> tuple[Codes, Port] | None:
    """Return an input as the codes that a caller hands over, stored as what reads it first wants it.

    None where nothing quantizes it: what reads it says so.
    """
    grid = _first_grid(value)
    if grid is None:
        return None
    shape = shape_of(value)
    order = _wanted_order(value, tuple(range(len(shape))))
    tensor = writer.add_tensor(structure.name_of(value), tuple(shape[axis] for axis in order), grid)
    # An input of codes already is one of its own type; what a caller has is floats otherwise.
    unsigned = value.dtype in (ir.DataType.UINT4, ir.DataType.UINT8, ir.DataType.UINT16)
    return Codes(tensor, shape, order, grid), Port(structure.name_of(value), tensor, shape, order, unsigned)


def _first_grid(value: ir.Value) -> Grid | None:
    """Return the codes that an input is rounded to, behind what only moves it."""
    for node in structure.readers(value):
        if structure.is_standard(node, "QuantizeLinear", "DequantizeLinear"):
            return grid_of(node)
    for node in structure.readers(value):
        if structure.is_standard(node, *MOVES) and (grid := _first_grid(node.outputs[0])) is not None:
            return grid
    return None


def _wanted_order(value: ir.Value, axes: tuple[int, ...], seen: set[ir.Node] | None = None) -> tuple[int, ...]:
    """Return the order in which an input's axes are to be stored: channels last where a map is wanted of it.

    Parameters
    ----------
    value : onnx_ir.Value
    axes : tuple of int
        Which of the input's axes each axis of the value is.
    seen : set of onnx_ir.Node, optional
        What was looked at.
    """
    as_given, seen = tuple(sorted(axes)), set() if seen is None else seen
    for node in structure.readers(value):
        if node in seen:
            continue
        seen.add(node)
        found = as_given
        if node.op_type in KEEPS_AXES and len(node.outputs[0].shape or ()) == len(axes):
            found = _wanted_order(node.outputs[0], axes, seen)
        elif structure.is_standard(node, "Transpose"):
            permutation = node.attributes.get_ints("perm", tuple(reversed(range(len(axes)))))
            found = _wanted_order(node.outputs[0], tuple(axes[axis] for axis in permutation), seen)
        elif len(axes) in (3, 4) and (node.op_type in READS_MAPS or _averages_space(node, len(axes))):
            found = tuple(axes[axis] for axis in channels_last(len(axes)))
        if found != as_given:
            return found
    return as_given


def _averages_space(node: ir.Node, rank: int) -> bool:
    """Tell whether a node is the mean over all positions of a map."""
    if not structure.is_standard(node, "ReduceMean"):
        return False
    axes = structure.constant(node.inputs[1]) if len(node.inputs) > 1 else None
    given = node.attributes.get_ints("axes", ()) if axes is None else axes.reshape(-1)
    return sorted(int(axis) % rank for axis in given) == list(range(2, rank))
