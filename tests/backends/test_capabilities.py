"""What the installed runtime makes of the patterns, against the table that is shipped, and the traps in it."""

from __future__ import annotations

import importlib.resources
from dataclasses import replace

import pytest

from qcompile.backends.base import find_target
from qcompile.backends.ort.capabilities import AS_EXPORTED, CODES_PICKED, NOTHING, measure, patterns
from qcompile.core import runtime
from qcompile.core.capabilities import Capability
from qcompile.core.costs import CostTable
from qcompile.core.target import OpKind, OpRule

TABLE = CostTable.from_json(importlib.resources.files("qcompile.backends.ort") / "costs" / "avx512-vnni.json")
SHIPPED = {row.pattern: row for row in TABLE.capabilities}
U8S8 = {"activation": "uint8", "weights": "int8", "per_channel": True}


def shipped(op: str, **fields: object) -> Capability:
    """Return the one row of the shipped table that fits."""
    (row,) = (row for row in SHIPPED.values() if row.pattern == replace(Capability(op), **fields))  # type: ignore[arg-type]
    return row


def test_the_installed_runtime_does_what_the_shipped_table_says() -> None:
    assert set(SHIPPED) == set(patterns()), "the patterns are others than the table's: measure it anew"
    found = list(measure())
    differing = [f"{row.pattern}: {row.kernel} now, {SHIPPED[row.pattern].kernel} in the table" for row in found
                 if row.integer != SHIPPED[row.pattern].integer]  # fmt: skip
    assert not differing, "\n".join([f"{runtime.newest_versions()[2]} against {TABLE.runtime}:", *differing])


def test_the_rules_of_the_target_follow() -> None:
    target, _ = find_target("cpu")
    assert target.ops["Conv"] == OpRule(OpKind.LINEAR, fuses=("Relu", "Clip"), weight_only=True)
    assert target.ops["Gemm"] == OpRule(OpKind.LINEAR, False, ("Relu", "Clip"), weight_only=True, fewest_weights=4096)
    matmul = OpRule(OpKind.LINEAR, False, (), weight_only=True, fewest_weights=4096, dynamic=True)
    assert target.ops["MatMul"] == matmul
    assert target.ops["Add"] == OpRule(OpKind.ELEMENTWISE, fuses=("Relu", "Clip"))
    for op in ("AveragePool", "GlobalAveragePool", "Concat"):
        assert target.ops[op] == OpRule(OpKind.ELEMENTWISE)
    assert not target.absent and target.ops.keys() == target.declared.keys()


@pytest.mark.parametrize(
    ("op", "fields", "kernel"),
    [
        ("Conv", {**U8S8, "output": "float"}, "Conv"),
        ("Conv", {**U8S8, "behind": "Relu", "zero_point": "middle"}, "FusedConv"),
        ("Conv", {**U8S8, "behind": "Relu", "zero_point": "middle", "activation": "int8"}, "FusedConv"),
        ("Conv", {**U8S8, "zero_point": "middle", "activation": "uint16"}, "Conv"),
        ("Gemm", {**U8S8, "behind": "Relu", "output": "float"}, "FusedGemm"),
        ("MatMul", {**U8S8, "zero_point": "middle", "activation": "uint16"}, "MatMul"),
        ("MatMul", {**U8S8, "activation": "float", "output": "float"}, "MatMulNBits"),
        ("MatMul", {"activation": "float", "weights": "int4", "output": "float"}, "MatMulNBits"),
        ("MatMul", {"weights": "int4", "output": "float"}, "MatMul"),
        ("MatMul", {**U8S8, "behind": "Add", "output": "float", "form": AS_EXPORTED}, "Gemm"),
        ("LayerNormalization", {"zero_point": "middle"}, "LayerNormalization"),
        ("Gelu", {"zero_point": "middle"}, "Gelu"),
        ("AveragePool", {"zero_point": "middle", "form": "dilations"}, NOTHING),
        ("Conv", {**U8S8, "output": "float", "dynamic": True}, "Conv"),
        ("Gemm", {**U8S8, "output": "float", "dynamic": True}, "Gemm"),
    ],
)
def test_the_traps_are_in_the_table(op: str, fields: dict[str, object], kernel: str) -> None:
    assert (shipped(op, **fields).kernel, shipped(op, **fields).integer) == (kernel, False)


@pytest.mark.parametrize(
    ("op", "fields", "kernel"),
    [
        ("Conv", {**U8S8, "behind": "Clip", "zero_point": "lowest"}, "QLinearConv"),
        ("MatMul", {**U8S8, "output": "float"}, "MatMulIntegerToFloat"),
        ("MatMul", {**U8S8, "behind": "Add", "output": "float"}, "MatMulIntegerToFloat"),
        ("Softmax", {"zero_point": "middle"}, "QLinearSoftmax"),
        ("Gather", {**U8S8, "activation": "float", "output": "float", "form": CODES_PICKED}, "Gather"),
        ("MaxPool", {}, "MaxPool"),
    ],
)
def test_what_computes_on_codes_is_in_the_table(op: str, fields: dict[str, object], kernel: str) -> None:
    assert (shipped(op, **fields).kernel, shipped(op, **fields).integer) == (kernel, True)


def test_the_target_takes_the_faster_activations() -> None:
    """Signed ones take several times as long in products; those of convolutions the runtime makes unsigned itself."""
    target, _ = find_target("cpu")
    assert target.activation_dtype == "uint8"
    unsigned, signed = (TABLE.entries[f"MatMulIntegerToFloat[{dtype},int8]"] for dtype in ("uint8", "int8"))
    ratios = [signed[size] / unsigned[size] for size in signed if size in unsigned]
    assert len(ratios) >= 2 and min(ratios) > 1.5, ratios
    assert shipped("Conv", **{**U8S8, "activation": "int8", "zero_point": "middle"}).reads == "uint8"
    assert shipped("MatMul", **{**U8S8, "activation": "int8", "output": "float"}).reads == "int8"
