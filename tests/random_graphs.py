"""Random valid models over the operators that canonicalize knows, as a hypothesis strategy.

Shapes are tracked while a graph grows, so that every operator fits its operands. Weights come from a generator whose
seed is drawn; hypothesis draws the structure, and so can shrink it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

#: The length that an open batch axis has when a graph runs.
BATCH = 2
Dims = tuple[int | str, ...]
Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Tensor:
    """A value of the graph with what is known of it."""

    name: str
    dims: Dims

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(BATCH if isinstance(dim, str) else dim for dim in self.dims)

    @property
    def rank(self) -> int:
        return len(self.dims)


@dataclass
class Builder:
    """A graph that grows by one operator at a time."""

    draw: Callable[[st.SearchStrategy[Any]], Any]
    random: np.random.Generator
    opset: int
    half: bool
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    initializers: list[onnx.TensorProto] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    count: int = 0
    flag: bool = False

    @property
    def dtype(self) -> type[Any]:
        return np.float16 if self.half else np.float32

    def integer(self, low: int, high: int) -> int:
        return int(self.draw(st.integers(low, high)))

    def pick(self, *choices: Any) -> Any:
        return self.draw(st.sampled_from(choices))

    def name(self, what: str = "v") -> str:
        self.count += 1
        return f"{what}{self.count}"

    def constant(self, array: Array) -> str:
        """Add a constant, as an initializer or as a Constant node."""
        name = self.name("c")
        tensor = numpy_helper.from_array(np.asarray(array), name)
        if self.integer(0, 3):
            self.initializers.append(tensor)
        else:
            self.nodes.append(helper.make_node("Constant", [], [name], value=tensor))
        return name

    def ints(self, *numbers: int) -> str:
        return self.constant(np.array(numbers, np.int64))

    def weights(self, *shape: int, scale: float = 1.0) -> str:
        return self.constant((self.random.standard_normal(shape) * scale).astype(self.dtype))

    def positive(self, *shape: int) -> str:
        return self.constant((0.5 + self.random.random(shape)).astype(self.dtype))

    def raw(self, op_type: str, inputs: list[str], **attributes: Any) -> str:
        """Add a node of one result that is no operand for later operators."""
        name = self.name()
        self.nodes.append(helper.make_node(op_type, inputs, [name], name=self.name("n"), **attributes))
        return name

    def add(self, op_type: str, inputs: list[str], dims: Dims, **attributes: Any) -> Tensor:
        tensor = Tensor(self.raw(op_type, inputs, **attributes), dims)
        self.values.append(tensor)
        return tensor

    def operand(self, *ranks: int) -> Tensor | None:
        """Return a value of one of these ranks, mostly a recent one."""
        fitting = [value for value in self.values if not ranks or value.rank in ranks]
        return fitting[-1 - min(self.pick(0, 0, 0, 0, 1, 2, 5), len(fitting) - 1)] if fitting else None


Step = Callable[[Builder], None]


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
    channels = y.shape[1]
    parameters = [b.positive(channels), b.weights(channels), b.weights(channels), b.positive(channels)]
    b.add("BatchNormalization", [y.name, *parameters], y.dims)


def conv_transpose(b: Builder) -> None:
    x = b.operand(4)
    if x is None or isinstance(x.dims[1], str) or max(x.shape) > 8:
        return
    group = b.pick(1, x.shape[1])
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


def residual(b: Builder) -> None:
    """Read a value through two Transposes, as networks with channels last do."""
    x = b.operand(4)
    if x is None:
        return
    there, back = (0, 2, 3, 1), (0, 3, 1, 2)
    dims = tuple(x.dims[index] for index in there)
    turned = b.add("Transpose", [x.name], dims, perm=there)
    moved = b.add("Relu", [turned.name], dims)
    if b.pick(True, False):
        moved = b.add("Add", [moved.name, turned.name], dims)
    if not isinstance(dims[-1], str) and b.pick(True, False):
        moved = b.add("Mul", [moved.name, b.positive(dims[-1])], dims)
    b.add("Transpose", [moved.name], x.dims, perm=back)


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


def pad(b: Builder) -> None:
    x = b.operand(4)
    if x is None or min(x.shape[2:]) < 2 or max(x.shape) > 10:
        return
    amounts = [[0, 0, b.integer(0, 1), b.integer(0, 1)] for _ in range(2)]
    dims = tuple(
        dim if isinstance(dim, str) or not (more := amounts[0][i] + amounts[1][i]) else dim + more
        for i, dim in enumerate(x.dims)
    )
    if any(isinstance(dim, str) and amounts[0][i] + amounts[1][i] for i, dim in enumerate(x.dims)):
        return
    mode = b.pick("constant", "constant", "reflect", "edge")
    extra = [b.constant(np.asarray(b.pick(0.0, 1.0), b.dtype))] if mode == "constant" and b.pick(True, False) else []
    y = b.add("Pad", [x.name, b.ints(*amounts[0], *amounts[1]), *extra], dims, mode=mode)
    if b.pick(True, False) and not isinstance(y.dims[1], str) and min(y.shape[2:]) >= 3:
        lengths = [length - 2 for length in y.shape[2:]]
        b.add("Conv", [y.name, b.weights(2, y.shape[1], 3, 3, scale=0.5)], (y.dims[0], 2, *lengths))


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


def transpose(b: Builder) -> None:
    x = b.operand(2, 3, 4)
    if x is not None:
        order = tuple(b.draw(st.permutations(range(x.rank))))
        y = b.add("Transpose", [x.name], tuple(x.dims[index] for index in order), perm=order)
        if b.pick(True, False):
            activation(b)
        if b.pick(True, False):
            back = tuple(int(index) for index in np.argsort(order))
            b.add("Transpose", [y.name], x.dims, perm=back)


def reshape(b: Builder) -> None:
    x = b.operand()
    if x is None or x.rank == 0 or any(isinstance(dim, str) for dim in x.dims[1:]):
        return
    rest = x.shape[1:]
    dims: Dims = (x.dims[0], *b.pick(rest, (int(np.prod(rest)),), (*rest, 1), (1, *rest), rest[::-1]))
    if len(dims) > 5:
        return
    style = b.pick("constant", "copy", "chain", "shape")
    if style == "shape" and dims == x.dims:
        wanted = b.raw("Shape", [x.name])
    elif style == "chain":
        wanted = _chain(b, x, dims)
    else:
        first = 0 if style == "copy" else -1 if isinstance(dims[0], str) else x.shape[0]
        wanted = b.ints(first, *(int(dim) for dim in dims[1:]))
    b.add("Reshape", [x.name, wanted], dims)


def _chain(b: Builder, x: Tensor, dims: Dims) -> str:
    """Compute a shape as torch's exporter does: Shape, Gather, Unsqueeze, Concat."""
    shape = b.raw("Shape", [x.name])
    length = b.raw("Gather", [shape, b.constant(np.asarray(0, np.int64))], axis=0)
    if b.pick(True, False):
        length = b.raw("Mul", [length, b.constant(np.asarray(1, np.int64))])
    first = b.raw("Unsqueeze", [length, b.ints(0)])
    rest = b.ints(*(int(dim) for dim in dims[1:])) if len(dims) > 1 else None
    return b.raw("Concat", [first, *([rest] if rest else [])], axis=0)


