"""`--lock`: nothing is compiled when nothing changed; `--locked`: nothing but what is locked."""

from __future__ import annotations

import json

import pytest


@pytest.fixture
def locked(qcompile, small, tmp_path):
    """Compile the small model under a lock, with more options where a test wants them."""
    output, lock = tmp_path / "out", tmp_path / "model.lock"
    model, data = small.model, small.data

    def run(*more: object):
        words = ("--target", "cpu", "--data", data, "-o", output, "--observer", "minmax", "--lock", lock)
        return qcompile(model, *words, *more)

    assert run("--quiet").code == 0
    return run, output, lock


def stamps(output) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in output.iterdir()}


def test_nothing_is_compiled_when_nothing_changed(locked):
    run, output, lock = locked
    before = stamps(output)
    done = run()
    assert done.code == 0 and "up to date" in done.out and stamps(output) == before
    assert run("--quiet").out == "" and run("--threads", 1, "--locked").code == 0 and stamps(output) == before
    assert json.loads(lock.read_text()) == json.loads((output / "manifest.json").read_text())


@pytest.mark.parametrize("change", ["file", "folder", "data", "model", "options", "versions"])
def test_what_changed_is_compiled_and_locked_anew(locked, small, change):
    run, output, lock = locked
    before, more = stamps(output), ()
    if change == "file":
        (output / "model.onnx").write_bytes(b"")
    elif change == "folder":
        (output / "manifest.json").unlink()
        for path in output.iterdir():
            path.unlink()
    elif change == "data":
        small.feed(x=small.samples + 1.0)
    elif change == "model":
        small.proto.graph.initializer[0].raw_data = bytes(len(small.proto.graph.initializer[0].raw_data))
        small.save(small.proto)
    elif change == "options":
        more = ("--seed", 1)
    else:
        content = json.loads(lock.read_text())
        content["versions"]["numpy"] = "1.0"
        lock.write_text(json.dumps(content))
    done = run(*more)
    assert (
        done.code == 0 and "up to date" not in done.out and stamps(output)["manifest.json"] != before["manifest.json"]
    )
    assert "up to date" in run(*more).out


@pytest.mark.parametrize(
    ("key", "line"),
    [("data", "the data are others"), ("model", "the model is another"), ("versions", "numpy was 1.0, is "),
     ("options", "seed was 3, is 0")],
)  # fmt: skip
def test_what_is_not_locked_is_refused(locked, key, line):
    run, output, lock = locked
    content, before = json.loads(lock.read_text()), stamps(output)
    content[key] |= {
        "data": {"sha256": ""},
        "model": {"sha256": ""},
        "versions": {"numpy": "1.0"},
        "options": {"seed": 3},
    }[key]
    lock.write_text(json.dumps(content))
    done = run("--locked")
    assert done.code == 2 and line in done.err and done.err.count("\n") == 1 and stamps(output) == before


def test_other_bytes_than_are_locked_are_a_failure(locked):
    run, _, lock = locked
    content = json.loads(lock.read_text())
    content["files"]["model.onnx"]["sha256"] = "0" * 64
    lock.write_text(json.dumps(content))
    done = run("--locked")
    assert done.code == 6 and "'model.onnx' came out with other bytes" in done.err
    assert json.loads(lock.read_text()) == content


def test_a_lock_must_be_there_and_be_one(qcompile, locked, small, tmp_path):
    run, _, lock = locked
    lock.write_text("[]")
    assert run().code == 2 and "is no lock of qcompile" in run().err
    lock.unlink()
    assert run("--locked").code == 2 and "does not exist" in run("--locked").err
    done = qcompile(small.model, "--target", "cpu", "-o", tmp_path / "other", "--locked")
    assert done.code == 2 and "--locked needs --lock" in done.err
