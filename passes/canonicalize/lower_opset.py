"""Lower the opset of a model that is newer than the runtime, so that there is something to hold the passes against."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx
import onnx_ir as ir
from onnxscript.version_converter import ConvertVersionPass

from qcompile.core import model as models
from qcompile.core.contract import Effect
from qcompile.core.errors import ModelError
from qcompile.passes.canonicalize.raise_opset import silenced


@dataclass(frozen=True)
class LowerOpset(ir.passes.InPlacePass):
    """Convert the model to at most `opset`, in a file format of at most `ir_version`.

    A new opset mostly admits new types; what uses none of them is the same operator in the old one. onnx's converter
    knows which is which and refuses the rest.

    Parameters
    ----------
    opset, ir_version : int
        The newest that the runtime takes.
    runtime : str
        Its name, for the message.

    Raises
    ------
    ModelError
        If an operator does not exist in the older opset, or not with its types or attributes.
    """

    opset: int
    ir_version: int
    runtime: str
    effect: ClassVar[Effect] = Effect.EXACT

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Convert in place."""
        before, version = models.opset(model), model.ir_version or 0
        model.ir_version = min(version, self.ir_version)
        if before > self.opset:
            changed = _changed_since(model, self.opset)
            with silenced("onnxscript.version_converter"):
                ConvertVersionPass(self.opset, fallback=True)(model)
            if models.opset(model) > self.opset:
                fact = (
                    f"has opset {before}; {self.runtime} takes {self.opset} at most, which cannot express its {changed}"
                )
                raise ModelError("model", fact, f"export it with opset {self.opset} or older")
        return ir.passes.PassResult(model, before > self.opset or version > self.ir_version)


def _changed_since(model: ir.Model, opset: int) -> str:
    """Name the operators of the default domain that changed behind an opset."""
    nodes = [node for node in model.graph.all_nodes() if node.domain in ("", "ai.onnx")]
    nodes += [node for function in model.functions.values() for node in function.all_nodes() if node.domain == ""]
    newest = models.opset(model)
    since = {node.op_type: onnx.defs.get_schema(node.op_type, newest).since_version for node in nodes}
    return ", ".join(sorted(op_type for op_type, version in since.items() if version > opset))
