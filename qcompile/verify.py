"""Equivalence after a pass, and fidelity of the result, both on real activations."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompile.calib.data import Dataset, Sample
from qcompile.calib.work import Cost
from qcompile.calib.workers import abreast
from qcompile.core import numerics, runtime
from qcompile.core.contract import Effect, Track
from qcompile.core.errors import BudgetError, ModelError, VerificationError
from qcompile.core.lengths import Lengths
from qcompile.core.plan import Precision, QuantPlan
from qcompile.passes import structure
from qcompile.passes.insert_qdq import dequantized_name

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


Run = Callable[[runtime.Feeds], runtime.Outputs]


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


@dataclass
class Proof:
    """What was found when the result was held against the model that came in.

    Parameters
    ----------
    reference : callable
        Runs the float model, with all of the runtime's optimizations.
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
    """

    reference: Run
    fidelity: Fidelity = field(default_factory=Fidelity)
    quantization: Fidelity = field(default_factory=Fidelity)
    rounding: Fidelity = field(default_factory=Fidelity)
    inspected: Fidelity = field(default_factory=Fidelity)
    layers: dict[str, Comparison] = field(default_factory=dict)
    by_length: dict[int, Fidelity] = field(default_factory=dict)

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

    def require_faithful_kernels(self) -> None:
        """Hold the artifact to the QDQ model that it was lowered from.

        Raises
        ------
        VerificationError
            If the target's kernels add more error than quantization did.
        """
        for name, added in self.rounding.outputs.items():
            if added.counted or (added.signal == 0.0 and added.largest <= KERNEL_ZERO):
                continue
            reached, bound = self.inspected.outputs[name].sqnr, self.quantization.outputs[name].sqnr - TWICE
            near = max(KERNEL_BOUND, min(bound, KERNEL_NEAR))
            if added.sqnr < near and not reached >= bound:
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
    run: Run,
    data: Dataset,
    track: Track[tuple[Sample, int | None]],
    lengths: Lengths | None = None,
    threads: int = 1,
) -> Proof:
    """Hold the artifact against the float model and against the QDQ model, on data that calibration did not see.

    The QDQ model runs as written, which is its definition and lets every layer be looked at; that is slow, so the
    samples beyond the first few only compare the artifact with the float model. Models run `threads` samples at a time,
    which changes no result, the artifact one after another.

    Raises
    ------
    VerificationError
        If the target's kernels add more error than quantization did.
    """
    pairs = layer_pairs(canonical, quantized, plan)
    floats = runtime.Session(runtime.with_outputs(canonical, [before for before, _ in pairs.values()]))
    codes = runtime.Session(runtime.with_outputs(quantized, [after for _, after in pairs.values()]), optimize=False)
    proof = Proof(runtime.Session(model).run, layers={name: Comparison() for name in pairs})
    inspected = min(INSPECTED, max(2, INSPECTION / Cost.of(quantized, next(iter(data))).total))

    def models(item: tuple[int, tuple[Sample, int | None]]) -> Any:
        index, (feeds, label) = item
        layers = (floats.run(feeds), codes.run(feeds)) if index < inspected else None
        return feeds, label, proof.reference(feeds), layers

    items = enumerate(track(data.labelled(), len(data), "verifying"))
    for feeds, label, expected, layers in abreast(models, items, min(threads, 2)):
        found = run(feeds)
        proof.fidelity.add(expected, found, label)
        if lengths is not None:
            held = lengths.require(lengths.of_sample(feeds, "sample"), "sample")
            proof.by_length.setdefault(held, Fidelity()).add(expected, found, label)
        if layers is not None:
            before, after = layers
            simulated = {name: after[name] for name in expected}
            proof.quantization.add(expected, simulated)
            proof.rounding.add(simulated, found)
            proof.inspected.add(expected, found)
            for name, (one, other) in pairs.items():
                proof.layers[name].add(before[one], after[other])
    proof.require_faithful_kernels()
    return proof


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
