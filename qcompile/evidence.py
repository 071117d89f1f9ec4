"""The data of one compile: what is calibrated on, what is evaluated on, and what there is to say about it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import islice

import onnx_ir as ir

from qcompile.calib.data import Dataset, Sample, input_specs, open_data
from qcompile.calib.enlarge import Enlarger
from qcompile.calib.moments import known_moments
from qcompile.core.plan import QuantPlan, Role
from qcompile.core.runtime import synthetic_feeds
from qcompile.core.validate import check_interface
from qcompile.options import Options
from qcompile.passes.canonicalize.fix_shapes import FixShapes

#: Part of the calibration data that is held out when no evaluation data are given.
HELD_OUT = 0.2
#: Random inputs that there are beside the one that stands in for evaluation data.
FURTHER = 16
#: Passes are verified on this many samples; the result is, on all that are held out.
VERIFIED_ON = 4
#: The source of the evaluation samples where there are none.
SYNTHETIC = "one random input"
RANDOM_ONLY = " Fidelity is that on one random input, which says little about real ones."
#: What must be said first where nothing tells what activations reach.
WEIGHTS_ALONE = (
    "No calibration data: weights are stored as integers, activations stay float. The file is smaller, and a model "
    "whose weights are unpacked at load is not faster; pass --data for integer kernels."
)
#: The same of a target that has no codes of activations.
NO_RANGES = "No calibration data: weights are codes, and what activations reach is not known."
#: What must be said first of ranges that no sample was measured for.
GUESSED = (
    "No calibration data: the ranges of activations are GUESSED from what BatchNormalization remembers of the training "
    "data, and biases are not corrected. What real inputs make of that is not known; pass --data."
)
#: The same where there is nothing to guess.
AT_RUN_TIME = (
    "No calibration data: activations take the range that their values have in each run, and biases are not corrected; "
    "pass --data to have them measured."
)
GUESSED_ELSEWHERE = "The plan's ranges of activations are GUESSED, whatever data are given now; calibrate on them anew."


@dataclass(frozen=True)
class Evidence:
    """The samples that decisions and figures rest on.

    Parameters
    ----------
    calibration : Dataset
    evaluation : Dataset
    source : str
        Where the evaluation samples come from, in words for the report.
    calibrated : bool
        Whether the calibration samples are real. If not, activations are quantized where their ranges can be derived.
    caveat : str
        What the figures do not show; empty where they stand on their own.
    enlarger : Enlarger, optional
        What makes further samples to fit to.
    further : Dataset, optional
        Random inputs beside the one that is evaluated on, for judgements that one is too few for.
    """

    calibration: Dataset
    evaluation: Dataset
    source: str
    calibrated: bool
    caveat: str = ""
    enlarger: Enlarger | None = None
    further: Dataset | None = None

    def fitted(self, data: Dataset) -> Dataset:
        """Return what is to be fitted to where these samples are: with those made of them, where that is asked for."""
        return data if self.enlarger is None else self.enlarger(data)

    def told(self, plan: QuantPlan) -> Evidence:
        """Return the same with what there is to say of a plan with scales of activations that no data here led to."""
        if self.calibrated and plan.guessed:
            return replace(self, caveat=" ".join(filter(None, (GUESSED_ELSEWHERE, self.caveat))))
        activations = [quant for quant in plan.tensors.values() if quant.role is Role.ACTIVATION]
        if self.calibrated or not activations:
            return self
        if plan.guessed:
            return self.guessing()
        dynamic = all(quant.is_dynamic for quant in activations)
        return self.at_run_time() if dynamic else self._with("No data: biases are not corrected.")

    def guessing(self) -> Evidence:
        """Return the same for activations whose ranges are derived instead of measured."""
        return self._with(GUESSED)

    def at_run_time(self) -> Evidence:
        """Return the same for activations whose ranges are those of each run's values."""
        return self._with(AT_RUN_TIME)

    def _with(self, caveat: str) -> Evidence:
        return replace(self, caveat=caveat + (RANDOM_ONLY if self.source == SYNTHETIC else ""))

    @property
    def samples(self) -> list[Sample]:
        """The samples on which passes are verified."""
        return list(islice(self.calibration, VERIFIED_ON))

    @property
    def digest(self) -> str:
        """A hash over all samples, and over which of them serve for what."""
        return f"{self.calibrated} {self.calibration.digest} {self.evaluation.digest}"


def gather(model: ir.Model, options: Options, codes: bool = True) -> Evidence:
    """Open the data that the options name and say what stands in for what is missing.

    Parameters
    ----------
    model : onnx_ir.Model
    options : Options
    codes : bool
        Whether the target has codes of activations, which data would lead to.

    Raises
    ------
    DataError
        If they do not fit the model.
    ModelError
        If the model has inputs or outputs that no data fit.
    UsageError
        If samples are to be made that nobody knows how to.
    """
    # Data have the shapes that the compiled model takes, not those that it could have taken.
    model = FixShapes(options.shape)(model.clone()).model
    check_interface(model)
    evidence = _given(model, options, codes)
    if options.enlarge is None or not evidence.calibrated:
        return evidence
    return _enlarged(model, evidence, options.enlarge)


def _enlarged(model: ir.Model, evidence: Evidence, count: int) -> Evidence:
    """Return evidence with samples made of the calibration samples, as long as these are fewer."""
    real = len(evidence.calibration)
    if real >= count:
        return evidence
    caveat = f"Calibrated on {real} samples and on {count - real} that were made of them."
    enlarger = Enlarger.of(model, evidence.calibration, count)
    return replace(evidence, enlarger=enlarger, caveat=" ".join(filter(None, (caveat, evidence.caveat))))


def _given(model: ir.Model, options: Options, codes: bool) -> Evidence:
    """Return what the options name, and what stands in for what is missing."""
    specs = input_specs(model)
    given = open_data(options.data, specs) if options.data is not None else None
    evaluation = open_data(options.eval, specs) if options.eval is not None else None
    if given is None:
        return _without_calibration(model, options, evaluation, codes)
    if evaluation is not None:
        caveat = "" if len(given) > 1 else "Calibrated on a single sample: the ranges are a guess."
        return Evidence(given, evaluation, f"{len(evaluation)} evaluation samples", True, caveat)
    calibration, held_out = given.split(HELD_OUT)
    if len(given) == 1:
        caveat = "A single sample serves for calibration and evaluation: the fidelity is optimistic."
        return Evidence(calibration, held_out, "the calibration sample itself", True, caveat)
    return Evidence(calibration, held_out, f"{len(held_out)} samples held out of the calibration data", True)


def _without_calibration(model: ir.Model, options: Options, evaluation: Dataset | None, codes: bool) -> Evidence:
    caveat = WEIGHTS_ALONE if codes else NO_RANGES
    if evaluation is not None:
        return Evidence(evaluation, evaluation, f"{len(evaluation)} evaluation samples", False, caveat)
    known, specs = known_moments(model), input_specs(model)
    open_axis = 1 if options.lengths is None else options.lengths.sizes[-1]

    def drawn(seed: int) -> Sample:
        """Return a random input, with the moments that are known of it."""
        noise = synthetic_feeds(model, seed, open_axis).items()
        return {name: known[name].drawn(array) if name in known else array for name, array in noise}

    feeds, seeds = drawn(options.seed), range(options.seed + 1, options.seed + 1 + FURTHER)
    synthetic = Dataset("synthetic", lambda: [feeds], specs)
    further = Dataset("synthetic", lambda: map(drawn, seeds), specs)
    return Evidence(synthetic, synthetic, SYNTHETIC, False, caveat + RANDOM_ONLY, further=further)
