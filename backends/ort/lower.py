"""Lower to ONNX Runtime: write the model, then look at what the runtime's own optimizer makes of it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, ClassVar

import onnx
import onnx_ir as ir

from qcompile.backends.base import Lowered, Subject, Unbounded, require_one_length
from qcompile.backends.ort.half_values import HALF, slots
from qcompile.backends.ort.kernel_table import cuda_kernels, placements
from qcompile.backends.ort.legalize import RULES_OF, legalize
from qcompile.backends.ort.probe import executed, measure
from qcompile.core import model as models
from qcompile.core import runtime
from qcompile.core.contract import Refusal, Track
from qcompile.core.costs import CostTable
from qcompile.core.errors import ModelError, UsageError, VerificationError
from qcompile.core.execution import Kernel
from qcompile.core.plan import OpPlan, Precision, QuantPlan
from qcompile.core.target import LIMITS, OpKind, Target

MODEL_FILE = "model.onnx"

#: Kernels that compute on codes. What the optimizer leaves under another name runs in float between Q and DQ.
INTEGER_KERNELS = frozenset({
    "ConvInteger", "DynamicQuantizeMatMul", "MatMulInteger", "MatMulIntegerToFloat", "QGemm", "QLinearAdd",
    "QLinearAveragePool", "QLinearConcat", "QLinearConv", "QLinearGlobalAveragePool", "QLinearMatMul", "QLinearMul",
})  # fmt: skip


class OrtBackend(Unbounded):
    """The backend ``ort``."""

    name: ClassVar[str] = "ort"

    def targets(self) -> Iterable[Target]:
        """Return the targets of backends/ort/targets."""
        here = files("qcompile.backends.ort")
        for entry in sorted((here / "targets").iterdir(), key=lambda entry: entry.name):
            if entry.name.endswith(".toml"):
                yield Target.from_toml(entry, here / "costs")

    def available(self) -> bool:
        """Tell whether an ONNX Runtime is installed."""
        return bool(runtime.distributions())

    def check(self, target: Target) -> None:
        """Refuse bounds on memory, which the runtime manages as it likes.

        Raises
        ------
        UsageError
            Naming the option.
        """
        require_one_length(target, f"means nothing for {target.name}, whose models take inputs of any length")
        for key in LIMITS:
            if target.settings.get(key) is not None:
                fact = f"means nothing for {target.name}, whose runtime manages memory as it likes"
                raise UsageError(f"--{key.replace('_', '-')}", fact, "leave it out, or choose a microcontroller")

    def lower(self, model: ir.Model, plan: QuantPlan, target: Target, folder: Path) -> Lowered:
        """Write ``model.onnx`` and tell which planned operators the runtime really runs as integers."""
        path = folder / MODEL_FILE
        provider = target.settings.get("provider", "cpu")
        rules = RULES_OF[provider]
        # Where nodes run is told by types, which the last rule leaves out of the file.
        legal = legalize(model, rules[:-1])
        placed = () if provider == "cpu" else placements(legal, models.opset(legal), cuda_kernels())
        models.save(legalize(legal, rules[-1:]), path)
        written = tuple(sorted(file.name for file in folder.iterdir() if file.name.startswith(MODEL_FILE)))
        try:
            executed = runtime.optimized_nodes(path)
        except ModelError as error:
            # The model that came in did load: what does not is ours.
            raise VerificationError("artifact", error.fact, "report it with the model") from error
        kernels, refusals = _kernels(plan, target, executed)
        return Lowered(written, kernels, refusals, placement=placed or None)

    def halvable(self, node: ir.Node, target: Target) -> bool:
        """Tell whether the CUDA provider computes a node in float16, by the table of its kernels."""
        if target.settings.get("provider") != "cuda":
            return True
        places = slots(node, target.opset)
        if places is None:
            return False
        values = [*(node.inputs[index] for index in places.inputs), *(node.outputs[index] for index in places.outputs)]
        changed = {value: HALF for value in values if value is not None}
        return not cuda_kernels().obstacle(node, target.opset, changed)

    def size(self, model: ir.Model) -> int:
        """Return the bytes that `lower` would write for a QDQ model."""
        return models.file_bytes(legalize(model))

    def executed(self, model: ir.Model, samples: Sequence[runtime.Feeds]) -> list[list[Kernel]]:
        """Return for each sample the kernels that the runtime executes for a QDQ model."""
        return executed(model, samples)

    def measure(self, target: Target, subjects: Sequence[Subject], processor: str, track: Track[Any]) -> CostTable:
        """Measure what the installed runtime makes of patterns, and what kernels take here."""
        return measure(target, subjects, processor, track)

    def open(
        self, folder: Path, files: tuple[str, ...], threads: int = 1
    ) -> Callable[[runtime.Feeds], runtime.Outputs]:
        """Load the artifact as a user would, with all of the runtime's optimizations."""
        return runtime.Session(folder / files[0], threads=threads).run


def _kernels(
    plan: QuantPlan, target: Target, nodes: Iterable[onnx.NodeProto]
) -> tuple[dict[str, str], tuple[Refusal, ...]]:
    """Match planned operators with executed nodes; the optimizer keeps a node's name and may append `_token_<n>`."""
    executed: dict[str, str] = {}
    for node in nodes:
        executed.setdefault(re.sub(r"(_token_\d+)+$", "", node.name), node.op_type)
    kernels: dict[str, str] = {}
    refusals = []
    for name, op in plan.ops.items():
        kernel = executed.get(name, "")
        if op.precision is Precision.FLOAT and kernel.startswith("QLinear"):
            kernels[name] = kernel  # the runtime takes in what stands between Q/DQ, planned or not
        if op.precision is not Precision.INTEGER or not _needs_kernel(op, target):
            continue
        if kernel in INTEGER_KERNELS:
            kernels[name] = kernel
        else:
            found = f"runs it as {kernel}" if kernel else "fused it into another kernel"
            refusals.append(Refusal(name, f"{op.op_type} was quantized, but onnxruntime {found}"))
    return kernels, tuple(refusals)


def _needs_kernel(op: OpPlan, target: Target) -> bool:
    """Tell whether an operator computes: one that moves codes or is absorbed has no integer kernel of its own."""
    rule = target.ops.get(op.op_type)
    return rule is not None and rule.kind in (OpKind.LINEAR, OpKind.ELEMENTWISE) and not op.reason
