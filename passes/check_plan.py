"""Check a plan that was read from a file, which anybody may have edited, against the model that it is for."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import onnx_ir as ir

from qcompile.core.errors import UsageError
from qcompile.core.plan import OpPlan, Precision, QuantPlan, Role, TensorQuant
from qcompile.core.rotation import Rotations
from qcompile.core.target import OpKind, OpRule, Target
from qcompile.passes import structure
from qcompile.passes.allocate_bits import HALVES
from qcompile.passes.obstacles import (
    integer_obstacle,
    linear_obstacle,
    lookup_obstacle,
    multiplies_activations,
    stored_obstacle,
)
from qcompile.passes.read_plan import is_quantized, read_ops
from qcompile.passes.rotations import rotatable

REMEDY = "correct the plan, or make it anew with 'qcompile plan'"


def check_plan(model: ir.Model, plan: QuantPlan, target: Target, place: object = "plan.json") -> QuantPlan:
    """Hold a plan to a model, and draw the consequences of what was edited.

    An operator whose precision was changed to float no longer gives codes, nor can it absorb the activation behind it,
    and scales that only it needed are dropped. A plan that nobody edited comes back as it is.

    Parameters
    ----------
    model : onnx_ir.Model
        Canonical.
    plan : QuantPlan
    target : Target
    place : object
        What an error is to name: the file.

    Returns
    -------
    QuantPlan
        What can be applied.

    Raises
    ------
    UsageError
        If it names what the model does not have, leaves an operator out, lacks a scale, has one that does not fit its
        tensor, or asks for integers that the target or the operator does not have.
    """
    checker = _Checker(model, plan, target, place)
    if is_quantized(model):
        if plan.tensors or dict(plan.ops) != read_ops(model, target):
            raise checker.error("decides for a model that is quantized already, whose own decisions stand")
        return plan
    checker.check_names()
    plan = checker.settle()
    checker = replace(checker, plan=plan)
    for node in model.graph.all_nodes():
        checker.check_op(node)
    used, values = checker.used(), ir.convenience.create_value_mapping(model.graph)
    tensors = {name: quant for name, quant in plan.tensors.items() if name in used}
    for name, quant in tensors.items():
        checker.check_tensor(values[name], quant)
    return replace(plan, tensors=tensors)


def check_rotations(model: ir.Model, rotations: Rotations, place: object = "plan.json") -> None:
    """Hold what a plan rotates to the model.

    Parameters
    ----------
    model : onnx_ir.Model
        Canonical.
    rotations : Rotations
    place : object
        What an error is to name: the file.

    Raises
    ------
    UsageError
        If it rotates what the model does not have, or what cannot be rotated so.
    """
    nodes = {structure.node_name(node): node for node in model.graph}
    for name in (*(one.place.node for one in rotations.folded), *(one.node for one in rotations.inputs)):
        if name not in nodes:
            raise UsageError(place, f"rotates at operator '{name}', which the model does not have", _near(name, nodes))
    known = rotatable(model.graph).places if rotations.folded else ()
    if wrong := next((one.place for one in rotations.folded if one.place not in known), None):
        fact = f"rotates the {wrong.site} at operator '{wrong.node}', with {wrong.width} channels, where none can be"
        raise UsageError(place, fact, REMEDY)


@dataclass(frozen=True)
class _Checker:
    model: ir.Model
    plan: QuantPlan
    target: Target
    place: object

    def error(self, fact: str, remedy: str = REMEDY) -> UsageError:
        return UsageError(self.place, fact, remedy)

    def check_names(self) -> None:
        """Hold the names of operators and tensors to those of the model."""
        nodes = {structure.node_name(node): node for node in self.model.graph.all_nodes()}
        values = ir.convenience.create_value_mapping(self.model.graph)
        for name, op in self.plan.ops.items():
            if name not in nodes:
                raise self.error(f"names operator '{name}', which the model does not have", _near(name, nodes))
            if op.op_type != nodes[name].op_type:
                raise self.error(f"has operator '{name}' as {op.op_type}, the model as {nodes[name].op_type}")
        for name in (*self.plan.tensors, *(op.output for op in self.plan.ops.values() if op.output)):
            if name not in values:
                raise self.error(f"names tensor '{name}', which the model does not have", _near(name, values))
        if left_out := next((name for name in nodes if name not in self.plan.ops), None):
            raise self.error(f"does not say what becomes of operator '{left_out}'")

    def settle(self) -> QuantPlan:
        """Take back what follows from an operator that does not run as integers any more."""
        ops = dict(self.plan.ops)
        for node in self.model.graph.all_nodes():
            name = structure.node_name(node)
            absorbed = _is_absorbed(node, ops)
            if absorbed and ops[name].precision is not Precision.INTEGER:
                remedy = "make the operator in front of it float as well, or let it give codes of its own"
                raise self.error(f"has '{name}' in float, but the operator in front of it absorbs it", remedy)
            if ops[name].precision is not Precision.INTEGER:
                ops[name] = replace(ops[name], output="", reason=ops[name].reason or "as the plan asks")
            elif not absorbed and ops[name].reason.startswith("absorbed by"):
                reason = "the operator in front of it does not absorb it"
                ops[name] = OpPlan(node.op_type, Precision.FLOAT, reason)
        return replace(self.plan, ops=ops)

    def check_output(self, node: ir.Node, op: OpPlan) -> None:
        """See that what leaves an operator as codes is its result, or that of an activation which it can absorb."""
        rule = self.target.ops[node.op_type]
        ends = (node, structure.absorbed_activation(node, rule.fuses))
        if op.output not in {structure.name_of(end.outputs[0]) for end in ends if end is not None}:
            fact = f"lets '{op.output}' leave operator '{structure.node_name(node)}' as codes"
            raise self.error(f"{fact}, which is not its result")

    def has_rule(self, node: ir.Node) -> bool:
        return node.domain in ("", "ai.onnx") and node.op_type in self.target.ops

    def used(self) -> set[str]:
        """Return the tensors whose scales somebody needs."""
        used = {op.output for op in self.plan.ops.values()}
        for node in self.model.graph:
            precision = self.plan.ops[structure.node_name(node)].precision
            if precision is Precision.INTEGER and not _is_absorbed(node, self.plan.ops):
                used |= {structure.name_of(value) for value in structure.activation_inputs(node)}
            if precision is not Precision.FLOAT:
                used |= self.weights(node)
        return used

    def weights(self, node: ir.Node) -> set[str]:
        """Return the names of what a node has as constant weights or as a constant table."""
        rule = self.target.ops.get(node.op_type)
        return set() if rule is None else {structure.name_of(v) for v, _ in structure.stored_weights(node, rule.kind)}

    def check_op(self, node: ir.Node) -> None:
        """Hold one operator's precision to what it and the target can do, and see that every scale is there."""
        name = structure.node_name(node)
        op = self.plan.ops[name]
        if op.precision is Precision.FLOAT or _is_absorbed(node, self.plan.ops):
            return
        if reason := self.obstacle(node, op):
            raise self.error(f"operator '{name}' ({op.op_type}) cannot be {op.precision.value}: {reason}")
        needed = [(weights, Role.WEIGHT) for weights in sorted(self.weights(node))]
        if op.precision is Precision.INTEGER:
            needed += [(structure.name_of(value), Role.ACTIVATION) for value in structure.activation_inputs(node)]
            if op.output:
                self.check_output(node, op)
                needed.append((op.output, Role.ACTIVATION))
        for tensor, role in needed:
            if tensor not in self.plan.tensors:
                raise self.error(f"has no scale for tensor '{tensor}', which operator '{name}' needs as codes")
            quant = self.plan.tensors[tensor]
            if quant.role is not role:
                raise self.error(f"tensor '{tensor}' is {quant.role} in it, operator '{name}' reads it as {role}")
            if quant.is_dynamic and (op.output or not self.target.ops[node.op_type].dynamic):
                raise self.error(f"tensor '{tensor}' has no scale, and operator '{name}' takes none at run time")

    def obstacle(self, node: ir.Node, op: OpPlan) -> str:
        """Return why an operator cannot have a precision other than float, or nothing."""
        if not self.has_rule(node):
            return f"{self.target.name} has no integer {node.op_type}"
        if node.graph is not self.model.graph:
            return "it stands inside a subgraph"
        rule = self.target.ops[node.op_type]
        if op.precision is Precision.WEIGHT_ONLY:
            return self.weights_obstacle(node, rule)
        if rule.kind in (OpKind.LOOKUP, OpKind.PACKED, OpKind.STORED):
            return "it looks rows up" if rule.kind is OpKind.LOOKUP else "it runs in float"
        if rule.kind is not OpKind.LINEAR or (rule.activations and multiplies_activations(node)):
            return ""
        return linear_obstacle(node) or integer_obstacle(node)

    def weights_obstacle(self, node: ir.Node, rule: OpRule) -> str:
        """Return why an operator in float cannot have integer weights, or nothing."""
        if not self.weights(node):
            return "it has no constant weights"
        if rule.kind is OpKind.STORED:
            return stored_obstacle(node, fewest=0)
        if rule.kind is OpKind.LINEAR and not rule.weight_only:
            return f"{self.target.name} takes no integer weights for a {node.op_type} in float"
        return (
            linear_obstacle(node)
            if rule.kind in (OpKind.LINEAR, OpKind.PACKED)
            else lookup_obstacle(node, fewest_rows=0)
        )

    def unpacked(self, value: ir.Value) -> bool:
        """Tell whether weights are read by operators in float alone."""
        ops = (self.plan.ops[structure.node_name(node)] for node in structure.readers(value))
        return all(op.precision is Precision.WEIGHT_ONLY for op in ops)

    def check_tensor(self, value: ir.Value, quant: TensorQuant) -> None:
        """Hold a tensor's scales to its shape and to the target's element types."""
        name = structure.name_of(value)
        weight = quant.role is Role.WEIGHT
        dtype = self.target.weight_dtype if weight else self.target.activation_dtype
        wide = weight and quant.dtype == self.target.wide_weight_dtype and self.unpacked(value)
        narrow = weight and quant.dtype == self.target.narrow_weight_dtype and not self.unpacked(value)
        halves = not weight and self.target.integer_only and quant.dtype == HALVES.get(dtype)
        if quant.dtype != dtype and not (wide or narrow or halves):
            raise self.error(f"tensor '{name}' is {quant.dtype}, {self.target.name} takes {dtype}")
        if quant.axis is None:
            return
        if not weight:
            raise self.error(f"tensor '{name}' has scales along axis {quant.axis}, an activation has one scale")
        shape = tuple(value.const_value.shape.numpy()) if value.const_value is not None else ()
        if not 0 <= quant.axis < len(shape):
            raise self.error(f"tensor '{name}' has no axis {quant.axis}, its shape is {list(shape)}")
        if len(quant.scale) != shape[quant.axis]:
            fact = f"tensor '{name}' has {len(quant.scale)} scales for {shape[quant.axis]} channels"
            raise self.error(f"{fact} along axis {quant.axis}")


def _is_absorbed(node: ir.Node, ops: Mapping[str, OpPlan]) -> bool:
    """Tell whether the integer operator in front of a node gives the node's result as its own."""
    producer = node.inputs[0].producer() if node.inputs and node.inputs[0] is not None else None
    if producer is None or not node.outputs:
        return False
    op = ops[structure.node_name(producer)]
    return op.precision is Precision.INTEGER and op.output == node.outputs[0].name


def _near(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"did you mean '{near[0]}'?" if near else REMEDY
