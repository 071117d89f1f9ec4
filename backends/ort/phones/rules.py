"""Rules that several providers document."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from qcompile.backends.ort.phones.units import QUANTIZERS, Rule, Unit
from qcompile.passes import structure


def is_open(value: ir.Value | None) -> bool:
    """Tell whether a value has an axis whose length is not known."""
    return value is not None and (value.shape is None or any(not isinstance(length, int) for length in value.shape))


def is_folded(value: ir.Value) -> bool:
    """Tell whether a value is a constant, or what unpacks one, which the runtime folds when it loads the model."""
    if structure.constant_tensor(value) is not None:
        return True
    maker = value.producer()
    plain = maker is not None and structure.is_standard(maker, "Cast", "Mul", *QUANTIZERS)
    return maker is not None and plain and all(one is None or is_folded(one) for one in maker.inputs)


def known_shapes(source: str) -> Rule:
    """Return the rule that no shape is open."""

    def broken(unit: Unit) -> str:
        values = [value for value in (*unit.node.inputs, *unit.node.outputs) if value is not None and value.name]
        found = next((value for value in values if is_open(value)), None)
        return f"'{found.name}' has the open shape {found.shape}" if found is not None else ""

    return Rule("static shapes", source, broken)


def supported(operators: Mapping[str, str], provider: str, source: str) -> Rule:
    """Return the rule that an operator is listed.

    Parameters
    ----------
    operators : mapping of str to str
        With what is particular about each, for people.
    provider, source : str
    """

    def broken(unit: Unit) -> str:
        node = unit.node
        if node.domain not in ("", "ai.onnx"):
            return f"{node.domain}:{node.op_type} is no standard operator"
        return "" if node.op_type in operators else f"{provider} has no {node.op_type}"

    return Rule("operator", source, broken)


def without_subgraphs(source: str) -> Rule:
    """Return the rule that there is no control flow."""

    def broken(unit: Unit) -> str:
        graphs = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
        return "it has a subgraph" if any(a.type in graphs for a in unit.node.attributes.values()) else ""

    return Rule("no subgraphs", source, broken)


def bias_in_steps(source: str) -> Rule:
    """Return the rule that a bias has codes of 32 bits in steps of (activation scale · weight scale), around zero."""

    def broken(unit: Unit) -> str:
        if not unit.is_quantized or unit.node.op_type not in structure.BIASED_OPS or len(unit.inputs) < 3:
            return ""
        if unit.node.inputs[structure.BIAS_INPUT] is None:
            return ""
        activation, weights, bias = unit.inputs[:3]
        if activation is None or weights is None:
            return ""
        if bias is None or bias.dtype != "int32" or bias.zero_point.any():
            return "its bias is not int32 around zero"
        steps = activation.scale * weights.scale
        close = steps.size in (1, bias.scale.size) and np.allclose(bias.scale, steps, rtol=1e-5, atol=0.0)
        return "" if close else "its bias is not in steps of activation scale times weight scale"

    return Rule("bias", source, broken)


def same_codes(operators: frozenset[str], source: str) -> Rule:
    """Return the rule that what only moves codes leaves the codes that it reads."""

    def broken(unit: Unit) -> str:
        if unit.node.op_type not in operators or not unit.inputs or unit.inputs[0] is None:
            return ""
        read = unit.inputs[0]
        changed = any(left is not None and not left.same(read) for left in unit.outputs)
        return "it leaves other codes than it reads" if changed else ""

    return Rule("same codes", source, broken)
