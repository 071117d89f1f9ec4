"""The quantization plan: every decision as frozen data, JSON in and out.

`passes/place.py` and `passes/allocate_bits.py` decide and `passes/insert_qdq.py` applies; nothing about precision is
kept in the graph.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from qcompile.core import numerics, packing
from qcompile.core.errors import UsageError
from qcompile.core.rotation import Rotations

#: Raised when the JSON's meaning changes; `docs/schemas/plan.schema.json` describes this version.
SCHEMA_VERSION = 1

#: Factors are between 2 to the power of its negative and of it: about 1e-4 to 1e4 (Xiao et al. 2023).
LARGEST_LOG2 = 13.0


class Precision(StrEnum):
    """In what an operator computes."""

    INTEGER = "integer"
    """Integer inputs, and an integer kernel on the target."""
    WEIGHT_ONLY = "weight_only"
    """Weights stored as integers, arithmetic in float."""
    FLOAT = "float"
    """Untouched."""


class Role(StrEnum):
    """What a quantized tensor is to the operators around it."""

    ACTIVATION = "activation"
    WEIGHT = "weight"


@dataclass(frozen=True)
class TensorQuant:
    """How one tensor is quantized: x ≈ (code - zero_point) · scale.

    Parameters
    ----------
    role : Role
    dtype : str
        Integer type of the codes, e.g. ``"uint8"``.
    scale : tuple of float
        One value, or one per channel along `axis`. Each is exactly a float32. Empty for an activation whose range is
        taken when the model runs.
    zero_point : tuple of int
        As many as there are scales.
    axis : int or None
        Channel axis; None is per tensor.
    block_size : int
        Of weights that are packed (`core/packing.py`), how many codes of a channel have a multiple in common; 0 where
        codes are free.
    """

    role: Role
    dtype: str
    scale: tuple[float, ...]
    zero_point: tuple[int, ...]
    axis: int | None = None
    block_size: int = 0

    @property
    def scales(self) -> npt.NDArray[np.float32]:
        """The scales as float32, shape (channels,)."""
        return np.asarray(self.scale, np.float32)

    @property
    def zero_points(self) -> npt.NDArray[np.int64]:
        """The zero points, shape (channels,)."""
        return np.asarray(self.zero_point, np.int64)

    @property
    def is_dynamic(self) -> bool:
        """Whether scale and zero point are those of the values that a run has, by DynamicQuantizeLinear."""
        return not self.scale

    @property
    def bits(self) -> float:
        """Bits that a code takes in the file."""
        return packing.BITS if self.block_size else float(numerics.bits_of(self.dtype))

    def quantize(self, x: numerics.FloatArray) -> numerics.IntArray:
        """Return the codes of `x`; a weight's leave out the lowest code of its type, so that it stays symmetric."""
        if self.block_size:
            scaled = x / numerics.along_axis(self.scales, self.axis, x.ndim)
            return packing.pack_codes(scaled, packing.multiples(scaled, self.axis, self.block_size))
        symmetric = self.role is Role.WEIGHT and numerics.code_range(self.dtype)[0] < 0
        return numerics.quantize(x, self.scales, self.zero_points, self.dtype, self.axis, symmetric)

    def dequantize(self, codes: numerics.IntArray) -> npt.NDArray[np.float32]:
        """Return the real values that `codes` stand for."""
        return numerics.dequantize(codes, self.scales, self.zero_points, self.axis)


@dataclass(frozen=True)
class OpPlan:
    """What becomes of one operator, and why.

    Parameters
    ----------
    op_type : str
    precision : Precision
    reason : str
        Why it is not integer; empty where it is.
    output : str
        Name of the value that leaves an integer operator as codes, behind the activation that it absorbs; empty where
        its result leaves in float.
    """

    op_type: str
    precision: Precision
    reason: str = ""
    output: str = ""


