"""Kernels in float against float64, within bounds that follow from how they compute; what is exact is equal."""

from __future__ import annotations

import math
import subprocess
from dataclasses import replace

import numpy as np
import pytest
from float_programs import codes, floats, pointwise, product, program_of, rows

from qcompile.backends.integer import expressions
from qcompile.backends.integer import float_operations as ops
from qcompile.backends.integer.expressions import leaf, number
from qcompile.backends.integer.interpret import interpret
from qcompile.backends.integer.operations import Concat, Requantize
from qcompile.backends.integer.program import Tensor
from qcompile.core import numerics

pytest.importorskip("tvm")

from qcompile.backends.cpu.layer_forms import product_form
from qcompile.backends.cpu.layout import packed_bytes
from qcompile.backends.tvm.schedules.linear import Linear
from qcompile.backends.tvm.schedules.vectors import Rounding
from qcompile.backends.tvm.schedules.x86 import PROCESSORS as PROCESSOR_KINDS
from qcompile.backends.tvm.schedules.x86_products import Packed

PROCESSORS = ("avx512-vnni", "avx-vnni", "avx2", "amx")
#: What one rounding to float32 takes, relatively.
HALF = 2.0**-24


def evaluated(load, processor, expression, *operands, shape=None):
    program = pointwise(expression, *operands, shape=shape or operands[0].shape)
    return load(program, processor).run_codes(list(operands))[0]


EVERYWHERE = np.concatenate([np.linspace(-100, 100, 20011), np.linspace(-5, 5, 20000), [0.0, 1e-30, -1e-30]])


@pytest.mark.parametrize("processor", PROCESSORS)
@pytest.mark.parametrize("kind", ["exp", "erf", "tanh"])
def test_functions_are_within_their_bounds(load, processor, kind):
    x = EVERYWHERE.astype(np.float32).reshape(1, -1)
    wide = np.clip(x.astype(np.float64), -87.0, 88.0)
    exact = {"exp": np.exp, "erf": np.vectorize(math.erf), "tanh": np.tanh}[kind](wide)
    error = np.abs(evaluated(load, processor, (kind, leaf(0)), x) - exact)
    assert np.max(error / exact if kind == "exp" else error) < {"exp": 3e-7, "erf": 1e-6, "tanh": 5e-7}[kind]


@pytest.mark.parametrize("kind", ["Gelu", "Sigmoid", "HardSwish", "LeakyRelu"])
def test_activations_are_near_float64(load, kind):
    x = np.random.default_rng(0).normal(0, 3, (3, 77)).astype(np.float32)
    wide = x.astype(np.float64)
    exact = {
        "Gelu": 0.5 * wide * (1 + np.array([math.erf(v) for v in (wide / math.sqrt(2)).reshape(-1)]).reshape(3, 77)),
        "Sigmoid": 1 / (1 + np.exp(-wide)),
        "HardSwish": wide * np.clip(wide / 6 + 0.5, 0, 1),
        "LeakyRelu": np.where(wide < 0, 0.01 * wide, wide),
    }[kind]
    found = evaluated(load, "avx512-vnni", expressions.FUNCTIONS[kind](leaf(0), {}), x)
    # erf's bound, or exp's, times what stands before it, and a rounding for each of at most eight primitives.
    assert np.all(
        np.abs(found - exact) <= 1e-6 * np.abs(wide) / 2 + 4e-7 * np.abs(exact) + 8 * HALF * (1 + np.abs(wide))
    )


@pytest.mark.parametrize("processor", PROCESSORS)
@pytest.mark.parametrize(
    "shapes", [((2, 3, 37), (2, 3, 37)), ((1, 5, 16), (1, 1, 16)), ((4, 3, 7), (4, 3, 1)), ((1, 1), (1, 1))]
)
@pytest.mark.parametrize("kind", ["add", "sub", "mul", "div", "max", "min", "less", "equal"])
def test_single_primitives_are_float32_s_own(load, processor, shapes, kind):
    random = np.random.default_rng(len(kind))
    a, b = (random.integers(-4, 5, shape).astype(np.float32) + np.float32(0.1) for shape in shapes)
    found = evaluated(load, processor, (kind, leaf(0), leaf(1)), a, b)
    np.testing.assert_array_equal(found, np.asarray(expressions.PRIMITIVES[kind](a, b), np.float32))


def test_a_value_that_stands_twice_and_a_choice_are_what_numpy_has(load):
    x = np.random.default_rng(1).normal(size=(2, 19)).astype(np.float32)
    tree = ("where", ("less", leaf(0), number(0.25)), ("mul", leaf(0), leaf(0)), ("abs", leaf(0)))
    np.testing.assert_array_equal(evaluated(load, "avx512-vnni", tree, x), np.where(x < 0.25, x * x, np.abs(x)))


