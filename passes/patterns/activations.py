"""Activations that exporters write as several operators: x times a function of x, which tends to a step.

GELU and its approximations (Hendrycks and Gimpel 2016), SiLU (Elfwing et al. 2018), hard-swish (Howard et al. 2019),
Mish (Misra 2019).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import onnx_ir as ir
from numpy.polynomial import Polynomial

from qcompile.passes.index_maps import scalar
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


class ActivationKind(StrEnum):
    """Which function."""

    GELU = "gelu"
    GELU_TANH = "gelu_tanh"
    QUICK_GELU = "quick_gelu"
    SILU = "silu"
    HARD_SWISH = "hard_swish"
    MISH = "mish"


@dataclass(frozen=True, eq=False)
class Activation:
    """An activation of several nodes, or of one that is younger than opset 13: result = factor · kind(source).

    Attributes
    ----------
    kind
        Which function.
    source, result
        What is read and what is made.
    nodes
        All of its nodes.
    shared
        What stands between the nodes is read by others too, so that the nodes cannot be replaced.
    factor
        2 for GELU where its 0.5 went into the weights behind it, 6 for hard-swish without its 1/6.
    """

    kind: ActivationKind
    source: ir.Value
    result: ir.Value
    nodes: tuple[ir.Node, ...]
    shared: bool = False
    factor: float = 1.0


@dataclass(frozen=True)
class _Form:
    """x · (gate(p(x)) + shift) · factor."""

    kind: ActivationKind
    gate: str
    argument: tuple[float, ...]
    shift: float
    factor: float


_TANH = math.sqrt(2 / math.pi)
_CUBIC = 0.044715 * _TANH
_FORMS = (
    _Form(ActivationKind.GELU, "Erf", (0, math.sqrt(0.5)), 1, 0.5),
    _Form(ActivationKind.GELU_TANH, "Tanh", (0, _TANH, 0, _CUBIC), 1, 0.5),
    _Form(ActivationKind.GELU_TANH, "Sigmoid", (0, 2 * _TANH, 0, 2 * _CUBIC), 0, 1),
    _Form(ActivationKind.QUICK_GELU, "Sigmoid", (0, 1.702), 0, 1),
    _Form(ActivationKind.SILU, "Sigmoid", (0, 1), 0, 1),
    _Form(ActivationKind.HARD_SWISH, "HardSigmoid", (0, 1), 0, 1),
    _Form(ActivationKind.HARD_SWISH, "Clip", (3, 1), 0, 1 / 6),
    _Form(ActivationKind.MISH, "Tanh", (), 0, 1),
)
_GATES = tuple(dict.fromkeys(form.gate for form in _FORMS))

#: How far a constant may be from the one in the definition, relatively: two roundings to half precision.
TOLERANCE = 2.0**-10


def activations(graph: ir.Graph) -> tuple[Activation, ...]:
    """Find every activation of the kinds above, in the order of the graph.

    Factors may stand anywhere in the product, or be missing from it (they fold into weights behind it), and the
    polynomial inside GELU's tanh may have any order. A gate times another tensor (GLU, squeeze and excitation) is none,
    nor is a gate whose constants differ by more than `TOLERANCE`.
    """
    found = []
    for node in graph:
        activation = _fused(node) if is_standard(node, "Gelu", "HardSwish", "Mish", "Swish") else _gated(node)
        if activation is not None:
            found.append(activation)
    return tuple(found)


def _fused(node: ir.Node) -> Activation | None:
    kinds = {"HardSwish": ActivationKind.HARD_SWISH, "Mish": ActivationKind.MISH, "Gelu": ActivationKind.GELU}
    kind = kinds.get(node.op_type)
    if node.op_type == "Gelu" and node.attributes.get_string("approximate", "none") == "tanh":
        kind = ActivationKind.GELU_TANH
    if node.op_type == "Swish":
        alpha = node.attributes.get_float("alpha", 1.0)
        slopes = {1.0: ActivationKind.SILU, 1.702: ActivationKind.QUICK_GELU}
        kind = next((kind for slope, kind in slopes.items() if _near(alpha, slope)), None)
    return None if kind is None else Activation(kind, input_of(node, 0), node.outputs[0], (node,))


def _near(number: float, expected: float) -> bool:
    return math.isclose(number, expected, rel_tol=TOLERANCE)


def _gated(gate: ir.Node) -> Activation | None:
    if not is_standard(gate, *_GATES) or not _is_gate(gate):
        return None
    argument = input_of(gate, 0)
    for form in _FORMS:
        if form.gate != gate.op_type:
            continue
        for start, shift_nodes, scale in _shifted(gate, form.shift):
            for source in _candidates(argument):
                inner = _argument_nodes(argument, source, form)
                product = None if inner is None else _product(start, source, form.factor / scale)
                if inner is not None and product is not None:
                    result, outer, factor = product
                    nodes = tuple(dict.fromkeys([*inner, gate, *shift_nodes, *outer]))
                    return Activation(form.kind, source, result, nodes, is_shared(nodes, result), factor)
    return None


def _is_gate(gate: ir.Node) -> bool:
    """Tell whether the parameters of a HardSigmoid or Clip are those of hard-swish."""
    if gate.op_type == "HardSigmoid":
        alpha, beta = gate.attributes.get_float("alpha", 0.2), gate.attributes.get_float("beta", 0.5)
        return _near(alpha, 1 / 6) and _near(beta, 0.5)
    if gate.op_type == "Clip":
        bounds = [scalar(value) for value in gate.inputs[1:]]
        return bounds == [0.0, 6.0]
    return True


def _shifted(gate: ir.Node, shift: float) -> Iterator[tuple[ir.Value, list[ir.Node], float]]:
    """Yield gate + shift, and c · (gate + shift) where c · gate + c is written, with c."""
    value, nodes, scale = gate.outputs[0], [gate], 1.0
    if shift == 0.0:
        yield value, nodes, scale
        return
    for node in data_readers(value):
        if is_standard(node, "Add") and _is_number(other_input(node, value), shift):
            yield node.outputs[0], [node], 1.0
        factor = scalar(other_input(node, value)) if is_standard(node, "Mul") else None
        add = None if factor is None else only_reader(node.outputs[0])
        offset = other_input(add, node.outputs[0]) if add is not None and is_standard(add, "Add") else None
        if factor and add is not None and _is_number(offset, factor * shift):
            yield add.outputs[0], [node, add], factor


def _is_number(value: ir.Value | None, expected: float) -> bool:
    number = scalar(value)
    return number is not None and _near(number, expected)


def _candidates(argument: ir.Value) -> list[ir.Value]:
    """Return what the argument may be a polynomial of: the values behind it, nearest first."""
    found: dict[ir.Value, None] = {argument: None}
    edge = [argument]
    for _ in range(6):
        nodes = [value.producer() for value in edge]
        edge = [x for node in nodes if node is not None and is_standard(node, *_INSIDE) for x in node.inputs if x]
        edge = [value for value in dict.fromkeys(edge) if value not in found and constant_tensor(value) is None]
        found.update(dict.fromkeys(edge))
    return list(found)


_INSIDE = ("Add", "Div", "Mul", "Pow", "Softplus", "Sub")


def _argument_nodes(argument: ir.Value, source: ir.Value, form: _Form) -> list[ir.Node] | None:
    """Return the nodes between the source and the gate if they compute the form's polynomial."""
    if form.kind is ActivationKind.MISH:
        node = produced_by(argument, "Softplus")
        return [node] if node is not None and node.inputs[0] is source else None
    nodes: list[ir.Node] = []
    polynomial = _polynomial(argument, source, nodes, 0)
    if polynomial is None or len(polynomial.coef) != len(form.argument):
        return None
    same = np.isclose(polynomial.coef, form.argument, rtol=TOLERANCE, atol=0.0)
    return nodes if same.all() else None


