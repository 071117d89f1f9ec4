"""Generated libraries give the interpreter's codes, bit by bit, and its floats."""

from __future__ import annotations

import threading
from dataclasses import replace

import numpy as np
import pytest
from random_programs import random_codes, random_program, wide, with_table

from qcompile.backends.integer.interpret import dequantize_output, interpret, quantize_input
from qcompile.core import numerics

PROGRAMS, ALL = range(40), range(40, 300)
X86, AARCH64 = ("avx512-vnni", "avx-vnni", "avx2", "amx"), ("sdot", "i8mm", "neon")
PROCESSORS = (*X86, *AARCH64)


def check(load, processor, seed):
    program = random_program(seed, wide=False)
    session = load(program, processor)
    for draw in range(3):
        codes = random_codes(program, draw)
        expected = interpret(program, codes)["y"]
        kinds = [type(operation).__name__ for operation in program.operations]
        np.testing.assert_array_equal(session.run_codes([codes["x"]])[0], expected, err_msg=f"seed {seed}: {kinds}")


@pytest.mark.parametrize("seed", PROGRAMS)
@pytest.mark.parametrize("kinds", [X86, AARCH64], ids=["x86", "aarch64"])
def test_libraries_equal_the_interpreter(load, kinds, seed):
    check(load, kinds[seed % len(kinds)], seed)


@pytest.mark.slow
@pytest.mark.parametrize("processor", PROCESSORS)
@pytest.mark.parametrize("seed", ALL)
def test_libraries_equal_the_interpreter_on_more_programs(load, processor, seed):
    check(load, processor, seed)


def test_two_bounds_of_codes_are_compiled(load):
    check(load, "avx512-vnni", 303)  # as a minimum and a maximum of bytes LLVM 22 never ends on them


@pytest.mark.parametrize("processor", PROCESSORS)
@pytest.mark.parametrize(
    ("channels", "outputs", "size", "stride", "groups", "side"),
    [
        (3, 32, 3, 2, 1, (17, 17)),
        (32, 70, 3, 1, 1, (9, 11)),
        (17, 33, 1, 1, 1, (7, 7)),
        (64, 128, 1, 1, 1, (5, 3)),
        (64, 65, 1, 2, 1, (8, 9)),
        (50, 50, 3, 1, 50, (9, 11)),
        (96, 96, 5, 2, 96, (14, 15)),
        (144, 144, 3, 1, 144, (1, 1)),
        (8, 24, 3, 1, 2, (6, 6)),
    ],
)
def test_wide_layers_equal_the_interpreter(load, processor, channels, outputs, size, stride, groups, side):
    program = wide(np.random.default_rng(channels), channels, outputs, size, stride, groups, side)
    session = load(program, processor)
    codes = random_codes(program, 1)
    found = session.run_codes([codes["x"]])[0]
    expected = interpret(program, codes)["y"]
    assert len(np.unique(expected)) > 16, "an output that says something"
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("processor", PROCESSORS)
@pytest.mark.parametrize(
    ("channels", "outputs", "size", "groups"), [(16, 20, 1, 1), (32, 130, 3, 1), (48, 48, 3, 48), (70, 70, 3, 70)]
)
def test_a_table_behind_a_layer_equals_the_interpreter(load, processor, channels, outputs, size, groups):
    random = np.random.default_rng(channels)
    program = with_table(wide(random, channels, outputs, size, groups=groups), random)
    codes = random_codes(program, 2)
    expected = interpret(program, codes)["y"]
    assert len(np.unique(expected)) > 16, "an output that says something"
    np.testing.assert_array_equal(load(program, processor).run_codes([codes["x"]])[0], expected)


@pytest.mark.parametrize("processor", PROCESSORS)
@pytest.mark.parametrize("ratio", [0.7, 2.0**-10, 2.0**-24])
@pytest.mark.parametrize("groups", [1, 40])
def test_shifts_of_every_size_equal_the_interpreter(load, processor, ratio, groups):
    # Sums that give codes of all sizes: of small weights, of large ones, of biases beside which no product counts.
    random = np.random.default_rng(3)
    program = wide(random, 40, 40, 3, groups=groups)
    (conv,) = program.operations
    multiplier, shift = numerics.fixed_point(ratio * random.uniform(0.7, 1.3, 40))
    assert (shift.min() < 33, shift.max() > 53) == (ratio > 0.25, ratio < 2.0**-20)
    spread = int(100 / ratio)
    conv.bias[:] = random.integers(-spread, spread, 40)
    np.clip(conv.weights, -1, 1, out=conv.weights) if ratio > 0.25 else None
    requantize = replace(conv.requantize, multiplier=multiplier, shift=shift)
    program = replace(program, operations=(replace(conv, requantize=requantize),))
    codes = random_codes(program, 1)
    expected = interpret(program, codes)["y"]
    assert len(np.unique(expected)) > 16, "an output that says something"
    np.testing.assert_array_equal(load(program, processor).run_codes([codes["x"]])[0], expected)


@pytest.mark.parametrize("processor", PROCESSORS)
@pytest.mark.parametrize("extreme", [-128, 127])
def test_the_largest_sums_equal_the_interpreter(load, processor, extreme):
    program = wide(np.random.default_rng(0), 256, 32, 3)
    conv = program.operations[0]
    conv.weights[:16], conv.weights[16:] = 127, -127
    codes = {"x": np.full((1, 9, 11, 256), extreme, np.int8)}
    np.testing.assert_array_equal(load(program, processor).run_codes([codes["x"]])[0], interpret(program, codes)["y"])


@pytest.mark.parametrize("processor", ["avx512-vnni", "sdot"])
@pytest.mark.parametrize("seed", range(6))
def test_floats_are_quantized_and_back_as_the_specification_says(load, processor, seed):
    program = random_program(seed, wide=False)
    session, random = load(program, processor), np.random.default_rng(seed)
    (port,), (made,) = program.inputs, program.outputs
    scale = program.tensors[port.tensor].scale
    # Ties, and what saturates.
    real = (random.integers(-600, 600, port.shape) * np.float32(scale / 2)).astype(np.float32)
    expected = interpret(program, {"x": quantize_input(program, port, real)})["y"]
    np.testing.assert_array_equal(session.run(None, {"x": real})[0], dequantize_output(program, made, expected))


def test_two_threads_with_a_session_each_give_the_same(load, tmp_path):
    from qcompile.backends.cpu.session import InferenceSession

    program = wide(np.random.default_rng(2), 64, 64, 3, side=(24, 24))
    first = load(program)
    sessions = [first, InferenceSession(tmp_path)]
    inputs = [random_codes(program, draw)["x"] for draw in range(2)]
    expected = [interpret(program, {"x": codes})["y"] for codes in inputs]
    wrong = []

    def work(session, codes, wanted):
        for _ in range(200):
            if not np.array_equal(session.run_codes([codes])[0], wanted):
                wrong.append(True)

    threads = [threading.Thread(target=work, args=each) for each in zip(sessions, inputs, expected, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
