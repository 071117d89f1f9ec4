"""Lower what goes over a map with a window, or changes its size: pools, Resize, Pad."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from qcompile.backends.integer.operations import AveragePool, MaxPool, Pad, Requantize, Resize, Window
from qcompile.backends.integer.values import Codes, Grid, Pending, Writer, as_map, channels_last, refuse, shape_of
from qcompile.core import numerics
from qcompile.passes import structure


def window_of(
    node: ir.Node, size: tuple[int, int], arriving: Sequence[int], leaving: Sequence[int], outside: int = 0
) -> Window:
    """Return the window of a convolution or pool over one axis or two.

    Parameters
    ----------
    node : onnx_ir.Node
    size : tuple of int
        Rows and columns of the window.
    arriving, leaving : sequence of int
        Length of each axis of input and output that it goes along.
    outside : int
        The code that padding reads as.
    """
    axes = len(arriving)
    strides = [*node.attributes.get_ints("strides", (1,) * axes), 1][:2]
    dilations = [*node.attributes.get_ints("dilations", (1,) * axes), 1][:2]
    given = list(node.attributes.get_ints("pads", (0,) * (2 * axes)))
    kind = node.attributes.get_string("auto_pad", "NOTSET")
    before, after = [0, 0], [0, 0]
    for axis in range(axes):
        # What output and input say settles the end, also where ceil_mode cuts a last window off.
        reach = (leaving[axis] - 1) * strides[axis] + (size[axis] - 1) * dilations[axis] + 1 - arriving[axis]
        if kind in ("SAME_UPPER", "SAME_LOWER"):
            total = max(reach, 0)
            before[axis] = total // 2 if kind == "SAME_UPPER" else total - total // 2
        elif kind == "NOTSET":
            before[axis] = given[axis]
        after[axis] = max(reach - before[axis], 0)
    if min(before) < 0:
        refuse(node, "has negative padding", "cut its input with a Slice")
    return Window(size, (strides[0], strides[1]), (before[0], before[1], after[0], after[1]),
                  (dilations[0], dilations[1]), outside)  # fmt: skip


def require_map(node: ir.Node, x: Codes) -> None:
    """Refuse what is no map of one or two axes of space, or several at once."""
    if len(x.shape) not in (3, 4):
        refuse(node, f"goes over {len(x.shape) - 2} axes", "only one or two have an integer form")
    if x.shape[0] != 1:
        refuse(node, f"has a batch of {x.shape[0]}", "export the model with batch 1")


def _map(writer: Writer, value: Codes, node: ir.Node) -> tuple[Codes, str]:
    """Return a pool's input stored channels last, and its tensor as a map of four axes."""
    x = writer.plain(value, node)
    require_map(node, x)
    x = writer.arranged(x, channels_last(len(x.shape)))
    return x, writer.viewed(x.tensor, as_map(x.stored))


def _kernel(node: ir.Node) -> tuple[int, int]:
    kernel = node.attributes.get_ints("kernel_shape", ())
    return (kernel[0], kernel[1] if len(kernel) > 1 else 1)


def lower_max_pool(writer: Writer, node: ir.Node, inputs: list[Codes]) -> Codes:
    """Lower a MaxPool: its output has its input's scale."""
    x, source = _map(writer, inputs[0], node)
    if len(node.outputs) > 1 and node.outputs[1].uses():
        refuse(node, "is asked for the places of its maxima", "leave that output out")
    shape, size = shape_of(node.outputs[0]), _kernel(node)
    window = window_of(node, size, x.shape[2:], shape[2:])
    result = Codes("", shape, x.order, x.grid)
    output = writer.add_tensor(str(node.outputs[0].name), as_map(result.stored), x.grid)
    writer.write(MaxPool(node.name or output, (source,), output, window, x.grid.low, x.grid.high))
    return Codes(writer.viewed(output, result.stored), shape, x.order, x.grid)


def lower_average_pool(writer: Writer, node: ir.Node, inputs: list[Codes]) -> Pending:
    """Lower an AveragePool whose every window counts the same number of codes."""
    x, _ = _map(writer, inputs[0], node)
    shape, size = shape_of(node.outputs[0]), _kernel(node)
    window = window_of(node, size, x.shape[2:], shape[2:], x.grid.zero_point)
    counted = node.attributes.get_int("count_include_pad", 0) and not node.attributes.get_int("ceil_mode", 0)
    if any(window.pads) and not counted:
        refuse(node, "averages over fewer elements at the border", "set count_include_pad, or pool without padding")
    return _average(writer, node, inputs[0], window, shape)


def lower_global_average_pool(writer: Writer, node: ir.Node, inputs: list[Codes]) -> Pending:
    """Lower a GlobalAveragePool."""
    size = (*inputs[0].shape[2:], 1)[:2]
    return _average(writer, node, inputs[0], Window((size[0], size[1])), shape_of(node.outputs[0]))


def lower_reduce_mean(writer: Writer, node: ir.Node, inputs: list[Codes]) -> Pending:
    """Lower a ReduceMean over the axes of a map that are not its channels."""
    x = inputs[0]
    rank = len(x.shape)
    axes = structure.constant(node.inputs[1]) if len(node.inputs) > 1 else None
    given = node.attributes.get_ints("axes", ()) if axes is None else axes.reshape(-1).tolist()
    reduced = {int(axis) % rank for axis in given}
    kept = [axis for axis in range(1, rank) if axis not in reduced]
    if rank not in (3, 4) or 0 in reduced or len(kept) != 1:
        refuse(node, f"averages over axes {sorted(reduced)}", "only the mean over all positions has an integer form")
    # As stored: batch, what is reduced, what is kept.
    order = (0, *sorted(reduced), kept[0])
    whole = tuple(1 if axis in reduced else x.shape[axis] for axis in range(rank))
    size = (*(x.shape[axis] for axis in sorted(reduced)), 1)[:2]
    pooled = _average(writer, node, writer.arranged(x, order), Window((size[0], size[1])), whole, order)
    if node.attributes.get_int("keepdims", 1):
        return pooled
    shape = shape_of(node.outputs[0])

    def finish(grid: Grid, low: int, high: int, name: str) -> str:
        return writer.viewed(pooled.finish(grid, low, high, name), shape)

    return Pending(node, shape, tuple(range(len(shape))), finish)


