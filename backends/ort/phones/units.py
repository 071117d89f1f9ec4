"""Units of a QDQ model: an operator with the codes that it reads and leaves, as providers match them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompile.passes import structure

QUANTIZERS = ("QuantizeLinear", "DequantizeLinear")


@dataclass(frozen=True)
class Codes:
    """How a value stands in codes.

    Parameters
    ----------
    dtype : str
    scale : ndarray of float
    zero_point : ndarray of int
    axis : int, optional
        Of the scales, where there is more than one.
    constant : ndarray, optional
        The codes, where they are known.
    """

    dtype: str
    scale: npt.NDArray[np.float32]
    zero_point: npt.NDArray[np.int64]
    axis: int | None = None
    constant: npt.NDArray[np.generic] | None = None

    def same(self, other: Codes) -> bool:
        """Tell whether the same code stands for the same number in both."""
        alike = np.array_equal(self.scale, other.scale) and np.array_equal(self.zero_point, other.zero_point)
        return self.dtype == other.dtype and self.axis == other.axis and alike


@dataclass(frozen=True)
class Unit:
    """An operator, with what it reads and leaves.

    Parameters
    ----------
    node : onnx_ir.Node
    inputs, outputs : tuple of Codes or None
        None where a value is plain: floats, whole numbers, or not there.
    """

    node: ir.Node
    inputs: tuple[Codes | None, ...]
    outputs: tuple[Codes | None, ...]

    @property
    def is_quantized(self) -> bool:
        """Whether any of it is in codes."""
        return any(one is not None for one in (*self.inputs, *self.outputs))


@dataclass(frozen=True)
class Rule:
    """What a provider documents.

    Parameters
    ----------
    name : str
    source : str
        Where it is documented.
    broken : callable
        Says what of a unit breaks it, or nothing.
    """

    name: str
    source: str
    broken: Callable[[Unit], str]


def units(model: ir.Model) -> Iterator[Unit]:
    """Yield the operators of a QDQ model, in their order."""
    for node in model.graph:
        if not structure.is_standard(node, *QUANTIZERS):
            yield Unit(node, tuple(map(read_codes, node.inputs)), tuple(map(left_codes, node.outputs)))


def read_codes(value: ir.Value | None) -> Codes | None:
    """Return the codes that a value is made of, or None."""
    node = value.producer() if value is not None else None
    return _codes(node) if node is not None and structure.is_standard(node, "DequantizeLinear") else None


def left_codes(value: ir.Value) -> Codes | None:
    """Return the codes that all readers of a value get, or None."""
    behind = structure.readers(value)
    if value.is_graph_output() or not behind:
        return None
    if not all(structure.is_standard(node, "QuantizeLinear") and node.inputs[0] is value for node in behind):
        return None
    return _codes(behind[0])


def _codes(node: ir.Node) -> Codes | None:
    scale = structure.constant(node.inputs[1])
    zero_point = structure.constant(node.inputs[2]) if len(node.inputs) > 2 else None
    if scale is None or zero_point is None:
        return None
    axis = node.attributes.get_int("axis", 1) if scale.size > 1 else None
    known = structure.constant(node.inputs[0])
    return Codes(str(zero_point.dtype), np.float32(scale).reshape(-1), np.int64(zero_point).reshape(-1), axis, known)


def first_broken(unit: Unit, rules: Sequence[Rule]) -> tuple[str, str]:
    """Return the name of the first rule that a unit breaks, and why; both empty where it breaks none."""
    for rule in rules:
        if why := rule.broken(unit):
            return rule.name, why
    return "", ""
