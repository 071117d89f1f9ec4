"""Float islands, products of activations and weights of four bits on aarch64, under emulation."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import numpy as np
import pytest
from float_programs import blocked, codes, float_product, floats, pointwise, product, program_of, rows
from random_programs import random_codes, random_program, wide

from qcompile.backends.integer import expressions
from qcompile.backends.integer import float_operations as ops
from qcompile.backends.integer.expressions import leaf, number
from qcompile.backends.integer.interpret import interpret
from qcompile.backends.integer.operations import Requantize
from qcompile.core import numerics

pytest.importorskip("tvm")

from qcompile.backends.cpu import library
from qcompile.backends.cpu.backend import PROCESSORS as KINDS

PROCESSORS = ("sdot", "i8mm", "neon")
pytestmark = pytest.mark.usefixtures("emulation")
HALF = 2.0**-24


def test_functions_are_within_their_bounds(load):
    wide = np.concatenate([np.linspace(-100, 100, 4001), np.linspace(-5, 5, 4000), [0.0, 1e-30, -1e-30]])
    x = wide.astype(np.float32).reshape(1, -1)
    clipped = np.clip(x.astype(np.float64), -87.0, 88.0)
    for kind, exact, bound in (("exp", np.exp, 3e-7), ("erf", np.vectorize(math.erf), 1e-6), ("tanh", np.tanh, 5e-7)):
        found = load(pointwise((kind, leaf(0)), x, shape=x.shape), "sdot").run_codes([x])[0]
        error = np.abs(found - exact(clipped))
        assert np.max(error / exact(clipped) if kind == "exp" else error) < bound, kind


def test_single_primitives_are_float32_s_own(load):
    random = np.random.default_rng(0)
    a, b = (random.integers(-4, 5, (2, 3, 37)).astype(np.float32) + np.float32(0.1) for _ in range(2))
    tree = leaf(0)
    for kind in ("add", "sub", "mul", "div", "max", "min"):
        tree = (kind, tree, leaf(1))
    program = pointwise(("where", ("less", leaf(0), leaf(1)), tree, ("abs", leaf(0))), a, b, shape=a.shape)
    expected = expressions.evaluate(program.operations[0].expression, [a, b])
    # A product and a sum behind it may be rounded once.
    found = load(program, "neon").run_codes([a, b])[0]
    np.testing.assert_allclose(found, expected, rtol=8 * HALF, atol=8 * HALF * 16)


@pytest.mark.parametrize("width", [1, 7, 16, 33])
def test_codes_are_read_and_written_as_their_scales_say(load, width):
    random = np.random.default_rng(width)
    source, target = codes("x", 3, width, scale=0.07, zero=-5), codes("y", 3, width, scale=0.11, zero=9)
    operation = ops.Pointwise("p", ("x",), "y", (ops.Leaf(0, (0, 1), 0.07, -5),), ("mul", leaf(0), number(1.3)))
    x = random.integers(-128, 128, (3, width)).astype(np.int8)
    found = load(program_of(operation, [source], target), "sdot").run_codes([x])[0]
    real = (x.astype(np.float64) + 5) * np.float64(np.float32(0.07)) * np.float64(np.float32(1.3)) / np.float32(0.11)
    assert np.all(np.abs(np.clip(real + 9, -128, 127) - found) <= 0.5 + 4 * HALF * np.abs(real))


def test_softmax_and_norms_are_near_float64(load):
    random = np.random.default_rng(0)
    x = random.normal(0, 4, (3, 77)).astype(np.float32)
    wide = x.astype(np.float64)
    powers = np.exp(wide - wide.max(axis=-1, keepdims=True))
    found = load(rows(ops.FloatSoftmax, (3, 77)), "sdot").run_codes([x])[0]
    np.testing.assert_allclose(found, powers / powers.sum(axis=-1, keepdims=True), rtol=1e-5)
    weight, bias = (random.normal(1, 0.5, 77).astype(np.float32) for _ in range(2))
    found = load(rows(ops.Normalize, (3, 77), (weight, bias, 1e-5, True)), "neon").run_codes([x])[0]
    apart = wide - wide.mean(axis=-1, keepdims=True)
    exact = apart / np.sqrt((apart**2).mean(axis=-1, keepdims=True) + 1e-5) * weight + bias
    np.testing.assert_allclose(found, exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("processor", PROCESSORS)
@pytest.mark.parametrize(
    ("real", "batch", "m", "k", "n", "heads", "turned"),
    [(True, (1, 3), 5, 32, 40, True, True), (True, (2,), 7, 6, 33, False, True),
     (False, (2, 3), 20, 66, 81, True, False), (False, (2,), 16, 24, 64, False, True)],
)  # fmt: skip
def test_products_of_activations_equal_the_interpreter(load, processor, real, batch, m, k, n, heads, turned):
    random = np.random.default_rng(k)
    if real:
        step, target = ops.Dequantize(np.array([0.013], np.float32), -40.0, 1e9), lambda shape: floats("y", *shape)
    else:
        multiplier, shift = numerics.fixed_point([60.0 / (74 * 74 * math.sqrt(k))])
        step, target = Requantize(multiplier, shift, -4, -128, 120), lambda shape: codes("y", *shape)
    program = product(batch, m, k, n, step, target, heads, turned)
    given = {name: random.integers(-128, 128, program.tensors[name].shape).astype(np.int8) for name in "ab"}
    expected = interpret(program, given)["y"]
    assert len(np.unique(expected)) > 8, "an output that says something"
    np.testing.assert_array_equal(load(program, processor).run_codes([given["a"], given["b"]])[0], expected)


@pytest.mark.parametrize("processor", PROCESSORS)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("rows_", "length", "outputs", "block"), [(1, 200, 70, 32), (7, 100, 33, 15)])
def test_layers_with_a_scale_per_block_equal_the_interpreter(load, processor, bits, rows_, length, outputs, block):
    random = np.random.default_rng(rows_)
    program = blocked(random, rows_, length, outputs, block, bits, bits == 4)
    x = random.normal(size=(1, rows_, length)).astype(np.float32)
    expected = interpret(program, {"x": x})["y"]
    np.testing.assert_array_equal(load(program, processor).run_codes([x])[0], expected)


@pytest.mark.parametrize("turned", [False, True])
def test_products_in_float_equal_the_interpreter(load, turned):
    random = np.random.default_rng(0)
    program = float_product((2, 3), 9, 30, 21, True, turned)
    given = [random.normal(size=program.tensors[name].shape).astype(np.float32) for name in "ab"]
    expected = interpret(program, dict(zip("ab", given, strict=True)))["y"]
    np.testing.assert_array_equal(load(program, "neon").run_codes(given)[0], expected)


@pytest.mark.parametrize("seed", range(400, 412))
def test_programs_with_weights_of_four_bits_equal_the_interpreter(load, seed):
    program = random_program(seed, wide=False)
    given = random_codes(program, 0)
    found = load(program, PROCESSORS[seed % 3]).run_codes([given["x"]])[0]
    np.testing.assert_array_equal(found, interpret(program, given)["y"])


def narrow(channels, outputs, size, side, groups=1):
    """Return a layer with weights of four bits."""
    program = wide(np.random.default_rng(channels), channels, outputs, size, groups=groups, side=side)
    (layer,) = program.operations
    weights = np.random.default_rng(0).integers(-8, 8, layer.weights.shape).astype(np.int8)
    multiplier, shift = numerics.fixed_point(np.full(outputs, 60.0 / (75 * 4.6 * math.sqrt(weights[0].size))))
    step = replace(layer.requantize, multiplier=multiplier, shift=shift)
    return replace(program, operations=(replace(layer, weights=weights, bits=4, requantize=step),))


@pytest.mark.parametrize("processor", PROCESSORS)
@pytest.mark.parametrize(
    ("channels", "outputs", "size", "side"),
    [(37, 21, 1, (1, 9)), (12, 40, 3, (7, 5)), (20, 9, 3, (3, 3)), (256, 33, 1, (1, 1))],
)
def test_layers_of_four_bits_equal_the_interpreter(load, processor, channels, outputs, size, side):
    program = narrow(channels, outputs, size, side)
    given = random_codes(program, 0)
    expected = interpret(program, given)["y"]
    assert len(np.unique(expected)) > 16, "an output that says something"
    np.testing.assert_array_equal(load(program, processor).run_codes([given["x"]])[0], expected)


@pytest.mark.parametrize("processor", PROCESSORS)
def test_weights_of_four_bits_are_two_to_a_byte_and_unpacked_in_registers(processor):
    program = narrow(256, 64, 1, (1, 8))
    (layer,) = program.operations
    eight = replace(program, operations=(replace(layer, bits=8),))
    networks = [library.network_of(each, KINDS[processor]) for each in (program, eight)]
    assert len(networks[1].constants) - len(networks[0].constants) == 256 * 64 // 2
    text = "".join(each.assembly for each in library.compiled(networks[0], "net")[:-2])
    (body,) = re.findall(r"^nibbles_\d+:\n(.*?)^\.Lfunc_end", text, re.MULTILINE | re.DOTALL)
    loops = re.findall(r"^(\.LBB\w+):\n((?:(?!^\.LBB).)*?)\tb\.\w+\t\1$", body, re.MULTILINE | re.DOTALL)
    inner = [loop for _, loop in loops if "usra" in loop]
    assert inner and all(("sdot" in loop) == (processor != "neon") for loop in inner)
    if processor != "neon":
        assert all(not re.findall(r"^\tst\w+\t.*\[sp.*$", loop, re.MULTILINE) for loop in inner), "no spills"
