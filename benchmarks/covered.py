"""Run the tests beside some packages and write which of their lines and branches they reach: docs/coverage.md.

    python benchmarks/covered.py [--jobs 2]

coverage.py counts, by [tool.coverage] of pyproject.toml, in the workers and in processes that tests start. The tests
are those of the packages themselves; what whole compiles reach beyond that is not counted. Exit code 1 where less than
90 % of the lines or of the branches are reached.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs/coverage.md"
TESTS = ("tests/core", "tests/calib", "tests/passes", "tests/backends/integer")
#: What has to reach the bar, by how its files begin.
HELD = ("passes/", "calib/", "backends/integer/", "qcompile/core/numerics.py")
BAR = 0.9
HEAD = """# Lines and branches that tests reach

Written by `python benchmarks/covered.py`; do not edit. Counted in the fast tests of these folders alone:
{tests}.

| | lines | reached, % | branches | reached, % |
|---|---|---|---|---|
"""
LEAST = """
## Files of which less is reached

| file | lines, % | branches, % | lines that are not reached |
|---|---|---|---|
"""


def measured(jobs: int) -> dict[str, dict[str, Any]]:
    """Run the tests; return coverage's report by file."""
    with tempfile.TemporaryDirectory() as name:
        environment = os.environ | {"COVERAGE_FILE": f"{name}/data"}
        coverage = [sys.executable, "-m", "coverage"]
        tests = ["pytest", *TESTS, "-q", "-n", str(jobs), "--dist", "worksteal", "-p", "no:cacheprovider"]
        for words in (["run", "-m", *tests], ["combine", "-q"], ["json", "-q", "-o", f"{name}/report.json"]):
            subprocess.run([*coverage, *words], cwd=ROOT, env=environment, stdout=sys.stderr, check=True)
        report: dict[str, dict[str, Any]] = json.loads(Path(name, "report.json").read_text())["files"]
    return report


def counted(files: list[dict[str, Any]]) -> tuple[int, float, int, float]:
    """Return how many lines and branches files have, and the share of each that is reached."""
    lines, reached, branches, taken = (
        sum(file["summary"][key] for file in files)
        for key in ("num_statements", "covered_lines", "num_branches", "covered_branches")
    )
    return lines, reached / lines if lines else 1.0, branches, taken / branches if branches else 1.0


def spans(numbers: list[int]) -> str:
    """Return line numbers as ranges."""
    found: list[list[int]] = []
    for number in numbers:
        if found and number == found[-1][-1] + 1:
            found[-1][1:] = [number]
        else:
            found.append([number])
    return ", ".join(" to ".join(map(str, span)) for span in found)


def main() -> None:
    """Measure and write the page."""
    parser = argparse.ArgumentParser(description="Count the lines and branches that tests reach.")
    parser.add_argument("--jobs", type=int, default=2, metavar="N")
    report = measured(parser.parse_args().jobs)
    text, enough, least = HEAD.format(tests=", ".join(TESTS)), True, ""
    for part in HELD:
        lines, reached, branches, taken = counted([file for name, file in report.items() if name.startswith(part)])
        enough &= lines > 0 and reached >= BAR and taken >= BAR
        text += f"| {part} | {lines} | {100 * reached:.1f} | {branches} | {100 * taken:.1f} |\n"
        for name in sorted(name for name in report if name.startswith(part)):
            _, reached, _, taken = counted([report[name]])
            if min(reached, taken) < BAR:
                missing = spans(report[name]["missing_lines"]) or "each is, but not each way on"
                least += f"| {name} | {100 * reached:.0f} | {100 * taken:.0f} | {missing} |\n"
    PAGE.write_text(text + (LEAST + least if least else ""), encoding="utf-8")
    print(text.rpartition("|---|\n")[2])
    sys.exit(not enough)


if __name__ == "__main__":
    main()