@pytest.mark.parametrize("processor", PROCESSORS)
@pytest.mark.parametrize("width", [1, 7, 16, 33, 128])
def test_codes_are_read_and_written_as_their_scales_say(load, processor, width):
    random = np.random.default_rng(width)
    source, target = codes("x", 3, width, scale=0.07, zero=-5), codes("y", 3, width, scale=0.11, zero=9)
    operation = ops.Pointwise("p", ("x",), "y", (ops.Leaf(0, (0, 1), 0.07, -5),), ("mul", leaf(0), number(1.3)))
    program = program_of(operation, [source], target)
    x = random.integers(-128, 128, (3, width)).astype(np.int8)
    found = load(program, processor).run_codes([x])[0]
    real = (x.astype(np.float64) + 5) * np.float64(np.float32(0.07)) * np.float64(np.float32(1.3)) / np.float32(0.11)
    # Half a step, and the roundings of two products and of 1 / scale.
    assert np.all(np.abs(np.clip(real + 9, -128, 127) - found) <= 0.5 + 4 * HALF * np.abs(real))


@pytest.mark.parametrize("processor", PROCESSORS)
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (2, 4, 16), (5, 33), (1, 2, 3, 128), (2, 401)])
def test_softmax_is_near_float64(load, processor, shape):
    random = np.random.default_rng(shape[-1])
    x = random.normal(0, 8, shape).astype(np.float32)
    x[random.random(shape) < 0.2] = -np.inf
    x[..., 0] = 1.0
    found = load(rows(ops.FloatSoftmax, shape), processor).run_codes([x])[0]
    apart = x.astype(np.float64) - x.max(axis=-1, keepdims=True)
    exact = np.exp(apart) / np.exp(apart).sum(axis=-1, keepdims=True)
    # exp twice, its argument's rounding, the sum's and two more; e^-70 stands for what is lower.
    distance = np.minimum(np.abs(apart), 70.0)
    bound = exact * (6e-7 + HALF * (2 * distance + shape[-1] + 3)) + 1.01 * np.exp(-70.0)
    assert np.all(np.abs(found - exact) <= bound)


def test_a_row_that_is_masked_as_a_whole_stays_finite(load):
    x = np.full((2, 20), -np.inf, np.float32)
    np.testing.assert_allclose(load(rows(ops.FloatSoftmax, (2, 20))).run_codes([x])[0], 0.05, rtol=1e-6)


def test_softmax_writes_codes(load):
    random = np.random.default_rng(0)
    target = codes("y", 4, 50, scale=1 / 255, zero=-128)
    x = random.normal(0, 2, (4, 50)).astype(np.float32)
    found = load(rows(ops.FloatSoftmax, (4, 50), target=target)).run_codes([x])[0]
    powers = np.exp(x.astype(np.float64))
    exact = powers / powers.sum(axis=-1, keepdims=True) * 255 - 128
    assert np.all(np.abs(np.clip(exact, -128, 127) - found) <= 0.5 + 1e-3)
    assert len(np.unique(found)) > 10


@pytest.mark.parametrize("processor", PROCESSORS)
@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("shape", [(1, 4), (3, 17), (2, 5, 64), (4, 384), (1, 77)])
def test_normalization_is_near_float64(load, processor, centred, shape):
    random = np.random.default_rng(shape[-1])
    width = shape[-1]
    weight, bias = (random.normal(1, 0.5, width).astype(np.float32) for _ in range(2))
    x = random.normal(2, 3, shape).astype(np.float32)
    found = load(rows(ops.Normalize, shape, (weight, bias, 1e-5, centred)), processor).run_codes([x])[0]
    wide = x.astype(np.float64)
    apart = wide - wide.mean(axis=-1, keepdims=True) if centred else wide
    deviation = np.sqrt((apart**2).mean(axis=-1, keepdims=True) + np.float64(np.float32(1e-5)))
    exact = apart / deviation * weight + bias
    # A mean of n terms is off by n roundings of their mean magnitude, and so is what is squared.
    off = (width + 4) * HALF * np.abs(wide).mean(axis=-1, keepdims=True) / deviation
    bound = np.abs(weight) * (2 * off + np.abs(apart) / deviation * (off + (width + 8) * HALF)) + 2 * HALF * np.abs(
        exact
    )
    assert np.all(np.abs(found - exact) <= bound)


