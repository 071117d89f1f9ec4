"""Classes of channels that must be scaled alike, and how they stand in the tensors of a graph.

An array of labels stands for a tensor: equal labels are scaled by the same factor, and -c by one over that of c, which
the other side of a product takes. Where an operator mixes or repeats elements, their labels are joined. Axes that hold
one label throughout have length 1; so have axes of open length.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import onnx_ir as ir

from qcompile.passes.index_maps import MANY, Labels, evaluate, moved
from qcompile.passes.structure import WEIGHT_INPUT, constant_tensor, is_standard, weight_axis

#: The label of what cannot be scaled: its factor is 1.
FIXED = 0


class Classes:
    """A union of labels (Tarjan 1975), over arrays; what is joined with its own reciprocal is fixed.

    Parameters
    ----------
    count : int
        Labels 1 to `count`, each a class of its own, beside `FIXED`.
    """

    def __init__(self, count: int) -> None:
        self._parent = np.arange(count + 1, dtype=np.int64)

    def copy(self) -> Classes:
        """Return a union of its own that starts with the same classes."""
        other = Classes(0)
        other._parent = self._parent.copy()
        return other

    def fresh(self, count: int) -> Labels:
        """Return labels that nothing has yet."""
        labels = np.arange(count, dtype=np.int64) + self._parent.size
        self._parent = np.concatenate([self._parent, labels])
        return labels

    def of(self, labels: Labels) -> Labels:
        """Return the least label of each one's class, negative where it is that one's reciprocal."""
        found: Labels = self._parent[np.abs(labels)] * np.sign(labels)
        return found

    def join(self, one: Labels, other: Labels) -> None:
        """Make the labels at equal places one class; the arrays broadcast."""
        one, other = np.broadcast_arrays(self.of(one), self.of(other))
        differ = one != other
        pairs = np.unique(np.stack([one[differ], other[differ]], axis=1), axis=0)
        fixed = pairs[(pairs == FIXED).any(axis=1)]
        self._parent[np.isin(np.abs(self._parent), np.abs(fixed))] = FIXED
        for pair in pairs[(pairs != FIXED).all(axis=1)]:
            low, high = sorted(map(int, self.of(pair)), key=abs)
            low = FIXED if low == -high else low
            for sign in (1, -1):
                self._parent[self._parent == sign * high] = sign * low

    def flat(self, labels: Labels, axes: Iterable[int]) -> Labels:
        """Join the labels along some axes, counted from the last, which then have length 1."""
        for axis in axes:
            if -axis <= labels.ndim and labels.shape[axis] > 1:
                first = labels.take([0], axis)
                self.join(labels, first)
                labels = first
        return labels

    def only_along(self, labels: Labels, axis: int, width: int) -> Labels:
        """Join the labels along all other axes and return those along one, shape (width,)."""
        flat = self.flat(labels, (at for at in range(-labels.ndim, 0) if at != axis))
        return np.broadcast_to(flat.reshape(-1), width) if -axis <= labels.ndim else np.full(width, flat.reshape(-1)[0])

    def fit(self, labels: Labels, value: ir.Value) -> Labels | None:
        """Join labels where a value is broadcast to their shape; None if its shape is not known, or is another."""
        shape = lengths(value)
        if shape is None:
            return None
        beyond = range(-labels.ndim, -len(shape))
        labels = self.flat(labels, (*beyond, *(at for at in range(-len(shape), 0) if shape[at] == 1)))
        labels = labels.reshape(labels.shape[len(beyond) :])
        ends: tuple[int, ...] = tuple(labels.shape)
        return labels if all(end in (1, n) for end, n in zip(ends[::-1], shape[::-1], strict=False)) else None

    def ahead(self, node: ir.Node, value: ir.Value, labels: Labels) -> list[Labels] | None:
        """Carry labels through an operator of `index_maps.MOVES`; None if where elements go is not known."""
        shape = lengths(value)
        if shape is None or math.prod(shape) > MANY:
            return None
        results = moved(node, np.broadcast_to(labels, shape))
        return None if results is None else [narrow(result) for result in results]

    def back(self, node: ir.Node, index: int, labels: Labels, known: Labels) -> Labels | None:
        """Carry the labels of a result back; those repeated there are joined.

        Elements that are not in it keep the labels that are known of them.
        """
        shape = lengths(node.inputs[0])
        if shape is None or math.prod(shape) > MANY:
            return None
        places = moved(node, np.arange(math.prod(shape), dtype=np.int64).reshape(shape))
        if places is None:
            return None
        try:
            there = np.broadcast_to(labels, places[index].shape).reshape(-1)
        except ValueError:  # lengths that the graph does not tell do not fit one another
            return None
        source = np.broadcast_to(known, shape).reshape(-1).copy()
        source[places[index].reshape(-1)] = there
        self.join(source[places[index].reshape(-1)], there)
        return narrow(source.reshape(shape))

    def apart(self, node: ir.Node, labels: Labels) -> list[Labels] | None:
        """Return the labels of a Concat's parts; None if how long these are is not known."""
        axis, ends = _parts(node)
        if -axis > labels.ndim or labels.shape[axis] == 1:
            return [labels] * len(node.inputs)
        return None if ends is None else np.split(labels, np.cumsum(ends)[:-1], axis)

    def joined(self, node: ir.Node, value: ir.Value, labels: Labels) -> list[Labels] | None:
        """Carry labels of one part through a Concat; None if how long the parts are is not known.

        Along the axis that it joins, the other parts have factors of their own.
        """
        axis, ends = _parts(node)
        if -axis > labels.ndim or labels.shape[axis] == 1:
            return [labels]
        if ends is None:
            return None
        parts = [labels if x is value else np.broadcast_to(
            self.fresh(end).reshape([-1] + [1] * (-axis - 1)),
            [end if at == axis + labels.ndim else length for at, length in enumerate(labels.shape)],
        ) for x, end in zip(node.inputs, ends, strict=True)]  # fmt: skip
        return [np.concatenate(parts, axis)]


