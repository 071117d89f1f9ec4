"""The kernels' own source, run thread by thread on this machine, gives the interpreter's codes, bit by bit."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from random_programs import Growing, random_codes, random_program, wide

from qcompile.backends.cuda import linear
from qcompile.backends.cuda.linear import TILES
from qcompile.backends.cuda.network import network_of
from qcompile.backends.integer import operations as ops
from qcompile.backends.integer.interpret import dequantize_output, interpret, quantize_input
from qcompile.core import numerics
from qcompile.core.errors import TargetError

PROGRAMS, ALL = range(10), range(10, 200)


def check(session, program, draw=0):
    drawn = [random_codes(program, draw + sample) for sample in range(session.batch)]
    expected = np.concatenate([interpret(program, codes)["y"] for codes in drawn])
    found = session.run_codes([np.concatenate([codes["x"] for codes in drawn])])[0]
    kinds = [type(operation).__name__ for operation in program.operations]
    np.testing.assert_array_equal(found, expected, err_msg=str(kinds))
    return expected


@pytest.mark.parametrize("seed", PROGRAMS)
def test_kernels_equal_the_interpreter(load, seed):
    program = random_program(seed, wide=False)
    session = load(program, batch=1 + seed % 3)
    for draw in range(2):
        check(session, program, draw)


@pytest.mark.slow
@pytest.mark.parametrize("seed", ALL)
def test_kernels_equal_the_interpreter_on_more_programs(load, seed):
    check(load(program := random_program(seed, wide=False), batch=1 + seed % 3), program)


@pytest.mark.parametrize(
    ("channels", "outputs", "size", "stride", "groups", "side"),
    [
        (3, 32, 3, 2, 1, (17, 17)),
        (32, 70, 3, 1, 1, (9, 11)),
        (17, 33, 1, 1, 1, (7, 7)),
        (24, 40, 3, 2, 1, (9, 8)),
        (64, 65, 1, 2, 1, (8, 9)),
        (50, 50, 3, 1, 50, (9, 11)),
        (96, 96, 5, 2, 96, (14, 15)),
        (144, 144, 3, 1, 144, (1, 1)),
        (64, 128, 3, 1, 2, (6, 6)),
        (144, 96, 1, 1, 1, (2, 2)),
    ],
)
def test_wide_layers_equal_the_interpreter(load, channels, outputs, size, stride, groups, side):
    program = wide(np.random.default_rng(channels), channels, outputs, size, stride, groups, side)
    assert len(np.unique(check(load(program, batch=2), program))) > 16, "an output that says something"


@pytest.mark.parametrize("tile", [*TILES, linear.NARROW], ids=lambda tile: f"{tile.pixels}x{tile.outputs}")
def test_every_tile_equals_the_interpreter(load, monkeypatch, tile):
    # Neither rows nor outputs fill whole tiles; sums are of more steps than there are stages.
    monkeypatch.setattr(linear, "tile_of", lambda shape, samples, form: tile)
    program = wide(np.random.default_rng(7), 48, tile.outputs + 17, 3, side=(13, 14))
    session = load(program)
    assert f"{tile.pixels}, {tile.outputs}, " in network_of(program).source().split("extern")[-3]
    check(session, program)


@pytest.mark.parametrize("ratio", [0.7, 2.0**-10, 2.0**-24])
@pytest.mark.parametrize("groups", [1, 40])
def test_shifts_of_every_size_equal_the_interpreter(load, ratio, groups):
    # Sums that give codes of all sizes: of small weights, of large ones, of biases beside which no product counts.
    random = np.random.default_rng(3)
    program = wide(random, 40, 40, 3, groups=groups)
    (conv,) = program.operations
    multiplier, shift = numerics.fixed_point(ratio * random.uniform(0.7, 1.3, 40))
    spread = int(100 / ratio)
    conv.bias[:] = random.integers(-spread, spread, 40)
    np.clip(conv.weights, -1, 1, out=conv.weights) if ratio > 0.25 else None
    requantize = replace(conv.requantize, multiplier=multiplier, shift=shift)
    program = replace(program, operations=(replace(conv, requantize=requantize),))
    assert len(np.unique(check(load(program), program))) > 16, "an output that says something"


@pytest.mark.parametrize("extreme", [-128, 127])
def test_the_largest_sums_equal_the_interpreter(load, extreme):
    program = wide(np.random.default_rng(0), 256, 32, 3, side=(4, 4))
    conv = program.operations[0]
    conv.weights[:16], conv.weights[16:] = 127, -127
    codes = {"x": np.full((1, 4, 4, 256), extreme, np.int8)}
    np.testing.assert_array_equal(load(program).run_codes([codes["x"]])[0], interpret(program, codes)["y"])


@pytest.mark.parametrize("seed", range(4))
def test_floats_are_quantized_and_back_as_the_specification_says(load, seed):
    program = random_program(seed, wide=False)
    session, random = load(program), np.random.default_rng(seed)
    (port,), (made,) = program.inputs, program.outputs
    scale = program.tensors[port.tensor].scale
    # Ties, and what saturates.
    real = (random.integers(-600, 600, port.shape) * np.float32(scale / 2)).astype(np.float32)
    expected = interpret(program, {"x": quantize_input(program, port, real)})["y"]
    np.testing.assert_array_equal(session.run(None, {"x": real})[0], dequantize_output(program, made, expected))


@pytest.mark.parametrize("backwards", [0, 1])
def test_the_order_of_threads_does_not_matter(load, monkeypatch, backwards):
    import ctypes

    program = wide(np.random.default_rng(2), 64, 64, 3, side=(12, 12))
    session = load(program)
    ctypes.c_int.in_dll(session.driver.library, "backwards").value = backwards
    check(session, program)


def test_codes_of_sixteen_bits_are_refused():
    grown = Growing(np.random.default_rng(0), (1, 4, 4, 8), "int16")
    fields = {"zero_point": 0, "requantize": grown.requantize(1, 15000.0)}
    grown.add(ops.Rescale, (1, 4, 4, 8), (grown.last,), **fields)
    with pytest.raises(TargetError, match=r"op0: Rescale has no kernel for CUDA devices"):
        network_of(grown.program())
    grown = Growing(np.random.default_rng(0), (1, 4, 4, 8), "int16")
    grown.add(ops.MaxPool, (1, 4, 4, 8), (grown.last,), "int16", window=ops.Window((1, 1)), low=-9, high=9)
    with pytest.raises(TargetError, match="op0: reads or writes int16"):
        network_of(grown.program())
