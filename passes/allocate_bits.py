"""Decide: which operators run as integers on the target, and with which scales. The graph stays as it is.

`place` reads structure and target only and says which tensors must be measured; `allocate_bits` turns the measurements
into the plan. Between the two lies the one calibration run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from qcompile.calib.collect import Statistics
from qcompile.calib.observers import Observer, value_range
from qcompile.core import numerics
from qcompile.core.plan import OpPlan, Precision, QuantPlan, Role, TensorQuant
from qcompile.core.target import OpKind, OpRule, Target
from qcompile.passes import structure
from qcompile.passes.read_plan import is_quantized, read_ops

#: A table with fewer rows costs more in scales and nodes than its codes save.
FEWEST_ROWS = 256


@dataclass(frozen=True)
class Placement:
    """Which operators become what, before any number is known.

    Parameters
    ----------
    ops : mapping of str to OpPlan
        By node name, in the graph's order.
    activations : tuple of str
        Values that get a scale of their own and must be measured.
    same_scale : mapping of str to str
        Values that take the scale of one of `activations`.
    """

    ops: Mapping[str, OpPlan]
    activations: tuple[str, ...]
    same_scale: Mapping[str, str]


def place(model: ir.Model, target: Target, weights: bool, activations: bool) -> Placement:
    """Choose the operators that the target runs as integers.

    Linear operators are quantized for their own sake; elementwise ones where their inputs arrive as codes and a reader
    takes codes; those that only move codes also where all their readers take codes, because a Q in front of them moves
    a quarter of the bytes.

    Parameters
    ----------
    model : onnx_ir.Model
        Canonical.
    target : Target
    weights, activations : bool
        Whether each may be quantized. Without activations, weights are stored as integers only.
    """
    if is_quantized(model):
        # Somebody else's decisions (QAT, another tool) stand: there is nothing left to place or to measure.
        return Placement(read_ops(model, target), (), {})
    placer = _Placer(target, weights, activations)
    nodes = list(model.graph.all_nodes())
    for node in nodes:
        placer.consider(node, inside=node.graph is not model.graph)
    placer.extend_forward(nodes)
    placer.extend_backward(nodes)
    return placer.placement(nodes)


class _Placer:
    """The state of one placement: what is known of each node so far."""

    def __init__(self, target: Target, weights: bool, activations: bool) -> None:
        self.target = target
        self.weights = weights
        self.activations = activations
        self.ops: dict[str, OpPlan] = {}
        self.absorbed: dict[str, ir.Node] = {}
        self.channel_axes: dict[str, int] = {}

    def rule(self, node: ir.Node) -> OpRule | None:
        return self.target.ops.get(node.op_type) if node.domain in ("", "ai.onnx") else None

    def consider(self, node: ir.Node, inside: bool) -> None:
        """Take the operators with weights in; note for the others why they stay in float."""
        rule, name = self.rule(node), structure.node_name(node)
        if rule is None:
            absorbable = any(node.op_type in other.fuses for other in self.target.ops.values())
            fate = "not absorbed by the operator in front of it"
            reason = fate if absorbable else f"{self.target.name} has no integer {node.op_type}"
            self.ops[name] = OpPlan(node.op_type, Precision.FLOAT, reason)
            return
        if inside:
            self.ops[name] = OpPlan(node.op_type, Precision.FLOAT, "it stands inside a subgraph")
            return
        if rule.kind in (OpKind.ELEMENTWISE, OpKind.PASSTHROUGH):
            self.ops[name] = OpPlan(node.op_type, Precision.FLOAT, "not between integer operators")
            return
        reason = _lookup_obstacle(node) if rule.kind is OpKind.LOOKUP else self._linear_obstacle(node, rule)
        if reason or not self.weights:
            self.ops[name] = OpPlan(node.op_type, Precision.FLOAT, reason or "weights stay in float as asked")
        elif rule.kind is OpKind.LOOKUP:
            self.ops[name] = OpPlan(node.op_type, Precision.WEIGHT_ONLY, "a table lookup: rows are dequantized")
        elif self.activations:
            self._take(node, rule)
        elif rule.weight_only:
            self.ops[name] = OpPlan(node.op_type, Precision.WEIGHT_ONLY, "activations stay in float")
        else:
            self.ops[name] = OpPlan(node.op_type, Precision.FLOAT, "activations stay in float")

    def _linear_obstacle(self, node: ir.Node, rule: OpRule) -> str:
        """Return why a linear operator is not quantized, beside and behind those that were taken in."""
        if reason := _linear_obstacle(node):
            return reason
        value = node.inputs[structure.WEIGHT_INPUT]
        weight = structure.constant_tensor(value)
        assert value is not None and weight is not None
        if self.behind_inexact_pool(node.inputs[0]):
            return "its input is from a pool that has no faithful integer kernel, which a Q behind it would call"
        if weight.size < rule.fewest_weights:
            return f"its {weight.size} weights are too few to gain from integers"
        axis = self.channel_axes.setdefault(structure.name_of(value), structure.weight_axis(node))
        return "" if axis == structure.weight_axis(node) else f"weights '{value.name}' are shared along another axis"

    def behind_inexact_pool(self, value: ir.Value | None) -> bool:
        """Tell whether a value comes, through operators that move codes, from an AveragePool to keep clear of.

        ONNX Runtime takes any pool between DQ and Q to its integer kernel, which knows neither dilations nor how to
        count the padding of a last window that is cut off.
        """
        node = value.producer() if value is not None else None
        while node is not None and (rule := self.rule(node)) is not None and rule.kind is OpKind.PASSTHROUGH:
            node = node.inputs[0].producer() if node.inputs[0] is not None else None
        if node is None or node.op_type != "AveragePool":
            return False
        dilations = node.attributes.get_ints("dilations", (1,))
        return node.attributes.get_int("ceil_mode", 0) != 0 or any(step != 1 for step in dilations)

    def _take(self, node: ir.Node, rule: OpRule) -> None:
        name = structure.node_name(node)
        output = ""
        activation = structure.absorbed_activation(node, rule.fuses)
        if not rule.quantized_output and activation is not None and activation.outputs[0].is_graph_output():
            activation = None
        if rule.quantized_output or activation is not None:
            output = structure.name_of((activation or node).outputs[0])
            if activation is not None:
                self.absorbed[structure.node_name(activation)] = node
        self.ops[name] = OpPlan(node.op_type, Precision.INTEGER, output=output)

    def is_integer(self, node: ir.Node) -> bool:
        return self.ops[structure.node_name(node)].precision is Precision.INTEGER

    def arrives_as_codes(self, value: ir.Value) -> bool:
        """Tell whether a value leaves an integer operator (or the activation that it absorbs) as codes."""
        producer = value.producer()
        if producer is None:
            return False
        producer = self.absorbed.get(structure.node_name(producer), producer)
        return self.ops[structure.node_name(producer)].output == value.name

    def wants_codes(self, value: ir.Value) -> bool:
        """Tell whether an integer operator reads the value as an activation."""
        return any(self.is_integer(reader) and value in structure.activation_inputs(reader)
                   for reader in structure.readers(value))  # fmt: skip

    def extend_forward(self, nodes: list[ir.Node]) -> None:
        """Take in what lies between integer operators, then give back what no integer operator reads."""
        taken = []
        for node in nodes:
            rule = self.rule(node)
            if rule is None or rule.kind not in (OpKind.ELEMENTWISE, OpKind.PASSTHROUGH) or not self.activations:
                continue
            if structure.node_name(node) in self.absorbed or _other_float_inputs(node):
                continue
            if any(self.behind_inexact_pool(value) for value in node.outputs):
                continue
            inputs = list(structure.activation_inputs(node))
            if inputs and all(self.arrives_as_codes(value) for value in inputs):
                self._take(node, rule)
                taken.append(node)
        for node in reversed(taken):
            name = structure.node_name(node)
            behind = [n for n, source in self.absorbed.items() if source is node]
            value = node.outputs[0] if not behind else structure.readers(node.outputs[0])[0].outputs[0]
            if not self.wants_codes(value):
                for activation in behind:
                    del self.absorbed[activation]
                self.ops[name] = OpPlan(node.op_type, Precision.FLOAT, "no integer operator reads its result")

    def extend_backward(self, nodes: list[ir.Node]) -> None:
        """Take in operators that move codes where all their readers take codes."""
        for node in reversed(nodes):
            rule = self.rule(node)
            if rule is None or rule.kind is not OpKind.PASSTHROUGH or self.is_integer(node) or not self.activations:
                continue
            if structure.node_name(node) in self.absorbed or len(node.outputs) != 1:
                continue
            value, inputs = node.outputs[0], list(structure.activation_inputs(node))
            behind = structure.readers(value)
            if len(inputs) != 1 or value.is_graph_output() or not behind:
                continue
            if all(self.is_integer(reader) and value in structure.activation_inputs(reader) for reader in behind):
                self.ops[structure.node_name(node)] = OpPlan(
                    node.op_type, Precision.INTEGER, output=structure.name_of(value)
                )

    def placement(self, nodes: list[ir.Node]) -> Placement:
        """Say which values must be measured and which share a scale."""
        own: dict[str, None] = {}
        same: dict[str, str] = {}
        ops = dict(self.ops)
        for node in nodes:
            name = structure.node_name(node)
            if name in self.absorbed:
                source = self.absorbed[name]
                ops[name] = OpPlan(node.op_type, Precision.INTEGER, f"absorbed by {source.op_type} '{source.name}'")
                continue
            if not self.is_integer(node):
                continue
            inputs = [structure.name_of(value) for value in structure.activation_inputs(node)]
            for value in inputs:
                if value not in same:
                    own[value] = None
            rule, output = self.rule(node), ops[name].output
            if output and rule is not None and rule.kind is OpKind.PASSTHROUGH:
                same[output] = same.get(inputs[0], inputs[0])
            elif output:
                own[output] = None
        return Placement(ops, tuple(value for value in own if value not in same), same)


def _other_float_inputs(node: ir.Node) -> bool:
    """Tell whether a node reads a float constant: its integer kernel would need that as codes as well."""
    return any(structure.is_float32(value) and structure.constant_tensor(value) is not None for value in node.inputs)


def _linear_obstacle(node: ir.Node) -> str:
    """Return why a linear operator cannot be quantized, or nothing."""
    weight = structure.constant_tensor(node.inputs[structure.WEIGHT_INPUT])
    if weight is None:
        return _activation_obstacle(node)
    if weight.dtype is not ir.DataType.FLOAT or not structure.is_float32(node.inputs[0]):
        return f"its weights are {weight.dtype.name.lower()}, not float32"
    if node.op_type == "MatMul" and len(weight.shape) != 2:
        return f"its weights have {len(weight.shape)} axes"
    if weight.size == 0 or structure.constant_tensor(node.inputs[0]) is not None:
        return "it computes on constants only"
    return _gemm_obstacle(node) or _bias_obstacle(node, weight)


def _activation_obstacle(node: ir.Node) -> str:
    """Return what stands where a linear operator's constant weights should."""
    if structure.constant_tensor(node.inputs[0]) is not None:
        return "its constant is the first operand"
    value = node.inputs[structure.WEIGHT_INPUT]
    if value is not None and value.is_initializer():
        return "its weights are an input with a default, which a caller may replace"
    return "both operands are activations" if node.op_type == "MatMul" else "its weights are not constant"


