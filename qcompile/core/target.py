"""Targets: what a device can run, as data. A TOML file beside the backend states it; this module reads it."""

from __future__ import annotations

import functools
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from importlib.resources.abc import Traversable
from typing import Any, Self

from qcompile.core.capabilities import Capability
from qcompile.core.costs import CostTable
from qcompile.core.errors import TargetError

#: Settings of a device that the user gives: which board, and bytes of memory at most.
LIMITS = ("board", "max_sram", "max_flash")


class OpKind(StrEnum):
    """How an operator takes part in integer arithmetic."""

    LINEAR = "linear"
    """Multiplies by constant weights: worth quantizing for itself."""
    ELEMENTWISE = "elementwise"
    """Has an integer kernel with its own output scale: worth it between integer operators."""
    PASSTHROUGH = "passthrough"
    """Moves or selects codes: its output has its input's scale."""
    LOOKUP = "lookup"
    """Picks rows of a constant table: the table is stored as integers, the rows are dequantized."""
    PACKED = "packed"
    """Multiplies by constant weights, in float: these are stored as integers, by output channel."""
    RESIDUAL = "residual"
    """Adds something to what a Conv in integers makes, which its kernel does as it goes if that comes as codes."""
    STORED = "stored"
    """Has no integer kernel: large constants that it reads are stored as integers."""


@dataclass(frozen=True)
class OpRule:
    """What the target makes of one operator type.

    Parameters
    ----------
    kind : OpKind
    quantized_output : bool
        The integer kernel exists only if the result is quantized too (False: the result may leave in float, and does,
        unless it goes through one of `fuses`).
    fuses : tuple of str
        Activations behind the operator that the kernel absorbs when the zero point is the lowest code.
    weight_only : bool
        Weights may be stored as integers while the operator computes in float.
    fewest_weights : int
        With fewer, integers gain too little to be worth their error.
    dynamic : bool
        The integer kernel also reads codes whose range is taken when the model runs, and leaves in float then.

    activations : bool
        The integer kernel also multiplies two activations, the second with codes around zero where codes have a sign.
    per_tensor : bool
        Weights have one scale, though those of other operators may have one per output channel.

    `quantized_output`, `fuses` and `dynamic` follow from the capabilities of the target's cost table where it
    has them.
    """

    kind: OpKind
    quantized_output: bool = True
    fuses: tuple[str, ...] = ()
    weight_only: bool = False
    fewest_weights: int = 0
    dynamic: bool = False
    activations: bool = False
    per_tensor: bool = False


@dataclass(frozen=True)
class Target:
    """A device as the compiler sees it.

    Parameters
    ----------
    name : str
        What the user types behind ``--target``.
    backend : str
        Entry point of the backend that lowers for it.
    summary : str
        One line for ``qcompile targets``.
    opset : int
        ONNX opset that the compiler works in, and of the artifact.
    activation_dtype, weight_dtype : str
        Without the former, activations stay in float.
    per_channel : bool
        Weights have a scale per output channel.
    ops : mapping of str to OpRule
        By op type; what is not listed stays in float.
    costs : CostTable, optional
        What its kernels take; without it whatever can be integers is. In the file, the table's name in ``costs/``.
        See `with_costs`.
    integer_only : bool
        Every operator that can be integers becomes them, the first and the last included, since there is no float
        but for what `floats` lists.
    floats : tuple of str
        Operators with kernels in float, where everything else is integers.
    timed_here : bool
        Its artifact runs on this machine, so that it can be timed, although it has no float.
    settings : mapping
        The backend's own table.
    deployed_opset : int, optional
        The newest opset that the device's runtime reads, where that is older than `opset`, which the compiler works in.
    wide_weight_dtype : str
        Type that weights of float operators can be stored in where `weight_dtype` would spoil the outputs; none where
        it is empty, and they stay float.
    narrow_weight_dtype : str
        Type of four bits that kernels take weights of linear operators in, with a scale per channel. Where it is empty,
        codes of `weight_dtype` are packed (`core/packing.py`).
    wide_activation_dtype : str
        Type of 16 bits that kernels take activations in as well; empty where there are none.
    float_dtype : str
        Type that floats are computed in wherever they fit: ``float32``, or ``float16``.
    symmetric : bool
        Codes of activations are around zero: the target knows no zero point.
    device : str
        Where it runs, in words, if that is no processor like the one that compiles: the artifact is verified here, but
        timed there.
    declared : mapping of str to OpRule
        `ops` as the file has them, where a cost table's capabilities made others of them.
    static_shapes : bool
        It takes no open shapes: an open batch is fixed to 1.
    joined_activations : bool
        It has kernels for activations that models write as several operators, such as GELU.
    absent : mapping of str to str
        By op type, why a declared operator is not among `ops`: what the runtime has in place of an integer kernel.
    """

    name: str
    backend: str
    summary: str
    opset: int
    activation_dtype: str
    weight_dtype: str
    per_channel: bool
    ops: Mapping[str, OpRule]
    costs: CostTable | None = None
    integer_only: bool = False
    floats: tuple[str, ...] = ()
    timed_here: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)
    deployed_opset: int | None = None
    wide_weight_dtype: str = ""
    narrow_weight_dtype: str = ""
    wide_activation_dtype: str = ""
    float_dtype: str = "float32"
    symmetric: bool = False
    device: str = ""
    static_shapes: bool = False
    joined_activations: bool = False
    declared: Mapping[str, OpRule] = field(default_factory=dict)
    absent: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def from_toml(cls, source: Traversable, costs: Traversable | None = None) -> Self:
        """Read a target from its TOML file.

        Parameters
        ----------
        source : Traversable
        costs : Traversable, optional
            Folder of the cost table that the file names.

        Raises
        ------
        TargetError
            If the file lacks a key or has one that is not known: a typing error must not turn into a silent default.
        """
        try:
            table = tomllib.loads(source.read_text(encoding="utf-8"))
            rules = {op_type: _rule(rule) for op_type, rule in table.pop("ops").items()}
            named = table.pop("costs", None)
            table["floats"] = tuple(table.get("floats", ()))
            target = cls(ops=rules, **table)
            return target if costs is None or named is None else target.with_costs(_costs(costs / named))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise TargetError(source.name, f"is not a target file ({error})", "see docs/targets/cpu.md") from error

    def in_wide_activations(self) -> Self:
        """Return the target with activations of 16 bits, beside which weights have eight.

        Raises
        ------
        TargetError
            If it has no kernels for them.
        """
        if not self.wide_activation_dtype:
            fact = f"{self.name} has no kernels for them"
            raise TargetError("--activations 16", fact, "leave it out: activations have 8 bits then")
        return replace(self, activation_dtype=self.wide_activation_dtype, narrow_weight_dtype="")

    def with_costs(self, table: CostTable) -> Self:
        """Return the target as a cost table has it: its capabilities tell the rules, its times price placements.

        A table without capabilities leaves the rules alone; one without times (structure only) prices nothing.
        """
        costs = table if table.entries else None
        if not table.capabilities:
            return replace(self, costs=costs)
        types = Types(self.activation_dtype, self.weight_dtype, self.per_channel)
        declared = self.declared or self.ops
        rules, absent = derived(declared, table.capabilities, types)
        return replace(self, ops=rules, costs=costs, declared=declared, absent=absent)


