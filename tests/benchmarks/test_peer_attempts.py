"""A peer runs on its own, within its limits; what it made is kept, and so is why it failed."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import peer_attempts
import peers
import pytest
from peer_attempts import Attempt, Limits, Material, Peer, Setting, Workshop, last_line, read_peers, run
from peer_results import Row

from qcompile.core.runtime import Session

WRITES = "import json; job = json.load(open('job.json')); open(job['output'], 'w').write(str(job['setting']))"
SETTING = Setting("plain", {"bits": 8})


def python(program):
    return [sys.executable, "-c", program]


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("pass", None),
        ("raise ValueError('no such scale')", "ValueError: no such scale"),
        ("import sys; sys.exit(1)", "failed without a word"),
        ("import os; os.kill(os.getpid(), 9)", "ended by SIGKILL"),
        ("print('x' * 1000, 'y', flush=True); raise SystemExit(3)", "…"),
    ],
)
def test_a_run_ends_in_nothing_or_one_line(program, reason, tmp_path):
    found = run(python(program), tmp_path, Limits())
    assert found is None if reason is None else found is not None and found.endswith(reason) and "\n" not in found


def test_a_run_ends_with_its_time_and_takes_its_children_with_it(tmp_path):
    child = "import pathlib, time; time.sleep(1.5); pathlib.Path('late').touch()"
    program = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(60)"
    assert run(python(program), tmp_path, Limits(seconds=0.5)) == "took more than 0.5 s"
    assert run(python("import time; time.sleep(2)"), tmp_path, Limits()) is None
    assert not (tmp_path / "late").exists()


def test_a_run_ends_with_its_memory(tmp_path):
    found = run(python("b'x' * 2**31"), tmp_path, Limits(gigabytes=1.0))
    assert found is not None and "MemoryError" in found


def test_a_reason_fits_a_cell_and_names_no_folder_of_this_machine():
    text = "Traceback\n  File '/data/.cache/x.py'\nOSError: /data/a-b/model.onnx | broken\n\n"
    assert last_line(text) == "OSError: model.onnx / broken"
    assert len(last_line("word " * 100)) <= peer_attempts.LONGEST + 2


@pytest.fixture
def material(tmp_path) -> Material:
    model = tmp_path / "float.onnx"
    model.write_bytes(b"float")
    return Material.lay_out(model, [{"x": np.zeros(2)}, {"x": np.ones(2)}], tmp_path / "samples")


@pytest.fixture
def peer_of(tmp_path, monkeypatch):
    """Make a peer whose environment is this Python and whose script is the program given."""
    scripts = tmp_path / "scripts"
    scripts.mkdir()
    (scripts / "job.py").write_text("")
    monkeypatch.setattr(peer_attempts, "SCRIPTS", scripts)

    def build(program, workshop) -> Peer:
        (scripts / "run.py").write_text(program)
        peer = Peer("tool", ("tool==1.0",), "run.py", (SETTING,))
        environment = workshop.environment(peer)
        if not environment.exists():
            (environment / "bin").mkdir(parents=True)
            (environment / "bin" / "python").symlink_to(sys.executable)
            (environment / peer_attempts.INSTALLED).write_text("tool==1.0")
        return peer

    return build


def test_what_a_peer_made_is_kept_and_what_it_left_beside_is_not(tmp_path, peer_of, material):
    workshop = Workshop(tmp_path / "work", Limits())
    peer = peer_of(f"{WRITES}; open('copy.onnx', 'w').close(); open('count', 'a').write('1')", workshop)
    first = workshop.attempt(peer, SETTING, material)
    assert first.model is not None and first.failure is None and first.model.read_text() == "{'bits': 8}"
    assert sorted(path.name for path in first.model.parent.iterdir()) == [
        "attempt.json",
        "job.json",
        "log.txt",
        "model.onnx",
    ]
    first.model.write_text("as it was")
    again = workshop.attempt(peer, SETTING, material)
    assert again == first and again.model is not None and again.model.read_text() == "as it was"


def test_another_setting_model_script_or_package_is_another_attempt(tmp_path, peer_of, material):
    workshop = Workshop(tmp_path / "work", Limits())
    peer = peer_of(WRITES, workshop)
    folders = {workshop.attempt(peer, SETTING, material).model}
    folders.add(workshop.attempt(peer, Setting("plain", {"bits": 4}), material).model)
    folders.add(workshop.attempt(peer, SETTING, replace(material, digest="other")).model)
    (workshop.environment(peer) / peer_attempts.INSTALLED).write_text("tool==1.0\nother==2.0")
    folders.add(workshop.attempt(peer, SETTING, material).model)
    folders.add(workshop.attempt(peer_of(f"{WRITES}\n", workshop), SETTING, material).model)
    assert len(folders) == 5 and None not in folders


def test_a_setting_may_have_a_script_of_its_own(tmp_path, peer_of, material):
    workshop = Workshop(tmp_path / "work", Limits())
    peer = peer_of("raise KeyError('scale')", workshop)
    (peer_attempts.SCRIPTS / "other.py").write_text(WRITES)
    own = Setting.read("plain", {"bits": 8, "script": "other.py"})
    first = workshop.attempt(peer, own, material)
    assert first.model is not None and first.model.read_text() == "{'bits': 8}"
    (peer_attempts.SCRIPTS / "other.py").write_text(f"{WRITES}\n")
    assert workshop.attempt(peer, own, material).model not in (None, first.model)


def test_a_setting_is_for_models_that_have_what_it_needs(tmp_path, peer_of, material, float_path):
    workshop = Workshop(tmp_path / "work", Limits())
    peer = peer_of(WRITES, workshop)
    settings = tuple(Setting.read(needed, {"needs": needed}) for needed in ("MatMul", "Relu"))
    found = peers.attempted([replace(peer, settings=settings)], workshop, replace(material, model=float_path))
    assert [candidate.row.setting for candidate in found] == ["Relu"]


def test_a_failure_is_kept_until_the_limits_change(tmp_path, peer_of, material):
    workshop = Workshop(tmp_path / "work", Limits())
    count = tmp_path / "count"
    peer = peer_of(f"open({str(count)!r}, 'a').write('1'); raise KeyError('scale')", workshop)
    for limits in (Limits(), Limits(), Limits(seconds=60.0)):
        found = replace(workshop, limits=limits).attempt(peer, SETTING, material)
        assert found.model is None and found.failure == "KeyError: 'scale'"
    assert count.read_text() == "11"


def test_success_without_a_model_is_a_failure(tmp_path, peer_of, material):
    workshop = Workshop(tmp_path / "work", Limits())
    found = workshop.attempt(peer_of("pass", workshop), SETTING, material)
    assert found.model is None and found.failure == "says that it succeeded, but wrote no model"


def test_a_peer_that_does_not_install_is_tried_once_and_fails_in_every_setting(tmp_path, monkeypatch, material):
    workshop, tries = Workshop(tmp_path / "work", Limits()), []

    def refuse(self, peer):
        tries.append(peer.name)
        raise peer_attempts.PeerError("does not install: no matching distribution")

    monkeypatch.setattr(Workshop, "_install", refuse)
    peer = Peer("tool", ("tool==1.0",), "run.py", (SETTING, Setting("other", {})))
    found = [candidate.row for candidate in peers.attempted([peer], workshop, material)]
    assert [row.failure for row in found] == ["does not install: no matching distribution"] * 2 and tries == ["tool"]


def test_a_step_of_an_installation_fails_with_its_error(monkeypatch):
    program = "import sys; sys.exit('WARNING: old\\nERROR: no such version\\nERROR: see the manual')"
    with pytest.raises(peer_attempts.PeerError, match=r"^does not install: ERROR: no such version$"):
        peer_attempts._told(python(program))
    monkeypatch.setattr(peer_attempts, "LONGEST_INSTALLATION", 0.1)
    with pytest.raises(peer_attempts.PeerError, match=r"^does not install within 0\.1 s$"):
        peer_attempts._told(python("import time; time.sleep(30)"))
    monkeypatch.undo()
    assert peer_attempts._told(python("print('tool==1.0')")) == "tool==1.0\n"


def test_samples_are_laid_out_one_by_one_and_known_by_their_content(tmp_path, material):
    model, folder = material.model, material.samples
    assert [path.name for path in sorted(folder.iterdir())] == ["000000.npz", "000001.npz"] and material.count == 2
    fewer = Material.lay_out(model, [{"x": np.zeros(2)}], folder)
    assert fewer.count == len(list(folder.iterdir())) == 1 and fewer.digest != material.digest


def test_the_catalogue_of_peers_is_complete():
    found = read_peers()
    assert set(found) == {"onnxruntime", "onnxruntime-blocks", "nncf", "quark", "onnxsim"}
    for peer in found.values():
        assert all("==" in requirement for requirement in peer.requirements) and peer.settings
        scripts = {peer.script, *(setting.script or peer.script for setting in peer.settings)}
        assert all((peer_attempts.SCRIPTS / script).is_file() for script in scripts)
    assert found["nncf"].version == "nncf 3.4.0"


@pytest.fixture
def float_path(proto_of, tmp_path) -> Path:
    path = tmp_path / "model.onnx"
    onnx.save(proto_of("(float[1,3] x) => (float[1,3] y) { y = Relu (x) }"), path)
    return path


def test_a_float_model_returned_without_a_word_is_a_failure(float_path):
    row, session = peers.judged(peers.Candidate(Row("tool", "a"), float_path), [], [])
    assert session is None and row.failure == "returned the float model without a word"


SAMPLES = [{"x": np.array([[-1.0, 0.5, 2.0]], np.float32)}]
CODES = """(float[1,3] x) => (float[1,3] y) {
    scale = Constant <value_float = 0.1> ()
    zero = Constant <value = uint8 {0}> ()
    codes = QuantizeLinear (x, scale, zero)
    y = DequantizeLinear (codes, scale, zero)
}"""


UNPACKED = """(float[1,3] x) => (float[1,3] y)
    <int8[3] codes = {1, 2, 3}, float scale = {0.5}> {
    weights = DequantizeLinear (codes, scale)
    y = Add (x, weights)
}"""


def test_weights_that_are_unpacked_are_quantized(proto_of, tmp_path):
    path = tmp_path / "model.onnx"
    onnx.save(proto_of(UNPACKED), path)
    assert peers.is_quantized(path)


def test_a_model_is_judged_by_its_outputs(float_path, proto_of, tmp_path):
    expected = [Session(float_path).run(feeds) for feeds in SAMPLES]
    (tmp_path / "codes").mkdir()
    path = tmp_path / "codes" / "model.onnx"
    onnx.save(proto_of(CODES), path)
    row, session = peers.judged(peers.Candidate(Row("tool", "a"), path), SAMPLES, expected)
    assert session is not None and row.failure is None and row.agreement == 1.0
    assert row.size == path.stat().st_size and (row.sqnr is None or row.sqnr > 20.0)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (CODES.replace("y = Deq", "z = Deq").replace("[1,3] y", "[1,3] z"), "its outputs are not float's"),
        (CODES.replace("[1,3]", "[1,2]"), "fails on a sample"),
        (CODES.replace("codes = Q", "wrong = Sqrt (x)\n codes = Q").replace("y = D", "z = D").replace(
            "zero)\n}", "zero)\n y = Add (z, wrong)\n}"), "NaN"),
    ],
)  # fmt: skip
def test_a_model_that_cannot_be_judged_is_a_row_with_the_reason(text, reason, float_path, proto_of, tmp_path):
    expected = [Session(float_path).run(feeds) for feeds in SAMPLES]
    (tmp_path / "codes").mkdir()
    path = tmp_path / "codes" / "model.onnx"
    onnx.save(proto_of(text), path)
    row, session = peers.judged(peers.Candidate(Row("tool", "a"), path), SAMPLES, expected)
    assert session is None and row.failure is not None and reason in row.failure and "\n" not in row.failure


def test_an_attempt_without_a_model_stays_a_row():
    failed = Row("tool", "a", failure=Attempt(None, 1.0, "crashed").failure)
    assert peers.judged(peers.Candidate(failed, None), SAMPLES, []) == (failed, None)


def test_a_file_that_is_no_model_is_a_row_with_the_reason(tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(b"nothing")
    row, session = peers.judged(peers.Candidate(Row("tool", "a"), path), SAMPLES, [])
    assert session is None and row.failure is not None and str(tmp_path) not in row.failure


BOTH = """
import json, shutil
job = json.load(open("job.json"))
if "broken" in job["setting"]:
    raise ValueError("no such method")
