"""Change numerics.py and insert_qdq.py in one place at a time and count what their tests notice: docs/mutation.md.

    python benchmarks/mutation.py [--jobs 2] [--folder DIR]

mutmut makes the changes and runs the tests that pyproject.toml names under [tool.mutmut], in a copy of what git tracks
here. A mutant is killed if a test fails or hangs. Why the others survive stands in mutation_survivors.toml, by what
their line has become; one without a reason is a test that is missing. Exit code 1 where less than 85 % are killed.

In a --folder that an earlier run left, mutants of functions that are as they were are not run again: after a change of
tests, take a new one.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs/mutation.md"
REASONS = Path(__file__).with_name("mutation_survivors.toml")
#: Of all mutants of a file.
BAR = 0.85
#: What mutmut records of a mutant: pytest's exit code, or that of a process that ran out of time.
KILLED, SURVIVED = frozenset({1, 3}), 0
TIMED_OUT = frozenset({-24, 24, 36, 152, 255})
HEAD = """# What the tests of numerics.py and insert_qdq.py notice

Written by `python benchmarks/mutation.py`; do not edit. Each mutant is the file with one place changed: a constant, an
operator, an argument, a condition. A test that fails, or does not end, kills it.

| file | mutants | killed | of these, by time | survived | killed, % |
|---|---|---|---|---|---|
"""
SURVIVORS = """
## What survived, and why

| where | the line | became | why no test fails |
|---|---|---|---|
"""


@dataclass(frozen=True)
class Survivor:
    """A mutant that no test notices: the function it is in, and its line before and after."""

    function: str
    before: str
    after: str


def settings() -> dict[str, list[str]]:
    """Return what pyproject.toml tells mutmut."""
    table: dict[str, list[str]] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["mutmut"]
    return table


def copy_tracked(folder: Path) -> None:
    """Copy what git tracks, links as links."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in filter(None, listed.split("\0")):
        if os.path.lexists(ROOT / name):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).unlink(missing_ok=True)
            shutil.copy2(ROOT / name, folder / name, follow_symlinks=False)


def mutated(folder: Path, jobs: int) -> None:
    """Run mutmut there; its progress goes to the standard error output."""
    # Which tests reach which function is found anew: an earlier run does not know of functions that came since.
    (folder / "mutants/mutmut-stats.json").unlink(missing_ok=True)
    # An installation of this repository must not come before the mutants.
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}

    def run(*more: str) -> None:
        words = [sys.executable, "-m", "mutmut", "run", "--max-children", *more]
        subprocess.run(words, cwd=folder, env=environment, stdout=sys.stderr, check=True)

    run(str(jobs))
    # On a busy machine time runs out for tests that would have ended: those are run again, one by one.
    found = [item for file in settings()["only_mutate"] for item in outcomes(folder, file).items()]
    if late := [name for name, code in found if code in TIMED_OUT]:
        run("1", *late)


def survivor(folder: Path, name: str) -> Survivor:
    """Return where a mutant is, and what became of which lines."""
    words = [sys.executable, "-m", "mutmut", "show", name]
    shown = subprocess.run(words, cwd=folder, check=True, capture_output=True, text=True).stdout.splitlines()

    def lines(sign: str) -> str:
        return " ".join(line[1:].strip() for line in shown if line[:1] == sign and line[:3] != sign * 3)

    function = name.rpartition("__mutmut_")[0].rpartition(".")[2]
    return Survivor(function.removeprefix("x_").replace("ǁ", ".").removeprefix("x."), lines("-"), lines("+"))


def outcomes(folder: Path, file: str) -> dict[str, int]:
    """Return the exit code of each mutant of a file."""
    found: dict[str, int] = json.loads((folder / "mutants" / f"{file}.meta").read_text())["exit_code_by_key"]
    if odd := {name: code for name, code in found.items() if code not in {*KILLED, *TIMED_OUT, SURVIVED}}:
        raise SystemExit(f"mutation: {len(odd)} mutants were not judged, among them {next(iter(odd.items()))}")
    return found


def reasons() -> dict[tuple[str, str], str]:
    """Return why mutants survive, by function and what the line became."""
    entries = tomllib.loads(REASONS.read_text(encoding="utf-8"))["survivor"]
    return {(entry["function"], after): entry["reason"] for entry in entries for after in entry["becomes"]}


def rows(survivors: list[Survivor]) -> Iterator[str]:
    """Return the lines of the second table."""
    known = reasons()
    for one in survivors:
        reason = known.get((one.function, one.after), "not known: a test is missing")
        before, after = (text.replace("|", "\\|") for text in (one.before, one.after))
        yield f"| {one.function} | `{before}` | `{after}` | {reason} |"
    for function, after in sorted(set(known) - {(one.function, one.after) for one in survivors}):
        print(f"mutation: {REASONS.name}: '{after}' of {function} is killed by now; take it out", file=sys.stderr)


def page(folder: Path) -> tuple[str, bool]:
    """Return the page about a finished run, and whether enough is killed."""
    text, survivors, enough = HEAD, [], True
    for file in settings()["only_mutate"]:
        codes = outcomes(folder, file)
        survivors += [survivor(folder, mutant) for mutant, code in codes.items() if code == SURVIVED]
        count = Counter(codes.values())
        slow = sum(count[code] for code in TIMED_OUT)
        killed = slow + sum(count[code] for code in KILLED)
        enough &= killed >= BAR * len(codes)
        figures = (file.replace("qcompile/passes", "passes"), len(codes), killed, slow, count[SURVIVED])
        text += f"| {' | '.join(map(str, figures))} | {100 * killed / len(codes):.1f} |\n"
    return text + SURVIVORS + "\n".join(rows(survivors)) + "\n", enough


def main() -> None:
    """Mutate, count, write the page."""
    parser = argparse.ArgumentParser(description="Count the changes that tests notice.")
    parser.add_argument("--jobs", type=int, default=2, metavar="N")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="where the copy is to lie, and stay")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = options.folder or Path(name)
        copy_tracked(folder)
        mutated(folder, options.jobs)
        text, enough = page(folder)
    PAGE.write_text(text, encoding="utf-8")
    print(text.partition(SURVIVORS)[0].rpartition("|---|\n")[2])
    sys.exit(not enough)


if __name__ == "__main__":
    main()
