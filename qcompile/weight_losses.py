"""What weights lose: each alone in each number of bits, and choices of bits for all of them together.

All of it is run on samples that codes were not found by. Codes of both widths are found once, by all the others
(`calib/rounding.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from qcompile.calib.rounding import Operator, round_weights, second_moments
from qcompile.calib.weighing import affordable, weights_alone, whole_models
from qcompile.compensation import HELD_OUT
from qcompile.core import numerics, packing, scratch
from qcompile.core.numerics import IntArray
from qcompile.core.plan import QuantPlan, Role
from qcompile.job import Job
from qcompile.passes import structure
from qcompile.passes.allocate_bits import round_to_codes
from qcompile.passes.insert_qdq import InsertQdq, quantized_name
from qcompile.passes.round_weights import RoundWeights, roundable

#: Bits that weights can be stored in, by what is called so in files: an int8's, and an int4's or four and a quarter.
EIGHT, FOUR = 8, 4

#: Noise over signal at the outputs, by the name of a weight and by its bits.
Losses = Mapping[str, Mapping[int, float]]
#: Noise over signal at the outputs with everything quantized, by the names of the weights that are in four bits.
Tried = Mapping[frozenset[str], float]
#: What returns the plan with weights in these bits.
Planned = Callable[[Mapping[str, int]], QuantPlan]
#: Codes by bits and by the name of the initializer that holds them.
Codes = Mapping[int, Mapping[str, IntArray]]
#: Noise over signal that two weights make together in four bits, beyond what each makes alone; by their names.
Pairs = Mapping[tuple[str, str], float]


def packable(model: ir.Model, planned: Planned) -> dict[str, int]:
    """Return how many numbers the weights have that can be stored in four bits, by name."""
    sizes = _in_eight(model, planned)
    kept = _kept_as_four(model, sizes, planned)
    # What unpacks codes takes bytes of a file too; kernels that take four bits as they are need nothing.
    return {name: size for name, size in sizes.items() if size >= (1 if name in kept else packing.FEWEST)}


def takes_four(model: ir.Model, planned: Planned) -> bool:
    """Tell whether kernels take weights of four bits as they are, so that nothing need unpack them."""
    return bool(_kept_as_four(model, _in_eight(model, planned), planned))


def _in_eight(model: ir.Model, planned: Planned) -> dict[str, int]:
    """Return how many numbers the weights have that are in eight bits where nobody asks for fewer, by name."""
    weights = {name: structure.constant_tensor(value) for name, value in model.graph.initializers.items()}
    sizes = {name: weight.size for name, weight in weights.items() if weight is not None}
    tensors = planned({}).tensors
    return {name: sizes[name] for name, quant in tensors.items()
            if quant.role is Role.WEIGHT and quant.dtype == "int8" and name in sizes}  # fmt: skip


def _kept_as_four(model: ir.Model, names: Iterable[str], planned: Planned) -> frozenset[str]:
    """Return the weights whose four bits are stored as they are.

    It is the same for all that are read alike, so that one of them is planned and not all.
    """
    ops, alike = planned({}).ops, dict[frozenset[str], list[str]]()
    for name in names:
        readers = structure.readers(model.graph.initializers[name])
        plans = (ops[structure.node_name(reader)] for reader in readers if structure.node_name(reader) in ops)
        alike.setdefault(frozenset(plan.precision.value for plan in plans), []).append(name)
    kept = []
    for group in alike.values():
        four = planned({group[0]: FOUR}).tensors[group[0]]
        kept += group if four.bits < EIGHT and not four.block_size else []
    return frozenset(kept)


def in_four(bits: Mapping[str, int]) -> frozenset[str]:
    """Return the weights that a choice puts into four bits."""
    return frozenset(name for name, width in bits.items() if width == FOUR)


def find_codes(job: Job, canonical: ir.Model, planned: Planned) -> dict[int, dict[str, IntArray]]:
    """Round all weights with regard to one another, in each number of bits; inputs are weighed once for both."""
    names = packable(canonical, planned)
    plans = {bits: planned(dict.fromkeys(names, bits)) for bits in (EIGHT, FOUR)}
    operators = {bits: _operators(canonical, plan) for bits, plan in plans.items()}
    initializers = {operator: name for name, operator in operators[EIGHT].items()}
    fit, _ = job.evidence.calibration.split(HELD_OUT)
    found: dict[int, dict[str, IntArray]] = {bits: {} for bits in plans}
    data, threads = job.evidence.fitted(fit), job.options.threads
    for operator, moments in second_moments(canonical, list(initializers), data, job.track, threads):
        name = initializers[operator]
        for bits, codes in found.items():
            codes[name] = round_weights(operators[bits][name], moments)
    return found


def _operators(canonical: ir.Model, plan: QuantPlan) -> dict[str, Operator]:
    """Return the operators whose codes can be chosen, by the initializer that holds these."""
    found, _ = roundable(canonical, InsertQdq(plan)(canonical.clone()).model, plan)
    return found


def measure_losses(
    job: Job, canonical: ir.Model, planned: Planned, codes: Callable[[], Codes]
) -> dict[str, dict[int, float]]:
    """Measure what each weight that has a choice loses at the outputs, in each number of bits and alone.

    Of a model too large to be run with each, it is the weights' own squared error that tells.
    """
    names = packable(canonical, planned)
    _, others = job.evidence.calibration.split(HELD_OUT)
    if not affordable(canonical, len(names), others):
        return own_errors(canonical, planned, names)
    weights, found = {name: (name,) for name in names}, {}
    for bits, of in codes().items():
        model = _in_codes(canonical, planned(dict.fromkeys(names, bits)), of)
        found[bits] = weights_alone(canonical, model, weights, others, job.track, job.workers)
    return {name: {bits: losses[name] for bits, losses in found.items()} for name in names}


def measure_pairs(
    job: Job, canonical: ir.Model, planned: Planned, codes: Callable[[], Codes], losses: Losses, window: int
) -> dict[tuple[str, str], float]:
    """Measure what weights that stand near one another lose together, beyond what each of them loses alone.

    CLADO's loss(i, j) - loss(i) - loss(j) (Deng et al. 2023, arXiv 2307.05657), both in four bits: errors of
    eight bits are a sixteenth as large, and what they do with others is little beside what is left of chance.

    Parameters
    ----------
    losses : Losses
        What `measure_losses` returned: of the same samples, so that what these have in common cancels.
    window : int
        Each weight is measured with so many that follow it in the graph.

    Returns
    -------
    dict of (str, str) to float
        Empty where losses were not measured at the outputs either.
    """
    names = list(packable(canonical, planned))
    _, others = job.evidence.calibration.split(HELD_OUT)
    pairs = neighbours(names, window)
    if not affordable(canonical, len(names), others) or not pairs:
        return {}
    model = _in_codes(canonical, planned(dict.fromkeys(names, FOUR)), codes()[FOUR])
    weights = {f"{at}": pair for at, pair in enumerate(pairs)}
    found = weights_alone(canonical, model, weights, others, job.track, job.workers, shared=len(names))
    alone = {name: losses[name][FOUR] for name in names}
    return {(a, b): found[at] - alone[a] - alone[b] for at, (a, b) in weights.items()}


def neighbours(names: Sequence[str], window: int) -> list[tuple[str, str]]:
    """Return each name with so many of those that follow it."""
    return [(name, other) for at, name in enumerate(names) for other in names[at + 1 : at + 1 + window]]


def tempered(alone: Mapping[str, float], pairs: Pairs) -> dict[tuple[str, str], float]:
    """Weaken pairs by as much as keeps every choice from losing less than nothing.

    The error of a choice is a quadratic form of what was chosen, and cannot be negative. A pair has at most 2√(ab) in
    common, where a and b are what both lose alone (Cauchy and Schwarz); what is above that is cut off. With pairs of a
    window alone the form D + E may still be less than 0, D being what weights lose and E half of what pairs do: all are
    then weakened by the same factor, the largest with which it is not. CLADO clips eigenvalues instead, which would
    make pairs of weights that were not measured.

    Parameters
    ----------
    alone : mapping of str to float
        By the name of a weight, what it loses.
    pairs : Pairs
    """
    most = {(a, b): 2.0 * math.sqrt(alone[a]) * math.sqrt(alone[b]) for a, b in pairs}
    cut = {pair: min(max(loss, -most[pair]), most[pair]) for pair, loss in pairs.items()}
    places = {name: at for at, name in enumerate(alone)}
    form = np.zeros((len(alone), len(alone)))
    for (a, b), loss in cut.items():
        if loss:
            form[places[a], places[b]] = form[places[b], places[a]] = loss / most[a, b]
    lowest = float(np.linalg.eigvalsh(form)[0]) if pairs else 0.0
    return {pair: loss / max(1.0, -lowest) for pair, loss in cut.items()}


def _in_codes(canonical: ir.Model, plan: QuantPlan, codes: Mapping[str, IntArray]) -> ir.Model:
    """Return the float model with its weights as they will be dequantized, from these codes where there are any."""
    model = round_to_codes(canonical, plan)
    for name, quant in plan.tensors.items():
        if (chosen := codes.get(quantized_name(name))) is not None:
            model.graph.initializers[name].const_value = scratch.tensor(quant.dequantize(chosen), name)
    return model


def try_choices(
    job: Job, canonical: ir.Model, planned: Planned, codes: Callable[[], Codes], choices: Sequence[Mapping[str, int]]
) -> dict[frozenset[str], float]:
    """Run the quantized model with each of these choices of bits, before biases are corrected.

    Errors that meet neither add up nor cancel by themselves, and what losses are measured on is not all that there is:
    of choices that are expected to lose about the same, this tells which loses least.

    Returns
    -------
    dict of frozenset of str to float
        As `Tried`; empty where it would take too long, or where losses did.
    """
    _, others = job.evidence.calibration.split(HELD_OUT)
    if not affordable(canonical, len(packable(canonical, planned)), others):
        return {}
    models = (quantized_in(canonical, planned, codes(), bits) for bits in choices)
    found = whole_models(canonical, models, len(choices), others, job.track)
    return dict(zip(map(in_four, choices), found, strict=False))


def quantized_in(canonical: ir.Model, planned: Planned, codes: Codes, bits: Mapping[str, int]) -> ir.Model:
    """Return the QDQ model with weights in these bits, those that are not named in eight."""
    packed = {quantized_name(name) for name in in_four(bits)}
    chosen = {name: codes[FOUR if name in packed else EIGHT][name] for name in codes[EIGHT]}
    return RoundWeights(chosen)(InsertQdq(planned(bits))(canonical.clone()).model).model


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
