"""Place: which operators the target runs as integers, and which tensors must be measured for that.

All that is read is structure, the target's table, and what is wished for single operators; no number is known yet.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import onnx_ir as ir

from qcompile.core.plan import OpPlan, Precision
from qcompile.core.target import OpKind, OpRule, Target
from qcompile.passes import structure
from qcompile.passes.obstacles import (
    integer_obstacle,
    linear_obstacle,
    lookup_obstacle,
    multiplies_activations,
    stored_obstacle,
)
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
    dynamic : frozenset of str
        Those of `activations` whose range may be taken when the model runs.
    wide : frozenset of str
        Nodes in float whose weights are stored in the target's wider type.
    symmetric : frozenset of str
        Those of `activations` whose codes are around zero: their kernel multiplies them as it does weights.
    """

    ops: Mapping[str, OpPlan]
    activations: tuple[str, ...]
    same_scale: Mapping[str, str]
    dynamic: frozenset[str] = frozenset()
    wide: frozenset[str] = frozenset()
    symmetric: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Wish:
    """What somebody wants an operator to be, against what structure and target alone would make of it.

    Parameters
    ----------
    precision : Precision
        FLOAT and WEIGHT_ONLY keep its arithmetic in float. INTEGER takes weights in however few they are; what the
        target cannot run as integers stays in float all the same, for the reason that it has.
    reason : str
        Why, as the plan is to say it.
    wide : bool
        With WEIGHT_ONLY: weights in the target's wider type. Where it has none they stay float.
    """

    precision: Precision
    reason: str
    wide: bool = False

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> Self:
        """Read what `dataclasses.asdict` made of one, after a way through JSON."""
        return cls(Precision(entry["precision"]), str(entry["reason"]), bool(entry["wide"]))


