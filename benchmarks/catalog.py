"""Compile every model of the catalogue with real data and write what came of it to docs/benchmarks.md.

    python benchmarks/catalog.py [NAME ...] [--cache DIR]

Fetches what is not in the cache yet (needs the extra `models`). Latency is the median of interleaved runs of the float
model and the artifact, batch 1, one thread, on the machine that runs this.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from qcompile import Options, QcompileError, compile

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs/benchmarks.md"
NOT_MODELS = ("packages", "committed")
HEAD = """# Benchmarks

Written by `python benchmarks/catalog.py`; do not edit. `--target cpu` with all defaults, on data that calibration did
not see. Operators: those in integers, those in float with weights that are stored as int8, and all. Size and latency:
float's and, behind the arrow, the artifact's over that; medians of interleaved runs, batch 1, one thread; predicted is
what the cost table says of it. SQNR is that of the output that loses most; argmax is how often float and artifact agree
on it, for models that classify.

[peers.md](peers.md) has eleven of them beside what other quantizers make of them, setting by setting, with plots;
[large-models.md](large-models.md) what memory and time a compile takes by the size of its model, from 0.27 to 2.2 GB of
weights, without data and with.

{machine}

| model | nodes → canonical | operators | size, MB | SQNR, dB | argmax | latency, ms | predicted | compile, s |
|---|---|---|---|---|---|---|---|---|
"""


def fetch(name: str, cache: Path | None) -> list[Path]:
    """Return model, calibration and evaluation data of a catalogue model, fetched if need be."""
    words = [sys.executable, str(ROOT / "models/fetch.py"), name, *(["--cache", str(cache)] if cache else [])]
    done = subprocess.run(words, check=True, capture_output=True, text=True)
    return [Path(line) for line in done.stdout.splitlines() if line.strip()]


def row(name: str, paths: Iterable[Path]) -> tuple[str, Mapping[str, Any]]:
    """Compile one model and return its row of the table, and the measurements."""
    model, calibration, evaluation = map(str, paths)
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        result = compile(model, Options("cpu", data=calibration, eval=evaluation, output=Path(folder) / "out"))
        seconds = time.perf_counter() - start
    report, latency = result.report, result.measurements["latency"]
    passes, size, precision = report["passes"], report["size"], report["precision"]
    outputs = report["fidelity"]["outputs"].values()
    ratios = [measures["sqnr"] for measures in outputs if measures["sqnr"] is not None]
    agreements = [measures["top1"] for measures in outputs if measures["top1"] is not None]
    cells = [
        name,
        f"{passes[0]['nodes_before']} → {passes[0]['nodes_after']}",
        f"{precision['integer']} + {precision['weight_only']} of {sum(precision.values())}",
        f"{size['float_bytes'] / 2**20:.2f} → {size['ratio']:.2f}x",
        f"{min(ratios):.1f}" if ratios else "exact",
        f"{min(agreements):.0%}" if agreements else "",
        f"{latency['float_ms']:.2f} → {latency['ratio']:.2f}x",
        f"{report['predicted_latency']['ratio']:.2f}x",
        f"{seconds:.0f}",
    ]
    return f"| {' | '.join(cells)} |", result.measurements


def main() -> None:
    """Measure what was asked for, all by default, and write the page."""
    catalog = tomllib.loads((ROOT / "models/catalog.toml").read_text(encoding="utf-8"))
    known = [name for name in catalog if name not in NOT_MODELS]
    parser = argparse.ArgumentParser(description="Compile the models of the catalogue and write docs/benchmarks.md.")
    parser.add_argument("names", nargs="*", choices=[*known, []], metavar="NAME", help=f"one of {', '.join(known)}")
    parser.add_argument("--cache", type=Path, help="folder of the fetched models")
    options = parser.parse_args()
    rows, machine = [], ""
    for name in options.names or known:
        try:
            line, measurements = row(name, fetch(name, options.cache))
            machine = measurements["processor"]
        except QcompileError as error:
            line = f"| {name} | {error} | | | | | | | |"
        print(line, flush=True)
        rows.append(line)
    PAGE.write_text(HEAD.format(machine=f"Measured on: {machine}.") + "\n".join(rows) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
