"""Capabilities: what a runtime makes of patterns of Q/DQ around operators, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Capability:
    """A pattern, and what the runtime executes for it after its own optimizer.

    Parameters
    ----------
    op : str
        Operator type.
    activation : str
        Element type of the codes that it reads, ``float`` where only its weights are codes.
    weights : str
        Element type of the constant operand's codes, empty where there is none.
    per_channel : bool
        The weights have a scale per output channel; ``False`` is one scale for all, or per block for four bits.
    behind : str
        Operator between it and what quantizes its result.
    zero_point : str
        Of the result: ``lowest`` code or ``middle``; empty where the result is float or has its input's scale.
    output : str
        ``quantized`` or ``float``.
    form : str
        What else is particular, such as ``ceil_mode``.
    dynamic : bool
        The range of the activation is taken when the model runs.
    kernel : str
        Operators that the runtime executes between QuantizeLinear and DequantizeLinear, joined by ``+``.
    integer : bool
        The operator reads codes.
    reads : str
        Element type of these: the runtime may turn codes into others first.
    """

    op: str
    activation: str = "uint8"
    weights: str = ""
    per_channel: bool = False
    behind: str = ""
    zero_point: str = ""
    output: str = "quantized"
    form: str = ""
    dynamic: bool = False
    kernel: str = ""
    integer: bool = False
    reads: str = ""

    @property
    def pattern(self) -> Capability:
        """The pattern alone."""
        return replace(self, kernel="", integer=False, reads="")

    @property
    def absorbs(self) -> bool:
        """Whether one integer kernel does what is behind as well."""
        return self.integer and "+" not in self.kernel

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Capability:
        """Read what `as_row` returned.

        Raises
        ------
        ValueError
            If it is none.
        """
        made = cls(**row)
        for name, default in vars(cls("")).items():
            if type(getattr(made, name)) is not type(default):
                raise ValueError(f"{getattr(made, name)!r} is no {name}")
        return made

    def as_row(self) -> dict[str, Any]:
        """Return the fields that differ from their defaults, and what was found."""
        default, always = Capability(""), ("activation", "output", "kernel", "integer")
        return {name: value for name, value in vars(self).items() if name in always or value != getattr(default, name)}
