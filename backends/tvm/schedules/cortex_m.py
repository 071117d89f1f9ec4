"""Schedules for processors with few registers: tiles of 2x2 accumulators, patches gathered on the stack.

A tile's inner loop is a function of ``qc_kernels.h``: SMLAD on Cortex-M4 and M7, MVE on M55, plain C elsewhere.
"""

from __future__ import annotations

from typing import Any

from qcompile.backends.tvm.definitions import Convolution, define_convolution, define_depthwise, define_grouped
from qcompile.backends.tvm.emit import Function, load_tvm
from qcompile.backends.tvm.schedules.tiles import register_tile
from qcompile.backends.tvm.weight_forms import WeightForm, row_bytes

#: Rows of a tile lie no farther apart than an address has room for.
REACH = 4096
#: Channels that `qc_depthwise_4` takes at once.
GROUP = 4
#: Channels whose patch a depthwise convolution gathers at once: copies of fewer are slow, more want stack.
GATHERED = 32
#: Most taps of a depthwise convolution in four bits: products times 4096 are summed in 32 bits.
MOST_TAPS = 504
#: From so many on a row pays in four bits whose length is no multiple of eight: what is left over goes code by code.
LONG = 64
#: What tiles are called by the form of their weights.
TILES = {WeightForm.BYTES: "qc_tile", WeightForm.NIBBLES: "qc_tile4", WeightForm.FOURS: "qc_wide"}
DEPTHWISE = {
    WeightForm.BYTES: "qc_depthwise_4", WeightForm.NIBBLES: "qc_depthwise4_4", WeightForm.FOURS: "qc_wide_depthwise_4",
}  # fmt: skip


def tile(shape: Convolution) -> tuple[int, int]:
    """Return how many pixels and output channels are accumulated at once; both divide the output."""
    length = shape.taps * shape.channels
    row = row_bytes(shape.form, length)
    # What lies farthest from the pointers: the second pixel's last load, and the last row of weights.
    beside = {WeightForm.BYTES: length, WeightForm.NIBBLES: length + row, WeightForm.FOURS: 2 * length + 4}[shape.form]
    if shape.width % 2 == 0 and shape.outputs % 2 == 0 and beside < REACH:
        return 2, 2
    fitting = (count for count in (4, 2) if shape.outputs % count == 0 and (count - 1) * row < REACH)
    return 1, next(fitting, 2 if shape.outputs % 2 == 0 else 1)


def in_groups(shape: Convolution) -> bool:
    """Tell whether a depthwise convolution's channels are taken four at a time."""
    return shape.depthwise and shape.channels % GROUP == 0 and shape.taps > 1


def form_of(shape: Convolution, bits: int) -> WeightForm:
    """Return how a convolution's weights are to be stored: as its tiles take them, where it has tiles.

    Parameters
    ----------
    shape : Convolution
    bits : int
        Of the weights.
    """
    tiles = shape.outputs % 2 == 0 and shape.taps * shape.channels > 1 if shape.groups == 1 else in_groups(shape)
    if not tiles:
        return WeightForm.BYTES
    if shape.reads == "int16":
        return WeightForm.FOURS
    length = shape.taps * shape.channels
    packs = bits == 4 and (shape.taps <= MOST_TAPS if shape.groups > 1 else length % 8 == 0 or length >= LONG)
    return WeightForm.NIBBLES if packs else WeightForm.BYTES


def parts(shape: Convolution) -> list[tuple[int, Convolution]]:
    """Return the first column and the shape of each part: an odd column is one of its own."""
    if shape.groups > 1 or shape.width % 2 == 0 or shape.width == 1 or shape.outputs % 2:
        return [(0, shape)]
    even = shape.width - 1
    return [(0, shape.columns_from(0, even)), (even, shape.columns_from(even, 1))]


