"""Split outlier channels: the range of one becomes that of several, each of which holds a part of it.

Behind an activation that tends to identity no factor folds, but

    f(x) = min(f(x), T) + Σ_i min(f(c · (x - t_i)), T) / c,    t_i = T + i · T / c

wherever x is far from the t_i, for GELU and its kind: what is lost elsewhere is what f is below zero, at most 0.17 / c
(SiLU: 0.28 / c). So what writes a channel is copied c times as steep with other biases, what reads it divided by c, and
no channel reaches farther than T. The minimum takes no time where the tensor becomes codes: saturation is what a
quantizer does. Channels are split by copies in Zhao et al. 2019, "Improving Neural Network Quantization without
Retraining using Outlier Channel Splitting", too, where the copies are halves, which asks for a linear function.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompile.core import numerics, scratch
from qcompile.core.contract import Effect, Refusal, Rewritten
from qcompile.core.plan import ChannelFactors
from qcompile.passes import structure
from qcompile.passes.canonicalize.editing import add_constant, free_name
from qcompile.passes.patterns import Activation, Projection, projection_of, recognise

Numbers = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Split(ir.passes.InPlacePass):
    """Copy the channels of activations that reach far, each copy for a part of the range.

    Parameters
    ----------
    chosen : mapping of str to ChannelFactors
        Of `How.SPLIT`, by the name of a value that linear operators read: `channels` holds a channel once for each
        further copy, `log2` the logarithm of how steep that is, and `high` is what none exceeds.
    """

    chosen: Mapping[str, ChannelFactors] = field(default_factory=dict)
    effect: ClassVar[Effect] = Effect.LOSSY

    def call(self, model: ir.Model) -> Rewritten:
        """Split in place; what cannot be is refused."""
        graph, refusals = model.graph, list[Refusal]()
        found = {activation.result: activation for activation in recognise(graph).activations}
        values = {value.name: value for node in graph for value in node.outputs}
        for name, chosen in self.chosen.items():
            value = values.get(name)
            place = Refusal(name, "no operator makes it") if value is None else splittable(value, found)
            if isinstance(place, Splittable) and not place.takes(chosen):
                place = Refusal(name, f"it has {place.projection.width} channels, not those that are to be split")
            if isinstance(place, Refusal):
                refusals.append(place)
            else:
                place.split(np.array(chosen.channels), chosen.factors, np.float32(chosen.high))
        graph.sort()
        return Rewritten(model, len(refusals) < len(self.chosen), tuple(refusals))


@dataclass(frozen=True, eq=False)
class Splittable:
    """An activation whose channels can be split.

    Attributes
    ----------
    projection
        What writes them.
    activation
        The function behind it, of several nodes or one.
    readers
        The MatMul or Gemm that read its result, all with constant weights.
    """

    projection: Projection
    activation: Activation
    readers: tuple[ir.Node, ...]

    def takes(self, chosen: ChannelFactors) -> bool:
        """Tell whether these are channels of it and their bound one."""
        known = all(0 <= channel < self.projection.width for channel in chosen.channels)
        return bool(chosen.channels) and known and len(chosen.log2) == len(chosen.channels) and chosen.high > 0.0

    def split(self, channels: npt.NDArray[np.int64], steep: Numbers, high: np.float32) -> None:
        """Append a copy for each channel, bounded like all others; the new node stands at the graph's end."""
        node, result = self.projection.node, self.activation.result
        graph, axis = node.graph, structure.weight_axis(node)
        assert isinstance(graph, ir.Graph)
        # Each copy of a channel begins where those before it end: f tends to factor · x.
        rank = np.array([np.sum(channels[:at] == channel) for at, channel in enumerate(channels)])
        starts = (1.0 + rank / steep) * (float(high) / self.activation.factor)
        _append(node, structure.WEIGHT_INPUT, channels, axis, steep)
        bias = _bias_of(self.projection)
        assert bias is not None, "splittable asked for it"
        _append(*bias, channels, -1, steep, starts)
        for value in (*self._between(), result):
            value.shape = ir.Shape([*list(value.shape or ())[:-1], self.projection.width + channels.size])
        name = free_name(graph, f"{result.name}/split")
        bound = add_constant(graph, f"{name}/bound", np.array(high, np.float32))
        bounded = ir.val(name, type=result.type, shape=result.shape)
        graph.append(ir.node("Min", [result, bound], outputs=[bounded], name=name))
        for reader in self.readers:
            rows = 1 - structure.weight_axis(reader)
            _append(reader, structure.WEIGHT_INPUT, channels, rows, 1.0 / steep)
            reader.replace_input_with(0, bounded)

    def _between(self) -> dict[ir.Value, None]:
        """Return what has these channels between the operator and the activation's result."""
        inner = [value for node in self.activation.nodes for value in node.outputs]
        return dict.fromkeys([self.projection.node.outputs[0], self.projection.result, *inner])


