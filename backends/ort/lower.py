"""Lower to ONNX Runtime: write the model, then look at what the runtime's own optimizer makes of it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import onnx
import onnx_ir as ir

from qcompile.backends.base import Lowered, Subject, Unbounded, read_targets, require_no_segments, require_one_length
from qcompile.backends.ort.device import DeviceSession
from qcompile.backends.ort.half_values import HALF, slots
from qcompile.backends.ort.kernel_table import cuda_kernels, placements
from qcompile.backends.ort.legalize import RULES_OF, legalize
from qcompile.backends.ort.phones import lower as phones
from qcompile.backends.ort.phones import mobile
from qcompile.backends.ort.probe import executed, measure
from qcompile.backends.ort.round_halves import rounded
from qcompile.backends.ort.tensorrt_rules import MUST, SHOULD, WEIGHTED, violations
from qcompile.core import model as models
from qcompile.core import runtime
from qcompile.core.contract import Effect, Refusal, Track
from qcompile.core.costs import CostTable
from qcompile.core.errors import ModelError, TargetError, UsageError, VerificationError
from qcompile.core.execution import Kernel
from qcompile.core.plan import OpPlan, Precision, QuantPlan
from qcompile.core.target import LIMITS, OpKind, Target
from qcompile.passes import structure

MODEL_FILE = "model.onnx"
#: The artifact's own note of the provider that it is for, where that is not the CPU's.
PROVIDER = "qcompile.provider"
#: The provider of targets whose settings name none.
CPU = "cpu"

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
        return read_targets("qcompile.backends.ort", costs=True)

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
        require_no_segments(target)
        require_one_length(target, f"means nothing for {target.name}, whose models take inputs of any length")
        for key in LIMITS:
            if target.settings.get(key) is not None:
                fact = f"means nothing for {target.name}, whose runtime manages memory as it likes"
                raise UsageError(f"--{key.replace('_', '-')}", fact, "leave it out, or choose a microcontroller")
        if target.costs is not None and target.device:
            fact = f"has times of processors, and {target.name} runs on {target.device}"
            raise UsageError("--costs", fact, "leave it out")

    def lower(self, model: ir.Model, plan: QuantPlan, target: Target, folder: Path) -> Lowered:
        """Write ``model.onnx`` and tell which planned operators the runtime really runs as integers."""
        if target.settings.get("provider") == mobile.PROVIDER:
            return self._lower_mobile(model, plan, target, folder)
        phone, provider = phones.provider_of(target), target.settings.get("provider", CPU)
        if phone is not None:
            legal = phone.legalized(model)
            models.save(legal, folder / MODEL_FILE)
            kernels, _ = _kernels(plan, target, _executed(folder))
            return phones.lower(phone, legal, plan, target, kernels, _written(folder))
        rules = RULES_OF[provider]
        if provider == CPU:
            models.save(legalize(model), folder / MODEL_FILE)
            return Lowered(_written(folder), *_kernels(plan, target, _executed(folder)), same_form=True)
        # Where nodes run is told by types, which the last rule leaves out of the file.
        legal = legalize(model, rules[:-1])
        if provider == "tensorrt":
            _require_rules(legal, bool(plan.tensors))
        placed = placements(legal, models.opset(legal), cuda_kernels())
        stored = legalize(legal, rules[-1:])
        stored.metadata_props[PROVIDER] = provider
        models.save(stored, folder / MODEL_FILE)
        kept = not any(getattr(rule, "effect", None) is Effect.LOSSY for rule in rules)
        return Lowered(_written(folder), *_by_rules(plan, legal), placement=placed, same_form=kept)

    def on_device(self, target: Target, fallback: bool) -> Callable[[Path], DeviceSession]:
        """Return what loads a model file into a session of the target's provider."""
        return partial(DeviceSession, provider=target.settings["provider"], fallback=fallback)

    def _lower_mobile(self, model: ir.Model, plan: QuantPlan, target: Target, folder: Path) -> Lowered:
        """Write ``model.ort`` and what a runtime that is built for it alone must have."""
        legal = legalize(model, mobile.RULES)
        written, executed = mobile.write(legal, folder)
        kernels, refusals = _kernels(plan, target, executed)
        return Lowered(written, kernels, refusals, mobile.bytes_by_cause(legal, folder), notes=(mobile.NOTE,))

    def halvable(self, node: ir.Node, target: Target) -> bool:
        """Tell whether a provider computes a node in float16: CUDA's by its table, CoreML's by its list."""
        if phones.provider_of(target) is not None:
            return phones.is_halvable(node)
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
        """Measure what the installed runtime makes of patterns, and what kernels take here.

        Raises
        ------
        TargetError
            If the target's kernels are none of this processor's.
        """
        if target.device:
            remedy = "leave it out: such targets have no costs; 'qcompile run' times whole artifacts"
            raise TargetError(target.name, f"runs on {target.device}, whose kernels are not measured", remedy)
        return measure(target, subjects, processor, track)

    def open(
        self, folder: Path, files: tuple[str, ...], threads: int = 1
    ) -> Callable[[runtime.Feeds], runtime.Outputs]:
        """Load the artifact as a user would, with all of the runtime's optimizations.

        One for a GPU is run by the CPU provider: its Q/DQ as they are defined, its float16 rounded after each operator.
        """
        path = folder / files[0]
        provider = _provider(path)
        content = rounded(models.load_written(path)) if provider == "cuda" else path
        return runtime.Session(content, threads=threads, integer_kernels=provider == CPU).run


