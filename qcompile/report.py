"""What a compile did and why, as JSON-ready data. docs/schemas/report.schema.json describes it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir

from qcompile import cache, memory, timing
from qcompile.backends.base import Lowered, Placed
from qcompile.core import model as models
from qcompile.core.lengths import Lengths
from qcompile.core.plan import OpPlan, Precision, QuantPlan, Role
from qcompile.core.target import Target
from qcompile.evidence import Evidence
from qcompile.fidelity import Fidelity
from qcompile.job import Job
from qcompile.options import EXPECTED_SQNR
from qcompile.passes import structure
from qcompile.pricing import Prediction
from qcompile.timing import Latency
from qcompile.verify import Proof

SCHEMA_VERSION = 1
#: Two timings of one model differ by this much on a machine that does other things as well.
NOISE = 0.03
#: Types of stored weights; multiples of packed ones are unsigned.
WEIGHTS = (ir.DataType.INT4, ir.DataType.UINT4, ir.DataType.INT8, ir.DataType.UINT8, ir.DataType.INT16)


def build(
    job: Job, evidence: Evidence, canonical: ir.Model, plan: QuantPlan, lowered: Lowered, proof: Proof, folder: Path,
    lengths: Lengths | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Put the report together. It holds nothing of the machine and the moment, so that equal inputs give equal bytes.

    Parameters
    ----------
    job : Job
    evidence : Evidence
    canonical : onnx_ir.Model
        What the plan names.
    folder : Path
        Where the backend wrote its files, for their size.
    lengths : Lengths, optional
        Those that inputs may have, where there are several.
    """
    model, target, options, steps = job.model, job.target, job.options, job.pipeline.steps
    content: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "qcompile": cache.versions()["qcompile"],
        "warnings": [],
        "target": target.name,
        "model": describe(model),
        "data": {
            "sha256": cache.key(evidence.digest),
            "evaluated_on": evidence.source,
            "caveat": evidence.caveat or None,
        },
        "options": options.decisive(),
        "versions": cache.versions(),
        "files": list(lowered.files),
        "size": _size(model, lowered, folder),
        "fidelity": _fidelity(proof.fidelity),
        "lengths": _lengths(lengths, proof),
        "segments": [dict(segment) for segment in lowered.segments] or None,
        "kernel_rounding": _outputs(proof.rounding),
        "precision": {precision.value: plan.count(precision) for precision in Precision},
        "activation_ranges": _ranges(plan),
        "allocation": dict(plan.allocation) or None,
        "maps": dict(plan.maps) or None,
        "operators": _operators(plan, lowered, proof, canonical),
        "passes": [
            {"name": s.name, "effect": s.effect, "nodes_before": s.nodes_before, "nodes_after": s.nodes_after,
             "relative_error": s.error if math.isfinite(s.error) else None} for s in steps
        ],
        "refusals": [
            {"stage": stage, "node": refusal.node, "reason": refusal.reason}
            for stage, refusals in [*((s.name, s.refusals) for s in steps), ("backend", lowered.refusals)]
            for refusal in refusals
        ],
    }  # fmt: skip
    if lowered.placement is not None:
        content["placement"] = _placement(lowered.placement, target)
    notes = (*(note for step in steps for note in step.notes), *lowered.notes)
    content["warnings"] = [*notes, *_magnified(proof), *_warnings(content, lowered)]
    return content


def _lengths(lengths: Lengths | None, proof: Proof) -> dict[str, Any] | None:
    if lengths is None:
        return None
    padding = lengths.padding
    return {
        "sizes": list(lengths.sizes),
        "padding": padding and {
            "mask": padding.mask, "outputs": {name: list(axes) for name, axes in padding.outputs.items()}
        },
        "fidelity": {str(size): _fidelity(proof.by_length[size]) for size in sorted(proof.by_length)},
    }  # fmt: skip


def _placement(placed: Sequence[Placed], target: Target) -> dict[str, Any]:
    """Return what runs where, what the host is left with by name and reason."""
    host = [{"node": one.node, "op_type": one.op_type, "reason": one.host} for one in placed if one.host]
    counts = Counter(one.op_type for one in placed if not one.host)
    return {"device": target.device, "on_device": dict(sorted(counts.items())), "on_host": host}


def _ranges(plan: QuantPlan) -> dict[str, int]:
    """Count the activations whose range is known beforehand, and those that take it in each run."""
    dynamic = [quant.is_dynamic for quant in plan.tensors.values() if quant.role is Role.ACTIVATION]
    return {"static": dynamic.count(False), "dynamic": dynamic.count(True)}


