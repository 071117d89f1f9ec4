"""Fix open axes of the inputs, as the user asks with --shape."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from qcompile.core.contract import Effect
from qcompile.core.errors import TargetError, UsageError
from qcompile.core.lengths import Shape

#: What an axis is called that may have several lengths.
LENGTH = "length"


@dataclass(frozen=True)
class FixShapes(ir.passes.InPlacePass):
    """Give inputs a static shape; axes that may have several lengths stay open, and are one.

    Parameters
    ----------
    shapes : mapping of str to Shape
        By input name.
    batch_of_one : bool
        Fix the first axis of the other inputs to 1, where it is all that is open.

    Raises
    ------
    TargetError
        If other axes are open then.
    UsageError
        If an input does not exist, or its shape cannot become the one asked for.
    """

    shapes: Mapping[str, Shape]
    batch_of_one: bool = False
    effect: ClassVar[Effect] = Effect.EXACT

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Set the shapes; shape inference carries them on."""
        inputs = {value.name: value for value in model.graph.inputs}
        length = ir.SymbolicDim(self._length(inputs))
        for name, shape in self.shapes.items():
            if name not in inputs:
                known = ", ".join(str(known) for known in inputs)
                raise UsageError(f"--shape {name}", "the model has no such input", f"its inputs are {known}")
            present = inputs[name].shape
            if present is not None and not _fits(present, shape):
                fact = f"{'x'.join(map(_said, shape))} does not fit the input's shape {present}"
                raise UsageError(f"--shape {name}", fact, "only open axes can be fixed")
            inputs[name].shape = ir.Shape([length if isinstance(size, tuple) else size for size in shape])
        batches = [value for value in model.graph.inputs if _has_open_batch(value)] if self.batch_of_one else []
        for value in batches:
            value.shape = ir.Shape([1, *list(value.shape or ())[1:]])
        return ir.passes.PassResult(model, bool(self.shapes or batches))

    def _length(self, inputs: Mapping[str | None, ir.Value]) -> str:
        """Return the name of the axes that may have several lengths: the model's own, where it has one."""
        names = {
            dim.value
            for name, shape in self.shapes.items() if name in inputs
            for dim, size in zip(inputs[name].shape or (), shape, strict=False)
            if isinstance(size, tuple) and isinstance(dim, ir.SymbolicDim)
        }  # fmt: skip
        return next(iter(names)) or LENGTH if len(names) == 1 else LENGTH


def _has_open_batch(value: ir.Value) -> bool:
    if value.is_initializer():
        return False
    shape = list(value.shape) if value.shape is not None else [None, None]
    if any(not isinstance(length, int) for length in shape[1:]):
        place, fact = f"input '{value.name}'", f"has the open shape {value.shape}, and the target takes none"
        raise TargetError(place, fact, f"fix it: --shape {value.name}=1x...")
    return bool(shape) and not isinstance(shape[0], int)


def _fits(present: ir.Shape, wanted: Shape) -> bool:
    if len(present) != len(wanted):
        return False
    return all(not isinstance(old, int) or old == new for old, new in zip(present, wanted, strict=True))


def _said(size: int | tuple[int, ...]) -> str:
    return str(size) if isinstance(size, int) else ",".join(map(str, size))
