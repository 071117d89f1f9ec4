"""Plant bugs into passes, one at a time; write which of them a compile notices to docs/planted-bugs.md.

    python benchmarks/planted_bugs.py [--only TEXT] [--jobs 2]

A bug is a change of a function's source, in memory: the changed text is compiled and takes the place of the function's
code, and it counts what runs it, for a bug that nothing runs proves nothing. A whole compile follows. It has to end in
exit code 6, which is that of verification; or to leave the pass out, say why, and write what it writes without that
pass. Anything else is a silent error. Without a bug each model compiles, with the pass doing its work.

Bugs of a pass that a search tries beforehand are planted while the pass is applied: the search would see that what it
tries is of no use, and verification would have nothing to find.
"""

from __future__ import annotations
import __future__

import argparse
import builtins
import contextlib
import importlib
import inspect
import tempfile
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

import numpy as np
import onnx
from planted_list import BUGS, Bug
from planted_models import SUBJECTS, Subject

from qcompile import Options, compile, equivalence, pipeline
from qcompile.compensation import USELESS, VAIN
from qcompile.core.errors import QcompileError
from qcompile.equivalence import Equivalences
from qcompile.options import NO_COSTS

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs/planted-bugs.md"
#: Annotations stay text, as in the modules that functions are of.
FUTURE = __future__.annotations.compiler_flag
#: Exit code of a verification that failed.
FAILED = 6
HEAD = """# Planted bugs

Written by `python benchmarks/planted_bugs.py`; do not edit. Each row is a compile with one bug in it: a line of a pass,
changed in memory, and run at least once by that compile. Caught is what ends with exit code 6 before anything is
written, or what leaves the pass out and says so. Unit tests have no part in it: this is what a user's own compile
notices. The models are small ones of `benchmarks/planted_models.py`, in which each pass has work to do.

**{caught} of {count} caught ({rate:.0%}).**

| pass | bug | model | how it was caught |
|---|---|---|---|
"""


@dataclass(frozen=True)
class Outcome:
    """What became of a compile.

    Parameters
    ----------
    runs : int
        How often the planted code ran.
    code : int
        Exit code.
    said : str
        What the error said.
    declined : mapping of str to str
        Passes that were left out, and why.
    applied : tuple of str
        Passes that were applied, or left out.
    """

    runs: int
    code: int
    said: str
    declined: dict[str, str]
    applied: tuple[str, ...]

    def caught(self, bug: Bug) -> str:
        """Return how the bug was caught, or nothing."""
        if not self.runs:
            return ""
        if self.code == FAILED:
            return self.said
        return f"left out: {self.declined[bug.stage]}" if self.code == 0 and bug.stage in self.declined else ""


def function_of(place: str) -> FunctionType:
    """Return the function at ``module:name``."""
    module, _, name = place.partition(":")
    found: Any = importlib.import_module(module)
    for part in name.split("."):
        found = inspect.getattr_static(found, part)
    found = getattr(found, "__func__", getattr(found, "func", found))
    assert isinstance(found, FunctionType), place
    return found


@contextlib.contextmanager
def planted(bug: Bug) -> Iterator[list[int]]:
    """Change a function's code for a while; yield a list with how often the change ran."""
    function, runs = function_of(bug.place), [0]
    source = textwrap.dedent(inspect.getsource(function))
    if source.count(bug.old) != 1:
        raise ValueError(f"{bug.place} has {source.count(bug.old)} times: {bug.old}")

    def count(value: Any) -> Any:
        runs[0] += 1
        return value

    # The flags of the function's own module: its annotations stay text.
    text, flags = source.replace(bug.old, bug.new), FUTURE
    module = builtins.compile(text, function.__code__.co_filename, "exec", flags, dont_inherit=True)
    before, function.__globals__["planted"] = function.__code__, count
    function.__code__ = code_named(module, function.__name__)
    try:
        yield runs
    finally:
        function.__code__ = before
        del function.__globals__["planted"]


def code_named(module: CodeType, name: str) -> CodeType:
    """Return the code of a module's function."""
    return next(code for code in module.co_consts if isinstance(code, CodeType) and code.co_name == name)