@functools.cache
def _costs(source: Traversable) -> CostTable:
    return CostTable.from_json(source)


def _rule(table: dict[str, Any]) -> OpRule:
    if not isinstance(table.get("fuses", []), list):
        raise TypeError("fuses is a list of operators")
    fields = table | {"kind": OpKind(table["kind"]), "fuses": tuple(table.get("fuses", ()))}
    return OpRule(**fields)


@dataclass(frozen=True)
class Types:
    """The element types that a target works in: of activations and weights, and whether these are per channel."""

    activation: str
    weights: str
    per_channel: bool


def derived(
    rules: Mapping[str, OpRule], capabilities: Sequence[Capability], types: Types
) -> tuple[dict[str, OpRule], dict[str, str]]:
    """Return the rules as the capabilities have them, and why those that are left out have no integer kernel.

    An operator's result must be quantized if it has no integer kernel otherwise. An activation behind it is absorbed
    if one integer kernel does both; where the result may leave in float, only if it could not with the activation
    behind it. Rules of operators without a row, and of those that only move codes, stay as they are.

    Parameters
    ----------
    rules : mapping of str to OpRule
    capabilities : sequence of Capability
    types : Types
    """
    found: dict[str, OpRule] = {}
    absent: dict[str, str] = {}
    fitting = [row for row in capabilities if _fits(row, types)]
    dynamic = {row.op for row in fitting if row.dynamic and row.integer and not row.behind}
    for op_type, rule in rules.items():
        rows = {(row.behind, row.zero_point, row.output): row
                for row in fitting if row.op == op_type and not row.dynamic}  # fmt: skip
        if not rows or rule.kind not in (OpKind.LINEAR, OpKind.ELEMENTWISE):
            found[op_type] = rule
        elif not any(row.integer for row in rows.values()):
            kernels = " or ".join(sorted({row.kernel for row in rows.values() if not row.behind} or {op_type}))
            absent[op_type] = f"for {types.activation} the runtime has {kernels} in float"
        else:
            seen = _as_seen(rule, rows)
            found[op_type] = replace(seen, dynamic=op_type in dynamic)
    return found, absent


def _fits(row: Capability, types: Types) -> bool:
    weights = not row.weights or (row.weights, row.per_channel) == (types.weights, types.per_channel)
    return row.activation == types.activation and weights and not row.form


def _as_seen(rule: OpRule, rows: Mapping[tuple[str, str, str], Capability]) -> OpRule:
    def reads_codes(behind: str) -> bool:
        row = rows.get((behind, "", "float"))
        return row is not None and row.integer

    quantized = not reads_codes("")
    absorbed = [row.behind for (_, zero_point, _), row in rows.items()
                if row.behind and zero_point == "lowest" and row.absorbs]  # fmt: skip
    fuses = tuple(behind for behind in absorbed if quantized or not reads_codes(behind))
    return replace(rule, quantized_output=quantized, fuses=fuses)
