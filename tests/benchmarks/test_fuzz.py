"""A run of the fuzzer that was cut off goes on from its file of results, and counts what stands there."""

from __future__ import annotations

import random
from pathlib import Path

import fuzz
import pytest


def cases(folder, count):
    for index in range(count):
        path = folder / f"damaged-0-{index}.onnx"
        path.write_bytes(b"")
        yield fuzz.Case(path.stem, (str(path),))


@pytest.mark.parametrize("jobs", [1, 3])
def test_a_run_goes_on_where_it_was_cut_off(jobs, monkeypatch, tmp_path):
    ran = []

    def run(server, case):
        ran.append(case.name)
        code = int(case.name.rpartition("-")[2]) % 2
        return fuzz.Ended(code, "error: a: b; c" if code else "", 0.5 + len(ran), 10**6 * len(ran))

    monkeypatch.setattr(fuzz.Server, "run", run)
    kept, models = tmp_path / "kept.jsonl", tmp_path / "models"
    models.mkdir()
    first = fuzz.run_all(cases(models, 4), jobs, None, fuzz.Results(kept))
    assert len(first) == len(ran) == 4
    with kept.open() as file:
        assert len(file.readlines()) == 4
    ended = fuzz.run_all(cases(models, 6), jobs, None, fuzz.Results(kept))
    assert sorted(ran) == [f"damaged-0-{index}" for index in range(6)], "none twice"
    assert fuzz.row("files", ended) == "| 6 files | 3 | 1: 3 | 0 | 6.5 | 6 |\n"
    assert not list(models.iterdir())


def test_what_is_found_is_kept_and_counted(monkeypatch, tmp_path):
    monkeypatch.setattr(fuzz.Server, "run", lambda *_: fuzz.Ended(-1, "Traceback: the process died (-11)", 0.0, 0))
    keep, models = tmp_path / "keep", tmp_path / "models"
    keep.mkdir()
    models.mkdir()
    ended = fuzz.run_all(cases(models, 2), 1, keep, fuzz.Results(None))
    assert fuzz.row("files", ended) == "| 2 files | 0 |  | 2 | 0.0 | 0 |\n"
    assert sorted(path.name for path in keep.iterdir()) == ["damaged-0-0.onnx", "damaged-0-1.onnx"]


@pytest.mark.parametrize(
    ("ended", "found"),
    [
        (fuzz.Ended(0, "", 1.0, 10**9), False),
        (fuzz.Ended(3, "error: x: y; z\n", 1.0, 10**9), False),
        (fuzz.Ended(3, "error: x: y\nand more\n", 1.0, 10**9), True),
        (fuzz.Ended(3, "x: y\n", 1.0, 10**9), True),
        (fuzz.Ended(3, "", 1.0, 10**9), True),
        (fuzz.Ended(0, "Traceback (most recent call last):\n", 1.0, 10**9), True),
        (fuzz.Ended(6, "error: internal error: z\n", 1.0, 10**9), True),
        (fuzz.Ended(0, "", 1.0, fuzz.BYTES + 1), True),
    ],
)
def test_what_counts_as_found(ended, found):
    assert (ended.finding is not None) == found


def test_a_case_depends_on_the_seed_and_its_number_alone(root, tmp_path):
    files = sorted(Path(root, "tests/passes/exports").glob("*.onnx"))[:3]

    def made(count, seed):
        folder = tmp_path / f"{count}-{seed}"
        folder.mkdir()
        return [Path(case.words[0]).read_bytes() for case in fuzz.damaged_cases(count, seed, files, folder)]

    assert made(3, 0) == made(8, 0)[:3]
    assert made(3, 1) != made(4, 0)[:3]
    content = files[0].read_bytes()
    assert fuzz.damaged(content, [], [content], random.Random(1)) != content
