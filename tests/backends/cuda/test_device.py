"""On a CUDA device (`pytest -m gpu`): every kernel gives the interpreter's codes, bit by bit."""

from __future__ import annotations

import numpy as np
import pytest
from float_programs import every_kind
from random_programs import random_codes, random_program, wide

from qcompile.backends.cuda import compiler, linear
from qcompile.backends.cuda.backend import write
from qcompile.backends.cuda.driver import Driver, has_device
from qcompile.backends.cuda.linear import NARROW, TILES
from qcompile.backends.cuda.network import network_of
from qcompile.backends.cuda.session import InferenceSession
from qcompile.backends.integer import float_operations as ops
from qcompile.backends.integer.interpret import dequantize_output, interpret, quantize_input

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def architecture():
    """Skip without a device; return what to compile for."""
    if not has_device():
        pytest.skip("no CUDA device")
    if not compiler.available():
        pytest.skip("neither NVRTC nor nvFatbin")
    here = Driver().capability.removeprefix("sm_")
    return "90a" if here == "90" else here


@pytest.fixture
def run(architecture, tmp_path):
    """Return what opens a program's session on the device, compiled for it alone."""

    def opened(program, batch=1):
        network = network_of(program)
        code = compiler.fatbin({architecture: compiler.compile_cuda(network.source(), architecture).code})
        write(network, "net", code, tmp_path)
        return InferenceSession(tmp_path, batch)

    return opened


def check(session, program):
    drawn = [random_codes(program, sample) for sample in range(session.batch)]
    expected = np.concatenate([interpret(program, codes)["y"] for codes in drawn])
    found = session.run_codes([np.concatenate([codes["x"] for codes in drawn])])[0]
    session.close()
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("seed", range(200))
def test_random_programs_equal_the_interpreter(run, seed):
    program = random_program(seed, wide=False)
    check(run(program, batch=1 + seed % 3), program)


@pytest.mark.parametrize("seed", range(200))
def test_random_layers_equal_the_interpreter(run, seed):
    random = np.random.default_rng(seed)
    channels, outputs = (int(n) for n in random.integers(1, 300, 2))
    if seed % 3 == 0:
        channels, outputs = (-(-n // 16) * 16 for n in (channels, outputs))
    size, stride = (1, 3, 5)[int(random.integers(3))], int(random.integers(1, 3))
    groups = channels if seed % 4 == 1 else 2 if seed % 4 == 2 and channels % 2 == outputs % 2 == 0 else 1
    outputs = channels if groups == channels else outputs
    side = tuple(int(n) for n in random.integers(1, 40, 2))
    program = wide(random, channels, outputs, size, stride, groups, side)
    check(run(program, batch=1 + seed % 4), program)


@pytest.mark.parametrize("tile", [*TILES, NARROW], ids=lambda tile: f"{tile.pixels}x{tile.outputs}")
@pytest.mark.parametrize("channels", [3, 4, 24, 256])
def test_every_tile_equals_the_interpreter(run, monkeypatch, tile, channels):
    monkeypatch.setattr(linear, "tile_of", lambda shape, samples, form: tile)
    program = wide(np.random.default_rng(7), channels, tile.outputs + 17, 3, side=(33, 34))
    check(run(program, batch=2), program)


def test_floats_are_quantized_and_back_as_the_specification_says(run):
    program = wide(np.random.default_rng(1), 8, 12, 3)
    (port,), (made,) = program.inputs, program.outputs
    scale = program.tensors[port.tensor].scale
    real = (np.random.default_rng(0).integers(-600, 600, port.shape) * np.float32(scale / 2)).astype(np.float32)
    expected = interpret(program, {"x": quantize_input(program, port, real)})["y"]
    session = run(program)
    np.testing.assert_array_equal(session.run(None, {"x": real})[0], dequantize_output(program, made, expected))
    assert all(0.0 < taken < 1000.0 for taken in session.time(5))


def test_floats_are_as_near_as_their_sums_have_them(run):
    program = every_kind()
    random, given = np.random.default_rng(0), {}
    for port in program.inputs:
        tensor = program.tensors[port.tensor]
        drawn = random.integers(-128, 128, tensor.shape) if tensor.is_codes else random.normal(size=tensor.shape)
        given[port.name] = drawn.astype(tensor.dtype)
    expected, session = interpret(program, given), run(program)
    found = session.run_codes([given[port.name] for port in program.inputs])
    session.close()
    for operation, port, one in zip(program.operations, program.outputs, found, strict=True):
        exact = expected[port.name]
        if isinstance(operation, ops.MatMul | ops.FloatMatMul | ops.FloatDense):
            np.testing.assert_array_equal(one, exact)
            continue
        # A rounding for each term of a row's sum, twice where it is a variance, and the functions' own bounds.
        terms = program.tensors[operation.inputs[0]].shape[-1] if not isinstance(operation, ops.Pointwise) else 1
        assert np.abs(one - exact).max() <= (2 * terms * 2.0**-23 + 3e-6) * np.abs(exact).max()


def test_a_whole_network_equals_the_interpreter(architecture, qcompile, resnet8, tmp_path):
    from qcompile.backends.integer.lower import lower
    from qcompile.core import model as models

    model, data, evaluation = resnet8
    output = tmp_path / "out"
    done = qcompile(model, "--target", "cuda:tvm", "--data", data, "--eval", evaluation, "--observer", "minmax",
                    "-o", output, "--json")  # fmt: skip
    assert done.code == 0, done.err
    program = lower(models.load(output / "reference.onnx"))
    (port,), (made,) = program.inputs, program.outputs
    samples = np.load(evaluation)[port.name]
    session = InferenceSession(output, batch=len(samples))
    found = session.run(None, {port.name: np.concatenate(samples)})[0]
    for sample, one in zip(samples, found, strict=True):
        codes = interpret(program, {port.name: quantize_input(program, port, sample)})[made.name]
        np.testing.assert_array_equal(one[None], dequantize_output(program, made, codes))