@contextlib.contextmanager
def while_applied(bug: Bug) -> Iterator[list[int]]:
    """Plant a bug while the pipeline runs one pass, and at no other time."""
    original, total = pipeline.Pipeline._run, [0]

    def run(self: pipeline.Pipeline, name: str, *given: Any) -> Any:
        if name != bug.stage:
            return original(self, name, *given)
        with planted(bug) as runs:
            try:
                return original(self, name, *given)
            finally:
                total[0] += runs[0]

    pipeline.Pipeline._run = run  # type: ignore[assignment, method-assign]
    try:
        yield total
    finally:
        pipeline.Pipeline._run = original  # type: ignore[method-assign]


@contextlib.contextmanager
def choosing(chosen: Callable[[Any], Equivalences] | None) -> Iterator[None]:
    """Let the search for equivalences find what is given."""
    original = equivalence._Search.run

    def run(self: Any) -> Equivalences:
        return Equivalences() if chosen is None else chosen(self.model)

    equivalence._Search.run = run  # type: ignore[method-assign]
    try:
        yield
    finally:
        equivalence._Search.run = original  # type: ignore[method-assign]


@cache
def subject(name: str) -> Subject:
    """Return a model by its name."""
    return SUBJECTS[name]()


def compiled(name: str, bug: Bug | None = None) -> Outcome:
    """Compile a model, with a bug or without."""
    of = subject(name)
    with tempfile.TemporaryDirectory() as place, choosing(of.equivalences), contextlib.ExitStack() as stack:
        folder, runs = Path(place), [0]
        onnx.save(of.proto, folder / "model.onnx")
        data = {key: array.astype(np.float32) if array.dtype == np.float64 else array for key, array in of.data.items()}
        np.savez(folder / "data.npz", **data)  # type: ignore[arg-type]
        options = Options(data=str(folder / "data.npz"), output=folder / "out", observer="minmax",
                          **{"costs": NO_COSTS, **of.options})  # fmt: skip
        if bug is not None:
            runs = stack.enter_context(while_applied(bug) if bug.applied else planted(bug))
        try:
            result = compile(folder / "model.onnx", options)
        except QcompileError as error:
            return Outcome(runs[0], error.exit_code, str(error), {}, ())
        except Exception as error:  # a pass that raises is noticed, but not by verification
            return Outcome(runs[0], 1, f"{type(error).__name__}: {error}", {}, ())
        steps = result.report["passes"]
        unchanged = {step["name"] for step in steps if step["nodes_before"] == step["nodes_after"]}
        declined = {each["stage"]: each["reason"] for each in result.report["refusals"]
                    if each["reason"] in (*USELESS.values(), VAIN)}  # fmt: skip
        return Outcome(runs[0], 0, "", {stage: why for stage, why in declined.items() if stage in unchanged},
                       tuple(step["name"] for step in steps))  # fmt: skip


def tried(bug: Bug) -> Outcome:
    """Compile with a bug."""
    return compiled(bug.model, bug)


def row(bug: Bug, outcome: Outcome) -> str:
    """Return a row of the page."""
    missed = f"**not caught**: exit code {outcome.code} {outcome.said}" if outcome.runs else "**not run**"
    how = (outcome.caught(bug) or missed).replace("|", "¦").removesuffix("; report it with the model")
    return f"| {bug.stage} | {bug.what} | {bug.model} | {how} |"


def main() -> None:
    """Try all bugs and write the page."""
    parsed = argparse.ArgumentParser(description="Plant bugs and see whether a compile notices.")
    parsed.add_argument("--only", default="", help="bugs whose row holds this text; nothing is written then")
    parsed.add_argument("--jobs", type=int, default=2)
    given = parsed.parse_args()
    wanted = [bug for bug in BUGS if given.only in f"{bug.stage} {bug.what} {bug.model}"]
    with get_context("spawn").Pool(given.jobs) as pool:
        outcomes = []
        for bug, outcome in zip(wanted, pool.imap(tried, wanted), strict=True):
            print(row(bug, outcome), flush=True)
            outcomes.append(outcome)
    rows = [row(bug, outcome) for bug, outcome in zip(wanted, outcomes, strict=True)]
    caught = sum(bool(outcome.caught(bug)) for bug, outcome in zip(wanted, outcomes, strict=True))
    print(f"{caught} of {len(wanted)}")
    if not given.only:
        head = HEAD.format(caught=caught, count=len(wanted), rate=caught / len(wanted))
        PAGE.write_text(head + "\n".join(rows) + "\n")


if __name__ == "__main__":
    main()
