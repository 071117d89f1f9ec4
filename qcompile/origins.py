"""What a node of a QDQ model reads: a value or a constant, where that is from, and by which codes it goes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompile.core import numerics
from qcompile.passes import structure

Array = npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class Stored:
    """A constant, and where it is codes, by which parameters they are read.

    Parameters
    ----------
    tensor : onnx_ir.TensorProtocol
    scale, zero_point : ndarray, optional
    axis : int or None
    """

    tensor: ir.TensorProtocol
    scale: Array | None = None
    zero_point: Array | None = None
    axis: int | None = None

    @property
    def steps(self) -> Array:
        """The length of a step, in a shape that broadcasts; zero where it is no codes."""
        if self.scale is None:
            return np.zeros((1,) * len(self.tensor.shape), np.float32)
        return np.asarray(numerics.along_axis(self.scale, self.axis, len(self.tensor.shape)), np.float32)

    @cached_property
    def real(self) -> Array:
        """The numbers that it stands for, as the specification of DequantizeLinear has them."""
        array = self.tensor.numpy()
        if self.scale is None:
            return array
        wide = np.float64 if array.dtype == np.int32 else np.float32
        if self.scale.size not in (1, 0 if self.axis is None else array.shape[self.axis]):
            raise MistranslationError(str(self.tensor.name), f"{self.scale.size} scales do not fit {array.shape}")
        zero = 0 if self.zero_point is None else numerics.along_axis(self.zero_point, self.axis, array.ndim)
        return np.asarray((array.astype(wide) - np.asarray(zero, wide)) * self.steps.astype(wide))

    def same(self, other: Stored) -> bool:
        """Tell whether another has the same bytes and parameters."""
        alike = self.tensor is other.tensor or np.array_equal(self.tensor.numpy(), other.tensor.numpy())
        return alike and all(
            np.array_equal(one if one is not None else 0, two if two is not None else 0)
            for one, two in ((self.scale, other.scale), (self.zero_point, other.zero_point))
        )


@dataclass(frozen=True, eq=False)
class Read:
    """What a node reads.

    Parameters
    ----------
    source : tuple of str and int, optional
        Who makes it, and as which result; a value that nobody makes by its name and -1. None for a constant.
    stored : Stored, optional
        The constant.
    grid : tuple of float, int and str, optional
        Scale, zero point and type that it is rounded by on the way; empty where these are of each run's values.
    """

    source: tuple[str, int] | None
    stored: Stored | None = None
    grid: tuple[Any, ...] | None = None


def read(value: ir.Value | None) -> Read | None:
    """Follow a value to what it is of, through Q/DQ."""
    if value is None:
        return None
    if (tensor := structure.constant_tensor(value)) is not None:
        return Read(None, Stored(tensor))
    node = value.producer()
    if node is None:
        return Read((structure.name_of(value), -1))
    if not structure.is_standard(node, "DequantizeLinear"):
        return Read((structure.node_name(node), node.outputs.index(value)))
    return _dequantized(node)


def _dequantized(node: ir.Node) -> Read:
    codes, scale = structure.input_of(node, 0), node.inputs[1]
    zero_point = node.inputs[2] if len(node.inputs) > 2 else None
    maker = codes.producer()
    itself = Read((structure.node_name(node), 0))
    if (tensor := structure.constant_tensor(codes)) is not None:
        parameters = structure.constant(scale)
        if parameters is None:
            return itself
        axis = node.attributes.get_int("axis", 1) if parameters.ndim else None
        return Read(None, Stored(tensor, parameters, structure.constant(zero_point), axis))
    if maker is None:
        return itself
    if structure.is_standard(maker, "QuantizeLinear"):
        mine, other = (_grid(values) for values in (node.inputs[1:], maker.inputs[1:]))
        if mine is None or mine != other:
            fact = f"quantizes '{maker.inputs[0].name}' by {other} and dequantizes it by {mine}"  # type: ignore[union-attr]
            raise MistranslationError(structure.node_name(node), fact)
        inner = read(maker.inputs[0])
        return itself if inner is None else Read(inner.source, inner.stored, mine)
    if structure.is_standard(maker, "DynamicQuantizeLinear"):
        inner = read(maker.inputs[0])
        whole = [*maker.outputs] == [codes, scale, zero_point]
        return Read(inner.source, inner.stored, ()) if whole and inner is not None else itself
    return Read((structure.node_name(maker), maker.outputs.index(codes)), grid=_grid(node.inputs[1:]))


def _grid(parameters: Any) -> tuple[Any, ...] | None:
    """Return scale, zero point and type of a tensor's codes."""
    scale = structure.constant(parameters[0]) if parameters else None
    zero_point = structure.constant(parameters[1]) if len(parameters) > 1 else None
    if scale is None or zero_point is None:
        return None
    return (*map(float, scale.reshape(-1)), *map(int, zero_point.reshape(-1)), zero_point.dtype.name)


class MistranslationError(Exception):
    """What a pass wrote is not what it was told to write."""

    def __init__(self, node: str, fact: str) -> None:
        super().__init__(f"at '{node}': {fact}")
