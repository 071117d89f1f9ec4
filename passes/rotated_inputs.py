"""What operators read that a rotation would change: which tensor to measure, and the weights that take it back."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompile.passes.patterns import Norm
from qcompile.passes.rotations import NormReaders, StreamSite, ValueSite
from qcompile.passes.structure import WEIGHT_INPUT, constant, input_of, node_name, weight_axis

Array = npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class RotatedInput:
    """One tensor behind a place, and what reads it.

    Attributes
    ----------
    value
        What is to be measured: in front of the norm, if one stands between.
    axis
        The axis of its channels, counted from the last.
    channels
        Integers `[k n]`: its channels in the order in which a matrix of n takes them.
    readers
        The operators.
    norm
        How the value is normalized on the way to them, or None.
    shift
        What this norm goes on adding to each channel `[n]`, without γ; None if its β goes into the readers' biases.
    """

    value: ir.Value
    axis: int
    channels: npt.NDArray[np.int64]
    readers: tuple[ir.Node, ...]
    norm: Norm | None = None
    shift: npt.NDArray[np.float64] | None = None

    def weights(self) -> npt.NDArray[np.float64]:
        """Return the readers' weights side by side `[k n, m]`, with γ."""
        joined = np.concatenate([weights_by_input(node)[self.channels] for node in self.readers], axis=1)
        gamma = constant(self.norm.gamma) if self.norm is not None else None
        return joined if gamma is None else joined * gamma.reshape(-1, 1)


def rotated_inputs(site: StreamSite | ValueSite, integers: Collection[str]) -> tuple[RotatedInput, ...]:
    """Return the tensors behind a place that operators read in integers.

    Parameters
    ----------
    site
        A stream or the values of an attention.
    integers
        Names of the nodes that run in integers; others do not mind what is rotated.
    """
    if isinstance(site, ValueSite):
        output = site.attention.output
        assert output is not None
        channels = np.concatenate([row for rows in site.rows for row in rows])
        here = (output.node,) if node_name(output.node) in integers else ()
        return tuple(RotatedInput(input_of(node, 0), output.axis, channels, here) for node in here)
    every, found = np.arange(site.place.width), list[RotatedInput]()
    for behind in site.norms:
        readers = tuple(node for node in behind.readers if node_name(node) in integers)
        if readers:
            norm = behind.norm
            found.append(RotatedInput(norm.source, norm.axes[0], every, readers, norm, _shift(behind)))
    linear: dict[ir.Value, list[ir.Node]] = {}
    for reader in site.segment.readers:
        if isinstance(reader, ir.Node) and node_name(reader) in integers:
            linear.setdefault(input_of(reader, 0), []).append(reader)
    axes = site.segment.axes
    found += [RotatedInput(value, axes[value], every, tuple(nodes)) for value, nodes in linear.items()]
    return tuple(found)


def _shift(behind: NormReaders) -> npt.NDArray[np.float64] | None:
    beta, gamma = constant(behind.norm.beta), constant(behind.norm.gamma)
    if beta is None or behind.absorbs:
        return None
    wide = beta.reshape(-1).astype(np.float64)
    return wide if gamma is None else np.divide(wide, gamma.reshape(-1), out=np.zeros_like(wide), where=wide != 0)


def weights_by_input(node: ir.Node) -> npt.NDArray[np.float64]:
    """Return an operator's weights as `[inputs, outputs]`, each place of a kernel a column of its own."""
    array = constant(node.inputs[WEIGHT_INPUT])
    assert array is not None
    axis = 1 if node.op_type == "Conv" else 1 - weight_axis(node)
    return np.moveaxis(array.astype(np.float64), axis, 0).reshape(array.shape[axis], -1)
