"""Bit operations: counted as they are defined, and one more budget of the program that chooses bits."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcompile import unasked_bits
from qcompile.allocation import UNPACKING, Program
from qcompile.calib.work import multiply_accumulates
from qcompile.core import packing
from qcompile.core.plan import OpPlan, Precision, QuantPlan, Role, TensorQuant
from qcompile.passes.bit_operations import bit_operations, float_operations
from qcompile.passes.resources import Resource
from qcompile.weight_losses import EIGHT, FOUR

TEXT = """(float[1,4,6,6] x, float[6,36] z) => (float[1,4,6] y) {
    [conv] a = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (x, w)
    [flat] b = Reshape (a, shape)
    [float] c = MatMul (b, v)
    [product] d = MatMul (c, z)
    [stored] e = MatMul (d, u)
    [end] y = MatMul (e, t) }"""
SHAPES = {"w": (4, 4, 3, 3), "v": (36, 6), "u": (36, 6), "t": (6, 6)}
MACS = {"conv": 4 * 36 * 36, "float": 4 * 36 * 6, "product": 4 * 6 * 36, "stored": 4 * 36 * 6, "end": 4 * 6 * 6}


@pytest.fixture
def model(model_of) -> ir.Model:
    arrays: dict[str, Any] = {name: np.ones(shape, np.float32) for name, shape in SHAPES.items()}
    return model_of(TEXT, 21, shape=np.array([1, 4, 36]), **arrays)


def plan_of(model: ir.Model, four: bool = False) -> QuantPlan:
    weight = TensorQuant(Role.WEIGHT, "int8", (1.0,), (0,), None, packing.BLOCK if four else 0)
    wide = TensorQuant(Role.WEIGHT, "int16", (1.0,), (0,))
    activation = TensorQuant(Role.ACTIVATION, "uint8", (1.0,), (0,))
    integer, stored = (OpPlan("MatMul", precision) for precision in (Precision.INTEGER, Precision.WEIGHT_ONLY))
    tensors = {"x": activation, "c": activation, "z": activation, "d": activation, "w": weight, "u": weight, "t": wide}
    return QuantPlan(tensors, {"conv": integer, "product": integer, "stored": stored, "end": stored})


def test_multiplications_are_those_of_operators_that_have_some(model):
    feeds = {"x": np.zeros((1, 4, 6, 6), np.float32), "z": np.zeros((6, 36), np.float32)}
    assert multiply_accumulates(model, feeds) == MACS


def test_bits_of_weights_by_bits_of_what_is_read(model):
    found = bit_operations(model, plan_of(model), MACS, (), (EIGHT, FOUR), 7.0)
    # Codes of d are read by nobody: what stores its weights as codes computes in float.
    in_bits = {"conv": 8 * 8, "float": 32 * 32, "product": 8 * 8, "stored": 32 * 8, "end": 32 * 16}
    assert found.fixed == found.least == sum(MACS[name] * bits for name, bits in in_bits.items())
    assert found.left == 7.0 - found.fixed and float_operations(MACS) == 1024 * sum(MACS.values())
    free = bit_operations(model, plan_of(model), MACS, ("w", "u"), (EIGHT, FOUR), 7.0)
    for bits in itertools.product((EIGHT, FOUR), repeat=2):
        chosen = dict(zip(("w", "u"), bits, strict=True))
        expected = in_bits | {"conv": 8 * chosen["w"], "stored": 32 * chosen["u"]}
        assert free.of(chosen) == sum(MACS[name] * of for name, of in expected.items())
    packed = bit_operations(model, plan_of(model, four=True), MACS, (), (EIGHT, FOUR), 7.0)
    assert packed.fixed == free.of({"w": FOUR, "u": FOUR}) == free.least


COUNTS = st.lists(st.tuples(st.integers(5_000, 50_000), st.integers(1, 1000), st.floats(1e-6, 1.0)),
                  min_size=1, max_size=6)  # fmt: skip


@given(COUNTS, st.floats(0.0, 1.0), st.floats(0.0, 1.0))
def test_both_budgets_hold_and_nothing_that_holds_them_loses_less(counts, bytes_part, bops_part):
    names = [f"w{at}" for at in range(len(counts))]
    sizes = {name: {EIGHT: count, FOUR: count * packing.BITS / 8 + UNPACKING} for name, (count, _, _) in
             zip(names, counts, strict=True)}  # fmt: skip
    taken = {name: {EIGHT: 64.0 * macs, FOUR: 32.0 * macs} for name, (_, macs, _) in zip(names, counts, strict=True)}
    losses = {name: {EIGHT: 0.0, FOUR: loss} for name, (_, _, loss) in zip(names, counts, strict=True)}

    def size(bits: Any) -> int:
        return int(sum(of[bits.get(name, EIGHT)] for name, of in sizes.items()))

    ends = [[resource(dict.fromkeys(names, bits)) for bits in (FOUR, EIGHT)]
            for resource in (size, Resource("bit operations", 0.0, taken).of)]  # fmt: skip
    limit, most = (low + part * (high - low) for (low, high), part in zip(ends, (bytes_part, bops_part), strict=True))
    resource = Resource("bit operations", 0.0, taken, most)
    backend: Any = None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(unasked_bits, "written_bytes", lambda model, plan, backend: size(plan))
        empty = ir.Model(ir.Graph([], [], nodes=[]), ir_version=10)
        numbers = {name: count for name, (count, _, _) in zip(names, counts, strict=True)}
        planned: Any = lambda bits: bits  # noqa: E731
        program = Program(empty, numbers, losses, 0.001, planned, backend, resources=(resource,))
        found = program.within(limit + 1.0)
    assert found.bytes <= limit + 1.0 and found.bops <= most
    every = (dict(zip(names, bits, strict=True)) for bits in itertools.product((EIGHT, FOUR), repeat=len(names)))
    fitting = [bits for bits in every if size(bits) <= limit and resource.of(bits) <= most]
    least = min(sum(losses[name][FOUR] for name in names if bits[name] == FOUR) for bits in fitting)
    assert found.noise <= 0.001 + least * (1.0 + 1e-9)
