"""Where trials run changes no byte of an artifact, and what goes wrong there is one line."""

from __future__ import annotations

import pytest
from end_to_end.outcomes import report, settled

from qcompile.calib import workers


@pytest.fixture
def words(resnet8):
    model, data, evaluation = resnet8
    plain = ("--observer", "minmax", "--smoothing", "none", "--rotation", "none")
    return (model, "--target", "cpu", "--data", data, "--eval", evaluation, "--max-size", "0.21x", *plain)


def test_processes_change_no_byte(qcompile, words, tmp_path):
    folders = []
    for number, where in enumerate(((), ("--workers", "2"))):
        folders.append(tmp_path / str(number))
        done = qcompile(*words, *where, "-o", folders[-1], "--json")
        assert done.code == 0, done.err
        assert set(report(done)["allocation"]["bits"].values()) == {4, 8}
    assert settled(folders[0]) == settled(folders[1])


def test_what_was_measured_elsewhere_is_found_in_the_cache(qcompile, words, tmp_path, monkeypatch):
    cache = ("--cache", tmp_path / "cache")
    assert qcompile(*words, *cache, "--workers", "1", "-o", tmp_path / "first").code == 0
    monkeypatch.setattr(workers.Workers, "each", None)  # whoever measures again fails
    assert qcompile(*words, *cache, "-o", tmp_path / "second").code == 0


def test_a_cluster_that_does_not_answer_is_one_line(qcompile, words, tmp_path, monkeypatch):
    pytest.importorskip("distributed")
    monkeypatch.setattr(workers, "PATIENCE", 0.5)
    done = qcompile(*words, "--workers", "tcp://127.0.0.1:9", "-o", tmp_path / "out")
    assert done.code == 8 and done.out == "" and not (tmp_path / "out").exists()
    assert done.err.startswith("error: --workers tcp://127.0.0.1:9: no scheduler answers") and done.err.count("\n") == 1
