"""ONNX Runtime's operators for the shapes of cpu_kernels.py, as sessions whose outputs are bound beforehand."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import onnxruntime
from cpu_kernel_shapes import BLOCK, Shape
from onnx import TensorProto, helper, numpy_helper

Run = Callable[[], object]
MICROSOFT = "com.microsoft"


def rivals(shape: Shape) -> dict[str, Callable[[int], Run]]:
    """Return by form what builds a run of so many operations."""
    if shape.bits == 4:
        return {"NBits": partial(built, shape, four_bits)}
    if not shape.size:
        return {"MatMul": partial(built, shape, product)}
    return {"NCHW": partial(built, shape, partial(convolution, last=False)),
            "NHWC": partial(built, shape, partial(convolution, last=True))}  # fmt: skip


def built(shape: Shape, form: Callable[..., Any], copies: int) -> Run:
    """Return what runs so many operations that all read one input."""
    random = np.random.default_rng(0)
    parts = [form(shape, index, random) for index in range(copies)]
    element, source, target = parts[0][2:]
    graph = helper.make_graph(
        [part[0] for part in parts], "g", [helper.make_tensor_value_info("x", element, source)],
        [helper.make_tensor_value_info(f"y{index}", element, target) for index in range(copies)],
        [numpy_helper.from_array(array, name) for part in parts for name, array in part[1].items()],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(MICROSOFT, 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    # Layouts are compared as they are: what changes them, and converts between them, is left out.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    kind = helper.tensor_dtype_to_np_dtype(element)
    data = random.integers(0, 256, source).astype(kind) if element == TensorProto.UINT8 else random.normal(size=source)
    binding = session.io_binding()
    binding.bind_ortvalue_input("x", onnxruntime.OrtValue.ortvalue_from_numpy(data.astype(kind)))
    for index in range(copies):
        binding.bind_ortvalue_output(f"y{index}", onnxruntime.OrtValue.ortvalue_from_numpy(np.empty(target, kind)))
    return partial(session.run_with_iobinding, binding)


def scales(shape: Shape, index: int) -> dict[str, Any]:
    """Return the scales and zero points of codes, of weights by output."""
    spread = 75.0 * 127 * np.sqrt(shape.products / shape.outputs / (shape.side**2 if shape.size else shape.rows))
    return {
        f"xs{index}": np.float32(0.05), f"xz{index}": np.uint8(125),
        f"ws{index}": np.full(shape.outputs, 0.01, np.float32), f"wz{index}": np.zeros(shape.outputs, np.int8),
        f"ys{index}": np.float32(0.05 * 0.01 * spread / 60), f"yz{index}": np.uint8(133),
    }  # fmt: skip


def product(shape: Shape, index: int, random: np.random.Generator) -> tuple[Any, ...]:
    """Return a QLinearMatMul: node, constants, element type, shapes of input and output."""
    weights = random.integers(-127, 128, (shape.channels, shape.outputs)).astype(np.int8)
    known = scales(shape, index)
    names = list(known)
    inputs = ["x", *names[:2], f"w{index}", *names[2:]]
    node = helper.make_node("QLinearMatMul", inputs, [f"y{index}"])
    constants = {key: np.asarray(value) for key, value in known.items()} | {f"w{index}": weights}
    return node, constants, TensorProto.UINT8, (shape.rows, shape.channels), (shape.rows, shape.outputs)


def convolution(shape: Shape, index: int, random: np.random.Generator, last: bool) -> tuple[Any, ...]:
    """Return a QLinearConv, with channels second or last."""
    fewer = shape.channels // shape.groups
    weights = random.integers(-127, 128, (shape.outputs, fewer, shape.size, shape.size)).astype(np.int8)
    known = scales(shape, index)
    names = list(known)
    inputs = ["x", *names[:2], f"w{index}", *names[2:], f"b{index}"]
    given: dict[str, Any] = {"channels_last": 1, "domain": MICROSOFT} if last else {}
    node = helper.make_node(
        "QLinearConv", inputs, [f"y{index}"], kernel_shape=[shape.size] * 2, strides=[shape.stride] * 2,
        pads=[shape.pad] * 4, group=shape.groups, **given,
    )  # fmt: skip
    bias = random.integers(-3000, 3000, shape.outputs).astype(np.int32)
    constants = {key: np.asarray(value) for key, value in known.items()} | {f"w{index}": weights, f"b{index}": bias}
    source, target = ([1, side, side, channels] if last else [1, channels, side, side]
                      for side, channels in ((shape.rows, shape.channels), (shape.side, shape.outputs)))  # fmt: skip
    return node, constants, TensorProto.UINT8, source, target


def four_bits(shape: Shape, index: int, random: np.random.Generator) -> tuple[Any, ...]:
    """Return a MatMulNBits that rounds its input to eight bits."""
    blocks = -(-shape.channels // BLOCK)
    weights = random.integers(0, 256, (shape.outputs, blocks, BLOCK // 2)).astype(np.uint8)
    factors = np.full(shape.outputs * blocks, 0.01, np.float32)
    node = helper.make_node(
        "MatMulNBits", ["x", f"w{index}", f"s{index}"], [f"y{index}"], domain=MICROSOFT, K=shape.channels,
        N=shape.outputs, bits=4, block_size=BLOCK, accuracy_level=4,
    )  # fmt: skip
    constants = {f"w{index}": weights, f"s{index}": factors}
    return node, constants, TensorProto.FLOAT, (shape.rows, shape.channels), (shape.rows, shape.outputs)
