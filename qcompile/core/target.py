"""Targets: what a device can run, as data. A TOML file beside the backend states it; this module reads it."""

from __future__ import annotations

import functools
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from importlib.resources.abc import Traversable
from typing import Any, Self

from qcompile.core.costs import CostTable
from qcompile.core.errors import TargetError


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
    """

    kind: OpKind
    quantized_output: bool = True
    fuses: tuple[str, ...] = ()
    weight_only: bool = False
    fewest_weights: int = 0


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
    per_channel : bool
        Weights have a scale per output channel.
    ops : mapping of str to OpRule
        By op type; what is not listed stays in float.
    costs : CostTable, optional
        What its kernels take; without it whatever can be integers is. In the file, the table's name in ``costs/``.
    settings : mapping
        The backend's own table.
    deployed_opset : int, optional
        The newest opset that the device's runtime reads, where that is older than `opset`, which the compiler works in.
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
    settings: Mapping[str, Any] = field(default_factory=dict)
    deployed_opset: int | None = None

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
            return cls(ops=rules, costs=None if costs is None or named is None else _costs(costs / named), **table)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise TargetError(source.name, f"is not a target file ({error})", "see docs/targets/cpu.md") from error


@functools.cache
def _costs(source: Traversable) -> CostTable:
    return CostTable.from_json(source)


def _rule(table: dict[str, Any]) -> OpRule:
    if not isinstance(table.get("fuses", []), list):
        raise TypeError("fuses is a list of operators")
    fields = table | {"kind": OpKind(table["kind"]), "fuses": tuple(table.get("fuses", ()))}
    return OpRule(**fields)
