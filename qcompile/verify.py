"""Equivalence after a pass, and fidelity of the result, both on real activations."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompile.calib.data import Dataset, Sample
from qcompile.calib.work import Cost
from qcompile.calib.workers import abreast
from qcompile.core import numerics, runtime, scratch
from qcompile.core.contract import Effect, Track
from qcompile.core.errors import BudgetError, ModelError, VerificationError
from qcompile.core.lengths import Lengths
from qcompile.core.plan import Precision, QuantPlan, Role
from qcompile.fidelity import Comparison, Fidelity
from qcompile.passes import structure
from qcompile.passes.insert_qdq import dequantized_name
from qcompile.rounding_noise import rounding_noise

#: Largest max|Δ| / max|y| of a CLOSE pass, by the bytes of an output's float, or of a narrower one on the way to it.
CLOSE_BOUND = {8: 1e-4, 4: 1e-4, 2: 2e-2}
#: Kernels may differ from the QDQ model by their own rounding, but not by more than this, nor by more than twice the
#: power of the noise that quantization adds.
KERNEL_BOUND = 20.0
#: Farther away, they may be another draw of the same noise, where the order of a sum decides what is rounded up, but
#: not one of twice the power, in dB.
TWICE = 10.0 * math.log10(2.0)
#: Kernels nearer to the QDQ model than this are as near as float16 is behind many operators, however little noise there
#: is to compare theirs with.
KERNEL_NEAR = 40.0
#: What a kernel may make of an output that is all zero, where a ratio to the signal has no meaning.
KERNEL_ZERO = 1e-3
#: Samples on which the QDQ model itself and its layers are looked at: so many, and no more than this many
#: multiply-accumulates (`work.Cost`) take, but two at least.
INSPECTED, INSPECTION = 32, 1e11
Array = npt.NDArray[Any]


def outputs_of(model: ir.Model, samples: Sequence[Sample]) -> list[runtime.Outputs]:
    """Run a model node by node as written, without the runtime's rewrites, and return its outputs per sample."""
    session = runtime.Session(model, optimize=False)
    return [session.run(feeds) for feeds in samples]


def require_repeatable(model: ir.Model, samples: Sequence[Sample], outputs: Sequence[runtime.Outputs]) -> None:
    """Run a model again: if it differs from itself, no pass is to blame.

    Raises
    ------
    ModelError
        If the model draws random numbers.
    """
    for before, after in zip(outputs, outputs_of(model, samples), strict=True):
        for name, y in before.items():
            if not np.array_equal(y, after[name], equal_nan=y.dtype.kind == "f"):
                fact = f"output '{name}' differs each time the model runs: it draws random numbers"
                raise ModelError(
                    "model", fact, "export it for inference, out of training mode, and feed noise as an input"
                )


def check_equivalence(
    name: str, effect: Effect, before: Sequence[runtime.Outputs], after: Sequence[runtime.Outputs], width: int = 8
) -> float:
    """Hold a pass to its effect.

    Parameters
    ----------
    name : str
        The pass, for the message.
    effect : Effect
    before, after : sequences of outputs
        Per sample, of the model before and after the pass.
    width : int
        Bytes of the narrowest float that results of the model round to.

    Returns
    -------
    float
        The largest max|Δ| / max|y| over samples and outputs.

    Raises
    ------
    VerificationError
        If an output is missing, changed its shape, or moved further than the effect allows.
    """
    worst = 0.0
    for old, new in zip(before, after, strict=True):
        if set(old) != set(new):
            raise _broken(name, effect, f"changed the outputs from {sorted(old)} to {sorted(new)}")
        for output, y in old.items():
            z = new[output]
            if y.shape != z.shape or y.dtype != z.dtype:
                raise _broken(name, effect, f"changed output '{output}' from {y.dtype}{y.shape} to {z.dtype}{z.shape}")
            error = numerics.relative_error(y, z) if y.dtype.kind == "f" else float(not np.array_equal(y, z))
            _hold(name, effect, output, y, z, error, width)
            worst = max(worst, error)
    return worst


def _hold(name: str, effect: Effect, output: str, y: Array, z: Array, error: float, width: int) -> None:
    if effect is Effect.EXACT and not np.array_equal(y, z, equal_nan=y.dtype.kind == "f"):
        raise _broken(name, effect, f"is exact, but moved output '{output}' by {error:.2g} of its largest value")
    if effect is Effect.CLOSE:
        bound = CLOSE_BOUND.get(min(width, y.dtype.itemsize), 0.0) if y.dtype.kind == "f" else 0.0
        if not error <= bound:
            raise _broken(
                name, effect, f"moved output '{output}' by {error:.2g} of its largest value, more than {bound:.2g}"
            )
    if effect is Effect.LOSSY and y.dtype.kind == "f":
        if not np.array_equal(np.isfinite(y), np.isfinite(z)):
            raise _broken(name, effect, f"made output '{output}' infinite or NaN")
        finite = np.isfinite(y)
        if np.any(y[finite]) and numerics.sqnr(y[finite], z[finite]) <= 0.0:
            raise _broken(name, effect, f"left output '{output}' further from float's than zeros would be")


