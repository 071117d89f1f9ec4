"""Compile models of the catalogue for phones and write what came of it to docs/targets/phones.md.

    python benchmarks/phones.py [NAME ...] [--kept DIR] [--cache DIR] [--no-compile]

With `--kept`, artifacts stay there, and those that are there are not made again; `--no-compile` tells of these alone.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import tomllib
from collections import Counter
from pathlib import Path

from catalog import NOT_MODELS, ROOT, fetch

from qcompile import Options, QcompileError, compile

PAGE = ROOT / "docs/targets/phones.md"
MARK = "<!-- written by benchmarks/phones.py from here on -->\n"
TARGETS = ("qnn", "xnnpack", "coreml", "aarch64-android:ort")
HEAD = """
With all defaults, on data that calibration did not see, by the CPU's provider. SQNR is that of the output that loses
most; size is over float's; what the device takes is by its documented rules, and what it does not is counted by reason.
A model that is missing for a target was not compiled for it.

| model | target | SQNR, dB | size | device takes | refused, and why |
|---|---|---|---|---|---|
"""


def row(name: str, target: str, output: Path, cache: Path | None) -> str:
    """Return one row of the table; the artifact is made where it is not there yet."""
    refused = output.with_name(f"{output.name}.refused")
    try:
        if refused.is_file():
            return f"| {name} | `{target}` | | | | {refused.read_text(encoding='utf-8').strip()} |"
        if not (output / "report.json").is_file():
            model, calibration, evaluation = map(str, fetch(name, cache))
            compile(model, Options(target, data=calibration, eval=evaluation, output=output))
    except QcompileError as error:
        refused.write_text(str(error).replace("|", "/"), encoding="utf-8")
        return row(name, target, output, cache)
    report = json.loads((output / "report.json").read_text(encoding="utf-8"))
    ratios = [one["sqnr"] for one in report["fidelity"]["outputs"].values() if one["sqnr"] is not None]
    taken, host = "", []
    if (placement := report.get("placement")) is not None:
        host = [f"{one['op_type']}: {one['reason']}" for one in placement["on_host"]]
        count = sum(placement["on_device"].values())
        taken = f"{count} of {count + len(host)}"
    else:
        host = [one["reason"] for one in report["refusals"] if one["stage"] == "backend"]
    reasons = Counter(_general(reason) for reason in host)
    said = "; ".join(
        f"{count} {reason}" for reason, count in sorted(reasons.items(), key=lambda one: (-one[1], one[0]))
    )
    worst = f"{min(ratios):.1f}" if ratios else "exact"
    return f"| {name} | `{target}` | {worst} | {report['size']['ratio']:.2f}x | {taken} | {said} |"


def _general(reason: str) -> str:
    """Return a reason without the names of values."""
    return "'…'".join(reason.split("'")[::2]).replace("|", "/")


def main() -> None:
    """Compile what was asked for, all by default, and write the table."""
    catalog = tomllib.loads((ROOT / "models/catalog.toml").read_text(encoding="utf-8"))
    known = [name for name in catalog if name not in NOT_MODELS]
    parser = argparse.ArgumentParser(description="Compile the models of the catalogue for phones.")
    parser.add_argument("names", nargs="*", choices=[*known, []], metavar="NAME", help=f"one of {', '.join(known)}")
    parser.add_argument("--kept", type=Path, help="folder of artifacts")
    parser.add_argument("--cache", type=Path, help="folder of the fetched models")
    parser.add_argument("--no-compile", action="store_true", help="tell of what is kept alone")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for name in options.names or known:
            for target in TARGETS:
                output = (options.kept or Path(scratch)) / f"{name}-{target.replace(':', '_')}"
                made = (output / "report.json").is_file() or output.with_name(f"{output.name}.refused").is_file()
                if options.no_compile and not made:
                    continue
                rows.append(row(name, target, output, options.cache))
                print(rows[-1], flush=True)
    text = PAGE.read_text(encoding="utf-8").partition(MARK)[0]
    PAGE.write_text(text + MARK + HEAD + "\n".join(rows) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
