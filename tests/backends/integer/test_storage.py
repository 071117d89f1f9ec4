"""Maps whose codes have four bits: how they are stored, where they may stand, and what refuses them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from random_programs import random_codes, random_narrow_program

from qcompile.backends.integer.arena import run_in_arena
from qcompile.backends.integer.interpret import dequantize_output, interpret, quantize_input
from qcompile.backends.integer.lower import lower
from qcompile.backends.integer.memory import assign_offsets
from qcompile.backends.integer.storage import from_bytes, to_bytes
from qcompile.backends.integer.strips import trade_off
from qcompile.core import runtime
from qcompile.core.errors import TargetError

Build = Callable[..., ir.Model]
#: A convolution between an input and a map of four bits, and one behind them of eight.
HALVES = """xq = QuantizeLinear (x, s, z)  xd = DequantizeLinear (xq, s, z)
    wd = DequantizeLinear (w, t)  v = Conv (xd, wd)  r = Relu (v)
    vq = QuantizeLinear (r, t4, z4)  vd = DequantizeLinear (vq, t4, z4)
    u = Conv (vd, wd)  uq = QuantizeLinear (u, s8, z8)  y = DequantizeLinear (uq, s8, z8)"""


def halves(build: Build, dtype: str, text: str = HALVES, shape: str = "[1, 2, 6, 6]",
           leaving: str = "[1, 2, 2, 2]", **others: Any) -> ir.Model:  # fmt: skip
    random = np.random.default_rng(5)
    zero = 3 if dtype == "uint4" else -2
    constants = {
        "w": random.integers(-127, 128, (2, 2, 3, 3)).astype(np.int8), "t": np.float32(0.01),
        "s": np.float32(0.2), "z": np.array(zero).astype(dtype), "t4": np.float32(0.3701),
        "z4": np.array(-8 if dtype == "int4" else 0).astype(dtype), "s8": np.float32(0.1), "z8": np.int8(4), **others,
    }  # fmt: skip
    used = {name: array for name, array in constants.items() if f"{name}," in text or f"{name})" in text}
    return build(f"(float{shape} x) => (float{leaving} y) {{ {text} }}", opset=21, **used)


@given(st.lists(st.integers(-8, 7), min_size=1, max_size=40).map(lambda codes: codes + codes))
def test_two_codes_a_byte_and_back(codes: list[int]) -> None:
    stored = to_bytes(np.array(codes, np.int8), "int4")
    assert stored.size == len(codes) // 2
    assert from_bytes(stored, "int4").tolist() == codes
    assert stored.tolist() == [(low & 15) + 16 * (high & 15) for low, high in zip(codes[::2], codes[1::2], strict=True)]


@given(st.lists(st.integers(-(2**15), 2**15 - 1), min_size=1), st.sampled_from(["int8", "int16"]))
def test_whole_bytes_and_back(codes: list[int], dtype: str) -> None:
    array = np.array(codes).astype(dtype)
    stored = to_bytes(array, dtype)
    assert stored.tobytes() == array.tobytes()
    assert np.array_equal(from_bytes(stored, dtype), array)


@pytest.mark.parametrize("seed", range(60))
def test_the_arena_holds_maps_of_four_bits(seed: int) -> None:
    program = random_narrow_program(seed)
    codes = random_codes(program, seed)
    expected = interpret(program, codes)
    found = run_in_arena(assign_offsets(program), codes)
    assert all(np.array_equal(found[name], expected[name]) for name in expected)
    for _, plan in list(trade_off(program))[1:4]:
        found = run_in_arena(plan, codes)
        assert all(np.array_equal(found[name], expected[name]) for name in expected)


def test_bytes_are_counted_in_one_place() -> None:
    program = random_narrow_program(3)
    for tensor in program.tensors.values():
        assert tensor.nbytes == tensor.size * tensor.bits // 8 == tensor.rows * tensor.row_bytes
        assert to_bytes(np.zeros(tensor.shape, np.int8), tensor.dtype).size == tensor.nbytes


@pytest.mark.parametrize("dtype", ["int4", "uint4"])
def test_a_model_with_codes_of_four_bits_is_lowered(model_of: Build, dtype: str) -> None:
    model = halves(model_of, dtype)
    program = lower(model)
    bits = [program.tensors[name].bits for part in program.operations for name in (*part.inputs, part.output)]
    assert bits == [4, 4, 4, 8]
    session = runtime.Session(model, optimize=False)
    for feeds in (dict(runtime.synthetic_feeds(model, seed)) for seed in range(8)):
        codes = {port.name: quantize_input(program, port, feeds[port.name]) for port in program.inputs}
        (port,) = program.outputs
        found = dequantize_output(program, port, interpret(program, codes)[port.name])
        # ONNX Runtime rounds in float: an output may be the next code, and with these scales no other has a tie.
        assert np.max(np.abs(found - session.run(feeds)["y"])) < 0.11


REFUSED = {
    "odd": ("[1, 1, 5, 5]", "[1, 1, 3, 3]", "v = MaxPool <kernel_shape = [3, 3]> (xd)", "an odd number of codes"),
    "softmax": ("[1, 2, 4, 4]", "[1, 2, 4, 4]", "v = Softmax <axis = 1> (xd)", "changes the scale of int4 codes"),
    "product": ("[1, 2, 4, 4]", "[1, 2, 4, 4]", "v = Mul (xd, xd)", "is a function of int4 codes"),
    "sigmoid": ("[1, 2, 4, 4]", "[1, 2, 4, 4]", "v = Sigmoid (xd)", "is a function of int4 codes"),
    "concat": ("[1, 2, 4, 4]", "[1, 4, 4, 4]", "v = Concat <axis = 1> (xd, xd)", "has four bits, for which Concat"),
    "reshape": ("[1, 2, 4, 4]", "[1, 32]", "v = Flatten (xd)", "has four bits"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_form_in_four_bits_is_refused(model_of: Build, case: str) -> None:
    shape, leaving, line, fact = REFUSED[case]
    text = f"""xq = QuantizeLinear (x, s, z)  xd = DequantizeLinear (xq, s, z)  {line}
        vq = QuantizeLinear (v, s, z)  y = DequantizeLinear (vq, s, z)"""
    with pytest.raises(TargetError, match=fact) as refusal:
        lower(halves(model_of, "int4", text, shape, leaving))
    assert "8 bits" in str(refusal.value) and "\n" not in str(refusal.value)


def test_an_output_of_four_bits_is_refused(model_of: Build) -> None:
    text = HALVES.replace("s8, z8", "s, z")
    with pytest.raises(TargetError, match="output 'y'"):
        lower(halves(model_of, "int4", text))


def test_interpreting_wants_codes_one_by_one() -> None:
    program = random_narrow_program(1)
    codes = random_codes(program, 0)
    with pytest.raises(ValueError, match="is not"):
        interpret(program, {name: array.astype(np.int64) for name, array in codes.items()})
    port = replace(program.inputs[0], unsigned=True)
    tensor = program.tensors[port.tensor]
    given = codes["x"].astype(np.int32) + (1 << (tensor.bits - 1))
    assert np.array_equal(quantize_input(program, port, given), codes["x"])