def _gemm_obstacle(node: ir.Node) -> str:
    if node.op_type != "Gemm":
        return ""
    if node.attributes.get_int("transA", 0) or node.attributes.get_float("alpha", 1.0) != 1.0:
        return "Gemm with transA or alpha has no integer kernel"
    if len(node.inputs) > structure.BIAS_INPUT and node.attributes.get_float("beta", 1.0) != 1.0:
        return "Gemm with beta has no integer kernel"
    return ""


def _bias_obstacle(node: ir.Node, weight: ir.TensorProtocol) -> str:
    if node.op_type not in structure.BIASED_OPS or len(node.inputs) <= structure.BIAS_INPUT:
        return ""
    bias = node.inputs[structure.BIAS_INPUT]
    constant = structure.constant_tensor(bias)
    per_channel = constant is not None and tuple(constant.shape) == (weight.shape[structure.weight_axis(node)],)
    return "" if bias is None or per_channel else "its bias is not a constant per channel"


def _lookup_obstacle(node: ir.Node) -> str:
    """Return why a Gather's table cannot be stored as integers, or nothing."""
    table = structure.constant_tensor(node.inputs[0])
    if table is None:
        return "it picks from an activation"
    if table.dtype is not ir.DataType.FLOAT or len(table.shape) != 2 or node.attributes.get_int("axis", 0) != 0:
        return "its table is not float32 rows"
    if table.shape.numpy()[0] < FEWEST_ROWS:
        return "its table is too small to be worth scales"
    value = node.inputs[0]
    if value is not None and any(reader is not node for reader in structure.readers(value)):
        return "its table is read by another operator too"
    return ""


