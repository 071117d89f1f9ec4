"""One model whose weights' bits are chosen in several ways, for `allocation.py`: what is expected, what is measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import onnx_ir as ir
from observers import widened

from qcompile import driver, stages
from qcompile.allocation import UNPACKING, Program, program_of
from qcompile.calib.data import Dataset, Sample
from qcompile.calib.output_error import OutputError
from qcompile.calib.sections import at_scores
from qcompile.calib.sensitivity import spread
from qcompile.calibration import Calibration
from qcompile.compensation import HELD_OUT
from qcompile.core import model as models
from qcompile.core import numerics, packing, runtime
from qcompile.core.numerics import IntArray
from qcompile.core.plan import QuantPlan
from qcompile.decision import planner
from qcompile.equivalence import Equivalences
from qcompile.fidelity import Comparison
from qcompile.job import Job
from qcompile.options import Options
from qcompile.passes import structure
from qcompile.passes.insert_qdq import quantized_name
from qcompile.passes.integer_program import Candidate
from qcompile.pipeline import untracked
from qcompile.weight_losses import EIGHT, FOUR, find_codes, quantized_in

#: Samples that are run, at most.
SAMPLES = 24
Bits = Mapping[str, int]


@dataclass(frozen=True)
class Measured:
    """What came of bits, in dB: in front of a last Softmax on calibration and evaluation data, and at the outputs."""

    held_out: float
    scores: float
    outputs: float


@dataclass(frozen=True)
class Subject:
    """One model with all that is asked of it."""

    name: str
    job: Job
    calibration: Calibration
    canonical: ir.Model
    program: Program
    folder: Path

    @classmethod
    def load(cls, name: str, paths: Sequence[Path], folder: Path) -> Subject:
        """Measure what its weights lose, or read what was measured."""
        model, data, evaluation = map(str, paths)
        options, file = Options("cpu", data=data, eval=evaluation, weights="mixed"), folder / f"{name}.npz"
        if not file.exists():
            stages.calibrate(model, options, file)
        job, calibration = Job.begin(model, options, untracked), Calibration.read(file)
        calibration.require_model(models.content_hash(job.model), file)
        canonical = driver.canonical_form(job.target, options, calibrated=True)(job.model).model
        canonical = Equivalences(calibration.rotation, calibration.smoothing).applied(canonical)
        planned = planner(canonical, calibration, job.target, options)
        program = program_of(canonical, calibration, planned, job.backend, options)
        return cls(name, job, calibration, canonical, program, folder)

    @property
    def candidates(self) -> list[list[Candidate]]:
        """What the program chooses among, tensor by tensor: eight bits, four bits."""
        found = []
        for name, count in self.program.numbers.items():
            more = max(0.0, self.program.losses[name][FOUR] - self.program.losses[name][EIGHT])
            packed = count * packing.BITS / 8.0 + UNPACKING
            found.append([Candidate(0.0, (float(count),)), Candidate(more, (packed,))])
        return found

    def bits(self, choice: Sequence[int]) -> dict[str, int]:
        """Turn a choice among the candidates into bits."""
        return {name: (EIGHT, FOUR)[at] for name, at in zip(self.program.numbers, choice, strict=True)}

    def bytes(self, bits: Bits) -> float:
        """Return what the program reckons that weights take."""
        of = zip(self.candidates, bits.values(), strict=True)
        return sum(one[(EIGHT, FOUR).index(chosen)].costs[0] for one, chosen in of)

    def expected(self, bits: Bits) -> float:
        """Return the expected noise."""
        of = zip(self.candidates, bits.values(), strict=True)
        return self.program.noise + sum(one[(EIGHT, FOUR).index(chosen)].loss for one, chosen in of)

    @cached_property
    def size(self) -> float:
        """The file's bytes but for what the program reckons, in parts of float's."""
        return self.program.fixed / self.calibration.float_bytes

    @cached_property
    def parts(self) -> tuple[Dataset, Dataset]:
        """Calibration data: what weights are rounded by, and what is held out from that."""
        return self.job.evidence.calibration.split(HELD_OUT)

    @cached_property
    def samples(self) -> tuple[list[Sample], list[Sample]]:
        """Samples held out of the calibration data, and evaluation samples."""
        return spread(self.parts[1], 0, SAMPLES), spread(self.job.evidence.evaluation, 0, SAMPLES)

    @cached_property
    def scores(self) -> list[str]:
        """Names of the outputs in front of a last Softmax."""
        return [structure.name_of(value) for value in at_scores(self.canonical).graph.outputs]

    @cached_property
    def reference(self) -> list[list[runtime.Outputs]]:
        """What float returns for the samples."""
        session = runtime.Session(runtime.with_outputs(self.canonical, self.scores))
        return [[session.run(feeds) for feeds in part] for part in self.samples]

    @cached_property
    def codes(self) -> dict[int, dict[str, IntArray]]:
        """Codes of weights by GPTQ, by bits and by the name of the initializer, as a compile rounds them."""
        file = self.folder / f"{self.name}-codes.npz"
        if not file.exists():
            found = find_codes(self.job, self.canonical, self.program.planned)
            names = [f"{bits}/{name}" for bits, of in found.items() for name in of]
            np.savez(file, *(codes for of in found.values() for codes in of.values()), names=np.array(names, np.str_))
        with np.load(file) as archive:
            read: dict[int, dict[str, IntArray]] = {EIGHT: {}, FOUR: {}}
            for index, key in enumerate(archive["names"]):
                bits, _, name = str(key).partition("/")
                read[int(bits)][name] = archive[f"arr_{index}"]
            return read

    def measured(self, bits: Bits) -> Measured:
        """Quantize with these bits and run the samples."""
        found = self.noise(quantized_in(self.canonical, self.program.planned, self.codes, bits))
        outputs = [structure.name_of(value) for value in self.canonical.graph.outputs]
        held_out, scores = map(self._summed, found)
        return Measured(held_out, scores, min(found[1][name] for name in outputs))

    def by_sample(self, bits: Bits, repeats: int) -> tuple[float, float]:
        """Quantize with these bits; return the mean over samples of each one's SQNR, held out and of evaluation data.

        Its noise is the mean over so many runs, all but the first with the scales of activations a little wider.
        """
        sessions = []
        for repeat in range(repeats):

            def planned(of: Bits, repeat: int = repeat) -> QuantPlan:
                return widened(self.program.planned(of), repeat)

            quantized = quantized_in(self.canonical, planned, self.codes, bits)
            sessions.append(runtime.Session(runtime.with_outputs(quantized, self.scores)))
        found = []
        for samples, expected in zip(self.samples, self.reference, strict=True):
            error = OutputError()
            for feeds, before in zip(samples, expected, strict=True):
                scores = {name: before[name] for name in self.scores}
                error.add(scores, *(session.run(feeds) for session in sessions))
            found.append(numerics.decibel(1.0, error.value))
        return found[0], found[1]

    def in_codes(self, bits: Bits, given: Mapping[str, IntArray]) -> tuple[float, float]:
        """Return the SQNR with what is in four bits alone in codes, on samples held out and on evaluation data.

        They are those that are given, by the name of the initializer, or else the nearest.
        """
        plan, copy = self.program.planned(bits), self.canonical.clone()
        for name in (name for name, chosen in bits.items() if chosen == FOUR):
            value, quant = copy.graph.initializers[name], plan.tensors[name]
            weight = structure.constant(value)
            assert weight is not None
            codes = given.get(quantized_name(name))
            real = quant.dequantize(quant.quantize(weight) if codes is None else codes)
            value.const_value = ir.tensor(real, name=name)
        held_out, scores = map(self._summed, self.noise(copy))
        return held_out, scores

    def noise(self, model: ir.Model) -> list[dict[str, float]]:
        """Run the samples; return for both kinds the SQNR of each output."""
        session, found = runtime.Session(runtime.with_outputs(model, self.scores)), []
        for samples, expected in zip(self.samples, self.reference, strict=True):
            sums: dict[str, Comparison] = {}
            for feeds, before in zip(samples, expected, strict=True):
                after = session.run(feeds)
                for name, array in before.items():
                    sums.setdefault(name, Comparison()).add(array, after[name])
            found.append({name: one.sqnr for name, one in sums.items()})
        return found

    def _summed(self, found: Mapping[str, float]) -> float:
        """Return the SQNR of all outputs' noise over signal summed up, in which losses are measured."""
        return numerics.decibel(1.0, sum(10.0 ** (-found[name] / 10.0) for name in self.scores))