def view(b: Builder) -> None:
    x = b.operand(1, 2, 3, 4)
    if x is None:
        return
    kind = b.pick("Flatten", "Squeeze", "Unsqueeze", "Unsqueeze")
    ones = [index for index, dim in enumerate(x.dims) if dim == 1]
    if kind == "Flatten" and x.rank >= 2 and not any(isinstance(dim, str) for dim in x.dims[1:]):
        b.add("Flatten", [x.name], (x.dims[0], int(np.prod(x.shape[1:]))), axis=1)
    elif kind == "Squeeze" and ones and x.rank > 1:
        gone = b.pick(*ones)
        b.add("Squeeze", [x.name, b.ints(b.pick(gone, gone - x.rank))], (*x.dims[:gone], *x.dims[gone + 1 :]))
    elif kind == "Unsqueeze" and x.rank < 5:
        new = b.integer(0, x.rank)
        b.add("Unsqueeze", [x.name, b.ints(new)], (*x.dims[:new], 1, *x.dims[new:]))


def concat(b: Builder) -> None:
    x = b.operand(2, 3, 4)
    others = [value for value in b.values if x is not None and value.dims == x.dims]
    axes = [index for index, dim in enumerate(x.dims) if isinstance(dim, int)] if x is not None else []
    if x is None or not axes or max(x.shape) > 12:
        return
    axis, parts = b.pick(*axes), [x, *others[: b.integer(0, 2)]]
    dims = list(x.dims)
    dims[axis] = x.shape[axis] * len(parts)
    b.add("Concat", [part.name for part in parts], tuple(dims), axis=b.pick(axis, axis - x.rank))