def _parts(node: ir.Node) -> tuple[int, list[int] | None]:
    """Return along which axis, counted from the last, a Concat joins its parts, and how long they are there."""
    rank = next(len(found) for value in (*node.inputs, *node.outputs) if (found := lengths(value)) is not None)
    axis = node.attributes.get_int("axis", 0)
    axis = axis if axis < 0 else axis - rank
    ends = [None if value is None or value.shape is None else value.shape[axis] for value in node.inputs]
    return axis, [end for end in ends if isinstance(end, int)] if all(isinstance(end, int) for end in ends) else None


def lengths(value: ir.Value | None) -> tuple[int, ...] | None:
    """Return the lengths of a value's axes, 1 where they are open; None if its rank is not known."""
    if value is None or value.shape is None:
        return None
    return tuple(dim if isinstance(dim, int) else 1 for dim in value.shape)


def narrow(labels: Labels) -> Labels:
    """Shorten axes that hold one label throughout to length 1."""
    for axis in range(labels.ndim):
        first = labels.take([0], axis)
        if labels.shape[axis] > 1 and (labels == first).all():
            labels = first
    return labels


def mixed_axes(node: ir.Node) -> tuple[int, ...] | None:
    """Return along which axes, counted from the last, an operator of one input mixes elements; None if not known.

    Parameters
    ----------
    node
        An operator whose result scales with its input: elementwise, a pool, a resize, a padding or a reduction.
    """
    shape = lengths(node.inputs[0])
    if shape is None:
        return None
    every = tuple(range(-len(shape), 0))
    if is_standard(node, "Pad"):
        numbers = evaluate(node.inputs[1])
        axes = evaluate(node.inputs[3]) if len(node.inputs) > 3 and node.inputs[3] is not None else np.array(every)
        if numbers is None or axes is None or np.isnan(numbers).any():
            return None
        grown = axes.reshape(-1)[numbers.reshape(2, -1).any(axis=0)]
        return tuple(int(at) % len(shape) - len(shape) for at in grown)
    if node.op_type.startswith("Reduce"):
        if node.attributes.get_int("noop_with_empty_axes", 0) != 0:
            return None
        numbers = evaluate(node.inputs[1]) if len(node.inputs) > 1 and node.inputs[1] is not None else np.array(every)
        return None if numbers is None else tuple(int(at) % len(shape) - len(shape) for at in numbers.reshape(-1))
    return every[2:] if is_standard(node, *IMAGE) else ()


#: What mixes or selects along the axes behind the channels of images.
IMAGE = ("AveragePool", "GlobalAveragePool", "GlobalMaxPool", "LpPool", "GlobalLpPool", "MaxPool", "Resize")


def channel_axis(node: ir.Node, value: ir.Value) -> int | None:
    """Return where a linear operator has the channels of what it reads or makes, counted from the last.

    None if the rank is not known or the operator transposes what it reads.
    """
    if value.shape is None or node.attributes.get_int("transA", 0) != 0:
        return None
    return 1 - len(value.shape) if node.op_type in ("Conv", "ConvTranspose") else -1


def weight_channels(node: ir.Node) -> Labels | None:
    """Return which channel of its input each element of a linear operator's weights multiplies; broadcasts with them.

    None for a MatMul of several matrices. Conv has [M, C/group, ...], ConvTranspose [C, M/group, ...], Gemm [K, N] or
    transposed [N, K], MatMul [K, N].
    """
    weight = constant_tensor(node.inputs[WEIGHT_INPUT])
    if weight is None or (node.op_type in ("Gemm", "MatMul") and len(weight.shape) != 2):
        return None
    shape: tuple[int, ...] = tuple(weight.shape.numpy())
    if node.op_type == "Conv":
        groups = node.attributes.get_int("group", 1)
        first = np.arange(shape[0]) // (shape[0] // groups) * shape[1]
        return (first[:, None] + np.arange(shape[1])).reshape(*shape[:2], *[1] * (len(shape) - 2))
    axis = 1 - weight_axis(node)
    return np.arange(shape[axis]).reshape([-1 if at == axis else 1 for at in range(len(shape))])
