from __future__ import annotations

import numpy as np
import onnx.parser
import onnx_ir as ir
import pytest

from qcompile.calib.collect import collect_channels
from qcompile.calib.data import Dataset, input_specs
from qcompile.calib.observers import Histogram, Observer, value_range
from qcompile.calib.outliers import outliers
from qcompile.core import numerics
from qcompile.core.errors import DataError
from qcompile.pipeline import untracked


def setting(arrays: list[np.ndarray]) -> tuple[ir.Model, Dataset]:
    text = '<ir_version: 10, opset_import: ["" : 21]> f (float[1,C,N] x) => (float[1,C,N] y) { y = Neg(x) }'
    model = ir.from_proto(onnx.parser.parse_model(text))
    return model, Dataset("test", lambda: [{"x": array} for array in arrays], input_specs(model))


def channels(random: np.random.Generator, factors: list[float]) -> list[np.ndarray]:
    return [(random.standard_normal((1, len(factors), 500)) * np.float32(factors)[:, None]).astype(np.float32)
            for _ in range(4)]  # fmt: skip


@pytest.mark.parametrize("observer", Observer)
def test_each_channel_gets_the_range_that_it_would_get_alone(observer: Observer, random: np.random.Generator) -> None:
    arrays = channels(random, [1.0, 50.0, 0.1])
    model, data = setting(arrays)
    found = collect_channels(model, {"x": 1, "y": 1}, data, untracked)
    for channel in range(3):
        alone = Histogram(512)
        for array in arrays:
            alone.add(array[:, channel])
        assert value_range(found["x"][channel], observer, "uint8") == value_range(alone, observer, "uint8")
        assert (found["y"][channel].low, found["y"][channel].high) == (-alone.high, -alone.low)


def test_an_outlier_is_named_and_what_it_costs(random: np.random.Generator) -> None:
    factors = [1.0] * 15 + [100.0]
    arrays = channels(random, factors)
    model, data = setting(arrays)
    found = outliers(collect_channels(model, {"x": 1}, data, untracked)["x"], "uint8")
    assert (found.channels, found.worst) == (16, 15)
    assert found.ratio == pytest.approx(100, rel=0.2)
    x = np.concatenate(arrays, axis=2)[0]
    scale, zero_point = numerics.affine_scale(x.min(1), x.max(1), "uint8")
    each = numerics.dequantize(numerics.quantize(x, scale, zero_point, "uint8", 0), scale, zero_point, 0)
    assert found.per_channel == pytest.approx(numerics.sqnr(x, each), abs=1.0)
    assert found.per_channel >= found.per_tensor


def test_alike_channels_gain_nothing_from_scales_of_their_own(random: np.random.Generator) -> None:
    model, data = setting(channels(random, [1.0] * 8))
    found = outliers(collect_channels(model, {"x": 1}, data, untracked)["x"], "uint8")
    assert found.ratio < 1.3 and abs(found.per_channel - found.per_tensor) < 1.5


def test_dead_channels_are_no_division_by_zero() -> None:
    model, data = setting([np.float32([[[0.0], [0.0], [3.0]]])])
    found = outliers(collect_channels(model, {"x": 1}, data, untracked)["x"], "uint8")
    assert found.ratio == float("inf") and found.worst == 2


def test_what_is_not_finite_is_refused() -> None:
    model, data = setting([np.float32([[[0.0], [np.inf]]])])
    with pytest.raises(DataError, match="not finite"):
        collect_channels(model, {"y": 1}, data, untracked)
