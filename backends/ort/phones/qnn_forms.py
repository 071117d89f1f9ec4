"""Forms that Qualcomm's provider takes: matrices without a sign, and the ranges that it fixes for 16 bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompile.core.contract import Effect
from qcompile.passes import structure

#: Of which scale and zero point a result of 16 bits must be (onnxruntime.quantization.execution_providers.qnn).
FIXED = {"Sigmoid": (1.0 / 65536.0, 0), "Tanh": (1.0 / 32768.0, 32768)}
#: What hands codes on as they are.
MOVERS = frozenset({"Flatten", "MaxPool", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze"})
#: What is added to a code with a sign.
SHIFT = 128


@dataclass(frozen=True)
class UnsignMatrices(ir.passes.InPlacePass):
    """Write weights of MatMul and Gemm without a sign: each code 128 more, and so the zero point."""

    effect: ClassVar[Effect] = Effect.EXACT

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite in place."""
        modified = False
        for node in list(model.graph):
            if not structure.is_standard(node, "DequantizeLinear"):
                continue
            codes, zero_point = structure.constant(node.inputs[0]), structure.constant(node.inputs[2])
            readers = structure.readers(node.outputs[0])
            if codes is None or codes.dtype != np.int8 or zero_point is None or zero_point.size != 1:
                continue
            if readers and all(structure.is_standard(reader, "MatMul", "Gemm") for reader in readers):
                for index, array in ((0, codes), (2, zero_point)):
                    shifted = (array.astype(np.int16) + SHIFT).astype(np.uint8)
                    node.replace_input_with(index, _constant(model.graph, f"{node.name}_{index}", shifted))
                modified = True
        _drop_unread(model.graph)
        return ir.passes.PassResult(model, modified)


@dataclass(frozen=True)
class FixRanges(ir.passes.InPlacePass):
    """Give results of Sigmoid and Tanh in 16 bits the scales that the provider has for them, and what moves them."""

    effect: ClassVar[Effect] = Effect.LOSSY

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite in place."""
        modified = False
        for node in list(model.graph):
            if node.op_type in FIXED and structure.is_standard(node, *FIXED):
                modified |= self._fix(model.graph, node.outputs[0], *FIXED[node.op_type])
        _drop_unread(model.graph)
        return ir.passes.PassResult(model, modified)

    def _fix(self, graph: ir.Graph, value: ir.Value, scale: float, zero_point: int) -> bool:
        modified = False
        for quantizer in structure.readers(value):
            if not structure.is_standard(quantizer, "QuantizeLinear"):
                continue
            zero = structure.constant(quantizer.inputs[2])
            if zero is None or zero.dtype != np.uint16:
                continue
            pair = [quantizer, *structure.readers(quantizer.outputs[0])]
            for node in pair:
                node.replace_input_with(1, _constant(graph, f"{node.name}_scale", np.array(scale, np.float32)))
                node.replace_input_with(2, _constant(graph, f"{node.name}_zero", np.array(zero_point, np.uint16)))
            for node in pair[1:]:
                for reader in structure.readers(node.outputs[0]):
                    if reader.op_type in MOVERS and reader.inputs[0] is node.outputs[0]:
                        self._fix(graph, reader.outputs[0], scale, zero_point)
            modified = True
        return modified


def _constant(graph: ir.Graph, name: str, array: npt.NDArray[Any]) -> ir.Value:
    taken = ir.convenience.create_value_mapping(graph)
    while name in taken:
        name += "_"
    value = ir.Value(name=name, const_value=ir.tensor(np.asarray(array, order="C"), name=name))
    value.shape, value.dtype = ir.Shape(array.shape), ir.DataType.from_numpy(array.dtype)
    graph.register_initializer(value)
    return value


def _drop_unread(graph: ir.Graph) -> None:
    for name, value in list(graph.initializers.items()):
        if not value.uses() and not value.is_graph_output() and not value.is_graph_input():
            del graph.initializers[name]
