"""Give constants that a quantized operator reads as floats codes: some providers want all operands in codes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from qcompile.backends.ort.phones.units import Unit, units
from qcompile.core import numerics
from qcompile.core.contract import Effect
from qcompile.passes import structure
from qcompile.passes.insert_qdq import QdqWriter

#: Inputs that are no operands, and stay floats.
SETTINGS = {"Clip": (1, 2), "Resize": (1, 2), "Pad": (2,)}


@dataclass(frozen=True)
class QuantizeConstants(ir.passes.InPlacePass):
    """Put float constants of quantized operators behind a DequantizeLinear, in codes that hold their range.

    Parameters
    ----------
    dtype : str
        Type of the codes, with a zero point of their own.
    """

    dtype: str = "uint8"
    effect: ClassVar[Effect] = Effect.LOSSY

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite in place."""
        modified = False
        writer = _Writer(model.graph)
        for unit in list(units(model)):
            if _is_in_codes(unit):
                for index in _places(unit):
                    writer.write_constant(unit.node, index, self.dtype)
                    modified = True
        model.graph.sort()
        for name, value in list(model.graph.initializers.items()):
            if not value.uses() and not value.is_graph_output() and not value.is_graph_input():
                del model.graph.initializers[name]
        return ir.passes.PassResult(model, modified)


def _is_in_codes(unit: Unit) -> bool:
    """Tell whether all that is not constant is in codes, and something is."""
    read = [codes for value, codes in zip(unit.node.inputs, unit.inputs, strict=True)
            if structure.is_float32(value) and structure.constant_tensor(value) is None]  # fmt: skip
    return bool(read) and all(codes is not None for codes in (*read, *unit.outputs))


def _places(unit: Unit) -> list[int]:
    """Return which inputs are float constants."""
    taken = SETTINGS.get(unit.node.op_type, ())
    bias = structure.BIAS_INPUT if unit.node.op_type in structure.BIASED_OPS else None
    return [
        index
        for index, value in enumerate(unit.node.inputs)
        if index not in (*taken, bias) and structure.is_float32(value) and structure.constant(value) is not None
    ]


class _Writer(QdqWriter):
    def write_constant(self, node: ir.Node, index: int, dtype: str) -> None:
        value = structure.input_of(node, index)
        array = structure.constant(value)
        assert array is not None
        low, high = min(0.0, float(array.min(initial=0.0))), max(0.0, float(array.max(initial=0.0)))
        scale, zero_point = numerics.affine_scale([low], [high], dtype)
        codes = numerics.quantize(array.astype(np.float32), scale, zero_point, dtype)
        name = structure.name_of(value)
        parameters = [self._initializer(f"{name}_scale", scale.reshape(())),
                      self._initializer(f"{name}_zero_point", zero_point.astype(dtype).reshape(()))]  # fmt: skip
        stored = self._initializer(f"{name}_quantized", codes)
        node.replace_input_with(
            index, self._dequantize(stored, parameters, f"{name}_dequantized", ir.Shape(array.shape), None)
        )
