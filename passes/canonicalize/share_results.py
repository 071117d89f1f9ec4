"""Compute once what a graph computes twice."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from qcompile.core.contract import Effect
from qcompile.passes import structure
from qcompile.passes.canonicalize.editing import bypass, remove_unused

#: These give something else each time, as does a Dropout that trains.
RANDOM = frozenset(
    {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli", "Dropout"}
)
#: What attributes must be made of to be compared.
PLAIN = frozenset(
    {ir.AttributeType.INT, ir.AttributeType.FLOAT, ir.AttributeType.STRING,
     ir.AttributeType.INTS, ir.AttributeType.FLOATS, ir.AttributeType.STRINGS}
)  # fmt: skip
#: Constants up to this many elements are told apart by what they hold, larger ones by which they are.
SMALL = 64


@dataclass(frozen=True)
class ShareResults(ir.passes.InPlacePass):
    """Let all readers of equal operators on equal operands read one of them.

    onnx-ir's own pass does not know Bernoulli and renames the types of outputs; and it takes equal constants of two
    names for different.
    """

    effect: ClassVar[Effect] = Effect.EXACT

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite the main graph in place."""
        seen: dict[Hashable, ir.Node] = {}
        modified = False
        for node in list(model.graph):
            key = _key(node)
            if key is None:
                continue
            first = seen.setdefault(key, node)
            if first is not node:
                modified |= bypass(node, first.outputs[0])
        modified |= remove_unused(model)
        return ir.passes.PassResult(model, modified)


def _key(node: ir.Node) -> Hashable | None:
    """Return what two nodes have in common if they compute the same, or None for those that are left alone."""
    if not structure.is_standard(node, node.op_type) or node.op_type in RANDOM or len(node.outputs) != 1:
        return None
    attributes = []
    for name, attribute in sorted(node.attributes.items()):
        if attribute.type not in PLAIN or attribute.is_ref():
            return None
        value = attribute.value
        attributes.append((name, tuple(value) if isinstance(value, list | tuple) else value))
    return node.op_type, tuple(_operand(value) for value in node.inputs), tuple(attributes)


def _operand(value: ir.Value | None) -> Hashable:
    tensor = structure.constant_tensor(value)
    if tensor is None or tensor.size > SMALL or tensor.dtype is ir.DataType.STRING:
        return value
    return tensor.dtype, tuple(tensor.shape), tensor.tobytes()