class How(StrEnum):
    """Where the factors go that a tensor's channels are divided by in front of linear operators."""

    FOLD = "fold"
    """Into constants alone: nothing is added."""
    RESTORE = "restore"
    """Into what makes the tensor; what cannot take them in reads it through a Mul that takes them back."""
    BRANCH = "branch"
    """The linear operators read the tensor through a Mul that divides it."""
    ASIDE = "aside"
    """Nothing is divided: the channels that reach farthest are read in float, beside the integers."""
    SPLIT = "split"
    """Nothing is divided: the channels that reach farthest are split into several, a part of the range each."""
    NONE = "none"
    """The tensor stays as it is."""


@dataclass(frozen=True)
class ChannelFactors:
    """What is done to the channels of one tensor: shifted; divided by 2 to the power of `log2`, set aside, or split.

    Parameters
    ----------
    how : How
    log2 : tuple of float
        One number per channel, multiples of 1/8: what is folded with whole ones is exact. Empty where nothing is done.
        Where channels are split, how much steeper each copy is.
    reason : str
        Why nothing is done, or nothing finer; empty otherwise.
    channels : tuple of int
        Those that are set aside; or that are split, once for each further copy.
    low, high : float
        The bounds of the others then; `high` is that of all that are split.
    shift : tuple of float
        What is taken off each channel first. Empty where nothing is.
    """

    how: How
    log2: tuple[float, ...] = ()
    reason: str = ""
    channels: tuple[int, ...] = ()
    low: float = 0.0
    high: float = 0.0
    shift: tuple[float, ...] = ()

    @property
    def factors(self) -> npt.NDArray[np.float64]:
        """The factors, shape (channels,)."""
        return np.exp2(np.asarray(self.log2, np.float64))

    def as_json(self) -> dict[str, Any]:
        """Return it JSON-ready."""
        return asdict(self)

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> Self:
        """Read what `as_json` wrote.

        Raises
        ------
        ValueError
            If a factor is beyond what is ever chosen, or a fraction of another kind, or a shift is no number, or what
            is split is to be shifted.
        """
        log2 = tuple(float(number) for number in entry["log2"])
        if not all(abs(number) <= LARGEST_LOG2 and (8.0 * number).is_integer() for number in log2):
            raise ValueError("factors are powers of 2 by eighths")
        bounds = float(np.float32(entry["low"])), float(np.float32(entry["high"]))
        if not bounds[0] <= 0.0 <= bounds[1] < np.inf or bounds[0] == -np.inf:
            raise ValueError(f"bounds {bounds}")
        shift = tuple(float(number) for number in entry.get("shift", ()))
        if not np.all(np.isfinite(shift)):
            raise ValueError("a shift is a number")
        if shift and How(entry["how"]) is How.SPLIT:
            raise ValueError("what is split is not shifted")
        return cls(How(entry["how"]), log2, str(entry["reason"]), tuple(map(int, entry["channels"])), *bounds, shift)


