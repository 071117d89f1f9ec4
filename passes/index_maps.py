"""Which element of one tensor stands where in another: labels run through the operators that only move elements.

Channels are followed by computing with an array of labels instead of a tensor. Axes whose length the graph leaves open
count as 1, which is consistent wherever they are multiplied, split or merged; an axis of channels always has a length.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompile.passes.structure import constant_tensor, is_standard

Labels = npt.NDArray[np.int64]
Numbers = npt.NDArray[np.float64]

#: Operators with one input of data whose outputs hold elements of it, unchanged.
MOVES = frozenset(
    {"Expand", "Flatten", "Gather", "Reshape", "Slice", "Split", "Squeeze", "Tile", "Transpose", "Unsqueeze"}
)
#: Shapes and scales are computed from a handful of numbers; anything larger is a tensor.
FEW = 64
#: The most labels that are followed, so that a query stays quick on any model.
MANY = 1 << 22
DEEP = 48

_ARITHMETIC: dict[str, Callable[..., Any]] = {
    "Add": np.add,
    "Sub": np.subtract,
    "Mul": np.multiply,
    "Neg": np.negative,
    "Pow": np.power,
    "Sqrt": np.sqrt,
    "Reciprocal": np.reciprocal,
    "Equal": np.equal,
    "Where": np.where,
    "Cast": np.array,
    "Identity": np.array,
}


def evaluate(value: ir.Value | None, unknown: float = math.nan, depth: int = 0) -> Numbers | None:
    """Compute a few numbers from constants and from the lengths of axes, or return None.

    Parameters
    ----------
    value
        A scale, or a shape for Reshape; at most `FEW` numbers.
    unknown
        What an axis of open length counts as. NaN makes everything that depends on one NaN.
    depth
        How many operators stand between this value and the one that was asked for.
    """
    tensor = constant_tensor(value)
    if tensor is not None:
        few = tensor.size <= FEW and tensor.dtype is not ir.DataType.STRING
        return tensor.numpy().astype(np.float64) if few else None
    node = None if value is None else value.producer()
    if value is None or node is None or depth > DEEP:
        return None
    if is_standard(node, "Shape"):
        return _lengths(node, unknown)
    if is_standard(node, *MOVES):
        first = evaluate(node.inputs[0], unknown, depth + 1)
        results = None if first is None else moved(node, first, depth + 1)
        return None if results is None else results[value.index() or 0]
    return _computed(node, unknown, depth) if is_standard(node, "Concat", "Div", *_ARITHMETIC) else None


def _computed(node: ir.Node, unknown: float, depth: int) -> Numbers | None:
    inputs = [evaluate(x, unknown, depth + 1) for x in node.inputs]
    known = [array for array in inputs if array is not None]
    if len(known) < len(inputs):
        return None
    try:
        with np.errstate(all="ignore"):
            if node.op_type == "Concat":
                return np.concatenate(known, node.attributes.get_int("axis", 0))
            if node.op_type == "Div":
                dtype = node.outputs[0].dtype
                quotient = known[0] / known[1]
                return quotient if dtype is not None and dtype.is_floating_point() else np.trunc(quotient)
            return np.asarray(_ARITHMETIC[node.op_type](*known), np.float64)
    except ValueError:  # lengths that the graph does not tell do not fit one another
        return None


def scalar(value: ir.Value | None) -> float | None:
    """Return the one finite number that a value holds whatever is fed to the model, else None."""
    number = evaluate(value)
    return float(number.reshape(())) if number is not None and number.size == 1 and np.isfinite(number).all() else None


def labels(value: ir.Value, axis: int) -> Labels | None:
    """Return the elements of a value numbered along one axis, from 0; None if its rank or that axis is not known.

    Parameters
    ----------
    value
        A tensor of `[..., n, ...]`.
    axis
        The axis of length n.
    """
    shape = value.shape
    if shape is None or not -len(shape) <= axis < len(shape) or not isinstance(shape[axis], int):
        return None
    lengths = [dim if isinstance(dim, int) else 1 for dim in shape]
    if math.prod(lengths) > MANY:
        return None
    numbers = np.arange(lengths[axis], dtype=np.int64).reshape([-1] + [1] * (len(shape) - axis % len(shape) - 1))
    return np.broadcast_to(numbers, lengths)


def moved(node: ir.Node, array: npt.NDArray[Any], depth: int = 0) -> tuple[npt.NDArray[Any], ...] | None:
    """Return what an operator of `MOVES` makes of an array in place of its first input; None if that is not known."""
    extra: list[list[int] | None] = []
    # Where a part starts and ends must be known; a length that is open may count as 1 like that of the array.
    unknown = 1.0 if is_standard(node, "Expand", "Reshape", "Tile") else math.nan
    for value in node.inputs[1:]:
        numbers = evaluate(value, unknown, depth)
        if value is not None and (numbers is None or np.isnan(numbers).any()):
            return None
        extra.append(None if numbers is None else _integers(numbers))
    try:
        results = _MOVED[node.op_type](node, array, extra + [None] * 4)
    except (ValueError, IndexError):  # lengths that the graph does not tell do not fit one another
        return None
    return results if all(result.size <= MANY for result in results) else None


def _lengths(node: ir.Node, unknown: float) -> Numbers | None:
    shape = node.inputs[0].shape if node.inputs[0] is not None else None
    if shape is None:
        return None
    lengths = np.array([dim if isinstance(dim, int) else unknown for dim in shape], np.float64)
    end = node.attributes.get_int("end", len(shape))
    return lengths[node.attributes.get_int("start", 0) : end]


def _integers(numbers: Numbers) -> list[int]:
    far = float(1 << 31)  # the ends of Slice are as far as an int64 reaches, which a float rounds up
    return [int(number) for number in np.clip(numbers.reshape(-1), -far, far)]


_Extra = Sequence[list[int] | None]
_Arrays = tuple[npt.NDArray[Any], ...]


def _reshape(node: ir.Node, array: npt.NDArray[Any], extra: _Extra) -> _Arrays:
    target = extra[0] or []
    if not node.attributes.get_int("allowzero", 0):
        target = [array.shape[i] if length == 0 else length for i, length in enumerate(target)]
    return (array.reshape(target),)


def _flatten(node: ir.Node, array: npt.NDArray[Any], extra: _Extra) -> _Arrays:
    axis = node.attributes.get_int("axis", 1) % (array.ndim or 1) if node.attributes.get_int("axis", 1) else 0
    return (array.reshape(math.prod(array.shape[:axis]), -1),)


def _slice(node: ir.Node, array: npt.NDArray[Any], extra: _Extra) -> _Arrays:
    starts, ends = extra[0] or [], extra[1] or []
    axes = extra[2] if extra[2] is not None else list(range(len(starts)))
    steps = extra[3] if extra[3] is not None else [1] * len(starts)
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        length = array.shape[axis]
        backwards_to_the_first = step < 0 and end < -length
        window = slice(start, None if backwards_to_the_first else end, step)
        array = array[(slice(None),) * (axis % array.ndim) + (window,)]
    return (array,)


def _split(node: ir.Node, array: npt.NDArray[Any], extra: _Extra) -> _Arrays:
    axis, parts = node.attributes.get_int("axis", 0), len(node.outputs)
    size = -(-array.shape[axis] // parts)
    sizes = extra[0] if extra[0] is not None else [size] * parts
    return tuple(np.split(array, np.cumsum(sizes)[:-1], axis))


def _squeeze(node: ir.Node, array: npt.NDArray[Any], extra: _Extra) -> _Arrays:
    if extra[0] is None:
        raise ValueError("which axes are of length 1 is not known")
    return (array.squeeze(tuple(extra[0])),)


def _gather(node: ir.Node, array: npt.NDArray[Any], extra: _Extra) -> _Arrays:
    indices = node.inputs[1]
    shape = [dim if isinstance(dim, int) else 1 for dim in (indices.shape or ())] if indices is not None else []
    return (np.take(array, np.array(extra[0]).reshape(shape), node.attributes.get_int("axis", 0)),)


def _transpose(node: ir.Node, array: npt.NDArray[Any], extra: _Extra) -> _Arrays:
    return (array.transpose(node.attributes.get_ints("perm", tuple(reversed(range(array.ndim))))),)


def _expand(node: ir.Node, array: npt.NDArray[Any], extra: _Extra) -> _Arrays:
    return (np.broadcast_to(array, np.broadcast_shapes(array.shape, tuple(extra[0] or ()))),)


_MOVED: dict[str, Callable[[ir.Node, npt.NDArray[Any], _Extra], _Arrays]] = {
    "Expand": _expand,
    "Flatten": _flatten,
    "Gather": _gather,
    "Reshape": _reshape,
    "Slice": _slice,
    "Split": _split,
    "Squeeze": _squeeze,
    "Tile": lambda node, array, extra: (np.tile(array, extra[0] or ()),),
    "Transpose": _transpose,
    "Unsqueeze": lambda node, array, extra: (np.expand_dims(array, tuple(extra[0] or ())),),
}
