"""The kernels that a provider of ONNX Runtime registers, as data, so that machines without its device know them.

``kernels/cuda.json`` is written by benchmarks/cuda_kernels.py out of the registry of a real onnxruntime-gpu.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files

import onnx
import onnx_ir as ir

from qcompile.backends.base import Placed
from qcompile.passes import structure

#: (first version, last version or None, type variable -> types)
Row = tuple[int, int | None, Mapping[str, Sequence[str]]]
NAMES = {
    ir.DataType.FLOAT: "float", ir.DataType.FLOAT16: "float16", ir.DataType.DOUBLE: "double",
    ir.DataType.BFLOAT16: "bfloat16", ir.DataType.INT8: "int8", ir.DataType.UINT8: "uint8", ir.DataType.INT4: "int4",
    ir.DataType.UINT4: "uint4", ir.DataType.INT16: "int16", ir.DataType.UINT16: "uint16", ir.DataType.INT32: "int32",
    ir.DataType.UINT32: "uint32", ir.DataType.INT64: "int64", ir.DataType.UINT64: "uint64", ir.DataType.BOOL: "bool",
    ir.DataType.STRING: "string",
}  # fmt: skip


@dataclass(frozen=True)
class KernelTable:
    """What one provider has kernels for.

    Parameters
    ----------
    provider : str
    runtime : str
        The distribution that it was read from, with its version.
    kernels : mapping of str to sequence of Row
        By operator type, with its domain in front where it is none of ONNX's own.
    """

    provider: str
    runtime: str
    kernels: Mapping[str, Sequence[Row]]

    def obstacle(self, node: ir.Node, opset: int, changed: Mapping[ir.Value, ir.DataType] | None = None) -> str:
        """Return why no kernel takes a node, or nothing.

        Parameters
        ----------
        node : onnx_ir.Node
        opset : int
            The model's.
        changed : mapping of onnx_ir.Value to onnx_ir.DataType, optional
            Types that values would have in place of their own.
        """
        standard = node.domain in ("", "ai.onnx")
        rows = self.kernels.get(node.op_type if standard else f"{node.domain}:{node.op_type}", ())
        if not rows:
            return f"{self.provider} has no {node.op_type}"
        schema = schema_of(node.op_type, opset) if standard else None
        version = schema.since_version if schema is not None else 1
        types = _types(node, schema, changed or {})
        if any(_takes(row, version, types) for row in rows):
            return ""
        told = ", ".join(sorted(set(types.values())))
        return (
            f"{self.provider} has no {node.op_type} of {told}"
            if told
            else f"{self.provider} has no such {node.op_type}"
        )


@functools.cache
def cuda_kernels() -> KernelTable:
    """Return the table of the CUDA provider."""
    content = json.loads((files("qcompile.backends.ort") / "kernels" / "cuda.json").read_text(encoding="utf-8"))
    rows = {name: [(int(first), last, types) for first, last, types in found]
            for name, found in content["kernels"].items()}  # fmt: skip
    return KernelTable(content["provider"], content["runtime"], rows)


@functools.cache
def schema_of(op_type: str, opset: int) -> onnx.defs.OpSchema | None:
    """Return the schema of a standard operator in an opset, None where ONNX has none."""
    try:
        return onnx.defs.get_schema(op_type, opset)
    except onnx.defs.SchemaError:
        return None


def _takes(row: Row, version: int, types: Mapping[str, str]) -> bool:
    first, last, allowed = row
    within = first <= version and (last is None or version <= last)
    return within and all(types[variable] in names for variable, names in allowed.items() if variable in types)


def _types(node: ir.Node, schema: onnx.defs.OpSchema | None, changed: Mapping[ir.Value, ir.DataType]) -> dict[str, str]:
    """Return the element type that each type variable of a node stands for, as far as they are known."""
    found: dict[str, str] = {}
    for index, value in enumerate((*node.inputs, *node.outputs)):
        dtype = changed.get(value, value.dtype) if value is not None else None
        if dtype is None or dtype not in NAMES:
            continue
        if schema is None:
            # Contrib operators that qcompile writes have their activations' type first.
            found.setdefault("T1", NAMES[dtype])
            found.setdefault("T", NAMES[dtype])
            break
        inside = index < len(node.inputs)
        formal = schema.inputs if inside else schema.outputs
        place = index if inside else index - len(node.inputs)
        if formal:
            found.setdefault(formal[min(place, len(formal) - 1)].type_str, NAMES[dtype])
    return found


def placements(model: ir.Model, opset: int, table: KernelTable) -> tuple[Placed, ...]:
    """Return where the nodes of a model run by a provider's table, those first that fall back to the processor.

    What computes constants of constants is folded when the model is loaded and runs nowhere.

    Parameters
    ----------
    model : onnx_ir.Model
        With the types of its values.
    opset : int
    table : KernelTable
    """
    shapes: set[ir.Value] = set()
    placed = []
    constants: set[ir.Value] = set()
    for node in model.graph.all_nodes():
        given = [value for value in node.inputs if value is not None]
        if given and all(structure.constant_tensor(value) is not None or value in constants for value in given):
            constants.update(node.outputs)
            continue
        reason = table.obstacle(node, opset)
        if _tells_shapes(node, shapes):
            shapes.update(node.outputs)
            reason = reason or "it reckons with shapes, which the runtime does on the host"
        placed.append(Placed(structure.node_name(node), node.op_type, reason))
    return tuple(sorted(placed, key=lambda one: not one.host))


def _tells_shapes(node: ir.Node, shapes: set[ir.Value]) -> bool:
    """Tell whether a node's results are whole numbers that come of shapes alone."""
    if structure.is_standard(node, "Shape", "Size"):
        return True
    given = [value for value in node.inputs if value is not None and structure.constant_tensor(value) is None]
    whole = all(value.dtype in (ir.DataType.INT64, ir.DataType.INT32, ir.DataType.BOOL) for value in node.outputs)
    return whole and bool(given) and all(value in shapes for value in given)