def allocate_bits(
    model: ir.Model,
    placement: Placement,
    statistics: Statistics,
    target: Target,
    observers: Mapping[str, Observer] | Observer,
) -> QuantPlan:
    """Turn a placement and measurements into the plan.

    Parameters
    ----------
    model : onnx_ir.Model
        The model that was placed and measured.
    placement : Placement
    statistics : Statistics
        Has every value of ``placement.activations``.
    target : Target
    observers : Observer or mapping of str to Observer
        How the activations' ranges are chosen: one way for all, or one for every value of ``placement.activations``.
    """
    tensors: dict[str, TensorQuant] = {}
    for name in placement.activations:
        observer = observers if isinstance(observers, Observer) else observers[name]
        low, high = value_range(statistics.histograms[name], observer, target.activation_dtype)
        scale, zero_point = numerics.affine_scale([low], [high], target.activation_dtype)
        tensors[name] = TensorQuant(Role.ACTIVATION, target.activation_dtype, (float(scale[0]),), (int(zero_point[0]),))
    for name, source in placement.same_scale.items():
        tensors[name] = tensors[source]
    for node in model.graph:
        rule = target.ops.get(node.op_type)
        op = placement.ops.get(structure.node_name(node))
        if rule is None or rule.kind not in (OpKind.LINEAR, OpKind.LOOKUP):
            continue
        if op is None or op.precision is Precision.FLOAT:
            continue
        lookup = rule.kind is OpKind.LOOKUP
        value = node.inputs[0 if lookup else structure.WEIGHT_INPUT]
        if value is None or structure.constant_tensor(value) is None:
            continue
        weight = structure.name_of(value)
        quant = _weight_quant(node, value, target, lookup, tensors)
        if weight in tensors:
            # Two operators share these weights, and either may need room for its bias.
            both = zip(quant.scale, tensors[weight].scale, strict=True)
            quant = replace(quant, scale=tuple(map(max, both)))
        tensors[weight] = quant
    return QuantPlan(tensors, placement.ops)


