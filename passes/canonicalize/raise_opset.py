"""Raise the opset, so that later passes meet one form of each operator."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import onnx
import onnx_ir as ir
from onnxscript.version_converter import ConvertVersionPass

from qcompile.core import model as models
from qcompile.core.contract import Effect, Refusal, Rewritten
from qcompile.core.errors import ModelError, first_line

#: The first opset whose DequantizeLinear has a scale per channel.
LOWEST_USABLE = 13
FIRST_SCAN_WITHOUT_BATCH = 9


@dataclass(frozen=True)
class RaiseOpset(ir.passes.InPlacePass):
    """Convert the model to at least `opset`; a newer model stays as it is.

    Raises
    ------
    ModelError
        If the conversion fails below opset 13, where Q/DQ per channel cannot be expressed, or would change a meaning.
    """

    opset: int
    effect: ClassVar[Effect] = Effect.CLOSE

    def call(self, model: ir.Model) -> Rewritten:
        """Convert in place."""
        before = models.opset(model)
        if before >= self.opset:
            return Rewritten(model, False)
        if "" not in model.opset_imports:  # a model of another domain only: nothing in it depends on the version
            model.opset_imports[""] = self.opset
            return Rewritten(model, True)
        if before < FIRST_SCAN_WITHOUT_BATCH and any(node.op_type == "Scan" for node in model.graph.all_nodes()):
            # The converters keep such a Scan as it is, and it would scan another axis.
            fact = f"has a Scan of opset {before}, whose inputs have a batch axis that later ones do not have"
            raise ModelError("model", fact, f"export it with opset {FIRST_SCAN_WITHOUT_BATCH} or newer")
        reason = ""
        try:
            with silenced("onnxscript.version_converter"):
                ConvertVersionPass(self.opset, fallback=True)(model)
        except Exception as error:  # the converter raises whatever its adapters do
            reason = first_line(error)
        after = models.opset(model)
        if after >= self.opset:
            # Runtimes read any pair of versions, the standard wants the format that knows the opset's types.
            entries = [onnx.helper.make_opsetid(domain, version) for domain, version in model.opset_imports.items()]
            needed = onnx.helper.find_min_ir_version_for(entries, ignore_unknown=True)
            model.ir_version = max(model.ir_version or 0, needed)
            return Rewritten(model, True)
        if after < LOWEST_USABLE:
            fact = f"opset {before} cannot be raised to {self.opset} ({reason or 'onnx has no adapter for it'})"
            raise ModelError("model", fact, f"export it with opset {LOWEST_USABLE} or newer")
        detail = f": {reason}" if reason else ""
        return Rewritten(model, False, (Refusal("model", f"opset {after} stays, onnx cannot raise it{detail}"),))


@contextlib.contextmanager
def silenced(name: str) -> Iterator[None]:
    """Keep a library from logging which of its two converters it takes; what comes of it is checked anyway."""
    logger = logging.getLogger(name)
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before
