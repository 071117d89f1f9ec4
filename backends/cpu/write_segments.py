"""The folder of a network in segments: a folder for each library, ONNX models of what is between, and what runs it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import onnx_ir as ir

from qcompile.backends.cpu.segments import Segment
from qcompile.backends.cpu.session import DESCRIPTION
from qcompile.backends.tvm.schedules.vectors import Processor
from qcompile.calib.work import Cost
from qcompile.core import model as models
from qcompile.core import runtime
from qcompile.passes import structure

SESSION = "segmented_session.py"


def named(index: int) -> str:
    """Return what a segment's folder, or its model, is called."""
    return f"segment{index}"


def describe(segments: Sequence[Segment], static: ir.Model, processor: Processor, name: str) -> dict[str, Any]:
    """Return what `network.json` holds: ports, and segments in the order in which they run."""
    return {
        "name": name,
        "architecture": processor.architecture,
        "processor": processor.name,
        "instructions": list(processor.flags),
        **_ports(static.graph),
        "segments": [
            {"library" if part.network else "model": named(index) + ("" if part.network else ".onnx"),
             **_ports(part.model.graph)}
            for index, part in enumerate(segments)
        ],
    }  # fmt: skip


def _ports(graph: ir.Graph) -> dict[str, list[dict[str, Any]]]:
    def port(value: ir.Value) -> dict[str, Any]:
        shape = [size if isinstance(size, int) else None for size in value.shape or ()]
        dtype = str(value.dtype.numpy().name) if value.dtype is not None else "float32"
        return {"name": value.name, "shape": shape, "dtype": dtype}

    return {"inputs": [port(value) for value in graph.inputs], "outputs": [port(value) for value in graph.outputs]}


def write_models(segments: Sequence[Segment], folder: Path) -> list[str]:
    """Write the ONNX models and the session, and return their names."""
    written = []
    for index, part in enumerate(segments):
        if part.network is None:
            models.save(part.model, folder / f"{named(index)}.onnx")
            written += sorted(file.name for file in folder.iterdir() if file.name.startswith(f"{named(index)}.onnx"))
    source = files("qcompile.backends.cpu") / SESSION
    (folder / "session.py").write_text(source.read_text(encoding="utf-8"), encoding="utf-8")
    return [*written, "session.py"]


def write_description(folder: Path, content: dict[str, Any]) -> str:
    """Write `network.json` and return its name."""
    (folder / DESCRIPTION).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return DESCRIPTION


def told(segments: Sequence[Segment], static: ir.Model) -> tuple[dict[str, Any], ...]:
    """Return what a report says of segments: who runs each, its part of the work, and what forced it.

    Work is as `calib/work.py` counts it: multiply-accumulates, and for operators without any the elements that they
    write, so many of which take as long. Q/DQ count nothing.
    """
    cost = Cost.of(static, runtime.synthetic_feeds(static, 0))
    work = {structure.node_name(node): count for node, count in zip(static.graph, cost.work, strict=True)}
    counts = [sum(work.get(name, 0) for name in part.operators) for part in segments]
    total = max(1, sum(counts))
    return tuple(
        {
            "runs_on": "library" if part.network is not None else "onnxruntime",
            "file": named(index) + ("" if part.network is not None else ".onnx"),
            "operators": sum(name in work for name in part.operators),
            "work": count,
            "share": round(count / total, 4),
            "forced_by": [{"node": name, "reason": reason} for name, reason in part.forced.items()],
        }
        for index, (part, count) in enumerate(zip(segments, counts, strict=True))
    )