shutil.copy(job["setting"]["made"], job["output"])
"""


def test_a_model_is_quantized_by_all_and_measured_in_one_go(tmp_path, peer_of, proto_of):
    weight = np.random.default_rng(0).normal(size=(8, 8)).astype(np.float32)
    text = "(float[1,8] x) => (float[1,8] y) { y = MatMul (x, w) }"
    source, calibration, evaluation = paths = [tmp_path / name for name in ("net.onnx", "calib.npz", "eval.npz")]
    onnx.save(proto_of(text, w=weight), source)
    for seed, path in enumerate((calibration, evaluation), 1):
        np.savez(path, x=np.random.default_rng(seed).normal(size=(8, 1, 8)).astype(np.float32))
    made = tmp_path / "made.onnx"
    body = CODES.replace("[1,3]", "[1,8]").replace("y = DequantizeLinear (codes, scale, zero)", "y = MatMul (d, w)")
    body = body.replace("y = MatMul", "d = DequantizeLinear (codes, scale, zero)\n    y = MatMul")
    onnx.save(proto_of(body, w=weight), made)
    workshop = Workshop(tmp_path / "work", Limits())
    peer = peer_of(BOTH, workshop)
    peer = replace(peer, settings=(Setting("works", {"made": str(made)}), Setting("fails", {"broken": True})))
    result = peers.compare("net", paths, [peer], workshop, repeats=3)
    ours, works, fails = result.rows
    assert result.calibrated == result.evaluated == 8 and result.rounds == 3 and result.float_bytes > 0
    assert ours.peer == "qcompile" and ours.latency is not None and works.latency is not None
    assert fails.failure == "ValueError: no such method" and fails.latency is None
    assert all(row.sqnr is None or row.sqnr > 0.0 for row in (ours, works))
