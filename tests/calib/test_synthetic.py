from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from qcompile.calib.collect import collect
from qcompile.calib.data import Dataset, input_specs, open_data
from qcompile.calib.moments import Moments, known_moments
from qcompile.calib.observers import Histogram
from qcompile.calib.synthetic import carried_over, derivable, propagate
from qcompile.core import model as models
from qcompile.core import runtime
from qcompile.core.errors import ModelError
from qcompile.passes.canonicalize import Canonicalize

Model = Callable[..., ir.Model]
#: Two branches whose moments are known, n and m; the input is none that noise would be.
HEAD = "{ n = Conv <pads = [1, 1, 1, 1]> (x, w) m = Conv (x, v) "


def moments_of(model: ir.Model, names: list[str], samples: list) -> dict[str, Moments]:
    """Measure what a BatchNormalization would remember."""
    session = runtime.Session(runtime.with_outputs(model, names))
    runs = [session.run(feeds) for feeds in samples]
    values = {name: np.concatenate([run[name] for run in runs]).astype(np.float64) for name in names}
    return {name: Moments(v.mean((0, 2, 3)), v.std((0, 2, 3)), 8.0) for name, v in values.items()}


def centre(histogram: Histogram) -> tuple[float, float]:
    counts, values = histogram.counts / histogram.counts.sum(), histogram.centres
    mean = float(counts @ values)
    return mean, float(np.sqrt(counts @ np.square(values - mean)))


BEHIND = {
    "Relu": "y = Relu (n)",
    "Clip": "y = Clip (n, zero, six)",
    "LeakyRelu": "y = LeakyRelu <alpha = 0.1> (n)",
    "HardSwish": "y = HardSwish (n)",
    "Sigmoid": "y = Sigmoid (n)",
    "Add": "y = Add (n, m)",
    "residual": "r = Relu (n) y = Add (n, r)",
    "gate": "g = GlobalAveragePool (n) s = Sigmoid (g) y = Mul (n, s)",
    "constant": "y = Mul (n, k)",
    "Concat": "y = Concat <axis = 1> (n, m)",
    "MaxPool": "y = MaxPool <kernel_shape = [2, 2]> (n)",
    "AveragePool": "y = AveragePool <kernel_shape = [2, 2]> (n)",
    "Pad": "y = Pad (n, pads)",
    "Transpose": "y = Transpose <perm = [0, 2, 3, 1]> (n)",
    "Reshape": "y = Reshape (n, shape)",
    "Resize": 'y = Resize <mode = "linear"> (n, , factors)',
    "Conv": "r = Relu (n) y = Conv (r, u)",
    "Gemm": "f = Flatten (n) y = Gemm (f, h)",
}


