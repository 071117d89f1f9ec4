"""Correct the biases of integer operators by what quantization moved their results on average.

The corrections are measured on the QDQ model by `calib/drift.py`; see there for the method and its source.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompile.calib.sections import cuttable
from qcompile.core import numerics
from qcompile.core.contract import Effect, Refusal, Rewritten
from qcompile.core.plan import Precision, QuantPlan
from qcompile.core.target import OpKind, Target
from qcompile.passes import structure
from qcompile.passes.insert_qdq import QdqWriter


@dataclass(frozen=True)
class CorrectBias(ir.passes.InPlacePass):
    """Add to each operator's result, per output channel, what its mean lacks.

    Conv, ConvTranspose and Gemm take it into their int32 bias codes, and get a bias where they have none; a MatMul's
    goes into the constant that the Add behind it adds. No node is added to what the target executes.

    Parameters
    ----------
    corrections : mapping of str to tuple of float
        By node name, one number per output channel.
    refused : tuple of Refusal
        What `correctable` found no place for, to be reported with the rest.
    """

    corrections: Mapping[str, tuple[float, ...]]
    refused: tuple[Refusal, ...] = ()
    effect: ClassVar[Effect] = Effect.LOSSY

    def requires(self, model: ir.Model) -> None:
        """Refuse corrections that were measured on another graph."""
        known = {node.name for node in model.graph}
        if missing := sorted(set(self.corrections) - known):
            raise ir.passes.PreconditionError(f"a correction names node '{missing[0]}', which the graph does not have")

    def call(self, model: ir.Model) -> Rewritten:
        """Rewrite in place; operators that have no place for their correction are refusals."""
        writer = QdqWriter(model.graph)
        refusals = []
        for node in list(model.graph):
            name = structure.node_name(node)
            if name not in self.corrections:
                continue
            if reason := _obstacle(node):
                refusals.append(Refusal(name, f"its bias is not corrected: {reason}"))
                continue
            _correct(node, np.asarray(self.corrections[name], np.float64), writer)
        # A new bias's DequantizeLinear stands at the end until now.
        model.graph.sort()
        return Rewritten(model, len(refusals) < len(self.corrections), (*self.refused, *refusals))


def correctable(model: ir.Model, plan: QuantPlan, target: Target) -> tuple[tuple[str, ...], tuple[Refusal, ...]]:
    """Return the linear integer operators whose bias can be corrected, in the graph's order, and why others' cannot.

    Only the former may be measured: a drift that is not corrected is part of what the operators behind it see.

    Parameters
    ----------
    model : onnx_ir.Model
        The QDQ model.
    plan : QuantPlan
        The plan that it was made by.
    target : Target
    """
    if not plan.tensors:
        return (), ()  # nothing was quantized here, so nothing drifted
    if not cuttable(model):
        reason = "ranges are chosen by mse and biases stay: sequences pass between operators, so it cannot run in parts"
        return (), (Refusal("model", reason),)
    names, refusals = [], []
    for node in model.graph:
        op, rule = plan.ops.get(structure.node_name(node)), target.ops.get(node.op_type)
        if op is None or op.precision is not Precision.INTEGER or rule is None or rule.kind is not OpKind.LINEAR:
            continue
        if reason := _obstacle(node):
            refusals.append(Refusal(structure.node_name(node), f"its bias is not corrected: {reason}"))
        else:
            names.append(structure.node_name(node))
    return tuple(names), tuple(refusals)


def _obstacle(node: ir.Node) -> str:
    """Return why an operator of a QDQ model has no place for a correction, or nothing."""
    if structure.is_standard(node, "MatMul"):
        return _matmul_obstacle(node)
    if not structure.is_standard(node, *structure.BIASED_OPS):
        return f"{node.op_type} is no linear operator"
    if node.op_type == "Gemm" and node.attributes.get_float("beta", 1.0) != 1.0:
        return "Gemm scales its bias by beta"
    if not all(_is_dequantized(value) for value in node.inputs[: structure.BIAS_INPUT]):
        return "it does not read codes"
    bias = _bias(node)
    return "" if bias is None else _bias_obstacle(bias)


def _bias_obstacle(bias: ir.Value) -> str:
    if not _is_dequantized(bias) or (codes := _codes(bias)).dtype is not ir.DataType.INT32:
        return "its bias is not stored as int32 codes"
    if len(bias.uses()) > 1 or len(codes.uses()) > 1 or structure.constant_tensor(codes) is None:
        return "its bias is shared with another operator"
    return ""


def _matmul_obstacle(node: ir.Node) -> str:
    addend = _addend(node)
    if addend is None:
        return "the result of MatMul does not go to one Add with a constant"
    weights, constant = node.inputs[structure.WEIGHT_INPUT], structure.constant_tensor(addend)
    channels = weights.shape[-1] if weights is not None and weights.shape is not None else None
    if constant is None or tuple(constant.shape) != (channels,) or not structure.is_float32(addend):
        return "what is added behind MatMul is not one constant per channel"
    if len(addend.uses()) > 1 or addend.is_graph_output():
        return f"the constant '{addend.name}' is shared with another operator"
    return ""


def _addend(matmul: ir.Node) -> ir.Value | None:
    """Return the constant that the only reader of a MatMul adds to its result, or None."""
    result = matmul.outputs[0]
    uses = list(result.uses())
    if len(uses) != 1 or result.is_graph_output():
        return None
    reader, index = uses[0]
    other = reader.inputs[1 - index] if structure.is_standard(reader, "Add") else None
    return other if reader.graph is matmul.graph and structure.constant_tensor(other) is not None else None


def _bias(node: ir.Node) -> ir.Value | None:
    return node.inputs[structure.BIAS_INPUT] if len(node.inputs) > structure.BIAS_INPUT else None


def _is_dequantized(value: ir.Value | None) -> bool:
    producer = value.producer() if value is not None else None
    if producer is None or not structure.is_standard(producer, "DequantizeLinear"):
        return False
    return structure.constant_tensor(producer.inputs[1]) is not None


def _codes(value: ir.Value) -> ir.Value:
    producer = value.producer()
    assert producer is not None and producer.inputs[0] is not None
    return producer.inputs[0]


def _correct(node: ir.Node, correction: npt.NDArray[np.float64], writer: QdqWriter) -> None:
    bias = _addend(node) if node.op_type == "MatMul" else _bias(node)
    if bias is None:
        writer.write_bias(node, correction)
        return
    if node.op_type == "MatMul":
        _replace(bias, _constant(bias) + correction)
        return
    codes, dequantize = _codes(bias), bias.producer()
    assert dequantize is not None
    steps = np.rint(correction / _constant(dequantize.inputs[1]).astype(np.float64))
    # In float64, whose integers are exact far beyond int32: the sum saturates instead of wrapping around.
    _replace(codes, np.clip(_constant(codes) + steps, *numerics.code_range("int32")))


def _constant(value: ir.Value | None) -> npt.NDArray[Any]:
    array = structure.constant(value)
    assert array is not None
    return array


def _replace(value: ir.Value, array: npt.NDArray[np.float64]) -> None:
    """Give an initializer other numbers of the same type; the old tensor may be shared with the model's copies."""
    old = _constant(value)
    value.const_value = ir.tensor(array.reshape(old.shape).astype(old.dtype), name=value.name)
