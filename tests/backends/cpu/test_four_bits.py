"""Weights of four bits: two to a byte in the library, exact on every processor, bytes again in registers."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
from random_programs import Growing, random_codes, random_program, wide

from qcompile.backends.cpu import library
from qcompile.backends.integer import operations as ops
from qcompile.backends.integer.interpret import interpret

pytest.importorskip("tvm")

from qcompile.backends.tvm.schedules import x86_nibbles
from qcompile.backends.tvm.schedules.x86 import PROCESSORS


def with_four_bits(program):
    """Return a program whose weights are of four bits."""
    parts = tuple(
        replace(part, weights=(part.weights >> 4).astype(np.int8) if part.bits == 8 else part.weights, bits=4)
        if isinstance(part, ops.Conv | ops.Dense) else part
        for part in program.operations
    )  # fmt: skip
    return replace(program, operations=parts)


def dense(rows, depth, outputs, seed=0):
    """Return a program of one dense layer with weights of four bits."""
    grown = Growing(np.random.default_rng(seed), (1, rows, depth), wide=False)
    fields = grown.weights(outputs, depth, bits=4)
    fields["requantize"] = replace(fields["requantize"], low=-128, high=127)
    grown.add(ops.Dense, (1, rows, outputs), (grown.last,), **fields)
    return grown.program()


def check(load, program, processor):
    session = load(program, processor)
    for draw in range(2):
        codes = random_codes(program, draw)
        np.testing.assert_array_equal(session.run_codes([codes["x"]])[0], interpret(program, codes)["y"])


@pytest.mark.parametrize("processor", PROCESSORS)
@pytest.mark.parametrize("rows", [1, 3, 33])
@pytest.mark.parametrize(("depth", "outputs"), [(64, 64), (61, 37), (576, 130), (5, 1), (1300, 16)])
def test_dense_layers_equal_the_interpreter(load, processor, rows, depth, outputs):
    check(load, dense(rows, depth, outputs), processor)


@pytest.mark.parametrize("processor", PROCESSORS)
@pytest.mark.parametrize(("channels", "outputs", "size", "stride", "groups"),
                         [(32, 48, 3, 1, 1), (17, 33, 1, 1, 1), (64, 65, 3, 2, 1), (8, 24, 3, 1, 2)])  # fmt: skip
def test_convolutions_equal_the_interpreter(load, processor, channels, outputs, size, stride, groups):
    check(
        load, with_four_bits(wide(np.random.default_rng(channels), channels, outputs, size, stride, groups)), processor
    )


@pytest.mark.parametrize("processor", PROCESSORS)
@pytest.mark.parametrize("seed", range(400, 410))
def test_random_programs_equal_the_interpreter(load, processor, seed):
    check(load, with_four_bits(random_program(seed, wide=False)), processor)


@pytest.mark.parametrize("processor", PROCESSORS)
@pytest.mark.parametrize("rows", [1, 32])
def test_weights_take_half_the_bytes(processor, rows):
    program = dense(rows, 1024, 256)
    (part,) = program.operations
    eight = replace(program, operations=(replace(part, bits=8),))
    bytes_ = [len(library.network_of(each, PROCESSORS[processor]).constants) for each in (program, eight)]
    assert bytes_[0] < 1024 * 256 / 2 + 256 * 16 and bytes_[1] > 1024 * 256


@pytest.mark.parametrize("extreme", [-8, 7])
@pytest.mark.parametrize("code", [-128, 127])
@pytest.mark.parametrize("processor", PROCESSORS)
def test_the_largest_sums_equal_the_interpreter(load, processor, extreme, code):
    program = dense(2, 512, 32)
    program.operations[0].weights[:16] = extreme
    codes = {"x": np.full((1, 2, 512), code, np.int8)}
    np.testing.assert_array_equal(load(program, processor).run_codes([codes["x"]])[0], interpret(program, codes)["y"])


def test_the_inner_loop_unpacks_in_registers():
    network = library.network_of(dense(1, 4096, 64), PROCESSORS["avx512-vnni"])
    text = "".join(each.assembly for each in library.compiled(network, "net")[:-2])
    (body,) = re.findall(r"^nibbles_\d+:\n(.*?)^\.Lfunc_end", text, re.MULTILINE | re.DOTALL)
    loops = re.findall(r"^(\.LBB\w+):\n((?:(?!^\.LBB).)*?)\tj\w+\t\1$", body, re.MULTILINE | re.DOTALL)
    (loop,) = [loop for _, loop in loops if "vpdpbusd" in loop]
    assert "rsp" not in loop and loop.count("vpdpbusd") % 8 == 0
    shifts = len(re.findall(r"vpsrlw|vgf2p8affineqb", loop))
    assert shifts == loop.count("vpdpbusd") // 2, "one shift for two vectors of weights"


@pytest.mark.parametrize("shape", [(3, 2, 16), (1, 2, 2, 5)])
def test_two_weights_are_a_byte(shape):
    pairs = np.random.default_rng(0).integers(-8, 8, shape).astype(np.int8)
    stored = x86_nibbles.halves(pairs).astype(np.int16) & 0xFF
    np.testing.assert_array_equal((stored & 15) - 8, pairs[..., 0, :])
    np.testing.assert_array_equal((stored >> 4) - 8, pairs[..., 1, :])
