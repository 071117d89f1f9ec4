"""The shapes that kernels are timed on: as many as are stated, each an operation of that many products."""

from __future__ import annotations

import numpy as np
import pytest
from cpu_kernel_shapes import SHAPES, program

from qcompile.backends.integer.interpret import interpret, random_codes


def test_there_are_forty_and_no_two_alike():
    assert len(SHAPES) >= 40 and len({shape.label for shape in SHAPES}) == len(SHAPES)


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape.products < 4e6], ids=lambda shape: shape.label)
def test_a_shape_s_program_has_its_products_and_uses_all_codes(shape):
    made = program(shape, 2)
    first, second = made.operations
    target = made.tensors[first.output]
    assert shape.products == target.size * first.weights[0].size
    assert not np.array_equal(first.weights, second.weights) and first.bits == shape.bits
    random = np.random.default_rng(0)
    floats = {"x": random.normal(size=made.tensors["x"].shape).astype(np.float32)}
    found = interpret(made, floats if shape.bits == 4 else random_codes(made, random))[made.outputs[0].name]
    assert (0.5 < np.std(found) < 5.0) if shape.bits == 4 else (20 < np.std(found) < 110)
