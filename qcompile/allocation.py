"""Bits where they matter: what each weight loses in fewer bits is measured, and an integer program chooses.

On this side of the backends only storage has a choice of bits: codes of four bits are unpacked to the codes of eight
that kernels take (`core/packing.py`), so that time does not depend on them, and bytes do not on what computes in
integers. What is left is one program over weights: least noise within the budget of bytes, or least bytes within the
noise that a bound on fidelity leaves. docs/allocation.md has the rest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import onnx_ir as ir

from qcompile.backends.base import Backend
from qcompile.budget import Budget
from qcompile.calib.data import Dataset
from qcompile.calib.rounding import Operator, round_weights, second_moments
from qcompile.calib.sensitivity import weights_alone
from qcompile.calibration import Calibration
from qcompile.compensation import HELD_OUT
from qcompile.core import numerics, packing
from qcompile.core.errors import BudgetError, UsageError
from qcompile.core.plan import QuantPlan, Role
from qcompile.job import Job
from qcompile.options import Options
from qcompile.passes import structure
from qcompile.passes.allocate_bits import round_to_codes
from qcompile.passes.insert_qdq import InsertQdq, quantized_name
from qcompile.passes.integer_program import Allocation, Candidate, InfeasibleError, allocate
from qcompile.passes.round_weights import roundable
from qcompile.pricing import SIZE, WORTH

#: Bits that weights can be stored in, by what is called so in files: an int8's, and four and a quarter.
EIGHT, FOUR = 8, 4
#: Bytes that the nodes take which unpack a tensor.
UNPACKING = 900
#: By so much, in dB, more than a bound on fidelity is asked of the prediction: it is for other samples.
MARGIN = 0.5
#: So often a budget is lowered by what the file was larger than reckoned.
ATTEMPTS = 4

#: Noise over signal at the outputs, by the name of a weight and by its bits.
Losses = Mapping[str, Mapping[int, float]]
#: What returns the plan with weights in these bits.
Planned = Callable[[Mapping[str, int]], QuantPlan]


@dataclass(frozen=True)
class Widths:
    """The bits that were chosen for weights.

    Parameters
    ----------
    bits : mapping of str to int
        By name of a weight. What is not named had no choice.
    noise : float
        Noise over signal at the outputs that is expected with them, activations included.
    bytes : int
        Expected of the model's file.
    gap : float
        How far, in parts, the choice may be from the best one.
    """

    bits: Mapping[str, int] = field(default_factory=dict)
    noise: float = 0.0
    bytes: int = 0
    gap: float = 0.0

    def as_json(self) -> dict[str, Any]:
        """Return it JSON-ready."""
        sqnr = round(numerics.decibel(1.0, self.noise), 2) if self.noise > 0.0 else None
        return {"bits": dict(self.bits), "sqnr": sqnr, "bytes": self.bytes, "gap": float(f"{self.gap:.3g}")}


def packable(model: ir.Model, plan: QuantPlan) -> dict[str, int]:
    """Return how many numbers the weights have that can be stored in four bits, by name."""
    weights = {name: structure.constant_tensor(value) for name, value in model.graph.initializers.items()}
    sizes = {name: weight.size for name, weight in weights.items() if weight is not None}
    return {
        name: sizes[name]
        for name, quant in plan.tensors.items()
        if quant.role is Role.WEIGHT and quant.dtype == "int8" and sizes.get(name, 0) >= packing.FEWEST
    }


def measure_losses(job: Job, canonical: ir.Model, planned: Planned) -> dict[str, dict[int, float]]:
    """Measure what each weight that has a choice loses at the outputs, in each number of bits and alone.

    They are rounded with regard to one another first, on other samples than they are judged by, as they may be in the
    end. Of a model too large to be run with each, it is the weights' own squared error that tells.
    """
    names = packable(canonical, planned({}))
    fit, others = job.evidence.calibration.split(HELD_OUT)
    plans = {bits: planned(dict.fromkeys(names, bits)) for bits in (EIGHT, FOUR)}
    weights, found = {name: (name,) for name in names}, {}
    for bits, model in _rounded(job, canonical, plans, fit).items():
        found[bits] = weights_alone(canonical, model, weights, others, job.track, job.workers)
    if not all(found.values()):
        return own_errors(canonical, planned, names)
    return {name: {bits: losses[name] for bits, losses in found.items()} for name in names}


def _rounded(job: Job, canonical: ir.Model, plans: Mapping[int, QuantPlan], data: Dataset) -> dict[int, ir.Model]:
    """Return for each plan the model with the values that its weights then have; inputs are weighed once for all."""
    models = {bits: round_to_codes(canonical, plan) for bits, plan in plans.items()}
    operators = {bits: _operators(canonical, plan) for bits, plan in plans.items()}
    (first, *_) = operators.values()
    names = {operator: name for name, operator in first.items()}
    for operator, moments in second_moments(canonical, list(names), data, job.track):
        name = names[operator]
        for bits, model in models.items():
            real = plans[bits].tensors[name].dequantize(round_weights(operators[bits][name], moments))
            model.graph.initializers[name].const_value = ir.tensor(real, name=name)
    return models


def _operators(canonical: ir.Model, plan: QuantPlan) -> dict[str, Operator]:
    """Return the operators whose codes can be chosen, by the name of their weights."""
    found, _ = roundable(canonical, InsertQdq(plan)(canonical.clone()).model, plan)
    weights = {quantized_name(name): name for name in plan.tensors}
    return {weights[codes]: operator for codes, operator in found.items()}


def own_errors(canonical: ir.Model, planned: Planned, names: Iterable[str]) -> dict[str, dict[int, float]]:
    """Return what stands in for losses where the model cannot be run: the weights' own noise over signal."""
    found: dict[str, dict[int, float]] = {name: {} for name in names}
    for bits in (EIGHT, FOUR):
        rounded = round_to_codes(canonical, planned(dict.fromkeys(found, bits)))
        for name, losses in found.items():
            weight, other = (structure.constant(model.graph.initializers[name]) for model in (canonical, rounded))
            assert weight is not None and other is not None
            losses[bits] = float(10.0 ** (-numerics.sqnr(weight, other) / 10.0)) / len(found)
    return found


