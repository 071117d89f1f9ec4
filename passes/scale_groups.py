"""Scale groups: where the channels of a tensor can be divided by factors that everything around it takes back.

X = (X / s) · s: the division is folded into constants of what makes X, the product into the weights of what reads it
(Xiao et al. 2023, "SmoothQuant"; Nagel et al. 2019, "Data-Free Quantization", section 4.1). Which channels share a
factor, and what takes part, follows from the graph: a group is all that is linear, or positively homogeneous, along
the channels of one tensor. Where X cannot be divided as a whole, one Mul more can be put beside it. Queries; nothing
here changes a graph.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qcompile.core.contract import Refusal
from qcompile.core.plan import How
from qcompile.passes.index_maps import Labels, Numbers
from qcompile.passes.patterns import Patterns
from qcompile.passes.scale_classes import FIXED, Classes, channel_axis, lengths
from qcompile.passes.scale_closure import Closure
from qcompile.passes.structure import is_linear, name_of, node_name


@dataclass(frozen=True, eq=False)
class Fold:
    """A constant that takes factors in.

    Attributes
    ----------
    node, index
        Who reads it, and as which input.
    classes
        Which factor each element takes, -c the reciprocal of c's; broadcasts with the constant.
    exponent
        1 multiplies, -1 divides.
    """

    node: ir.Node
    index: int
    classes: Labels
    exponent: int


@dataclass(frozen=True, eq=False)
class Reading:
    """A linear operator that reads channels of a group.

    Attributes
    ----------
    node
        The operator.
    value
        What it reads.
    axis
        Where the channels of that are, counted from the last.
    classes
        The factor of each channel, -c the reciprocal of c's, shape (channels,).
    """

    node: ir.Node
    value: ir.Value
    axis: int
    classes: Labels


@dataclass(frozen=True, eq=False)
class ScaleGroup:
    """What is scaled together.

    Attributes
    ----------
    how
        Where the factors go.
    root, axis
        The tensor that was asked for, and where its channels are, counted from the last.
    classes
        The factor of each of its channels, shape (channels,), numbered from 1, -c the reciprocal of c's; `FIXED` is no
        factor.
    folds
        What takes the factors in.
    readings
        The linear operators that read channels of it.
    spared
        Readers that get the root as it was, through the Mul of `How.RESTORE`.
    """

    how: How
    root: ir.Value
    axis: int
    classes: Labels
    folds: tuple[Fold, ...]
    readings: tuple[Reading, ...]
    spared: tuple[ir.Node, ...] = ()

    @property
    def factors(self) -> int:
        """How many factors there are."""
        return int(self.classes.max())

    def per_class(self, per_channel: Numbers) -> Numbers:
        """Return the factor of each class, that of `FIXED` first, from those of the root's channels."""
        found, own = np.ones(self.factors + 1), self.classes > FIXED
        found[self.classes[own]] = per_channel[own]
        return found


def scale_group(root: ir.Value, axis: int, patterns: Patterns, how: How) -> ScaleGroup | Refusal:
    """Return what has to be changed so that a tensor's channels are scaled.

    Parameters
    ----------
    root
        A tensor that linear operators read.
    axis
        Where its channels are, counted from the last.
    patterns
        What `recognise` found in its graph.
    how
        Where the factors are to go.

    Returns
    -------
    ScaleGroup or Refusal
        The refusal says what is in the way.
    """
    shape = lengths(root)
    if shape is None or root.shape is None or not isinstance(root.shape[axis], int):
        return Refusal(name_of(root), "how many channels it has is not known")
    count = shape[axis]
    closure = Closure(root, axis, {norm.result: norm for norm in patterns.norms}, how is How.RESTORE, Classes(count))
    labels = np.arange(1, count + 1, dtype=np.int64).reshape([-1] + [1] * (-axis - 1))
    if how is How.BRANCH:
        closure.labels[root] = labels
        closure.read_directly()
    else:
        closure.put(root, labels)
        closure = closure.closed()
    if not closure.alive or not closure.readings:
        tied = "it cannot be scaled apart from what shares its channels"
        reason = "no linear operator reads it" if closure.alive else tied
        return closure.obstacles[0] if closure.obstacles else Refusal(name_of(root), reason)
    if how is How.RESTORE and not closure.spared:
        return Refusal(name_of(root), "nothing is to be restored")
    return _group(closure, how)


def _group(closure: Closure, how: How) -> ScaleGroup:
    """Return what a closure found, its classes numbered by what is left."""
    found = closure.classes.of(closure.labels[closure.root].reshape(-1))
    kept = np.unique(np.append(np.abs(found), FIXED))

    def numbered(labels: Labels) -> Labels:
        # What is no channel of the root has no factor.
        classes = closure.classes.of(labels)
        places = np.sign(classes) * np.searchsorted(kept, np.abs(classes))
        return np.where(np.isin(np.abs(classes), kept), places, FIXED)

    width = (lengths(closure.root) or ())[closure.axis]
    folds = [Fold(node, index, numbered(labels), exponent)
             for (node, index, exponent), labels in closure.folds.items()]  # fmt: skip
    readings = [Reading(node, value, axis, numbered(labels))
                for node, (value, axis, labels) in closure.readings.items()]  # fmt: skip
    return ScaleGroup(
        how, closure.root, closure.axis, np.broadcast_to(numbered(found), width),
        tuple(fold for fold in folds if fold.classes.any()),
        tuple(reading for reading in readings if reading.classes.any()),
        tuple(closure.spared),
    )  # fmt: skip


def linear_readings(graph: ir.Graph, names: Collection[str]) -> Iterator[tuple[ir.Value, int]]:
    """Yield what the named linear operators read, each value once, with the axis of its channels."""
    seen: set[ir.Value] = set()
    for node in graph:
        value = node.inputs[0] if node_name(node) in names and is_linear(node) else None
        axis = None if value is None else channel_axis(node, value)
        if value is not None and axis is not None and value not in seen:
            seen.add(value)
            yield value, axis
