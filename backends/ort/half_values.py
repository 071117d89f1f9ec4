"""What fits float16, and where an operator may have it: questions that `half.py` asks of values and nodes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir

from qcompile.backends.ort.kernel_table import schema_of
from qcompile.passes import structure

HALF, SINGLE = ir.DataType.FLOAT16, ir.DataType.FLOAT
#: The largest float16, the smallest normal one, and the largest integer below which it has all integers.
LARGEST, SMALLEST, EXACT = 65504.0, 2.0**-14, 2048.0
#: Weight of the error that rounding to eleven bits leaves, at most, of that of the numbers.
ROUNDING = 2.0**-11
#: Operators whose result turns on how far off the argument is, not on how far off in parts of itself: at 4, float16
#: is off by 2^-10, as much as its own rounding of the result.
PERIODIC, PERIODIC_REACH = ("Sin", "Cos"), 4.0


@dataclass(frozen=True)
class Slots:
    """Which inputs and outputs of a node are float32 and may be float16: they all change together.

    Parameters
    ----------
    inputs, outputs : tuple of int
    """

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


@dataclass(frozen=True)
class Reach:
    """How far values reach.

    Parameters
    ----------
    largest : mapping of str to float
        By value name, the largest |x| that was seen.
    headroom : float
        How many times that others may be.
    """

    largest: Mapping[str, float]
    headroom: float

    def obstacle(self, value: ir.Value, node: ir.Node) -> str:
        """Return why a value that a node reads or makes is not to be float16; nothing if it can be, or is constant."""
        if structure.constant_tensor(value) is not None or _is_unpacked(value):
            return ""
        reaches = self.largest.get(structure.name_of(value))
        if reaches is None:
            return f"it is not known how far '{value.name}' reaches"
        if not reaches * self.headroom <= LARGEST:
            return f"'{value.name}' reaches {reaches:.3g}: float16 holds {LARGEST:.0f}, and others may reach further"
        if 0.0 < reaches < SMALLEST:
            return f"'{value.name}' reaches {reaches:.3g} only, which float16 has few digits for"
        if reaches > PERIODIC_REACH and any(structure.is_standard(reader, *PERIODIC) for reader in value.consumers()):
            return f"'{value.name}' is an angle that reaches {reaches:.3g}, which float16 is too coarse for"
        return _index_obstacle(node, reaches)


def _is_unpacked(value: ir.Value) -> bool:
    node = structure.produced_by(value, "DequantizeLinear")
    return node is not None and structure.constant_tensor(node.inputs[0]) is not None


def _index_obstacle(node: ir.Node, reaches: float) -> str:
    """Return why a Cast from or to integers must be float32: float16 lacks integers from 2049 on."""
    if not structure.is_standard(node, "Cast"):
        return ""
    source, result = node.inputs[0], node.outputs[0]
    if result.dtype is not None and result.dtype.is_integer():
        return "it makes integers, which may be indices"
    from_integers = source is not None and source.dtype is not None and source.dtype.is_integer()
    return f"it makes numbers of integers up to {reaches:.4g}" if from_integers and reaches > EXACT else ""


def fits(array: npt.NDArray[np.float32]) -> bool:
    """Tell whether numbers keep eleven significant bits as float16: none overflows, and what underflows is little.

    Parameters
    ----------
    array : ndarray of float32
        The error of rounding is held to 2^-11 of the numbers, both as the root of the sum of squares, which is what it
        is at most where all are normal.
    """
    with np.errstate(over="ignore"):
        rounded = array.astype(np.float16)
    if not np.isfinite(rounded).all():
        return False
    wide = array.astype(np.float64).reshape(-1)
    apart = wide - rounded.astype(np.float64).reshape(-1)
    return float(apart @ apart) <= ROUNDING**2 * float(wide @ wide)


def slots(node: ir.Node, version: int) -> Slots | None:
    """Return where a node has float32 that may be float16 by ONNX's own schema; None where it has none.

    Parameters
    ----------
    node : onnx_ir.Node
    version : int
        The opset.
    """
    schema = schema_of(node.op_type, version) if node.domain in ("", "ai.onnx") else None
    if schema is None:
        return None
    if any(value is not None and value.name and value.type is None for value in (*node.inputs, *node.outputs)):
        return None  # what is not known cannot be kept alike
    halvable = {found.type_param_str for found in schema.type_constraints
                if "tensor(float16)" in found.allowed_type_strs}  # fmt: skip
    inputs = [index for index, value in enumerate(node.inputs)
              if value is not None and _is_single(value) and _formal(schema.inputs, index) in halvable]  # fmt: skip
    outputs = [index for index, value in enumerate(node.outputs)
               if _is_single(value) and _formal(schema.outputs, index) in halvable]  # fmt: skip
    return Slots(tuple(inputs), tuple(outputs)) if inputs or outputs else None


def _is_single(value: ir.Value) -> bool:
    return value.dtype is SINGLE and (value.type is None or isinstance(value.type, ir.TensorType))


def _formal(parameters: Sequence[onnx.defs.OpSchema.FormalParameter], index: int) -> str:
    """Return the type variable of an operand; the last formal one stands for all that follow where it may."""
    return parameters[min(index, len(parameters) - 1)].type_str