def choose_widths(
    canonical: ir.Model, calibration: Calibration, planned: Planned, backend: Backend, options: Options
) -> Widths:
    """Choose the bits of each weight, as the options ask.

    Parameters
    ----------
    canonical : onnx_ir.Model
    calibration : Calibration
    planned : callable
        Returns the plan with weights in given bits; those that are not given have what they have without a choice.
    backend : Backend
    options : Options

    Raises
    ------
    BudgetError
        If no choice fits the budget.
    UsageError
        If what weights lose was not measured.
    """
    plain = planned({})
    names = packable(canonical, plain)
    budget = Budget.parse(options.max_size, "--max-size") if options.max_size is not None else None
    limit = math.inf if budget is None else budget.of(calibration.float_bytes)
    if not options.mixed:
        bits = dict.fromkeys(names, FOUR) if options.weights == "4" else {}
        size = _bytes(canonical, planned(bits), backend) if bits or budget else 0
        _require(size, limit, options)
        return Widths(bits, bytes=size)
    program = program_of(canonical, calibration, planned, backend)
    if budget is not None:
        _require(program.fewest.bytes, limit, options)
        return program.within(limit)
    if "sqnr" in options.min_fidelity and calibration.calibrated:
        return program.faithful(options.min_fidelity["sqnr"])
    return program.worthwhile(calibration.float_bytes)


def _require(size: int, limit: float, options: Options) -> None:
    if size > limit:
        fact = f"cannot be met: with weights in as few bits as they may have the file takes {size} of {limit:.0f} bytes"
        raise BudgetError(f"--max-size {options.max_size}", fact, "give a larger budget")


def program_of(canonical: ir.Model, calibration: Calibration, planned: Planned, backend: Backend) -> Program:
    """Return the choice that there is, by what was measured, or without data by the weights' own errors.

    Raises
    ------
    UsageError
        If what weights lose was not measured.
    """
    names, losses = packable(canonical, planned({})), calibration.losses
    if not losses and not calibration.statistics.samples:
        return Program(canonical, names, own_errors(canonical, planned, names), 0.0, planned, backend)
    if missing := sorted(set(names) - set(losses)):
        fact = f"has no measurement of what weights '{missing[0]}' lose in fewer bits, which these options need"
        raise UsageError("calibration", fact, "calibrate again, on data, with --weights mixed")
    # Where no activation is in codes, nothing was measured with all weights in eight bits: each was alone.
    noise = calibration.choice.noise or sum(losses[name][EIGHT] for name in names)
    return Program(canonical, names, losses, noise, planned, backend)


