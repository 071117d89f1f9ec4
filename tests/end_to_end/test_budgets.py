"""Budgets: what --max-size, --max-latency and bounds on fidelity make of a model, and what is said where none can."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from end_to_end.outcomes import KILLED, report, settled

from qcompile import allocation, unasked_bits


@pytest.fixture
def words(resnet8):
    model, data, evaluation = resnet8
    return (model, "--target", "cpu", "--data", data, "--eval", evaluation)


def sqnr(content: dict) -> float:
    (measures,) = content["fidelity"]["outputs"].values()
    return measures["sqnr"]


def stored(folder: Path) -> dict[int, int]:
    """Return how many weights are stored in a type of four bits, and how many in eight."""
    types = [tensor.data_type for tensor in onnx.load(folder / "model.onnx").graph.initializer
             if np.prod(tensor.dims) >= 4096]  # fmt: skip
    return {4: types.count(onnx.TensorProto.INT4), 8: types.count(onnx.TensorProto.INT8)}


def compiling(qcompile, words, tmp_path):
    """Return what compiles with these words and more, and returns the report."""

    def run(name: str, *more: object) -> dict:
        done = qcompile(*words, *more, "-o", tmp_path / name, "--cache", tmp_path / "cache", "--json")
        assert done.code == 0, done.err
        return report(done)

    return run


@pytest.fixture
def compiled(qcompile, words, tmp_path):
    return compiling(qcompile, words, tmp_path)


@pytest.fixture
def scored(qcompile, words, tmp_path):
    """The same in front of the Softmax: behind it, one picture of twenty that is hard to tell decides for all."""
    proto = onnx.load(words[0])
    last = proto.graph.node.pop()
    assert last.op_type == "Softmax"
    proto.graph.output[0].name = last.input[0]
    onnx.save(proto, tmp_path / "scores.onnx")
    return compiling(qcompile, (tmp_path / "scores.onnx", *words[1:]), tmp_path)


def test_a_budget_of_bytes_is_met_and_what_loses_least_pays_for_it(scored, tmp_path):
    whole, fewest = scored("eight"), scored("four", "--weights", "4")
    assert stored(tmp_path / "eight")[4] == 0 and stored(tmp_path / "four")[8] == 0
    assert whole["allocation"] is None and set(fewest["allocation"]["bits"].values()) == {4}
    middle = (whole["size"]["ratio"] + fewest["size"]["ratio"]) / 2
    some = scored("some", "--max-size", f"{middle:.3f}x")
    assert fewest["size"]["artifact_bytes"] < some["size"]["artifact_bytes"] <= middle * some["size"]["float_bytes"]
    assert set(some["allocation"]["bits"].values()) == {4, 8} and some["allocation"]["gap"] == 0.0
    # Biases are corrected or not by what it turns out to help, so that the prediction is not of every byte.
    assert some["size"]["artifact_bytes"] == pytest.approx(some["allocation"]["bytes"], rel=0.02)
    assert sqnr(fewest) < sqnr(some) < sqnr(whole)
    packed = sum(bits == 4 for bits in some["allocation"]["bits"].values())
    assert stored(tmp_path / "some")[4] == packed


@pytest.fixture
def small_is_large(monkeypatch):
    """Let this model count as a large one, whose file is to be a little smaller than eight bits make it."""

    def count(quarter: float, spent: float = 10.0) -> None:
        monkeypatch.setattr(unasked_bits, "LARGE", 0.0)
        monkeypatch.setattr(unasked_bits, "QUARTER", quarter)
        monkeypatch.setattr(allocation, "SPENT", spent)

    return count


def test_kernels_that_take_four_bits_get_none_unasked(qcompile, resnet8, small_is_large, tmp_path):
    """A library has constants beside its weights: a few hundredths of the bytes are not worth decibels."""
    pytest.importorskip("tvm")
    small_is_large(0.1)
    model, calibration, evaluation = resnet8
    words = ("--target", "cpu:tvm-avx2", "--data", calibration, "--eval", evaluation, "-q", "-o", tmp_path / "out")
    assert qcompile(model, *words, "--smoothing", "none", "--rotation", "none").code == 0
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert {op["weight_bits"] for op in report["operators"]} <= {8.0, None}


def test_a_large_model_takes_a_quarter_of_floats_bytes(compiled, small_is_large):
    whole = compiled("eight")
    limit = whole["size"]["ratio"] - 0.01
    small_is_large(limit)
    asked, unasked = compiled("asked", "--max-size", f"{limit}x"), compiled("unasked")
    assert unasked["size"]["ratio"] <= limit and unasked["allocation"]["bits"] == asked["allocation"]["bits"]
    assert compiled("kept", "--weights", "8")["allocation"] is None
    assert compiled("faithful", "--min-fidelity", "sqnr=10")["allocation"] is None, (
        "whoever asks for dB asks for no bytes"
    )


def test_eight_bits_stay_where_four_cost_too_much_or_do_not_suffice(compiled, small_is_large):
    limit = compiled("eight")["size"]["ratio"] - 0.01
    small_is_large(limit, spent=0.001)
    assert compiled("dear")["allocation"] is None
    small_is_large(0.05)
    assert compiled("vain")["allocation"] is None


def test_another_budget_measures_nothing_again(compiled, qcompile, words, tmp_path):
    compiled("first", "--max-size", "0.21x")
    kept = {path.name for path in (tmp_path / "cache").rglob("*") if path.is_file()}
    done = qcompile(*words, "--max-size", "0.25x", "-o", tmp_path / "second", "--cache", tmp_path / "cache", "--json")
    seconds = json.loads(done.out)["measurements"]["seconds"]
    assert seconds["losses"] < 0.5 and seconds["observers"] < 0.5
    again = qcompile(*words, "--max-size", "0.25x", "-o", tmp_path / "third", "--json")
    assert again.code == 0 and settled(tmp_path / "third") == settled(tmp_path / "second")
    assert kept < {path.name for path in (tmp_path / "cache").rglob("*") if path.is_file()}


def test_the_smallest_file_that_is_faithful_enough(compiled):
    found = compiled("faithful", "--weights", "mixed", "--min-fidelity", "sqnr=25")
    assert 4 in found["allocation"]["bits"].values()
    assert found["allocation"]["sqnr"] >= 25.5 and sqnr(found) >= 25.0


def test_without_a_bound_bits_are_worth_their_bytes(compiled):
    found = compiled("mixed", "--weights", "mixed")
    assert sqnr(found) > 20.0 and found["allocation"]["gap"] == 0.0


@pytest.mark.parametrize(
    ("more", "facts"),
    [
        (("--max-size", "0.05x"), ("--max-size 0.05x", "cannot be met", "the file takes")),
        (("--max-size", "1KB", "--weights", "8"), ("--max-size 1KB", "cannot be met", "of 1024 bytes")),
        (("--max-latency", "0.001x", "--costs", ""), ("--max-latency 0.001x", "cannot be met", "fastest placement")),
        (("--weights", "mixed", "--min-fidelity", "sqnr=90"), ("--min-fidelity sqnr=90", "dB are expected")),
    ],
)
def test_a_budget_that_cannot_be_met_says_what_can(qcompile, words, more, facts, tmp_path):
    costs = None if "--costs" in more else "none"
    more = tuple(word for word in more if word not in ("--costs", ""))
    done = qcompile(*words, *more, "-o", tmp_path / "out", costs=costs)
    assert done.code == 5 and done.err.count("\n") == 1 and all(fact in done.err for fact in facts), done.err
    assert not (tmp_path / "out").exists()


def test_what_is_written_is_held_to_its_budget(qcompile, words, tmp_path, monkeypatch):
    """Were the choice of bits mistaken about the file, the file would not be delivered."""
    monkeypatch.setattr("qcompile.backends.ort.lower.OrtBackend.size", lambda self, model: 1000)
    done = qcompile(*words, "--max-size", "0.2x", "--weights", "8", "-o", tmp_path / "out")
    assert done.code == 5 and "is missed by what was written" in done.err and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("more", "facts"),
    [
        (("--max-size", "small"), ("--max-size small", "is not a budget", "0.2x")),
        (("--max-size", "-1x"), ("--max-size -1x", "is not a budget")),
        (("--max-size", "0x"), ("--max-size 0x", "is not a budget")),
        (("--max-size", "5ms"), ("--max-size 5ms", "is not a budget", "5MB")),
        (("--max-latency", "5MB"), ("--max-latency 5MB", "is not a budget", "12ms")),
        (("--max-latency", "0.5x"), ("--max-latency 0.5x", "no cost table", "--costs")),
    ],
)
def test_what_is_no_budget(qcompile, words, more, facts, tmp_path):
    done = qcompile(*words, *more, "-o", tmp_path / "out")
    assert done.code == 2 and all(fact in done.err for fact in facts), done.err


def test_a_budget_of_time_takes_data_and_a_model_in_float(qcompile, resnet8, compiled, tmp_path):
    model, data, _ = resnet8
    target = ("--target", "cpu", "--max-latency", "0.5x", "-o", tmp_path / "out")
    blind = qcompile(model, *target, costs=None)
    assert blind.code == 2 and "without data" in blind.err and blind.err.count("\n") == 1
    compiled("quantized")
    again = qcompile(tmp_path / "quantized/model.onnx", *target, "--data", data, costs=None)
    assert again.code == 2 and "came in quantized" in again.err and again.err.count("\n") == 1


def test_the_stages_write_what_one_compile_writes(qcompile, words, tmp_path):
    model, *rest = words
    budget = ("--max-size", "0.25x")
    assert qcompile(model, *rest, *budget, "-o", tmp_path / "whole").code == 0
    for command in (
        ("calibrate", model, *rest, *budget, "-o", tmp_path / "c.npz"),
        ("plan", model, "--target", "cpu", "--calibration", tmp_path / "c.npz", *budget, "-o", tmp_path / "p.json"),
        ("apply", model, *rest, "--plan", tmp_path / "p.json", "-o", tmp_path / "staged"),
    ):
        done = qcompile(*command)
        assert done.code == 0, done.err
    assert (tmp_path / "staged/model.onnx").read_bytes() == (tmp_path / "whole/model.onnx").read_bytes()
    # One calibration serves for several budgets; what was run for one of them says little of the others.
    tighter = ("plan", model, "--target", "cpu", "--calibration", tmp_path / "c.npz", "--max-size", "0.21x")
    assert qcompile(*tighter, "-o", tmp_path / "q.json").code == 0
    bits = [json.loads((tmp_path / name).read_text())["allocation"]["bits"] for name in ("p.json", "q.json")]
    assert list(bits[0].values()).count(4) < list(bits[1].values()).count(4)


def test_choices_are_run_and_the_report_says_of_how_many(compiled, qcompile, words, tmp_path):
    budget = ("--max-size", "0.25x")
    found = compiled("run", *budget)["allocation"]
    assert found["tried"] >= 2
    model, *rest = words
    for name, more in (("run", budget), ("expected", ("--weights", "mixed"))):
        file = tmp_path / f"{name}.npz"
        assert qcompile("calibrate", model, *rest, *more, "-o", file, "--cache", tmp_path / "cache").code == 0
        plan = ("plan", model, "--target", "cpu", "--calibration", file, *budget, "-o", tmp_path / f"{name}.json")
        assert qcompile(*plan).code == 0
    run, expected = (json.loads((tmp_path / f"{name}.json").read_text())["allocation"] for name in ("run", "expected"))
    assert run == found and expected["tried"] == 0 and expected["gap"] == 0.0


def test_a_calibration_that_knows_no_losses_is_no_ground_for_bits(qcompile, words, tmp_path):
    model, *rest = words
    assert qcompile("calibrate", model, *rest, "-o", tmp_path / "c.npz").code == 0
    plan = ("plan", model, "--target", "cpu", "--calibration", tmp_path / "c.npz", "--max-size", "0.2x")
    done = qcompile(*plan, "-o", tmp_path / "p.json")
    assert done.code == 2 and "what weights" in done.err and "--weights mixed" in done.err
    assert not (tmp_path / "p.json").exists()


def test_without_data_the_weights_own_errors_tell(qcompile, resnet8, tmp_path):
    model, _, evaluation = resnet8
    done = qcompile(
        model, "--target", "cpu", "--eval", evaluation, "--max-size", "0.2x", "-o", tmp_path / "out", "--json"
    )
    assert done.code == 0, done.err
    assert report(done)["size"]["ratio"] <= 0.2 and report(done)["allocation"]["sqnr"] is None


def test_time_that_is_left_buys_fidelity(qcompile, words, tmp_path):
    fast = qcompile(*words, "-o", tmp_path / "fast", "--json", costs=None)
    slow = qcompile(*words, "--max-latency", "0.9x", "-o", tmp_path / "slow", "--json", costs=None)
    assert slow.code == 0, slow.err
    fast, slow = report(fast), report(slow)
    assert fast["predicted_latency"]["ratio"] < slow["predicted_latency"]["ratio"] <= 0.905
    assert sqnr(slow) > sqnr(fast)
    assert any("--max-latency 0.9x" in (op["reason"] or "") for op in slow["operators"])


@pytest.mark.parametrize("count", [1, 4, 7, 9])
def test_killed_and_run_again_it_goes_on_to_the_same_bytes(small, proto_of, random, count):
    text = "(float[2,64] x) => (float[2,96] y) { a = MatMul (x, v) b = Relu (a) y = MatMul (b, w) }"
    weights = {"v": random.normal(size=(64, 128)), "w": random.normal(size=(128, 96))}
    model = small.save(proto_of(text, 21, **{name: array.astype(np.float32) for name, array in weights.items()}))
    data = small.feed(x=random.normal(size=(16, 2, 64)).astype(np.float32))
    output, words = small.folder / "out", ["--target", "cpu", "--data", data, "--max-size", "0.22x", "--quiet"]
    cached = [*words, "--cache", small.folder / "cache", "-o", output]
    assert subprocess.run([sys.executable, "-c", KILLED, str(count), model, *cached]).returncode == -9
    assert not output.exists()
    assert subprocess.run([sys.executable, "-c", KILLED, "0", model, *cached]).returncode == 0
    fresh = [sys.executable, "-m", "qcompile", model, *words, "-o", small.folder / "fresh"]
    assert subprocess.run(fresh).returncode == 0
    assert settled(output) == settled(small.folder / "fresh")
    bits = json.loads((output / "plan.json").read_text())["allocation"]["bits"]
    assert sorted(bits.values()) == [4, 8]