def split(b: Builder) -> None:
    x = b.operand(2, 3, 4)
    axes = [i for i, dim in enumerate(x.dims) if isinstance(dim, int) and dim % 2 == 0] if x is not None else []
    if x is None or not axes:
        return
    axis = b.pick(*axes)
    dims = list(x.dims)
    dims[axis] = x.shape[axis] // 2
    halves = [Tensor(b.name(), tuple(dims)) for _ in range(2)]
    sizes = b.ints(dims[axis], dims[axis])  # type: ignore[arg-type]
    b.nodes.append(helper.make_node("Split", [x.name, sizes], [half.name for half in halves], axis=axis))
    b.values.extend(halves)


def cut(b: Builder) -> None:
    x = b.operand(2, 3, 4)
    if x is None:
        return
    for _ in range(b.integer(1, 2)):
        axis = b.integer(0, x.rank - 1)
        start = 0 if isinstance(x.dims[axis], str) else b.integer(0, min(1, x.shape[axis] - 1))
        dims = list(x.dims)
        if start:
            dims[axis] = x.shape[axis] - start
        bounds = [b.ints(start), b.ints(b.pick(2**31 - 1, 2**63 - 1)), b.ints(axis)]
        x = b.add("Slice", [x.name, *bounds, *([b.ints(1)] if b.pick(True, False) else [])], tuple(dims))


def expand(b: Builder) -> None:
    x = b.operand(2, 3, 4)
    if x is None or max(x.shape) > 12:
        return
    grown = tuple(3 if dim == 1 and b.pick(True, False) else dim for dim in x.dims)
    if any(isinstance(dim, str) for dim in x.dims):
        lengths = [1 if isinstance(dim, str) else dim for dim in grown]
        b.add("Expand", [x.name, b.ints(*(int(length) for length in lengths))], grown)
    elif grown == x.dims:
        b.add("Expand", [x.name, b.raw("Shape", [x.name])], grown)
    else:
        b.add("Expand", [x.name, b.ints(*(int(dim) for dim in grown))], grown)


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
    """Let an If read a value of the graph around it."""
    x = b.operand()
    if x is None or b.half:
        return
    b.flag = True
    graphs = []
    for op_type in ("Relu", "Neg"):
        inner, out = b.name("b"), b.name("b")
        nodes = [helper.make_node(op_type, [x.name], [inner]), helper.make_node("Identity", [inner], [out])]
        result = helper.make_tensor_value_info(out, TensorProto.FLOAT, x.dims)
        graphs.append(helper.make_graph(nodes, b.name("branch"), [], [result]))
    b.add("If", ["flag"], x.dims, then_branch=graphs[0], else_branch=graphs[1])


STEPS: tuple[Step, ...] = (
    conv, conv, conv, conv_transpose, batch_norm, gemm, gemm, matmul, conv, affine, affine, neutral, combine, combine,
    residual, residual, activation, activation, bound, bound, pad, pad, pool, casts, transpose, transpose, reshape,
    reshape, view, view, concat, split, cut, expand, reduce, softmax, layer_norm, idle, branch,
)  # fmt: skip


@st.composite
def models(draw: Callable[[st.SearchStrategy[Any]], Any]) -> onnx.ModelProto:
    """Draw a model of four to sixteen steps; some of its intermediate values are outputs as well."""
    seed = draw(st.integers(0, 2**16))
    opset = draw(st.sampled_from((21, 21, 21, 13, 17, 18)))
    b = Builder(draw, np.random.default_rng(seed), opset, half=draw(st.integers(0, 9)) == 0)
    first: int | str = draw(st.sampled_from(("N", BATCH)))
    dims: Dims = draw(st.sampled_from(((first, 3, 6, 6), (first, 4, 5, 6), (first, 6, 4), (first, 5))))
    own = TensorProto.FLOAT16 if b.half else TensorProto.FLOAT
    b.values.append(Tensor("x", dims))
    for step in draw(st.lists(st.sampled_from(STEPS), min_size=4, max_size=16)):
        step(b)
    made = b.values[1:]
    if not made:
        made = [b.add("Relu", ["x"], dims)]
    outputs = {made[-1].name: made[-1]}
    for _ in range(draw(st.integers(0, 2))):
        extra = made[draw(st.integers(0, len(made) - 1))]
        outputs[extra.name] = extra
    inputs = [helper.make_tensor_value_info("x", own, dims)]
    inputs += [helper.make_tensor_value_info("flag", TensorProto.BOOL, ())] if b.flag else []
    results = [helper.make_tensor_value_info(tensor.name, own, tensor.dims) for tensor in outputs.values()]
    graph = helper.make_graph(b.nodes, "random", inputs, results, b.initializers)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    onnx.checker.check_model(proto, full_check=True)
    return proto