def _weight_quant(
    node: ir.Node, value: ir.Value, target: Target, lookup: bool, tensors: Mapping[str, TensorQuant]
) -> TensorQuant:
    """Give weights a symmetric scale per output channel (per column of a table)."""
    weight = structure.constant(value)
    assert weight is not None
    axis = weight.ndim - 1 if lookup else structure.weight_axis(node)
    others = tuple(a for a in range(weight.ndim) if a != axis)
    absmax = np.max(np.abs(weight), axis=others if target.per_channel or lookup else None).reshape(-1)
    scale = numerics.symmetric_scale(absmax, target.weight_dtype)
    activation = None if lookup else tensors.get(structure.name_of(node.inputs[0]))  # type: ignore[arg-type]
    bias = structure.constant(node.inputs[structure.BIAS_INPUT]) if len(node.inputs) > structure.BIAS_INPUT else None
    if activation is not None and bias is not None and node.op_type in structure.BIASED_OPS:
        # The scale of dead weights is arbitrary: it becomes the finest that has room for the bias, all that is left.
        alive = np.where(np.float64(absmax) >= scale, scale, np.float32(0.0))
        scale = _room_for_bias(alive, activation.scale[0], bias)
    return TensorQuant(
        Role.WEIGHT, target.weight_dtype, tuple(map(float, scale)), (0,) * scale.size, axis if scale.size > 1 else None
    )


def _room_for_bias(
    scale: numerics.FloatArray, activation_scale: float, bias: numerics.FloatArray
) -> numerics.FloatArray:
    """Raise weight scales until the bias fits int32 in steps of (activation scale · weight scale).

    A channel of nearly dead weights has a tiny scale, and a bias of ordinary size in its steps overflows the
    accumulator's type; coarser steps for weights that small cost nothing.
    """
    least = np.abs(np.float64(bias)) / (activation_scale * float(2**31 - 1) * 0.5)
    room = np.maximum(scale, least.astype(np.float32) if scale.size > 1 else np.float32(least.max()))
    return np.where(room >= numerics.SMALLEST_SCALE, room, np.float32(1.0))
