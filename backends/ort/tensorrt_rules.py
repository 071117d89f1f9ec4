"""TensorRT's documented rules of explicit quantization, each as a check of a graph.

From "Working with Quantized Types" of NVIDIA's TensorRT documentation (explicit quantization; Q/DQ placement
recommendations), the ONNX parser's list of operators, and IDequantizeLayer. `MUST` is what its parser or builder
refuses, `SHOULD` what it builds slower than it could.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qcompile.core import model as models
from qcompile.passes import structure

WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
#: What a weighted operator's kernel does as it goes.
FUSED = ("Relu", "Clip", "LeakyRelu", "Sigmoid", "Tanh", "BatchNormalization")
#: Operators on codes, and ranges of each run: its parser knows none of them.
FOREIGN = ("ConvInteger", "DynamicQuantizeLinear", "MatMulInteger", "QLinearConv", "QLinearMatMul")
CODES = (ir.DataType.INT8, ir.DataType.INT4, ir.DataType.FLOAT8E4M3FN, ir.DataType.FLOAT4E2M1)
#: The opset that has scales per channel, and the one that has codes of four bits and blocks.
PER_CHANNEL_OPSET, BLOCK_OPSET = 13, 21


@dataclass(frozen=True)
class Violation:
    """One place that breaks a rule.

    Parameters
    ----------
    rule : str
    node : str
        Name of the node, or of what it makes where it has none.
    fact : str
    """

    rule: str
    node: str
    fact: str


Check = Callable[[ir.Model], Iterator[tuple[ir.Node, str]]]


def violations(model: ir.Model, rules: dict[str, Check]) -> list[Violation]:
    """Return where a model breaks rules.

    Parameters
    ----------
    model : onnx_ir.Model
        With the types of its values.
    rules : dict of str to Check
        `MUST` or `SHOULD`.
    """
    return [Violation(name, node.name or structure.name_of(node.outputs[0]), fact)
            for name, check in rules.items() for node, fact in check(model)]  # fmt: skip


def _pairs(model: ir.Model) -> Iterator[ir.Node]:
    return (node for node in model.graph.all_nodes()
            if structure.is_standard(node, "QuantizeLinear", "DequantizeLinear"))  # fmt: skip


def _codes_of(node: ir.Node) -> ir.Value:
    return node.outputs[0] if node.op_type == "QuantizeLinear" else structure.input_of(node, 0)


def _is_weight(node: ir.Node) -> bool:
    return structure.constant_tensor(node.inputs[0]) is not None


def _dequantizer(value: ir.Value | None) -> ir.Node | None:
    return structure.produced_by(value, "DequantizeLinear")


def symmetric(model: ir.Model) -> Iterator[tuple[ir.Node, str]]:
    """Zero points are zero, and known."""
    for node in _pairs(model):
        if len(node.inputs) > 2 and node.inputs[2] is not None:
            zero_point = structure.constant(node.inputs[2])
            if zero_point is None or np.any(np.asarray(zero_point, np.float32)):
                yield node, "has a zero point that is not zero"


def signed(model: ir.Model) -> Iterator[tuple[ir.Node, str]]:
    """Codes are signed, of eight or four bits; biases of 32 have a rule of their own."""
    for node in _pairs(model):
        dtype = _codes_of(node).dtype
        if dtype not in CODES and dtype is not ir.DataType.INT32:
            yield node, f"has codes of {dtype.name.lower() if dtype is not None else 'no known type'}"


def activations_per_tensor(model: ir.Model) -> Iterator[tuple[ir.Node, str]]:
    """Activations have one scale."""
    for node in _pairs(model):
        scale = node.inputs[1]
        size = None if scale is None else structure.constant_tensor(scale)
        if not _is_weight(node) and size is not None and size.size != 1:
            yield node, f"gives an activation {size.size} scales"


def weights_per_output_channel(model: ir.Model) -> Iterator[tuple[ir.Node, str]]:
    """Several scales of a weight are one for each output channel of what multiplies by it."""
    for node in _pairs(model):
        scale = structure.constant_tensor(node.inputs[1])
        codes = structure.constant_tensor(node.inputs[0])
        if codes is None or scale is None or scale.size == 1 or node.attributes.get_int("block_size", 0) != 0:
            continue
        axis = node.attributes.get_int("axis", 1) % len(codes.shape)
        for reader in structure.readers(node.outputs[0]):
            weighs = structure.is_standard(reader, *WEIGHTED) and reader.inputs[1] is node.outputs[0]
            if weighs and (axis != structure.weight_axis(reader) or scale.size != codes.shape[axis]):
                yield node, f"scales axis {axis} of the weights of {reader.op_type} '{reader.name}'"


def constant_scales(model: ir.Model) -> Iterator[tuple[ir.Node, str]]:
    """Scales are known when the engine is built, and positive."""
    for node in _pairs(model):
        scale = structure.constant(node.inputs[1])
        if scale is None:
            yield node, "has a scale that is computed"
        elif not (np.isfinite(scale) & (scale > 0)).all():
            yield node, "has a scale that is not positive"


def four_bits_for_weights(model: ir.Model) -> Iterator[tuple[ir.Node, str]]:
    """Codes of four bits are constant weights of a matrix product, in blocks along the axis that it sums."""
    for node in _pairs(model):
        if _codes_of(node).dtype is not ir.DataType.INT4:
            continue
        readers = structure.readers(node.outputs[0])
        if not _is_weight(node) or node.op_type == "QuantizeLinear":
            yield node, "has an activation of four bits"
        elif not all(structure.is_standard(reader, "MatMul", "Gemm") for reader in readers):
            yield node, "has weights of four bits for what is no matrix product"
        elif reason := _no_blocks(node, readers):
            yield node, f"has weights of four bits {reason}"


def _no_blocks(node: ir.Node, readers: list[ir.Node]) -> str:
    """Return why four bits are in no blocks that are known: of a matrix, along what it sums, a scale for each."""
    size = node.attributes.get_int("block_size", 0)
    codes, scale = structure.constant_tensor(node.inputs[0]), structure.constant_tensor(node.inputs[1])
    if not size or codes is None or scale is None:
        return "without blocks"
    axis, shape = node.attributes.get_int("axis", 1), list(codes.shape.numpy())
    if len(shape) != 2 or any(axis == structure.weight_axis(reader) for reader in readers):
        return "in blocks along no axis that is summed"
    if shape[axis] % size:
        return f"in rows of {shape[axis]}, no multiple of its blocks of {size}"
    shape[axis] //= size
    return "" if list(scale.shape.numpy()) == shape else "without a scale for each block"


def float_biases(model: ir.Model) -> Iterator[tuple[ir.Node, str]]:
    """Biases have no Q/DQ."""
    for node in model.graph.all_nodes():
        if structure.is_standard(node, "DequantizeLinear") and _codes_of(node).dtype is ir.DataType.INT32:
            yield node, "dequantizes int32"
        biased = structure.is_standard(node, *structure.BIASED_OPS) and len(node.inputs) > structure.BIAS_INPUT
        if biased and _dequantizer(node.inputs[structure.BIAS_INPUT]) is not None:
            yield node, "has a bias in codes"


def codes_between_pairs(model: ir.Model) -> Iterator[tuple[ir.Node, str]]:
    """Codes stand between a Q and a DQ only: no operator computes on them, and they leave no graph."""
    for node in _pairs(model):
        if node.op_type != "QuantizeLinear":
            if not _is_weight(node) and structure.produced_by(node.inputs[0], "QuantizeLinear") is None:
                yield node, "dequantizes what no QuantizeLinear made"
            continue
        others = [reader.op_type for reader in structure.readers(node.outputs[0])
                  if not structure.is_standard(reader, "DequantizeLinear")]  # fmt: skip
        if others or node.outputs[0].is_graph_output():
            yield node, f"has codes that {others[0] if others else 'the caller'} reads"


def both_operands(model: ir.Model) -> Iterator[tuple[ir.Node, str]]:
    """Both operands of a product in int8 are codes: eight bits for weights alone there are not."""
    for node in model.graph.all_nodes():
        if not structure.is_standard(node, *WEIGHTED):
            continue
        made = [_dequantizer(node.inputs[index]) for index in (0, structure.WEIGHT_INPUT)]
        if any(one is not None and _codes_of(one).dtype is ir.DataType.INT4 for one in made):
            continue
        if (made[0] is None) != (made[1] is None):
            yield node, f"has codes of its {'weights' if made[0] is None else 'activation'} only"


def no_foreign_operators(model: ir.Model) -> Iterator[tuple[ir.Node, str]]:
    """Quantization is Q/DQ with known ranges: there are no operators on codes, and no ranges of each run."""
    for node in model.graph.all_nodes():
        if structure.is_standard(node, *FOREIGN) or node.domain not in ("", "ai.onnx"):
            yield node, f"is a {node.op_type}, which the parser does not know"


def known_opset(model: ir.Model) -> Iterator[tuple[ir.Node, str]]:
    """Scales per channel need opset 13, four bits and blocks opset 21."""
    opset = models.opset(model)
    for node in _pairs(model):
        scale = structure.constant_tensor(node.inputs[1])
        if scale is not None and scale.size > 1 and opset < PER_CHANNEL_OPSET:
            yield node, f"has several scales in opset {opset}"
        if (node.attributes.get_int("block_size", 0) or _codes_of(node).dtype is ir.DataType.INT4) and (
            opset < BLOCK_OPSET
        ):
            yield node, f"has blocks or four bits in opset {opset}"


def free_results(model: ir.Model) -> Iterator[tuple[ir.Node, str]]:
    """No Q/DQ between a weighted operator and what its kernel does as it goes; an Add it does for one operand."""
    for node in model.graph.all_nodes():
        if not structure.is_standard(node, *FUSED, "Add"):
            continue
        found = [weighs for value in node.inputs if (weighs := _behind_own_pair(value, node)) is not None]
        # Of two products that are added, one is the residual, which has Q/DQ.
        if found and not (node.op_type == "Add" and any(structure.produced_by(v, *WEIGHTED) for v in node.inputs)):
            yield node, f"reads {found[0].op_type} '{found[0].name}' behind Q/DQ"


def _behind_own_pair(value: ir.Value | None, node: ir.Node) -> ir.Node | None:
    """Return the weighted operator whose result goes through Q/DQ to this node alone."""
    made = _dequantizer(value)
    quantizer = structure.produced_by(made.inputs[0], "QuantizeLinear") if made is not None else None
    if made is None or quantizer is None or structure.only_reader(made.outputs[0]) is not node:
        return None
    source = structure.input_of(quantizer, 0)
    weighs = structure.produced_by(source, *WEIGHTED)
    return weighs if weighs is not None and structure.only_reader(source) is quantizer else None


def quantized_residuals(model: ir.Model) -> Iterator[tuple[ir.Node, str]]:
    """Where a Conv on codes is added to something and the sum becomes codes, the other operand has Q/DQ too."""

    def on_codes(node: ir.Node) -> bool:
        return _dequantizer(node.inputs[0]) is not None

    for node in model.graph.all_nodes():
        other = structure.residual_branch(node, on_codes)
        if other is None or _dequantizer(other) is not None:
            continue
        behind = structure.readers(node.outputs[0])
        behind += [reader for each in behind if structure.is_standard(each, *FUSED)
                   for reader in structure.readers(each.outputs[0])]  # fmt: skip
        if any(structure.is_standard(reader, "QuantizeLinear") for reader in behind):
            yield node, f"adds '{other.name}', which has no Q/DQ"


def one_scale_of_concats(model: ir.Model) -> Iterator[tuple[ir.Node, str]]:
    """Operands of a Concat whose result becomes codes come through Q/DQ of that scale."""
    for node in model.graph.all_nodes():
        if not structure.is_standard(node, "Concat"):
            continue
        quantizer = structure.only_reader(node.outputs[0])
        if quantizer is None or not structure.is_standard(quantizer, "QuantizeLinear"):
            continue
        scale = structure.constant(quantizer.inputs[1])
        for value in node.inputs:
            if value is None or structure.constant_tensor(value) is not None:
                continue
            made = _dequantizer(value)
            own = structure.constant(made.inputs[1]) if made is not None else None
            if own is None or scale is None or not np.array_equal(own, scale):
                yield node, f"joins '{value.name}', which has other Q/DQ than what is made of it"


MUST: dict[str, Check] = {
    "symmetric": symmetric,
    "signed codes": signed,
    "one scale for activations": activations_per_tensor,
    "scales by output channel": weights_per_output_channel,
    "constant scales": constant_scales,
    "four bits for weights": four_bits_for_weights,
    "float biases": float_biases,
    "codes between Q and DQ": codes_between_pairs,
    "both operands": both_operands,
    "known operators": no_foreign_operators,
    "opset": known_opset,
}
SHOULD: dict[str, Check] = {
    "free results": free_results,
    "quantized residuals": quantized_residuals,
    "one scale of a Concat": one_scale_of_concats,
}
