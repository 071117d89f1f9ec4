"""Round weights so that what operators compute with their codes is nearer to float's result.

The codes are found by `calib/rounding.py`; see there for the method and its source.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from qcompile.calib.rounding import Operator
from qcompile.core import numerics, scratch
from qcompile.core.contract import Effect, Refusal, Rewritten
from qcompile.core.numerics import IntArray
from qcompile.core.plan import Precision, QuantPlan, Role, TensorQuant
from qcompile.passes import structure

#: Codes of more bits are near enough to their values.
MOST_BITS = 8
#: Bytes of second moments of one operator, beyond which it is left alone.
LARGEST = 256 << 20


@dataclass(frozen=True, repr=False)
class RoundWeights(ir.passes.InPlacePass):
    """Give the weights of a QDQ model other codes; scales stay.

    Parameters
    ----------
    codes : mapping of str to ndarray of int
        By name of the initializer that holds them, in its shape and type.
    refused : tuple of Refusal
        What `roundable` left out, to be reported with the rest.
    """

    codes: Mapping[str, IntArray]
    refused: tuple[Refusal, ...] = ()
    effect: ClassVar[Effect] = Effect.LOSSY

    def __repr__(self) -> str:
        digest = hashlib.sha256()
        for name, codes in self.codes.items():
            digest.update(f"{name} {codes.dtype} {codes.shape} ".encode())
            digest.update(codes.tobytes())
        return f"RoundWeights({digest.hexdigest()}, {self.refused})"

    def requires(self, model: ir.Model) -> None:
        """Refuse codes that were made for another graph."""
        if missing := sorted(set(self.codes) - set(model.graph.initializers)):
            raise ir.passes.PreconditionError(f"codes are given for '{missing[0]}', which the model does not have")

    def call(self, model: ir.Model) -> Rewritten:
        """Rewrite in place."""
        for name, codes in self.codes.items():
            # A new tensor: clones of the model share the old one.
            model.graph.initializers[name].const_value = scratch.tensor(codes, name)
        return Rewritten(model, bool(self.codes), self.refused)


def roundable(
    canonical: ir.Model, quantized: ir.Model, plan: QuantPlan
) -> tuple[dict[str, Operator], tuple[Refusal, ...]]:
    """Return the linear operators whose codes can be chosen, by the initializer that holds these; why others' cannot.

    Parameters
    ----------
    canonical : onnx_ir.Model
        The float model.
    quantized : onnx_ir.Model
        The QDQ model that `plan` made of it.
    plan : QuantPlan
    """
    nodes, found, refusals = {structure.node_name(node): node for node in quantized.graph}, {}, []
    for node in canonical.graph:
        name = structure.node_name(node)
        op = plan.ops.get(name)
        if op is None or op.precision is Precision.FLOAT or not structure.is_linear(node):
            continue
        weights = node.inputs[structure.WEIGHT_INPUT]
        quant = plan.tensors.get(structure.name_of(weights)) if weights is not None else None
        if quant is None or numerics.bits_of(quant.dtype) > MOST_BITS:
            continue
        if reason := _obstacle(node):
            refusals.append(Refusal(name, f"its weights are rounded to nearest: {reason}"))
            continue
        codes = structure.produced_by(nodes[name].inputs[structure.WEIGHT_INPUT], "DequantizeLinear")
        assert codes is not None
        activation = plan.tensors.get(structure.name_of(structure.input_of(node, 0)))
        integer = op.precision is Precision.INTEGER and activation is not None and not activation.is_dynamic
        step = float(activation.scale[0]) if integer and activation is not None else 0.0
        found[structure.name_of(structure.input_of(codes, 0))] = Operator(node, quant, step)
    return found, tuple(refusals)


def _obstacle(node: ir.Node) -> str:
    """Return why an operator's codes are not chosen by what it computes, or nothing."""
    if node.op_type == "ConvTranspose":
        return "what ConvTranspose sums up has another number of parts at every place"
    weights = structure.input_of(node, structure.WEIGHT_INPUT)
    if len(structure.readers(weights)) > 1:
        return "they are read by another operator too"
    if node.attributes.get_string("auto_pad", "NOTSET") != "NOTSET":
        return "its padding follows from the input's shape"
    if node.op_type == "MatMul" and len(structure.constant_tensor(weights).shape) != 2:  # type: ignore[union-attr]
        return "they have more than two axes"
    operator = Operator(node, TensorQuant(Role.WEIGHT, "int8", (1.0,), (0,)))
    return "it sums up too much at once" if 8 * operator.groups * operator.depth**2 > LARGEST else ""
