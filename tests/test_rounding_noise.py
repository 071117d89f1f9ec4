"""Models that magnify float32's last digits: kernels are held to what a model is held to by itself, and to no less."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest

from qcompile import report, verify
from qcompile.calib.data import Dataset, input_specs
from qcompile.core import runtime
from qcompile.core.errors import VerificationError
from qcompile.core.plan import QuantPlan
from qcompile.passes import structure
from qcompile.pipeline import untracked
from qcompile.rounding_noise import DIGITS, MODELS, nudged, rounding_noise

SCALE = np.float32(0.1)
FLOAT = "(float[1,64] x) => (float[1,64] y) { y = Mul (x, gain) }"
CODES = """(float[1,64] x) => (float[1,64] y) {
    q = QuantizeLinear (x, scale, zero) d = DequantizeLinear (q, scale, zero) y = Mul (d, gain) }"""
Build = Callable[..., ir.Model]


def built(model_of: Build, body: str) -> ir.Model:
    gain = {"gain": np.linspace(1.0, 2.0, 64, dtype=np.float32)}
    codes = {"scale": np.array(SCALE), "zero": np.array(128, np.uint8)} if "scale" in body else {}
    return model_of(body, 21, **gain, **codes)


def samples_at(offset: float) -> list[dict[str, np.ndarray]]:
    """Return numbers that lie so much of a step from codes: 1/2 is a tie."""
    codes = np.random.default_rng(0).integers(-3, 4, (3, 1, 64))
    return [{"x": ((one + offset) * float(SCALE)).astype(np.float32)} for one in codes]


def itself(model: ir.Model, feeds: list[dict[str, np.ndarray]]) -> float:
    session = runtime.Session(model, optimize=False)
    return rounding_noise(model, feeds, [session.run(one) for one in feeds])["y"]


def test_scales_are_off_in_their_last_digits_and_nothing_else_is(model_of: Build) -> None:
    model, found = built(model_of, CODES), set()
    for seed in range(MODELS):
        values = {**nudged(model, seed).graph.initializers}
        scale = structure.constant(values.pop("scale"))
        assert scale is not None and scale.dtype == np.float32
        assert abs(float(scale) / float(SCALE) - 1.0) <= DIGITS + 2.0**-24
        found.add(float(scale))
        for name, value in values.items():
            assert np.array_equal(structure.constant(value), structure.constant(model.graph.initializers[name]))
    assert len(found) > MODELS / 2 and float(SCALE) == float(structure.constant(model.graph.initializers["scale"]))


def test_ties_are_magnified_and_what_lies_on_codes_is_not(model_of: Build) -> None:
    model = built(model_of, CODES)
    assert itself(model, samples_at(0.0)) > 100.0 and itself(model, samples_at(0.25)) > 100.0
    assert 5.0 < itself(model, samples_at(0.5)) < 15.0


def test_a_model_without_codes_has_none(model_of: Build) -> None:
    assert itself(built(model_of, FLOAT), samples_at(0.5)) == math.inf


def prove(model_of: Build, offset: float, fault: float) -> verify.Proof:
    """Hold an artifact against the model whose results are off by so many steps, one up and one down."""
    model, quantized = built(model_of, FLOAT), built(model_of, CODES)
    session, signs = runtime.Session(quantized, optimize=False), np.where(np.arange(64) % 2, 1.0, -1.0)
    gain = np.linspace(1.0, 2.0, 64)

    def run(feeds: runtime.Feeds) -> runtime.Outputs:
        return {"y": (session.run(feeds)["y"] + fault * SCALE * signs * gain).astype(np.float32)}

    feeds = samples_at(offset)
    data = Dataset("samples", lambda: feeds, input_specs(model))
    return verify.prove(model, model, quantized, QuantPlan(), lambda: run, data, untracked)


def test_kernels_may_be_as_far_away_as_the_model_is_from_itself(model_of: Build) -> None:
    """Whichever way ties are rounded is as good: what comes in lies in the middle of two codes."""
    proof = prove(model_of, 0.5, 0.7)
    assert proof.rounding.worst("sqnr") < 15.0 and proof.magnified["y"] < 15.0
    [warning] = report._magnified(proof)
    assert warning.startswith("Output 'y' magnifies float32's last digits: scales off by 1e-6 move it to ")


def test_kernels_that_compute_what_the_model_says_are_not_warned_of(model_of: Build) -> None:
    proof = prove(model_of, 0.5, 0.0)
    assert not proof.magnified and not report._magnified(proof)


@pytest.mark.parametrize(("offset", "fault"), [(0.0, 2.0), (0.25, 2.0), (0.5, 4.0), (0.25, math.nan), (0.5, math.nan)])
def test_a_fault_that_is_larger_stops_the_compile(model_of: Build, offset: float, fault: float) -> None:
    with pytest.raises(VerificationError, match="the runtime's kernels do not compute what the model says"):
        prove(model_of, offset, fault)


def prove_unlucky(model_of: Build, steps: float, further: int) -> verify.Proof:
    """Hold kernels with codes between the model's, so many steps apart, on a sample that lies on the model's."""
    model, quantized, gain = built(model_of, FLOAT), built(model_of, CODES), np.linspace(1.0, 2.0, 64)
    width, random = steps * SCALE, np.random.default_rng(1)

    def run(feeds: runtime.Feeds) -> runtime.Outputs:
        return {"y": ((np.floor(feeds["x"] / width) + 0.5) * width * gain).astype(np.float32)}

    more = [{"x": random.uniform(-0.3, 0.3, (1, 64)).astype(np.float32)} for _ in range(further)]
    data = Dataset("samples", lambda: samples_at(0.0)[:1], input_specs(model))
    return verify.prove(model, model, quantized, QuantPlan(), lambda: run, data, untracked, further=more)


def test_one_sample_is_too_few_to_tell_a_fault_from_another_draw_of_the_same_noise(model_of: Build) -> None:
    with pytest.raises(VerificationError, match="the runtime's kernels do not compute what the model says"):
        prove_unlucky(model_of, 1.0, 0)
    proof = prove_unlucky(model_of, 1.0, 16)
    assert not proof.magnified
    # What a user is told of stays that of the samples given.
    assert proof.fidelity.outputs["y"].signal < proof.inspected.outputs["y"].signal


def test_more_samples_do_not_hide_a_fault(model_of: Build) -> None:
    with pytest.raises(VerificationError, match="the runtime's kernels do not compute what the model says"):
        prove_unlucky(model_of, 2.0, 16)
