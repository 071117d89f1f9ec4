"""Each operation: lowered from a model of one operator, and run beside it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from random_graphs.quantized import quantized, random_samples

from qcompile.backends.integer import operations as ops
from qcompile.backends.integer.interpret import dequantize_output, interpret, quantize_input
from qcompile.backends.integer.lower import lower
from qcompile.backends.integer.program import Program
from qcompile.core import model as models
from qcompile.core import runtime

Build = Callable[..., ir.Model]
MAP = "(float[1, 6, 9, 7] x) => (float{shape} y)"


def lowered(model: ir.Model) -> tuple[Program, int, dict[str, Any]]:
    """Return a model's program, how far its codes are from those of the QDQ model at most, and what it computes."""
    samples = random_samples(model, 4)
    qdq = quantized(model, samples)
    program = lower(qdq)
    session = runtime.Session(qdq, optimize=False)
    worst, found = 0.0, {}
    for feeds in samples:
        expected = session.run(feeds)
        inputs = {port.name: quantize_input(program, port, feeds[port.name]) for port in program.inputs}
        codes = interpret(program, inputs)
        for port in program.outputs:
            found[port.name] = dequantize_output(program, port, codes[port.name])
            assert found[port.name].shape == expected[port.name].shape
            step = program.tensors[port.tensor].scale
            worst = max(worst, float(np.abs(found[port.name] - expected[port.name]).max()) / step)
    return program, round(worst), found


def kinds(program: Program) -> list[str]:
    return [type(operation).__name__ for operation in program.operations]