def _polynomial(value: ir.Value | None, x: ir.Value, nodes: list[ir.Node], depth: int) -> Polynomial | None:
    """Return a value as a polynomial of x of low degree, and collect the nodes that compute it; None if it is none."""
    if value is x:
        return Polynomial([0.0, 1.0])
    number = scalar(value)
    if number is not None:
        return Polynomial([number])
    node = produced_by(value, *_INSIDE)
    if node is None or node.op_type == "Softplus" or depth > 8:
        return None
    left, right = (_polynomial(part, x, nodes, depth + 1) for part in node.inputs[:2])
    if left is None or right is None:
        return None
    nodes.append(node)
    return _combined(node.op_type, left, right)


def _combined(op_type: str, left: Polynomial, right: Polynomial) -> Polynomial | None:
    if op_type in ("Add", "Sub"):
        return (left + right if op_type == "Add" else left - right).trim()
    if op_type == "Mul":
        return (left * right).trim() if left.degree() + right.degree() <= 3 else None
    number = float(right.coef[0])
    if right.degree() > 0 or number == 0.0:
        return None
    if op_type == "Div":
        return left / number
    return left ** int(number) if number in (2.0, 3.0) and left.degree() == 1 else None


def _product(start: ir.Value, source: ir.Value, factor: float) -> tuple[ir.Value, list[ir.Node], float] | None:
    """Follow the product behind a gate until the source and the factor are in it, each once.

    Where the factor does not come, the product ends at the source, and is too large by the number that is returned.
    """
    value, nodes, so_far, has_source = start, list[ir.Node](), 1.0, False
    ends: tuple[ir.Value, list[ir.Node], float] | None = None
    while len(nodes) <= 6:
        if has_source and _near(so_far, factor):
            return value, nodes, 1.0
        if has_source and ends is None:
            ends = value, list(nodes), so_far / factor
        behind = data_readers(value) if value is start else [node for node in [only_reader(value)] if node is not None]
        steps = [(node, step) for node in behind if (step := _factor(node, value, source)) is not None]
        steps = [(node, step) for node, step in steps if not (step[1] and has_source)]
        if not steps:
            return ends
        node, (number, is_source, inner) = steps[0]
        value, so_far, has_source = node.outputs[0], so_far * number, has_source or is_source
        nodes += [node, *inner]
    return ends


def _factor(node: ir.Node, value: ir.Value, source: ir.Value) -> tuple[float, bool, list[ir.Node]] | None:
    """Return the number that a node multiplies by, whether it multiplies by the source, and nodes of that factor."""
    other = other_input(node, value)
    if other is None or not is_standard(node, "Mul", "Div"):
        return None
    if node.op_type == "Div":
        divisor = scalar(node.inputs[1])
        return (1 / divisor, False, []) if divisor and node.inputs[0] is value else None
    if other is source:
        return 1.0, True, []
    number = scalar(other)
    if number is not None:
        return number, False, []
    scaled = produced_by(other, "Mul", "Div")
    upper = None if scaled is None else scalar(scaled.inputs[1])
    if scaled is not None and scaled.inputs[0] is source and upper:
        return (upper if scaled.op_type == "Mul" else 1 / upper), True, [scaled]
    lower = scalar(scaled.inputs[0]) if scaled is not None and scaled.op_type == "Mul" else None
    return (lower, True, [scaled]) if scaled is not None and lower and scaled.inputs[1] is source else None
