"""Store eight-bit codes that are four-bit numbers times a multiple of their block as what they are products of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompile.core import model as models
from qcompile.core import packing, scratch
from qcompile.core.contract import Effect
from qcompile.core.numerics import IntArray
from qcompile.passes import structure

#: The opset that four-bit types came with.
OPSET = 21
#: Where QuantizeLinear and DequantizeLinear have theirs.
ZERO_POINT = 2


@dataclass(frozen=True)
class PackWeights(ir.passes.InPlacePass):
    """Write constant int8 codes as Cast(int4 numbers) · Cast(uint4 multiples), wherever they are such products.

    ONNX Runtime folds constants when it loads a model, before it looks for what integer kernels take: what is executed
    is what would have been executed with the codes themselves.

    Parameters
    ----------
    leave_dequantized : bool
        Leave what a DequantizeLinear reads: TensorRT knows weights by the constants in front of theirs.
    """

    leave_dequantized: bool = False
    effect: ClassVar[Effect] = Effect.EXACT

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite in place."""
        if models.opset(model) < OPSET:
            return ir.passes.PassResult(model, False)
        modified = False
        for value in list(model.graph.initializers.values()):
            codes = value.const_value
            if codes is None or codes.dtype is not ir.DataType.INT8 or codes.size < packing.FEWEST or not value.uses():
                continue
            if value.is_graph_output() or value.is_graph_input() or _is_zero_point(value):
                continue
            if self.leave_dequantized and _is_dequantized(value):
                continue
            if (found := _products(codes.numpy())) is not None:
                _unpack(model.graph, value, *found)
                modified = True
        return ir.passes.PassResult(model, modified)


def _is_zero_point(value: ir.Value) -> bool:
    """Tell whether a value is read as a zero point, which runtimes want to know as they build; zeros are products."""
    return any(
        index == ZERO_POINT and structure.is_standard(reader, "QuantizeLinear", "DequantizeLinear")
        for reader, index in value.uses()
    )


def _is_dequantized(value: ir.Value) -> bool:
    """Tell whether a value is dequantized as it is."""
    return any(structure.is_standard(reader, "DequantizeLinear") for reader, _ in value.uses())


def _products(codes: npt.NDArray[np.int8]) -> tuple[int | None, IntArray, IntArray] | None:
    """Return the axis of the channels and what the codes are products of; None where they are none."""
    for axis in (*range(codes.ndim), None):
        if (found := packing.unpacked(codes, axis)) is not None:
            return axis, *found
    return None


def _unpack(graph: ir.Graph, value: ir.Value, axis: int | None, numbers: IntArray, multiples: IntArray) -> None:
    """Compute a value from numbers and multiples, with padding and the order of axes undone."""
    assert value.shape is not None
    name, shape = structure.name_of(value), tuple(value.shape.numpy())
    first = 0 if axis is None else axis
    moved = shape if axis is None else (shape[first], *shape[:first], *shape[first + 1 :])
    channels, length = len(numbers), int(np.prod(shape)) // len(numbers)
    made = list[ir.Node]()

    def constant(what: str, array: npt.NDArray[Any]) -> ir.Value:
        stored = ir.Value(name=f"{name}_{what}", const_value=scratch.tensor(array, f"{name}_{what}"))
        graph.register_initializer(stored)
        return stored

    def node(op_type: str, *inputs: ir.Value, **attributes: int | Sequence[int]) -> ir.Value:
        made.append(ir.node(op_type, inputs, attributes, name=f"{name}_{op_type}_{len(made)}"))
        made[-1].outputs[0].name = f"{name}_unpacked_{len(made)}"
        return made[-1].outputs[0]

    # The runtime multiplies no bytes.
    wide = {"to": int(ir.DataType.INT32)}
    codes = node(
        "Mul",
        node("Cast", constant("numbers", numbers.astype(ml_dtypes.int4)), **wide),
        node("Cast", constant("multiples", multiples.astype(ml_dtypes.uint4)), **wide),
    )
    if numbers[0].size > length:
        codes = node("Reshape", codes, constant("padded", np.array([channels, -1], np.int64)))
        codes = node("Slice", codes, *(constant(what, np.array([where], np.int64))
                                       for what, where in (("start", 0), ("end", length), ("axis", 1))))  # fmt: skip
    codes = node("Reshape", codes, constant("shape", np.array(moved, np.int64)))
    if first:
        codes = node("Transpose", codes, perm=[*range(1, first + 1), 0, *range(first + 1, len(shape))])
    codes = node("Cast", codes, to=int(ir.DataType.INT8))
    graph.insert_before(graph[0], made)
    ir.convenience.replace_all_uses_with(value, codes)
    codes.shape, codes.dtype = value.shape, ir.DataType.INT8
    del graph.initializers[name]
    codes.name = name
