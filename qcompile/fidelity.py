"""Fidelity: how near what one model computes is to what another does, in the measures of the report."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from qcompile.core import numerics, runtime

Array = npt.NDArray[Any]

#: Elements that are compared at once.
PIECE = 1 << 16


@dataclass
class Comparison:
    """Running sums over pairs of tensors, from which the measures follow."""

    signal: float = 0.0
    noise: float = 0.0
    cosines: list[float] = field(default_factory=list)
    agreeing: int = 0
    classified: int = 0
    largest: float = 0.0
    peak: float = 0.0
    broken: bool = False
    equal: int = 0
    counted: int = 0

    def add(self, reference: Array, candidate: Array) -> None:
        """Take in one sample's tensor of either model."""
        if reference.dtype.kind in "iub":
            # Indices, classes, masks: how far off one is means nothing.
            self.counted += reference.size
            self.equal += int(np.count_nonzero(reference == candidate)) if reference.shape == candidate.shape else 0
        # In pieces that stay in the processor's cache: large maps would go through memory a dozen times.
        y, z, sums = reference.reshape(-1), candidate.reshape(-1), np.zeros(4)
        for start in range(0, y.size, PIECE):
            sums += self._sums(*(array[start : start + PIECE].astype(np.float64) for array in (y, z)))
        signal, noise, power, product = map(float, sums)
        self.signal, self.noise = self.signal + signal, self.noise + noise
        self.cosines.append(product / float(np.sqrt(signal * power)) if signal and power else float(signal == power))
        if reference.ndim >= 2 and reference.shape[-1] == reference.size > 1:
            self.classified += 1
            self.agreeing += int(reference.argmax() == candidate.argmax())

    def _sums(self, y: Array, z: Array) -> list[float]:
        """Return Σ y², Σ (y - z)², Σ z² and Σ y·z over what is finite in both, and take in the largest numbers."""
        with np.errstate(invalid="ignore"):
            apart = y - z
        if not np.isfinite(apart).all():
            # What is NaN or infinite in the reference means the same in the candidate, or else nothing counts any more.
            finite = np.isfinite(y)
            if not np.array_equal(y[~finite], z[~finite], equal_nan=True) or not np.isfinite(z[finite]).all():
                self.broken = True
            finite &= np.isfinite(z)
            y, z = y[finite], z[finite]
            apart = y - z
        if y.size:
            self.largest = max(self.largest, float(np.max(np.abs(apart))))
            self.peak = max(self.peak, float(np.max(np.abs(y))))
        return [float(np.sum(one * other)) for one, other in ((y, y), (apart, apart), (z, z), (y, z))]

    @property
    def sqnr(self) -> float:
        """Signal-to-quantization-noise ratio in dB over all samples."""
        if self.broken:
            return float("-inf")
        return numerics.decibel(self.signal, self.noise) if self.signal or self.noise else float("inf")

    def measures(self) -> dict[str, float | None]:
        """Return the measures, JSON-ready; None where one has no meaning. An exact match has no finite SQNR."""
        return {
            "sqnr": _rounded(self.sqnr, 3) if np.isfinite(self.sqnr) else None,
            "exact": self.noise == 0.0 and not self.broken,
            "equal": _rounded(self.equal / self.counted, 6) if self.counted else None,
            "cosine": _rounded(float(np.mean(self.cosines)), 6) if self.cosines else None,
            "relative_error": _rounded(self.largest / self.peak, 6) if self.peak else _rounded(self.largest, 6),
            "top1": _rounded(self.agreeing / self.classified, 6) if self.classified else None,
        }


def _rounded(number: float, digits: int) -> float:
    """Round, so that reports compare equal where machines differ in the last place."""
    return float(round(number, digits))


@dataclass
class Fidelity:
    """How near one model's outputs are to another's.

    Parameters
    ----------
    outputs : dict of str to Comparison
    samples : int
    reference_correct, candidate_correct, labelled : int
        Right answers of either model among the labelled samples, by the first output that classifies.
    """

    outputs: dict[str, Comparison] = field(default_factory=dict)
    samples: int = 0
    reference_correct: int = 0
    candidate_correct: int = 0
    labelled: int = 0

    def add(self, expected: runtime.Outputs, found: runtime.Outputs, label: int | None = None) -> None:
        """Take in one sample's outputs of either model."""
        self.samples += 1
        for name, y in expected.items():
            if y.dtype.kind in "fiub":
                self.outputs.setdefault(name, Comparison()).add(y, found[name])
        scores = [name for name, y in expected.items() if y.ndim >= 2 and y.shape[-1] == y.size > 1]
        if label is not None and scores:
            self.labelled += 1
            self.reference_correct += int(expected[scores[0]].argmax()) == label
            self.candidate_correct += int(found[scores[0]].argmax()) == label

    def worst(self, measure: str) -> float:
        """Return a measure's least value over the outputs that have it; infinite where every output is exact."""
        judged = [c for c in self.outputs.values() if not c.counted and not c.measures()["exact"]]
        # The SQNR itself: rounded for JSON, minus infinity would read "no meaning" and pass every bound.
        numbers = [c.sqnr if measure == "sqnr" else c.measures()[measure] for c in judged]
        return min((float(number) for number in numbers if number is not None), default=float("inf"))

    def has(self, measure: str) -> bool:
        """Tell whether a measure means anything for one of the outputs."""
        return any(c.measures()[measure] is not None or c.measures()["exact"] for c in self.outputs.values())