@pytest.mark.parametrize("processor", PROCESSORS)
@pytest.mark.parametrize("kind", ["sum", "max"])
@pytest.mark.parametrize(("kept", "gone"), [((3, 37), (5,)), ((1,), (4, 6)), ((2, 16), (3, 3)), ((5,), (1,))])
@pytest.mark.parametrize("inner", [True, False])
def test_reductions_are_near_float64(load, processor, kind, kept, gone, inner):
    """Axes that are gone over lie in front of those that are kept, or behind them."""
    random = np.random.default_rng(len(kept))
    stored = (*kept, *gone) if inner else (*gone, *kept)
    count = len(stored)
    axes = tuple(range(count)) if inner else (*range(len(gone), count), *range(len(gone)))
    operation = ops.Reduce("r", ("x",), "y", (ops.Leaf(0, axes),), leaf(0), gone, kind, 0.5 if kind == "sum" else 1.0)
    x = random.normal(size=stored).astype(np.float32)
    found = load(program_of(operation, [floats("x", *stored)], floats("y", *kept)), processor).run_codes([x])[0]
    over = tuple(range(len(kept), count)) if inner else tuple(range(len(gone)))
    wide = x.astype(np.float64)
    if kind == "max":
        np.testing.assert_array_equal(found, wide.max(axis=over).astype(np.float32))
    else:
        bound = (math.prod(gone) + 1) * HALF * np.abs(wide).sum(axis=over)
        assert np.all(np.abs(found - wide.sum(axis=over) / 2) <= bound)


@pytest.mark.parametrize("dtype", ["int8", "float32"])
def test_rows_of_a_table_are_looked_up_and_never_beyond_it(load, dtype):
    random = np.random.default_rng(0)
    table = random.integers(-128, 128, (50, 37)).astype(dtype)
    scale = random.uniform(0.1, 1.0, 37).astype(np.float32)
    indices = Tensor("x", (1, 6), "int64", 1.0, 0)
    program = program_of(ops.Gather("g", ("x",), "y", table, scale), [indices], floats("y", 1, 6, 37))
    given = np.array([[0, 49, 7, 7, 1 << 40, -3]])
    expected = table[[0, 49, 7, 7, 49, 0]].astype(np.float32) * scale
    np.testing.assert_array_equal(load(program).run_codes([given])[0][0], expected)


@pytest.mark.parametrize("processor", PROCESSORS)
@pytest.mark.parametrize(
    ("real", "batch", "m", "k", "n", "heads", "turned"),
    [(True, (1, 3), 5, 32, 16, False, False), (True, (1, 3), 5, 32, 40, True, True),
     (True, (2,), 7, 6, 33, False, True), (True, (), 1, 1, 1, False, False), (True, (4,), 3, 9, 70, True, False),
     (False, (1, 3), 5, 32, 16, False, False),
     (False, (1, 2), 128, 128, 32, True, False), (False, (2,), 16, 24, 64, False, True),
     (False, (1, 3), 5, 32, 40, True, True),
     (True, (2, 3), 33, 70, 50, True, True), (False, (3, 2), 20, 66, 81, True, False),
     (False, (2,), 17, 1030, 35, False, True), (True, (2,), 17, 1030, 35, False, False)],
)  # fmt: skip
def test_products_of_activations_equal_the_interpreter(load, processor, real, batch, m, k, n, heads, turned):
    random = np.random.default_rng(k)
    if real:
        step, target = ops.Dequantize(np.array([0.013], np.float32), -40.0, 1e9), lambda shape: floats("y", *shape)
    else:
        multiplier, shift = numerics.fixed_point([60.0 / (74 * 74 * math.sqrt(k))])
        step, target = Requantize(multiplier, shift, -4, -128, 120), lambda shape: codes("y", *shape)
    program = product(batch, m, k, n, step, target, heads, turned, zero=-128 if m == 20 else -7)
    given = {name: random.integers(-128, 128, program.tensors[name].shape).astype(np.int8) for name in "ab"}
    expected = interpret(program, given)["y"]
    assert m * n == 1 or len(np.unique(expected)) > 8, "an output that says something"
    np.testing.assert_array_equal(load(program, processor).run_codes([given["a"], given["b"]])[0], expected)


@pytest.mark.parametrize("processor", PROCESSORS)
def test_what_is_packed_fits_its_room(processor):
    random, known = np.random.default_rng(0), PROCESSOR_KINDS[processor]
    for _ in range(200):
        m, k, n = (int(2 ** random.uniform(0, limit)) for limit in (8, 11, 8))
        program = product((2,), m, k, n, ops.Dequantize(np.ones(1, np.float32)), lambda shape: floats("y", *shape))
        (operation,) = program.operations
        shape = Linear(1, m, n, ((1, 0), (1, 0)), k, 0, k, 0, n, Rounding(False, 0, 0, 0), reals=(-np.inf, np.inf))
        _, whole, tile, _ = product_form(shape, known)
        assert Packed(whole, tile, k, n, 1, 0, (1, 0)).nbytes(known) <= packed_bytes(operation)


