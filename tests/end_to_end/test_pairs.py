"""`--pairs`: what neighbours lose together, measured once, told in the report, and refused where nothing is chosen."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import numpy as np
import pytest
from end_to_end.outcomes import report, settled

SCHEMAS = Path(__file__).parents[2] / "docs/schemas"
#: What takes longest has nothing to do with it.
PLAIN = ("--smoothing", "none", "--rotation", "none", "--observer", "minmax", "--target", "cpu")


@pytest.fixture
def words(stacked):
    return (stacked.model, *PLAIN, "--data", stacked.data)


def test_pairs_are_measured_once_and_told(qcompile, words, tmp_path):
    cache = ("--cache", tmp_path / "cache")
    first = qcompile(*words, "--max-size", "0.25x", "--pairs", "2", "-o", tmp_path / "out", *cache, "--json")
    content = report(first)
    jsonschema.validate(content, json.loads((SCHEMAS / "report.schema.json").read_text()))
    plan = json.loads((tmp_path / "out/plan.json").read_text())
    jsonschema.validate(plan, json.loads((SCHEMAS / "plan.schema.json").read_text()))
    pairs = content["allocation"]["pairs"]
    assert len(content["allocation"]["bits"]) == 4 and pairs["measured"] == 5
    assert plan["options"]["pairs"] == content["options"]["pairs"] == 2
    assert pairs["sqnr_without"] <= content["allocation"]["sqnr"] or not pairs["changed"]
    # Another budget measures neither weights nor pairs again, and no pairs find all but the pairs.
    other = qcompile(*words, "--max-size", "0.28x", "--pairs", "2", "-o", tmp_path / "other", *cache, "--json")
    seconds = json.loads(other.out)["measurements"]["seconds"]
    assert seconds["pairs 2"] < 0.2 and seconds["losses"] < 0.2
    without = qcompile(*words, "--max-size", "0.28x", "-o", tmp_path / "without", *cache, "--json")
    assert json.loads(without.out)["measurements"]["seconds"]["losses"] < 0.2
    assert report(without)["allocation"]["pairs"] is None
    shown = qcompile(*words, "--max-size", "0.25x", "--pairs", "2", "-o", tmp_path / "out", *cache).out
    assert f"{pairs['measured']}: {len(pairs['changed'])} weights changed" in shown


def test_the_stages_write_what_one_compile_with_pairs_writes(qcompile, words, tmp_path):
    model, *rest = words
    budget = ("--max-size", "0.25x", "--pairs", "1")
    for command in (
        (model, *rest, *budget, "-o", tmp_path / "whole"),
        ("calibrate", model, *rest, *budget, "-o", tmp_path / "c.npz"),
        ("plan", model, "--target", "cpu", "--calibration", tmp_path / "c.npz", "-o", tmp_path / "p.json"),
        ("apply", model, "--plan", tmp_path / "p.json", *rest[len(PLAIN) :], "-o", tmp_path / "staged"),
    ):
        done = qcompile(*command)
        assert done.code == 0, done.err
    assert settled(tmp_path / "staged") == settled(tmp_path / "whole")


@pytest.mark.parametrize(
    ("more", "facts"),
    [
        (("--weights", "8"), ("--pairs 2", "all weights have the same bits", "--max-size")),
        ((), ("--pairs 2", "all weights have the same bits", "--weights mixed")),
        (("--max-size", "0.2x", "--pairs", "9"), ("--pairs", "9 is not a number", "1 to 8")),
    ],
)
def test_where_nothing_is_chosen_pairs_are_refused(qcompile, words, more, facts, tmp_path):
    done = qcompile(*words, "--pairs", "2", *more, "-o", tmp_path / "out")
    assert done.code == 2 and done.err.count("\n") == 1 and all(fact in done.err for fact in facts), done.err
    assert not (tmp_path / "out").exists()


def test_pairs_take_data_and_a_model_in_float(qcompile, stacked, proto_of, tmp_path):
    budget = ("--target", "cpu", "--max-size", "0.3x", "--pairs", "2", "-o", tmp_path / "out")
    blind = qcompile(stacked.model, *budget)
    assert blind.code == 2 and "--pairs 2" in blind.err and "--data" in blind.err
    text = """(float[2,64] x) => (float[2,64] y) {
        q = QuantizeLinear (x, s, z) d = DequantizeLinear (q, s, z) v = DequantizeLinear (w, s, z)
        y = MatMul (d, v) }"""
    constants = {"s": np.float32(0.01), "z": np.int8(0), "w": np.ones((64, 64), np.int8)}
    model = stacked.save(proto_of(text, 21, **constants), "quantized.onnx")
    again = qcompile(model, *budget, "--data", stacked.data)
    assert again.code == 2 and "--pairs 2" in again.err and "came in quantized" in again.err


def test_what_has_no_pairs_says_so(qcompile, small, proto_of, random, tmp_path):
    weights = {"w": random.normal(size=(64, 96)).astype("float32")}
    model = small.save(proto_of("(float[2,64] x) => (float[2,96] y) { y = MatMul (x, w) }", 21, **weights))
    data = small.feed(x=random.normal(size=(16, 2, 64)).astype("float32"))
    done = qcompile(model, *PLAIN, "--data", data, "--weights", "mixed", "--pairs", "2", "-o", tmp_path / "o", "--json")
    assert any("Pairs of weights were not measured" in warning for warning in report(done)["warnings"])
