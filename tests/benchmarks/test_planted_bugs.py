"""Planted bugs end a compile; without them each model compiles, and the pass that has them does its work there."""

from __future__ import annotations

import shutil
from collections.abc import Iterable

import planted_bugs
import pytest
from planted_list import BUGS, Bug
from planted_models import SUBJECTS

#: What the page counts as passes and the pipeline does not.
STAGES = ("allocate bits", "lower, CUDA", "lower, ONNX Runtime", "lower, microcontroller")
C_COMPILERS = ("cc", "arm-none-eabi-gcc")


def marked(bugs: Iterable[Bug]) -> list[object]:
    """Return one bug of each pass and model for the default run, the others marked slow."""
    seen, found = set(), []
    for bug in bugs:
        marks = [pytest.mark.slow] if (bug.stage, bug.model) in seen else []
        seen.add((bug.stage, bug.model))
        found.append(pytest.param(bug, id=f"{bug.stage}: {bug.what}", marks=marks))
    return found


def require_compilers(model: str) -> None:
    missing = [name for name in C_COMPILERS if not shutil.which(name)]
    if model == "sensor" and missing:
        pytest.skip(f"needs {missing[0]}")


@pytest.mark.parametrize("bug", marked(BUGS))
def test_a_compile_notices(bug: Bug) -> None:
    require_compilers(bug.model)
    outcome = planted_bugs.tried(bug)
    assert outcome.runs > 0, "what nothing runs proves nothing"
    assert outcome.caught(bug), outcome


@pytest.mark.parametrize("model", SUBJECTS)
def test_without_a_bug_it_compiles(model: str) -> None:
    require_compilers(model)
    outcome = planted_bugs.compiled(model)
    assert outcome.code == 0, outcome.said
    stages = {bug.stage for bug in BUGS if bug.model == model} - set(STAGES)
    assert stages <= set(outcome.applied)
    assert not stages & set(outcome.declined), "what is left out anyway cannot be caught by leaving it out"


def test_a_bug_is_gone_when_it_was_tried() -> None:
    bug = next(bug for bug in BUGS if bug.model == "post-norm")
    function = planted_bugs.function_of(bug.place)
    before = function.__code__
    with planted_bugs.planted(bug):
        assert function.__code__ is not before
    assert function.__code__ is before and "planted" not in function.__globals__


def test_there_are_forty_and_no_two_alike() -> None:
    assert len(BUGS) >= 40 and len({(bug.stage, bug.what) for bug in BUGS}) == len(BUGS)
    assert {"Canonicalize", "Rotate", "RotateInputs", "Smooth", "Split", "InsertQdq", "RoundWeights", "CorrectBias",
            "Halve", *STAGES} == {bug.stage for bug in BUGS}  # fmt: skip
