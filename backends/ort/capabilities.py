"""Capabilities of the installed runtime: patterns of Q/DQ as data, and what its optimizer makes of each.

The list is chosen rather than a full product: every pattern that the compiler writes for the operators of its targets,
and every trap around them that docs/targets/cpu.md tells of.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper, numpy_helper

from qcompile.backends.ort.legalize import legalize
from qcompile.core import model as models
from qcompile.core import runtime
from qcompile.core.capabilities import Capability
from qcompile.core.errors import ModelError

Array = npt.NDArray[Any]

OPSET = 21
#: Axis of a block of weights in four bits, and its length.
BLOCK_AXIS, BLOCK = 0, 32
CODES: dict[str, Any] = {
    "uint8": np.uint8, "int8": np.int8, "uint16": np.uint16, "int4": ml_dtypes.int4, "uint4": ml_dtypes.uint4,
}  # fmt: skip
TYPES: dict[int, str] = {helper.np_dtype_to_tensor_dtype(np.dtype(dtype)): name for name, dtype in CODES.items()}
#: Between the operator and the codes around it: they convert, or turn layouts.
CONVERSIONS = frozenset(
    {"QuantizeLinear", "DynamicQuantizeLinear", "DequantizeLinear", "Transpose", "ReorderInput", "ReorderOutput"}
)
#: Kernels that turn an activation into codes of this type themselves.
TO_CODES = {"DynamicQuantizeMatMul": "uint8"}
#: The form of patterns that are left as exporters write them: all others are written as for a user.
AS_EXPORTED = "as exported"
#: The form of a lookup whose DequantizeLinear stands behind it.
CODES_PICKED = "codes picked"
#: The kernel of a pattern that the runtime does not load.
NOTHING = "none: it is not loaded"
#: Reads the result: no fusion knows it, and no integer kernel.
READER = "Erf"
#: Of Clip(0, 6), which MobileNets have.
LIMIT = 6.0
MATRIX, IMAGE = (4, 64), (1, 16, 8, 8)


@dataclass(frozen=True)
class Sketch:
    """How an operator is written for a pattern.

    Parameters
    ----------
    inputs : tuple of tuple of int
        Shapes of the activations that it reads.
    weights : tuple of int
        Shape of the constant operand that is quantized, () for none; it follows the activations.
    axis : int
        Of the weights' output channels.
    bias : int
        Length of the bias behind the weights, 0 for none.
    constants : tuple of arrays
        Operands behind all these, None for one that is left out.
    attributes : mapping
    """

    inputs: tuple[tuple[int, ...], ...] = (IMAGE,)
    weights: tuple[int, ...] = ()
    axis: int = 0
    bias: int = 0
    constants: tuple[Array | None, ...] = ()
    attributes: dict[str, Any] = field(default_factory=dict)


def _int64(*numbers: int) -> Array:
    return np.array(numbers, np.int64)


def _float(*numbers: float) -> Array:
    return np.array(numbers, np.float32)


_POOL = {"kernel_shape": [3, 3], "strides": [2, 2]}
#: By operator type, or by operator type and form.
SKETCHES: dict[tuple[str, str], Sketch] = {
    ("Conv", ""): Sketch(weights=(32, 16, 3, 3), bias=32, attributes={"pads": [1, 1, 1, 1]}),
    ("Conv", "depthwise"): Sketch(weights=(16, 1, 3, 3), bias=16, attributes={"pads": [1, 1, 1, 1], "group": 16}),
    ("ConvTranspose", ""): Sketch(weights=(16, 16, 3, 3), axis=1, bias=16),
    ("Gemm", ""): Sketch((MATRIX,), (64, 64), axis=1, bias=64),
    ("Gemm", "transB"): Sketch((MATRIX,), (64, 64), bias=64, attributes={"transB": 1}),
    ("MatMul", ""): Sketch((MATRIX,), (64, 64), axis=1),
    ("MatMul", AS_EXPORTED): Sketch((MATRIX,), (64, 64), axis=1),
    ("MatMul", "both activations"): Sketch(((1, 4, 64), (1, 64, 4))),
    ("Add", ""): Sketch((IMAGE, IMAGE)),
    ("Mul", ""): Sketch((IMAGE, IMAGE)),
    ("Concat", ""): Sketch((IMAGE, IMAGE), attributes={"axis": 1}),
    ("AveragePool", ""): Sketch(attributes=_POOL),
    ("AveragePool", "ceil_mode"): Sketch(attributes={**_POOL, "ceil_mode": 1}),
    ("AveragePool", "dilations"): Sketch(attributes={**_POOL, "dilations": [2, 2]}),
    ("GlobalAveragePool", ""): Sketch(),
    ("MaxPool", ""): Sketch(attributes=_POOL),
    ("MaxPool", "ceil_mode"): Sketch(attributes={**_POOL, "ceil_mode": 1}),
    ("Transpose", ""): Sketch(attributes={"perm": [0, 2, 1, 3]}),
    ("Reshape", ""): Sketch(constants=(_int64(1, -1),)),
    ("Flatten", ""): Sketch(),
    ("Squeeze", ""): Sketch(constants=(_int64(0),)),
    ("Unsqueeze", ""): Sketch(constants=(_int64(0),)),
    ("Resize", "nearest"): Sketch(constants=(None, _float(1, 1, 2, 2)), attributes={"mode": "nearest"}),
    ("Resize", "linear"): Sketch(constants=(None, _float(1, 1, 2, 2)), attributes={"mode": "linear"}),
    ("Gather", ""): Sketch((), (512, 64), axis=1),
    ("Gather", CODES_PICKED): Sketch((), (512, 64), axis=1),
    ("Gather", "activation"): Sketch(constants=(_int64(0, 1),), attributes={"axis": 1}),
    ("Sigmoid", ""): Sketch(),
    ("Tanh", ""): Sketch(),
    ("Softmax", ""): Sketch((MATRIX,)),
    ("LeakyRelu", ""): Sketch(attributes={"alpha": 0.1}),
    ("LayerNormalization", ""): Sketch((MATRIX,), constants=(np.ones(64, np.float32),)),
    ("Gelu", ""): Sketch((MATRIX,)),
    ("HardSwish", ""): Sketch(),
}

#: Operands of what may stand behind an operator.
BEHIND: dict[str, tuple[Array, ...]] = {
    "Relu": (), "Clip": (np.array(0, np.float32), np.array(LIMIT, np.float32)), "Add": (np.ones(64, np.float32),),
}  # fmt: skip
LINEAR, MOVING = ("Conv", "Gemm", "MatMul"), ("MaxPool", "Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze")
POOLS, TAKEN_IN = ("AveragePool", "GlobalAveragePool"), ("Sigmoid", "Softmax", "LeakyRelu")
LEFT_IN_FLOAT = ("Tanh", "LayerNormalization", "Gelu", "HardSwish")


def patterns() -> tuple[Capability, ...]:
    """Return the patterns, in the order of the table."""
    return tuple(dict.fromkeys([*_linear(), *_weights_alone(), *_elementwise(), *_moving()]))


def _linear() -> Iterator[Capability]:
    for op in LINEAR:
        plain = Capability(op, weights="int8", per_channel=True)
        yield from _results(plain, "", "Relu", "Clip")
        # The zero point behind a Relu that is not the lowest code; symmetric codes have no other.
        yield from (replace(plain, activation="int8", behind=b, zero_point="middle") for b in ("", "Relu", "Clip"))
        for activation in ("int8", "uint16"):
            yield from _results(replace(plain, activation=activation), "")
        for weights, per_channel in (("int8", False), ("uint8", False), ("int4", False)):
            yield from _results(replace(plain, weights=weights, per_channel=per_channel), "")
        yield replace(plain, activation="uint16", weights="int4", per_channel=False, zero_point="middle")
        yield replace(plain, output="float", dynamic=True)
    yield Capability("MatMul", weights="int8", per_channel=True, behind="Add", output="float", dynamic=True)
    # A bias and an activation that the optimizer joins with a MatMul before it looks for Q/DQ.
    yield from _results(Capability("MatMul", weights="int8", per_channel=True), "Add")
    yield from _results(Capability("MatMul", weights="int8", per_channel=True, form=AS_EXPORTED), "", "Relu", "Add")
    yield from _results(Capability("Gemm", weights="int8", per_channel=True, form="transB"), "")
    yield from _results(Capability("Conv", weights="int8", per_channel=True, form="depthwise"), "", "Relu")
    for per_channel in (True, False):
        yield from _results(Capability("ConvTranspose", weights="int8", per_channel=per_channel), "")
    for activation in ("uint8", "int8", "uint16"):
        yield from _results(Capability("MatMul", activation, form="both activations"), "")


def _weights_alone() -> Iterator[Capability]:
    for op in (*LINEAR, "Gather"):
        for weights, per_channel in (("int8", True), ("int8", False), ("int4", False), ("uint4", False)):
            yield Capability(op, "float", weights, per_channel, output="float")
    for per_channel in (True, False):
        yield Capability("Gather", "float", "int8", per_channel, output="float", form=CODES_PICKED)


def _elementwise() -> Iterator[Capability]:
    yield from _results(Capability("Add"), "", "Relu", "Clip")
    for op in ("Mul", "Concat", *POOLS, *TAKEN_IN, *LEFT_IN_FLOAT):
        yield from _results(Capability(op), "")
    for op in ("Add", "Mul", "Concat", *POOLS, *TAKEN_IN):
        yield Capability(op, "int8", zero_point="middle")
    for op in ("Add", "Mul", "Softmax"):
        yield Capability(op, "uint16", zero_point="middle")
    for form in ("ceil_mode", "dilations"):
        yield from _results(Capability("AveragePool", form=form), "")


def _moving() -> Iterator[Capability]:
    rows = [(op, "") for op in MOVING]
    rows += [("MaxPool", "ceil_mode"), ("Resize", "nearest"), ("Resize", "linear"), ("Gather", "activation")]
    for op, form in rows:
        yield Capability(op, form=form)
        yield Capability(op, form=form, output="float")
    for op in ("MaxPool", "Transpose", "Reshape"):
        yield Capability(op, "int8")


def _results(plain: Capability, *behind: str) -> Iterator[Capability]:
    """Yield a pattern with its result quantized, by every zero point that matters, and in float."""
    for operator in behind:
        for zero_point in ("lowest", "middle") if operator in ("Relu", "Clip") else ("middle",):
            yield replace(plain, behind=operator, zero_point=zero_point)
        yield replace(plain, behind=operator, output="float")


def measure(wanted: Sequence[Capability] | None = None) -> Iterator[Capability]:
    """Yield each pattern with what the installed runtime executes for it.

    Parameters
    ----------
    wanted : sequence of Capability, optional
        All by default.
    """
    with tempfile.TemporaryDirectory(prefix="qcompile-") as folder:
        for pattern in patterns() if wanted is None else wanted:
            path = Path(folder) / "pattern.onnx"
            model = ir.from_proto(model_of(pattern))
            models.save(model if pattern.form == AS_EXPORTED else legalize(model), path)
            try:
                yield _judged(pattern, runtime.optimized(path))
            except ModelError:
                yield replace(pattern, kernel=NOTHING)


def _judged(pattern: Capability, graph: onnx.GraphProto) -> Capability:
    """Tell which nodes compute, and whether the pattern's own reads codes."""
    aside = CONVERSIONS | {READER}
    computing = [node for node in graph.node if node.op_type not in aside or _keeps_name(node)]
    kernel = "+".join(node.op_type for node in computing)
    own = next((node for node in computing if _keeps_name(node)), computing[0])
    constants = {tensor.name: TYPES.get(tensor.data_type, "") for tensor in graph.initializer}
    codes: dict[str, str] = {}
    for node in graph.node:
        if node.op_type == "DynamicQuantizeLinear":
            codes[node.output[0]] = codes[node.output[2]] = "uint8"
        elif node.op_type == "QuantizeLinear":
            zero_point = node.input[2]
            codes[node.output[0]] = constants.get(zero_point) or codes[zero_point]
        elif node.op_type in CONVERSIONS and node.op_type != "DequantizeLinear":
            codes[node.output[0]] = codes.get(node.input[0], "")
    # A table is picked from where it stands first; weights behind an activation say nothing of what that is.
    found = [codes.get(name, "") for name in own.input if name not in constants]
    reads = next(filter(None, [TO_CODES.get(own.op_type, ""), constants.get(own.input[0], ""), *found]), "")
    return replace(pattern, kernel=kernel, integer=bool(reads), reads=reads)


