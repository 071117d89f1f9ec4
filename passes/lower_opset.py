"""Lower the opset: of a model that is newer than the runtime, and of the artifact of a target that reads older ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import onnx
import onnx_ir as ir
import onnx_ir.passes.common as common_passes

from qcompile.core import model as models
from qcompile.core.contract import Effect
from qcompile.core.errors import ModelError
from qcompile.passes import structure
from qcompile.passes.canonicalize.infer_shapes import InferShapes

#: Operators whose meaning, or names of whose modes, changed in an opset, under signatures that do not show it.
REDEFINED = {"GridSample": 20, "Hardmax": 13, "LogSoftmax": 13, "RoiAlign": 16, "Softmax": 13}
#: Choices that an attribute has since an opset.
CHOICES = {
    ("Pad", "wrap"): 19,
    ("Resize", "half_pixel_symmetric"): 19,
    ("ScatterElements", "max"): 18,
    ("ScatterElements", "min"): 18,
    ("ScatterND", "max"): 18,
    ("ScatterND", "min"): 18,
}
#: The first opset whose Mod of floats may have the divisor's sign.
FLOOR_MOD = 28
#: The first opset in which Q and DQ have a scale per channel.
PER_CHANNEL = 13
QDQ = ("DequantizeLinear", "QuantizeLinear")
Schema = onnx.defs.OpSchema


@dataclass(frozen=True)
class LowerOpset(ir.passes.InPlacePass):
    """Declare the model to be of at most `opset`, in a file format of at most `ir_version`.

    A new opset mostly admits new types and attributes; what uses none of them is the same operator in the old one. Both
    versions' schemas tell. A constant input that was an attribute of the same name becomes one.

    Parameters
    ----------
    opset, ir_version : int
        The newest that the reader takes.
    reader : str
        Its name, for the messages.

    Raises
    ------
    ModelError
        If an operator does not exist in the older opset, or not with its types or attributes.
    """

    opset: int
    ir_version: int
    reader: str
    effect: ClassVar[Effect] = Effect.EXACT

    @classmethod
    def for_target(cls, opset: int, name: str) -> LowerOpset:
        """Return the pass that writes what a target reads, in the file format that belongs to the opset."""
        return cls(opset, onnx.helper.find_min_ir_version_for([onnx.helper.make_opsetid("", opset)]), f"target {name}")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite in place."""
        before, version = models.opset(model), model.ir_version or 0
        model.ir_version = min(version, self.ir_version)
        if before <= self.opset:
            return ir.passes.PassResult(model, version > self.ir_version)
        common_passes.InlinePass()(model)
        InferShapes()(model)  # the schemas speak of types
        nodes = [node for node in model.graph.all_nodes() if structure.is_standard(node, node.op_type)]
        if lost := sorted({reason for node in nodes for reason in self._obstacles(node, before)}):
            fact = f"has opset {before}; {self.reader} takes {self.opset} at most, which cannot express its "
            remedy = f"export it with opset {self.opset} or older"
            if any(reason.startswith(QDQ) for reason in lost):
                remedy = "choose a target that reads newer ones, or quantize less"
            raise ModelError("model", fact + ", ".join(lost), remedy)
        for node in nodes:
            _lower(node, *self._schemas(node, before))
        common_passes.RemoveUnusedNodesPass()(model)  # constants that became attributes
        model.opset_imports[""] = self.opset
        return ir.passes.PassResult(model, True)

    def _schemas(self, node: ir.Node, before: int) -> tuple[Schema, Schema]:
        return onnx.defs.get_schema(node.op_type, before), onnx.defs.get_schema(node.op_type, self.opset)

    def _obstacles(self, node: ir.Node, before: int) -> Iterator[str]:
        """Yield what of a node the older opset does not have."""
        name = node.op_type
        if not onnx.defs.has(name, before):
            return  # the runtime's own, which no opset of the standard has
        try:
            new, old = self._schemas(node, before)
        except onnx.defs.SchemaError:
            yield name
            return
        if old.since_version == new.since_version:
            return
        if REDEFINED.get(name, 0) > self.opset or len(node.outputs) > old.max_output:
            yield name
        if self.opset < FLOOR_MOD and name == "Mod" and _is_floored(node):
            yield "Mod of floats that rounds down"
        if self.opset < PER_CHANNEL and name in QDQ and any(_length(value) != 1 for value in node.inputs[1:]):
            yield f"{name} with a scale per channel"
            return
        yield from _lost_types(node, old)
        yield from _lost_attributes(node, new, old, self.opset)
        for index in _surplus(node, old):
            if _as_attribute(node, index, new, old) is None:
                yield f"{name} with '{new.inputs[index].name}'"


