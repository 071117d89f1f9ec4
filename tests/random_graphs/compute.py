"""Steps that compute."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st
from onnx import TensorProto, helper

from random_graphs.builder import Builder, Tensor


def conv(b: Builder) -> None:
    x = b.operand(4)
    if x is None or min(x.shape[2:]) < 3 or isinstance(x.dims[1], str):
        return
    channels, depthwise = x.shape[1], b.pick(False, True)
    out = channels if depthwise else b.integer(1, 4)
    kernel, stride, pad = b.pick(1, 3), b.pick(1, 1, 2), b.pick(0, 0, 1)
    inputs = [x.name, b.weights(out, 1 if depthwise else channels, kernel, kernel, scale=0.5)]
    inputs += [b.weights(out)] if b.pick(True, False) else []
    attributes: dict[str, Any] = {"group": channels if depthwise else 1, "strides": [stride] * 2}
    if b.integer(0, 4):
        attributes["pads"] = [pad] * 4
        lengths = [(length + 2 * pad - kernel) // stride + 1 for length in x.shape[2:]]
    else:
        attributes |= {"auto_pad": b.pick("SAME_UPPER", "SAME_LOWER"), "kernel_shape": [kernel] * 2}
        lengths = [-(-length // stride) for length in x.shape[2:]]
    if b.integer(0, 3) == 0:
        inputs[0] = b.raw(
            b.pick("Mul", "Add"), [x.name, b.positive(*b.pick((channels, 1, 1), (1,), (1, channels, 1, 1)))]
        )
    y = b.add("Conv", inputs, (x.dims[0], out, *lengths), **attributes)
    follow(b, y)


def follow(b: Builder, y: Tensor) -> None:
    """Put behind a linear operator what exporters put there."""
    kind = b.pick("none", "norm", "affine", "affine", "activation")
    if kind == "norm":
        normalize(b, y)
    elif kind == "affine":
        for _ in range(b.integer(1, 3)):
            shape = b.pick((1, y.shape[1], 1, 1), (y.shape[1], 1, 1), (1,), ())
            y = b.add(b.pick("Mul", "Add", "Sub", "Div"), [y.name, b.positive(*shape)], y.dims)
    elif kind == "activation":
        activation(b)


def normalize(b: Builder, y: Tensor) -> None:
    if b.half and b.opset < 14:
        return  # onnx's reference operator of that time takes the batch's own statistics
    channels = y.shape[1]
    parameters = [b.positive(channels), b.weights(channels), b.weights(channels), b.positive(channels)]
    b.add("BatchNormalization", [y.name, *parameters], y.dims)


def conv_transpose(b: Builder) -> None:
    x = b.operand(4)
    if x is None or isinstance(x.dims[1], str) or max(x.shape) > 8:
        return
    group = 1 if b.half else b.pick(1, x.shape[1])  # onnx's reference operator fails on groups
    out = b.integer(1, 2)
    inputs = [x.name, b.weights(x.shape[1], out, 2, 2, scale=0.5)]
    inputs += [b.weights(out * group)] if b.pick(True, False) else []
    dims = (x.dims[0], out * group, *(2 * length for length in x.shape[2:]))
    follow(b, b.add("ConvTranspose", inputs, dims, group=group, strides=[2, 2]))


def batch_norm(b: Builder) -> None:
    x = b.operand(4, 3)
    if x is not None and not isinstance(x.dims[1], str):
        normalize(b, x)


def gemm(b: Builder) -> None:
    x = b.operand(2)
    if x is None or isinstance(x.dims[1], str):
        return
    out, flip = b.integer(1, 4), b.pick(0, 1)
    inputs = [x.name, b.weights(*((out, x.shape[1]) if flip else (x.shape[1], out)), scale=0.5)]
    shape = b.pick(None, (out,), (1, out), (1,), (), (1, 1))
    inputs += [] if shape is None else [b.weights(*shape)]
    y = b.add("Gemm", inputs, (x.dims[0], out), transB=flip, alpha=b.pick(1.0, 0.5), beta=b.pick(1.0, 2.0))
    if b.pick(True, False):
        b.add(b.pick("Mul", "Add", "Sub"), [y.name, b.weights(*b.pick((out,), (1, out), ()))], y.dims)


def matmul(b: Builder) -> None:
    x = b.operand(2, 3, 4)
    if x is None or isinstance(x.dims[-1], str):
        return
    out = b.integer(1, 4)
    y = b.add("MatMul", [x.name, b.weights(x.shape[-1], out, scale=0.5)], (*x.dims[:-1], out))
    if b.pick(True, False):
        b.add("Add", [y.name, b.weights(out)], y.dims)


def affine(b: Builder) -> None:
    x = b.operand()
    if x is None:
        return
    kept = [b.pick(True, False, False) and isinstance(dim, int) for dim in x.dims]
    shape = [length if keep else 1 for length, keep in zip(x.shape, kept, strict=True)]
    while shape and shape[0] == 1 and b.pick(True, False):
        shape = shape[1:]
    number = b.positive(*shape) if b.pick(True, False) else b.weights(*shape)
    op_type = b.pick("Mul", "Add", "Sub", "Div")
    if op_type == "Div":
        number = b.positive(*shape)
    swap = op_type != "Div" and b.pick(True, False)
    b.add(op_type, [number, x.name] if swap else [x.name, number], x.dims)


def factors(b: Builder) -> None:
    """Multiply and divide by constants in a row."""
    x = b.operand()
    for _ in range(b.integer(2, 3) if x is not None else 0):
        assert x is not None
        shape = (x.shape[-1],) if x.rank and isinstance(x.dims[-1], int) and b.pick(True, False) else ()
        x = b.add(b.pick("Mul", "Div"), [x.name, b.positive(*shape)], x.dims)


def neutral(b: Builder) -> None:
    x = b.operand()
    if x is not None:
        op_type, number = b.pick(("Add", 0.0), ("Sub", 0.0), ("Mul", 1.0), ("Div", 1.0), ("Mul", 1.0 + 2**-9))
        b.add(op_type, [x.name, b.constant(np.asarray(number, b.dtype))], x.dims)


def combine(b: Builder) -> None:
    x = b.operand()
    others = [value for value in b.values if x is not None and value.dims == x.dims]
    if x is not None:
        other = others[b.integer(0, len(others) - 1)]
        b.add(b.pick("Add", "Sub", "Mul", "Max"), [x.name, other.name], x.dims)


def repeat(b: Builder) -> None:
    """Compute the last result once more, and read both."""
    last, node = b.values[-1], b.nodes[-1] if b.nodes else None
    if node is None or list(node.output) != [last.name]:
        return
    copy = helper.make_node(node.op_type, node.input, [b.name()], name=b.name("n"))
    copy.attribute.extend(node.attribute)
    b.nodes.append(copy)
    b.add("Mul", [last.name, copy.output[0]], last.dims)


def activation(b: Builder) -> None:
    x = b.operand()
    if x is None:
        return
    kinds = ["Relu", "Sigmoid", "Tanh", "HardSigmoid", "LeakyRelu", "Neg", "Abs", "Erf", "Softplus"]
    b.add(b.pick(*kinds, *(["HardSwish"] if b.opset >= 14 else [])), [x.name], x.dims)


def bound(b: Builder) -> None:
    x = b.operand()
    if x is None:
        return
    low, high = (b.constant(np.asarray(b.pick(*numbers), b.dtype)) for numbers in ((0.0, -0.5, -np.inf), (1.0, 0.25)))
    kind = b.pick("Clip", "low", "high", "none", "Min", "Max")
    if kind in ("Min", "Max"):
        operands = [x.name, low if kind == "Max" else high]
        b.add(kind, operands if b.pick(True, False) else operands[::-1], x.dims)
    else:
        bounds = {"Clip": [low, high], "low": [low], "high": ["", high], "none": []}[kind]
        b.add("Clip", [x.name, *bounds], x.dims)


def pool(b: Builder) -> None:
    x = b.operand(4)
    if x is None or min(x.shape[2:]) < 2 or any(isinstance(dim, str) for dim in x.dims[1:]):
        return
    kind = b.pick("MaxPool", "AveragePool", "GlobalAveragePool")
    if kind == "GlobalAveragePool":
        b.add(kind, [x.name], (*x.dims[:2], 1, 1))
    else:
        lengths = [length // 2 for length in x.shape[2:]]
        b.add(kind, [x.name], (*x.dims[:2], *lengths), kernel_shape=[2, 2], strides=[2, 2])


def casts(b: Builder) -> None:
    x = b.operand()
    if x is None:
        return
    own = TensorProto.FLOAT16 if b.half else TensorProto.FLOAT
    middle = x.name
    for to in b.pick([TensorProto.DOUBLE], [TensorProto.FLOAT16], [TensorProto.DOUBLE, TensorProto.FLOAT], [own],
                     [TensorProto.INT32], [TensorProto.INT32, TensorProto.INT64], []):  # fmt: skip
        middle = b.raw("Cast", [middle], to=to)
    b.add("Cast", [middle], x.dims, to=own)


def reduce(b: Builder) -> None:
    x = b.operand(2, 3, 4)
    if x is None:
        return
    axes = sorted(b.draw(st.sets(st.integers(0, x.rank - 1), min_size=1, max_size=2)))
    keep = b.pick(0, 1)
    dims = tuple(1 if i in axes else dim for i, dim in enumerate(x.dims) if keep or i not in axes)
    op_type = b.pick("ReduceMean", "ReduceMax", "ReduceSum")
    if op_type == "ReduceSum" or b.opset >= 18:
        b.add(op_type, [x.name, b.ints(*axes)], dims, keepdims=keep)
    else:
        b.add(op_type, [x.name], dims, keepdims=keep, axes=axes)


def softmax(b: Builder) -> None:
    x = b.operand(2, 3, 4)
    if x is not None:
        b.add("Softmax", [x.name], x.dims, axis=b.pick(-1, b.integer(0, x.rank - 1)))


def layer_norm(b: Builder) -> None:
    x = b.operand(2, 3, 4)
    if x is not None and b.opset >= 17 and not isinstance(x.dims[-1], str) and x.shape[-1] > 1:
        b.add("LayerNormalization", [x.name, b.positive(x.shape[-1]), b.weights(x.shape[-1])], x.dims, axis=-1)


def idle(b: Builder) -> None:
    x = b.operand()
    if x is not None:
        b.add(b.pick("Identity", "Dropout"), [x.name], x.dims)


def branch(b: Builder) -> None:
    """Let an If read a value of the graph around it.

    No Cast may stand in front: onnxruntime 1.31 joins those in a row, and a branch that reads the second finds nothing.
    """
    x = b.operand()
    if x is None or b.half or any(node.op_type == "Cast" for node in b.nodes):
        return
    b.flag = True
    graphs = []
    for op_type in ("Relu", "Neg"):
        inner, out = b.name("b"), b.name("b")
        nodes = [helper.make_node(op_type, [x.name], [inner]), helper.make_node("Identity", [inner], [out])]
        result = helper.make_tensor_value_info(out, TensorProto.FLOAT, x.dims)
        graphs.append(helper.make_graph(nodes, b.name("branch"), [], [result]))
    b.add("If", ["flag"], x.dims, then_branch=graphs[0], else_branch=graphs[1])
