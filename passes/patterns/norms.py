"""Normalizations over axes of one tensor: LayerNorm (Ba et al. 2016) and RMSNorm (Zhang and Sennrich 2019)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

import onnx_ir as ir

from qcompile.passes.index_maps import evaluate, scalar
from qcompile.passes.structure import (
    constant_tensor,
    data_readers,
    input_of,
    is_shared,
    is_standard,
    only_reader,
    other_input,
    produced_by,
)


class NormKind(StrEnum):
    """What a normalization divides by."""

    LAYER = "layer"
    RMS = "rms"


@dataclass(frozen=True, eq=False)
class Norm:
    """A normalization: (x - mean) / √(variance + ε) · γ + β, or x / √(mean square + ε) · γ.

    Attributes
    ----------
    kind
        LAYER takes the mean off, RMS does not.
    source, result
        What is read and what is made; γ and β are inside if they are known to belong to it.
    axes
        Over which axes, each counted from the last (-1).
    gamma, beta
        Constants of n elements along the axes, or None.
    epsilon
        Added to the variance.
    nodes
        All of its nodes; one if it is an operator of ONNX.
    shared
        What stands between the nodes is read by others too, so that the nodes cannot be replaced.
    """

    kind: NormKind
    source: ir.Value
    result: ir.Value
    axes: tuple[int, ...]
    gamma: ir.Value | None
    beta: ir.Value | None
    epsilon: float
    nodes: tuple[ir.Node, ...]
    shared: bool = False

    @property
    def fused(self) -> bool:
        """Tell whether this is one operator of ONNX."""
        return len(self.nodes) == 1


def norms(graph: ir.Graph) -> tuple[Norm, ...]:
    """Find every normalization, in the order of the graph.

    Decomposed ones stand on the ReduceMean of a square with ε added to it. Deviations by n - 1 and ε added behind the
    root are other functions, and are not found.
    """
    found = []
    for node in graph:
        norm = _fused(node) if is_standard(node, *_FUSED) else _decomposed(node)
        if norm is not None:
            found.append(norm)
    return tuple(found)


_FUSED = {
    "LayerNormalization": NormKind.LAYER,
    "RMSNormalization": NormKind.RMS,
    # ONNX Runtime has it in the default domain.
    "SimplifiedLayerNormalization": NormKind.RMS,
}


def _fused(node: ir.Node) -> Norm | None:
    source = input_of(node, 0)
    axis = node.attributes.get_int("axis", -1)
    if axis >= 0 and source.shape is None:
        return None
    first = axis if axis < 0 else axis - len(source.shape or ())
    gamma, beta = (node.inputs[i] if len(node.inputs) > i else None for i in (1, 2))
    epsilon = node.attributes.get_float("epsilon", 1e-5)
    axes = tuple(range(first, 0))
    return Norm(_FUSED[node.op_type], source, node.outputs[0], axes, gamma, beta, epsilon, (node,))


def _decomposed(mean: ir.Node) -> Norm | None:
    """Match from the mean of the squares onwards."""
    axes = _mean_axes(mean)
    squared = _squared(mean.inputs[0]) if axes else None
    if axes is None or squared is None:
        return None
    base, inner = squared
    centred = _centred(base, axes)
    add = only_reader(mean.outputs[0])
    if add is None or not is_standard(add, "Add"):
        return None
    epsilon = scalar(other_input(add, mean.outputs[0]))
    if epsilon is None or not 0 <= epsilon < 1:
        return None
    source, behind = (base, []) if centred is None else centred
    inner += [mean, add, *behind]
    for end in _ends(add.outputs[0], source, None if centred is None else axes):
        nodes, result, gamma, beta = end
        every = tuple(dict.fromkeys([*inner, *nodes]))
        kind = NormKind.RMS if centred is None else NormKind.LAYER
        return Norm(kind, source, result, axes, gamma, beta, epsilon, every, is_shared(every, result))
    return None


def _mean_axes(node: ir.Node) -> tuple[int, ...] | None:
    """Return the axes of a ReduceMean that keeps them, counted from the last, else None."""
    if not is_standard(node, "ReduceMean") or not node.attributes.get_int("keepdims", 1):
        return None
    numbers = evaluate(node.inputs[1]) if len(node.inputs) > 1 else None
    axes = node.attributes.get_ints("axes", ()) if numbers is None else tuple(int(n) for n in numbers.reshape(-1))
    shape = input_of(node, 0).shape
    if not axes or (shape is None and any(axis >= 0 for axis in axes)):
        return None
    return tuple(sorted(axis if axis < 0 else axis - len(shape or ()) for axis in axes))


def _squared(value: ir.Value | None) -> tuple[ir.Value, list[ir.Node]] | None:
    node = produced_by(value, "Pow", "Mul")
    if node is None:
        return None
    base = input_of(node, 0)
    if node.op_type == "Mul":
        return (base, [node]) if node.inputs[1] is base else None
    return (base, [node]) if scalar(node.inputs[1]) == 2.0 else None


def _centred(value: ir.Value, axes: tuple[int, ...]) -> tuple[ir.Value, list[ir.Node]] | None:
    """Return x and the nodes of a value that is x less its mean over the axes."""
    node = produced_by(value, "Sub")
    mean = None if node is None else produced_by(node.inputs[1], "ReduceMean")
    if node is None or mean is None or mean.inputs[0] is not node.inputs[0] or _mean_axes(mean) != axes:
        return None
    return input_of(node, 0), [mean, node]


_End = tuple[list[ir.Node], ir.Value, ir.Value | None, ir.Value | None]


def _ends(radicand: ir.Value, source: ir.Value, centred: tuple[int, ...] | None) -> Iterator[_End]:
    """Yield the ways from variance + ε to the result."""
    for value, nodes, divides in _deviations(radicand):
        for node in data_readers(value):
            if not is_standard(node, "Div" if divides else "Mul"):
                continue
            upper = node.inputs[0] if divides else other_input(node, value)
            lead = None if upper is None else _numerator(upper, source, centred)
            if lead is not None:
                affine, result, gamma, beta = _affine(node.outputs[0], source)
                yield [*nodes, *lead, node, *affine], result, gamma, beta
            elif not divides and _is_parameter(upper, source):
                yield from _folded(node.outputs[0], upper, source, centred, [*nodes, node])
        if centred is not None and not divides:
            yield from _folded(value, None, source, centred, nodes)


def _deviations(radicand: ir.Value) -> Iterator[tuple[ir.Value, list[ir.Node], bool]]:
    """Yield √radicand to divide by, and 1 / √radicand to multiply by."""
    for node in data_readers(radicand):
        if is_standard(node, "Pow") and node.inputs[0] is radicand and scalar(node.inputs[1]) == -0.5:
            yield node.outputs[0], [node], False
        if not is_standard(node, "Sqrt"):
            continue
        root = node.outputs[0]
        yield root, [node], True
        for behind in data_readers(root):
            inverse = is_standard(behind, "Reciprocal")
            if inverse or (is_standard(behind, "Div") and scalar(behind.inputs[0]) == 1.0):
                yield behind.outputs[0], [node, behind], False


def _numerator(value: ir.Value, source: ir.Value, centred: tuple[int, ...] | None) -> list[ir.Node] | None:
    """Return the nodes behind the numerator if it is the source, or the source less its mean."""
    if centred is None:
        return [] if value is source else None
    found = _centred(value, centred)
    return found[1] if found is not None and found[0] is source else None


def _is_parameter(value: ir.Value | None, source: ir.Value) -> bool:
    """Tell whether a value is a constant along some axes of the source, and no mere number."""
    if value is None or value.shape is None or source.shape is None or constant_tensor(value) is None:
        return False
    lengths = [dim for dim in value.shape if isinstance(dim, int)]
    if len(lengths) > len(source.shape) or math.prod(lengths) == 1:
        return False
    return all(a in (1, b) for a, b in zip(reversed(lengths), reversed(list(source.shape)), strict=False))


def _affine(value: ir.Value, source: ir.Value) -> _End:
    """Follow γ and β behind the quotient; a Cast may stand in front of γ."""
    nodes: list[ir.Node] = []
    result, gamma, beta = value, None, None
    node = only_reader(value)
    if node is not None and is_standard(node, "Cast"):
        following = only_reader(node.outputs[0])
        if following is not None and is_standard(following, "Mul"):
            nodes, value, node = [node], node.outputs[0], following
    if node is None or not is_standard(node, "Mul") or not _is_parameter(other_input(node, value), source):
        return [], result, None, None
    gamma, result = other_input(node, value), node.outputs[0]
    nodes.append(node)
    node = only_reader(result)
    if node is not None and is_standard(node, "Add") and _is_parameter(other_input(node, result), source):
        beta, result = other_input(node, result), node.outputs[0]
        nodes.append(node)
    return nodes, result, gamma, beta


def _folded(
    factor: ir.Value, gamma: ir.Value | None, source: ir.Value, centred: tuple[int, ...] | None, before: list[ir.Node]
) -> Iterator[_End]:
    """Yield x · f and x · f + (β - mean · f) with f = γ / σ, as Keras has them."""
    for scaled in data_readers(factor):
        if not is_standard(scaled, "Mul") or other_input(scaled, factor) is not source:
            continue
        if centred is None:
            yield [*before, scaled], scaled.outputs[0], gamma, None
            continue
        add = only_reader(scaled.outputs[0])
        shift = None
        if add is not None and is_standard(add, "Add"):
            shift = _shift(other_input(add, scaled.outputs[0]), factor, source, centred)
        if add is not None and shift is not None:
            nodes, beta = shift
            yield [*before, scaled, *nodes, add], add.outputs[0], gamma, beta


def _shift(
    value: ir.Value | None, factor: ir.Value, source: ir.Value, axes: tuple[int, ...]
) -> tuple[list[ir.Node], ir.Value | None] | None:
    """Return the nodes and β of β - mean · f, -mean · f + β or -mean · f."""
    node = produced_by(value, "Sub", "Add", "Mul")
    if node is None:
        return None
    if node.op_type == "Mul":
        negated = produced_by(other_input(node, factor), "Neg")
        mean = None if negated is None else produced_by(negated.inputs[0], "ReduceMean")
        found = mean is not None and mean.inputs[0] is source and _mean_axes(mean) == axes
        return ([mean, negated, node], None) if found and mean is not None and negated is not None else None
    beta = next((x for x in node.inputs if _is_parameter(x, source)), None)
    product = other_input(node, beta) if beta is not None else None
    if beta is None or product is None or (node.op_type == "Sub" and node.inputs[0] is not beta):
        return None
    if node.op_type == "Add":
        inner = _shift(product, factor, source, axes) if produced_by(product, "Mul") else None
        return None if inner is None else ([*inner[0], node], beta)
    multiply = produced_by(product, "Mul")
    mean = produced_by(other_input(multiply, factor), "ReduceMean") if multiply is not None else None
    if multiply is None or mean is None or mean.inputs[0] is not source or _mean_axes(mean) != axes:
        return None
    return [mean, multiply, node], beta
