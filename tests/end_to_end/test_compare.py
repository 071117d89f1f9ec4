"""`qcompile compare`: artifacts side by side, each row for itself."""

from __future__ import annotations

import json
import shutil
import stat
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest

from qcompile import bundle, runner
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
    assert reference["sqnr"] is None and json.loads(done.out)["device"] == "local"
    assert reference["target"] == "float" and reference["bytes"] == report["size"]["float_bytes"]
    assert json.loads(done.out)["samples"] == len(small.samples)


def test_fidelity_is_measured_on_the_samples_given(qcompile, small, small_artifact, words):
    whole = rows(qcompile("compare", small_artifact, *words, "--json"))[str(small_artifact)]
    first = rows(qcompile("compare", small_artifact, *words, "--samples", 1, "--json"))[str(small_artifact)]
    assert first["sqnr"]["y"] != whole["sqnr"]["y"]
    # What the report says of its held-out samples is what comes out for these.
    held_out = small.feed(x=small.samples[-2:])
    report = json.loads((small_artifact / "report.json").read_text())
    again = rows(qcompile("compare", small_artifact, "--model", small.model, "--data", held_out, "--json"))
    assert report["fidelity"]["samples"] == 2
    expected = report["fidelity"]["outputs"]["y"]["sqnr"]
    assert again[str(small_artifact)]["sqnr"]["y"] == pytest.approx(expected, abs=1e-3)


@pytest.fixture
def counters(tmp_path: Path) -> Path:
    """A processor's counter of energy, one of its cores', and a sensor's, as Linux has them."""
    for name in ("powercap/rapl:0", "powercap/rapl:0:0", "hwmon/hwmon3"):
        (tmp_path / "class" / name).mkdir(parents=True)
    (tmp_path / "class/powercap/rapl:0/energy_uj").write_text("5000\n")
    (tmp_path / "class/powercap/rapl:0:0/energy_uj").write_text("1\n")
    (tmp_path / "class/hwmon/hwmon3/energy1_input").write_text("70\n")
    return tmp_path / "class"


def test_energy_is_that_of_a_run(counters, monkeypatch):
    monkeypatch.setattr(runner, "DRAWN", 0.01)
    package, core, sensor = (counters / name for name in (
        "powercap/rapl:0/energy_uj", "powercap/rapl:0:0/energy_uj", "hwmon/hwmon3/energy1_input"))  # fmt: skip

    def draw(feeds):
        for file, more in ((package, 2000), (core, 1500), (sensor, 500)):
            file.write_text(f"{int(file.read_text()) + more}\n")

    assert runner.drawn(draw, [{}], counters) == pytest.approx(2.5)
    assert runner.drawn(lambda feeds: None, [{}], counters) is None
    assert runner.drawn(lambda feeds: None, [{}], counters / "nothing") is None


def test_energy_is_told_where_the_device_counts_it(qcompile, small_artifact, words, counters, tmp_path):
    assert qcompile("bundle", small_artifact, *words, "-o", tmp_path / "b.qbundle").code == 0
    with zipfile.ZipFile(tmp_path / "b.qbundle") as archive:
        archive.extractall(tmp_path / "there")
    command = [sys.executable, tmp_path / "there/runner.py", "--seconds", "0.1", "--system", counters]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as running:
        count = 5000
        while running.poll() is None:  # the counter of a device that draws two watts
            count += 2000
            (counters / "powercap/next").write_text(f"{count}\n")
            (counters / "powercap/next").replace(counters / "powercap/rapl:0/energy_uj")
            time.sleep(0.001)
        assert running.stdout is not None
        told = {one["artifact"]: one for one in map(json.loads, running.stdout)}
    assert set(told) == {0, 1} and all(one["energy_mj"] > 0.0 for one in told.values())


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
    found = [
        Row("gone", "", failed=True),
        Row("m0", "cortex-m0plus", 1, {"y": 30.0, "z": 50.0}, instructions=100),
        Row("good", "cpu", 2, {"y": 40.0}, latency=Latency(2.0, 3.0)),
        Row("fast", "cpu:tvm", 3, {"y": 20.0}, latency=Latency(1.0, 9.0)),
    ]
    assert [row.output for row in sorted(found, key=_KEYS[rank])] == order.split()


