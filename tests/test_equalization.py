"""Weights with one scale for an operator: channels are equalized, groups in turn, unless outputs speak against it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from qcompile import smoothing
from qcompile.backends.base import find_target
from qcompile.calib.collect import collect
from qcompile.calib.observers import Observer
from qcompile.core import runtime
from qcompile.core.plan import How
from qcompile.decision import choose_operators
from qcompile.equivalence import rewrite
from qcompile.job import Job
from qcompile.options import NO_COSTS, Options
from qcompile.passes.allocate_bits import allocate_bits
from qcompile.passes.canonicalize import Canonicalize
from qcompile.passes.insert_qdq import InsertQdq
from qcompile.pipeline import untracked
from qcompile.smoothing import Candidate, Smoothable

NETWORK = """(float[1,8,12,12] x) => (float[1,6,12,12] y) {
    a = Conv <pads: ints = [1,1,1,1]> (x, w0, b0) r = Relu (a) c = Conv (r, w1, b1) s = Relu (c)
    d = Conv <pads: ints = [1,1,1,1]> (s, w2, b2) t = Relu (d) y = Conv (t, w3, b3) }"""


@pytest.fixture
def job(proto_of: Callable[..., onnx.ModelProto], random: np.random.Generator, tmp_path: Path) -> Job:
    """Build a network whose channels reach differently far, and a target with one scale for all weights."""
    shapes = {"w0": (32, 8, 3, 3), "w1": (24, 32, 1, 1), "w2": (40, 24, 3, 3), "w3": (6, 40, 1, 1)}
    arrays, before = {}, np.ones(8)
    for at, (name, shape) in enumerate(shapes.items()):
        reach = np.exp(random.normal(0, 1.2, shape[0])) if at < 3 else np.ones(shape[0])
        weight = random.normal(0, (2 / np.prod(shape[1:])) ** 0.5, shape)
        arrays[name] = weight * reach.reshape(-1, 1, 1, 1) / before.reshape(1, -1, 1, 1)
        arrays[f"b{at}"], before = random.normal(0, 0.1, shape[0]) * reach, reach
    np.savez(tmp_path / "data.npz", x=random.normal(size=(12, 1, 8, 12, 12)).astype(np.float32))
    given = {name: array.astype(np.float32) for name, array in arrays.items()}
    options = Options("cpu", data=str(tmp_path / "data.npz"), rotation="none", costs=NO_COSTS, observer="minmax")
    job = Job.begin(proto_of(NETWORK, 21, **given), options, untracked)
    return replace(job, target=replace(job.target, per_channel=False))


@pytest.fixture
def canonical(job: Job) -> ir.Model:
    return Canonicalize(21)(job.model.clone()).model


def noise(job: Job, canonical: ir.Model, model: ir.Model) -> float:
    """Return noise over signal with everything in integers, weights with one scale."""
    placement = choose_operators(model, job.target, job.options, True, {})
    statistics = collect(model, placement.activations, job.evidence.calibration, untracked)
    observers = dict.fromkeys(placement.activations, Observer.MINMAX)
    copy = model.clone()
    InsertQdq(allocate_bits(model, placement, statistics, job.target, observers))(copy)
    before, after = (runtime.Session(one, integer_kernels=False) for one in (canonical, copy))
    pairs = [(before.run(feeds)["y"], after.run(feeds)["y"]) for feeds in job.evidence.evaluation]
    return float(np.mean([np.sum((y - z) ** 2.0) / np.sum(y**2.0) for y, z in pairs]))


def integers(job: Job, canonical: ir.Model) -> frozenset[str]:
    return frozenset(choose_operators(canonical, job.target, job.options, True, {}).ops)


def test_groups_in_turn_leave_less_noise_than_each_by_its_own_rule(job: Job, canonical: ir.Model) -> None:
    smoothable = Smoothable(job, canonical, integers(job, canonical), mul=False)
    tuned = smoothable.tuned(job.evidence.calibration)
    kinds = (How.FOLD,)
    found = [noise(job, canonical, canonical)]
    for candidate in (Candidate(kinds), Candidate(kinds, in_turn=True)):
        model = smoothing.Smooth(smoothable.factors(tuned, candidate))(canonical.clone()).model
        found.append(noise(job, canonical, model))
    plain, own, in_turn = found
    assert in_turn < 0.5 * plain and in_turn < own


def test_it_is_chosen_and_exact(job: Job, canonical: ir.Model) -> None:
    model, chosen = rewrite(job, canonical)
    assert {one.how for one in chosen.smoothing.values() if one.log2} == {How.FOLD}
    assert noise(job, canonical, model) < 0.5 * noise(job, canonical, canonical)
    feeds = next(iter(job.evidence.calibration))
    before, after = (runtime.Session(one, optimize=False).run(feeds)["y"] for one in (canonical, model))
    assert np.abs(before - after).max() < 1e-5 * np.abs(before).max()
    again = rewrite(replace(job, target=job.target), canonical)[1]
    assert again.to_json() == chosen.to_json()


def test_outputs_can_speak_against_it(job: Job, canonical: ir.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    spoilt = lambda sides, _: np.r_[0.0, random.integers(-24, 25, sides.count - 1) / 8]  # noqa: E731
    monkeypatch.setattr(smoothing, "equalized_log2", spoilt)
    monkeypatch.setattr(smoothing, "best_rule", lambda *_: None)
    _, chosen = rewrite(job, canonical)
    assert {one.how for one in chosen.smoothing.values()} == {How.NONE}


def test_a_scale_for_each_channel_leaves_it_out(job: Job, canonical: ir.Model) -> None:
    other = replace(job, target=replace(find_target("cpu")[0], costs=None))
    smoothable = Smoothable(other, canonical, integers(other, canonical), mul=False)
    assert not any(candidate.in_turn for candidate in smoothable.candidates())
    assert all(one.in_turn is None for one in smoothable.tuned(job.evidence.calibration))
