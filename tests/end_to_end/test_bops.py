"""`--max-bops`: a budget of bit operations, met by bits of weights, with what can be reached where it cannot be."""

from __future__ import annotations

import json

import pytest
from end_to_end.outcomes import report, settled

PLAIN = ("--smoothing", "none", "--rotation", "none", "--observer", "minmax", "--target", "cpu")
#: Multiply-accumulates of a run: two rows through four products.
MACS = {"p": 2 * 64 * 96, "q": 2 * 96 * 128, "r": 2 * 128 * 80, "s": 2 * 80 * 64}
WHOLE = 32 * 32 * sum(MACS.values())


@pytest.fixture
def words(stacked):
    return (stacked.model, *PLAIN, "--data", stacked.data)


def counted(bits: dict[str, int]) -> int:
    """Return the bit operations with activations in eight bits."""
    return sum(8 * bits[name] * macs for name, macs in MACS.items())


def test_a_budget_of_bit_operations_is_met(qcompile, words, tmp_path):
    part = counted({"p": 8, "q": 4, "r": 8, "s": 8}) / WHOLE + 1e-6
    found = report(qcompile(*words, "--max-bops", f"{part:.6f}x", "-o", tmp_path / "out", "--json"))
    allocation = found["allocation"]
    assert allocation["bops"] == counted(allocation["bits"]) <= part * WHOLE
    assert 4 in allocation["bits"].values() and 8 in allocation["bits"].values() and allocation["tried"] >= 1
    # Both budgets hold at once, and a unit says the same as a part.
    amount = f"{part * WHOLE / 1e6:.6f}M"
    both = report(qcompile(*words, "--max-bops", amount, "--max-size", "0.24x", "-o", tmp_path / "both", "--json"))
    assert both["allocation"]["bops"] <= part * WHOLE and both["size"]["ratio"] <= 0.24
    faithful = qcompile(*words, "--max-bops", amount, "--weights", "mixed", "--min-fidelity", "sqnr=5", "-o",
                        tmp_path / "faithful", "--json")  # fmt: skip
    assert report(faithful)["allocation"]["bops"] <= part * WHOLE


def test_the_stages_write_what_one_compile_writes(qcompile, words, tmp_path):
    model, *rest = words
    for command in (
        (model, *rest, "--max-bops", "0.05x", "-o", tmp_path / "whole"),
        ("calibrate", model, *rest, "--max-bops", "0.05x", "-o", tmp_path / "c.npz"),
        ("plan", model, "--target", "cpu", "--calibration", tmp_path / "c.npz", "-o", tmp_path / "p.json"),
        ("apply", model, "--plan", tmp_path / "p.json", *rest[len(PLAIN) :], "-o", tmp_path / "staged"),
    ):
        done = qcompile(*command)
        assert done.code == 0, done.err
    assert settled(tmp_path / "staged") == settled(tmp_path / "whole")
    # Another budget needs no other calibration.
    tighter = ("plan", model, "--target", "cpu", "--calibration", tmp_path / "c.npz", "--max-bops", "0.04x")
    assert qcompile(*tighter, "-o", tmp_path / "q.json").code == 0
    assert json.loads((tmp_path / "q.json").read_text())["allocation"]["bops"] <= 0.04 * WHOLE


@pytest.mark.parametrize("more", [(), ("--weights", "4"), ("--weights", "mixed")])
def test_a_budget_that_cannot_be_met_says_what_can(qcompile, words, more, tmp_path):
    done = qcompile(*words, *more, "--max-bops", "0.031x", "-o", tmp_path / "out")
    assert done.code == 5 and done.err.count("\n") == 1 and not (tmp_path / "out").exists(), done
    assert (
        "--max-bops 0.031x" in done.err and "0.0312x of float" in done.err and f"{4 * 8 * WHOLE / 1024:.4g}" in done.err
    )


def test_eight_bits_that_are_asked_for_are_held_to_it(qcompile, words, tmp_path):
    kept = qcompile(*words, "--weights", "8", "--max-bops", "0.0625x", "-o", tmp_path / "kept")
    assert kept.code == 0, kept.err
    done = qcompile(*words, "--weights", "8", "--max-bops", "0.05x", "-o", tmp_path / "out")
    assert done.code == 5 and "0.0625x of float" in done.err


def test_without_data_only_weights_have_few_bits(qcompile, words, tmp_path):
    done = qcompile(words[0], "--target", "cpu", "--activations", "none", "--max-bops", "0.2x", "-o", tmp_path / "out",
                    "--json")  # fmt: skip
    found = report(done)["allocation"]
    assert found["bops"] == sum(32 * found["bits"][name] * macs for name, macs in MACS.items()) <= 0.2 * WHOLE


@pytest.mark.parametrize("text", ["small", "0x", "5MB", "12ms", "-1G"])
def test_what_is_no_budget(qcompile, words, text, tmp_path):
    done = qcompile(*words, "--max-bops", text, "-o", tmp_path / "out")
    assert done.code == 2 and f"--max-bops {text}" in done.err and "20G" in done.err


def test_a_calibration_without_counts_is_no_ground_for_it(qcompile, words, tmp_path):
    model, *rest = words
    assert qcompile("calibrate", model, *rest, "-o", tmp_path / "c.npz").code == 0
    plan = ("plan", model, "--target", "cpu", "--calibration", tmp_path / "c.npz", "--max-bops", "0.05x")
    done = qcompile(*plan, "-o", tmp_path / "p.json")
    assert done.code == 2 and "count of multiplications" in done.err and done.err.count("\n") == 1