def test_a_bundle_stands_for_the_folders(qcompile, small_artifact, words, tmp_path):
    bundle = tmp_path / "small.qbundle"
    assert qcompile("bundle", small_artifact, *words, "-o", bundle).code == 0
    first = bundle.read_bytes()
    assert qcompile("bundle", small_artifact, *words, "-o", bundle).code == 0 and bundle.read_bytes() == first
    packed, folders = (qcompile("compare", *w, "--json") for w in ((bundle,), (small_artifact, *words)))
    assert packed.code == 0
    keys = ("target", "bytes", "sqnr", "accuracy")
    assert [[row[key] for key in keys] for row in sorted(rows(packed).values(), key=lambda row: row["bytes"])] == [
        [row[key] for key in keys] for row in sorted(rows(folders).values(), key=lambda row: row["bytes"])
    ]


def test_a_bundle_is_of_whole_artifacts(qcompile, small_artifact, words, tmp_path):
    done = qcompile("bundle", small_artifact, tmp_path / "none", *words, "-o", tmp_path / "b.qbundle")
    assert done.code == 2 and "none: has no manifest.json" in done.err and not (tmp_path / "b.qbundle").exists()
    done = qcompile("bundle", small_artifact, "-o", tmp_path / "b.qbundle")
    assert done.code == 2 and "needs --model and --data" in done.err
    assert qcompile("compare", small_artifact).code == 2


def test_an_artifact_that_no_runner_loads_says_so_in_its_row(qcompile, small_artifact, words, monkeypatch):
    monkeypatch.setattr(bundle, "KINDS", {})
    done = qcompile("compare", small_artifact, *words)
    assert done.code == 7 and "is of backend 'ort', which no runner loads" in done.out


@pytest.mark.parametrize("name", ["../out", "/out", "a/../../out", "a\\..\\out"])
def test_a_bundle_that_leaves_its_folder_is_refused(qcompile, tmp_path, name):
    with zipfile.ZipFile(tmp_path / "evil.qbundle", "w") as archive:
        archive.writestr("bundle.json", "{}")
        archive.writestr(zipfile.ZipInfo(name), "x")
    done = qcompile("compare", tmp_path / "evil.qbundle")
    assert done.code == 2 and "leaves its folder" in done.err and done.err.count("\n") == 1
    assert not (tmp_path / "out").exists() and not (tmp_path.parent / "out").exists()


def test_links_and_what_is_no_bundle_are_refused(qcompile, tmp_path):
    link = zipfile.ZipInfo("artifacts")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "link.qbundle", "w") as archive:
        archive.writestr(link, "/")
    assert "leaves its folder" in qcompile("compare", tmp_path / "link.qbundle").err
    (tmp_path / "text.qbundle").write_text("text")
    with zipfile.ZipFile(tmp_path / "old.qbundle", "w") as archive:
        archive.writestr("bundle.json", '{"schema_version": 0}')
    for name, fact in (("text", "is no bundle"), ("old", "has schema version 0"), ("none", "is no bundle")):
        done = qcompile("compare", tmp_path / f"{name}.qbundle")
        assert done.code == 2 and fact in done.err and done.err.count("\n") == 1


def test_an_artifact_that_is_killed_takes_no_other_along(qcompile, small_artifact, words, monkeypatch, tmp_path):
    """The child of the artifact kills itself as soon as it is to be timed; float's goes on."""
    monkeypatch.setattr(bundle, "files", lambda _: tmp_path)
    text = Path(runner.__file__).read_text()
    dies = 'if artifact["target"] != "float": os.kill(os.getpid(), 9)'
    (tmp_path / "runner.py").write_text(
        text.replace("    for line in sys.stdin:\n", f"    {dies}\n    for line in sys.stdin:\n")
    )
    seen = rows(qcompile("compare", small_artifact, *words, "--json"))
    killed, others = seen.pop(str(small_artifact)), seen.values()
    assert killed["failed"] and killed["failure"] == "it was ended by signal 9" and killed["sqnr"] is not None
    assert all(row["latency"] is not None and not row["failed"] for row in others)


def test_a_device_that_does_not_end_is_given_up(qcompile, small_artifact, words, monkeypatch, tmp_path):
    monkeypatch.setattr(bundle, "files", lambda _: tmp_path)
    (tmp_path / "runner.py").write_text("import time; time.sleep(60)")
    began = time.monotonic()
    done = qcompile("compare", small_artifact, *words, "--timeout", 1)
    assert done.code == 7 and "local was lost: no end after 1 s" in done.out and time.monotonic() - began < 30.0


@pytest.mark.parametrize("device", ["adb:", "ssh://", "ssh://host/folder", "http://host"])
def test_what_is_no_device_is_refused(qcompile, small_artifact, words, device):
    done = qcompile("compare", small_artifact, *words, "--on", device)
    assert done.code == 2 and "is no device" in done.err and done.err.count("\n") == 1


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