def schedule_convolution(shape: Convolution) -> Function:
    """Return a convolution's kernel."""
    tvm = load_tvm()
    pixels, outputs = tile(shape)
    length = shape.taps * shape.channels
    schedule = tvm.s_tir.Schedule(define_convolution(shape))
    output, acc = schedule.get_sblock("output"), schedule.get_sblock("acc")
    x, o = schedule.get_loops(output)
    x_outer, x_inner = schedule.split(x, [None, pixels])
    o_outer, o_inner = schedule.split(o, [None, outputs])
    schedule.reorder(x_outer, o_outer, x_inner, o_inner)
    schedule.unroll(x_inner)
    schedule.unroll(o_inner)
    schedule.compute_at(acc, o_outer, preserve_unit_loops=True)
    if not shape.pointwise:
        patch = schedule.get_sblock("patch")
        schedule.compute_at(patch, x_outer, preserve_unit_loops=True)
        schedule.split(schedule.get_loops(patch)[-1], [*shape.size, shape.channels])
    first = schedule.get_loops(acc)[-3 if pixels > 1 else -2]
    _start_at_zero(schedule, acc, first, 2)
    if outputs > 1 and length > 1:  # an axis of one is no axis to tensorize along
        extents = {"q": outputs, "k": length} | ({"p": pixels} if pixels > 1 else {})
        contraction = "pk,qk->pq" if pixels > 1 else "k,qk->q"
        call = f"{TILES[shape.form]}_{pixels}x{outputs}"
        stored = None if shape.form is WeightForm.BYTES else (length, row_bytes(shape.form, length))
        schedule.tensorize(first, register_tile(call, contraction, extents, shape.reads, stored))
    return schedule.mod["main"]


def schedule_grouped(shape: Convolution) -> Function:
    """Return a kernel of a convolution in groups that are not single channels, four at a time."""
    schedule = load_tvm().s_tir.Schedule(define_grouped(shape))
    return at_output(schedule)


def at_output(schedule: Any) -> Function:
    """Accumulate each output where it is needed, in a register."""
    output, acc = schedule.get_sblock("output"), schedule.get_sblock("acc")
    schedule.compute_at(acc, schedule.get_loops(output)[-1], preserve_unit_loops=True)
    loops = len(schedule.get_loops(output))
    schedule.decompose_reduction(acc, schedule.get_loops(acc)[loops])
    return schedule.mod["main"]


def schedule_depthwise(shape: Convolution) -> Function:
    """Return a depthwise convolution's kernel; its channels are a multiple of `GROUP`."""
    tvm = load_tvm()
    schedule = tvm.s_tir.Schedule(define_depthwise(shape, GROUP))
    output, acc, patch = (schedule.get_sblock(name) for name in ("output", "acc", "patch"))
    block = max(count for count in range(GROUP, GATHERED + 1, GROUP) if shape.channels % count == 0)
    _, c = schedule.get_loops(output)
    blocks, groups, c_inner = schedule.split(c, [None, block // GROUP, GROUP])
    schedule.unroll(c_inner)
    schedule.compute_at(acc, groups, preserve_unit_loops=True)
    schedule.compute_at(patch, blocks, preserve_unit_loops=True)
    schedule.split(schedule.get_loops(patch)[-2], list(shape.size))
    first = schedule.get_loops(acc)[-2]
    _start_at_zero(schedule, acc, first, 1)
    taps = (shape.taps + 1) // 2 if shape.form is WeightForm.NIBBLES else shape.taps
    stored = None if shape.form is WeightForm.BYTES else (shape.taps * GROUP, taps * GROUP)
    call, extents = DEPTHWISE[shape.form], {"t": shape.taps, "q": GROUP}
    schedule.tensorize(first, register_tile(call, "tq,tq->q", extents, shape.reads, stored))
    return schedule.mod["main"]


def _start_at_zero(schedule: Any, acc: Any, loop: Any, axes: int) -> None:
    zero = schedule.decompose_reduction(acc, loop)
    for each in schedule.get_loops(zero)[-axes:]:
        schedule.unroll(each)