def _keeps_name(node: onnx.NodeProto) -> bool:
    return node.name.partition("_token_")[0].partition("_nchwc")[0] == "op"


def model_of(pattern: Capability, sketch: Sketch | None = None) -> onnx.ModelProto:
    """Write a pattern as a model: codes in front, the operator, what is behind it, and codes again.

    Parameters
    ----------
    pattern : Capability
    sketch : Sketch, optional
        How, where it is not as in the table of capabilities.
    """
    writer = _Writer(pattern, sketch or SKETCHES[pattern.op, pattern.form])
    writer.write()
    graph = helper.make_graph(
        writer.nodes,
        "pattern",
        writer.inputs,
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(array, name) for name, array in writer.constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)


class _Writer:
    """Nodes, inputs and constants of one pattern's model while it is written."""

    def __init__(self, pattern: Capability, sketch: Sketch) -> None:
        self.pattern, self.sketch = pattern, sketch
        self.nodes: list[onnx.NodeProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.constants: dict[str, Array] = {}

    def write(self) -> None:
        pattern, sketch = self.pattern, self.sketch
        read = [self.activation(f"x{index}", shape) for index, shape in enumerate(sketch.inputs)]
        read += [self.weights()] if sketch.weights else []
        if not sketch.inputs:  # a lookup's indices
            self.inputs.append(helper.make_tensor_value_info("indices", TensorProto.INT64, (4,)))
            read.append("indices")
        read += [self.bias()] if sketch.bias else []
        for index, constant in enumerate(sketch.constants):
            read.append("" if constant is None else self.constant(f"c{index}", constant))
        value = self.node(pattern.op, read, "op", **sketch.attributes)
        if pattern.form == CODES_PICKED:
            dequantize = self.nodes.pop(0)
            self.nodes[-1].input[0], self.nodes[-1].output[0] = "w", dequantize.output[0]
            dequantize.input[0], dequantize.output[0] = dequantize.output[0], value
            self.nodes.append(dequantize)
        if pattern.behind:
            operands = [self.constant(f"c{index}", array) for index, array in enumerate(BEHIND[pattern.behind])]
            value = self.node(pattern.behind, [value, *operands], "behind")
        if pattern.output == "quantized":
            value = self.through_codes(value, "y", *self.scale("y" if pattern.zero_point else "x"))
        # Read by an operator in float: what is a graph's output already is treated otherwise than what goes on.
        self.node(READER, [value], READER)
        self.nodes[-1].output[0] = "y"

    def activation(self, name: str, shape: Iterable[int]) -> str:
        self.inputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, tuple(shape)))
        if self.pattern.dynamic:
            codes = helper.make_node("DynamicQuantizeLinear", [name], [f"{name}_codes", "x_scale", "x_zero"])
            self.nodes.append(codes)
            return self.node("DequantizeLinear", codes.output, f"{name}_float")
        return name if self.pattern.activation == "float" else self.through_codes(name, name, *self.scale("x"))

    def scale(self, name: str) -> tuple[str, str]:
        """Write the scale and zero point of the inputs or of the result."""
        info = np.iinfo(CODES[self.pattern.activation])
        middle = (int(info.min) + int(info.max) + 1) // 2
        zero = int(info.min) if name == "y" and self.pattern.zero_point == "lowest" else middle
        # Codes that reach beyond a Clip's limit do not do what it does.
        scale = self.constant(f"{name}_scale", np.float32((LIMIT if self.pattern.behind == "Clip" else 4.0) / info.max))
        return scale, self.constant(f"{name}_zero", np.array(zero, CODES[self.pattern.activation]))

    def weights(self) -> str:
        shape, dtype = self.sketch.weights, np.dtype(CODES[self.pattern.weights])
        blocked, attributes = dtype in (CODES["int4"], CODES["uint4"]), {}
        scales: tuple[int, ...] = ()
        if self.pattern.per_channel:
            scales, attributes = (shape[self.sketch.axis],), {"axis": self.sketch.axis}
        elif blocked and len(shape) == 2:
            scales = (shape[0] // BLOCK, shape[1])
            attributes = {"axis": BLOCK_AXIS, "block_size": BLOCK}
        codes = np.random.default_rng(0).integers(0, 8, shape).astype(dtype)
        names = self.constant("w", codes), self.constant("w_scale", np.full(scales, 0.01, np.float32))
        zero = self.constant("w_zero", np.zeros(scales, dtype))
        return self.node("DequantizeLinear", [*names, zero], "w_float", **attributes)

    def bias(self) -> str:
        length, plain = self.sketch.bias, self.pattern.activation in ("float", "uint16")
        if plain or self.pattern.dynamic:
            return self.constant("b", np.zeros(length, np.float32))
        # In steps of the products, else the runtime leaves it all in float.
        codes = self.constant("b", np.zeros(length, np.int32))
        scale = self.constant(
            "b_scale", self.constants["x_scale"] * np.ravel(self.constants["w_scale"])[:1].repeat(length)
        )
        return self.node("DequantizeLinear", [codes, scale], "b_float", axis=0)

    def through_codes(self, value: str, name: str, scale: str, zero: str) -> str:
        codes = self.node("QuantizeLinear", [value, scale, zero], f"{name}_codes")
        return self.node("DequantizeLinear", [codes, scale, zero], f"{name}_float")

    def constant(self, name: str, array: Array | np.generic) -> str:
        self.constants[name] = np.asarray(array)
        return name

    def node(self, op_type: str, read: Sequence[str], name: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(op_type, read, [f"{name}_out"], name, **attributes))
        return f"{name}_out"
