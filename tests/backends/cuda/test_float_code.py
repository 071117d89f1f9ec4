"""Machine code of kernels in float and of products of activations, for all architectures: nothing is in memory."""

from __future__ import annotations

import re

import numpy as np
import pytest
from emulated_cuda.machine_code import taken_apart
from float_programs import codes, float_product, floats, pointwise, product, program_of, rows, together

from qcompile.backends.cuda import compiler
from qcompile.backends.cuda.network import network_of
from qcompile.backends.integer import expressions
from qcompile.backends.integer import float_operations as ops
from qcompile.backends.integer.expressions import leaf
from qcompile.backends.integer.operations import Requantize
from qcompile.core import numerics


def all_of_them():
    """Return a program of every kind of kernel, rows that are kept in registers and rows that are not."""
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


@pytest.mark.parametrize("architecture", compiler.ARCHITECTURES)
def test_kernels_in_float_keep_nothing_in_memory(architecture, tmp_path):
    if not compiler.available():
        pytest.skip("neither NVRTC nor nvFatbin")
    network = network_of(all_of_them())
    made = compiler.compile_cuda(network.source(), architecture)
    assert made.spills() == []
    apart = taken_apart(made.code, tmp_path)
    assert set(apart) == set(network.sources)
    for name, code in apart.items():
        assert not any(re.search(r"\b(LDL|STL)\b", line) for line in code.lines), f"{name} keeps registers in memory"
        tensor = any("IMMA" in line for line in code.lines)
        floating = "float_product" in network.sources[name]
        assert tensor == (name.startswith(("product", "linear")) and not floating), name
        # What is fused is so where the source says it: a GELU's polynomials, no other product and sum.
        assert any("FFMA" in line for line in code.lines) or not floating
