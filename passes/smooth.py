"""Smooth: divide the channels of activations by frozen factors, and take these back in the weights that read them.

Xiao et al. 2023, "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models", where the
graph proves that it is the same function: (X / s) · (s · W) = X · W. `scale_groups` has the proof.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompile.calib.smoothing import by_class
from qcompile.core import scratch
from qcompile.core.contract import Effect, Refusal, Rewritten
from qcompile.core.plan import ChannelFactors, How
from qcompile.passes import structure
from qcompile.passes.canonicalize.editing import add_constant, free_name
from qcompile.passes.patterns import Patterns, recognise
from qcompile.passes.scale_groups import Fold, ScaleGroup, linear_readings, scale_group
from qcompile.passes.set_aside import set_aside
from qcompile.passes.shift import Shift


@dataclass(frozen=True)
class Smooth(ir.passes.InPlacePass):
    """Fold factors where the graph proves that everything around takes them back, elsewhere add the one Mul planned.

    Parameters
    ----------
    smoothing : mapping of str to ChannelFactors
        By the name of a value that linear operators read.
    """

    smoothing: Mapping[str, ChannelFactors] = field(default_factory=dict)
    effect: ClassVar[Effect] = Effect.CLOSE

    def call(self, model: ir.Model) -> Rewritten:
        """Apply all factors; what has none, or cannot take them in, is refused."""
        graph, refusals = model.graph, list[Refusal]()
        every = {structure.node_name(node) for node in graph}
        axes = {structure.name_of(value): (value, axis) for value, axis in linear_readings(graph, every)}
        shifted = self._shift(graph, axes, refusals)
        patterns = recognise(graph)
        # All groups are found before the first is changed: a Mul more would be in the way of the next.
        groups = []
        for name, chosen in self.smoothing.items():
            group = self._group(axes, name, chosen, patterns)
            if isinstance(group, Refusal):
                refusals.append(group)
            else:
                groups.append((group, group.per_class(chosen.factors) if chosen.log2 else chosen.factors))
                refusals += [Refusal(name, chosen.reason)] if chosen.reason else []
        for group, factors in groups:
            for fold in group.folds if factors.size else ():
                _fold(fold, factors)
        for group, factors in groups:
            if self.smoothing[structure.name_of(group.root)].how is How.ASIDE:
                obstacle = set_aside(graph, group, self.smoothing[structure.name_of(group.root)])
                refusals += [] if obstacle is None else [obstacle]
            elif group.how in (How.RESTORE, How.BRANCH):
                _multiply(graph, group, by_class(factors, group.classes))
        graph.sort()
        return Rewritten(model, bool(groups) or shifted, tuple(refusals))

    def _shift(self, graph: ir.Graph, axes: Mapping[str, tuple[ir.Value, int]], refusals: list[Refusal]) -> bool:
        """Take off each tensor's channels what the plan says, in front of their division; tell whether any was."""
        wanted = {name: chosen.shift for name, chosen in self.smoothing.items() if chosen.shift and name in axes}
        norms = {norm.result: norm for norm in recognise(graph).norms} if wanted else {}
        modified = False
        for name, z in wanted.items():
            shift = Shift(axes[name][0], np.array(z), norms)
            obstacle = shift.obstacle()
            if obstacle is not None:
                refusals.append(Refusal(name, f"its channels are not shifted: {obstacle.reason} ('{obstacle.node}')"))
                continue
            shift.apply()
            modified = True
        return modified

    def _group(
        self, axes: Mapping[str, tuple[ir.Value, int]], name: str, chosen: ChannelFactors, patterns: Patterns
    ) -> ScaleGroup | Refusal:
        if chosen.how is How.NONE:
            return Refusal(name, chosen.reason)
        if name not in axes:
            return Refusal(name, "no linear operator with constant weights reads it")
        aside = chosen.how is How.ASIDE
        group = scale_group(*axes[name], patterns, How.BRANCH if aside else chosen.how)
        if isinstance(group, Refusal) or aside:
            return group
        factors = chosen.factors
        if factors.shape != group.classes.shape:
            return Refusal(name, f"it has {group.classes.size} channels, not the {factors.size} that have factors")
        if not np.allclose(factors, by_class(group.per_class(factors), group.classes), 1e-9, 0.0):
            return Refusal(name, "channels that are scaled together have different factors")
        return group


def adds_nodes(smoothing: Mapping[str, ChannelFactors]) -> bool:
    """Tell whether a model has more nodes then."""
    return any(chosen.how not in (How.FOLD, How.NONE) for chosen in smoothing.values())


def _fold(fold: Fold, factors: npt.NDArray[np.float64]) -> None:
    """Give a node another constant; who else reads the old one keeps it."""
    value = structure.input_of(fold.node, fold.index)
    array = structure.constant(value)
    assert array is not None, "groups take constants alone"
    # In the constant's own type: factors that are powers of two change no digit.
    scaled = array * by_class(factors**fold.exponent, fold.classes).astype(array.dtype)
    if len(value.uses()) == 1 and scaled.shape == array.shape:
        value.const_value = scratch.tensor(scaled, value.name)
        return
    graph = fold.node.graph
    assert isinstance(graph, ir.Graph)
    fold.node.replace_input_with(fold.index, add_constant(graph, f"{value.name}/smooth", scaled))


def _multiply(graph: ir.Graph, group: ScaleGroup, factors: npt.NDArray[np.float64]) -> None:
    """Put the Mul of a group beside its root: by the factors for those that are spared, by 1/s for those that read."""
    root = group.root
    restores = group.how is How.RESTORE
    assert root.dtype is not None, "its group is known by its shape and type"
    exact = (factors if restores else 1.0 / factors).astype(root.dtype.numpy())
    name = free_name(graph, f"{root.name}/{'restored' if restores else 'smoothed'}")
    constant = add_constant(graph, f"{name}/factors", exact.reshape([-1] + [1] * (-group.axis - 1)))
    node = ir.node("Mul", [root, constant], outputs=[ir.val(name, type=root.type, shape=root.shape)], name=name)
    graph.append(node)
    takers = set(group.spared) if restores else {reading.node for reading in group.readings}
    for reader, index in list(root.uses()):
        if reader in takers and (restores or index == 0):
            reader.replace_input_with(index, node.outputs[0])