def test_a_division_by_a_number_is_a_product():
    assert expressions.inverse(number(4.0)) == number(0.25)
    for divisor in (number(0.0), number(np.inf), number(1e-45), leaf(0)):
        assert expressions.inverse(divisor) is None


@pytest.mark.parametrize("processor", PROCESSORS)
@pytest.mark.parametrize("shape", [(5, 32, 64), (1, 384, 70), (9, 33, 17), (128, 16, 384)])
def test_dense_layers_give_floats_that_equal_the_interpreter(load, processor, shape):
    m, k, n = shape
    random = np.random.default_rng(k)
    weights = random.integers(-128, 128, (n, k)).astype(np.int8)
    bias = random.integers(-9999, 9999, n).astype(np.int32)
    step = ops.Dequantize(random.uniform(1e-4, 1e-3, n).astype(np.float32), 0.0 if k == 33 else -np.inf)
    operation = ops.FloatDense("d", ("x",), "y", weights, bias, step)
    program = program_of(operation, [codes("x", 1, m, k)], floats("y", 1, m, n))
    x = random.integers(-128, 128, (1, m, k)).astype(np.int8)
    np.testing.assert_array_equal(load(program, processor).run_codes([x])[0], interpret(program, {"x": x})["y"])


def test_functions_need_no_library(load, tmp_path):
    tree = ("tanh", ("erf", ("exp", ("sqrt", leaf(0)))))
    load(pointwise(tree, np.ones((3, 5), np.float32), shape=(3, 5)), "avx2")
    listed = subprocess.run(["nm", "-D", tmp_path / "libnet.so"], capture_output=True, text=True, check=True).stdout
    undefined = {line.split()[-1].split("@")[0] for line in listed.splitlines() if " U " in line}
    assert undefined <= {"memcpy", "memset", "memmove"}


def test_the_header_has_the_types_of_what_is_no_codes(load, tmp_path):
    indices = Tensor("x", (1, 6), "int64", 1.0, 0)
    table, scale = np.ones((4, 8), np.int8), np.ones(8, np.float32)
    session = load(program_of(ops.Gather("g", ("x",), "y", table, scale), [indices], floats("y", 1, 6, 8)))
    header = (tmp_path / "net.h").read_text()
    assert "net_run(void *workspace, const int64_t *in, float *out);" in header
    assert "net_run_floats(void *workspace, const int64_t *in, float *out);" in header
    assert "NET_INPUT_SCALE" not in header and "NET_INPUT_BYTES 48" in header
    assert [port.type for port in (*session.get_inputs(), *session.get_outputs())] == ["tensor(int64)", "tensor(float)"]
    np.testing.assert_array_equal(session.run(None, {"x": np.zeros((1, 6), np.int64)})[0], np.ones((1, 6, 8)))


def test_floats_are_joined_along_any_axis(load):
    given = [np.random.default_rng(draw).normal(size=(1, 3 + draw, 5)).astype(np.float32) for draw in range(2)]
    joined = Concat("join", ("a", "b"), "y", 1)
    program = program_of(joined, [floats("a", 1, 3, 5), floats("b", 1, 4, 5)], floats("y", 1, 7, 5))
    np.testing.assert_array_equal(load(program).run_codes(given)[0], np.concatenate(given, 1))


@pytest.mark.parametrize("kind", ["int8", "float32"])
def test_a_constant_is_written_and_joined(load, kind):
    random = np.random.default_rng(6)
    target = Tensor("y", (1, 5, 24), kind, 0.1 if kind == "int8" else 1.0, 0)
    token, x = (replace(target, name=name, shape=(1, rows, 24)) for name, rows in (("token", 2), ("x", 3)))
    values = (random.integers(-127, 128, token.shape) * np.float32(0.1)).astype(np.float32)
    written = ops.Pointwise("c", (), "token", (ops.Leaf(-1, (None, 1, 2), values=values),), leaf(0))
    one = program_of(Concat("join", ("token", "x"), "y", 1), [x], target)
    program = replace(one, tensors=one.tensors | {"token": token}, operations=(written, *one.operations))
    given = random.integers(-128, 128, x.shape).astype(kind)
    expected = interpret(program, {"x": given})["y"]
    np.testing.assert_array_equal(load(program).run_codes([given])[0], expected)
    assert len(np.unique(expected[:, :2])) > 20


def test_what_a_mask_keeps_out_of_a_softmax_is_no_denormal(load):
    # Each of them would take a hundred cycles more, and a padded sequence has many.
    given = np.zeros((64, 4000), np.float32)
    given[:, 1000:] = -10000.0
    found = load(rows(ops.FloatSoftmax, (64, 4000))).run_codes([given])[0]
    assert np.all(found[:, 1000:] < 1e-30) and np.all(found >= np.finfo(np.float32).tiny)
    np.testing.assert_allclose(found[:, :1000], 1e-3, rtol=1e-6)
