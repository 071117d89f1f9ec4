"""Weights with one scale for an operator: channels are equalized together, unless outputs speak against it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from qcompile import equalization, equivalence, smoothing
from qcompile.backends.base import find_target
from qcompile.calib import weighing
from qcompile.calib.collect import collect
from qcompile.calib.observers import Observer
from qcompile.core import runtime
from qcompile.core.plan import How
from qcompile.decision import choose_operators
from qcompile.equalization import LEAST, at_features, measure_gains
from qcompile.equivalence import rewrite
from qcompile.job import Job
from qcompile.options import NO_COSTS, Options
from qcompile.passes import structure
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


def test_groups_together_leave_less_noise_than_each_by_its_own_rule(job: Job, canonical: ir.Model) -> None:
    smoothable = Smoothable(job, canonical, integers(job, canonical), mul=False)
    tuned = smoothable.tuned(job.evidence.calibration)
    kinds = (How.FOLD,)
    found = [noise(job, canonical, canonical)]
    for candidate in (Candidate(kinds), Candidate(kinds, together=True)):
        model = smoothing.Smooth(smoothable.factors(tuned, candidate))(canonical.clone()).model
        found.append(noise(job, canonical, model))
    plain, own, together = found
    assert together < 0.5 * plain and together < own


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
    spoilt = lambda _, count, __: np.r_[0.0, random.integers(-24, 25, count) / 8]  # noqa: E731
    monkeypatch.setattr(equalization, "equalized_log2", spoilt)
    monkeypatch.setattr(smoothing, "best_rule", lambda *_: None)
    _, chosen = rewrite(job, canonical)
    assert {one.how for one in chosen.smoothing.values()} == {How.NONE}


def test_a_scale_for_each_channel_leaves_it_out(job: Job, canonical: ir.Model) -> None:
    other = replace(job, target=replace(find_target("cpu")[0], costs=None))
    smoothable = Smoothable(other, canonical, integers(other, canonical), mul=False)
    assert not any(candidate.together for candidate in smoothable.candidates())
    assert all(one.together is None for one in smoothable.tuned(job.evidence.calibration))


def test_a_scale_for_each_channel_measures_no_gains(
    job: Job, canonical: ir.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[str] = []
    monkeypatch.setattr(equivalence, "measure_gains", lambda *_: measured.append("gains") or {})
    rewrite(replace(job, target=replace(job.target, per_channel=True)), canonical)
    assert not measured
    rewrite(job, canonical)
    assert measured == ["gains"]


def heard(canonical: ir.Model, rank: int) -> ir.Model:
    """Return the network with the second convolution deaf to all but one channel, by how far that one reaches."""
    copy = canonical.clone()
    first, second = (structure.input_of(node, 1) for node in [*filter(structure.is_linear, copy.graph)][:2])
    weight, reach = structure.constant(second), structure.constant(first)
    assert weight is not None and reach is not None
    only = np.arange(reach.shape[0]) == np.argsort(np.abs(reach).max(axis=(1, 2, 3)))[rank]
    second.const_value = ir.tensor(weight * only[None, :, None, None].astype(np.float32), name=second.name)
    return copy


def test_gains_are_what_noise_of_an_operator_comes_to(job: Job, canonical: ir.Model) -> None:
    """One step for all channels is little beside the farthest and much beside the nearest of them."""
    operators, data = integers(job, canonical), job.evidence.calibration
    names = [structure.node_name(node) for node in canonical.graph if structure.is_linear(node)]
    gains = measure_gains(job, canonical, operators, data)
    assert set(gains) == set(names[:3])  # the last one stands behind the features
    assert 0.3 < gains[names[2]] < 3.0  # Relu takes about as much of the noise as of the signal
    near, far = (measure_gains(job, heard(canonical, rank), operators, data)[names[0]] for rank in (0, -1))
    assert near > 10.0 and far < 1.0 and far > LEAST


def test_what_takes_too_much_work_has_no_gains(job: Job, canonical: ir.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weighing, "ALONE", 1.0)
    assert measure_gains(job, canonical, integers(job, canonical), job.evidence.calibration) == {}


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("r = Relu (x) y = Gemm (r, narrow)", ["r"]),
        ("r = Relu (x) g = Gemm (r, narrow) y = Softmax (g)", ["r"]),
        ("r = Relu (x) g = Gemm (r, narrow) n = Neg (g) y = Mul (n, two)", ["r"]),
        ("r = Relu (x) y = Gemm (r, wide)", ["y"]),
        ("y = Gemm (x, narrow)", ["y"]),
        ("g = Gemm (x, wide) r = Relu (g) y = Add (r, x)", ["y"]),
        ("r = Relu (x) y = Add (r, two)", ["y"]),
        ("r = Relu (x) y = Gemm (r, narrow) z = Gemm (r, narrow)", ["r"]),
        ("r = Relu (x) y = Gemm (r, narrow) z = Neg (x)", ["r", "z"]),
    ],
)
def test_features_are_what_the_last_product_makes_few_numbers_of(
    body: str, expected: list[str], model_of: Callable[..., ir.Model]
) -> None:
    outputs = "float[4,n] y" + (", float[4,m] z" if "z =" in body else "")
    arrays = {"narrow": np.ones((8, 2)), "wide": np.ones((8, 8)), "two": np.full(1, 2.0)}
    given = {name: array.astype(np.float32) for name, array in arrays.items() if name in body}
    model = Canonicalize(21)(model_of(f"(float[4,8] x) => ({outputs}) {{ {body} }}", 21, **given)).model
    found = [value.name for value in at_features(model).graph.outputs]
    assert found == expected
