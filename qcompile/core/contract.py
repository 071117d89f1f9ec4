"""What a pass promises: how far it may move the outputs, and what it says where it leaves a place alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import Enum
from typing import ClassVar, Protocol, TypeVar

import onnx_ir as ir

T = TypeVar("T")

#: Shows progress over an iterable of known length: (items, how many, what they are).
Track = Callable[[Iterable[T], int, str], Iterable[T]]


class Effect(Enum):
    """What a pass may do to the float outputs, hence what verification holds it to."""

    EXACT = "exact"
    """The same arithmetic: outputs equal to the last bit."""
    CLOSE = "close"
    """The same function in another order of operations: max|Δ| / max|y| stays within the float type's bound."""
    LOSSY = "lossy"
    """Quantization: outputs stay finite and nearer to float's than zeros would be."""


@dataclass(frozen=True)
class Refusal:
    """One place that a pass left alone.

    Parameters
    ----------
    node : str
        Name of the node.
    reason : str
        Why, in words that a user of the model understands.
    """

    node: str
    reason: str


@dataclass
class Rewritten(ir.passes.PassResult):
    """A pass's result together with its refusals, and with notes: what it did that the report is to say first."""

    refusals: tuple[Refusal, ...] = field(default=())
    notes: tuple[str, ...] = field(default=())


class Pass(Protocol):
    """An onnx-ir pass that is a frozen dataclass and states its effect."""

    effect: ClassVar[Effect]

    def __call__(self, model: ir.Model, /) -> ir.passes.PassResult:
        """Rewrite the model."""
        ...
