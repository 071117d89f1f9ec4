"""What has no place in an integer program is refused in one line that names the operator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from qcompile.backends.integer.lower import lower
from qcompile.core.errors import TargetError

Build = Callable[..., ir.Model]
Array = np.ndarray[Any, np.dtype[Any]]
#: Codes of an input, and codes behind a value `v`.
QUANTIZE = "xq = QuantizeLinear (x, s, z)  xd = DequantizeLinear (xq, s, z)"
BEHIND = "vq = QuantizeLinear (v, s, z)  y = DequantizeLinear (vq, s, z)"
SCALE: dict[str, Array] = {"s": np.array(0.1, np.float32), "z": np.array(0, np.int8)}


def ones(*shape: int, dtype: str = "int8") -> Array:
    return np.ones(shape, dtype)


def real(*numbers: float) -> Array:
    return np.array(numbers[0] if len(numbers) == 1 else numbers, np.float32)


CASES: dict[str, tuple[str, str, str, dict[str, Array], str]] = {
    "float behind": (
        "[1, 4]", "[1, 3]", "wd = DequantizeLinear (w, s)  n: y = MatMul (xd, wd)", {"w": ones(4, 3)},
        "leaves the model in float as 'y'",
    ),
    "float between": (
        "[1, 4]", "[1, 3]", f"wd = DequantizeLinear (w, s)  m = MatMul (xd, wd)  n: v = Sigmoid (m) {BEHIND}",
        {"w": ones(4, 3)}, "reads 'm' in float, the result of MatMul",
    ),
    "float weights": ("[1, 4]", "[1, 3]", f"n: v = MatMul (xd, w) {BEHIND}", {"w": ones(4, 3, dtype="float32")},
                      "its weights are float or no constants"),
    "asymmetric weights": (
        "[1, 4]", "[1, 3]", f"wd = DequantizeLinear (w, s, wz)  n: v = MatMul (xd, wd) {BEHIND}",
        {"w": np.array([[255, 0, 3]] * 4, np.uint8), "wz": np.uint8(7)}, "do not fit int8",
    ),
    "scales along inputs": (
        "[1, 4]", "[1, 3]", f"wd = DequantizeLinear <axis = 0> (w, t)  n: v = MatMul (xd, wd) {BEHIND}",
        {"w": ones(4, 3), "t": real(1, 2, 3, 4)}, "do not follow its output channels",
    ),
    "blocks": (
        "[1, 4]", "[1, 3]", f"wd = DequantizeLinear <axis = 0, block_size = 2> (w, t)  n: v = MatMul (xd, wd) {BEHIND}",
        {"w": ones(4, 3), "t": np.ones((2, 3), np.float32)}, "a scale per block",
    ),
    "two activations": ("[4, 4]", "[4, 4]", f"n: v = MatMul (xd, xd) {BEHIND}", {}, "multiplies two activations"),
    "other shapes": (
        "[1, 4, 2, 2]", "[1, 4, 2, 2]", f"p = MaxPool <kernel_shape = [1, 2]> (xd)  n: v = Add (xd, p) {BEHIND}", {},
        "joins shapes",
    ),
    "three axes": (
        "[1, 1, 3, 3, 3]", "[1, 1, 2, 2, 2]", f"wd = DequantizeLinear (w, s)  n: v = Conv (xd, wd) {BEHIND}",
        {"w": ones(1, 1, 2, 2, 2)}, "goes over 3 axes",
    ),
    "a batch": (
        "[2, 1, 3, 3]", "[2, 1, 2, 2]", f"wd = DequantizeLinear (w, s)  n: v = Conv (xd, wd) {BEHIND}",
        {"w": ones(1, 1, 2, 2)}, "has a batch of 2",
    ),
    "padding left out": (
        "[1, 1, 3, 3]", "[1, 1, 3, 3]",
        f"n: v = AveragePool <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (xd) {BEHIND}", {},
        "averages over fewer elements at the border",
    ),
    "interpolation": (
        "[1, 1, 2, 2]", "[1, 1, 4, 4]", f'n: v = Resize <mode = "linear"> (xd, , r) {BEHIND}', {"r": real(1, 1, 2, 2)},
        "interpolates",
    ),
    "reflection": ("[1, 4]", "[1, 6]", f'n: v = Pad <mode = "reflect"> (xd, p) {BEHIND}', {"p": np.array([0, 1, 0, 1])},
                   "pads with something that is no constant"),
    "a number per channel": ("[1, 3]", "[1, 3]", f"n: v = PRelu (xd, r) {BEHIND}", {"r": real(0.1, 0.2, 0.3)},
                             "one per channel"),
    "not finite": ("[1, 3]", "[1, 3]", f"n: v = Log (xd) {BEHIND}", {}, "is not finite"),
    "no form": ("[1, 3]", "[1, 3]", f"n: v = CumSum (xd, a) {BEHIND}", {"a": np.array(1)}, "has no integer form"),
    "random": ("[1, 3]", "[1, 3]", f"n: v = Dropout (xd, r, t) {BEHIND}", {"r": real(0.5), "t": np.array(True)},
               "drops values at random"),
    "mean over channels": ("[1, 3, 4, 4]", "[1, 1, 4, 4]", f"n: v = ReduceMean (xd, a) {BEHIND}", {"a": np.array([1])},
                           "averages over axes [1]"),
    "a transposed matrix": (
        "[4, 2]", "[2, 3]", f"wd = DequantizeLinear (w, s)  n: v = Gemm <transA = 1> (xd, wd) {BEHIND}",
        {"w": ones(4, 3)}, "transposes its first matrix",
    ),
    "backward": (
        "[1, 4]", "[1, 4]", f"n: v = Slice (xd, a, b, c, d) {BEHIND}",
        {"a": np.array([3]), "b": np.array([-9]), "c": np.array([1]), "d": np.array([-1])}, "goes backward",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_refusals_name_the_operator(model_of: Build, name: str) -> None:
    arriving, leaving, line, constants, fact = CASES[name]
    nodes = f"{QUANTIZE} {line}".replace("n: ", "")
    model = model_of(f"(float{arriving} x) => (float{leaving} y) {{ {nodes} }}", opset=21, **SCALE, **constants)
    guilty = line.split("n: ")[1].split("= ")[1].split()[0]
    for node in model.graph:
        node.name = f"the {node.op_type}"
    with pytest.raises(TargetError) as caught:
        lower(model)
    assert caught.value.place == f"{guilty} 'the {guilty}'"
    assert fact in caught.value.fact
    assert len(str(caught.value).splitlines()) == 1


def test_an_accumulator_that_might_wrap_is_refused_with_its_channel(model_of: Build) -> None:
    weights = np.ones((2, 70000), np.int8)
    weights[1] = 127
    text = f"""(float[1, 70000] x) => (float[1, 2] y) {{ {QUANTIZE}
        wd = DequantizeLinear (w, s)
        v = Gemm <transB = 1> (xd, wd)
        {BEHIND}
    }}"""
    model = model_of(text, opset=21, s=np.float32(0.1), z=np.int16(0), w=weights)
    with pytest.raises(TargetError, match="output channel 1 can reach") as caught:
        lower(model)
    assert str(32768 * 127 * 70000) in caught.value.fact
    narrow = model_of(text, opset=21, s=np.float32(0.1), z=np.int8(0), w=weights)
    assert len(lower(narrow).operations) == 1


def test_an_input_in_float_is_refused(model_of: Build) -> None:
    model = model_of("(float[1, 4] x) => (float[1, 4] y) { y = Relu (x) }")
    with pytest.raises(TargetError, match=r"Relu '.*': reads 'x' in float"):
        lower(model)


def test_an_open_axis_is_refused_and_an_open_batch_is_one(model_of: Build) -> None:
    text = "(float[N, H] x) => (float[N, H] y) { QUANTIZE v = Relu (xd) BEHIND }"
    text = text.replace("QUANTIZE", QUANTIZE).replace("BEHIND", BEHIND)
    with pytest.raises(TargetError, match="--shape x=1x"):
        lower(model_of(text, opset=21, **SCALE))
    program = lower(model_of(text.replace("H", "4"), opset=21, **SCALE))
    assert program.inputs[0].shape == (1, 4)


def test_a_model_is_left_as_it_is(model_of: Build) -> None:
    text = f"(float[N, 4] x) => (float[N, 4] y) {{ {QUANTIZE} v = Relu (xd) {BEHIND} }}"
    model = model_of(text, opset=21, **SCALE)
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    lower(model)
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before
