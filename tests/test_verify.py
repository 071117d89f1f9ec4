"""Verification must be able to fail: planted errors of every kind are seen."""

from __future__ import annotations

import numpy as np
import pytest

from qcompile import verify
from qcompile.core.contract import Effect
from qcompile.core.errors import BudgetError, VerificationError
from qcompile.fidelity import PIECE, Comparison, Fidelity
from qcompile.verify import Proof

Y = np.float32([[1.0, -2.0, 3.0, 0.5]])


def checked(effect: Effect, after: np.ndarray, before: np.ndarray = Y) -> float:
    return verify.check_equivalence("Planted", effect, [{"y": before}], [{"y": after}])


@pytest.mark.parametrize("effect", list(Effect))
@pytest.mark.parametrize("after", [Y[:, :3], Y.astype(np.float64), np.full_like(Y, np.nan), np.full_like(Y, np.inf)])
def test_another_shape_type_or_a_number_that_is_not_finite(effect: Effect, after: np.ndarray) -> None:
    with pytest.raises(VerificationError, match="pass Planted"):
        checked(effect, after)


def test_each_effect_has_its_bound() -> None:
    one_ulp = np.nextafter(Y, np.float32(9))
    assert checked(Effect.EXACT, Y.copy()) == 0.0
    with pytest.raises(VerificationError):
        checked(Effect.EXACT, one_ulp)
    assert 0 < checked(Effect.CLOSE, one_ulp) < 1e-6
    with pytest.raises(VerificationError, match=r"more than 0\.0001"):
        checked(Effect.CLOSE, Y + np.float32(4e-4))
    assert checked(Effect.LOSSY, Y * np.float32(0.5)) > 0.1
    with pytest.raises(VerificationError, match="further from float's than zeros"):
        checked(Effect.LOSSY, -Y)


def test_an_output_that_is_missing() -> None:
    with pytest.raises(VerificationError, match="changed the outputs"):
        verify.check_equivalence("Planted", Effect.LOSSY, [{"y": Y}], [{"z": Y}])


def test_whole_numbers_are_equal_or_not() -> None:
    with pytest.raises(VerificationError):
        checked(Effect.CLOSE, np.int64([1, 2]), np.int64([1, 3]))


def compared(candidate: np.ndarray, reference: np.ndarray = Y) -> Fidelity:
    fidelity = Fidelity()
    fidelity.add({"y": reference}, {"y": candidate})
    return fidelity


@pytest.mark.parametrize("candidate", [Y * np.nan, np.where(Y > 2, np.inf, Y).astype(np.float32)])
def test_a_candidate_that_is_not_finite_is_never_exact(candidate: np.ndarray) -> None:
    measures = compared(candidate).outputs["y"].measures()
    assert not measures["exact"] and measures["sqnr"] is None
    assert compared(candidate).worst("sqnr") == -np.inf


def test_what_is_infinite_in_both_counts_as_equal() -> None:
    mask = np.float32([[0.0, -np.inf, 1.0, -np.inf]])
    assert compared(mask.copy(), mask).outputs["y"].measures()["exact"]


def test_noise_where_float_is_zero_passes_no_bound() -> None:
    proof = Proof(lambda feeds: {}, fidelity=compared(np.ones_like(Y), np.zeros_like(Y)))
    with pytest.raises(BudgetError, match="sqnr is -inf"):
        proof.require({"sqnr": 1.0})


def test_a_bound_without_meaning_is_an_error() -> None:
    images = np.ones((1, 2, 2), np.float32)
    with pytest.raises(BudgetError, match="top1 has no meaning"):
        Proof(lambda feeds: {}, fidelity=compared(images * 2, images)).require({"top1": 0.5})


def test_indices_have_a_share_of_equals_instead_of_a_ratio() -> None:
    fidelity = compared(np.int64([[1, 2, 3, 9]]), np.int64([[1, 2, 3, 4]]))
    assert fidelity.outputs["y"].measures()["equal"] == 0.75
    assert fidelity.worst("sqnr") == np.inf


def test_kernels_that_add_more_than_quantization_did() -> None:
    noisy = Y + np.float32([[0.5, -0.5, 0.5, -0.5]])
    exact, moved = compared(Y * np.float32(1.001)), compared(noisy)
    with pytest.raises(VerificationError, match=r"dB from the QDQ model and .* dB from float"):
        Proof(lambda feeds: {}, quantization=exact, rounding=moved, inspected=moved).require_faithful_kernels()


def test_an_artifact_that_is_nan_where_the_model_is_not_stops_the_compile() -> None:
    broken = compared(np.full_like(Y, np.nan))
    with pytest.raises(VerificationError, match="-inf dB from the QDQ model and -inf dB from float"):
        Proof(lambda feeds: {}, quantization=compared(Y), rounding=broken, inspected=broken).require_faithful_kernels()


def test_kernels_may_draw_other_noise_of_the_same_power() -> None:
    one, other = (Y + np.float32([[0.5, -0.5, 0.5, -0.5]]) * sign for sign in (1.0, -1.0))
    draws = {"quantization": compared(one), "rounding": compared(other, one), "inspected": compared(other)}
    Proof(lambda feeds: {}, **draws).require_faithful_kernels()


def test_measures_against_their_definitions() -> None:
    random = np.random.default_rng(3)
    samples = [(y, y + random.normal(scale=0.1, size=(1, 8))) for y in random.normal(size=(5, 1, 8))]
    comparison = Comparison()
    for y, z in samples:
        comparison.add(y, z)
    y, z = (np.concatenate(part) for part in zip(*samples, strict=True))
    measures = comparison.measures()
    assert measures["sqnr"] == pytest.approx(10 * np.log10((y**2).sum() / ((y - z) ** 2).sum()), abs=1e-3)
    cosine = [(a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum()) for a, b in zip(y, z, strict=True)]
    assert measures["cosine"] == pytest.approx(np.mean(cosine), abs=1e-6)
    assert measures["relative_error"] == pytest.approx(np.abs(y - z).max() / np.abs(y).max(), abs=1e-6)
    assert measures["top1"] == np.mean(y.argmax(1) == z.argmax(1))


@pytest.mark.parametrize("places", [[], [5], [PIECE + 3, 3 * PIECE + 1]])
@pytest.mark.parametrize("alike", [True, False])
def test_large_tensors_are_compared_as_small_ones_are(places, alike):
    random = np.random.default_rng(0)
    y = random.normal(size=(3 * PIECE + 7,)).astype(np.float32)
    z = y + random.normal(size=y.size).astype(np.float32) / 100
    y[places], z[places] = np.inf, (np.inf if alike else np.nan)
    found = Comparison()
    found.add(y, z)
    kept = np.isfinite(y)
    one, other = y[kept].astype(np.float64), z[kept].astype(np.float64)
    assert found.broken == (bool(places) and not alike)
    assert found.signal == pytest.approx(one @ one) and found.noise == pytest.approx(np.sum((one - other) ** 2))
    assert found.cosines == [pytest.approx(one @ other / np.sqrt((one @ one) * (other @ other)), abs=1e-12)]
    assert (found.largest, found.peak) == (np.abs(one - other).max(), np.abs(one).max())
