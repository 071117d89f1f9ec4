"""`qcompile inspect`: what a model is made of, and what a target would make of its operators, without running it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import onnx_ir as ir

from qcompile.backends.base import find_target
from qcompile.calib.collect import collect_channels
from qcompile.calib.data import input_specs, open_data
from qcompile.calib.outliers import outliers
from qcompile.core import model as models
from qcompile.core.contract import Track
from qcompile.core.plan import OpPlan, Precision
from qcompile.core.target import Target
from qcompile.passes import structure
from qcompile.passes.canonicalize import Canonicalize
from qcompile.passes.patterns import Attention, Norm, Patterns, recognise
from qcompile.passes.place import Placement, place
from qcompile.passes.streams import Segment, Stream, residual_streams
from qcompile.pipeline import untracked


def inspect(
    path: Path, target_name: str, data: str | None = None, track: Track[Any] = untracked, members: bool = False
) -> dict[str, Any]:
    """Return the facts, JSON-ready.

    Parameters
    ----------
    path : Path
    target_name : str
    data : str, optional
        Calibration data. With them the model is run, and the outliers among the channels of activations are shown.
    track : callable
        Shows progress over samples.
    members : bool
        Name the writers, sums and readers of residual streams.

    Raises
    ------
    QcompileError
        If the model or the target is not one.
    """
    target, _ = find_target(target_name)
    model = models.load(path)
    canonical = model.clone()
    Canonicalize(target.opset, widen=True)(canonical)
    patterns = recognise(canonical.graph)
    placement = place(canonical, target, weights=True, activations=True)
    streams = residual_streams(canonical.graph, patterns)
    return {
        "model": str(path),
        "opset": models.opset(model),
        "nodes": len(model.graph),
        "nodes_after_canonicalize": len(canonical.graph),
        "weight_bytes": models.initializer_bytes(model),
        "inputs": [models.describe(value) for value in model.graph.inputs],
        "outputs": [models.describe(value) for value in model.graph.outputs],
        "patterns": _patterns(patterns),
        "not_recognised": [{"node": refusal.node, "reason": refusal.reason} for refusal in patterns.refusals],
        "streams": [_stream(stream) for stream in streams],
        **({"stream_members": stream_members(canonical.graph, streams)} if members else {}),
        "target": target.name,
        "operators": by_fate(placement.ops),
        "ops": [
            {"name": name, "op_type": op.op_type, "precision": op.precision.value, "reason": op.reason}
            for name, op in placement.ops.items()
        ],
        "outliers": [] if data is None else _outliers(canonical, placement, target, data, track),
    }


def _outliers(
    canonical: ir.Model, placement: Placement, target: Target, data: str, track: Track[Any]
) -> list[dict[str, Any]]:
    """Return the activations of linear operators, those that lose most to their outliers first."""
    readers: dict[str, ir.Node] = {}
    for node in canonical.graph:
        if placement.ops[structure.node_name(node)].precision is Precision.INTEGER and structure.is_linear(node):
            readers.setdefault(structure.name_of(next(structure.activation_inputs(node))), node)
    axes = {name: 1 if node.op_type.startswith("Conv") else -1 for name, node in readers.items()}
    samples = open_data(data, input_specs(canonical))
    found = collect_channels(canonical, axes, samples, track)
    rows = [
        {"tensor": name, "reader": readers[name].name, "op_type": readers[name].op_type,
         **asdict(outliers(histograms, target.activation_dtype))}
        for name, histograms in found.items()
    ]  # fmt: skip
    return sorted(rows, key=lambda row: row["per_tensor"] - row["per_channel"])


def by_fate(ops: Mapping[str, OpPlan]) -> list[dict[str, Any]]:
    """Count the operators that share a fate, those on integers first."""
    groups = Counter((op.precision.value, op.op_type, _general(op.reason)) for op in ops.values())
    order = {"integer": 0, "weight_only": 1, "float": 2}
    return [
        {"precision": precision, "op_type": op_type, "count": count, "reason": reason}
        for (precision, op_type, reason), count in sorted(
            groups.items(), key=lambda item: (order[item[0][0]], -item[1], item[0])
        )
    ]


def _general(reason: str) -> str:
    """Drop the name from a reason that names another operator, so that equal fates count together."""
    return reason.split(" '")[0]


def _patterns(patterns: Patterns) -> list[dict[str, Any]]:
    """Count what was recognised, equal ones together."""
    rows = [(f"{norm.kind} norm", _norm(norm)) for norm in patterns.norms]
    rows += [(str(activation.kind), "") for activation in patterns.activations]
    rows += [("rope", "interleaved" if rope.interleaved else "halves") for rope in patterns.ropes]
    rows += [("attention", _attention(attention)) for attention in patterns.attentions]
    return [{"pattern": name, "detail": detail, "count": count} for (name, detail), count in Counter(rows).items()]


def _norm(norm: Norm) -> str:
    length = norm.source.shape[norm.axes[0]] if norm.source.shape is not None else None
    over = f"over {length}" if len(norm.axes) == 1 and isinstance(length, int) else f"over axes {norm.axes}"
    return over if norm.fused else f"{over}, decomposed"


def _attention(attention: Attention) -> str:
    heads, shared = attention.heads, attention.kv_heads
    detail = [f"{heads} heads" if heads == shared else f"{heads} heads on {shared}", f"of {attention.head_dim}"]
    extra = ["RoPE"] * (attention.rope is not None) + ["masked"] * bool(attention.masks)
    return " ".join(detail) + "".join(f", {word}" for word in extra)


def _stream(stream: Stream) -> dict[str, Any]:
    return {
        "kind": str(stream.kind),
        "width": stream.width,
        "segments": len(stream.segments),
        "sums": sum(len(segment.sums) for segment in stream.segments),
        "writers": len(stream.writers),
        "readers": len(stream.readers),
        "norms": sum(len(segment.norms) for segment in stream.segments),
        "obstacles": [{"node": obstacle.node, "reason": obstacle.reason} for obstacle in stream.obstacles],
    }


def stream_members(graph: ir.Graph, streams: Sequence[Stream]) -> list[dict[str, Any]]:
    """Return who writes each segment of each stream, where it is summed and who reads it, in the order of the graph."""
    order = {node: index for index, node in enumerate(graph)}
    return [
        {
            "kind": str(stream.kind),
            "width": stream.width,
            "segments": [
                {"members": _members(segment, order), "obstacles": [asdict(one) for one in segment.obstacles]}
                for segment in stream.segments
            ],
        }
        for stream in streams
    ]


def _members(segment: Segment, order: Mapping[ir.Node, int]) -> list[dict[str, str]]:
    found: list[tuple[int, str, str, str]] = []
    for value in segment.writers:
        node = value.producer()
        what = "a constant" if structure.constant_tensor(value) is not None else "fed to the model"
        place = -1 if node is None else order[node]
        found.append((place, "writer", structure.name_of(value), what if node is None else node.op_type))
    found += [(order[node], "sum", structure.node_name(node), node.op_type) for node in segment.sums]
    for reader in segment.readers:
        node = reader.nodes[-1] if isinstance(reader, Norm) else reader
        what = f"{reader.kind} norm" if isinstance(reader, Norm) else node.op_type
        found.append((order[node], "reader", structure.node_name(node), what))
    return [{"role": role, "name": name, "what": what} for _, role, name, what in sorted(found, key=lambda one: one[0])]
