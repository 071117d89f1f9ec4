"""What has no place in an integer program is refused in one line that names the operator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
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
    "a scale per channel": (
        "[1, 3]", "[1, 3]",
        "v = Relu (xd)  n: q = QuantizeLinear <axis = 1> (v, t, u)  y = DequantizeLinear <axis = 1> (q, t, u)",
        {"t": real(1, 2, 3), "u": ones(3)}, "a scale that is no single constant",
    ),
    "a zero point that is computed": (
        "[1, 3]", "[1, 3]",
        "v = Relu (xd)  u = Identity (z)  n: q = QuantizeLinear (v, s, u)  y = DequantizeLinear (q, s, z)",
        {}, "a zero point that is no constant",
    ),
    "another type of codes": (
        "[1, 3]", "[1, 3]",
        "v = Relu (xd)  n: q = QuantizeLinear <output_dtype = 17> (v, s)  y = DequantizeLinear (q, s)",
        {}, "has codes of float8e4m3fn",
    ),
    "a constant that is quantized": (
        "[1, 3]", "[1, 3]",
        "c = Identity (k)  n: q = QuantizeLinear (c, s, z)  d = DequantizeLinear (q, s, z)  y = Add (xd, d)",
        {"k": real(1, 2, 3)}, "quantizes 'c', which is no activation",
    ),
    "another scale of sixteen bits": ("[1, 3]", "[1, 3]", "n: v = DequantizeLinear (xq, t, z)  y = Add (xd, v)",
                                      {"z": np.int16(0), "t": real(3)}, "reads int16 codes at another scale"),
    "a function of sixteen bits": ("[1, 3]", "[1, 3]", f"n: v = Sigmoid (xd) {BEHIND}", {"z": np.int16(0)},
                                   "is a function of 16-bit codes"),
    "bounds that are computed": ("[1, 3]", "[1, 3]", f"r = Identity (s)  n: v = Clip (xd, s, r) {BEHIND}",
                                 {"z": np.int16(0)}, "reads 'r' in float"),
    "several activations": (
        "[1, 3]", "[1, 3]", f"t = Slice (xd, a, b, a)  n: v = Max (xd, t) {BEHIND}",
        {"a": np.array([1]), "b": np.array([2])}, "is a function of several activations",
    ),
    "scales far apart": (
        "[1, 3]", "[1, 3]",
        f"r = Relu (xd)  q = QuantizeLinear (r, t, z)  d = DequantizeLinear (q, t, z)  n: v = Add (xd, d) {BEHIND}",
        {"t": real(1e12)}, "its scales are out of proportion",
    ),
    "sixteen bits far apart": (
        "[1, 3]", "[1, 3]", "v = Identity (xd)  n: q = QuantizeLinear (v, t, z)  y = DequantizeLinear (q, t, z)",
        {"z": np.int16(0), "t": real(1e-12)}, "its scales are out of proportion",
    ),
    "another number of axes": ("[1, 4]", "[1, 1, 4]", f"r = Reshape (xd, h)  n: v = Add (xd, r) {BEHIND}",
                               {"h": np.array([1, 1, 4])}, "joins shapes"),
    "a product of other shapes": (
        "[1, 4, 2, 2]", "[1, 4, 2, 2]", f"p = MaxPool <kernel_shape = [1, 2]> (xd)  n: v = Mul (xd, p) {BEHIND}", {},
        "joins shapes (1, 4, 2, 2) and (1, 4, 2, 1)",
    ),
    "a product of sixteen bits": ("[4, 4]", "[4, 4]", f"t = Transpose (xd)  n: v = Mul (xd, t) {BEHIND}",
                                  {"z": np.int16(0)}, "reads int16 codes"),
    "tiny steps of a Softmax": (
        "[1, 3]", "[1, 3]", "n: v = Softmax (xd)  q = QuantizeLinear (v, t, z)  y = DequantizeLinear (q, t, z)",
        {"t": real(1e-12)}, "goes over 3 elements in steps of 1e-12",
    ),
    "a constant that widens": ("[1, 1]", "[1, 3]", f"n: v = Mul (xd, k) {BEHIND}", {"k": real(1, 2, 3)},
                               "makes (1, 3) of (1, 1)"),
    "a constant far away": ("[1, 3]", "[1, 3]", f"n: v = Add (xd, k) {BEHIND}", {"k": real(1, -1e12, 3)},
                            "the constant of channel 1 is beyond int32"),
    "a divisor that is computed": ("[1, 3]", "[1, 3]", f"n: v = Div (k, xd) {BEHIND}", {"k": real(1, 2, 3)},
                                   "divides by an activation"),
    "a constant per element": ("[1, 2, 2]", "[1, 2, 2]", f"n: v = Mul (xd, k) {BEHIND}",
                               {"k": np.ones((2, 2), np.float32)}, "has a constant of shape (2, 2)"),
    "a divisor of nothing": ("[1, 3]", "[1, 3]", f"n: v = Div (xd, k) {BEHIND}", {"k": real(1, 0, 3)},
                             "divides by zero"),
    "a bias that is computed": (
        "[1, 4]", "[1, 3]", f"wd = DequantizeLinear (w, s)  b = Identity (k)  n: v = Gemm (xd, wd, b) {BEHIND}",
        {"w": ones(4, 3), "k": real(1, 2, 3)}, "reads 'b' in float",
    ),
    "a bias far away": (
        "[1, 4]", "[1, 3]", f"wd = DequantizeLinear (w, s)  n: v = Gemm (xd, wd, k) {BEHIND}",
        {"w": ones(4, 3), "k": real(1, 2, 1e12)}, "the bias of channel 2 is beyond int32",
    ),
    "a negative alpha": (
        "[1, 4]", "[1, 3]", f"wd = DequantizeLinear (w, s)  n: v = Gemm <alpha = -1.0> (xd, wd) {BEHIND}",
        {"w": ones(4, 3)}, "has an alpha that is not positive",
    ),
    "a stack of weights": ("[2, 1, 4]", "[2, 1, 3]", f"wd = DequantizeLinear (w, s)  n: v = MatMul (xd, wd) {BEHIND}",
                           {"w": ones(2, 4, 3)}, "has weights of rank 3"),
    "bounds behind a join": (
        "[1, 3]", "[1, 6]",
        f"r = Relu (xd)  q = QuantizeLinear (r, t, z)  d = DequantizeLinear (q, t, z)"
        f"  n: c = Concat <axis = 1> (xd, d)  v = Relu (c) {BEHIND}", {"t": real(0.3)}, "has a Relu or Clip behind it",
    ),
    "a constant that is joined": ("[1, 3]", "[1, 6]", f"n: v = Concat <axis = 1> (xd, k) {BEHIND}",
                                  {"k": np.ones((1, 3), np.float32)}, "joins constants too"),
    "several places": ("[1, 3]", "[1, 2]", f"n: v = Gather <axis = 1> (xd, k) {BEHIND}", {"k": np.array([0, 2])},
                       "picks several places"),
    "nothing left": ("[1, 3]", "[1, 0]", f"n: v = Slice (xd, a, a, a) {BEHIND}", {"a": np.array([1])},
                     "leaves nothing over"),
    "places of maxima": (
        "[1, 1, 2, 2]", "[1, 1, 1, 1]", f"n: v, p = MaxPool <kernel_shape = [2, 2]> (xd)  o = Identity (p) {BEHIND}",
        {}, "is asked for the places of its maxima",
    ),
    "a mean over very many": (
        "[1, 1, 1, 70000]", "[1, 1, 1, 1]", f"n: v = AveragePool <kernel_shape = [1, 70000]> (xd) {BEHIND}",
        {"z": np.int16(0)}, "beyond int32",
    ),
    "resized channels": ("[1, 1, 2, 2]", "[1, 2, 2, 2]", f"n: v = Resize (xd, , r) {BEHIND}", {"r": real(1, 2, 1, 1)},
                         "resizes other axes"),
    "other coordinates": (
        "[1, 1, 2, 2]", "[1, 1, 4, 4]",
        f'n: v = Resize <coordinate_transformation_mode = "tf_crop_and_resize"> (xd, o, r) {BEHIND}',
        {"r": real(1, 1, 2, 2), "o": real(0, 0, 0, 0, 1, 1, 1, 1)}, "has coordinates 'tf_crop_and_resize'",
    ),
    "a pad that cuts": ("[1, 4]", "[1, 3]", f"n: v = Pad (xd, p) {BEHIND}", {"p": np.array([0, -1, 0, 0])},
                        "cuts its input"),
    "four bits": ("[1, 3]", "[1, 3]", f"n: v = Sigmoid (xd) {BEHIND}", {"z": ml_dtypes.int4(0)},
                  "is a function of int4 codes"),
    "four bits at another scale": (
        "[1, 3]", "[1, 3]", "v = Identity (xd)  n: q = QuantizeLinear (v, t, z)  y = DequantizeLinear (q, t, z)",
        {"z": ml_dtypes.int4(0), "t": real(3)}, "changes the scale of int4 codes",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_refusals_name_the_operator(model_of: Build, name: str) -> None:
    arriving, leaving, line, constants, fact = CASES[name]
    nodes = f"{QUANTIZE} {line}".replace("n: ", "")
    model = model_of(f"(float{arriving} x) => (float{leaving} y) {{ {nodes} }}", opset=21, **(SCALE | constants))
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
