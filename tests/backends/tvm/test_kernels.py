"""Kernels as TVM writes them: the tile's loop is the processor's, nothing of TVM is left, copies are copies."""

from __future__ import annotations

import numpy as np
import pytest

from qcompile.backends.integer import operations as ops
from qcompile.backends.integer.program import Tensor
from qcompile.backends.tvm import definitions
from qcompile.backends.tvm.definitions import Convolution
from qcompile.backends.tvm.weight_forms import WeightForm

tvm = pytest.importorskip("tvm")

from qcompile.backends.tvm.emit import emit_c  # noqa: E402
from qcompile.backends.tvm.schedules import cortex_m  # noqa: E402

NIBBLES, FOURS = WeightForm.NIBBLES, WeightForm.FOURS
PLAIN = Convolution(8, 6, 16, 6, 12, (3, 3), (1, 1), (1, 1), (1, 1, 1, 1), -5, True, 0, -128, 127)
POINTWISE = Convolution(8, 6, 16, 6, 12, (1, 1), (1, 1), (1, 1), (0, 0, 0, 0), 0, True, 0, -128, 127)


def changed(shape, **fields):
    from dataclasses import replace

    return replace(shape, **fields)


def source(shape):
    schedule = cortex_m.schedule_depthwise if shape.groups > 1 else cortex_m.schedule_convolution
    return emit_c({"kernel": schedule(shape)})


@pytest.mark.parametrize(
    ("shape", "call"),
    [
        (PLAIN, "qc_tile_2x2((&(patch_ptr[0])), 144, (&(weights[(o_0 * 288)])), 144, (&(acc_ptr[0])), 144);"),
        (changed(PLAIN, width=1, columns=1), "qc_tile_1x4("),
        (changed(PLAIN, width=5, outputs=6), "qc_tile_1x2("),
        (POINTWISE, "qc_tile_2x2((&(input[(x_0 * 32)])), 16,"),
        (changed(PLAIN, groups=16, outputs=16), "qc_depthwise_4("),
        (changed(PLAIN, form=NIBBLES), "qc_tile4_2x2((&(patch_ptr[0])), 144, weights, (o_0 * 144), 72,"),
        (changed(POINTWISE, form=NIBBLES, width=1, columns=1), "qc_tile4_1x4("),
        (changed(PLAIN, groups=16, outputs=16, form=NIBBLES), "weights, (c_1 * 20), 20,"),
        (changed(PLAIN, form=FOURS, reads="int16"), "qc_wide_2x2((&(patch_ptr[0])), 144, weights, (o_0 * 288), 144,"),
        (changed(PLAIN, groups=16, outputs=16, form=FOURS, reads="int16"), "qc_wide_depthwise_4("),
    ],
)
def test_the_innermost_loop_is_a_tile(shape, call):
    assert call in source(shape)


def test_rows_of_a_tile_that_lie_too_far_apart_are_taken_fewer_at_a_time():
    assert cortex_m.tile(changed(PLAIN, channels=455)) == (2, 2)
    assert cortex_m.tile(changed(PLAIN, channels=456)) == (1, 2)
    assert cortex_m.tile(changed(PLAIN, channels=160, width=1)) == (1, 2)
    assert cortex_m.tile(changed(PLAIN, channels=16, outputs=3)) == (1, 1)


def test_weights_take_four_bits_where_tiles_take_them_and_that_pays():
    def form(bits=4, **fields):
        return cortex_m.form_of(changed(PLAIN, **fields), bits)

    assert form() is form(channels=9) is NIBBLES and form(bits=8) is WeightForm.BYTES
    assert form(channels=3) is WeightForm.BYTES, "mostly a tail"
    assert form(outputs=13) is WeightForm.BYTES, "no tile"
    assert form(groups=16, outputs=16) is NIBBLES and form(groups=2) is WeightForm.BYTES
    assert form(groups=16, outputs=16, size=(23, 23)) is WeightForm.BYTES, "sums that 32 bits might not hold"
    assert form(reads="int16") is FOURS


def test_rows_of_any_form_lie_within_reach():
    assert cortex_m.tile(changed(PLAIN, channels=303, form=NIBBLES)) == (2, 2)
    assert cortex_m.tile(changed(PLAIN, channels=304, form=NIBBLES)) == (1, 2)
    assert cortex_m.tile(changed(PLAIN, channels=227, form=FOURS)) == (2, 2)
    assert cortex_m.tile(changed(PLAIN, channels=228, form=FOURS)) == (1, 2)


def test_a_patch_is_copied_and_padding_filled_in():
    text = source(PLAIN)
    assert text.count("qc_copy(") == 1 and text.count("qc_fill(") == 1
    assert "-5, 16);" in text and "qc_copy(" not in source(POINTWISE)


def test_axes_without_padding_are_not_looked_at():
    assert "if (" not in source(changed(PLAIN, pads=(0, 0, 0, 0), rows=10, columns=8))


def test_nothing_of_tvm_is_left_and_what_is_read_is_const():
    text = source(PLAIN)
    assert "TVM" not in text and "#include" not in text and "Workspace" not in text
    assert text.startswith("static void kernel(const int8_t *input, const int8_t *weights, const int32_t *channels,")


def test_shifts_below_33_take_the_whole_product():
    assert "qc_requantize_high(" in source(PLAIN)
    text = source(changed(PLAIN, high_word=False))
    assert "qc_requantize(" in text and "qc_requantize_high(" not in text


def test_an_odd_column_is_a_part_of_its_own_with_its_own_padding():
    (first, even), (last, odd) = cortex_m.parts(changed(PLAIN, width=7, columns=7))
    assert (first, even.width, even.pads) == (0, 6, (1, 1, 1, 0))
    assert (last, odd.width, odd.pads) == (6, 1, (1, -5, 1, 1))
    assert [part.width for _, part in cortex_m.parts(PLAIN)] == [6]


@pytest.mark.parametrize("pads", [(0, 2, 0, 2), (0, 0, 0, 3)])
def test_a_part_keeps_the_padding_that_it_reads(pads):
    wide = changed(PLAIN, size=(1, 5), pads=pads, columns=7, width=7)
    (_, even), _ = cortex_m.parts(wide)
    assert even.pads[3] == (5 + 4 - pads[1]) - 6


def test_accumulators_with_room_are_moved_so_that_the_high_word_is_enough():
    def shape_of(weight, shift):
        step = ops.Requantize(np.array([2**30], np.int32), np.array([shift], np.int32), 0, -128, 127)
        weights, bias = np.full((2, 64), weight, np.int8), np.zeros(2, np.int32)
        layer = ops.Dense("d", ("x",), "y", weights, bias, step)
        source, target = (Tensor(name, (1, width), "int8", 0.1, 0) for name, width in (("x", 64), ("y", 2)))
        return definitions.dense(layer, source, target)

    assert shape_of(127, 33).moved == 0 and shape_of(127, 33).high_word
    assert shape_of(127, 30).moved == 3 and shape_of(127, 30).high_word
    # 127 · 128 · 64 · 2^12 is the first that 32 bits do not hold.
    assert shape_of(127, 22).moved == 11 and shape_of(127, 21).moved == 0 and not shape_of(127, 21).high_word
    assert "* 8)" in source(shape_of(127, 30)) and "qc_requantize_high(" in source(shape_of(127, 30))
