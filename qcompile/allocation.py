"""Bits where they matter: what each weight loses in fewer bits is measured, and an integer program chooses.

On this side of the backends only storage has a choice of bits: codes of four bits are unpacked to the codes of eight
that kernels take (`core/packing.py`), so that time does not depend on them, and bytes do not on what computes in
integers. What is left is one program over weights: least noise within the budget of bytes, or least bytes within the
noise that a bound on fidelity leaves. docs/allocation.md has the rest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import onnx_ir as ir

from qcompile import unasked_bits as unasked
from qcompile.backends.base import Backend
from qcompile.bops_budget import operations_of
from qcompile.budget import Budget
from qcompile.calibration import Calibration
from qcompile.core import numerics, packing
from qcompile.core.errors import BudgetError, UsageError
from qcompile.options import Options
from qcompile.passes import bit_operations
from qcompile.passes.greedy import greedy
from qcompile.passes.integer_program import Allocation, Candidate, InfeasibleError, Pair, allocate
from qcompile.passes.resources import Resource
from qcompile.pricing import SIZE, WORTH
from qcompile.weight_losses import (
    EIGHT,
    FOUR,
    Losses,
    Pairs,
    Planned,
    Tried,
    in_four,
    own_errors,
    packable,
    takes_four,
    tempered,
)

#: Bytes that the nodes take which unpack a tensor.
UNPACKING = 900
#: By so much, in dB, more than a bound on fidelity is asked of the prediction: it is for other samples.
MARGIN = 0.5
#: So often a budget is lowered by what the file was larger than reckoned.
ATTEMPTS = 8
#: What fewer bits that nobody asked for may cost, in dB.
SPENT = 0.5


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
        How far, in parts, the choice may be from the best one by the losses that are expected.
    tried : int
        Of how many choices that were run this one lost least; 0 where it was not run, and its noise is expected.
    bops : int
        Bit operations of a run; 0 where they were not counted.
    pairs : int
        How many pairs of weights were measured together.
    without_pairs : Widths, optional
        What is chosen without these.
    """

    bits: Mapping[str, int] = field(default_factory=dict)
    noise: float = 0.0
    bytes: int = 0
    gap: float = 0.0
    tried: int = 0
    bops: int = 0
    pairs: int = 0
    without_pairs: Widths | None = None

    def as_json(self) -> dict[str, Any]:
        """Return it JSON-ready."""
        gap = float(f"{self.gap:.3g}")
        found = {"bits": dict(self.bits), "sqnr": self.sqnr, "bytes": self.bytes, "gap": gap, "tried": self.tried}
        found |= {"bops": self.bops or None}
        other = self.without_pairs
        if other is None:
            return found | {"pairs": None}
        changed = [name for name, bits in self.bits.items() if bits != other.bits[name]]
        return found | {"pairs": {"measured": self.pairs, "changed": changed, "sqnr_without": other.sqnr}}

    @property
    def sqnr(self) -> float | None:
        """The noise in dB; None where it is not known."""
        return round(numerics.decibel(1.0, self.noise), 2) if self.noise > 0.0 else None


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
    names = packable(canonical, planned)
    budget = Budget.parse(options.max_size, "--max-size") if options.max_size is not None else None
    limit = math.inf if budget is None else budget.of(calibration.float_bytes)
    if calibration.losses and unasked.above_a_quarter(canonical, calibration, planned, backend, options):
        program = program_of(canonical, calibration, planned, backend, options)
        widths = program.within(unasked.QUARTER * calibration.float_bytes)
        worst = program.noise * 10.0 ** (SPENT / 10.0)
        return (
            widths if widths.bytes <= unasked.QUARTER * calibration.float_bytes and widths.noise <= worst else Widths()
        )
    if (room := unasked.short_of_flash(canonical, planned, backend, options)) is not None:
        # What does not fit in the end is refused by the backend, which knows the bytes of code.
        return program_of(canonical, calibration, planned, backend, options).within(min(room, limit))
    if not options.mixed:
        bits = dict.fromkeys(names, FOUR) if options.weights == "4" else {}
        plan = planned(bits)
        taken = operations_of(canonical, plan, calibration, options)
        size = unasked.written_bytes(canonical, plan, backend) if bits or budget else 0
        _require(size, limit, options)
        return Widths(bits, bytes=size, bops=sum(int(one.fixed) for one in taken))
    program = program_of(canonical, calibration, planned, backend, options)
    if budget is not None or options.max_bops is not None:
        _require(program.fewest.bytes, limit, options)
        return program.within(limit)
    if "sqnr" in options.min_fidelity and calibration.calibrated:
        return program.faithful(options.min_fidelity["sqnr"])
    return program.worthwhile(calibration.float_bytes)


def _require(size: int, limit: float, options: Options) -> None:
    if size > limit:
        fact = f"cannot be met: with weights in as few bits as they may have the file takes {size} of {limit:.0f} bytes"
        raise BudgetError(f"--max-size {options.max_size}", fact, "give a larger budget")


