"""Random small networks whose every operator has an integer form, as a hypothesis strategy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
from hypothesis import strategies as st
from onnx import TensorProto, helper

from random_graphs.builder import Builder, Tensor

Step = Callable[[Builder], None]


def window(b: Builder, x: Tensor, most: int = 3) -> dict[str, Any] | None:
    """Draw what a window over a map is like; None if none fits."""
    axes = x.rank - 2
    kernel = [b.integer(1, most) for _ in range(axes)]
    strides, dilations = [b.integer(1, 2) for _ in range(axes)], [b.pick(1, 1, 2) for _ in range(axes)]
    pads = [b.integer(0, kernel[axis % axes] // 2) for axis in range(2 * axes)]
    for axis in range(axes):
        if leaves(x.shape[2 + axis], kernel, strides, dilations, pads, axis) < 1:
            return None
    return {"kernel_shape": kernel, "strides": strides, "dilations": dilations, "pads": pads}


def leaves(length: int, kernel: list[int], strides: list[int], dilations: list[int], pads: list[int], axis: int) -> int:
    reach = (kernel[axis] - 1) * dilations[axis] + 1
    return (length + pads[axis] + pads[axis + len(kernel)] - reach) // strides[axis] + 1


def shape_behind(x: Tensor, channels: int, seen: dict[str, Any]) -> tuple[int, ...]:
    parts = seen["kernel_shape"], seen["strides"], seen["dilations"], seen["pads"]
    return (1, channels, *(leaves(x.shape[2 + axis], *parts, axis) for axis in range(x.rank - 2)))


def activate(b: Builder, y: Tensor) -> None:
    """Put an activation behind a value, or none."""
    kind = b.pick("Relu", "Relu", "Clip", "", "HardSwish", "Sigmoid")
    if kind == "Clip":
        bounds = [b.constant(np.float32(bound)) for bound in (0.0, 1.5)]
        b.add("Clip", [y.name, *bounds], y.dims)
    elif kind:
        b.add(kind, [y.name], y.dims)


def conv(b: Builder) -> None:
    """Add a convolution: of one or two axes, dense, in groups, or depthwise."""
    x = b.operand(3, 4)
    seen = window(b, x) if x is not None else None
    if x is None or seen is None:
        return
    arriving = x.shape[1]
    groups = b.pick(*[count for count in range(1, arriving + 1) if arriving % count == 0])
    leaving = groups * b.integer(1, 3)
    inputs = [x.name, b.weights(leaving, arriving // groups, *seen["kernel_shape"], scale=0.4)]
    if b.integer(0, 3):
        inputs.append(b.weights(leaving, scale=0.3))
    activate(b, b.add("Conv", inputs, shape_behind(x, leaving, seen), group=groups, **seen))


def pool(b: Builder) -> None:
    """Add a pool."""
    x = b.operand(3, 4)
    seen = window(b, x) if x is not None else None
    if x is None or seen is None:
        return
    kind = b.pick("MaxPool", "AveragePool", "GlobalAveragePool")
    if kind == "GlobalAveragePool":
        b.add(kind, [x.name], (*x.dims[:2], *(1,) * (x.rank - 2)))
        return
    counted = {"count_include_pad": 1} if kind == "AveragePool" else {}
    if kind == "AveragePool":
        seen["dilations"] = [1] * (x.rank - 2)
    b.add(kind, [x.name], shape_behind(x, x.shape[1], seen), **seen, **counted)


def join(b: Builder) -> None:
    """Add, subtract or multiply two values of one shape."""
    x = b.operand()
    if x is not None:
        others = [value for value in b.values if value.dims == x.dims and value.name != x.name]
        if others:
            activate(b, b.add(b.pick("Add", "Add", "Sub", "Mul"), [x.name, b.pick(*others).name], x.dims))


def excite(b: Builder) -> None:
    """Multiply a map by a number per channel that follows from it."""
    x = b.operand(4)
    if x is not None:
        pooled = b.add("GlobalAveragePool", [x.name], (*x.dims[:2], 1, 1))
        gate = b.add("Sigmoid", [pooled.name], pooled.dims)
        b.add("Mul", [x.name, gate.name], x.dims)


def concat(b: Builder) -> None:
    """Join maps along an axis in which they may differ."""
    x = b.operand()
    axis = b.integer(1, x.rank - 1) if x is not None and x.rank > 1 else 0
    if x is None or not axis:
        return
    fitting = [other for other in b.values if other.rank == x.rank
               and all(i == axis or other.dims[i] == x.dims[i] for i in range(x.rank))]  # fmt: skip
    parts = [x, *(b.pick(*fitting) for _ in range(b.integer(1, 2)))]
    dims = list(x.shape)
    dims[axis] = sum(part.shape[axis] for part in parts)
    if np.prod(dims) < 4096:
        b.add("Concat", [part.name for part in parts], tuple(dims), axis=axis)


def pad(b: Builder) -> None:
    """Put a margin around a map."""
    x = b.operand(4)
    if x is not None:
        amounts = [b.integer(0, 1) if axis % 4 else 0 for axis in range(8)]
        dims = tuple(length + amounts[axis] + amounts[axis + 4] for axis, length in enumerate(x.shape))
        b.add("Pad", [x.name, b.ints(*amounts)], dims)


def resize(b: Builder) -> None:
    """Enlarge a map by nearest neighbours."""
    x = b.operand(4)
    if x is not None and np.prod(x.shape) < 1024:
        scales = np.array([1, 1, 2, b.pick(1, 2)], np.float32)
        mode = b.pick("asymmetric", "half_pixel")
        dims = tuple(int(length * scale) for length, scale in zip(x.shape, scales, strict=True))
        b.add("Resize", [x.name, "", b.constant(scales)], dims, mode="nearest", nearest_mode="floor",
              coordinate_transformation_mode=mode)  # fmt: skip


def move(b: Builder) -> None:
    """Transpose or reshape a value, or take a part of it."""
    x = b.operand(3, 4)
    if x is None:
        return
    kind = b.pick("Transpose", "Reshape", "Slice")
    if kind == "Transpose":
        order = b.pick(*([(0, 2, 1)] if x.rank == 3 else [(0, 1, 3, 2), (0, 2, 3, 1), (0, 3, 1, 2)]))
        b.add(kind, [x.name], tuple(x.dims[axis] for axis in order), perm=list(order))
    elif kind == "Reshape" and x.rank == 4:
        dims = b.pick((1, x.shape[1], -1), (1, -1, x.shape[3]))
        whole = int(np.prod(x.shape))
        known = tuple(whole // int(np.prod([d for d in dims if d > 0])) if d < 0 else d for d in dims)
        b.add(kind, [x.name, b.ints(*dims)], known)
    elif kind == "Slice" and x.shape[-1] > 2:
        start, step = b.integer(0, 1), b.pick(1, 2)
        dims = (*x.shape[:-1], -(-(x.shape[-1] - start) // step))
        b.add(kind, [x.name, b.ints(start), b.ints(10000), b.ints(-1), b.ints(step)], dims)


def gemm(b: Builder) -> None:
    """Flatten a value and multiply it."""
    x = b.operand()
    if x is not None and int(np.prod(x.shape)) < 1024:
        length, leaving = int(np.prod(x.shape)), b.integer(1, 9)
        flat = b.add("Flatten", [x.name], (1, length)) if x.rank > 1 else x
        weights = b.weights(length, leaving, scale=length**-0.5)
        activate(b, b.add("Gemm", [flat.name, weights, b.weights(leaving)], (1, leaving)))


def matmul(b: Builder) -> None:
    """Multiply a sequence."""
    x = b.operand(2, 3)
    if x is not None:
        leaving = b.integer(1, 6)
        b.add("MatMul", [x.name, b.weights(x.shape[-1], leaving, scale=x.shape[-1] ** -0.5)], (*x.dims[:-1], leaving))


def softmax(b: Builder) -> None:
    """Add a Softmax."""
    x = b.operand()
    if x is not None:
        b.add("Softmax", [x.name], x.dims, axis=b.pick(-1, 1))


STEPS: tuple[Step, ...] = (
    *(conv,) * 6, *(pool,) * 2, *(join,) * 3, excite, concat, pad, resize, *(move,) * 2, *(gemm,) * 2, matmul, softmax,
)  # fmt: skip


@st.composite
def networks(draw: Callable[[st.SearchStrategy[Any]], Any]) -> onnx.ModelProto:
    """Draw a network of one to eight steps; its last value is its output, and now and then another one."""
    b = Builder(draw, np.random.default_rng(draw(st.integers(0, 2**16))), 21, half=False)
    dims = draw(st.sampled_from(((1, 3, 8, 7), (1, 4, 6, 6), (1, 1, 9, 5), (1, 6, 8), (1, 12))))
    b.values.append(Tensor("x", dims))
    for step in draw(st.lists(st.sampled_from(STEPS), min_size=1, max_size=8)):
        step(b)
    if len(b.values) == 1:
        b.add("Relu", ["x"], dims)
    made = b.values[1:]
    outputs = {made[-1].name: made[-1]}
    if not b.integer(0, 3):
        extra = b.pick(*made)
        outputs[extra.name] = extra
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, dims)]
    results = [helper.make_tensor_value_info(one.name, TensorProto.FLOAT, one.dims) for one in outputs.values()]
    graph = helper.make_graph(b.nodes, "random", inputs, results, b.initializers)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(proto, full_check=True)
    return proto