def _broken(name: str, effect: Effect, fact: str) -> VerificationError:
    lossy = "give more or other calibration data, or --activations none"
    return VerificationError(f"pass {name}", fact, lossy if effect is Effect.LOSSY else "report it with the model")


Run = Callable[[runtime.Feeds], runtime.Outputs]


@dataclass
class Proof:
    """What was found when the result was held against the model that came in.

    Parameters
    ----------
    reference : callable or None
        Runs the float model, with all of the runtime's optimizations; None where it is not held.
    fidelity : Fidelity
        Artifact against float model, on all samples: what a user gets.
    quantization : Fidelity
        QDQ model against float model: what the plan costs.
    rounding : Fidelity
        Artifact against QDQ model: what the target's kernels add.
    inspected : Fidelity
        Artifact against float model, on the samples that `quantization` and `rounding` are of.
    layers : dict of str to Comparison
        QDQ model against float model, by node name, with the error that has gathered up to each.
    by_length : dict of int to Fidelity
        Artifact against float model, by the length that a sample ran at, where there are several.
    magnified : dict of str to float
        QDQ model against itself with scales off in their last digits, in dB, by output; where that is what lets
        kernels be as far away as they are.
    """

    reference: Run | None
    fidelity: Fidelity = field(default_factory=Fidelity)
    quantization: Fidelity = field(default_factory=Fidelity)
    rounding: Fidelity = field(default_factory=Fidelity)
    inspected: Fidelity = field(default_factory=Fidelity)
    layers: dict[str, Comparison] = field(default_factory=dict)
    by_length: dict[int, Fidelity] = field(default_factory=dict)
    magnified: dict[str, float] = field(default_factory=dict)

    def reference_of(self, model: ir.Model) -> Run:
        """Return what runs the float model, `model`."""
        return self.reference or runtime.Session(model).run

    def require(self, bounds: Mapping[str, float]) -> None:
        """Hold the fidelity to the user's bounds.

        Raises
        ------
        BudgetError
            Naming the bound that is missed, what was reached, and the layer that loses most.
        """
        for measure, bound in bounds.items():
            if measure == "top1" and not self.fidelity.has(measure):
                fact = "top1 has no meaning for this model: no output is one row of scores"
                raise BudgetError("--min-fidelity", fact, "bound sqnr or cosine instead")
            reached = self.fidelity.worst(measure)
            if reached < bound:
                weakest = min(self.layers, key=lambda name: self.layers[name].sqnr, default=None)
                hint = f", layer '{weakest}' loses most" if weakest is not None else ""
                fact = f"{measure} is {reached:.4g}, below the bound of {bound:g}{hint}"
                raise BudgetError("--min-fidelity", fact, "give more calibration data or lower the bound")

    def require_faithful_kernels(self, near: float = KERNEL_NEAR) -> None:
        """Hold the artifact to the QDQ model that it was lowered from.

        Parameters
        ----------
        near : float
            SQNR from the QDQ model, in dB, from which on kernels may add what noise they do.

        Raises
        ------
        VerificationError
            If the target's kernels add more error than quantization did.
        """
        for name, added in self.rounding.outputs.items():
            silent = added.signal == 0.0 and added.largest <= KERNEL_ZERO and not added.broken
            if added.counted or silent:
                continue
            reached, bound = self.inspected.outputs[name].sqnr, self.quantization.outputs[name].sqnr - TWICE
            near_enough = added.sqnr >= max(KERNEL_BOUND, min(bound, near)) or reached >= bound
            if not near_enough and not added.sqnr >= self.magnified.get(name, math.inf) - TWICE:
                fact = (
                    f"output '{name}' is {added.sqnr:.1f} dB from the QDQ model and {reached:.1f} dB from float, which "
                    f"must be {bound:.1f} dB or more"
                )
                raise VerificationError("artifact", fact, "the runtime's kernels do not compute what the model says")


