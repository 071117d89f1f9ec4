"""`qcompile check`: an artifact beside the report of an earlier one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from math import inf, nan
from typing import Any

import pytest

from qcompile.regression import Figure


@pytest.fixture
def compiled(small_artifact, tmp_path):
    """An artifact, and a copy of its report as it was committed."""
    output, report = tmp_path / "out", tmp_path / "committed.json"
    shutil.copytree(small_artifact, output)
    shutil.copy(output / "report.json", report)
    return output, report


def edit(report, change: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads(report.read_text())
    change(content)
    report.write_text(json.dumps(content))


def smaller(part: float) -> Callable[[dict[str, Any]], None]:
    return lambda content: content["size"].update(artifact_bytes=round(content["size"]["artifact_bytes"] * part))


def more_faithful(decibels: float) -> Callable[[dict[str, Any]], None]:
    def change(content: dict[str, Any]) -> None:
        content["fidelity"]["outputs"]["y"]["sqnr"] += decibels

    return change


def test_what_did_not_change_passes(qcompile, compiled):
    output, report = compiled
    for against in (report, output):
        done = qcompile("check", output, "--against", against)
        assert done.code == 0 and "size" in done.out and "too much" not in done.out and "note" not in done.out, done


@pytest.mark.parametrize(
    ("change", "allowed", "what"),
    [
        (smaller(0.95), "2%", "size"),
        (smaller(0.99), "2%", None),
        (smaller(0.95), "0.1", None),
        (smaller(1.2), "0%", None),
        (more_faithful(4.0), "2%", "SQNR of y"),
        (more_faithful(0.01), "2%", None),
        (more_faithful(-4.0), "0%", None),
        (lambda content: content["fidelity"]["outputs"]["y"].update(exact=True, sqnr=None), "50%", "SQNR of y"),
    ],
)
def test_what_got_worse_by_more_than_allowed_is_named(qcompile, compiled, change, allowed, what):
    output, report = compiled
    edit(report, change)
    done = qcompile("check", output, "--against", report, "--max-regression", allowed)
    seen = qcompile("check", output, "--against", report, "--max-regression", allowed, "--json")
    worse = [figure["name"] for figure in json.loads(seen.out)["figures"] if figure["too_much"]]
    assert worse == ([what] if what else [])
    assert done.code == seen.code == (5 if what else 0)
    assert (f": {what} " in done.err) if what else not done.err
    assert done.err.count("\n") == bool(what)


def test_predicted_latency_counts(qcompile, resnet8, tmp_path):
    model, calibration, evaluation = resnet8
    words = (model, "--target", "cpu", "--data", calibration, "--eval", evaluation, "--observer", "minmax")
    words = (*words, "--smoothing", "none", "--rotation", "none", "-o", tmp_path / "out", "--quiet")
    assert qcompile(*words, costs=None).code == 0
    shutil.copy(tmp_path / "out/report.json", tmp_path / "committed.json")
    edit(tmp_path / "committed.json", lambda content: content["predicted_latency"].update(artifact_us=1.0))
    done = qcompile("check", tmp_path / "out", "--against", tmp_path / "committed.json")
    assert done.code == 5 and "predicted latency" in done.err and "was 1 us" in done.err


def test_what_makes_figures_hard_to_compare_is_said_first(qcompile, compiled):
    output, report = compiled

    def change(content: dict[str, Any]) -> None:
        content["data"]["sha256"] = "0" * 64
        content["model"]["sha256"] = "0" * 64
        content["versions"]["numpy"] = "1.0"

    edit(report, change)
    done = qcompile("check", output, "--against", report)
    assert done.code == 0
    notes = done.out[: done.out.index("earlier report")]
    assert "another one" in notes and "measured on something else" in notes and "numpy 1.0 ->" in notes


@pytest.mark.parametrize(
    ("change", "fact"),
    [
        (lambda content: content.update(target="cuda"), "is of target cuda"),
        (lambda content: content["fidelity"]["outputs"].update(z={}), "has no output 'z'"),
        (lambda content: content.update(schema_version=0), "has schema version 0"),
        (lambda content: content.pop("fidelity"), "is no report of a compile"),
    ],
)
def test_reports_that_cannot_be_compared_are_refused(qcompile, compiled, change, fact):
    output, report = compiled
    edit(report, change)
    done = qcompile("check", output, "--against", report)
    assert done.code == 2 and fact in done.err and done.err.count("\n") == 1 and not done.out


def test_a_folder_that_was_edited_is_refused(qcompile, compiled):
    output, report = compiled
    (output / "plan.json").write_text((output / "plan.json").read_text() + "\n")
    done = qcompile("check", output, "--against", report)
    assert done.code == 2 and "plan.json: is not what the compile wrote" in done.err
    (output / "plan.json").unlink()
    assert "is missing" in qcompile("check", output, "--against", report).err
    assert "no manifest.json that can be read" in qcompile("check", report.parent, "--against", report).err


def test_a_report_that_there_is_not_is_refused(qcompile, compiled):
    output, report = compiled
    assert "cannot be read" in qcompile("check", output, "--against", report.parent / "none.json").err
    report.write_text(report.read_text()[:100])
    assert "is no JSON" in qcompile("check", output, "--against", report).err


@pytest.mark.parametrize("part", ["two", "-1%", "100%", "nan"])
def test_a_regression_is_a_part(qcompile, compiled, part):
    output, report = compiled
    done = qcompile("check", output, "--against", report, f"--max-regression={part}")
    assert done.code == 2 and "is no part of a figure" in done.err


@pytest.mark.parametrize(
    ("before", "now", "grows", "worse_by"),
    [
        (100.0, 110.0, True, 0.1),
        (100.0, 110.0, False, -0.1),
        (40.0, 30.0, False, 0.25),
        (-2.0, -3.0, False, 0.5),
        (inf, inf, False, 0.0),
        (inf, 40.0, False, inf),
        (40.0, nan, False, inf),
        (nan, 40.0, False, 0.0),
        (0.0, 0.5, False, -inf),
        (0.0, 1.0, True, inf),
        (0.0, -3.0, False, inf),
        (0.0, nan, False, inf),
    ],
)
def test_by_what_part_a_figure_is_worse(before, now, grows, worse_by):
    assert Figure("name", "", before, now, grows).worse_by == pytest.approx(worse_by)


def test_a_screening_wants_the_float_model_and_a_file_of_its_own(qcompile, compiled, small, tmp_path):
    output, _ = compiled
    for wrong in ((), ("--screen",), ("--reround", tmp_path / "anew.onnx")):
        assert qcompile("check", output, *wrong).code == 2
    done = qcompile("check", output, "--model", small.model, "--reround", small.model)
    assert done.code == 2 and "name another file" in done.err
    done = qcompile("check", output, "--model", small.model, "--reround", output / "anew.onnx")
    assert done.code == 2 and "lies in an artifact" in done.err
    assert not (output / "anew.onnx").exists()
