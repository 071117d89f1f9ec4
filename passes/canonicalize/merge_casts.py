"""Join Casts in a row where the first loses nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from qcompile.core.contract import Effect
from qcompile.passes import structure
from qcompile.passes.canonicalize.editing import bypass, remove_unused

#: Types by what they hold; a wider one of the same kind holds every number of a narrower one.
KINDS: dict[ir.DataType | None, np.dtype[Any]] = {
    ir.DataType.FLOAT16: np.dtype("f2"),
    ir.DataType.FLOAT: np.dtype("f4"),
    ir.DataType.DOUBLE: np.dtype("f8"),
    ir.DataType.BOOL: np.dtype("?"),
    **{dtype: dtype.numpy() for dtype in (ir.DataType.INT8, ir.DataType.INT16, ir.DataType.INT32, ir.DataType.INT64)},
    **{dtype: dtype.numpy() for dtype in (ir.DataType.UINT8, ir.DataType.UINT16, ir.DataType.UINT32)},
}


@dataclass(frozen=True)
class MergeCasts(ir.passes.InPlacePass):
    """Cast at once what is cast to a wider type of its kind first; a way there and back disappears.

    float → int → float and every way through a narrower type stay: they round.
    """

    effect: ClassVar[Effect] = Effect.EXACT

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite the main graph in place."""
        modified = False
        for node in list(model.graph):
            source = _origin(node)
            if source is None or source.dtype is None:
                continue
            if int(source.dtype) == node.attributes.get_int("to", 0):
                modified |= bypass(node, source)
            else:
                node.replace_input_with(0, source)
                modified = True
        modified |= remove_unused(model)
        return ir.passes.PassResult(model, modified)


def _origin(node: ir.Node) -> ir.Value | None:
    """Return what a Cast can read instead of another Cast's result, or None."""
    if not structure.is_standard(node, "Cast") or node.inputs[0] is None:
        return None
    first = node.inputs[0].producer()
    if first is None or first.graph is not node.graph or not structure.is_standard(first, "Cast"):
        return None
    source, middle = first.inputs[0], ir.DataType(first.attributes.get_int("to", 0))
    return source if source is not None and widens(source.dtype, middle) else None


def widens(narrow: ir.DataType | None, wide: ir.DataType) -> bool:
    """Tell whether a type holds every number of another one of the same kind."""
    if narrow not in KINDS or wide not in KINDS:
        return False
    source, middle = KINDS[narrow], KINDS[wide]
    same_kind = source.kind == middle.kind or {source.kind, middle.kind} == {"u", "i"}
    return same_kind and np.can_cast(source, middle, "safe")
