"""Compute in float16 what fits: accelerators do twice to eight times as much of it, and it is half the bytes.

What fits is found by what values reach, not by a list of operators. binary16 (IEEE 754-2008) has eleven significant
bits, normal numbers from 2^-14 to 65504, and below 2^-14 steps of 2^-24.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnx_ir.passes.common as common_passes

from qcompile.backends.ort.half_floors import singular_readers
from qcompile.backends.ort.half_values import HALF, SINGLE, Reach, Slots, fits, slots
from qcompile.core import model as models
from qcompile.core import scratch
from qcompile.core.contract import Effect, Refusal, Rewritten
from qcompile.passes import structure

#: Operators that do so much that a Cast on either side is nothing beside it.
HEAVY = ("Conv", "ConvTranspose", "Gemm", "GRU", "LSTM", "MatMul", "RNN")
#: Attributes that name the element type of a result.
TYPE_ATTRIBUTES = ("dtype", "to", "output_dtype")

NOTE = (
    "float16 is computed in where values fit it by {where}, {headroom:g} times as large as they were: "
    "what real inputs reach is not known; pass --data."
)


@dataclass(frozen=True)
class Halve(ir.passes.InPlacePass):
    """Compute in float16 wherever values fit, in float32 elsewhere, with as few Casts between the two as there can be.

    Inputs and outputs of the graph keep their types. Integer weights stay as they are behind a DequantizeLinear that
    computes in float32, so that a runtime folds the two and the Cast when it loads the model. Nodes with subgraphs,
    and what such subgraphs read, stay in float32.

    Parameters
    ----------
    reach : mapping of str to float
        By value name, the largest |x|; a float value that is not among them is not known to fit.
    headroom : float
        How far beyond that values may be expected: the factor that 65504 must leave.
    has_kernel : callable, optional
        Tells whether the target computes a node in float16.
    measured_on : str
        Where `reach` is from, in words, if that is nothing to rely on: the report says it first.
    coarse : mapping of str to str
        Nodes that stay in float32 although float16 holds what they read and make, each with the reason.
    """

    reach: Mapping[str, float]
    headroom: float = 4.0
    has_kernel: Callable[[ir.Node], bool] = field(default=lambda node: True, repr=False)
    measured_on: str = ""
    coarse: Mapping[str, str] = field(default_factory=dict)
    effect: ClassVar[Effect] = Effect.LOSSY

    def call(self, model: ir.Model) -> Rewritten:
        """Rewrite in place; what stays in float32 is a refusal with the reason."""
        half, reasons = self.chosen(model)
        if half:
            _Writer(model.graph, half, models.opset(model)).write()
        common_passes.RemoveUnusedNodesPass()(model)
        refusals = tuple(Refusal(structure.node_name(node), reason) for node, reason in reasons.items())
        notes = (NOTE.format(where=self.measured_on, headroom=self.headroom),) if half and self.measured_on else ()
        return Rewritten(model, bool(half), refusals, notes)

    def chosen(self, model: ir.Model) -> tuple[set[ir.Node], dict[ir.Node, str]]:
        """Return the nodes that compute in float16, and why others do not that could by their types."""
        known = Reach(self.reach, self.headroom)
        reasons: dict[ir.Node, str] = {}
        half = set()
        version = models.opset(model)
        for node in model.graph:
            places = slots(node, version)
            if places is None or _is_constant_expression(node):
                continue
            if reason := self._obstacle(node, known, version):
                reasons[node] = reason
            else:
                half.add(node)
        for node, reason in singular_readers(model.graph):
            if node in half:
                half.discard(node)
                reasons[node] = reason
        _leave_islands(half, reasons, version)
        return half, reasons

    def _obstacle(self, node: ir.Node, known: Reach, version: int) -> str:
        """Return why a node is computed in float32, or nothing."""
        places = slots(node, version)
        assert places is not None
        if any(attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for attribute in
               node.attributes.values()):  # fmt: skip
            return "it has a subgraph, which computes in float32"
        if not self.has_kernel(node):
            return f"there is no {node.op_type} in float16"
        for index in places.inputs:
            value = structure.input_of(node, index)
            if reason := _constant_obstacle(value) or known.obstacle(value, node):
                return reason
        found = (known.obstacle(node.outputs[index], node) for index in places.outputs)
        return next(filter(None, found), self.coarse.get(structure.node_name(node), ""))


def float_values(model: ir.Model) -> list[str]:
    """Return the names of all float32 values that nodes of the main graph make or read: what `Halve` wants to know.

    Parameters
    ----------
    model : onnx_ir.Model
    """
    made = [value for node in model.graph if not _is_constant_expression(node) for value in node.outputs]
    given = [value for value in model.graph.inputs if not value.is_initializer()]
    return [structure.name_of(value) for value in (*given, *made) if value.dtype is SINGLE and value.name]


def _is_constant_expression(node: ir.Node) -> bool:
    """Tell whether a node computes a constant from constants: weights that are unpacked when a model is loaded."""
    if not any(value is not None for value in node.inputs):
        return False
    return all(value is None or structure.constant_tensor(value) is not None
               or ((made := value.producer()) is not None and _is_constant_expression(made))
               for value in node.inputs)  # fmt: skip


def _constant_obstacle(value: ir.Value) -> str:
    """Return why a constant, or weights that are unpacked, are no halves; nothing for what is no constant."""
    array = structure.constant(value)
    made = structure.produced_by(value, "DequantizeLinear")
    if array is None and made is not None and _is_constant_expression(made):
        codes, scale = (structure.constant(operand) for operand in made.inputs[:2])
        if codes is None or scale is None:
            return ""
        # A code is at most 2^7 of 2^15 steps that it could be: it is the step that may be too small.
        array = np.asarray(scale, np.float32)
        return "" if fits(array * np.float32(16.0)) else f"the scale of '{value.name}' is too small for float16"
    if array is None or array.dtype != np.float32 or fits(array):
        return ""
    return f"'{value.name}' has numbers that float16 does not hold"


def _leave_islands(half: set[ir.Node], reasons: dict[ir.Node, str], version: int) -> None:
    """Leave in float32 what stands between nothing but float32: Casts on all sides cost more than it gains."""
    changed = True
    while changed:
        changed = False
        for node in [node for node in half if node.op_type not in HEAVY]:
            around = list(_neighbours(node, version))
            if around and not any(other in half for other in around):
                half.discard(node)
                reasons[node] = "all around it is float32"
                changed = True


def _neighbours(node: ir.Node, version: int) -> Iterator[ir.Node | None]:
    """Yield who makes the float values that a node reads, and who reads those that it makes; None is a caller."""
    places = slots(node, version)
    assert places is not None
    for index in places.inputs:
        value = structure.input_of(node, index)
        if structure.constant_tensor(value) is None:
            yield value.producer()
    for index in places.outputs:
        if node.outputs[index].is_graph_output():
            yield None
        yield from structure.readers(node.outputs[index])


class _Writer:
    """Writes float16 into one graph."""

    def __init__(self, graph: ir.Graph, half: set[ir.Node], version: int) -> None:
        self.graph = graph
        self.half = half
        #: As they are before any type changes.
        self.places = {node: slots(node, version) for node in half}
        self.taken = {value.name for inner in (graph, *graph.subgraphs()) for value in _values(inner)}
        self.casts: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}

    def write(self) -> None:
        """Turn results into float16, then give each reader the type that it reads."""
        narrowed = [node.outputs[index] for node in self.graph if node in self.half
                    for index in self._slots(node).outputs]  # fmt: skip
        for value in narrowed:
            self._keep_output(value)
        for value in narrowed:
            value.type = ir.TensorType(HALF)
        for node in list(self.graph):
            for index in self._slots(node).inputs:
                value = structure.input_of(node, index)
                if value.dtype is SINGLE:
                    node.replace_input_with(index, self._as(value, HALF))
            if node in self.half:
                _narrow_attributes(node)
        for value in narrowed:
            for node, index in list(value.uses()):
                indifferent = node.graph is self.graph and structure.is_standard(node, "Cast", "Shape", "Size")
                if index not in self._slots(node).inputs and not indifferent:
                    node.replace_input_with(index, self._as(value, SINGLE))
        for inner in self.graph.subgraphs():
            inner.outputs[:] = [self._as(value, SINGLE) if value in narrowed else value for value in inner.outputs]
        self.graph.sort()
        self._drop_idle_casts()

    def _drop_idle_casts(self) -> None:
        """Leave out Casts of what is float16 already: the model's own, of values that were float16 before."""
        for node in [node for node in self.graph if structure.is_standard(node, "Cast")]:
            source, result = structure.input_of(node, 0), node.outputs[0]
            if source.dtype is HALF and result.dtype is HALF and not result.is_graph_output():
                ir.convenience.replace_all_uses_with(result, source)
                self.graph.remove(node, safe=True)

    def _slots(self, node: ir.Node) -> Slots:
        return self.places.get(node) or Slots((), ())

    def _keep_output(self, value: ir.Value) -> None:
        """Put a Cast to float32 behind a result that is an output of the graph, which keeps its name and type."""
        if not value.is_graph_output():
            return
        name = structure.name_of(value)
        value.name = self._free(f"{name}_float16")
        given = self._cast(value, SINGLE, name)
        self.graph.outputs[:] = [given if output is value else output for output in self.graph.outputs]
        self.casts[value, SINGLE] = given

    def _as(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        """Return a value in another type: one Cast, or one constant, however many read it."""
        if (value, dtype) not in self.casts:
            array = structure.constant(value)
            suffix = "float16" if dtype is HALF else "float32"
            name = self._free(f"{value.name}_{suffix}")
            made = self._cast(value, dtype, name) if array is None else self._constant(array, name)
            self.casts[value, dtype] = made
        return self.casts[value, dtype]

    def _constant(self, array: npt.NDArray[np.float32], name: str) -> ir.Value:
        stored = ir.Value(name=name, const_value=scratch.tensor(array.astype(np.float16), name))
        stored.dtype, stored.shape = HALF, ir.Shape(array.shape)
        self.graph.register_initializer(stored)
        return stored

    def _cast(self, value: ir.Value, dtype: ir.DataType, name: str) -> ir.Value:
        node = ir.node("Cast", [value], {"to": int(dtype)}, name=f"{name}_Cast")
        made = node.outputs[0]
        made.name, made.type, made.shape = name, ir.TensorType(dtype), value.shape
        self.graph.append(node)
        return made

    def _free(self, name: str) -> str:
        while name in self.taken:
            name += "_"
        self.taken.add(name)
        return name


def _values(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from graph.inputs
    yield from graph.initializers.values()
    for node in graph:
        yield from node.outputs


def _narrow_attributes(node: ir.Node) -> None:
    for name in TYPE_ATTRIBUTES:
        attribute = node.attributes.get(name)
        if attribute is not None and attribute.type is ir.AttributeType.INT and attribute.value == SINGLE:
            node.attributes[name] = ir.AttrInt64(name, int(HALF))
    value = node.attributes.get("value")
    if node.op_type == "ConstantOfShape" and (value is None or value.as_tensor().dtype is SINGLE):
        array = np.zeros(1, np.float16) if value is None else value.as_tensor().numpy().astype(np.float16)
        node.attributes["value"] = ir.AttrTensor("value", ir.tensor(array))
