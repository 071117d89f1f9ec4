"""Layers with a scale per block: few rows of floats, and many as halves, held to float64 within their roundings."""

from __future__ import annotations

import re

import numpy as np
import pytest
from emulated_cuda.machine_code import taken_apart
from float_programs import blocked, together

from qcompile.backends.cuda import compiler
from qcompile.backends.cuda.blocks import TILES, with_halves
from qcompile.backends.cuda.linear import FEW
from qcompile.backends.cuda.network import network_of
from qcompile.backends.integer.interpret import interpret
from qcompile.core.errors import TargetError

#: Rows, inputs, outputs, inputs of a block, bits.
SHAPES = [
    (1, 384, 70, 16, 4), (3, 576, 33, 32, 4), (2, 40, 9, 40, 8), (1, 2080, 12, 96, 8), (8, 4200, 20, 128, 4),
    (9, 384, 70, 16, 4), (33, 576, 65, 32, 4), (40, 40, 9, 40, 8), (70, 200, 130, 128, 8), (17, 96, 40, 48 * 2, 4),
]  # fmt: skip


def bound(operation, x):
    """Return float64's results, and how far off kernels may be.

    Of few rows sums are of products in float32; of many x and weights are rounded to halves first, in units of a row's
    peak and of an output's largest scale, and tensor cores may cut off where float32 rounds.
    """
    length = operation.weights.shape[1]
    scale = np.repeat(operation.scale.astype(np.float64), operation.block, axis=1)[:, :length]
    weights, wide = operation.weights * scale, x.reshape(-1, length).astype(np.float64)
    exact, size = wide @ weights.T + operation.bias, np.abs(wide) @ np.abs(weights).T
    # A scale is a half too, of which a block's is a part of the largest.
    off = (length + 16) * 2.0**-23 + 2.0**-11 + (0 if len(wide) <= FEW else 2 * 2.0**-11 + 2.0**-21)
    smallest = 2.0**-24 * np.abs(operation.scale).max(axis=1) * 128 * np.abs(wide).sum(axis=1, keepdims=True)
    under = 2.0**-38 * np.abs(wide).max(axis=1, keepdims=True) * np.abs(weights).sum(axis=1)
    return exact, off * size + smallest + under + 2.0**-23 * np.abs(exact)


def test_results_are_as_near_as_halves_have_them(load):
    random, cases = np.random.default_rng(0), []
    for at, shape in enumerate(SHAPES):
        bounds = (-2.0, 1e9) if at % 3 == 2 else (-np.inf, np.inf)
        program = with_halves(blocked(random, *shape, halves=at % 2 == 0, bounds=bounds))
        # Rows of very different sizes, beyond what halves hold and below it.
        rows = random.normal(size=(1, shape[0], shape[1])) * np.exp2(random.integers(-30, 30, (1, shape[0], 1)))
        cases.append((program, rows.astype(np.float32)))
    session = load(together([program for program, _ in cases]))
    made = session.run_codes([x for _, x in cases])
    for (program, x), one in zip(cases, made, strict=True):
        (operation,) = program.operations
        exact, off = bound(operation, x)
        clipped = np.clip(exact, operation.low, operation.high)
        assert np.all(np.abs(one.reshape(exact.shape) - clipped) <= off)
        assert np.median(np.abs(exact) / off) > 20, "a result that says something"
        np.testing.assert_allclose(interpret(program, {"x": x})["y"].reshape(exact.shape), clipped, rtol=1e-6)


@pytest.mark.parametrize("rows", [1, 20])
def test_each_code_input_and_scale_counts(load, rows):
    # Powers of two: nothing is rounded, so that a wrong place shows. Several samples, and rows of zeros.
    random = np.random.default_rng(1)
    for bits, block in ((4, 16), (8, 32)):
        program = with_halves(blocked(random, rows, 64, 32, block, bits))
        (operation,) = program.operations
        operation.weights[:] = 1 << random.integers(0, bits - 1, (32, 64))
        operation.scale[:] = np.exp2(random.integers(-3, 3, operation.scale.shape))
        operation.bias[:] = 0.0
        x = np.zeros((3, rows, 64), np.float32)
        x[np.arange(3)[:, None], np.arange(rows), random.integers(0, 64, (3, rows))] = 4.0
        x[:, ::5] = 0.0
        made = load(program, 3).run_codes([x])[0]
        expected = np.concatenate([interpret(program, {"x": one[None]})["y"] for one in x])
        np.testing.assert_array_equal(made, expected)


def test_zeros_and_blocks_of_zeros_are_zeros(load):
    program = with_halves(blocked(np.random.default_rng(2), 12, 64, 32, 16, 4))
    (operation,) = program.operations
    operation.scale[3], operation.bias[:] = 0.0, 0.0
    x = np.random.default_rng(3).normal(size=(1, 12, 64)).astype(np.float32)
    x[0, 5] = 0.0
    made = load(program).run_codes([x])[0]
    assert not made[0, 5].any() and not made[:, :, 3].any() and np.isfinite(made).all() and made.any()


def test_blocks_that_kernels_do_not_know_are_refused():
    program = with_halves(blocked(np.random.default_rng(0), 1, 100, 8, 20, 4))
    with pytest.raises(TargetError, match="d: has blocks of 20 inputs, and kernels for CUDA devices have blocks of 16"):
        network_of(program)


@pytest.mark.parametrize("architecture", compiler.ARCHITECTURES)
def test_their_machine_code_multiplies_halves_and_keeps_nothing_in_memory(architecture, tmp_path, monkeypatch):
    from qcompile.backends.cuda import blocks

    if not compiler.available():
        pytest.skip("neither NVRTC nor nvFatbin")
    random, sources = np.random.default_rng(0), {}
    shapes = [(4, 16), (8, 128), (4, 32)]
    for tile, (bits, block) in zip(TILES, shapes, strict=True):
        monkeypatch.setattr(blocks, "TILES", (tile,))
        layers = [with_halves(blocked(random, rows, 256, 64, block, bits)) for rows in (1, 40)]
        network = network_of(together(layers))
        sources |= {f"{name}_{tile[0]}": text.replace(f" {name}(", f" {name}_{tile[0]}(")
                    for name, text in network.sources.items()}  # fmt: skip
    from qcompile.backends.cuda.network import prelude

    made = compiler.compile_cuda(prelude() + "\n".join(sources.values()), architecture)
    assert made.spills() == []
    for name, code in taken_apart(made.code, tmp_path).items():
        assert not any(re.search(r"\b(LDL|STL)\b", line) for line in code.lines), f"{name} keeps registers in memory"
        if "many_rows" in sources[name]:
            assert code.looped("HMMA.1688.F32" if architecture == "75" else "HMMA.16816.F32") >= 8, name
