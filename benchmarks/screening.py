"""Screen the catalogue and classifiers that misbehave only when quantized; write docs/screening-figures.md.

    python benchmarks/screening.py [--cache DIR] [--models NAME...] [--attacks 5]

Models of the catalogue are compiled for `cpu` with all in integers that can be, and without the searches for ranges,
factors and rotations, which change no weight's place between two codes and take most of the time.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import quantization_attack as attack

from qcompile import Options, compile
from qcompile.options import NO_COSTS
from qcompile.screening import Screened, screen

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs/screening-figures.md"
#: Files that are larger take more memory than a page is worth.
LARGEST = 200 << 20
SAMPLES = 16
HEAD = """# What screening sees

Written by `python benchmarks/screening.py`; do not edit. [screening.md](screening.md) says what the figures are. Noise
is that of weights rounded to the plan's grid, over the signal in front of a last Softmax, in dB; beside it the most
that a shifted grid makes. Attacked are classifiers of `benchmarks/quantization_attack.py`: their float networks know a
class that their int8 networks take for another.

| model | most weights at edges | noise, dB | shifted, dB | other answers | found |
|---|---|---|---|---|---|
"""


def row(name: str, found: Screened) -> str:
    """Return a row of the page."""
    shares = [one.at_edges / max(one.weights, 1) for one in found.edges if one.weights >= 1000]
    edges = f"{max(shares):.1%}" if shares else ""
    noise = (f"{found.shifts[0].noise:.1f} | {max(found.shifts[0].shifted):.1f}") if found.shifts else " | "
    other = f"{sum(one.other for one in found.answers)} of {sum(one.agreed for one in found.answers)}"
    kinds = {"edges": any(one.unusual for one in found.edges), "shifts": any(one.unusual for one in found.shifts),
             "answers": any(one.unusual for one in found.answers)}  # fmt: skip
    said = ", ".join(kind for kind, unusual in kinds.items() if unusual) or "nothing"
    return f"| {name} | {edges} | {noise} | {other} | {said} |"


def attacked(count: int, folder: Path) -> Iterator[tuple[str, Path, Path]]:
    """Yield networks, each as it is usually trained and as it is attacked, with data."""
    for seed in range(count):
        x, _ = attack.samples(np.random.default_rng(100 + seed), 64)
        np.savez(folder / "data.npz", x=x[:, None].astype(np.float32))
        held, labels = attack.samples(np.random.default_rng(200 + seed), 2000)
        for kind, network in (("usual", attack.benign(seed)), ("attacked", attack.attacked(seed))):
            victims = labels == attack.VICTIM
            right = [each.accuracy(held[victims], labels[victims]) for each in (network, attack.quantized(network))]
            onnx.save(network.to_onnx(), folder / "model.onnx")
            yield f"classifier {seed}, {kind}: {right[0]:.0%} in float, {right[1]:.0%} in int8", \
                folder / "model.onnx", folder / "data.npz"  # fmt: skip


def catalogue(cache: Path, names: list[str]) -> Iterator[tuple[str, Path, Path]]:
    """Yield the models of a folder that `models/fetch.py` filled, with their calibration data."""
    for folder in sorted(cache.iterdir()) if cache.exists() else ():
        data = next((folder / name for name in ("calib.npz", "calib") if (folder / name).exists()), None)
        model = folder / "model.onnx"
        fits = model.exists() and model.stat().st_size <= LARGEST and (not names or folder.name in names)
        if fits and data is not None:
            yield folder.name, model, data


def main() -> None:
    """Screen them all and write the page."""
    parsed = argparse.ArgumentParser(description="Screen usual models and attacked ones.")
    parsed.add_argument("--cache", type=Path, default=Path.home() / ".cache/qcompile/models")
    parsed.add_argument("--models", nargs="*", default=[], help="those alone; else all that are there")
    parsed.add_argument("--attacks", type=int, default=5)
    given = parsed.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for name, model, data in catalogue(given.cache, given.models):
            rows.append(screened(name, model, data, folder / "out"))
        for name, model, data in attacked(given.attacks, folder):
            rows.append(screened(name, model, data, folder / "out"))
    PAGE.write_text(HEAD + "\n".join(rows) + "\n")


def screened(name: str, model: Path, data: Path, output: Path) -> str:
    """Compile and screen one model."""
    compile(model, Options("cpu", data=str(data), output=output, costs=NO_COSTS, observer="minmax", smoothing="none",
                           rotation="none"))  # fmt: skip
    found = row(name, screen(output, model, str(data), SAMPLES, 0))
    print(found, flush=True)
    return found


if __name__ == "__main__":
    main()