@dataclass(frozen=True)
class QuantPlan:
    """Every tensor's quantization by value name, and every operator's precision by node name.

    Parameters
    ----------
    tensors : mapping of str to TensorQuant
    ops : mapping of str to OpPlan
        In the graph's order.
    options : mapping
        What it was decided with, JSON-ready, as a recipe has it (docs/recipe.md).
    guessed : bool
        Whether the scales of activations were derived without data.
    smoothing : mapping of str to ChannelFactors
        By the name of a value that linear operators read, in the graph's order: what moves into their weights first.
    rotation : Rotations
        What is rotated, in front of that and behind it.
    allocation : mapping
        How the bits of weights were chosen, JSON-ready (`qcompile/allocation.py`); empty where there was no choice.
    maps : mapping
        Which activations have four bits for the device's memory, and what that is expected to lose, JSON-ready
        (`qcompile/map_widths.py`); empty where all have eight.
    """

    tensors: Mapping[str, TensorQuant] = field(default_factory=dict)
    ops: Mapping[str, OpPlan] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    guessed: bool = False
    smoothing: Mapping[str, ChannelFactors] = field(default_factory=dict)
    rotation: Rotations = field(default_factory=Rotations)
    allocation: Mapping[str, Any] = field(default_factory=dict)
    maps: Mapping[str, Any] = field(default_factory=dict)

    def count(self, precision: Precision) -> int:
        """Return how many operators have this precision."""
        return sum(op.precision is precision for op in self.ops.values())

    def to_json(self) -> str:
        """Return the plan as JSON text, the same text for the same plan."""
        content: dict[str, Any] = {
            "schema_version": SCHEMA_VERSION,
            "options": self.options,
            "guessed": self.guessed,
            "allocation": self.allocation,
            "maps": self.maps,
            "rotation": self.rotation.to_json(),
            "smoothing": {name: factors.as_json() for name, factors in self.smoothing.items()},
            "tensors": {name: asdict(quant) for name, quant in sorted(self.tensors.items())},
            "ops": {name: asdict(op) for name, op in self.ops.items()},
        }
        return json.dumps(content, indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str, place: object = "plan.json") -> Self:
        """Read a plan that `to_json` wrote.

        Raises
        ------
        UsageError
            If the text is not such a plan.
        """
        try:
            content = json.loads(text)
            if content["schema_version"] != SCHEMA_VERSION:
                fact = f"has schema version {content['schema_version']}, this release reads {SCHEMA_VERSION}"
                raise UsageError(place, fact, "write it again with this release")
            return cls(
                tensors={name: _tensor(entry) for name, entry in content["tensors"].items()},
                ops={name: _op(entry) for name, entry in content["ops"].items()},
                options=dict(content.get("options", {}).items()),
                guessed=bool(content.get("guessed", False)),
                smoothing={
                    name: ChannelFactors.from_json(entry) for name, entry in content.get("smoothing", {}).items()
                },
                rotation=Rotations.from_json(content["rotation"]) if "rotation" in content else Rotations(),
                allocation=dict(content.get("allocation", {}).items()),
                maps=dict(content.get("maps", {}).items()),
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UsageError(place, f"is not a quantization plan ({error!r})", "write it again") from error


def _op(entry: Mapping[str, Any]) -> OpPlan:
    op = OpPlan(**{**entry, "precision": Precision(entry["precision"])})
    if not all(isinstance(text, str) for text in (op.op_type, op.reason, op.output)):
        raise ValueError(f"operator {entry}")
    return op


def _tensor(entry: Mapping[str, Any]) -> TensorQuant:
    quant = TensorQuant(
        role=Role(entry["role"]),
        dtype=str(np.dtype(entry["dtype"])),
        # What was edited by hand need not be a float32, and has to be what the artifact holds.
        scale=tuple(float(np.float32(s)) for s in entry["scale"]),
        zero_point=tuple(int(z) for z in entry["zero_point"]),
        axis=entry["axis"],
        block_size=int(entry.get("block_size", 0)),
    )
    low, high = numerics.code_range(quant.dtype)
    dynamic = quant.is_dynamic and quant.role is Role.ACTIVATION and quant.axis is None
    single = quant.axis is None and len(quant.scale) == 1
    if not (dynamic or single or (isinstance(quant.axis, int) and quant.scale)):
        raise ValueError(f"{len(quant.scale)} scales along axis {quant.axis!r}")
    if len(quant.zero_point) != len(quant.scale) or not all(low <= z <= high for z in quant.zero_point):
        raise ValueError(f"zero points {quant.zero_point}")
    packs = quant.dtype == "int8" and quant.role is Role.WEIGHT and not any(quant.zero_point)
    if quant.block_size not in (0, *((packing.BLOCK,) if packs else ())):
        raise ValueError(f"blocks of {quant.block_size}")
    if not all(0.0 < s < np.inf for s in quant.scale):
        raise ValueError(f"scales {quant.scale}")
    return quant
