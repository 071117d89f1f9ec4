"""`qcompile compare`: artifacts side by side, each row for itself."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from qcompile.comparison import _KEYS, Latency, Row


@pytest.fixture
def words(small):
    """What every comparison of the small model needs."""
    return "--model", small.model, "--data", small.data


def rows(done) -> dict[str, dict]:
    return {row["output"]: row for row in json.loads(done.out)["rows"]}


def test_an_artifact_stands_beside_float(qcompile, small, small_artifact, words):
    done = qcompile("compare", small_artifact, *words, "--json")
    found = rows(done)
    assert done.code == 0, done.err
    row, reference = found[str(small_artifact)], found[str(small.model)]
    report = json.loads((small_artifact / "report.json").read_text())
    assert row["bytes"] == report["size"]["artifact_bytes"] and row["target"] == "cpu"
    assert row["latency"]["median"] > 0.0 and row["latency"]["p90"] >= row["latency"]["median"]
    assert row["load_ms"] > 0.0 and row["peak_bytes"] > 0 and row["instructions"] is None
    assert reference["target"] == "float" and reference["bytes"] == report["size"]["float_bytes"]
    assert json.loads(done.out)["samples"] == len(small.samples)


def test_fidelity_is_measured_on_the_samples_given(qcompile, small, small_artifact, words):
    whole = rows(qcompile("compare", small_artifact, *words, "--json"))[str(small_artifact)]
    first = rows(qcompile("compare", small_artifact, *words, "--samples", 1, "--json"))[str(small_artifact)]
    assert first["fidelity"]["y"]["sqnr"] != whole["fidelity"]["y"]["sqnr"]
    # What the report says of its held-out samples is what comes out for these.
    held_out = small.feed(x=small.samples[-2:])
    report = json.loads((small_artifact / "report.json").read_text())
    again = rows(qcompile("compare", small_artifact, "--model", small.model, "--data", held_out, "--json"))
    assert report["fidelity"]["samples"] == 2
    assert again[str(small_artifact)]["fidelity"]["y"] == report["fidelity"]["outputs"]["y"]


def test_labels_give_accuracy(qcompile, small, small_artifact):
    data = small.feed(x=small.samples, labels=np.zeros(len(small.samples), np.int64))
    row = rows(qcompile("compare", small_artifact, "--model", small.model, "--data", data, "--json"))
    assert 0.0 <= row[str(small_artifact)]["accuracy"] <= 1.0


def test_what_goes_wrong_with_one_is_said_in_its_row(qcompile, small_artifact, words, tmp_path):
    edited, other = (shutil.copytree(small_artifact, tmp_path / name) for name in ("edited", "other"))
    (edited / "plan.json").write_text("{}")
    content = json.loads((other / "manifest.json").read_text())
    content["files"].pop("report.json")
    (other / "manifest.json").write_text(json.dumps(content))
    report = json.loads((other / "report.json").read_text())
    report["model"]["sha256"] = "0" * 64
    (other / "report.json").write_text(json.dumps(report))
    none = tmp_path / "none"
    done = qcompile("compare", none, small_artifact, edited, other, *words)
    assert done.code == 7 and done.err.count("\n") == 1 and "3 of 4 could not be run" in done.err
    assert (
        "none: has no manifest.json" in done.out and "another model" in done.out and "its checksum differs" in done.out
    )
    seen = rows(qcompile("compare", none, small_artifact, edited, other, *words, "--json"))
    assert seen[str(small_artifact)]["latency"] is not None
    assert [name for name, row in seen.items() if row["failed"]] == [str(none), str(edited), str(other)]


def test_each_comparison_is_a_line_of_the_history(qcompile, small_artifact, words, tmp_path):
    for _ in range(2):
        assert qcompile("compare", small_artifact, *words, "--history", tmp_path / "h.jsonl").code == 0
    lines = [json.loads(line) for line in (tmp_path / "h.jsonl").read_text().splitlines()]
    assert len(lines) == 2 and all(line["at"] and len(line["rows"]) == 2 for line in lines)
    done = qcompile("compare", small_artifact, *words, "--history", tmp_path)
    assert done.code == 2 and "cannot be written" in done.err


@pytest.mark.parametrize(
    ("rank", "order"),
    [("latency", "fast good m0 gone"), ("fidelity", "good m0 fast gone"), ("size", "m0 good fast gone")],
)
def test_rows_are_ranked_by_what_is_asked_for(rank, order):
    fidelity = [{"y": {"sqnr": ratio, "exact": False}} for ratio in (20.0, 40.0, 30.0)]
    found = [
        Row("gone", "", failed=True),
        Row("m0", "cortex-m0plus", 1, fidelity[2], instructions=100),
        Row("good", "cpu", 2, fidelity[1], latency=Latency(2.0, 3.0)),
        Row("fast", "cpu:tvm", 3, fidelity[0], latency=Latency(1.0, 9.0)),
    ]
    assert [row.output for row in sorted(found, key=_KEYS[rank])] == order.split()


def test_an_exact_output_has_no_least_ratio():
    assert Row("a", "cpu", fidelity={"y": {"sqnr": None, "exact": True}}).decibels == float("inf")
    assert Row("a", "cpu", fidelity={"y": {"sqnr": None, "exact": False}}).decibels == float("-inf")


@pytest.mark.parametrize(
    ("change", "code"),
    [({"--model": "none.onnx"}, 3), ({"--data": "none.npz"}, 4), ({"--samples": 0}, 2), ({"--rank": "price"}, 2)],
)
def test_without_model_or_data_nothing_is_compared(qcompile, small, small_artifact, change, code):
    words = {"--model": small.model, "--data": small.data} | change
    done = qcompile("compare", small_artifact, *(word for pair in words.items() for word in pair))
    assert done.code == code and done.err.count("\n") == 1 and not done.out


@pytest.mark.skipif(
    any(shutil.which(tool) is None for tool in ("gcc", "arm-none-eabi-gcc", "qemu-system-arm")),
    reason="a compiler or the emulator is not installed",
)
def test_a_microcontroller_has_instructions_and_no_time(qcompile, small, words, tmp_path):
    output = tmp_path / "m4"
    assert qcompile(small.model, "--target", "cortex-m4", "--data", small.data, "-o", output, "--quiet").code == 0
    done = qcompile("compare", output, *words, "--json")
    row = rows(done)[str(output)]
    assert done.code == 0 and row["instructions"] > 1000 and row["latency"] is None and row["peak_bytes"] is None