def predicted(prediction: Prediction | None) -> dict[str, Any]:
    """Return what the cost table predicts, as a part of the report."""
    if prediction is None:
        return {"predicted_latency": None}
    times = {"float_us": _rounded(prediction.reference), "artifact_us": _rounded(prediction.candidate)}
    return {"predicted_latency": times | {"ratio": _rounded(prediction.ratio)}}


def _rounded(number: float) -> float:
    return float(f"{number:.3g}")


def warnings(content: Mapping[str, Any], measured: Mapping[str, Any]) -> list[str]:
    """Return everything that must be said before any figure: what the figures rest on, then what is worse."""
    caveat = content["data"]["caveat"]
    return [*([caveat] if caveat else []), *measured["warnings"], *content["warnings"]]


def measurements(content: Mapping[str, Any], latency: Latency | None, lowered: Lowered, job: Job) -> dict[str, Any]:
    """Return what was seen on this machine."""
    warnings, pipeline = [], job.pipeline
    if latency is not None and latency.ratio > 1.0 + NOISE:
        times = f"{latency.candidate_ms:.3g} ms against {latency.reference_ms:.3g} ms"
        warnings.append(f"Slower than float here: {times}.")
    if pipeline.cache is not None and pipeline.cache.failure:
        warnings.append(f"The cache takes no entries, this compile cannot be resumed: {pipeline.cache.failure}.")
    if not memory.holds(job.options, job.model, 2):
        warnings.append(f"Latency was not measured: --max-memory {job.options.max_memory} has no room for two models.")
    return {
        "schema_version": SCHEMA_VERSION,
        "processor": timing.processor(),
        "latency": latency
        and {
            "float_ms": latency.reference_ms,
            "artifact_ms": latency.candidate_ms,
            "ratio": latency.ratio,
            "rounds": latency.rounds,
            "threads": 1,
        },
        "device": lowered.measured and dict(lowered.measured),
        "seconds": dict(pipeline.seconds),
        "memory": memory.as_json(job.options),
        "warnings": warnings,
        "report_sha256": cache.key(repr(content)),
    }


def _magnified(proof: Proof) -> list[str]:
    """Return which outputs kernels may be far from the QDQ model in, and why."""
    return [
        f"Output '{name}' magnifies float32's last digits: scales off by 1e-6 move it to {own:.1f} dB from the QDQ "
        f"model, kernels to {proof.rounding.outputs[name].sqnr:.1f} dB; a kernel's fault no larger would not be seen."
        for name, own in proof.magnified.items()
        if math.isfinite(own)
    ]


def _warnings(content: Mapping[str, Any], lowered: Lowered) -> list[str]:
    """Return what is worse than it should be, the gravest first."""
    warnings = []
    if (maps := content["maps"]) is not None:
        names = ", ".join(maps["bits"])
        cost = f"{_said(maps['sqnr'])} expected on held-out samples, {_said(maps['sqnr_of_eight'])} with all in eight"
        warnings.append(f"Stored in four bits to fit the memory: {names}; {cost}.")
    if (segments := content["segments"]) is not None:
        warnings.append(_in_segments(segments))
    for name, measures in content["fidelity"]["outputs"].items():
        if measures["equal"] is not None:
            if measures["equal"] < 1.0:
                warnings.append(
                    f"Output '{name}', of whole numbers, equals float's in {measures['equal']:.1%} of them."
                )
        elif measures["sqnr"] is None and not measures["exact"]:
            warnings.append(f"Output '{name}' has no SQNR: it is not finite, or not zero, where float's is.")
        elif measures["sqnr"] is not None and measures["sqnr"] < EXPECTED_SQNR:
            warnings.append(f"Fidelity of output '{name}' is {measures['sqnr']:.1f} dB, below {EXPECTED_SQNR:g} dB.")
    wanted = content["data"]["caveat"] is None and content["options"]["activations"] != "none"
    if wanted and not content["precision"]["integer"]:
        warnings.append("No operator was quantized to integers; the table says why of each.")
    unpaired = content["allocation"] is not None and content["allocation"].get("pairs") is None
    if content["options"]["pairs"] and content["options"]["weights"] != "4" and unpaired:
        reason = "there are none, or the model is too large to be run with each weight"
        warnings.append(f"Pairs of weights were not measured: {reason}.")
    if content["size"]["ratio"] > 1.0:
        warnings.append(f"Larger than float: {content['size']['ratio']:.2f}x; the report sorts the bytes by cause.")
    if lowered.refusals:
        names = ", ".join(refusal.node for refusal in lowered.refusals[:3])
        warnings.append(f"{len(lowered.refusals)} quantized operators run in float all the same: {names}.")
    return warnings