def _executed(folder: Path) -> list[onnx.NodeProto]:
    """Return the nodes that the runtime makes of the model in a folder."""
    try:
        return runtime.optimized_nodes(folder / MODEL_FILE)
    except ModelError as error:
        # The model that came in did load: what does not is ours.
        raise VerificationError("artifact", error.fact, "report it with the model") from error


def _provider(path: Path) -> str:
    """Return what an artifact was made for; files of ORT format are a processor's."""
    if path.suffix != Path(MODEL_FILE).suffix:
        return CPU
    notes = {entry.key: entry.value for entry in onnx.load(path, load_external_data=False).metadata_props}
    return notes.get(PROVIDER, CPU)


def _written(folder: Path) -> tuple[str, ...]:
    """Return the files of the artifact, the model first."""
    return tuple(sorted(file.name for file in folder.iterdir() if file.name.startswith(MODEL_FILE)))


def _require_rules(model: ir.Model, ours: bool) -> None:
    """Hold Q/DQ to what TensorRT takes.

    Raises
    ------
    ModelError
        If they came with the model.
    VerificationError
        If they are of our making.
    """
    for violation in violations(model, MUST):
        fact = f"'{violation.node}' {violation.fact}: TensorRT's rule '{violation.rule}'"
        if ours:
            raise VerificationError("artifact", fact, "report it with the model")
        raise ModelError("model", fact, "give the float model, or one that was quantized for TensorRT")


def _by_rules(plan: QuantPlan, model: ir.Model) -> tuple[dict[str, str], tuple[Refusal, ...]]:
    """Return what TensorRT computes on codes, by its rules, and where they could be followed better."""
    linear = {structure.node_name(node) for node in model.graph if structure.is_standard(node, *WEIGHTED)
              and all(structure.produced_by(value, "DequantizeLinear") for value in node.inputs[:2])}  # fmt: skip
    kernels = {name: f"int8 {op.op_type}" for name, op in plan.ops.items() if name in linear}
    # An Add that is planned so is one that reads what it adds as codes.
    kernels |= {name: "part of the Conv in front of it" for name, op in plan.ops.items()
                if op.op_type == "Add" and op.precision is Precision.INTEGER}  # fmt: skip
    refusals = [Refusal(name, f"{op.op_type} was quantized, but has no Q/DQ in the artifact") for name, op in
                plan.ops.items() if op.precision is Precision.INTEGER and op.op_type in WEIGHTED
                and name not in linear]  # fmt: skip
    refusals += [Refusal(one.node, f"it {one.fact}: slower than it could be by TensorRT's rule '{one.rule}'")
                 for one in violations(model, SHOULD)]  # fmt: skip
    return kernels, tuple(refusals)


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
