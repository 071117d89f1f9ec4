"""Kernels in float against float64, within bounds that follow from how they compute; what is exact is equal."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from float_programs import codes, float_product, floats, pointwise, product, program_of, rows, together

from qcompile.backends.cuda.network import network_of
from qcompile.backends.integer import expressions
from qcompile.backends.integer import float_operations as ops
from qcompile.backends.integer import operations as moves
from qcompile.backends.integer.expressions import leaf, number
from qcompile.backends.integer.interpret import interpret
from qcompile.backends.integer.operations import Requantize
from qcompile.backends.integer.program import Tensor
from qcompile.core import numerics
from qcompile.core.errors import TargetError

#: What one rounding to float32 takes, relatively.
HALF = 2.0**-24


def drawn(array, batch):
    """Return samples behind one another: what is given, and it in other orders."""
    return np.concatenate([np.roll(array, sample, -1) for sample in range(batch)])


def found(load, program, *given, batch=1):
    return load(program, batch).run_codes([drawn(array, batch) for array in given])[0]


def found_all(load, cases):
    """Return what each of several programs gives, compiled as one: (program, inputs)."""
    session = load(together([program for program, _ in cases]))
    return session.run_codes([array for _, given in cases for array in given])


EVERYWHERE = np.concatenate([np.linspace(-100, 100, 2011), np.linspace(-5, 5, 2000), [0.0, 1e-30, -1e-30]])


def test_functions_are_within_their_bounds(load):
    x = EVERYWHERE.astype(np.float32).reshape(1, -1)
    wide = np.clip(x.astype(np.float64), -87.0, 88.0)
    kinds = {"exp": (np.exp, 3e-7), "erf": (np.vectorize(math.erf), 1e-6), "tanh": (np.tanh, 5e-7)}
    made = found_all(load, [(pointwise((kind, leaf(0)), x, shape=x.shape), [x]) for kind in kinds])
    for (kind, (exact, bound)), one in zip(kinds.items(), made, strict=True):
        off = np.abs(one - exact(wide))
        assert np.max(off / exact(wide) if kind == "exp" else off) < bound, kind


def test_activations_are_near_float64(load):
    x = np.random.default_rng(0).normal(0, 3, (3, 77)).astype(np.float32)
    wide = x.astype(np.float64)
    exact = {
        "Gelu": 0.5 * wide * (1 + np.array([math.erf(v) for v in (wide / math.sqrt(2)).reshape(-1)]).reshape(3, 77)),
        "Sigmoid": 1 / (1 + np.exp(-wide)),
    }
    trees = {kind: expressions.FUNCTIONS[kind](leaf(0), {}) for kind in exact}
    made = found_all(load, [(pointwise(tree, x, shape=x.shape), [x]) for tree in trees.values()])
    for kind, one in zip(exact, made, strict=True):
        # erf's bound, or exp's, times what stands before it, and a rounding for each of at most eight primitives.
        bound = 1e-6 * np.abs(wide) / 2 + 4e-7 * np.abs(exact[kind]) + 8 * HALF * (1 + np.abs(wide))
        assert np.all(np.abs(one - exact[kind]) <= bound), kind


def test_primitives_are_float32_s_own(load):
    random, cases = np.random.default_rng(4), []
    parts = [("mul", number(3.0**at), (kind, leaf(0), leaf(1)))
             for at, kind in enumerate(["add", "sub", "mul", "div", "max", "min", "less", "equal"])]  # fmt: skip
    tree = ("where", ("less", leaf(0), number(0.25)), ("abs", leaf(0)), ("sqrt", ("max", leaf(1), number(0.0))))
    for part in parts:
        tree = ("add", tree, part)
    for shapes in [((2, 3, 37), (2, 3, 37)), ((1, 5, 16), (1, 1, 16)), ((4, 3, 7), (4, 3, 1)), ((1, 1), (1, 1))]:
        a, b = (random.integers(-4, 5, shape).astype(np.float32) + np.float32(0.1) for shape in shapes)
        cases.append((pointwise(tree, a, b, shape=shapes[0]), [a, b]))
    for (program, (a, b)), one in zip(cases, found_all(load, cases), strict=True):
        np.testing.assert_array_equal(one, interpret(program, {"x0": a, "x1": b})["y"])


def test_codes_are_read_and_written_as_the_interpreter_does(load):
    width = 77
    random = np.random.default_rng(width)
    source, target = codes("x", 3, width, scale=0.07, zero=-5), codes("y", 3, width, scale=0.11, zero=9)
    operation = ops.Pointwise("p", ("x",), "y", (ops.Leaf(0, (0, 1), 0.07, -5),), ("mul", leaf(0), number(1.3)))
    program = program_of(operation, [source], target)
    x = random.integers(-128, 128, (3, width)).astype(np.int8)
    given = drawn(x, 2)
    expected = np.concatenate([interpret(program, {"x": one})["y"] for one in (given[:3], given[3:])])
    np.testing.assert_array_equal(found(load, program, x, batch=2), expected)


def test_softmax_is_near_float64(load):
    random, cases = np.random.default_rng(3), []
    for shape in [(1, 1), (3, 5), (2, 4, 16), (5, 33), (1, 2, 3, 128), (2, 401), (1, 9001)]:
        x = random.normal(0, 8, shape).astype(np.float32)
        x[random.random(shape) < 0.2] = -np.inf
        x[..., 0] = 1.0
        cases.append((rows(ops.FloatSoftmax, shape), [x]))
    for (_, (x,)), made in zip(cases, found_all(load, cases), strict=True):
        apart = x.astype(np.float64) - x.max(axis=-1, keepdims=True)
        exact = np.exp(apart) / np.exp(apart).sum(axis=-1, keepdims=True)
        # exp twice, its argument's rounding, the sum's and two more; e^-87 stands for what is lower.
        distance = np.minimum(np.abs(apart), 87.0)
        bound = exact * (6e-7 + HALF * (2 * distance + x.shape[-1] + 3)) + 1.01 * np.exp(-87.0)
        assert np.all(np.abs(made - exact) <= bound)


def test_a_row_that_is_masked_as_a_whole_stays_finite(load):
    x = np.full((2, 20), -np.inf, np.float32)
    np.testing.assert_allclose(found(load, rows(ops.FloatSoftmax, (2, 20)), x), 0.05, rtol=1e-6)


def test_softmax_writes_codes_of_several_samples(load):
    x = np.random.default_rng(0).normal(0, 2, (4, 50)).astype(np.float32)
    program = rows(ops.FloatSoftmax, (4, 50), target=codes("y", 4, 50, scale=1 / 255, zero=-128))
    made = found(load, program, x, batch=3)
    powers = np.exp(drawn(x, 3).astype(np.float64))
    exact = powers / powers.sum(axis=-1, keepdims=True) * 255 - 128
    assert np.all(np.abs(np.clip(exact, -128, 127) - made) <= 0.5 + 1e-3)
    assert len(np.unique(made)) > 10


@pytest.mark.parametrize("centred", [True, False])
def test_normalization_is_near_float64(load, centred):
    random, cases = np.random.default_rng(5), []
    for shape in [(1, 4), (3, 17), (2, 5, 64), (4, 384), (1, 9001)]:
        numbers = [random.normal(1, 0.5, shape[-1]).astype(np.float32) for _ in range(2)]
        x = random.normal(2, 3, shape).astype(np.float32)
        cases.append((rows(ops.Normalize, shape, (*numbers, 1e-5, centred)), [x]))
    for (program, (x,)), made in zip(cases, found_all(load, cases), strict=True):
        weight, bias = program.operations[0].weight, program.operations[0].bias
        wide, width = x.astype(np.float64), x.shape[-1]
        apart = wide - wide.mean(axis=-1, keepdims=True) if centred else wide
        deviation = np.sqrt((apart**2).mean(axis=-1, keepdims=True) + np.float64(np.float32(1e-5)))
        exact = apart / deviation * weight + bias
        # A mean of n terms is off by n roundings of their mean magnitude, and so is what is squared.
        off = (width + 4) * HALF * np.abs(wide).mean(axis=-1, keepdims=True) / deviation
        bound = np.abs(weight) * (2 * off + np.abs(apart) / deviation * (off + (width + 8) * HALF))
        assert np.all(np.abs(made - exact) <= bound + 2 * HALF * np.abs(exact))


REDUCTIONS = [((3, 37), (5,)), ((1,), (4, 60)), ((2, 16), (3, 3)), ((5,), (77,))]


@pytest.mark.parametrize("kind", ["sum", "max"])
def test_reductions_are_near_float64(load, kind):
    """Axes that are gone over lie in front of those that are kept, or behind them."""
    random, cases = np.random.default_rng(6), []
    for (kept, gone), inner in itertools.product(REDUCTIONS, (True, False)):
        stored = (*kept, *gone) if inner else (*gone, *kept)
        count = len(stored)
        axes = tuple(range(count)) if inner else (*range(len(gone), count), *range(len(gone)))
        leaves = (ops.Leaf(0, axes),)
        operation = ops.Reduce("r", ("x",), "y", leaves, leaf(0), gone, kind, 0.5 if kind == "sum" else 1.0)
        program = program_of(operation, [floats("x", *stored)], floats("y", *kept))
        cases.append((program, [random.normal(size=stored).astype(np.float32)]))
    for (program, (x,)), made in zip(cases, found_all(load, cases), strict=True):
        (operation,) = program.operations
        over = operation.leaves[0].axes[-len(operation.extents) :]
        wide = x.astype(np.float64)
        if kind == "max":
            np.testing.assert_array_equal(made, wide.max(axis=over).astype(np.float32))
        else:
            bound = (math.prod(operation.extents) + 1) * HALF * np.abs(wide).sum(axis=over)
            assert np.all(np.abs(made - wide.sum(axis=over) / 2) <= bound)


@pytest.mark.parametrize("dtype", ["int8", "float32"])
def test_rows_of_a_table_are_looked_up_and_never_beyond_it(load, dtype):
    random = np.random.default_rng(0)
    table = random.integers(-128, 128, (50, 37)).astype(dtype)
    scale = random.uniform(0.1, 1.0, 37).astype(np.float32)
    indices = Tensor("x", (1, 6), "int64", 1.0, 0)
    program = program_of(ops.Gather("g", ("x",), "y", table, scale), [indices], floats("y", 1, 6, 37))
    given = np.array([[0, 49, 7, 7, 1 << 40, -3]])
    session = load(program)
    assert [port.type for port in (*session.get_inputs(), *session.get_outputs())] == ["tensor(int64)", "tensor(float)"]
    expected = table[[0, 49, 7, 7, 49, 0]].astype(np.float32) * scale
    np.testing.assert_array_equal(session.run_codes([given])[0][0], expected)
    np.testing.assert_array_equal(session.run(None, {"x": given})[0][0], expected)


PRODUCTS = [
    (True, (1, 3), 5, 32, 16, False, False), (True, (1, 3), 5, 32, 40, True, True),
    (True, (2,), 7, 6, 33, False, True), (True, (), 1, 1, 1, False, False), (True, (4,), 3, 9, 70, True, False),
    (False, (1, 2), 128, 128, 32, True, False), (False, (2,), 16, 24, 64, False, True),
    (True, (2, 3), 33, 70, 50, True, True), (False, (3, 2), 20, 66, 81, True, False),
    (False, (2,), 65, 130, 68, False, True), (True, (2,), 17, 1030, 35, False, False),
]  # fmt: skip


def test_products_of_activations_equal_the_interpreter(load):
    random, cases = np.random.default_rng(7), []
    for real, batch, m, k, n, heads, turned in PRODUCTS:
        if real:
            step, target = ops.Dequantize(np.array([0.013], np.float32), -40.0, 1e9), partial(floats, "y")
        else:
            multiplier, shift = numerics.fixed_point([60.0 / (74 * 74 * math.sqrt(k))])
            step, target = Requantize(multiplier, shift, -4, -128, 120), partial(codes, "y")
        zero = -128 if m == 20 else -7
        program = product(batch, m, k, n, step, lambda shape, target=target: target(*shape), heads, turned, zero)
        cases.append((program, [random.integers(-128, 128, program.tensors[name].shape).astype(np.int8)
                                for name in "ab"]))  # fmt: skip
    for (program, (a, b)), made in zip(cases, found_all(load, cases), strict=True):
        expected = interpret(program, {"a": a, "b": b})["y"]
        assert expected.size == 1 or len(np.unique(expected)) > 8, "an output that says something"
        np.testing.assert_array_equal(made, expected)


def test_products_of_floats_equal_the_interpreter(load):
    random, cases = np.random.default_rng(8), []
    for shape in [((1, 3), 5, 32, 16, False, False), ((2,), 70, 33, 65, True, True), ((2, 3), 20, 17, 81, True, False)]:
        program = float_product(*shape, 0.25, (-3.0, 2.5))
        cases.append((program, [random.normal(size=program.tensors[name].shape).astype(np.float32) for name in "ab"]))
    for (program, (a, b)), made in zip(cases, found_all(load, cases), strict=True):
        np.testing.assert_array_equal(made, interpret(program, {"a": a, "b": b})["y"])


def test_dense_layers_give_floats_that_equal_the_interpreter(load):
    random, cases = np.random.default_rng(9), []
    for m, k, n in [(5, 32, 64), (1, 384, 70), (9, 33, 17), (128, 16, 96)]:
        weights = random.integers(-128, 128, (n, k)).astype(np.int8)
        bias = random.integers(-9999, 9999, n).astype(np.int32)
        step = ops.Dequantize(random.uniform(1e-4, 1e-3, n).astype(np.float32), 0.0 if k == 33 else -np.inf)
        operation = ops.FloatDense("d", ("x",), "y", weights, bias, step)
        program = program_of(operation, [codes("x", 1, m, k)], floats("y", 1, m, n))
        cases.append((program, [random.integers(-128, 128, (1, m, k)).astype(np.int8)]))
    for (program, (x,)), made in zip(cases, found_all(load, cases), strict=True):
        np.testing.assert_array_equal(made, interpret(program, {"x": x})["y"])


def test_what_moves_floats_moves_them(load):
    random = np.random.default_rng(0)
    a, b = (random.normal(size=(2, 3 + draw, 5)).astype(np.float32) for draw in range(2))
    joined = moves.Concat("join", ("a", "b"), "y", 1)
    turned, cut = moves.Transpose("t", ("x",), "y", (2, 0, 1)), moves.Slice("s", ("x",), "y", (0, 1, 0), (1, 2, 3))
    cases = [
        (program_of(joined, [floats("a", 2, 3, 5), floats("b", 2, 4, 5)], floats("y", 2, 7, 5)), [a, b]),
        (program_of(turned, [floats("x", 2, 4, 5)], floats("y", 5, 2, 4)), [b]),
        (program_of(cut, [floats("x", 2, 4, 5)], floats("y", 2, 2, 2)), [b]),
    ]
    expected = [np.concatenate([a, b], 1), b.transpose(2, 0, 1), b[:, 1::2, ::3]]
    for made, one in zip(found_all(load, cases), expected, strict=True):
        np.testing.assert_array_equal(made, one)


@pytest.mark.parametrize("kind", ["int8", "float32"])
def test_constants_are_written_in_every_sample_and_joined(load, kind):
    random = np.random.default_rng(6)
    target = replace(codes("y", 1, 5, 24, scale=0.1, zero=0), dtype=kind, scale=0.1 if kind == "int8" else 1.0)
    token, x = (replace(target, name=name, shape=(1, rows, 24)) for name, rows in (("token", 2), ("x", 3)))
    values = (random.integers(-127, 128, token.shape) * np.float32(0.1)).astype(np.float32)
    written = ops.Pointwise("c", (), "token", (ops.Leaf(-1, (None, 1, 2), values=values),), leaf(0))
    one = program_of(moves.Concat("join", ("token", "x"), "y", 1), [x], target)
    program = replace(one, tensors=one.tensors | {"token": token}, operations=(written, *one.operations))
    given = drawn(random.integers(-128, 128, x.shape).astype(kind), 3)
    expected = np.concatenate([interpret(program, {"x": each[None]})["y"] for each in given])
    np.testing.assert_array_equal(load(program, 3).run_codes([given])[0], expected)
    assert len(np.unique(expected[:, :2])) > 20 and np.array_equal(expected[:, 2:], given)


def test_what_has_no_kernel_in_float_is_refused_by_its_name():
    padded = moves.Pad("op7", ("x",), "y", (0, 1), (0, 1), 0)
    with pytest.raises(TargetError, match="op7: reads or writes float32, and its kernel for CUDA devices has codes"):
        network_of(program_of(padded, [floats("x", 2, 3)], floats("y", 2, 5)))
    many = product((2, 1, 3, 2, 2), 4, 4, 4, ops.Dequantize(np.ones(1, np.float32)), lambda shape: floats("y", *shape))
    (operation,) = many.operations
    apart = tuple((axes[3], axes[1], axes[0], axes[2], *axes[4:]) for axes in operation.axes[:1]) + operation.axes[1:]
    with pytest.raises(TargetError, match="m: multiplies along 4 axes, and kernels for CUDA devices know three"):
        network_of(replace(many, operations=(replace(operation, axes=apart),)))