@pytest.mark.parametrize("behind", BEHIND.values(), ids=BEHIND)
def test_moments_behind_operators_are_those_of_a_real_run(model_of: Model, random: np.random.Generator, behind) -> None:
    shapes = {"w": (4, 3, 3, 3), "v": (4, 3, 1, 1), "u": (5, 4, 1, 1), "k": (1, 4, 1, 1), "h": (1024, 8)}
    arrays = {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    arrays |= {"zero": np.float32(0), "six": np.float32(6), "factors": np.array([1, 1, 2, 2], np.float32)}
    arrays |= {"pads": np.array([0, 0, 1, 1, 0, 0, 1, 1]), "shape": np.array([0, -1])}
    model = model_of(f"(float[1, 3, 16, 16] x) => (y) {HEAD} {behind} }}", 21, **arrays)
    samples = [{"x": (3 + 2 * random.normal(size=(1, 3, 16, 16))).astype(np.float32)} for _ in range(64)]
    known = moments_of(model, ["n", "m"], samples)
    assert "y" in derivable(model, known)
    guessed = propagate(model, known, ["y"]).histograms["y"]
    data = Dataset("test", lambda: iter(samples), input_specs(model))
    seen = collect(model, ["y"], data, lambda items, count, what: items).histograms["y"]
    (mean, deviation), (real_mean, real_deviation) = centre(guessed), centre(seen)
    assert abs(mean - real_mean) < 0.1 * real_deviation
    assert deviation == pytest.approx(real_deviation, rel=0.15)


def test_the_range_of_a_normalized_result_is_mean_and_reach(model_of: Model, random: np.random.Generator) -> None:
    model = model_of(
        "(float[1, 3, 16, 16] x) => (y) { n = Conv (x, w) y = Relu (n) }",
        w=random.normal(size=(2, 3, 1, 1)).astype(np.float32),
    )
    known = {"n": Moments(np.array([1.0, -2.0]), np.array([0.5, 3.0]), 8.0)}
    seen = propagate(model, known, ["n", "y"]).histograms
    assert seen["n"].low == pytest.approx(-26) and seen["n"].high == pytest.approx(22)
    assert seen["y"].low == 0.0 and seen["y"].high == pytest.approx(22)


def test_the_noise_is_the_same_each_time_and_of_the_shape_asked_for(model_of: Model) -> None:
    model = model_of('(float["N", 2, "H", "W"] x, int64[1] i) => (y, j) { y = Relu (x) j = Identity (i) }')
    known = {"x": Moments(np.zeros(1), np.ones(1), 3.5)}
    once, again = (propagate(model, known, ["x", "y"]).to_bytes() for _ in range(2))
    assert once == again
    like = {"x": np.zeros((2, 2, 5, 5), np.float32), "i": np.zeros(1, np.int64)}
    assert propagate(model, known, ["y"], like).histograms["y"].counts.sum() == 32 * 2 * 2 * 5 * 5


def test_what_is_not_finite_is_refused(model_of: Model) -> None:
    model = model_of("(float[1, 2, 8, 8] x) => (y) { l = Log (x) y = Relu (l) }")
    with pytest.raises(ModelError, match=r"'l' to a number that is not finite; calibrate on data"):
        propagate(model, {"x": Moments(np.zeros(1), np.ones(1), 3.5)}, ["l"])


# How far moments carry.

KNOWN = {"n": Moments(np.zeros(4), np.ones(4), 8.0)}


@pytest.mark.parametrize(
    "behind",
    [
        "y = Add (n, x)",
        "y = Softmax (n)",
        "y = MatMul (n, n)",
        "y = LayerNormalization (n, s)",
        "a = Conv (n, u) b = Conv (a, u) y = Conv (b, u)",
    ],
    ids=["unknown input", "Softmax", "MatMul", "LayerNormalization", "far"],
)
def test_what_does_not_follow(model_of: Model, random: np.random.Generator, behind: str) -> None:
    arrays = {"w": (4, 4, 1, 1), "u": (4, 4, 1, 1), "s": (8,)}
    constants = {name: random.normal(size=shape).astype(np.float32) for name, shape in arrays.items()}
    model = model_of(f"(float[1, 4, 8, 8] x) => (y) {{ n = Conv (x, w) {behind} }}", **constants)
    names = derivable(model, KNOWN)
    assert "n" in names and "y" not in names and "x" not in names


def test_shapes_and_indices_do_not_matter(model_of: Model, random: np.random.Generator) -> None:
    text = "(float[1, 3, 8, 8] x) => (y) { n = Conv (x, w) s = Shape (x) e = Expand (n, s) y = Relu (e) }"
    model = model_of(text, w=random.normal(size=(3, 3, 1, 1)).astype(np.float32))
    assert "y" in derivable(Canonicalize(21)(model).model, KNOWN)


def test_moments_carry_over_where_the_value_is_the_same(model_of: Model, random: np.random.Generator) -> None:
    head = "(float[1, 3, 8, 8] x) => (y) { n = Conv (x, w)"
    w = random.normal(size=(4, 3, 1, 1)).astype(np.float32)
    model, same = (model_of(head + " y = Relu (n) z = Abs (n) }", w=w) for _ in range(2))
    scaled = model_of(head + " y = Relu (n) }", w=2 * w)
    moved = model_of(head.replace("n =", "c =") + " n = Transpose <perm = [0, 3, 1, 2]> (c) y = Relu (n) }", w=w)
    gone = model_of(head.replace("n =", "c =") + " y = Relu (c) }", w=w)
    feeds = runtime.synthetic_feeds(model, 0)
    known = {"n": KNOWN["n"], "x": Moments(np.zeros(1), np.ones(1), 3.5)}
    found = [set(carried_over(known, model, other, feeds)) for other in (same, scaled, moved, gone)]
    assert found == [{"n", "x"}, {"x"}, {"x"}, {"x"}]


# The real thing.


def test_ranges_of_resnet8_are_those_of_real_pictures(root: Path) -> None:
    model = models.load(root / "models/resnet8.onnx")
    canonical = Canonicalize(21)(model.clone()).model
    data = open_data(str(root / "models/resnet8_calib.npz"), input_specs(model))
    known = carried_over(known_moments(model), model, canonical, next(iter(data)))
    normalized = [node.outputs[0].name for node in model.graph if node.op_type == "BatchNormalization"]
    assert known.keys() == {"x", *normalized} and len(normalized) == 7
    names = sorted(derivable(canonical, known))
    assert len(names) >= 20
    guessed = propagate(canonical, known, names).histograms
    seen = collect(canonical, names, data, lambda items, count, what: items).histograms
    for name in names:
        # Half a range clips outliers alone, twice it costs a bit, and half a bit more is what noise may lack.
        span = (guessed[name].high - guessed[name].low) / (seen[name].high - seen[name].low)
        assert 0.5 < span < 2**1.5, name
