"""Compile every model of the catalogue for `cuda` and `cuda:tensorrt` and write docs/cuda-figures.md.

    python benchmarks/cuda_catalog.py MODELS [NAME ...] --rows ROWS.jsonl [--target TARGET ...] [--data no|yes ...]
                                      [--older ROWS.jsonl ...] [--revision REVISION]

MODELS is a folder with one folder per model: model.onnx, and calib and eval, each as .npz or as a folder. No GPU is
needed: artifacts are verified on the CPU provider. A row is appended to ROWS.jsonl as soon as it is there, and what has
one is not compiled again; the page is written of all of them. Rows of an earlier revision (`--older`) stand in for what
has none then, and are marked.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import tomllib
from pathlib import Path
from typing import Any

from qcompile import Options, QcompileError, compile

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs/cuda-figures.md"
TARGETS = ("cuda", "cuda:tensorrt")
#: What marks rows of an earlier revision.
OLDER = " †"
NOT_MODELS = ("packages", "committed")
HEAD = """# CUDA: figures

Written by `python benchmarks/cuda_catalog.py`; do not edit. [targets/cuda.md](targets/cuda.md) tells what the targets
do. No GPU was there: SQNR is that of the artifact on ONNX Runtime's CPU provider against the float model (of the output
that loses most; of one random input where no data was given), and there are no times. Integers: operators computed on
codes, and those with weights that are codes in the file, of all. Device: nodes that the CUDA provider has kernels for,
by the table of its kernels, and those that it leaves to the host. Products: MatMul and Gemm that read codes of weights
(MatMulNBits). float32: nodes that stay so because float16 does not hold them. Size is over float's. An artifact of
`cuda:tensorrt` that broke one of TensorRT's rules would not have been written.

| model | target | data | integers | device + host | products | float32 | size | SQNR, dB | compile, s |
|---|---|---|---|---|---|---|---|---|---|
"""


def data_of(folder: Path, name: str) -> Path:
    """Return calibration or evaluation data of a model, in whichever form they are."""
    return next(path for path in (folder / f"{name}.npz", folder / name) if path.exists())


def row(folder: Path, target: str, given: bool) -> dict[str, Any]:
    """Compile one model once and return what came of it."""
    entry: dict[str, Any] = {"model": folder.name, "target": target, "data": given}
    data: dict[str, Any] = {}
    if given:
        data = {"data": data_of(folder, "calib"), "eval": data_of(folder, "eval")}
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as out:
        try:
            result = compile(folder / "model.onnx", Options(target, output=Path(out) / "out", **data))
        except QcompileError as error:
            return entry | {"refused": str(error)}
    report = result.report
    placed, precision = report["placement"], report["precision"]
    ratios = [measures["sqnr"] for measures in report["fidelity"]["outputs"].values() if measures["sqnr"] is not None]
    hosts = sorted({f"{one['op_type']}: {one['reason']}" for one in placed["on_host"]})
    return entry | {
        "integer": precision["integer"],
        "weight_only": precision["weight_only"],
        "operators": sum(precision.values()),
        "device": sum(placed["on_device"].values()),
        "host": len(placed["on_host"]),
        "hosts": hosts,
        "products": placed["on_device"].get("MatMulNBits", 0),
        "single": sum(refusal["stage"] == "Halve" for refusal in report["refusals"]),
        "ratio": report["size"]["ratio"],
        "sqnr": min(ratios, default=None),
        "exact": all(measures["exact"] for measures in report["fidelity"]["outputs"].values()),
        "seconds": round(time.perf_counter() - start),
    }


def line(found: dict[str, Any]) -> str:
    """Return a row of the table."""
    name = f"{found['model']}{OLDER if found.get('older') else ''}"
    cells = [name, f"`{found['target']}`", "yes" if found["data"] else "no"]
    if "refused" in found:
        return f"| {' | '.join([*cells, found['refused'].replace('|', '/'), *[''] * 6])} |"
    on_codes = f"{found['integer']} + {found['weight_only']} of {found['operators']}"
    unmeasured = "exact" if found.get("exact") else "not finite"
    sqnr = unmeasured if found["sqnr"] is None else f"{found['sqnr']:.1f}"
    cells += [on_codes, f"{found['device']} + {found['host']}", str(found["products"]), str(found["single"]),
              f"{found['ratio']:.2f}x", sqnr, str(found["seconds"])]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def page(rows: list[dict[str, Any]], revision: str = "") -> str:
    """Return the page."""
    ordered = sorted(rows, key=lambda one: (one["model"], one["target"], one["data"]))
    hosts = sorted({(one["model"], reason) for one in rows for reason in one.get("hosts", ())})
    left = "".join(f"- {model}: {reason}\n" for model, reason in hosts)
    tail = f"\nRows are of revision {revision}.\n" if revision else ""
    tail += "\n†: by an earlier revision of the compiler.\n" if any(one.get("older") for one in rows) else ""
    tail += f"\n## Left to the host\n\n{left}" if left else ""
    if missing := absent(rows):
        tail += f"\n## Not compiled for this page\n\n{missing}"
    return HEAD + "".join(line(one) + "\n" for one in ordered) + tail


def filled(rows: list[dict[str, Any]], older: list[Path]) -> list[dict[str, Any]]:
    """Return rows, and earlier ones for what has none: the first that is there."""
    found = {(one["model"], one["target"], one["data"]): one for one in rows}
    for file in older:
        for one in map(json.loads, file.read_text().splitlines()):
            found.setdefault((one["model"], one["target"], one["data"]), one | {"older": True})
    return list(found.values())


def absent(rows: list[dict[str, Any]]) -> str:
    """Return which models of the catalogue have no row, as a list."""
    catalog = tomllib.loads((ROOT / "models/catalog.toml").read_text(encoding="utf-8"))
    done = {(one["model"], one["target"], one["data"]) for one in rows}
    found = ""
    for target in TARGETS:
        for given in (False, True):
            names = [name for name in sorted(catalog) if name not in NOT_MODELS and (name, target, given) not in done]
            found += f"- `{target}`, {'with' if given else 'without'} data: {', '.join(names)}\n" if names else ""
    return found


def main() -> None:
    """Compile what has no row yet, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--target", action="append", choices=TARGETS)
    parser.add_argument("--data", action="append", choices=("no", "yes"), help="Compile without data, with, or both.")
    parser.add_argument("--older", type=Path, action="append", default=[], help="Rows of an earlier revision.")
    parser.add_argument("--revision", default="", help="The revision that rows are of, for the page.")
    arguments = parser.parse_args()
    arguments.rows.touch()
    rows = [json.loads(text) for text in arguments.rows.read_text().splitlines()]
    names = arguments.names or sorted(
        path.name for path in arguments.models.iterdir() if (path / "model.onnx").is_file()
    )
    for name in names:
        for target in arguments.target or TARGETS:
            for given in [choice == "yes" for choice in arguments.data or ("no", "yes")]:
                if any((one["model"], one["target"], one["data"]) == (name, target, given) for one in rows):
                    continue
                rows.append(row(arguments.models / name, target, given))
                with arguments.rows.open("a") as file:
                    file.write(json.dumps(rows[-1]) + "\n")
                print(line(rows[-1]), flush=True)
    PAGE.write_text(page(filled(rows, arguments.older), arguments.revision), encoding="utf-8")


if __name__ == "__main__":
    main()
