"""Dense layers with a scale per block, and float products: every kernel's floats are the interpreter's, bit by bit."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
from float_programs import blocked, float_product

from qcompile.backends.cpu import library
from qcompile.backends.cpu.session import InferenceSession
from qcompile.backends.integer.interpret import interpret
from qcompile.backends.integer.interpret_floats import fused

pytest.importorskip("tvm")

from qcompile.backends.cpu.generate import generate
from qcompile.backends.cpu.layout import lay_out
from qcompile.backends.cpu.network import Network
from qcompile.backends.tvm.schedules import shares
from qcompile.backends.tvm.schedules.block_dense import Blocks, choose_tile
from qcompile.backends.tvm.schedules.vectors import OUTPUTS, ROWS
from qcompile.backends.tvm.schedules.x86 import PROCESSORS as KINDS

PROCESSORS = ("avx512-vnni", "avx-vnni", "avx2", "amx")
HALF = 2.0**-24


def activations(random, *shape):
    """Return floats with outliers, zeros, a block of nothing, and what float32 has below and above."""
    x = random.normal(size=shape).astype(np.float32) * np.exp2(random.integers(-20, 20, shape[-1])).astype(np.float32)
    x[..., random.random(shape[-1]) < 0.1] = 0.0
    x[..., : shape[-1] // 4] *= np.float32(1e-38)
    return x


@pytest.mark.parametrize("seed", range(60))
def test_layers_of_random_shapes_equal_the_interpreter(load, seed):
    random = np.random.default_rng(seed)
    rows, length, outputs = (int(2 ** random.uniform(0, limit)) for limit in (5, 9, 8))
    block = int(random.choice([15, 16, 32, 32, 64, 128, 6]))
    bounds = (0.0, 6.0) if seed % 5 == 0 else (-np.inf, np.inf)
    program = blocked(random, rows, length, outputs, block, int(random.choice([4, 4, 8])), seed % 2 == 0, bounds)
    x = activations(random, 1, rows, length) if seed % 3 else random.normal(size=(1, rows, length)).astype(np.float32)
    expected = interpret(program, {"x": x})["y"]
    found = load(program, PROCESSORS[seed % 4]).run_codes([x])[0]
    np.testing.assert_array_equal(found, expected, err_msg=f"{rows}x{length}x{outputs} by {block}")


@pytest.mark.parametrize("processor", PROCESSORS)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("rows", "length", "outputs"), [(1, 576, 576), (1, 1536, 70), (7, 384, 200)])
def test_layers_of_the_catalogue_equal_the_interpreter(load, processor, bits, rows, length, outputs):
    random = np.random.default_rng(rows)
    program = blocked(random, rows, length, outputs, 32, bits, True)
    x = random.normal(size=(1, rows, length)).astype(np.float32)
    expected = interpret(program, {"x": x})["y"]
    assert len(np.unique(expected)) > rows * outputs // 2, "an output that says something"
    np.testing.assert_array_equal(load(program, processor).run_codes([x])[0], expected)


@pytest.mark.parametrize("bits", [4, 8])
def test_the_largest_sums_equal_the_interpreter(load, bits):
    for processor in ("avx2", "avx512-vnni"):
        program = blocked(np.random.default_rng(0), 2, 1024, 40, 1024, bits)
        program.operations[0].weights[:] = -8 if bits == 4 else -128
        x = np.full((1, 2, 1024), 3.0, np.float32)
        x[:, 1] = -3.0
        np.testing.assert_array_equal(load(program, processor).run_codes([x])[0], interpret(program, {"x": x})["y"])


def test_a_layer_is_near_float64():
    random = np.random.default_rng(0)
    program = blocked(random, 5, 300, 40, 32, 4)
    (layer,) = program.operations
    x = random.normal(size=(1, 5, 300)).astype(np.float32)
    real = layer.weights * np.repeat(layer.scale, 32, axis=1)[:, :300].astype(np.float64)
    exact = x.astype(np.float64) @ real.T + layer.bias
    # Each activation is off by half a step of its block, and by the rounding of what it is divided by.
    peaks = np.abs(np.pad(x, [(0, 0), (0, 0), (0, 20)]).reshape(1, 5, 10, 32)).max(axis=-1)
    off = np.repeat(peaks, 32, axis=-1)[..., :300] / 127 * (0.5 + 127 * 4 * HALF)
    bound = off @ np.abs(real).T + 12 * HALF * (np.abs(x) @ np.abs(real).T + np.abs(layer.bias))
    found = interpret(program, {"x": x})["y"]
    assert np.all(np.abs(found - exact) <= bound) and np.abs(found - exact).max() > 1e-4


def test_a_fused_product_and_sum_is_rounded_once():
    from fractions import Fraction

    random = np.random.default_rng(0)
    a, b, c = (random.normal(size=4000).astype(np.float32) for _ in range(3))
    c[::2] = -(a * b)[::2]  # what is left is the product's rounding
    # Halfway in float32 but for a bit that float64 loses.
    a[0], b[0], c[0] = 1 + 2.0**-12, 1 + 2.0**-12, 2.0**-60
    for index, found in enumerate(fused(a, b, c)):
        exact = Fraction(float(a[index])) * Fraction(float(b[index])) + Fraction(float(c[index]))
        near = [np.nextafter(found, np.float32(side)) for side in (-np.inf, np.inf)]
        assert all(abs(exact - Fraction(float(found))) <= abs(exact - Fraction(float(other))) for other in near)
    assert fused(a, b, c)[0] == np.float32(1 + 2.0**-11 + 2.0**-23)


@pytest.mark.parametrize("processor", PROCESSORS)
@pytest.mark.parametrize(
    ("batch", "m", "k", "n", "heads", "turned"),
    [((1, 3), 5, 32, 16, False, False), ((1, 3), 5, 32, 40, True, True), ((2,), 7, 6, 33, False, True),
     ((), 1, 1, 1, False, False), ((4,), 3, 9, 70, True, False), ((2, 3), 33, 70, 50, True, True)],
)  # fmt: skip
def test_products_in_float_equal_the_interpreter(load, processor, batch, m, k, n, heads, turned):
    random = np.random.default_rng(k)
    program = float_product(batch, m, k, n, heads, turned, 0.125 if k == 9 else 1.0, (-2.0, 3.0) if k == 6 else ())
    given = {name: random.normal(size=program.tensors[name].shape).astype(np.float32) for name in "ab"}
    expected = interpret(program, given)["y"]
    np.testing.assert_array_equal(load(program, processor).run_codes([given["a"], given["b"]])[0], expected)


def test_a_product_in_float_is_near_float64():
    random = np.random.default_rng(0)
    program = float_product((2,), 9, 80, 20, False, False)
    a, b = (random.normal(size=program.tensors[name].shape).astype(np.float32) for name in "ab")
    exact = a.astype(np.float64) @ b.astype(np.float64)
    bound = 80 * HALF * (np.abs(a).astype(np.float64) @ np.abs(b))
    assert np.all(np.abs(interpret(program, {"a": a, "b": b})["y"] - exact) <= bound)


def test_another_length_stores_weights_once():
    random = np.random.default_rng(0)
    programs = [blocked(random, rows, 96, 100, 32, 4) for rows in (1, 40)]
    programs[1] = replace(programs[1], operations=programs[0].operations)
    tiles = [choose_tile(Blocks(rows, 96, 100, 32, True, False, ()), KINDS["avx512-vnni"]) for rows in (1, 40)]
    assert tiles[0].vectors != tiles[1].vectors, "a layer that would be stored in two ways"
    first, second = (lay_out(program) for program in programs)
    made = generate(Network(first, KINDS["avx512-vnni"]))
    size = len(made.constants)
    another = generate(made.another(second, 40))
    assert len(another.constants) == size and another.calls[-1].kernel != made.calls[-1].kernel


@pytest.mark.parametrize("loop", [ROWS, OUTPUTS])
@pytest.mark.parametrize("rows", [1, 23])
def test_any_number_of_threads_gives_the_same(load, tmp_path, monkeypatch, loop, rows):
    def picked(axes):
        costs, _ = axes.get(loop, ((), 0))
        return (loop, len(costs)) if len(costs) > 1 else ("", 0)

    monkeypatch.setattr(shares, "WORTH", 0)
    monkeypatch.setattr(shares, "chosen", picked)
    random = np.random.default_rng(0)
    program = blocked(random, rows, 200, 330, 32, 4)
    x = random.normal(size=(1, rows, 200)).astype(np.float32)
    load(program)
    expected = interpret(program, {"x": x})["y"]
    for threads in (1, 2, 3, 5):
        session = InferenceSession(tmp_path, threads)
        for _ in range(3):
            np.testing.assert_array_equal(session.run_codes([x])[0], expected, err_msg=f"{threads} threads")


def test_the_inner_loop_is_products_of_unpacked_weights():
    program = blocked(np.random.default_rng(0), 1, 2048, 1024, 32, 4, True)
    network = library.network_of(program, KINDS["avx512-vnni"])
    text = "".join(each.assembly for each in library.compiled(network, "net")[:-2])
    (body,) = re.findall(r"^dense_\d+:\n(.*?)^\.Lfunc_end", text, re.MULTILINE | re.DOTALL)
    loops = re.findall(r"^(\.LBB\w+):\n((?:(?!^\.LBB).)*?)\tj\w+\t\1$", body, re.MULTILINE | re.DOTALL)
    (inner,) = [loop for _, loop in loops if "vpdpbusd" in loop]
    # A block of 32 inputs: eight groups of four by four vectors, each two of which come out of one load.
    assert inner.count("vpdpbusd") == 32 and "rsp" not in inner
    assert len(re.findall(r"vcvtph2ps", inner)) == 4
