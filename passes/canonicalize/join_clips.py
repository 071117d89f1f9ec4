"""Write Min, Max, Relu and Clip in a row as one Clip, and a Clip from zero as Relu."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from qcompile.core.contract import Effect
from qcompile.passes import structure
from qcompile.passes.canonicalize.editing import add_constant, bypass, only_reader, remove_unused, replace

Bounds = tuple[float, float]
UNBOUNDED = (-math.inf, math.inf)
FLOATS = frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE})


@dataclass(frozen=True)
class JoinClips(ir.passes.InPlacePass):
    """Bring operators that only bound a float into one form, in which targets know what their kernels absorb.

    Integers stay as they are: their bounds have no infinity.
    """

    effect: ClassVar[Effect] = Effect.EXACT

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite the main graph in place."""
        modified = False
        for node in list(model.graph):
            found = _bounded(node)
            if found is None:
                continue
            value, bounds = found
            first = value.producer() if only_reader(value) is node else None
            inner = _bounded(first) if first is not None else None
            if inner is not None:
                value, bounds = inner[0], _joined(inner[1], bounds)
            modified |= _write(model.graph, node, value, bounds)
        modified |= remove_unused(model)
        return ir.passes.PassResult(model, modified)


def _bounded(node: ir.Node) -> tuple[ir.Value, Bounds] | None:
    """Read a node as min(max(x, low), high) of its one input that is no constant."""
    if not structure.is_standard(node, "Relu", "Clip", "Min", "Max") or node.inputs[0] is None:
        return None
    if node.outputs[0].dtype not in FLOATS:
        return None
    if node.op_type in ("Relu", "Clip"):
        pairs = zip((1, 2), (0.0 if node.op_type == "Relu" else -math.inf, math.inf), strict=True)
        low, high = (_number(node, index, default) for index, default in pairs)
        return (node.inputs[0], (low, high)) if low is not None and high is not None and low <= high else None
    return _one_sided(node) if len(node.inputs) == 2 and node.inputs[1] is not None else None


def _one_sided(node: ir.Node) -> tuple[ir.Value, Bounds] | None:
    """Read a Min or Max of something and a number."""
    index = 0 if structure.constant_tensor(node.inputs[1]) is not None else 1
    value, bound = node.inputs[index], _number(node, 1 - index, math.nan)
    if value is None or bound is None or math.isnan(bound) or structure.constant_tensor(value) is not None:
        return None
    # A bound of a higher rank would raise that of the result.
    if value.shape is None or len(value.shape) < len(node.inputs[1 - index].shape or ()):  # type: ignore[union-attr]
        return None
    return value, ((bound, math.inf) if node.op_type == "Max" else (-math.inf, bound))


def _number(node: ir.Node, index: int, default: float) -> float | None:
    """Return a bound, the default where there is none, None if it is no single constant."""
    value = node.inputs[index] if index < len(node.inputs) else None
    if value is None:
        return default
    array = structure.constant(value)
    if array is None or array.size != 1 or math.isnan(float(array.reshape(()))):
        return None
    return float(array.reshape(()))


def _joined(inner: Bounds, outer: Bounds) -> Bounds:
    low, high = (min(max(bound, outer[0]), outer[1]) for bound in inner)
    return low, high


def _write(graph: ir.Graph, node: ir.Node, value: ir.Value, bounds: Bounds) -> bool:
    """Let a node compute these bounds of this value; tell whether anything changed."""
    if bounds == UNBOUNDED:
        return bypass(node, value)
    op_type = "Relu" if bounds == (0.0, math.inf) else "Clip"
    if node.op_type == op_type and node.inputs[0] is value:
        return False
    inputs: list[ir.Value | None] = [value]
    if op_type == "Clip":
        assert node.outputs[0].dtype is not None
        for name, bound in zip(("min", "max"), bounds, strict=True):
            # Infinities too: where a bound is missing, ONNX Runtime takes the largest finite number, and a mask's -inf
            # would become that.
            array = np.array(bound, node.outputs[0].dtype.numpy())
            inputs.append(add_constant(graph, f"{node.outputs[0].name}_{name}", array))
    replace(node, ir.node(op_type, inputs))
    return True