def place(
    model: ir.Model, target: Target, weights: bool, activations: bool, wishes: Mapping[str, Wish] | None = None
) -> Placement:
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
    wishes : mapping of str to Wish, optional
        By node name; one for integer weights counts even where `weights` is not set. A model that is quantized already
        leaves nothing to wish for.
    """
    if is_quantized(model):
        # Somebody else's decisions (QAT, another tool) stand: there is nothing left to place or to measure.
        return Placement(read_ops(model, target), (), {})
    placer = _Placer(target, weights, activations, wishes or {})
    nodes = list(model.graph.all_nodes())
    for node in nodes:
        placer.consider(node, inside=node.graph is not model.graph)
    outside = [node for node in nodes if node.graph is model.graph]
    placer.extend_forward(outside)
    placer.extend_backward(outside)
    placer.extend_residuals(outside)
    return placer.placement(nodes)


def code_readers(model: ir.Model, placement: Placement) -> dict[str, frozenset[str]]:
    """Return for each measured value the nodes that will read its codes, everything else its float values.

    A value that leaves an integer operator as codes is not listed: all its readers get what is left of it.
    """
    written = {op.output for op in placement.ops.values()}
    values = ir.convenience.create_value_mapping(model.graph)
    return {
        name: frozenset(node for node in map(structure.node_name, structure.readers(values[name]))
                        if placement.ops[node].precision is Precision.INTEGER)
        for name in placement.activations
        if name not in written
    }  # fmt: skip


def sparing(model: ir.Model, placement: Placement, names: Mapping[str, str]) -> dict[str, Wish]:
    """Return what to wish for so that these values keep their float values; weights stay stored as integers.

    Parameters
    ----------
    model : onnx_ir.Model
    placement : Placement
        In which they are measured.
    names : mapping of str to str
        By value name, the reason, as the plan is to say it of the operators that read or write the value's codes.
    """
    values = ir.convenience.create_value_mapping(model.graph)
    same: dict[str, list[str]] = {}
    for name, source in placement.same_scale.items():
        same.setdefault(source, []).append(name)
    found: dict[str, Wish] = {}
    for name, reason in names.items():
        for value in (values[name], *(values[other] for other in same.get(name, ()))):
            # Who reads the value in integers would quantize it, whoever writes it.
            nodes = [structure.node_name(node) for node in structure.readers(value)]
            nodes += [node for node, op in placement.ops.items() if op.output == value.name]
            for node in nodes:
                if placement.ops[node].precision is Precision.INTEGER:
                    found.setdefault(node, Wish(Precision.WEIGHT_ONLY, reason))
    return found


class _Placer:
    """The state of one placement: what is known of each node so far."""

    def __init__(self, target: Target, weights: bool, activations: bool, wishes: Mapping[str, Wish]) -> None:
        self.target = target
        self.wishes = wishes
        self.weights = weights
        self.activations = activations
        self.ops: dict[str, OpPlan] = {}
        self.absorbed: dict[str, ir.Node] = {}
        self.channel_axes: dict[str, int] = {}

    def rule(self, node: ir.Node) -> OpRule | None:
        return self.target.ops.get(node.op_type) if node.domain in ("", "ai.onnx") else None

    def kept_in_float(self, node: ir.Node) -> bool:
        """Tell whether somebody wishes that an operator computes in float."""
        wish = self.wishes.get(structure.node_name(node))
        return wish is not None and wish.precision is not Precision.INTEGER

    def consider(self, node: ir.Node, inside: bool) -> None:
        """Take the operators with weights in; note for the others why they stay in float."""
        name = structure.node_name(node)
        if (obstacle := self.obstacle(node, inside)) is not None:
            self.ops[name] = OpPlan(node.op_type, Precision.FLOAT, obstacle)
        elif self.target.ops[node.op_type].kind is OpKind.LOOKUP:
            self.ops[name] = OpPlan(node.op_type, Precision.WEIGHT_ONLY, "a table lookup: rows are dequantized")
        elif self.kept_in_float(node):
            self.ops[name] = OpPlan(node.op_type, Precision.WEIGHT_ONLY, self.wishes[name].reason)
        elif self.target.ops[node.op_type].kind in (OpKind.PACKED, OpKind.STORED):
            self.ops[name] = OpPlan(node.op_type, Precision.WEIGHT_ONLY, f"{self.target.name} runs it in float")
        elif reason := integer_obstacle(node):
            self.ops[name] = OpPlan(node.op_type, Precision.WEIGHT_ONLY, reason)
        elif self.activations:
            self._take(node, self.target.ops[node.op_type])
        else:
            self.ops[name] = OpPlan(node.op_type, Precision.WEIGHT_ONLY, "activations stay in float")

    def obstacle(self, node: ir.Node, inside: bool) -> str | None:
        """Return why a node is not taken for the sake of its weights, or None."""
        rule, wish = self.rule(node), self.wishes.get(structure.node_name(node))
        narrow = wish is not None and wish.wide and not self.target.wide_weight_dtype
        if wish is not None and (narrow or wish.precision is Precision.FLOAT):
            return wish.reason
        if inside:
            reason = "it stands inside a subgraph"
        elif rule is None:
            absorbable = any(node.op_type in other.fuses for other in self.target.ops.values())
            fate = "not absorbed by the operator in front of it"
            kernel = f": {why}" if (why := self.target.absent.get(node.op_type)) else ""
            reason = fate if absorbable else f"{self.target.name} has no integer {node.op_type}{kernel}"
        elif rule.kind in (OpKind.ELEMENTWISE, OpKind.PASSTHROUGH, OpKind.RESIDUAL):
            reason = "not between integer operators"
        else:
            return self._weights_obstacle(node, rule, wish)
        return wish.reason if wish is not None and self.kept_in_float(node) else reason

    def _weights_obstacle(self, node: ir.Node, rule: OpRule, wish: Wish | None) -> str | None:
        """Return why constant weights are not stored as integers, or None."""
        if rule.kind is OpKind.LOOKUP:
            reason = lookup_obstacle(node, fewest_rows=0 if wish else FEWEST_ROWS)
        elif rule.kind is OpKind.STORED:
            reason = stored_obstacle(node, 0 if wish else rule.fewest_weights)
        else:
            reason = self._linear_obstacle(node, 0 if wish else rule.fewest_weights)
        if not reason and not self.weights and wish is None:
            reason = "weights stay in float as asked"
        stays_float = not self.activations or self.kept_in_float(node) or bool(integer_obstacle(node))
        if not reason and rule.kind is OpKind.LINEAR and stays_float and not rule.weight_only:
            fact = f"{self.target.name} takes no integer weights for a {node.op_type} in float"
            reason = "activations stay in float" if wish is None else fact
        if reason and wish is not None and self.kept_in_float(node):
            return f"{wish.reason}, weights too: {reason}"
        return reason or None

    def _linear_obstacle(self, node: ir.Node, fewest_weights: int) -> str:
        """Return why a linear operator is not quantized, beside and behind those that were taken in."""
        if reason := linear_obstacle(node):
            rule = self.target.ops[node.op_type]
            return "" if rule.activations and multiplies_activations(node) and self.activations else reason
        value = node.inputs[structure.WEIGHT_INPUT]
        weight = structure.constant_tensor(value)
        assert value is not None and weight is not None
        if self.behind_inexact_pool(node.inputs[0]) and not self.kept_in_float(node):
            return "its input is from a pool that has no faithful integer kernel, which a Q behind it would call"
        if weight.size < fewest_weights:
            return f"its {weight.size} weights are too few to gain from integers"
        axis = self.channel_axes.setdefault(structure.name_of(value), structure.weight_axis(node))
        return "" if axis == structure.weight_axis(node) else f"weights '{value.name}' are shared along another axis"

    def behind_inexact_pool(self, value: ir.Value | None) -> bool:
        """Tell whether a value comes, through operators that move codes, from an AveragePool to keep clear of.

        ONNX Runtime takes any pool between DQ and Q to its integer kernel, which knows neither dilations nor how to
        count the padding of a last window that is cut off.
        """
        if self.target.integer_only:
            return False
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
        if activation is not None and self.kept_in_float(activation):
            activation = None
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
            return self.target.integer_only and value.is_graph_input()
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
            if structure.node_name(node) in self.absorbed or self.kept_in_float(node):
                continue
            # A target without floats makes numbers of constants when it lowers, and refuses what it cannot.
            constants = _other_float_inputs(node) and not self.target.integer_only
            if constants or any(self.behind_inexact_pool(value) for value in node.outputs):
                continue
            inputs = list(structure.activation_inputs(node))
            if inputs and all(self.arrives_as_codes(value) for value in inputs):
                self._take(node, rule)
                taken.append(node)
        for node in reversed(taken):
            name = structure.node_name(node)
            # What has no float takes nothing back; where there is some, codes of what floats alone read are noise.
            if self.target.integer_only and (node.op_type not in self.target.floats or self.ends(node)):
                continue
            behind = [n for n, source in self.absorbed.items() if source is node]
            value = node.outputs[0] if not behind else structure.readers(node.outputs[0])[0].outputs[0]
            if not self.wants_codes(value):
                for activation in behind:
                    del self.absorbed[activation]
                self.ops[name] = OpPlan(node.op_type, Precision.FLOAT, "no integer operator reads its result")

    def ends(self, node: ir.Node) -> bool:
        """Tell whether a result, or what an absorbed activation makes of it, leaves the model."""
        behind = [
            reader for reader in structure.readers(node.outputs[0]) if structure.node_name(reader) in self.absorbed
        ]
        return any(value.is_graph_output() for each in (node, *behind) for value in each.outputs)

    def extend_backward(self, nodes: list[ir.Node]) -> None:
        """Take in operators that move codes where all their readers take codes."""
        for node in reversed(nodes):
            rule = self.rule(node)
            if rule is None or rule.kind is not OpKind.PASSTHROUGH or self.is_integer(node) or not self.activations:
                continue
            if structure.node_name(node) in self.absorbed or self.kept_in_float(node) or len(node.outputs) != 1:
                continue
            value, inputs = node.outputs[0], list(structure.activation_inputs(node))
            behind = structure.readers(value)
            if len(inputs) != 1 or value.is_graph_output() or not behind:
                continue
            if all(self.is_integer(reader) and value in structure.activation_inputs(reader) for reader in behind):
                self.ops[structure.node_name(node)] = OpPlan(
                    node.op_type, Precision.INTEGER, output=structure.name_of(value)
                )

    def extend_residuals(self, nodes: list[ir.Node]) -> None:
        """Take in sums of what an integer Conv makes, which it makes for them alone, and something else."""
        for node in nodes if self.activations else ():
            rule = self.rule(node)
            asked = rule is not None and rule.kind is OpKind.RESIDUAL and not self.kept_in_float(node)
            if rule is not None and asked and structure.residual_branch(node, self.is_integer) is not None:
                self._take(node, rule)

    def placement(self, nodes: list[ir.Node]) -> Placement:
        """Say which values must be measured and which share a scale."""
        own: dict[str, bool] = {}
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
                    own[value] = own.get(value, True) and self.takes_any_range(node)
            rule, output = self.rule(node), ops[name].output
            if output and rule is not None and rule.kind is OpKind.PASSTHROUGH:
                same[output] = same.get(inputs[0], inputs[0])
            elif output:
                own[output] = False
        found = {value: dynamic for value, dynamic in own.items() if value not in same}
        dynamic = frozenset(value for value, dynamic in found.items() if dynamic)
        second = {structure.name_of(structure.input_of(node, 1)) for node in nodes
                  if self.is_integer(node) and multiplies_activations(node)}  # fmt: skip
        symmetric = frozenset(same.get(value, value) for value in second)
        return Placement(ops, tuple(found), same, dynamic, self.wide(ops), symmetric)

    def wide(self, ops: Mapping[str, OpPlan]) -> frozenset[str]:
        """Return the operators with wide weights."""
        if not self.target.wide_weight_dtype:
            return frozenset()
        return frozenset(name for name, op in ops.items() if op.precision is Precision.WEIGHT_ONLY
                         and name in self.wishes and self.wishes[name].wide)  # fmt: skip

    def takes_any_range(self, node: ir.Node) -> bool:
        """Tell whether an integer operator can do with a range that is taken when the model runs."""
        rule, op = self.rule(node), self.ops[structure.node_name(node)]
        return rule is not None and rule.dynamic and not op.output


def _other_float_inputs(node: ir.Node) -> bool:
    """Tell whether a node reads a float constant: its integer kernel would need that as codes as well."""
    return any(structure.is_float32(value) and structure.constant_tensor(value) is not None for value in node.inputs)
