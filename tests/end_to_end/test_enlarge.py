"""Samples made of a few: said, the same bytes stage by stage, nothing judged on them."""

from __future__ import annotations

import numpy as np
import pytest
from end_to_end.outcomes import report, stages_agree

from qcompile import compensation, decision
from qcompile.calib.trials import Trials


def test_it_is_said_and_noted(qcompile, small, tmp_path):
    words = (small.model, "--target", "cpu", "--data", small.data, "--eval", small.data, "--json")
    content = report(qcompile(*words, "--enlarge", "40", "-o", tmp_path / "more"))
    assert content["data"]["caveat"] == "Calibrated on 8 samples and on 32 that were made of them."
    assert content["options"]["enlarge"] == 40
    enough = report(qcompile(*words, "--enlarge", "8", "-o", tmp_path / "enough"))
    without = report(qcompile(*words, "-o", tmp_path / "without"))
    assert enough["data"]["caveat"] is None
    model = (tmp_path / "without/model.onnx").read_bytes()
    assert (tmp_path / "enough/model.onnx").read_bytes() == model != (tmp_path / "more/model.onnx").read_bytes()
    assert enough["data"]["sha256"] == without["data"]["sha256"]


def test_ranges_are_of_made_samples_too_and_nothing_is_judged_on_them(qcompile, small, tmp_path, monkeypatch):
    real = {array.tobytes() for array in small.samples}
    collect, losses, together = decision.collect, compensation.losses, Trials.together
    measured, judged = [], []

    def collecting(model, names, data, *rest):
        measured.extend(feeds["x"].tobytes() in real for feeds in data)
        return collect(model, names, data, *rest)

    def losing(reference, candidates, data, *rest):
        judged.extend(feeds["x"].tobytes() in real for feeds in data)
        return losses(reference, candidates, data, *rest)

    def trying(self, samples, *rest):
        judged.extend(feeds["x"].tobytes() in real for feeds in samples)
        return together(self, samples, *rest)

    monkeypatch.setattr(decision, "collect", collecting)
    monkeypatch.setattr(compensation, "losses", losing)
    monkeypatch.setattr(Trials, "together", trying)
    words = (small.model, "--target", "cpu", "--data", small.data, "--eval", small.data, "--enlarge", "24")
    assert qcompile(*words, "-o", tmp_path / "out").code == 0
    assert (measured.count(True), measured.count(False)) == (8, 16)
    assert judged and all(judged)


def test_the_stages_agree_with_one_compile(qcompile, small, tmp_path):
    stages_agree(qcompile, small.model, small.data, tmp_path, "--enlarge", "32")


@pytest.mark.parametrize(("count", "fact"), [
    ("0", "is not a number of samples"), ("65", "is not a number of samples"), ("9", "nothing to make samples of"),
])  # fmt: skip
def test_what_cannot_be_made_is_refused(count, fact, qcompile, small, tmp_path):
    done = qcompile(small.model, "--target", "cpu", "--enlarge", count, "-o", tmp_path / "out")
    assert done.code == 2 and fact in done.err and not (tmp_path / "out").exists()


def test_what_is_neither_text_nor_picture_is_refused(qcompile, small, tmp_path):
    model = small.folder / "small.onnx"
    proto = small.proto
    proto.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 8
    small.save(proto)
    data = small.feed(x=np.zeros((2, 1, 8, 8, 8), "f4"))
    done = qcompile(model, "--target", "cpu", "--data", data, "--enlarge", "9", "-o", tmp_path / "out")
    assert done.code == 2 and "neither (x float32[1,8,8,8])" in done.err