def _lost_types(node: ir.Node, old: Schema) -> Iterator[str]:
    for values, formals in ((node.inputs, old.inputs), (node.outputs, old.outputs)):
        for index, value in enumerate(values):
            type_ = _type_name(value.type) if value is not None and value.type is not None else None
            formal = _formal(formals, index)
            if type_ is not None and formal is not None and type_ not in formal.types:
                yield f"{node.op_type} of {type_.replace('tensor(', '').rstrip(')')}"


def _lost_attributes(node: ir.Node, new: Schema, old: Schema, opset: int) -> Iterator[str]:
    for name, attribute in node.attributes.items():
        if name not in old.attributes and attribute.value != _default(new, name) and not _splits_evenly(node, name):
            yield f"{node.op_type} with '{name}'"
        if attribute.type is ir.AttributeType.STRING and CHOICES.get((node.op_type, attribute.value), 0) > opset:
            yield f"{node.op_type} in mode '{attribute.value}'"
    for name in sorted(set(new.attributes) & set(old.attributes) - set(node.attributes)):
        if _default(new, name) != _default(old, name):
            yield f"{node.op_type} without '{name}'"


def _is_floored(node: ir.Node) -> bool:
    dtype = structure.input_of(node, 0).dtype
    return dtype is not None and dtype.is_floating_point() and not node.attributes.get_int("fmod", 0)


def _splits_evenly(node: ir.Node, name: str) -> bool:
    """Tell whether an attribute is the number of parts of a Split, as many as its results and equally long."""
    shape = node.inputs[0].shape if node.op_type == "Split" and node.inputs[0] is not None else None
    length = None if shape is None else shape[node.attributes.get_int("axis", 0)]
    return name == "num_outputs" and isinstance(length, int) and length % len(node.outputs) == 0


def _lower(node: ir.Node, new: Schema, old: Schema) -> None:
    """Move constant inputs to attributes, and drop attributes that say what goes without saying."""
    if old.since_version == new.since_version:
        return
    for name in set(node.attributes) - set(old.attributes):
        node.attributes.pop(name)
    for index in _surplus(node, old):
        attribute = _as_attribute(node, index, new, old)
        assert attribute is not None
        node.attributes[attribute.name] = attribute
    if not _is_variadic(old.inputs) and len(node.inputs) > len(old.inputs):
        node.resize_inputs(len(old.inputs))


def _surplus(node: ir.Node, old: Schema) -> list[int]:
    """Return which inputs the older operator does not have."""
    if _is_variadic(old.inputs):
        return []
    return [index for index in range(len(old.inputs), len(node.inputs)) if node.inputs[index] is not None]


def _as_attribute(node: ir.Node, index: int, new: Schema, old: Schema) -> ir.Attr | None:
    """Return a constant input as the attribute of its name that the older operator has, or None."""
    array = structure.constant(node.inputs[index])
    name = new.inputs[index].name
    if array is None or name not in old.attributes:
        return None
    kind = old.attributes[name].type
    if kind == Schema.AttrType.INTS:
        return ir.AttrInt64s(name, [int(number) for number in array.reshape(-1)])
    if kind == Schema.AttrType.FLOAT and array.size == 1:
        return ir.AttrFloat32(name, float(array.reshape(())))
    return None


def _is_variadic(formals: Sequence[Schema.FormalParameter]) -> bool:
    return bool(formals) and formals[-1].option == Schema.FormalParameterOption.Variadic


def _formal(formals: Sequence[Schema.FormalParameter], index: int) -> Schema.FormalParameter | None:
    if index < len(formals):
        return formals[index]
    return formals[-1] if _is_variadic(formals) else None


def _default(schema: Schema, name: str) -> object:
    proto = schema.attributes[name].default_value
    return None if proto.type == onnx.AttributeProto.UNDEFINED else ir.from_proto(proto).value


def _length(value: ir.Value | None) -> int:
    array = structure.constant(value)
    return 1 if array is None else array.size


def _type_name(type_: ir.TypeProtocol) -> str:
    """Return a type as the schemas write it."""
    if isinstance(type_, ir.SequenceType):
        return f"seq({_type_name(type_.elem_type)})"
    if isinstance(type_, ir.OptionalType):
        return f"optional({_type_name(type_.elem_type)})"
    return f"tensor({type_.dtype.name.lower()})"
