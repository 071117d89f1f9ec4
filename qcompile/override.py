"""Overrides: what a recipe asks of single operators, against what structure and target alone would make of them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

import onnx_ir as ir

from qcompile.core.errors import UsageError
from qcompile.core.plan import Precision
from qcompile.passes import structure
from qcompile.passes.place import Wish
from qcompile.passes.read_plan import is_quantized

#: What the plan says of an operator that an override keeps in float.
REASON = "kept in float as the recipe asks"


@dataclass(frozen=True)
class Override:
    """What is asked of some operators.

    Parameters
    ----------
    match : tuple of str
        Patterns over node names (``*``, ``?``, ``[…]``, case counts), any of which must fit; empty fits every name.
    op_type : str
        Operator type that must fit as well; empty fits every type.
    keep_float : bool
        Compute in float.
    weights : "int8", "float" or None
        ``int8`` stores weights as integers, however few they are, and computes in integers unless `keep_float`;
        ``float`` is `keep_float`.

    Raises
    ------
    UsageError
        If it chooses no operators, or asks for nothing, or for something that does not exist.
    """

    match: tuple[str, ...] = ()
    op_type: str = ""
    keep_float: bool = False
    weights: Literal["int8", "int16", "float"] | None = None

    def __post_init__(self) -> None:
        if not self.match and not self.op_type:
            raise UsageError("override", "chooses no operators", 'give match = "pattern" or op_type = "Conv"')
        if self.weights not in (None, "int8", "int16", "float"):
            raise UsageError("override", f"weights cannot be '{self.weights}'", "use one of int8, int16, float")
        if not self.keep_float and self.weights is None:
            raise UsageError("override", f"{self} asks for nothing", "give keep_float = true or weights")

    def __str__(self) -> str:
        patterns = ", ".join(f"'{pattern}'" for pattern in self.match)
        return " and ".join(filter(None, (f"match {patterns}" if patterns else "",
                                          f"op_type '{self.op_type}'" if self.op_type else "")))  # fmt: skip

    def as_table(self) -> dict[str, Any]:
        """Return it as a recipe has it, with what is left at its default left out."""
        fields = {"match": list(self.match), "op_type": self.op_type, "keep_float": self.keep_float}
        return {name: value for name, value in (fields | {"weights": self.weights}).items() if value}

    @property
    def wish(self) -> Wish:
        """What it asks of each operator that it chooses."""
        if self.weights == "int16":
            return Wish(Precision.WEIGHT_ONLY, REASON, wide=True)
        if self.weights == "int8":
            return Wish(Precision.WEIGHT_ONLY if self.keep_float else Precision.INTEGER, REASON)
        return Wish(Precision.FLOAT, REASON)


def wishes(overrides: Sequence[Override], model: ir.Model) -> dict[str, Wish]:
    """Return what the overrides ask of each operator, by node name; of two that choose one operator the later counts.

    Parameters
    ----------
    overrides : sequence of Override
    model : onnx_ir.Model
        Canonical.

    Raises
    ------
    UsageError
        If a pattern or an operator type fits no operator, or the model's decisions were made elsewhere.
    """
    if overrides and is_quantized(model):
        remedy = "leave the overrides out, or give the float model"
        raise UsageError("override", "the model is quantized already and its decisions stand", remedy)
    op_types = {structure.node_name(node): node.op_type for node in model.graph.all_nodes()}
    found: dict[str, Wish] = {}
    for override in overrides:
        found |= dict.fromkeys(_chosen(override, op_types), override.wish)
    return found


def _chosen(override: Override, op_types: Mapping[str, str]) -> list[str]:
    """Return the names of the nodes that an override chooses."""
    place, listing = f"override {override}", "'qcompile inspect MODEL --ops' lists all"
    of_type = [name for name, op_type in op_types.items() if override.op_type in ("", op_type)]
    if not of_type:
        raise UsageError(place, f"the model has no {override.op_type}", _nearest(override.op_type, op_types.values()))
    if not override.match:
        return of_type
    chosen: list[str] = []
    for pattern in override.match:
        fitting = [name for name in of_type if name == pattern or fnmatchcase(name, pattern)]
        if not fitting:
            of = f" of a {override.op_type}" if override.op_type else ""
            raise UsageError(place, f"'{pattern}' fits no node name{of}", f"{_nearest(pattern, of_type)}; {listing}")
        chosen += fitting
    return chosen


def _nearest(word: str, known: Iterable[str]) -> str:
    """Return the names that somebody may have meant."""
    names = list(dict.fromkeys(known))
    letters = word.strip("*?")
    near = difflib.get_close_matches(letters, names, n=3, cutoff=0.5) or names[:3]
    return f"near it are {', '.join(near)}" if len(near) > 1 else f"near it is {near[0]}"
