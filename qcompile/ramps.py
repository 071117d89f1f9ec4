"""Channels that were split are one ramp together.

What stands behind the activation saturates at T, so that no run of the float model tells whether copies begin where
those before them end: where a value reaches farther, each of its copies has to go on with it. That is a matter of
numbers. With f(x) = a · max(x, 0), which GELU and its kind tend to, what readers get of a channel and its copies is
a · x · v up to where the last copy saturates, exactly (`passes/split.py` has the formula).
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompile.origins import MistranslationError
from qcompile.passes import structure
from qcompile.passes.patterns import Activation, projection_of, recognise
from qcompile.passes.split import Split

Numbers = npt.NDArray[np.float64]
#: Points of a ramp that are looked at, and how far they may be off, in parts of its end.
POINTS, BOUND = 65, 1e-4


def hold_split(pass_: Split, before: ir.Model, after: ir.Model, refused: Collection[str]) -> None:
    """Hold what became of each tensor whose channels were split.

    Parameters
    ----------
    pass_ : Split
    before, after : onnx_ir.Model
    refused : collection of str
        Tensors that it left alone.

    Raises
    ------
    MistranslationError
        Naming the tensor.
    """
    old, new = ({structure.name_of(one.result): one for one in recognise(model.graph).activations}
                for model in (before, after))  # fmt: skip
    for name, chosen in pass_.chosen.items():
        if name in refused:
            continue
        if name not in old or name not in new:
            raise MistranslationError(name, "the activation is another one")
        channels = np.array(chosen.channels, np.int64)
        for was, reads in zip(_readers(old[name].result), _readers(*_bounded(new[name].result)[:1]), strict=True):
            if not np.array_equal(was, reads[: len(was)]):
                raise MistranslationError(name, "what reads the channels has other weights")
            _hold_ramps(name, old[name], new[name], channels, reads)


def _hold_ramps(name: str, old: Activation, new: Activation, channels: npt.NDArray[np.int64], reads: Numbers) -> None:
    (weights, bias), (wider, biases) = _written(name, old), _written(name, new)
    width, bound = len(bias), _bounded(new.result)[1]
    if not np.array_equal(weights, wider[:, :width]) or not np.array_equal(bias, biases[:width]):
        raise MistranslationError(name, "the channels that were there are written by other weights")
    for channel in dict.fromkeys(channels.tolist()):
        copies = width + np.flatnonzero(channels == channel)
        power = float(np.sum(weights[:, channel] ** 2)) or 1.0
        steep = weights[:, channel] @ wider[:, copies] / power
        apart = np.abs(wider[:, copies] - weights[:, [channel]] * steep).max(initial=0.0)
        if np.any(steep <= 0.0) or apart > BOUND * np.abs(wider[:, copies]).max():
            raise MistranslationError(name, f"copies of channel {channel} are no multiples of it")
        starts = bias[channel] - biases[copies] / steep
        end = float(np.max(starts + bound / (old.factor * steep)))
        x = np.linspace(-end / 4.0, end, POINTS)
        ramps = [np.minimum(old.factor * np.maximum(c * (x - start), 0.0), bound)
                 for c, start in zip((1.0, *steep), (0.0, *starts), strict=True)]  # fmt: skip
        found = np.array(ramps).T @ reads[[channel, *copies]]
        wanted = np.outer(old.factor * np.maximum(x, 0.0), reads[channel])
        if np.abs(found - wanted).max() > BOUND * np.abs(wanted).max():
            raise MistranslationError(name, f"channel {channel} and its copies are not what it was, up to {end:.3g}")


def _bounded(result: ir.Value) -> tuple[ir.Value, float]:
    """Return what bounds a split tensor, and by what."""
    node = structure.only_reader(result)
    bound = structure.constant(node.inputs[1]) if node is not None and structure.is_standard(node, "Min") else None
    if node is None or bound is None or bound.size != 1:
        raise MistranslationError(structure.name_of(result), "nothing bounds what was split")
    return node.outputs[0], float(bound.reshape(()))


def _written(name: str, activation: Activation) -> tuple[Numbers, Numbers]:
    """Return weights `[inputs, channels]` and bias of what an activation reads."""
    projection = projection_of(activation.source)
    if projection is None:
        raise MistranslationError(name, "no product writes it")
    node = projection.node
    added = projection.bias or node
    constants = [found for value in added.inputs[0 if projection.bias else structure.BIAS_INPUT :]
                 if (found := structure.constant(value)) is not None]  # fmt: skip
    if len(constants) != 1:
        raise MistranslationError(name, "it has no bias")
    return _matrix(node), constants[0].reshape(-1).astype(np.float64)


def _readers(value: ir.Value) -> list[Numbers]:
    """Return the weights of all that read a value, `[channels, outputs]`."""
    return [_matrix(node) for node in structure.readers(value)]


def _matrix(node: ir.Node) -> Numbers:
    weights: Any = structure.constant(node.inputs[structure.WEIGHT_INPUT])
    return np.asarray(weights.T if structure.weight_axis(node) == 0 else weights, np.float64)