def _average(
    writer: Writer,
    node: ir.Node,
    value: Codes,
    window: Window,
    shape: tuple[int, ...],
    order: tuple[int, ...] | None = None,
) -> Pending:
    x = writer.plain(value, node)
    require_map(node, x)
    order = order or channels_last(len(x.shape))
    x = writer.arranged(x, order)
    source = writer.viewed(x.tensor, as_map(x.stored))
    count = window.size[0] * window.size[1]
    most = count * (abs(x.grid.low) + abs(x.grid.zero_point))
    if most >= 2**31:
        refuse(node, f"its sums can reach {most}, beyond int32", "quantize its input to 8 bits")

    def finish(grid: Grid, low: int, high: int, name: str) -> str:
        stored = tuple(shape[axis] for axis in order)
        output = writer.add_tensor(name, as_map(stored), grid)
        multiplier, shift = numerics.fixed_point([np.float64(x.grid.scale) / count / grid.scale])
        step = Requantize(multiplier, shift, grid.zero_point, low, high)
        bias = -count * x.grid.zero_point
        writer.write(AveragePool(node.name or name, (source,), output, window, bias, step))
        return writer.viewed(output, stored)

    return Pending(node, shape, order, finish)


def lower_resize(writer: Writer, node: ir.Node, inputs: list[Codes]) -> Codes:
    """Lower a Resize of a map that takes the nearest element."""
    x = writer.plain(inputs[0], node)
    shape = shape_of(node.outputs[0])
    if node.attributes.get_string("mode", "nearest") != "nearest":
        refuse(node, "interpolates", "only the nearest neighbour has an integer form")
    require_map(node, x)
    if len(x.shape) != 4 or shape[:2] != x.shape[:2]:
        refuse(node, "resizes other axes than those of a map", "only height and width can be resized")
    x = writer.arranged(x, channels_last(4))
    rows, columns = (_nearest(node, x.shape[axis], shape[axis], axis) for axis in (2, 3))
    result = Codes("", shape, x.order, x.grid)
    output = writer.add_tensor(str(node.outputs[0].name), result.stored, x.grid)
    writer.write(Resize(node.name or output, (x.tensor,), output, rows, columns))
    return Codes(output, shape, x.order, x.grid)


def _nearest(node: ir.Node, arriving: int, leaving: int, axis: int) -> tuple[int, ...]:
    """Return which element each element along an axis is taken from, as ONNX Resize has it."""
    scales = structure.constant(node.inputs[2]) if len(node.inputs) > 2 else None
    scale = float(scales.reshape(-1)[axis]) if scales is not None and scales.size else leaving / arriving
    places = np.arange(leaving, dtype=np.float64)
    transform = node.attributes.get_string("coordinate_transformation_mode", "half_pixel")
    if transform == "asymmetric":
        real = places / scale
    elif transform == "half_pixel" or (transform == "pytorch_half_pixel" and leaving > 1):
        real = (places + 0.5) / scale - 0.5
    elif transform == "align_corners" and leaving > 1:
        real = places * (arriving - 1) / (leaving - 1)
    else:
        refuse(node, f"has coordinates '{transform}'", "use asymmetric or half_pixel")
    kind = node.attributes.get_string("nearest_mode", "round_prefer_floor")
    rounded = {"floor": np.floor(real), "ceil": np.ceil(real), "round_prefer_ceil": np.floor(real + 0.5),
               "round_prefer_floor": np.ceil(real - 0.5)}[kind]  # fmt: skip
    return tuple(int(place) for place in np.clip(rounded, 0, arriving - 1))


def lower_pad(writer: Writer, node: ir.Node, inputs: list[Codes]) -> Codes:
    """Lower a Pad with a constant."""
    x = writer.plain(inputs[0], node)
    pads = structure.constant(node.inputs[1]) if len(node.inputs) > 1 else None
    if node.attributes.get_string("mode", "constant") != "constant" or pads is None:
        refuse(node, "pads with something that is no constant", "only a Pad with one value has an integer form")
    rank = len(x.shape)
    axes = structure.constant(node.inputs[3]) if len(node.inputs) > 3 else None
    named = range(rank) if axes is None else [int(axis) % rank for axis in axes.reshape(-1)]
    amounts = pads.reshape(2, -1)
    before, after = [0] * rank, [0] * rank
    for index, axis in enumerate(named):
        before[x.place_of(axis)], after[x.place_of(axis)] = int(amounts[0, index]), int(amounts[1, index])
    if min(*before, *after) < 0:
        refuse(node, "cuts its input", "use a Slice")
    value = structure.constant(node.inputs[2]) if len(node.inputs) > 2 else None
    code = int(x.grid.codes(0.0 if value is None else value.reshape(-1)[0]))
    shape = shape_of(node.outputs[0])
    output = writer.add_tensor(str(node.outputs[0].name), tuple(shape[axis] for axis in x.order), x.grid)
    writer.write(Pad(node.name or output, (x.tensor,), output, tuple(before), tuple(after), code))
    return Codes(output, shape, x.order, x.grid)