def _in_segments(segments: Sequence[Mapping[str, Any]]) -> str:
    elsewhere = [segment for segment in segments if segment["runs_on"] == "onnxruntime"]
    forced = [one["node"] for segment in elsewhere for one in segment["forced_by"]]
    named = ", ".join(forced[:3]) + (f" and {len(forced) - 3} more" if forced[3:] else "")
    share = sum(segment["share"] for segment in elsewhere)
    return (
        f"Runs from Python alone, with onnxruntime: {len(elsewhere)} of {len(segments)} segments are no library, "
        f"{share:.1%} of the work. What forced that: {named}."
    )


def _said(decibel: float | None) -> str:
    return "no noise" if decibel is None else f"{decibel:.1f} dB"


def describe(model: ir.Model) -> dict[str, Any]:
    """Return what a report and a manifest say of the model that came in."""
    return {
        "sha256": models.content_hash(model),
        "opset": models.opset(model),
        "nodes": len(model.graph),
        "inputs": [models.describe(value) for value in model.graph.inputs],
        "outputs": [models.describe(value) for value in model.graph.outputs],
    }


def _size(model: ir.Model, lowered: Lowered, folder: Path) -> dict[str, Any]:
    float_bytes = models.file_bytes(model)
    if lowered.bytes_by_cause is not None:
        stored = sum(lowered.bytes_by_cause.values())
        by_cause = dict(lowered.bytes_by_cause)
        ratio = round(stored / float_bytes, 4)
        return {"float_bytes": float_bytes, "artifact_bytes": stored, "ratio": ratio, "by_cause": by_cause}
    artifact_bytes = sum((folder / name).stat().st_size for name in lowered.files)
    causes = _bytes_by_cause(models.load_written(folder / lowered.files[0]))
    causes["graph, names and metadata"] = artifact_bytes - sum(causes.values())
    return {
        "float_bytes": float_bytes,
        "artifact_bytes": artifact_bytes,
        "ratio": round(artifact_bytes / float_bytes, 4),
        "by_cause": causes,
    }


def _bytes_by_cause(model: ir.Model) -> dict[str, int]:
    """Sort the bytes of the initializers by why they are there."""
    causes: Counter[str] = Counter()
    for value in models.initializers(model):
        tensor = value.const_value
        assert tensor is not None
        uses = [(node.op_type, index) for node, index in value.uses()]
        if any(op in ("QuantizeLinear", "DequantizeLinear") and index > 0 for op, index in uses):
            cause = "scales and zero points"
        elif tensor.dtype.is_floating_point():
            cause = "weights and constants in float"
        elif tensor.dtype in WEIGHTS:
            cause = f"weights in int{tensor.dtype.bitwidth}"
        elif any(op == "DequantizeLinear" for op, _ in uses):
            cause = "biases in int32"
        else:
            cause = "shapes and indices"
        causes[cause] += tensor.nbytes
    return dict(sorted(causes.items(), key=lambda item: (-item[1], item[0])))


def _fidelity(fidelity: Fidelity) -> dict[str, Any]:
    accuracy = None
    if fidelity.labelled:
        accuracy = {
            "labelled": fidelity.labelled,
            "float_correct": fidelity.reference_correct,
            "artifact_correct": fidelity.candidate_correct,
        }
    return {"samples": fidelity.samples, "outputs": _outputs(fidelity), "accuracy": accuracy}


def _outputs(fidelity: Fidelity) -> dict[str, Any]:
    return {name: comparison.measures() for name, comparison in fidelity.outputs.items()}


def _operators(plan: QuantPlan, lowered: Lowered, proof: Proof, canonical: ir.Model) -> list[dict[str, Any]]:
    nodes = {structure.node_name(node): node for node in canonical.graph.all_nodes()}
    rows = []
    for name, op in plan.ops.items():
        layer, node = proof.layers.get(name), nodes.get(name)
        values = [value for value in node.inputs if value is not None] if node is not None else []
        reads = [structure.name_of(value) for value in values if structure.name_of(value) in plan.tensors]
        makers = [structure.node_name(maker) for value in values if (maker := value.producer()) is not None]
        rows.append({
            "name": name,
            "op_type": op.op_type,
            "precision": op.precision.value,
            "kernel": lowered.kernels.get(name),
            "reason": _reason(op, lowered.kernels.get(name)),
            "sqnr": layer.measures()["sqnr"] if layer is not None else None,
            "reads": reads,
            "after": [maker for maker in dict.fromkeys(makers) if maker in plan.ops],
            "weight_bits": max((plan.tensors[value].bits for value in reads
                                if plan.tensors[value].role is Role.WEIGHT), default=None),
        })  # fmt: skip
    return rows


def _reason(op: OpPlan, kernel: str | None) -> str | None:
    if op.precision is Precision.FLOAT and kernel is not None:
        return "planned as float, but the runtime runs it on codes between its quantized neighbours"
    return op.reason or None