def program_of(
    canonical: ir.Model, calibration: Calibration, planned: Planned, backend: Backend, options: Options
) -> Program:
    """Return the choice that there is, by what was measured, or without data by the weights' own errors.

    Of the options, budgets of what there is beside bytes count.

    Raises
    ------
    UsageError
        If what weights lose was not measured.
    """
    plain, losses = planned({}), calibration.losses
    names, narrow = packable(canonical, planned), takes_four(canonical, planned)
    resources = operations_of(canonical, plain, calibration, options, names)
    if not losses and not calibration.statistics.samples:
        own = own_errors(canonical, planned, names)
        return Program(canonical, names, own, 0.0, planned, backend, resources=resources, narrow=narrow)
    if missing := sorted(set(names) - set(losses)):
        fact = f"has no measurement of what weights '{missing[0]}' lose in fewer bits, which these options need"
        raise UsageError("calibration", fact, "calibrate again, on data, with --weights mixed")
    # Where no activation is in codes, nothing was measured with all weights in eight bits: each was alone.
    noise = calibration.choice.noise or sum(losses[name][EIGHT] for name in names)
    more = {name: _more(losses[name]) for name in names}
    pairs = {pair: loss for pair, loss in calibration.pairs.items() if set(pair) <= set(names)}
    together = tempered(more, pairs)
    return Program(canonical, names, losses, noise, planned, backend, calibration.tried, together, resources, narrow)


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
    tried : Tried
        What came of choices that were run.
    pairs : Pairs
        What two weights lose in four bits beyond what each does.
    resources : tuple of Resource
        What there is only so much of, beside bytes.
    narrow : bool
        Whether kernels take four bits as they are: nothing unpacks them, and blocks have nothing in common.
    """

    model: ir.Model
    numbers: Mapping[str, int]
    losses: Losses
    noise: float
    planned: Planned
    backend: Backend
    tried: Tried = field(default_factory=dict)
    pairs: Pairs = field(default_factory=dict)
    resources: tuple[Resource, ...] = ()
    narrow: bool = False

    def within(self, budget: float) -> Widths:
        """Return what loses least in a file of so many bytes, which `fewest` fits.

        That is the choice which is expected to; where it was run, with others beside it, the one that did.
        """
        proposals = self.proposals(budget)
        run = [one for one in proposals if in_four(one.bits) in self.tried]
        best = proposals[0]
        if best in run:
            best = replace(min(run, key=lambda one: one.noise), tried=len(run))
        return self._told(best, lambda other: other.proposals(budget)[0])

    def _told(self, widths: Widths, choose: Callable[[Program], Widths]) -> Widths:
        """Return a choice with what would be chosen without pairs, where there are any."""
        if not self.pairs:
            return widths
        other = choose(self._additive)
        return replace(widths, pairs=len(self.pairs), without_pairs=self.of(other.bits))

    @cached_property
    def _additive(self) -> Program:
        """The same without pairs."""
        return replace(self, pairs={})

    def proposals(self, budget: float) -> list[Widths]:
        """Return what is expected to lose least in a file of so many bytes, and what simpler rules choose instead."""
        limit = budget
        for _ in range(ATTEMPTS):
            try:
                best = allocate(self._candidates(), self._budgets(limit - self.fixed), self._pairs())
            except InfeasibleError:
                break
            widths = self._widths(best)
            if widths.bytes <= budget:
                others = map(self._widths, self._rivals(best, limit - self.fixed))
                return [widths, *(one for one in others if one.bytes <= budget)]
            # Below what this choice is reckoned to take, which may leave some of the budget: it would come again.
            limit = min(limit, best.costs[0] + self.fixed) - (widths.bytes - budget)
        return [self.fewest]

    def _rivals(self, best: Allocation, budget: float) -> list[Allocation]:
        """Return what simpler rules choose within so many bytes, where that is another choice.

        They are the program without pairs, greedy steps, as many weights in the graph's order in four bits as are
        needed, and all but the first and the last in four.
        """
        candidates, pairs, count, budgets = self._candidates(), self._pairs(), len(self.numbers), self._budgets(budget)
        steps = greedy(candidates, budgets, pairs)
        additive = allocate(candidates, budgets) if pairs else best
        in_order = ((1,) * packed + (0,) * (count - packed) for packed in range(count + 1))
        spared = tuple(int(0 < at < count - 1) for at in range(count))

        def taken(choice: tuple[int, ...]) -> Allocation:
            chosen = [of[at] for of, at in zip(candidates, choice, strict=True)]
            together = sum(float(pair.loss[choice[pair.first], choice[pair.second]]) for pair in pairs)
            costs = tuple(map(math.fsum, zip(*(one.costs for one in chosen), strict=True)))
            return replace(best, choice=choice, loss=sum(one.loss for one in chosen) + together, costs=costs)

        def fits(one: Allocation) -> bool:
            return all(cost <= most for cost, most in zip(one.costs, budgets, strict=True))

        first = next((choice for choice in in_order if fits(taken(choice))), best.choice)
        proposed = dict.fromkeys((additive.choice, best.choice if steps is None else steps.choice, first, spared))
        return [one for choice in proposed if choice != best.choice and fits(one := taken(choice))]

    def faithful(self, decibel: float) -> Widths:
        """Return the smallest file whose noise is expected to stay below a bound."""
        most = 10.0 ** (-(decibel + MARGIN) / 10.0)
        try:
            bound = most - self.noise
            best = allocate(self._candidates(), self._budgets(math.inf), self._pairs(), minimize=0, most_loss=bound)
            return self._told(self._widths(best), lambda other: other.faithful(decibel))
        except InfeasibleError as error:
            reached = numerics.decibel(1.0, self.noise + error.least)
            fact = f"with {MARGIN:g} dB to spare cannot be met: {reached:.1f} dB are expected with weights in 8 bits"
            raise BudgetError(f"--min-fidelity sqnr={decibel:g}", fact, "ask for less") from error

    def worthwhile(self, whole: int) -> Widths:
        """Return what is worth most where nothing bounds it: bytes and noise have their prices (`pricing.py`)."""
        prices = [
            [Candidate(WORTH * one.loss + SIZE * one.costs[0] / whole, one.costs) for one in of]
            for of in self._candidates()
        ]
        worth = [replace(pair, loss=WORTH * pair.loss) for pair in self._pairs()]
        best = allocate(prices, self._budgets(math.inf), worth)
        return self._told(self._widths(best), lambda other: other.worthwhile(whole))

    def front(self, points: int) -> list[Widths]:
        """Return the choices that lose least for their size, from the smallest to the largest file."""
        least, most = (sum(pick(one.costs[0] for one in of) for of in self._candidates()) for pick in (min, max))
        found = {}
        for step in range(points):
            budgets = self._budgets(least + (most - least) * step / max(1, points - 1))
            one = allocate(self._candidates(), budgets, self._pairs())
            found[one.choice] = one
        return [self._widths(one) for one in found.values()]

    def of(self, bits: Mapping[str, int], gap: float = 0.0) -> Widths:
        """Return what is expected of a choice; weights that it does not name are in eight bits."""
        bits = {name: bits.get(name, EIGHT) for name in self.numbers}
        four = in_four(bits)
        together = sum(loss for pair, loss in self.pairs.items() if four.issuperset(pair))
        noise = self.noise + sum(_more(self.losses[name]) for name in bits if name in four) + together
        noise = self.tried.get(four, noise)
        # Without data nothing is known of the noise that there is.
        size = unasked.written_bytes(self.model, self.planned(bits), self.backend)
        bops = sum(int(one.of(bits)) for one in self.resources if one.what == bit_operations.WHAT)
        return Widths(bits, noise if self.noise else 0.0, size, gap, bops=bops)

    @cached_property
    def fewest(self) -> Widths:
        """All weights in as few bits as they may have."""
        return self.of(dict.fromkeys(self.numbers, FOUR))

    @cached_property
    def fixed(self) -> int:
        """The bytes of the file that do not depend on the choice."""
        return unasked.written_bytes(self.model, self.planned({}), self.backend) - sum(self.numbers.values())

    def _candidates(self) -> list[list[Candidate]]:
        found = []
        for name, count in self.numbers.items():
            packed = count * FOUR / 8.0 if self.narrow else count * packing.BITS / 8.0 + UNPACKING
            costs = {EIGHT: [float(count)], FOUR: [packed]}
            for bits, of in costs.items():
                of.extend(resource.taken[name][bits] for resource in self.resources)
            more = _more(self.losses[name])
            found.append([Candidate(0.0, tuple(costs[EIGHT])), Candidate(more, tuple(costs[FOUR]))])
        return found

    def _budgets(self, limit: float) -> tuple[float, ...]:
        """Return how much there is to choose with: of bytes, and of each resource."""
        return (limit, *(resource.left for resource in self.resources))

    def _pairs(self) -> list[Pair]:
        places = {name: at for at, name in enumerate(self.numbers)}
        return [
            Pair(places[a], places[b], np.array([[0.0, 0.0], [0.0, loss]]))
            for (a, b), loss in self.pairs.items()
            if loss
        ]

    def _widths(self, found: Allocation) -> Widths:
        bits = {name: (EIGHT, FOUR)[choice] for name, choice in zip(self.numbers, found.choice, strict=True)}
        return self.of(bits, found.gap)


def _more(losses: Mapping[int, float]) -> float:
    """Return what a weight loses by being packed; what it may seem to gain is chance."""
    return max(0.0, losses[FOUR] - losses[EIGHT])
