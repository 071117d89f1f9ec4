"""Measure the cost table of this machine's class of processors, and how well it predicts; write both.

    python benchmarks/costs.py [NAME ...] [--cache DIR] [--table FILE] [--page FILE]
    python benchmarks/costs.py --structure "PROCESSOR" --table FILE

Without names, all models of the catalogue (needs the extra `models`); each is measured as it came, with its weights in
integers, and with all in integers. The page tells latencies as measured beside those that the table predicts, with the
model's own kernels in it and without. With --structure nothing is timed: the table has the capabilities alone, as an
emulated processor can tell them. Nothing else should run on the machine meanwhile.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from rich.console import Console

from qcompile.backends.base import find_target
from qcompile.backends.ort import capabilities, probe
from qcompile.core import runtime
from qcompile.core.capabilities import Capability
from qcompile.core.costs import CostTable
from qcompile.core.execution import Kernel
from qcompile.options import Options
from qcompile.probing import here, subject
from qcompile.terminal import ProgressBars

ROOT = Path(__file__).parent.parent
TABLE = ROOT / "backends/ort/costs/avx512-vnni.json"
PAGE = ROOT / "docs/costs.md"
MARK = "<!-- written by benchmarks/costs.py from here on -->\n"
NOT_MODELS = ("packages", "committed")
#: Samples that a model is measured on; of models with more bytes than this, fewer.
SAMPLES, LARGE, FEW = 4, 8 << 20, 2

#: By form, what each sample took.
Runs = Mapping[str, Sequence[probe.Run]]


def fetch(name: str, cache: Path | None) -> tuple[Path, Path]:
    """Return model and calibration data of a catalogue model, fetched if need be."""
    words = [sys.executable, str(ROOT / "models/fetch.py"), name, *(["--cache", str(cache)] if cache else [])]
    done = subprocess.run(words, check=True, capture_output=True, text=True)
    model, data, *_ = (Path(line) for line in done.stdout.splitlines() if line.strip())
    return model, data


def measure(name: str, model: Path, data: Path, beside: float) -> Runs:
    """Return what a model takes in each of its forms."""
    target, _ = find_target("cpu")
    found = subject(name, model, Options("cpu", data=str(data)))
    count = FEW if model.stat().st_size > LARGE else SAMPLES
    fewer = type(found)(found.name, found.model, found.canonical, found.samples[:count])
    return probe.measure_model(fewer, target, beside)


def kernels(runs: Iterable[Runs]) -> list[Kernel]:
    """Return all that models executed."""
    return [kernel for forms in runs for form in forms.values() for run in form for kernel in run.kernels]


def predictions(found: Mapping[str, Runs], grid: Sequence[Kernel], beside: float) -> list[str]:
    """Return the rows of the page, and below them what they come to."""
    rows, errors = [], {True: list[float](), False: list[float]()}
    for name, forms in found.items():
        others = kernels(forms for other, forms in found.items() if other != name)
        tables = {own: CostTable.measured("", "", beside, [*grid, *others, *(kernels([forms]) if own else [])])
                  for own in (True, False)}  # fmt: skip
        for form, runs in forms.items():
            measured = statistics.mean(run.microseconds for run in runs)
            cells = []
            for own, table in tables.items():
                ratio = statistics.mean(table.total(run.kernels) for run in runs) / measured
                errors[own].append(abs(ratio - 1.0))
                cells.append(f"{ratio:.2f}x")
            rows.append(f"| {name} | {form} | {measured / 1e3:.3f} | {' | '.join(cells)} |")
    return [*rows, "", *(_summary(own, off) for own, off in errors.items())]


def _summary(own: bool, off: Sequence[float]) -> str:
    which = "With a model's own kernels in the table" if own else "Without them"
    within = sum(error <= 0.15 for error in off)
    return f"{which}, {within} of {len(off)} are within 15 %; half are within {statistics.median(off):.0%}.  "


def write_page(page: Path, table: CostTable, rows: Sequence[str]) -> None:
    """Put the measured part of the page in its place; what stands in front of it is written by hand."""
    kept = page.read_text(encoding="utf-8").partition(MARK)[0] if page.exists() else ""
    head = (f"\n{table.runtime} on {table.processor}: {len(table.capabilities)} patterns, "
            f"{sum(map(len, table.entries.values()))} kernels. Batch 1, one thread.\n\n"
            "| model | form | measured, ms | predicted, its own kernels in the table | without them |\n"
            "|---|---|---|---|---|\n")  # fmt: skip
    page.write_text(kept + MARK + head + "\n".join(rows) + "\n", encoding="utf-8")


def patterns() -> list[Capability]:
    """Return the capabilities of the installed runtime."""
    return list(capabilities.measure())


def main() -> None:
    """Measure what was asked for, all by default, and write table and page."""
    catalog = tomllib.loads((ROOT / "models/catalog.toml").read_text(encoding="utf-8"))
    known = [name for name in catalog if name not in NOT_MODELS]
    parser = argparse.ArgumentParser(description="Measure the cost table and write docs/costs.md.")
    parser.add_argument("names", nargs="*", choices=[*known, []], metavar="NAME", help=f"one of {', '.join(known)}")
    parser.add_argument("--cache", type=Path, help="folder of the fetched models")
    parser.add_argument("--table", type=Path, default=TABLE, help="where the table is written")
    parser.add_argument("--page", type=Path, default=PAGE, help="where the figures are written")
    parser.add_argument("--structure", metavar="PROCESSOR", help="capabilities alone, of a processor of this name")
    options = parser.parse_args()
    if options.structure:
        options.table.write_text(probe.untimed(patterns(), options.structure).to_json(), encoding="utf-8")
        return
    paths = {name: fetch(name, options.cache) for name in options.names or known}
    track, (target, _) = ProgressBars(Console(stderr=True)).track, find_target("cpu")
    beside = probe.time_beside_kernels()
    grid = probe.measure_grid(target, beside, track)
    found = {name: measure(name, *paths[name], beside) for name in track(paths, len(paths), "models")}
    table = CostTable.measured(runtime.name(), here(), beside, [*grid, *kernels(found.values())], patterns())
    options.table.write_text(table.to_json(), encoding="utf-8")
    rows = predictions(found, grid, beside)
    write_page(options.page, table, rows)
    print("\n".join(rows))


if __name__ == "__main__":
    main()