@dataclass(frozen=True)
class Program:
    """The choice of one model's weights.

    Parameters
    ----------
    model : onnx_ir.Model
        Canonical.
    numbers : mapping of str to int
        By name of a weight, how many numbers it has.
    losses : Losses
    noise : float
        Noise over signal at the outputs with all weights in eight bits; 0 where it is not known.
    planned : callable
    backend : Backend
    """

    model: ir.Model
    numbers: Mapping[str, int]
    losses: Losses
    noise: float
    planned: Planned
    backend: Backend

    def within(self, budget: float) -> Widths:
        """Return what loses least in a file of so many bytes, which `fewest` fits."""
        limit = budget
        for _ in range(ATTEMPTS):
            try:
                widths = self._widths(allocate(self._candidates(), (limit - self.fixed,)))
            except InfeasibleError:
                break
            if widths.bytes <= budget:
                return widths
            limit -= widths.bytes - budget
        return self.fewest

    def faithful(self, decibel: float) -> Widths:
        """Return the smallest file whose noise is expected to stay below a bound."""
        most = 10.0 ** (-(decibel + MARGIN) / 10.0)
        try:
            return self._widths(allocate(self._candidates(), (math.inf,), minimize=0, most_loss=most - self.noise))
        except InfeasibleError as error:
            reached = numerics.decibel(1.0, self.noise + error.least)
            fact = f"with {MARGIN:g} dB to spare cannot be met: {reached:.1f} dB are expected with weights in 8 bits"
            raise BudgetError(f"--min-fidelity sqnr={decibel:g}", fact, "ask for less") from error

    def worthwhile(self, whole: int) -> Widths:
        """Return what is worth most where nothing bounds it: bytes and noise have their prices (`pricing.py`)."""
        prices = [
            [Candidate(WORTH * one.loss + SIZE * one.costs[0] / whole) for one in of] for of in self._candidates()
        ]
        return self._widths(allocate(prices, ()))

    def front(self, points: int) -> list[Widths]:
        """Return the choices that lose least for their size, from the smallest to the largest file."""
        least, most = (sum(pick(one.costs[0] for one in of) for of in self._candidates()) for pick in (min, max))
        found = {}
        for step in range(points):
            one = allocate(self._candidates(), (least + (most - least) * step / max(1, points - 1),))
            found[one.choice] = one
        return [self._widths(one) for one in found.values()]

    def of(self, bits: Mapping[str, int], gap: float = 0.0) -> Widths:
        """Return what is expected of a choice; weights that it does not name are in eight bits."""
        bits = {name: bits.get(name, EIGHT) for name in self.numbers}
        noise = self.noise + sum(self._more(name) for name, width in bits.items() if width == FOUR)
        # Without data nothing is known of the noise that there is.
        size = _bytes(self.model, self.planned(bits), self.backend)
        return Widths(bits, noise if self.noise else 0.0, size, gap)

    @cached_property
    def fewest(self) -> Widths:
        """All weights in as few bits as they may have."""
        return self.of(dict.fromkeys(self.numbers, FOUR))

    @cached_property
    def fixed(self) -> int:
        """The bytes of the file that do not depend on the choice."""
        return _bytes(self.model, self.planned({}), self.backend) - sum(self.numbers.values())

    def _candidates(self) -> list[list[Candidate]]:
        found = []
        for name, count in self.numbers.items():
            packed = count * packing.BITS / 8.0 + UNPACKING
            found.append([Candidate(0.0, (float(count),)), Candidate(self._more(name), (packed,))])
        return found

    def _more(self, name: str) -> float:
        """Return what a weight loses by being packed; what it may seem to gain is chance."""
        return max(0.0, self.losses[name][FOUR] - self.losses[name][EIGHT])

    def _widths(self, found: Allocation) -> Widths:
        bits = {name: (EIGHT, FOUR)[choice] for name, choice in zip(self.numbers, found.choice, strict=True)}
        return self.of(bits, found.gap)


def _bytes(model: ir.Model, plan: QuantPlan, backend: Backend) -> int:
    """Return the bytes of the file that a plan leads to."""
    return backend.size(InsertQdq(plan)(model.clone()).model)
