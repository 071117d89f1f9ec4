"""Calibrate MiniLM-L6 with every observer at once, beside onnxruntime's calibrators, and write docs/calibration.md.

    python benchmarks/calibration.py [--cache DIR]

Each measurement is a process of its own, so that its peak memory is its own; they are interleaved, and the table has
their medians. What is timed is all between the model's file and the ranges: qcompile canonicalizes, collects, and
computes the range of every tensor by all observers; onnxruntime augments the model, collects and computes.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from qcompile.calib.data import Sample, input_specs, open_data

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs/calibration.md"
ROUNDS = 3
#: onnxruntime's percentile calibrator keeps every value until it has seen the last: more samples may not fit.
CASES = (("qcompile", 64), ("MinMax", 64), ("Percentile", 64), ("qcompile", 512), ("MinMax", 512))
HEAD = """# Calibration beside onnxruntime's

Written by `python benchmarks/calibration.py`; do not edit. MiniLM-L6 on sentences of 8 to 128 tokens (64 real ones,
taken again and again for more); qcompile measures all activations that it quantizes for all of its observers in one
run, onnxruntime's calibrators (opset types MatMul and Gemm) serve one observer each. Medians of {rounds} interleaved
processes, one thread. Memory is the peak of the process.

| calibrator | samples | seconds | of MinMax | peak memory, MB |
|---|---|---|---|---|
"""


def samples(folder: Path, model: Any, count: int) -> Iterator[Sample]:
    """Yield that many samples, the real ones again and again."""
    return islice(cycle(open_data(str(folder), input_specs(model))), count)


def measure_qcompile(model_path: Path, folder: Path, count: int) -> None:
    """Do what a compile does up to the ranges."""
    from qcompile.backends.base import find_target
    from qcompile.calib.collect import collect
    from qcompile.calib.data import Dataset
    from qcompile.calib.observers import Observer, value_range
    from qcompile.core import model as models
    from qcompile.passes.canonicalize import Canonicalize
    from qcompile.passes.place import place
    from qcompile.pipeline import untracked

    model, (target, _) = models.load(model_path), find_target("cpu")
    Canonicalize(target.opset)(model)
    names = place(model, target, weights=True, activations=True).activations
    data = Dataset("repeated", lambda: samples(folder, model, count), input_specs(model))
    for histogram in collect(model, names, data, untracked).histograms.values():
        for observer in Observer:
            value_range(histogram, observer, target.activation_dtype)


def measure_onnxruntime(method: str, model_path: Path, folder: Path, count: int) -> None:
    """Do what onnxruntime's static quantization does up to the ranges."""
    import onnxruntime
    from onnxruntime.quantization import calibrate

    from qcompile.core import model as models

    class Reader(calibrate.CalibrationDataReader):  # type: ignore[misc, unused-ignore]
        def __init__(self) -> None:
            self.feeds = samples(folder, models.load(model_path), count)

        def get_next(self) -> Any:
            return next(self.feeds, None)

    options = onnxruntime.SessionOptions
    onnxruntime.SessionOptions = lambda: _one_thread(options())
    with tempfile.TemporaryDirectory() as scratch:
        calibrator = calibrate.create_calibrator(
            str(model_path),
            ["MatMul", "Gemm"],
            str(Path(scratch) / "augmented.onnx"),
            getattr(calibrate.CalibrationMethod, method),
        )
        calibrator.collect_data(Reader())
        calibrator.compute_data()


def _one_thread(options: Any) -> Any:
    options.intra_op_num_threads = 1
    return options


def run(case: tuple[str, int], model: Path, folder: Path) -> dict[str, float] | str:
    """Measure one case in a process of its own; return what it fails with if it does."""
    words = [sys.executable, __file__, "--case", case[0], str(case[1]), str(model), str(folder)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        return done.stderr.strip().splitlines()[-1]
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def row(case: tuple[str, int], runs: Sequence[dict[str, float] | str], base: float) -> str:
    """Return one line of the table."""
    name = "qcompile, all observers" if case[0] == "qcompile" else f"onnxruntime {case[0]}"
    measured = [entry for entry in runs if not isinstance(entry, str)]
    if not measured:
        return f"| {name} | {case[1]} | fails: {runs[0]} | | |"
    seconds, peak = (statistics.median(entry[key] for entry in measured) for key in ("seconds", "megabytes"))
    return f"| {name} | {case[1]} | {seconds:.2f} | {seconds / base:.2f}x | {peak:.0f} |"


def main() -> None:
    """Measure all cases and write the page, or one of them in this process."""
    parser = argparse.ArgumentParser(description="Calibrate MiniLM-L6 beside onnxruntime.")
    parser.add_argument("--cache", type=Path, help="folder of the fetched models")
    parser.add_argument("--case", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        kind, count, model, folder = options.case
        start = time.perf_counter()
        if kind == "qcompile":
            measure_qcompile(Path(model), Path(folder), int(count))
        else:
            measure_onnxruntime(kind, Path(model), Path(folder), int(count))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps({"seconds": time.perf_counter() - start, "megabytes": peak}))
        return
    words = [sys.executable, str(ROOT / "models/fetch.py"), "minilm-l6"]
    words += ["--cache", str(options.cache)] if options.cache else []
    done = subprocess.run(words, check=True, capture_output=True, text=True)
    model_path, calibration, _ = (Path(line) for line in done.stdout.splitlines() if line.strip())
    found: dict[tuple[str, int], list[dict[str, float] | str]] = {case: [] for case in CASES}
    for _ in range(ROUNDS):
        for case in CASES:
            found[case].append(run(case, model_path, calibration))
    rows = []
    for case, runs in found.items():
        base = statistics.median(entry["seconds"] for entry in found["MinMax", case[1]] if not isinstance(entry, str))
        rows.append(row(case, runs, base))
        print(rows[-1], flush=True)
    PAGE.write_text(HEAD.format(rounds=ROUNDS) + "\n".join(rows) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
