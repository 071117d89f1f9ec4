"""`qcompile inspect`: what a model is, and what a target would make of its operators, without running it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qcompile.backends.base import find_target
from qcompile.core import model as models
from qcompile.core.plan import OpPlan
from qcompile.passes.canonicalize import Canonicalize
from qcompile.passes.place import place


def inspect(path: Path, target_name: str) -> dict[str, Any]:
    """Return the facts, JSON-ready.

    Raises
    ------
    QcompileError
        If the model or the target is not one.
    """
    target, _ = find_target(target_name)
    model = models.load(path)
    canonical = model.clone()
    Canonicalize(target.opset)(canonical)
    placement = place(canonical, target, weights=True, activations=True)
    return {
        "model": str(path),
        "opset": models.opset(model),
        "nodes": len(model.graph),
        "nodes_after_canonicalize": len(canonical.graph),
        "weight_bytes": models.initializer_bytes(model),
        "inputs": [models.describe(value) for value in model.graph.inputs],
        "outputs": [models.describe(value) for value in model.graph.outputs],
        "target": target.name,
        "operators": by_fate(placement.ops),
        "ops": [
            {"name": name, "op_type": op.op_type, "precision": op.precision.value, "reason": op.reason}
            for name, op in placement.ops.items()
        ],
    }


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
