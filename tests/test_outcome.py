"""What candidates come to: the same however many were judged before, and nothing is measured twice for that."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from qcompile.calib.trials import Trials
from qcompile.core.plan import ChannelFactors, How
from qcompile.decision import pricer_for
from qcompile.job import Job
from qcompile.options import Options
from qcompile.outcome import Judge, halves
from qcompile.passes.canonicalize import Canonicalize
from qcompile.passes.smooth import Smooth
from qcompile.pricing import Pricer

POST_NORM = """(float[1,16,128] x) => (float[1,16,128] y) { n = LayerNormalization(x, g, b) h = MatMul(n, w)
    s = Add(h, n) m = LayerNormalization(s, g, b) k = MatMul(m, w1) y = Softmax(k) }"""


@pytest.fixture
def job(proto_of: Callable[..., onnx.ModelProto], random: np.random.Generator, tmp_path: Path) -> Job:
    weights = {name: random.normal(0, 0.1, (128, 128)).astype(np.float32) for name in ("w", "w1")}
    vectors = {name: random.uniform(0.5, 1.5, 128).astype(np.float32) for name in ("g", "b")}
    np.savez(tmp_path / "data.npz", x=random.normal(size=(8, 1, 16, 128)).astype(np.float32))
    options = Options(target="cpu", data=str(tmp_path / "data.npz"), output=tmp_path / "out")
    return Job.begin(proto_of(POST_NORM, 21, **weights, **vectors), options, lambda items, *_: items)


@pytest.fixture
def canonical(job: Job) -> ir.Model:
    return Canonicalize(21)(job.model.clone()).model


def judge_of(job: Job, canonical: ir.Model) -> Judge:
    return Judge(job, {}, pricer_for(job, canonical), *halves(job.evidence.calibration, 3))


def restored(canonical: ir.Model, log2: float) -> ir.Model:
    """Return the model with a Mul on the residual branch."""
    factors = (log2,) * 64 + (-log2,) * 64
    result = Smooth({"n": ChannelFactors(How.RESTORE, factors)})(canonical.clone())
    assert result.refusals == ()
    return result.model


def test_float_outputs_are_measured_once_and_latency_by_what_is_added(
    job: Job, canonical: ir.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    candidates: list[tuple[ir.Model, Any]] = [
        (canonical, None), (restored(canonical, 1.0), "a Mul"), (restored(canonical, 2.0), "a Mul"),
        (restored(canonical, 2.0), "another"),
    ]  # fmt: skip
    alone = [judge_of(job, canonical).outcome(model, {}, added) for model, added in candidates]
    calls: list[str] = []
    for owner, name in ((Pricer, "latency"), (Trials, "expected")):
        real = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *words, _real=real, _name=name: [calls.append(_name), _real(*words)][1])
    judge = judge_of(job, canonical)
    found = [judge.outcome(model, {}, added) for model, added in candidates]
    # The float outputs, the canonical model's latency, and that of both ways to add nodes.
    assert sorted(calls) == ["expected", "latency", "latency", "latency"]
    assert found == alone, "powers of two change no digit in float"
    assert found[0].error.value != found[2].error.value and found[2].cost == found[3].cost
