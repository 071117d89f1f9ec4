"""The interpreter against loops that say what an operation means, one code at a time."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcompile.backends.integer import operations as ops
from qcompile.backends.integer.interpret import interpret, run
from qcompile.backends.integer.program import Port, Program, Tensor
from qcompile.core import numerics

Array = np.ndarray[Any, np.dtype[Any]]


def requantized(accumulator: int, step: ops.Requantize, channel: int) -> int:
    multiplier, shift = (int(array[channel % len(array)]) for array in (step.multiplier, step.shift))
    code = ((accumulator * multiplier + (1 << (shift - 1))) >> shift) + step.zero_point
    return min(max(code, step.low), step.high)


def code_at(x: Array, y: int, x_place: int, channel: int, outside: int) -> int:
    inside = 0 <= y < x.shape[1] and 0 <= x_place < x.shape[2]
    return int(x[0, y, x_place, channel]) if inside else outside


def convolved(operation: ops.Conv, x: Array, shape: tuple[int, ...]) -> Array:
    """Return what six loops make of a convolution, in Python's integers."""
    window, result = operation.window, np.zeros(shape, np.int64)
    leaving, rows, columns, inside = operation.weights.shape
    for y, column, out in itertools.product(range(shape[1]), range(shape[2]), range(leaving)):
        first = out // (leaving // operation.groups) * inside
        total = int(operation.bias[out])
        for i, j, c in itertools.product(range(rows), range(columns), range(inside)):
            place = (y * window.strides[0] - window.pads[0] + i * window.dilations[0],
                     column * window.strides[1] - window.pads[1] + j * window.dilations[1])  # fmt: skip
            total += int(operation.weights[out, i, j, c]) * code_at(x, *place, first + c, window.outside)
        result[0, y, column, out] = requantized(total, operation.requantize, out)
    return result


@st.composite
def convolutions(draw: Any) -> tuple[ops.Conv, Array, tuple[int, ...]]:
    random = np.random.default_rng(draw(st.integers(0, 999)))
    groups, inside, behind = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 2))
    size, strides, dilations = ((draw(st.integers(1, 3)), draw(st.integers(1, 3))) for _ in range(3))
    pads = tuple(draw(st.integers(0, 2)) for _ in range(4))
    x = random.integers(-128, 128, (1, 7, 8, groups * inside)).astype(np.int8)
    reach = [(size[axis] - 1) * dilations[axis] + 1 for axis in (0, 1)]
    counts = [(x.shape[1 + axis] + pads[axis] + pads[axis + 2] - reach[axis]) // strides[axis] + 1 for axis in (0, 1)]
    leaving = groups * behind
    window = ops.Window(size, strides, (pads[0], pads[1], pads[2], pads[3]), dilations, int(random.integers(-128, 128)))
    multiplier, shift = numerics.fixed_point(random.random(leaving) / 100)
    weights = random.integers(-127, 128, (leaving, *size, inside)).astype(np.int8)
    bias = random.integers(-5000, 5000, leaving).astype(np.int32)
    step = ops.Requantize(multiplier, shift, int(random.integers(-20, 20)), -100, 110)
    return ops.Conv("c", ("x",), "y", weights, bias, step, window, groups), x, (1, *counts, leaving)


@given(convolutions())
def test_convolutions_against_loops(case: tuple[ops.Conv, Array, tuple[int, ...]]) -> None:
    operation, x, shape = case
    found = run(operation, [x], Tensor("y", shape, "int8", 1.0, 0))
    assert found.dtype == np.int8
    assert np.array_equal(found, convolved(operation, x, shape))


@given(st.integers(0, 999), st.integers(1, 300))
def test_softmax_against_a_loop(seed: int, length: int) -> None:
    random = np.random.default_rng(seed)
    x = random.integers(-128, 128, (1, length)).astype(np.int8)
    table = np.rint(2.0**14 * np.exp(-np.arange(256) * 0.05)).astype(np.uint32)
    operation = ops.Softmax("s", ("x",), "y", table, 4096, 4, -128, -128, 127)
    powers = [int(table[int(x.max()) - int(code)]) for code in x[0]]
    whole = sum(powers) << 4
    assert max(powers) * 4096 + whole // 2 < 2**32
    expected = [min((power * 4096 + whole // 2) // whole - 128, 127) for power in powers]
    found = run(operation, [x], Tensor("y", (1, length), "int8", 1 / 256, -128))
    assert found[0].tolist() == expected


def test_sums_and_products_against_loops(random: np.random.Generator) -> None:
    a, b = (random.integers(-128, 128, (1, 3, 4, 5)).astype(np.int8) for _ in range(2))
    output = Tensor("y", a.shape, "int8", 1.0, 0)
    add = ops.Add("a", ("a", "b"), "y", (700000, -300000), 12345, 20, -128, 100)
    expected = [min(max((int(p) * 700000 - int(q) * 300000 + 12345) >> 20, -128), 100)
                for p, q in zip(a.flat, b.flat, strict=True)]  # fmt: skip
    assert run(add, [a, b], output).ravel().tolist() == expected
    multiplier, shift = numerics.fixed_point([0.01])
    step = ops.Requantize(multiplier, shift, 3, -128, 127)
    mul = ops.Mul("m", ("a", "b"), "y", (7, -9), step)
    expected = [requantized((int(p) - 7) * (int(q) + 9), step, 0) for p, q in zip(a.flat, b.flat, strict=True)]
    assert run(mul, [a, b], output).ravel().tolist() == expected


def test_pools_against_loops(random: np.random.Generator) -> None:
    x = random.integers(-128, 128, (1, 6, 5, 3)).astype(np.int8)
    window = ops.Window((3, 2), (2, 2), (1, 0, 1, 1), (1, 1), outside=-7)
    places = [[(y * 2 - 1 + i, c * 2 + j) for i in range(3) for j in range(2)] for y in range(3) for c in range(3)]
    multiplier, shift = numerics.fixed_point([1 / 6])
    average = ops.AveragePool("p", ("x",), "y", window, 42, ops.Requantize(multiplier, shift, 1, -128, 127))
    highest = ops.MaxPool("p", ("x",), "y", window, -50, 60)
    output = Tensor("y", (1, 3, 3, 3), "int8", 1.0, 0)
    sums = [[sum(code_at(x, *place, c, -7) for place in seen) + 42 for c in range(3)] for seen in places]
    expected = [requantized(total, average.requantize, 0) for row in sums for total in row]
    assert run(average, [x], output).ravel().tolist() == expected
    tops = [max(code_at(x, *place, c, -128) for place in seen) for seen in places for c in range(3)]
    assert run(highest, [x], output).ravel().tolist() == [min(max(top, -50), 60) for top in tops]


def test_inputs_of_another_type_or_shape_are_refused() -> None:
    tensor = Tensor("x", (1, 4), "int8", 0.1, 0)
    port = Port("x", "x", (1, 4), (0, 1))
    program = Program("p", {"x": tensor}, (), (port,), (port,))
    assert interpret(program, {"x": np.zeros((1, 4), np.int8)})["x"].shape == (1, 4)
    for wrong in (np.zeros((1, 4), np.uint8), np.zeros(4, np.int8)):
        with pytest.raises(ValueError, match="is not int8"):
            interpret(program, {"x": wrong})
