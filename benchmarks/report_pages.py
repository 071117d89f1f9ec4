"""Compile three models and take pictures of report.html, at a desktop's width and a phone's; write docs/report.md.

    python benchmarks/report_pages.py [--cache DIR] [--keep DIR]

It needs chromium and pillow. With `--keep`, artifacts that are there already are taken as they are.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from catalog import ROOT, fetch
from PIL import Image

PAGE, PICTURES = ROOT / "docs/report.md", ROOT / "docs/report"
#: Each model, and what its compile is asked for beside its data.
MODELS = {
    "minilm-l6": (),
    "efficientnet-lite0": ("--weights", "mixed", "--max-size", "0.2x"),
    "resnet8": ("--pareto",),
}
#: By name, width and height of the window, and whether it prefers dark pages.
WINDOWS = {"desktop": (1280, 2300, False), "phone": (390, 2300, True)}
#: A window of a browser has at least this width: a narrower page is shown in a frame.
LEAST = 500
HEAD = """# The report, to look at

Written by `python benchmarks/report_pages.py`; do not edit.

`report.html` stands beside each artifact: one file that opens offline, in light and dark, on a desktop and on a phone,
and loads nothing. It has the figures; what is other than in the artifact that it took the place of; the graph, coloured
by precision or by what is lost, each operator saying what became of it when touched; SQNR by layer; bits by weight;
how values are distributed and what their range leaves out (`distributions.json`); the Pareto front where `--pareto` was
given; bytes by cause; what was left alone or in float, and why. Charts are drawn by [Chart.js](https://www.chartjs.org)
(MIT), which the page carries, from `report.json`, `measurements.json` and the others, which it carries as well: a test
holds every number in it to those files, and a browser to saying nothing on its console.

The phone's pictures are of a browser that prefers dark pages.
"""


def main() -> None:
    """Write the pictures and the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--keep", type=Path)
    given = parser.parse_args()
    PICTURES.mkdir(exist_ok=True)
    parts = [HEAD]
    with tempfile.TemporaryDirectory() as scratch:
        for name, words in MODELS.items():
            output = (given.keep or Path(scratch)) / name
            if not (output / "report.html").exists():
                compile_model(fetch(name, given.cache), output, words)
            size = (output / "report.html").stat().st_size
            parts.append(f"\n## {name}\n\nThe page has {size / 1000:.0f} KB.\n")
            for window, (width, height, dark) in WINDOWS.items():
                take(output / "report.html", (width, height), dark, PICTURES / f"{name}-{window}.png")
                parts.append(f"\n![{name}, {window}](report/{name}-{window}.png)\n")
    PAGE.write_text("".join(parts), encoding="utf-8")


def compile_model(paths: Sequence[Path], output: Path, words: Sequence[str]) -> None:
    """Compile a model of the catalog with its calibration and evaluation data."""
    model, calibration, evaluation = map(str, paths)
    given = [model, "--data", calibration, "--eval", evaluation, *words]
    command = ["-m", "qcompile", *given, "--target", "cpu", "-q", "-o", str(output)]
    subprocess.run([sys.executable, *command], check=True)


def take(page: Path, size: tuple[int, int], dark: bool, picture: Path) -> None:
    """Take a picture of a page, in few colours so that it is small."""
    width, height = size
    with tempfile.TemporaryDirectory() as scratch:
        shown, taken = Path(scratch) / "shown.html", Path(scratch) / "taken.png"
        frame = f'<body style="margin:0"><iframe src="{page.resolve().as_uri()}" style="border:0" '
        shown.write_text(f'{frame} width="{width}" height="{height}"></iframe>')
        flags = ["--force-dark-mode"] if dark else []
        command = [
            "chromium", "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", *flags,
            f"--user-data-dir={scratch}/profile", f"--window-size={max(width, LEAST)},{height}",
            "--virtual-time-budget=5000", f"--screenshot={taken}", shown.as_uri(),
        ]  # fmt: skip
        subprocess.run(command, check=True, capture_output=True)
        seen = Image.open(taken).convert("RGB").crop((0, 0, width, height))
        seen.quantize(64, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(picture, optimize=True)


if __name__ == "__main__":
    main()
