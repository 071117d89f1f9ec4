"""What follows from a table of capabilities for a target, on tables that no runtime has."""

from __future__ import annotations

from dataclasses import replace

import pytest

from qcompile.core.capabilities import Capability
from qcompile.core.costs import CostTable
from qcompile.core.target import OpKind, OpRule, Target, Types, derived

U8 = Types("uint8", "int8", True)
CONV = Capability("Conv", weights="int8", per_channel=True, zero_point="middle", kernel="QLinearConv", integer=True)
LEFT = replace(CONV, zero_point="", output="float", kernel="Conv", integer=False)
RULES = {"Conv": OpRule(OpKind.LINEAR, weight_only=True, fewest_weights=7)}


def behind(operator: str, *, integer: bool, output: str = "quantized", kernel: str = "QLinearConv") -> Capability:
    zero_point = "lowest" if output == "quantized" else ""
    return replace(CONV, behind=operator, zero_point=zero_point, output=output, integer=integer, kernel=kernel)


def rule(*rows: Capability, types: Types = U8) -> OpRule:
    return derived(RULES, rows, types)[0]["Conv"]


def test_a_result_that_cannot_leave_in_float_is_quantized() -> None:
    assert rule(CONV, LEFT).quantized_output
    assert not rule(CONV, replace(LEFT, integer=True)).quantized_output
    assert rule(CONV).quantized_output, "nothing says that it may"
    assert rule(CONV, LEFT) == OpRule(OpKind.LINEAR, weight_only=True, fewest_weights=7)


def test_an_activation_is_absorbed_if_one_integer_kernel_does_both() -> None:
    assert rule(CONV, LEFT, behind("Relu", integer=True), behind("Clip", integer=True)).fuses == ("Relu", "Clip")
    assert rule(CONV, LEFT, behind("Relu", integer=False), behind("Clip", integer=True)).fuses == ("Clip",)
    assert rule(CONV, LEFT, behind("Relu", integer=True, kernel="QLinearConv+Relu")).fuses == ()
    middle = replace(behind("Relu", integer=True), zero_point="middle")
    assert rule(CONV, LEFT, middle).fuses == ()


def test_what_may_leave_in_float_absorbs_only_what_would_keep_it_from_integers() -> None:
    free = replace(LEFT, integer=True)
    both = behind("Relu", integer=True)
    kept = behind("Relu", integer=True, output="float", kernel="QGemm+Relu")
    assert rule(CONV, free, both, kept).fuses == ()
    assert rule(CONV, free, both, replace(kept, integer=False)).fuses == ("Relu",)


def test_rows_of_other_types_and_forms_do_not_count() -> None:
    others = [
        replace(LEFT, integer=True, activation="int8"),
        replace(LEFT, integer=True, weights="uint8"),
        replace(LEFT, integer=True, per_channel=False),
        replace(LEFT, integer=True, form="depthwise"),
    ]
    assert rule(CONV, LEFT, *others).quantized_output
    assert not rule(replace(CONV, activation="int8"), others[0], types=replace(U8, activation="int8")).quantized_output


@pytest.mark.parametrize("kind", [OpKind.LINEAR, OpKind.ELEMENTWISE])
def test_an_operator_without_an_integer_kernel_is_left_out_with_the_reason(kind: OpKind) -> None:
    rules, absent = derived({"Conv": OpRule(kind)}, [replace(CONV, kernel="Conv", integer=False), LEFT], U8)
    assert rules == {} and absent == {"Conv": "for uint8 the runtime has Conv in float"}


@pytest.mark.parametrize("kind", [OpKind.PASSTHROUGH, OpKind.LOOKUP])
def test_what_moves_codes_needs_no_kernel_of_its_own(kind: OpKind) -> None:
    rules, absent = derived({"Conv": OpRule(kind)}, [replace(CONV, kernel="Conv", integer=False)], U8)
    assert rules == {"Conv": OpRule(kind)} and not absent


def test_an_operator_without_rows_keeps_what_its_file_says() -> None:
    declared = {"Gemm": OpRule(OpKind.LINEAR, quantized_output=False, fuses=("Relu",))}
    assert derived(declared, [CONV, LEFT], U8) == (declared, {})


def table(*rows: Capability, timed: bool = True) -> CostTable:
    entries = {"Conv[float,float]": {(1, 1, 1, 1, 1): 2.0}} if timed else {}
    return CostTable("toy 1", "toy", 1.0, entries, {key: {(1, 1, 1, 1, 1): 1.0} for key in entries}, rows)


def toy(rules: dict[str, OpRule]) -> Target:
    return Target("toy", "ort", "a toy", 21, "uint8", "int8", True, rules)


def test_another_table_makes_other_rules_of_the_same_file() -> None:
    target = toy(RULES)
    without = target.with_costs(table(replace(LEFT, integer=False)))
    assert without.ops == {} and "Conv" in without.absent
    assert without.with_costs(table(CONV, replace(LEFT, integer=True))).ops["Conv"].quantized_output is False
    assert without.with_costs(table(CONV, LEFT)).absent == {}


def test_a_table_without_capabilities_leaves_the_rules_alone() -> None:
    target = toy(RULES).with_costs(table(CONV, replace(LEFT, integer=True)))
    again = target.with_costs(table())
    assert again.ops == target.ops and again.costs == table()


def test_a_table_without_times_prices_nothing() -> None:
    target = toy(RULES).with_costs(table(CONV, replace(LEFT, integer=True), timed=False))
    assert target.costs is None and not target.ops["Conv"].quantized_output


def test_a_row_reads_as_it_was_written() -> None:
    for row in (CONV, LEFT, behind("Relu", integer=True), Capability("AveragePool", form="ceil_mode", kernel="none")):
        assert Capability.from_row(row.as_row()) == row
    with pytest.raises(ValueError, match="'yes' is no integer"):
        Capability.from_row({"op": "Conv", "integer": "yes"})