def prove(
    model: ir.Model,
    canonical: ir.Model,
    quantized: ir.Model,
    plan: QuantPlan,
    opened: Callable[[], Run],
    data: Dataset,
    track: Track[tuple[Sample, int | None]],
    lengths: Lengths | None = None,
    threads: int = 1,
    further: Iterable[Sample] = (),
) -> Proof:
    """Hold the artifact against the float model and against the QDQ model, on data that calibration did not see.

    The QDQ model runs as written, which is its definition and lets every layer be looked at; that is slow, so the
    samples beyond the first few only compare the artifact with the float model. `opened` loads the artifact, behind
    that: as few models as possible are held at a time. Models run `threads` samples at a time, which changes no result.

    Raises
    ------
    VerificationError
        If the target's kernels add more error than quantization did.
    """
    layers, simulations = _inspect(canonical, quantized, plan, data, threads)
    reference = runtime.Session(model).run
    answers, proof = abreast(reference, data, min(threads, 2)), Proof(reference, layers=layers)
    if scratch.is_open():
        answers, proof.reference = iter([_kept(one) for one in answers]), None
    del reference
    run = opened()
    labelled = track(data.labelled(), len(data), "verifying")
    for index, ((feeds, label), expected) in enumerate(zip(labelled, answers, strict=True)):
        found = run(feeds)
        proof.fidelity.add(expected, found, label)
        if lengths is not None:
            held = lengths.require(lengths.of_sample(feeds, "sample"), "sample")
            proof.by_length.setdefault(held, Fidelity()).add(expected, found, label)
        if index < len(simulations):
            proof.quantization.add(expected, simulations[index])
            proof.rounding.add(simulations[index], found)
            proof.inspected.add(expected, found)
    # Kernels that read codes of weights alone quantize what they multiply them by as they see fit.
    codes = any(quant.role is Role.ACTIVATION for quant in plan.tensors.values())
    near = KERNEL_NEAR if codes else KERNEL_BOUND
    try:
        proof.require_faithful_kernels(near)
    except VerificationError:
        more, samples = [*further], [*islice(data, len(simulations))]
        simulations += _look_further(proof, model, quantized, run, more)
        _settle(proof, near, quantized, samples + more, simulations)
    return proof


def _look_further(
    proof: Proof, model: ir.Model, quantized: ir.Model, run: Run, samples: Sequence[Sample]
) -> list[runtime.Outputs]:
    """Compare artifact, QDQ model and float model on more samples, and return what the QDQ model makes of them.

    On one sample it is chance which of two draws of the same noise is the smaller.
    """
    if not samples:
        return []
    simulations, reference = outputs_of(quantized, samples), proof.reference_of(model)
    for feeds, simulation in zip(samples, simulations, strict=True):
        expected, found = reference(feeds), run(feeds)
        proof.quantization.add(expected, simulation)
        proof.rounding.add(simulation, found)
        proof.inspected.add(expected, found)
    return simulations


def _settle(
    proof: Proof, near: float, quantized: ir.Model, samples: Sequence[Sample], simulations: Sequence[runtime.Outputs]
) -> None:
    """Hold kernels to the QDQ model; where they do not keep to it, to what that is held to by itself."""
    try:
        proof.require_faithful_kernels(near)
    except VerificationError:
        proof.magnified = rounding_noise(quantized, samples, simulations)
        proof.require_faithful_kernels(near)


def _inspect(
    canonical: ir.Model, quantized: ir.Model, plan: QuantPlan, data: Dataset, threads: int
) -> tuple[dict[str, Comparison], list[runtime.Outputs]]:
    """Return how far the QDQ model's layers are from the float model's, and its outputs, on the first few samples."""
    pairs = layer_pairs(canonical, quantized, plan)
    outputs = [str(value.name) for value in canonical.graph.outputs]
    inspected = min(INSPECTED, max(2, math.ceil(INSPECTION / Cost.of(quantized, next(iter(data))).total)))
    floats = runtime.Session(runtime.with_outputs(canonical, [before for before, _ in pairs.values()]))
    codes = runtime.Session(runtime.with_outputs(quantized, [after for _, after in pairs.values()]), optimize=False)
    layers, simulations = {name: Comparison() for name in pairs}, []

    def both(feeds: Sample) -> tuple[runtime.Outputs, runtime.Outputs]:
        return floats.run(feeds), codes.run(feeds)

    for before, after in abreast(both, islice(data, inspected), min(threads, 2)):
        for name, (one, other) in pairs.items():
            layers[name].add(before[one], after[other])
        simulations.append(_kept({n: y for n, y in after.items() if n in outputs or n.rpartition("[")[0] in outputs}))
    return layers, simulations


def _kept(outputs: runtime.Outputs) -> runtime.Outputs:
    """Return what a model made of a sample, large outputs in files where these leave memory."""
    return {name: scratch.kept(y) for name, y in outputs.items()}


def layer_pairs(model: ir.Model, quantized: ir.Model, plan: QuantPlan) -> dict[str, tuple[str, str]]:
    """Return, for each operator that the plan changes, its result's name in the float and in the QDQ model."""
    present = ir.convenience.create_value_mapping(quantized.graph)
    pairs = {}
    for node in model.graph:
        op = plan.ops.get(structure.node_name(node))
        if op is None or op.precision is Precision.FLOAT or (op.reason and not op.output and op.op_type != "Gather"):
            continue
        name = op.output or structure.name_of(node.outputs[0])
        behind = dequantized_name(name)
        pairs[structure.node_name(node)] = (name, behind if behind in present else name)
    return pairs