def splittable(value: ir.Value, activations: Mapping[ir.Value, Activation]) -> Splittable | Refusal:
    """Return what splitting a value's channels takes, or why it cannot be.

    Parameters
    ----------
    value
        What linear operators read.
    activations
        Those of the graph that were recognised, by result.
    """
    activation = activations.get(value)
    if activation is None:
        return Refusal(structure.name_of(value), "no activation that tends to identity makes it")
    projection = projection_of(activation.source)
    if projection is None or projection.node.op_type not in ("MatMul", "Gemm"):
        return Refusal(structure.name_of(activation.source), "no MatMul or Gemm with constant weights makes it")
    if _bias_of(projection) is None:
        return Refusal(structure.node_name(projection.node), "it has no bias of one number per channel")
    inside = [projection.node.outputs[0], projection.result]
    if activation.shared or not _read_by(activation.nodes, inside[1]) or any(x.is_graph_output() for x in inside):
        return Refusal(structure.name_of(activation.source), "others read what stands in front of the activation")
    readers = [reader for reader, _ in value.uses()]
    if value.is_graph_output() or not all(_multiplies(reader, value) for reader in readers):
        return Refusal(structure.name_of(value), "another operator than MatMul and Gemm with constant weights reads it")
    return Splittable(projection, activation, tuple(readers))


def _read_by(nodes: Sequence[ir.Node], value: ir.Value) -> bool:
    return all(reader in nodes for reader, _ in value.uses())


def _multiplies(node: ir.Node, value: ir.Value) -> bool:
    weight = structure.constant_tensor(node.inputs[structure.WEIGHT_INPUT]) if structure.is_linear(node) else None
    return (
        structure.is_standard(node, "MatMul", "Gemm")
        and weight is not None
        and len(weight.shape) == 2
        and node.inputs[0] is value
        and not node.attributes.get_int("transA", 0)
    )


def _bias_of(projection: Projection) -> tuple[ir.Node, int] | None:
    """Return who adds the bias, and as which input; None where there is none of one number per channel."""
    if projection.bias is None:
        adder, index = projection.node, 2
    else:
        adder = projection.bias
        index = 1 if adder.inputs[0] is projection.node.outputs[0] else 0
    bias = structure.constant(adder.inputs[index]) if len(adder.inputs) > index else None
    return (adder, index) if bias is not None and bias.size == projection.width else None


def _append(
    node: ir.Node,
    index: int,
    channels: npt.NDArray[np.int64],
    axis: int,
    factors: Numbers,
    less: Numbers | float = 0.0,
) -> None:
    """Append (copy - less) · factor of a constant's channels; who else reads the old one keeps it."""
    value = structure.input_of(node, index)
    array, graph = structure.constant(value), node.graph
    assert array is not None and isinstance(graph, ir.Graph), "splittable asked for constants"
    copies = (np.take(array, channels, axis) - less) * numerics.along_axis(factors, axis % array.ndim, array.ndim)
    longer = np.concatenate([array, copies.astype(array.dtype)], axis)
    if len(value.uses()) == 1:
        value.const_value, value.shape = scratch.tensor(longer, value.name), ir.Shape(longer.shape)
    else:
        node.replace_input_with(index, add_constant(graph, f"{value.name}/split", longer))
