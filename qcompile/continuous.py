"""QDQ models without their rounding, by which two forms of one model can be held to each other.

Where the last digit of a sum decides what is rounded up, models that compute the same differ by whole steps, and the
difference of two that do not drowns in that. Without the rounding what is left is continuous: a rewrite that changes
the form alone moves it by no more than the digits of its float type. Saturation stays, for forms rely on it: a Relu
goes where the quantizer behind it saturates alike.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common_passes

from qcompile.calib.data import Sample
from qcompile.core import numerics, runtime
from qcompile.core.errors import VerificationError
from qcompile.passes import structure

#: Largest max|Δ| / max|y| of a form in which biases or more are float16.
FORM_BOUND = 2e-2
#: Samples that two forms are run on.
HELD_ON = 2
#: Operators that move codes and change none.
MOVERS = frozenset({
    "Concat", "DepthToSpace", "Expand", "Flatten", "Gather", "GatherElements", "GatherND", "Identity", "MaxPool",
    "Pad", "Reshape", "Resize", "Slice", "SpaceToDepth", "Split", "Squeeze", "Tile", "Transpose", "Unsqueeze", "Where",
})  # fmt: skip
#: The contrib operator that reads codes, and where its operands stand: codes, scales, zero points, bias.
PRODUCT = "MatMulIntegerToFloat"


def hold(place: str, before: ir.Model, after: ir.Model, samples: Sequence[Sample]) -> float | None:
    """Hold one form of a QDQ model to another, without rounding.

    Parameters
    ----------
    place : str
        What made the other form, for the message.
    before, after : onnx_ir.Model
    samples : sequence of Sample

    Returns
    -------
    float or None
        The largest max|Δ| / max|y|; None where rounding cannot be taken out of both.

    Raises
    ------
    VerificationError
        If they do not compute the same.
    """
    one, other = without_rounding(before), without_rounding(after)
    if one is None or other is None:
        return None
    worst, sessions = 0.0, [runtime.Session(model, optimize=False) for model in (one, other)]
    for feeds in samples[:HELD_ON]:
        expected, found = (session.run(feeds) for session in sessions)
        for name, y in expected.items():
            error = numerics.relative_error(y, found[name]) if y.dtype.kind == "f" else 0.0
            if not error <= FORM_BOUND:
                fact = f"output '{name}' moves by {error:.2g} of its largest value where nothing is rounded"
                raise VerificationError(place, f"{fact}, more than {FORM_BOUND:.2g}", "report it with the model")
            worst = max(worst, error)
    return worst


def without_rounding(model: ir.Model) -> ir.Model | None:
    """Return a model whose activations are not rounded to codes; None where something computes on those.

    Constants keep the numbers that their codes stand for: these are exact. What a quantizer makes of x is
    clip(x / s + z) in float32.
    """
    copy = model.clone()
    codes = _codes(copy.graph)
    if codes is None or any(value.is_graph_output() for value in codes):
        return None
    writer = _Writer(copy.graph, codes)
    for node in list(copy.graph):
        writer.take(node)
    for value in codes:
        if structure.produced_by(value, "DynamicQuantizeLinear"):
            continue  # it stays, for the scale that it tells
        value.type = ir.TensorType(ir.DataType.FLOAT)  # a new object: the model that was copied has the old one
    common_passes.RemoveUnusedNodesPass()(copy)
    copy.graph.sort()
    return copy


def _codes(graph: ir.Graph) -> dict[ir.Value, ir.DataType] | None:
    """Return all values that are codes of activations, with their types; None where another operator reads one."""
    found: dict[ir.Value, ir.DataType] = {}
    for node in graph:
        quantizes = structure.is_standard(node, "QuantizeLinear", "DynamicQuantizeLinear")
        if quantizes and not _is_known(node):
            return None
        if quantizes:
            found[node.outputs[0]] = _type_of_codes(node)
        read = [value for value in node.inputs if value in found]
        if not read or quantizes or structure.is_standard(node, "DequantizeLinear") or _is_product(node):
            continue
        if not structure.is_standard(node, *MOVERS):
            return None
        moved = node.outputs[:1] if node.op_type == "MaxPool" else node.outputs
        found |= dict.fromkeys(moved, found[read[0]])
    inner = {value for node in graph.all_nodes() if node.graph is not graph for value in node.inputs}
    return None if inner & found.keys() else found


def _is_known(node: ir.Node) -> bool:
    """Tell whether all codes of a quantizer have one scale, and zero points tell their type."""
    if node.op_type == "DynamicQuantizeLinear":
        return True
    zero_point = structure.constant_tensor(node.inputs[2]) if len(node.inputs) > 2 else None
    scale = structure.constant_tensor(node.inputs[1])
    return zero_point is not None and scale is not None and scale.size == 1


def _type_of_codes(node: ir.Node) -> ir.DataType:
    tensor = structure.constant_tensor(node.inputs[2]) if node.op_type == "QuantizeLinear" else None
    return ir.DataType.UINT8 if tensor is None else tensor.dtype


def _is_product(node: ir.Node) -> bool:
    return node.op_type == PRODUCT and node.domain == "com.microsoft"


class _Writer:
    """Writes what is continuous in place of what rounds, into one graph."""

    def __init__(self, graph: ir.Graph, codes: dict[ir.Value, ir.DataType]) -> None:
        self.graph = graph
        self.codes = codes

    def take(self, node: ir.Node) -> None:
        """Rewrite one node, if it makes or reads codes."""
        if structure.is_standard(node, "QuantizeLinear"):
            self._quantize(node)
        elif structure.is_standard(node, "DynamicQuantizeLinear"):
            scaled = self._node("Div", self._single(node.inputs[0]), node.outputs[1])
            self._replace(node.outputs[0], self._node("Add", scaled, self._single(node.outputs[2])))
        elif structure.is_standard(node, "DequantizeLinear") and node.inputs[0] in self.codes:
            real = self._real(structure.input_of(node, 0), *node.inputs[1:3])
            scale = structure.constant_tensor(node.inputs[1])
            dtype = ir.DataType.FLOAT if scale is None else scale.dtype
            self._replace(node.outputs[0], real if dtype is ir.DataType.FLOAT else self._cast(real, dtype))
        elif _is_product(node):
            self._product(node)
        elif any(value in self.codes for value in node.inputs):
            self._move(node)

    def _quantize(self, node: ir.Node) -> None:
        zero_point = structure.constant(node.inputs[2])
        assert zero_point is not None
        bounds = (self._constant(np.array(edge, np.float32)) for edge in numerics.code_range(zero_point.dtype.name))
        scaled = self._node("Div", self._single(node.inputs[0]), self._single(node.inputs[1]))
        shifted = self._node("Add", scaled, self._single(node.inputs[2]))
        self._replace(node.outputs[0], self._node("Clip", shifted, *bounds))

    def _real(self, codes: ir.Value, scale: ir.Value | None, zero_point: ir.Value | None) -> ir.Value:
        shifted = codes if zero_point is None else self._node("Sub", codes, self._single(zero_point))
        return self._node("Mul", shifted, self._single(scale))

    def _product(self, node: ir.Node) -> None:
        """Multiply in float what MatMulIntegerToFloat multiplies as codes."""
        a, b, a_scale, b_scale, *rest = node.inputs
        a_zero, b_zero, bias = (*rest, None, None, None)[:3]
        operands = ((a, a_scale, a_zero), (b, b_scale, b_zero))
        reals = [self._real(codes if codes in self.codes else self._single(codes), scale, zero)
                 for codes, scale, zero in operands]  # fmt: skip
        result = self._node("MatMul", *reals)
        self._replace(node.outputs[0], result if bias is None else self._node("Add", result, bias))

    def _move(self, node: ir.Node) -> None:
        """Give an operator that moves codes floats for all of them: what it pads with is one too."""
        kinds = {self.codes[value] for value in node.inputs if value is not None and value in self.codes}
        for index, value in enumerate(node.inputs):
            tensor = structure.constant_tensor(value)
            if value not in self.codes and tensor is not None and tensor.dtype in kinds:
                node.replace_input_with(index, self._single(value))

    def _single(self, value: ir.Value | None) -> ir.Value:
        assert value is not None
        tensor = structure.constant_tensor(value)
        dtype = value.dtype if tensor is None else tensor.dtype
        return value if dtype is ir.DataType.FLOAT else self._cast(value, ir.DataType.FLOAT)

    def _cast(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        made = self._node("Cast", value)
        node = made.producer()
        assert node is not None
        node.attributes["to"] = ir.AttrInt64("to", int(dtype))
        made.dtype = dtype
        return made

    def _constant(self, array: np.ndarray) -> ir.Value:
        name = f"/continuous/{len(self.graph.initializers)}"
        value = ir.Value(name=name, const_value=ir.tensor(array, name=name))
        value.dtype, value.shape = ir.DataType.from_numpy(array.dtype), ir.Shape(array.shape)
        self.graph.register_initializer(value)
        return value

    def _node(self, op_type: str, *inputs: ir.Value) -> ir.Value:
        count = len(self.graph)
        node = ir.node(op_type, inputs, name=f"/continuous/{op_type}_{count}")
        node.outputs[0].name, node.outputs[0].dtype = f"/continuous/value_{count}", ir.DataType.FLOAT
        self.graph.append(node)
        return node.outputs[0]

    def _replace(self, old: ir.Value, new: ir.Value) -> None:
        """Let all who read a value read another, the caller too, who knows it by its name."""
        new.shape = old.shape
        if old in self.codes:
            self.codes[new] = self.codes[old]
        for node, index in list(old.uses()):
            node.replace_input_with(index, new)
        if old.is_graph_output():
            old.name, new.name = f"{old.name}/rounded", old.name
            self.graph.outputs[:] = [new if output is old else output for output in self.graph.outputs]
