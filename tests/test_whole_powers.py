"""Factors on a model that magnifies float32's rounding: whole powers of 2, and no fault of the pass is taken for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcompile.core.errors import VerificationError
from qcompile.core.plan import ChannelFactors, How
from qcompile.equivalence import WHOLE, Equivalences, apply, settled
from qcompile.job import Job
from qcompile.options import NO_COSTS, Options
from qcompile.passes import smooth
from qcompile.passes.canonicalize import Canonicalize
from qcompile.pipeline import untracked

#: Two products of the same values; where their weights are nearly the same, what is left is their rounding.
NETWORK = """(float[4,16] x) => (float[4,8] y) {
    a = MatMul (x, w) r = Relu (a) b = MatMul (r, v) c = MatMul (r, u) y = Sub (b, c) }"""
FINE = tuple(eighths / 8.0 for eighths in range(-8, 24))
Begin = Callable[[float], Job]


@pytest.fixture
def begin(proto_of: Callable[..., onnx.ModelProto], random: np.random.Generator, tmp_path: Path) -> Begin:
    """Return what begins a compile of the network whose two products are so far apart."""

    def begun(apart: float) -> Job:
        w, v, u = (random.standard_normal(shape) for shape in ((16, 32), (32, 8), (32, 8)))
        np.savez(tmp_path / "data.npz", x=random.standard_normal((4, 4, 16)).astype(np.float32))
        arrays = {"w": w, "v": v, "u": v + apart * u}
        proto = proto_of(NETWORK, 21, **{name: array.astype(np.float32) for name, array in arrays.items()})
        return Job.begin(proto, Options("cpu", data=str(tmp_path / "data.npz"), costs=NO_COSTS), untracked)

    return begun


def canonical_of(job: Job) -> ir.Model:
    return Canonicalize(21)(job.model.clone()).model


def chosen(canonical: ir.Model) -> Equivalences:
    """Return the network's group, with factors by eighths."""
    relu = next(node for node in canonical.graph if node.op_type == "Relu")
    return Equivalences(smoothing={str(relu.outputs[0].name): ChannelFactors(How.FOLD, FINE)})


def test_rounding_that_is_magnified_leaves_whole_powers(begin: Begin) -> None:
    job = begin(3e-5)
    canonical = canonical_of(job)
    fine = chosen(canonical)
    with pytest.raises(VerificationError, match=r"pass Smooth: moved output 'y'"):
        apply(job, canonical, fine)
    found = settled(job, canonical, fine)
    (factors,) = found.smoothing.values()
    assert factors.log2 == tuple(float(np.rint(number)) for number in FINE)
    assert factors.reason.startswith(f"{WHOLE}: finer ones moved output 'y' by")
    apply(job, canonical, found)
    step = job.pipeline.steps[-1]
    assert step.error == 0.0 and [refusal.reason for refusal in step.refusals] == [factors.reason]


def test_rounding_that_is_not_magnified_leaves_factors(begin: Begin) -> None:
    job = begin(1.0)
    canonical = canonical_of(job)
    fine = chosen(canonical)
    assert settled(job, canonical, fine) is fine
    apply(job, canonical, fine)
    assert not job.pipeline.steps[-1].refusals and job.pipeline.steps[-1].error > 0.0


def test_nothing_smoothed_is_settled(begin: Begin) -> None:
    job = begin(3e-5)
    assert settled(job, canonical_of(job), Equivalences()) == Equivalences()


@pytest.mark.parametrize("apart", [3e-5, 1.0])
def test_a_fault_of_the_pass_is_no_rounding(begin: Begin, monkeypatch: pytest.MonkeyPatch, apart: float) -> None:
    job, fold = begin(apart), smooth._fold
    canonical = canonical_of(job)
    fine = chosen(canonical)
    monkeypatch.setattr(smooth, "_fold", lambda one, factors: fold(one, factors if one.exponent > 0 else factors**2))
    assert settled(job, canonical, fine) is fine
    with pytest.raises(VerificationError, match=r"pass Smooth: moved output 'y'"):
        apply(job, canonical, fine)


@given(st.lists(st.integers(-104, 104), min_size=1, max_size=8))
def test_whole_powers_are_the_nearest_and_the_same_for_a_factor_and_its_reciprocal(eighths: list[int]) -> None:
    log2 = tuple(number / 8.0 for number in eighths)
    given_factors = {
        "fold": ChannelFactors(How.FOLD, log2),
        "inverse": ChannelFactors(How.FOLD, tuple(-number for number in log2)),
        "split": ChannelFactors(How.SPLIT, log2),
        "none": ChannelFactors(How.NONE, reason="because"),
    }
    found = Equivalences(smoothing=given_factors).in_whole_powers("coarse").smoothing
    whole = np.array(found["fold"].log2)
    assert np.all(whole == np.rint(whole)) and np.all(np.abs(whole - log2) <= 0.5)
    assert np.array_equal(found["inverse"].log2, -whole)
    assert found["fold"].reason == ("" if tuple(whole) == log2 else "coarse")
    assert found["split"] == given_factors["split"] and found["none"] == given_factors["none"]