CONVOLUTIONS = {
    "plain": ("[3, 3]", "", (5, 6, 3, 3), "[1, 5, 7, 5]"),
    "padded": ("[3, 3]", "pads = [1, 1, 1, 1]", (5, 6, 3, 3), "[1, 5, 9, 7]"),
    "uneven": ("[3, 2]", "pads = [0, 1, 2, 0]", (5, 6, 3, 2), "[1, 5, 9, 7]"),
    "strided": ("[3, 3]", "pads = [1, 1, 1, 1], strides = [2, 2]", (5, 6, 3, 3), "[1, 5, 5, 4]"),
    "dilated": ("[3, 3]", "dilations = [2, 2]", (5, 6, 3, 3), "[1, 5, 5, 3]"),
    "grouped": ("[3, 3]", "group = 3", (9, 2, 3, 3), "[1, 9, 7, 5]"),
    "depthwise": ("[3, 3]", "group = 6, pads = [1, 1, 1, 1]", (6, 1, 3, 3), "[1, 6, 9, 7]"),
    "multiplied": ("[3, 3]", "group = 6", (12, 1, 3, 3), "[1, 12, 7, 5]"),
    "same_upper": ("[2, 2]", 'auto_pad = "SAME_UPPER"', (5, 6, 2, 2), "[1, 5, 9, 7]"),
    "same_lower": ("[2, 2]", 'auto_pad = "SAME_LOWER", strides = [2, 2]', (5, 6, 2, 2), "[1, 5, 5, 4]"),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize("activation", ["", "Relu", "Clip"])
def test_convolutions(model_of: Build, random: np.random.Generator, name: str, activation: str) -> None:
    kernel, attributes, weights, shape = CONVOLUTIONS[name]
    behind = {"": "y = Identity (c)", "Relu": "y = Relu (c)", "Clip": "y = Clip (c, low, high)"}[activation]
    text = f"""{MAP.format(shape=shape)} {{
        c = Conv <kernel_shape = {kernel}{", " + attributes if attributes else ""}> (x, w, b)
        {behind}
    }}"""
    model = model_of(text, w=random.standard_normal(weights).astype(np.float32),
                     b=random.standard_normal(weights[0]).astype(np.float32),
                     low=np.float32(0.0), high=np.float32(2.0))  # fmt: skip
    program, worst, _ = lowered(model)
    assert kinds(program) == ["Conv"]
    assert worst <= 1
    [conv] = program.operations
    assert isinstance(conv, ops.Conv)
    bounds = conv.requantize.low, conv.requantize.high
    assert bounds[0] == (-128 if not activation else program.tensors[conv.output].zero_point)
    assert program.tensors[conv.inputs[0]].shape == (1, 9, 7, 6)


def test_a_sequence_is_a_map_of_one_column(model_of: Build, random: np.random.Generator) -> None:
    text = "(float[1, 4, 12] x) => (float[1, 5, 6] y) { y = Conv <pads = [1, 1], strides = [2]> (x, w) }"
    program, worst, _ = lowered(model_of(text, w=random.standard_normal((5, 4, 3)).astype(np.float32)))
    conv = next(operation for operation in program.operations if isinstance(operation, ops.Conv))
    assert (conv.window.size, conv.window.strides, worst) == ((3, 1), (2, 1), 0)
    assert set(kinds(program)) == {"Conv", "View"}


SINGLE = {
    "Add": ("y = Add (x, x2)", "[1, 6, 9, 7]", ["Add"]),
    "Sub": ("y = Sub (x, x2)", "[1, 6, 9, 7]", ["Add"]),
    "Mul": ("y = Mul (x, x2)", "[1, 6, 9, 7]", ["Mul"]),
    "twice": ("y = Add (x, x)", "[1, 6, 9, 7]", ["View"]),  # the same codes, of twice the scale
    "AveragePool": ("y = AveragePool <kernel_shape = [3, 2], strides = [2, 2]> (x)", "[1, 6, 4, 3]", ["AveragePool"]),
    "counted": (
        "y = AveragePool <kernel_shape = [3, 3], pads = [1, 1, 1, 1], count_include_pad = 1> (x)", "[1, 6, 9, 7]",
        ["AveragePool"],
    ),
    "GlobalAveragePool": ("y = GlobalAveragePool (x)", "[1, 6, 1, 1]", ["AveragePool"]),
    "ReduceMean": ("y = ReduceMean <axes = [2, 3], keepdims = 0> (x)", "[1, 6]", ["AveragePool", "View"]),
    "over channels last": ("y = ReduceMean <axes = [1, 2]> (x)", "[1, 1, 1, 7]", ["AveragePool"]),
    "MaxPool": ("y = MaxPool <kernel_shape = [3, 2], strides = [2, 2], pads = [1, 0, 1, 0]> (x)", "[1, 6, 5, 3]",
                ["MaxPool"]),
    "ceil": ("y = MaxPool <kernel_shape = [2, 2], strides = [2, 2], ceil_mode = 1> (x)", "[1, 6, 5, 4]", ["MaxPool"]),
    "Concat": ("y = Concat <axis = 1> (x, x2)", "[1, 12, 9, 7]", ["Lookup", "Lookup", "Concat"]),
    "Slice": ("y = Slice (x, one, far, two, two)", "[1, 6, 4, 7]", ["Slice"]),
    "Sigmoid": ("y = Sigmoid (x)", "[1, 6, 9, 7]", ["Lookup"]),
    "LeakyRelu": ("y = LeakyRelu <alpha = 0.2> (x)", "[1, 6, 9, 7]", ["Lookup"]),
    "Transpose": ("y = Transpose <perm = [0, 2, 3, 1]> (x)", "[1, 9, 7, 6]", []),
    "Softmax": ("y = Softmax <axis = 1> (x)", "[1, 6, 9, 7]", ["Transpose", "Softmax"]),
}  # fmt: skip


@pytest.mark.parametrize("name", SINGLE)
def test_single_operators(model_of: Build, name: str) -> None:
    line, shape, expected = SINGLE[name]
    second = ", float[1, 6, 9, 7] x2" if "x2" in line else ""
    text = f"(float[1, 6, 9, 7] x{second}) => (float{shape} y) {{ {line} }}"
    numbers = {"one": 1, "far": 9, "two": 2}
    constants = {key: np.array([number], np.int64) for key, number in numbers.items() if key in line}
    if name in ("Transpose",):
        text = text.replace("y = Tr", "z = Tr").replace("}", "y = Relu (z) }")
    program, worst, _ = lowered(model_of(text, opset=17, **constants))
    assert worst <= 1
    assert [kind for kind in kinds(program) if kind != "Lookup" or "Lookup" in expected] == expected


def test_a_softmax_sums_to_one(model_of: Build) -> None:
    _, _, found = lowered(model_of("(float[1, 40] x) => (float[1, 40] y) { y = Softmax (x) }"))
    assert abs(float(found["y"].sum()) - 1.0) < 40 * 0.5 / 256


def test_a_transpose_in_front_of_a_map_disappears(model_of: Build, random: np.random.Generator) -> None:
    text = """(float[1, 8, 8, 3] x) => (float[1, 8, 8, 4] y) {
        t = Transpose <perm = [0, 3, 1, 2]> (x)
        c = Conv <pads = [1, 1, 1, 1]> (t, w)
        y = Transpose <perm = [0, 2, 3, 1]> (c)
    }"""
    program, worst, _ = lowered(model_of(text, w=random.standard_normal((4, 3, 3, 3)).astype(np.float32)))
    assert (kinds(program), worst) == (["Conv"], 0)
    assert program.inputs[0].axes == program.outputs[0].axes == (0, 1, 2, 3)


def test_a_map_as_channels_first_is_handed_over_channels_last(model_of: Build, random: np.random.Generator) -> None:
    text = "(float[1, 3, 8, 8] x) => (float[1, 4, 6, 6] y) { y = Conv (x, w) }"
    program, _, _ = lowered(model_of(text, w=random.standard_normal((4, 3, 3, 3)).astype(np.float32)))
    assert program.inputs[0].axes == (0, 2, 3, 1) and program.inputs[0].shape == (1, 3, 8, 8)
    assert program.tensors[program.inputs[0].tensor].shape == (1, 8, 8, 3)


def test_weights_behind_a_flattened_map_take_its_order(model_of: Build, random: np.random.Generator) -> None:
    text = """(float[1, 3, 8, 8] x) => (float[1, 5] y) {
        c = Conv (x, w)
        f = Flatten (c)
        y = Gemm (f, g)
    }"""
    weights = {"w": random.standard_normal((4, 3, 3, 3)), "g": random.standard_normal((144, 5))}
    program, worst, _ = lowered(model_of(text, **{name: array.astype(np.float32) for name, array in weights.items()}))
    assert kinds(program) == ["Conv", "View", "Dense"]
    assert worst <= 1


def test_a_flattened_map_that_something_else_reads_is_moved(model_of: Build, random: np.random.Generator) -> None:
    text = """(float[1, 3, 8, 8] x) => (float[1, 144] y) {
        c = Conv (x, w)
        f = Flatten (c)
        y = Softmax (f)
    }"""
    program, worst, _ = lowered(model_of(text, w=random.standard_normal((4, 3, 3, 3)).astype(np.float32)))
    assert [kind for kind in kinds(program) if kind != "View"] == ["Conv", "Transpose", "Softmax"]
    assert worst <= 1


def test_a_chain_of_functions_without_codes_between_is_one_table(model_of: Build) -> None:
    text = """(float[1, 6] x) => (float[1, 6] y) {
        xq = QuantizeLinear (x, s, z)
        xd = DequantizeLinear (xq, s, z)
        a = Add (xd, three)
        b = Clip (a, zero, six)
        c = Mul (xd, b)
        d = Div (c, six)
        dq = QuantizeLinear (d, s, z)
        y = DequantizeLinear (dq, s, z)
    }"""
    numbers = {"s": 0.05, "three": 3.0, "zero": 0.0, "six": 6.0}
    constants = {name: np.float32(number) for name, number in numbers.items()}
    model = model_of(text, opset=21, z=np.int8(3), **constants)
    program = lower(model)
    assert kinds(program) == ["Lookup"]
    x = np.linspace(-7, 7, 6, dtype=np.float32).reshape(1, 6)
    found = interpret(program, {"x": quantize_input(program, program.inputs[0], x)})
    expected = runtime.Session(model, optimize=False).run({"x": x})
    assert np.array_equal(dequantize_output(program, program.outputs[0], found["y"]), expected["y"])


@pytest.mark.parametrize("dtype", ["int8", "uint8"])
def test_a_model_of_codes_keeps_its_codes(model_of: Build, dtype: str, random: np.random.Generator) -> None:
    text = f"""({dtype}[1, 12] x) => ({dtype}[1, 5] y) {{
        xd = DequantizeLinear (x, s, z)
        wd = DequantizeLinear <axis = 0> (w, ws, wz)
        g = Gemm <transB = 1> (xd, wd)
        y = QuantizeLinear (g, s, z)
    }}"""
    weights = random.integers(-127, 128, (5, 12)).astype(np.int8)
    scales = np.linspace(0.01, 0.02, 5).astype(np.float32)
    model = model_of(text, opset=21, s=np.float32(0.1), z=np.array(7, dtype), w=weights, ws=scales,
                     wz=np.zeros(5, np.int8))  # fmt: skip
    program = lower(model)
    info = np.iinfo(dtype)
    x = random.integers(info.min, info.max + 1, (1, 12)).astype(dtype)
    found = interpret(program, {"x": quantize_input(program, program.inputs[0], x)})["y"].astype(np.int64)
    expected = runtime.Session(model, optimize=False).run({"x": x})["y"].astype(np.int64)
    assert program.outputs[0].unsigned == (dtype == "uint8")
    assert np.abs(found + (128 if dtype == "uint8" else 0) - expected).max() <= 1


def test_four_bit_weights_are_known_as_such(proto_of: Callable[..., onnx.ModelProto]) -> None:
    text = """(float[1, 8] x) => (float[1, 3] y) {
        xq = QuantizeLinear (x, s, z)
        xd = DequantizeLinear (xq, s, z)
        wd = DequantizeLinear (w, s)
        m = MatMul (xd, wd)
        mq = QuantizeLinear (m, s, z)
        y = DequantizeLinear (mq, s, z)
    }"""
    proto = proto_of(text, opset=21, s=np.float32(0.1), z=np.int8(0))
    codes = np.arange(24) % 16 - 8
    proto.graph.initializer.append(onnx.helper.make_tensor("w", onnx.TensorProto.INT4, (8, 3), codes.tolist()))
    [dense] = lower(models.from_proto(proto)).operations
    assert isinstance(dense, ops.Dense)
    assert dense.bits == 4
    assert np.array_equal(dense.weights, codes.reshape(8, 3).T)


def test_sixteen_bit_activations_of_a_linear_operator(model_of: Build, random: np.random.Generator) -> None:
    text = """(float[1, 8] x) => (float[1, 3] y) {
        xq = QuantizeLinear (x, s, z)
        xd = DequantizeLinear (xq, s, z)
        wd = DequantizeLinear (w, ws)
        m = MatMul (xd, wd)
        mq = QuantizeLinear (m, s, z)
        y = DequantizeLinear (mq, s, z)
    }"""
    weights = random.integers(-127, 128, (8, 3)).astype(np.int8)
    model = model_of(text, opset=21, s=np.float32(0.001), z=np.int16(5), ws=np.float32(0.002), w=weights)
    program = lower(model)
    x = random.standard_normal((1, 8)).astype(np.float32)
    found = interpret(program, {"x": quantize_input(program, program.inputs[0], x)})["y"]
    expected = runtime.Session(model, optimize=False).run({"x": x})["y"]
    assert found.dtype == np.int16
    assert np.abs(dequantize_output(program, program.outputs[0], found) - expected).max() <= 0.001001


def test_what_depends_on_one_code_is_one_table(model_of: Build, random: np.random.Generator) -> None:
    text = """(float[1, 3, 8, 8] x) => (float[1, 4, 6, 6] y) {
        c = Conv (x, w)
        g = HardSigmoid <alpha = 0.2> (c)
        y = Mul (c, g)
    }"""
    program, worst, _ = lowered(model_of(text, w=random.standard_normal((4, 3, 3, 3)).astype(np.float32)))
    assert (kinds(program), worst <= 1) == (["Conv", "Lookup"], True)
    assert len(program.tensors) == 3


def test_a_table_of_something_else_is_not_joined(model_of: Build) -> None:
    text = """(float[1, 8] x, float[1, 8] z) => (float[1, 8] y, float[1, 8] g) {
        g = HardSigmoid (x)
        h = HardSigmoid (z)
        y = Mul (g, h)
    }"""
    program, worst, _ = lowered(model_of(text))
    assert (sorted(kinds(program)), worst <= 1) == (["Lookup", "Lookup", "Mul"], True)


@pytest.mark.parametrize("line", ["Mul (x, c)", "Div (x, c)", "Add (x, c)", "Sub (x, c)", "Sub (c, x)", "Mul (c, x)"])
@pytest.mark.parametrize("axis", [1, 3])
def test_constants_per_channel(model_of: Build, line: str, axis: int, random: np.random.Generator) -> None:
    shape = [1, 1, 1, 1]
    shape[axis] = (6, 9, 7)[axis - 1]
    text = f"(float[1, 6, 9, 7] x) => (float[1, 6, 9, 7] y) {{ r = Softplus (x) y = {line} }}"
    constant = random.choice([-1.0, 1.0], shape) * random.uniform(0.5, 2.0, shape)
    program, worst, _ = lowered(model_of(text, c=constant.astype(np.float32)[0]))
    assert [kind for kind in kinds(program) if kind not in ("View", "Transpose")] == ["Conv"]
    assert worst <= 1


def test_a_factor_of_zero_leaves_the_term(model_of: Build) -> None:
    text = """(float[1, 3] x) => (float[1, 3] y) {
        xq = QuantizeLinear (x, s, z)  xd = DequantizeLinear (xq, s, z)
        v = Mul (xd, c)
        vq = QuantizeLinear (v, s, z)  y = DequantizeLinear (vq, s, z)
    }"""
    model = model_of(text, opset=21, s=np.float32(0.1), z=np.int8(3), c=np.float32([0.0, 1.0, -2.0]))
    program = lower(model)
    found = interpret(program, {"x": np.full((1, 3), 13, np.int8)})["y"]
    assert found.tolist() == [[3, 13, -17]]


def test_a_batch_normalization_between_codes(model_of: Build, random: np.random.Generator) -> None:
    text = """(float[1, 6, 4, 4] x) => (float[1, 6, 4, 4] y) {
        xq = QuantizeLinear (x, s, z)  xd = DequantizeLinear (xq, s, z)
        v = BatchNormalization (xd, a, b, m, u)
        r = Relu (v)
        rq = QuantizeLinear (r, s, z)  y = DequantizeLinear (rq, s, z)
    }"""
    constants = {name: random.uniform(0.2, 2.0, 6).astype(np.float32) for name in "abmu"}
    model = model_of(text, opset=21, s=np.float32(0.03), z=np.int8(-5), **constants)
    program = lower(model)
    feeds = {"x": random.standard_normal((1, 6, 4, 4)).astype(np.float32)}
    found = interpret(program, {"x": quantize_input(program, program.inputs[0], feeds["x"])})["y"]
    expected = runtime.Session(model, optimize=False).run(feeds)["y"]
    apart = np.abs(dequantize_output(program, program.outputs[0], found) - expected)
    assert [kind for kind in kinds(program) if kind not in ("View", "Transpose")] == ["Conv"]
    assert apart.max() <= 0.0301


def test_a_map_that_is_normalized_first_is_handed_over_channels_last(
    model_of: Build, random: np.random.Generator
) -> None:
    text = """(float[1, 3, 8, 8] x) => (float[1, 4, 8, 8] y) {
        a = Sub (x, mean)
        b = Mul (a, factor)
        y = Conv <pads = [1, 1, 1, 1]> (b, w)
    }"""
    constants = {"mean": random.standard_normal((3, 1, 1)), "factor": random.uniform(0.5, 2.0, (3, 1, 1)),
                 "w": random.standard_normal((4, 3, 3, 3))}  # fmt: skip
    model = model_of(text, **{name: array.astype(np.float32) for name, array in constants.items()})
    program, worst, _ = lowered(model)
    assert set(kinds(program)) == {"Conv"}
    assert worst <= 1
    assert program.inputs[0].axes == (0, 2, 3, 1)
