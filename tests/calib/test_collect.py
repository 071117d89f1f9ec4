import dataclasses
from collections.abc import Callable, Iterable

import numpy as np
import onnx_ir as ir
import pytest

from qcompile.calib.collect import Statistics, collect
from qcompile.calib.data import Dataset, Sample, input_specs
from qcompile.calib.observers import BINS, Histogram
from qcompile.core import model as models
from qcompile.core.errors import DataError

NETWORK = """(float[1,4] x) => (float[1,3] z) {
    y = MatMul (x, w)
    r = Relu (y)
    z = Softmax (r)
}"""


@pytest.fixture
def network(model_of: Callable[..., ir.Model], random: np.random.Generator) -> ir.Model:
    return model_of(NETWORK, w=random.standard_normal((4, 3)).astype(np.float32))


def dataset(model: ir.Model, samples: list[Sample]) -> Dataset:
    return Dataset("data", lambda: samples, input_specs(model))


def quietly(items: Iterable[Sample], count: int, what: str) -> Iterable[Sample]:
    return items


def content(h: Histogram) -> tuple[object, ...]:
    return h.low, h.high, h.exponent, h.start, h.counts.tolist()


def test_statistics_are_those_of_numpy(network: ir.Model, random: np.random.Generator) -> None:
    samples = [{"x": random.standard_normal((1, 4)).astype(np.float32)} for _ in range(20)]
    statistics = collect(network, ["x", "y", "r", "z"], dataset(network, samples), quietly)
    weight = network.graph.initializers["w"].const_value
    assert weight is not None
    x = np.concatenate([sample["x"] for sample in samples])
    y = x.astype(np.float64) @ weight.numpy().astype(np.float64)
    assert statistics.samples == 20
    expected = Histogram()
    expected.add(x)
    assert content(statistics.histograms["x"]) == content(expected)
    for name, values in {"y": y, "r": np.maximum(y, 0)}.items():
        histogram = statistics.histograms[name]
        assert histogram.counts.sum() == values.size
        # float32 dot products of four numbers, against double's
        assert histogram.low == pytest.approx(values.min(), abs=1e-5)
        assert histogram.high == pytest.approx(values.max(), abs=1e-5)
        mean = np.dot(histogram.counts, histogram.centres) / values.size
        assert mean == pytest.approx(values.mean(), abs=histogram.width / 2 + 1e-5)
    assert 0 < statistics.histograms["z"].high < 1


def test_threads_change_no_histogram(network: ir.Model, random: np.random.Generator) -> None:
    samples = [{"x": random.standard_normal((1, 4)).astype(np.float32)} for _ in range(5)]
    alone, abreast = (collect(network, ["x", "y", "r"], dataset(network, samples), quietly, n) for n in (1, 3))
    assert alone.to_bytes() == abreast.to_bytes()


def test_the_model_stays_as_it_is(network: ir.Model) -> None:
    before = models.serialize(network)
    collect(network, ["y"], dataset(network, [{"x": np.ones((1, 4), np.float32)}]), quietly)
    assert models.serialize(network) == before


def test_only_what_was_asked_for_is_kept_and_its_memory_bounded(network: ir.Model) -> None:
    samples = [{"x": np.full((1, 4), 1.5**i, np.float32)} for i in range(-60, 60)]
    statistics = collect(network, ["y"], dataset(network, samples), quietly)
    assert list(statistics.histograms) == ["y"]
    assert statistics.histograms["y"].counts.size <= BINS


def test_samples_are_streamed(network: ir.Model) -> None:
    alive = 0

    class Tracked:
        def __init__(self) -> None:
            nonlocal alive
            alive += 1
            assert alive <= 2, "one sample is in use while the next is made"

        def __del__(self) -> None:
            nonlocal alive
            alive -= 1

    class Array(np.ndarray):
        tracked: Tracked

    def samples() -> Iterable[Sample]:
        for _ in range(50):
            array = np.ones((1, 4), np.float32).view(Array)
            array.tracked = Tracked()
            yield {"x": array}
            del array

    statistics = collect(network, ["y"], Dataset("data", samples, input_specs(network)), quietly)
    assert statistics.samples == 50


def test_progress_is_shown_over_all_samples(network: ir.Model) -> None:
    shown = []

    def track(items: Iterable[Sample], count: int, what: str) -> Iterable[Sample]:
        shown.append((count, what))
        return items

    collect(network, ["y"], dataset(network, [{"x": np.ones((1, 4), np.float32)}] * 3), track)
    assert shown == [(3, "calibrating")]


def test_a_sample_that_drives_a_tensor_out_of_range_is_named(model_of: Callable[..., ir.Model]) -> None:
    model = model_of("(float[2] x) => (float[2] z) { y = Exp (x) z = Sub (y, y) }")
    samples = [{"x": np.float32([0, 1])}, {"x": np.float32([0, 1000])}]
    fact = r"^data: sample 1: drives tensor 'y' of the float model to a number that is not finite; "
    with pytest.raises(DataError, match=fact):
        collect(model, ["x", "y", "z"], dataset(model, samples), quietly)
    with pytest.raises(DataError, match=r"^data: sample 1: drives tensor 'z'"):
        collect(model, ["z"], dataset(model, samples), quietly)


def test_statistics_survive_as_bytes(network: ir.Model) -> None:
    samples = [{"x": np.float32([[i, -i, 0.5, 2]])} for i in range(5)]
    statistics = collect(network, ["x", "y", "r"], dataset(network, samples), quietly)
    # A tensor of which nothing was seen, one that is always zero, names that are no identifiers.
    extra = {"empty": Histogram(), "/layer.1/ünï:0": Histogram()}
    extra["/layer.1/ünï:0"].add(np.zeros(3, np.float32))
    statistics = dataclasses.replace(statistics, histograms={**statistics.histograms, **extra})
    again = Statistics.from_bytes(statistics.to_bytes())
    assert again.samples == statistics.samples
    assert list(again.histograms) == list(statistics.histograms)
    for name, histogram in statistics.histograms.items():
        assert content(again.histograms[name]) == content(histogram)
    assert again.to_bytes() == statistics.to_bytes()


def test_no_statistics_survive_as_bytes() -> None:
    assert Statistics.from_bytes(Statistics().to_bytes()) == Statistics()


def test_a_histogram_read_back_can_go_on_counting() -> None:
    first, second = np.float32([0.3, 4.0]), np.float32([-90.0, 0.31])
    seen, whole = Histogram(), Histogram()
    seen.add(first)
    whole.add(np.concatenate([first, second]))
    again = Statistics.from_bytes(Statistics({"x": seen}, 1).to_bytes()).histograms["x"]
    again.add(second)
    assert content(again) == content(whole)
