"""Programs of one operation in float, or of a product of two activations."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from qcompile.backends.integer import expressions
from qcompile.backends.integer import float_operations as ops
from qcompile.backends.integer.expressions import leaf
from qcompile.backends.integer.operations import Requantize
from qcompile.backends.integer.program import Port, Program, Tensor
from qcompile.core import numerics


def program_of(operation, inputs, output):
    """Return one operation as a program: `inputs` and `output` are tensors."""
    tensors = {tensor.name: tensor for tensor in (*inputs, output)}
    ports = [Port(t.name, t.name, t.shape, tuple(range(len(t.shape)))) for t in (*inputs, output)]
    return Program("net", tensors, (operation,), tuple(ports[:-1]), (ports[-1],))


def together(programs):
    """Return programs as one: what they have in common is that nothing is."""

    def renamed(program, at):
        parts = [
            replace(part, inputs=tuple(f"{at}{name}" for name in part.inputs), output=f"{at}{part.output}")
            for part in program.operations
        ]
        ports = [
            [replace(port, name=f"{at}{port.name}", tensor=f"{at}{port.tensor}") for port in group]
            for group in (program.inputs, program.outputs)
        ]
        return {f"{at}{name}": replace(one, name=f"{at}{name}") for name, one in program.tensors.items()}, parts, *ports

    parts = [renamed(each, f"p{at}_") for at, each in enumerate(programs)]
    tensors, operations, inputs, outputs = zip(*parts, strict=True)
    merged = {name: tensor for each in tensors for name, tensor in each.items()}
    return Program(
        "net", merged, *(tuple(one for each in part for one in each) for part in (operations, inputs, outputs))
    )


def floats(name, *shape):
    return Tensor(name, shape, "float32", 1.0, 0)


def codes(name, *shape, scale=0.05, zero=3):
    return Tensor(name, shape, "int8", scale, zero)


def pointwise(expression, *operands, shape):
    """Return the program of an expression of floats, all of which have axes of their own or one element."""
    leaves = tuple(
        ops.Leaf(k, tuple(axis if operand.shape[axis] > 1 else None for axis in range(len(shape))))
        for k, operand in enumerate(operands)
    )
    inputs = [floats(f"x{k}", *operand.shape) for k, operand in enumerate(operands)]
    names = tuple(tensor.name for tensor in inputs)
    return program_of(ops.Pointwise("p", names, "y", leaves, expression), inputs, floats("y", *shape))


def rows(kind, shape, more=(), target=None):
    leaves = (ops.Leaf(0, tuple(range(len(shape)))),)
    operation = kind("n", ("x",), "y", leaves, leaf(0), *more)
    return program_of(operation, [floats("x", *shape)], target or floats("y", *shape))


def product(batch, m, k, n, step, target, heads=False, turned=False, zero=-7):
    """Return a product of two activations; with `heads`, rows stand in front of the batch as stored."""
    rank = len(batch) + 2
    order = (*range(len(batch)), len(batch), len(batch) + 1)
    if heads:
        order = (rank - 2, *range(rank - 2), rank - 1)
    places = tuple(order.index(axis) for axis in range(rank))
    swapped = (*places[:-2], places[-1], places[-2]) if turned else places
    shape_a, shape_b, shape_c = (
        tuple((*batch, *last)[axis] for axis in order) for last in ((m, k), (n, k) if turned else (k, n), (m, n))
    )
    operation = ops.MatMul("m", ("a", "b"), "y", (places, swapped, places), (*batch, m, k, n), zero, step)
    return program_of(operation, [codes("a", *shape_a), codes("b", *shape_b)], target(shape_c))


def blocked(random, rows, length, outputs, block, bits, halves=False, bounds=(-np.inf, np.inf)):
    """Return a layer's program."""
    lowest = -8 if bits == 4 else -128
    weights = random.integers(lowest, -lowest, (outputs, length)).astype(np.int8)
    scale = random.uniform(0.001, 0.02, (outputs, -(-length // block))).astype(np.float32)
    scale = scale.astype(np.float16).astype(np.float32) if halves else scale
    bias = random.normal(size=outputs).astype(np.float32)
    operation = ops.BlockDense("d", ("x",), "y", weights, scale, bias, block, bits, *bounds)
    return program_of(operation, [floats("x", 1, rows, length)], floats("y", 1, rows, outputs))


def float_product(batch, m, k, n, heads, turned, scale=1.0, bounds=(-np.inf, np.inf)):
    """Return a product of two activations in float; with `heads`, rows stand in front of the batch as stored."""
    rank = len(batch) + 2
    order = (rank - 2, *range(rank - 2), rank - 1) if heads else tuple(range(rank))
    places = tuple(order.index(axis) for axis in range(rank))
    swapped = (*places[:-2], places[-1], places[-2]) if turned else places
    shapes = [tuple((*batch, *last)[axis] for axis in order) for last in ((m, k), (n, k) if turned else (k, n), (m, n))]
    operation = ops.FloatMatMul("m", ("a", "b"), "y", (places, swapped, places), (*batch, m, k, n), scale, *bounds)
    return program_of(operation, [floats("a", *shapes[0]), floats("b", *shapes[1])], floats("y", *shapes[2]))


def every_kind():
    """Return a program of every kind of operation in float: short rows, that are kept in registers, and long ones."""
    x = np.zeros((4, 384), np.float32)
    gelu = expressions.FUNCTIONS["Gelu"](leaf(0), {})
    real = ops.Dequantize(np.ones(1, np.float32))
    whole = Requantize(*numerics.fixed_point([0.001]), -4, -128, 120)
    weights, bias = np.ones((96, 384), np.int8), np.zeros(96, np.int32)
    reduce = ops.Reduce("r", ("x",), "y", (ops.Leaf(0, (0, 1)),), leaf(0), (384,), "sum")
    dense = ops.FloatDense("d", ("x",), "y", weights, bias, ops.Dequantize(np.ones(96, np.float32)))
    return together([
        pointwise(gelu, x, shape=x.shape), pointwise(("tanh", ("exp", leaf(0))), x, shape=x.shape),
        *(rows(ops.FloatSoftmax, shape) for shape in ((4, 32), (4, 384), (2, 9001))),
        *(rows(ops.Normalize, (4, width), (np.ones(width, np.float32),) * 2 + (1e-5, True)) for width in (384, 9001)),
        program_of(reduce, [floats("x", 4, 384)], floats("y", 4)),
        product((1, 12), 32, 32, 32, real, lambda shape: floats("y", *shape), True, True),
        product((1, 12), 128, 128, 64, whole, lambda shape: codes("y", *shape), True, False),
        float_product((12,), 64, 32, 64, True, True),
        program_of(dense, [codes("x", 1, 40, 384)], floats("y", 1, 40, 96)),
        program_of(dense, [codes("x", 1, 1, 384)], floats("y", 1, 1, 96)),
    ])  # fmt: skip
