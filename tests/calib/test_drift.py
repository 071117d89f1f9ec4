from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx.parser
import onnx_ir as ir
import pytest

from qcompile.calib import drift, sensitivity
from qcompile.calib.data import Dataset, input_specs
from qcompile.calib.drift import losses, measure_drift

GENERATOR_SEED = 7


def track(items: Iterable, count: int, what: str) -> Iterable:
    return items


def build(body: str, **constants: np.ndarray) -> ir.Model:
    text = f'<ir_version: 10, opset_import: ["" : 21]> {body}'
    model = ir.from_proto(onnx.parser.parse_model(text))
    names = {"c": "conv", "d": "conv2", "g": "gemm", "m": "matmul"}
    for index, node in enumerate(model.graph):
        node.name = names.get(node.outputs[0].name or "", f"node{index}")
    for name, array in constants.items():
        ir.convenience.create_value_mapping(model.graph)[name].const_value = ir.tensor(array, name=name)
    return model


def dataset(model: ir.Model, samples: list[dict[str, np.ndarray]]) -> Dataset:
    return Dataset("test", lambda: iter(samples), input_specs(model))


CONVS = """f (float[1,3,8,8] x) => (float[1,3,8,8] y)
<float[3,3,1,1] w = {0,0,0,0,0,0,0,0,0}, float[3] b = {0,0,0},
 float[3,3,1,1] v = {0,0,0,0,0,0,0,0,0}, float[3] e = {0,0,0}>
{ c = Conv(x, w, b) r = Relu(c) d = Conv(r, v, e) s = Add(d, r) y = Add(s, x) }"""


def convs(b: list[float], e: list[float]) -> ir.Model:
    generator = np.random.default_rng(GENERATOR_SEED)
    weights = {name: generator.standard_normal((3, 3, 1, 1)).astype(np.float32) for name in "wv"}
    return build(CONVS, b=np.array(b, np.float32), e=np.array(e, np.float32), **weights)


def images(count: int = 5) -> list[dict[str, np.ndarray]]:
    generator = np.random.default_rng(1)
    return [{"x": generator.standard_normal((1, 3, 8, 8)).astype(np.float32)} for _ in range(count)]


def measured(float_model: ir.Model, other: ir.Model, names: list[str], samples: list[dict]) -> dict:
    return measure_drift(float_model, other, names, dataset(float_model, samples), track)


def test_threads_change_no_drift() -> None:
    reference, other, data = convs([0, 0, 0], [0, 0, 0]), convs([0.5, -1, 0], [1, 2, 3]), images()
    names = ["conv", "conv2"]
    alone, abreast = (measure_drift(reference, other, names, dataset(reference, data), track, n) for n in (1, 3))
    assert alone == abreast


def test_a_planted_constant_error_is_recovered() -> None:
    result = measured(convs([0, 0, 0], [0, 0, 0]), convs([0.5, -1, 0], [0, 0, 0]), ["conv", "conv2"], images())
    np.testing.assert_allclose(result["conv"], [-0.5, 1, 0], atol=1e-5)


def test_later_operators_are_measured_with_the_earlier_corrected() -> None:
    """The first error reaches conv2 and two Adds; once taken back, conv2's own error is all that is left of it."""
    result = measured(convs([0, 0, 0], [0, 0, 0]), convs([0.5, -1, 0], [0, 0.25, 0]), ["conv", "conv2"], images())
    np.testing.assert_allclose(result["conv2"], [0, -0.25, 0], atol=1e-5)
    assert list(result) == ["conv", "conv2"]
    alone = measured(convs([0, 0, 0], [0, 0, 0]), convs([0.5, -1, 0], [0, 0.25, 0]), ["conv2"], images())
    assert np.abs(np.subtract(alone["conv2"], [0, -0.25, 0])).max() > 0.05


def test_order_is_the_graphs_and_no_operator_is_no_drift() -> None:
    models = convs([0, 0, 0], [0, 0, 0]), convs([1, 0, 0], [0, 0, 0])
    assert list(measured(*models, ["conv2", "conv"], images())) == ["conv", "conv2"]
    assert measured(*models, [], images()) == {}


TOKENS = """f (float[1,T,2] x) => (float[1,T,4] y) <float[2,4] w = {1,2,-3,4,-1,1,2,1}, float[4] b = {0,0,0,0}>
{ m = MatMul(x, w) y = Add(m, b) }"""
CLIPPED_TOKENS = """f (float[1,T,2] x) => (float[1,T,4] y)
<float[2,4] w = {1,2,-3,4,-1,1,2,1}, float[4] b = {0,0,0,0}, float low = {-3}, float high = {3}>
{ h = Clip(x, low, high) m = MatMul(h, w) y = Add(m, b) }"""


def tokens() -> list[dict[str, np.ndarray]]:
    """Sentences of differing length; the first token is far outside the range of the others, and gets clipped."""
    generator = np.random.default_rng(2)
    samples = []
    for length in (5, 9, 30, 14):
        x = generator.uniform(-1, 1, (1, length, 2)).astype(np.float32)
        x[0, 0] = 100.0, 70.0
        samples.append({"x": x})
    return samples


def test_a_few_clipped_tokens_do_not_decide_for_all() -> None:
    result = measured(build(TOKENS), build(CLIPPED_TOKENS), ["matmul"], tokens())
    assert np.abs(result["matmul"]).max() < 1.0
    lost = np.concatenate([(sample["x"] - np.clip(sample["x"], -3, 3))[0] for sample in tokens()])
    weights = np.array([[1, 2, -3, 4], [-1, 1, 2, 1]])
    assert np.abs((lost @ weights).mean(axis=0)).max() > 20.0  # what the plain mean would add to every token


def test_weights_of_one_channel_are_equal() -> None:
    weights = drift.position_weights(np.arange(6, dtype=np.float32).reshape(1, 1, 6), 1)
    assert np.unique(weights).size == 1 and np.isfinite(weights).all()


def test_gemm_channels_are_the_last_axis() -> None:
    body = """f (float[1,3] x) => (float[1,2] g)
    <float[3,2] w = {1,2,3,4,5,6}, float[2] b = {0,0}> { g = Gemm(x, w, b) }"""
    samples = [{"x": np.full((1, 3), value, np.float32)} for value in (1, 2, 3)]
    result = measured(build(body), build(body, b=np.array([1, -2], np.float32)), ["gemm"], samples)
    np.testing.assert_allclose(result["gemm"], [-1, 2], atol=1e-5)


def test_fewer_samples_are_held_where_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the two convolutions lie r and x: 2 · 768 bytes a sample."""
    asked: list[int] = []
    original = drift.spread

    def spy(data: Dataset, sample_bytes: int, most: float) -> list:
        asked.append(sample_bytes)
        chosen = original(data, sample_bytes, most)
        asked.append(len(chosen))
        return chosen

    monkeypatch.setattr(drift, "spread", spy)
    monkeypatch.setattr(sensitivity, "MEMORY", 4000)
    result = measured(convs([0, 0, 0], [0, 0, 0]), convs([1, 0, 0], [0, 0, 0]), ["conv", "conv2"], images(9))
    assert asked[1] == 4000 // asked[0] < 9
    np.testing.assert_allclose(result["conv"], [-1, 0, 0], atol=1e-5)


def test_fewer_samples_are_run_where_they_take_long(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[int] = []
    monkeypatch.setattr(drift, "WORK", 1.0)
    monkeypatch.setattr(drift, "_expected_means", lambda reference, stages, samples, threads: ran.append(len(samples)))
    with pytest.raises(TypeError):  # there is nothing to unpack: the samples are all that is looked at
        measured(convs([0, 0, 0], [0, 0, 0]), convs([1, 0, 0], [0, 0, 0]), ["conv"], images(9))
    assert ran == [1]


def test_losses_are_against_the_float_outputs() -> None:
    float_model, off, further = (convs([value, 0, 0], [0, 0, 0]) for value in (0.0, 0.1, 0.5))
    exact, near, far = losses(float_model, [float_model, off, further], dataset(float_model, images()), track)
    assert exact.value == 0.0 < near.value < far.value
    assert near.samples == len(images())


def test_losses_in_front_of_a_quantized_softmax_are_counted() -> None:
    """What the last Softmax reads is a DequantizeLinear's result there, under another name than in float."""
    head = "f (float[1,4] x) => (float[1,4] y)"
    scales = "<float s = {0.1}, uint8 z = {128}, float p = {0.00390625}, uint8 n = {0}>"
    quantized = (
        f"{head} {scales} {{ a = Relu(x) q = QuantizeLinear(a, s, z) d = DequantizeLinear(q, s, z) t = Softmax(d) "
        "u = QuantizeLinear(t, p, n) y = DequantizeLinear(u, p, n) }"
    )
    float_model, model = build(f"{head} {{ a = Relu(x) y = Softmax(a) }}"), build(quantized)
    samples = [{"x": np.float32([[0.33, -1.0, 2.0, 0.08]])}]
    [error] = losses(float_model, [model], dataset(float_model, samples), track)
    clipped = np.clip(np.rint(np.maximum(samples[0]["x"], 0.0) / 0.1), -128, 127) * 0.1
    wanted = np.mean((np.maximum(samples[0]["x"], 0.0) - clipped) ** 2)
    [noise] = error.noise.values()
    assert noise == [pytest.approx(wanted, rel=1e-4)]


def test_losses_have_work_of_their_own_to_be_judged_by(monkeypatch: pytest.MonkeyPatch) -> None:
    """A walk through the graph that is cut to one sample leaves more to tell whether it helped."""
    float_model, off = (convs([value, 0, 0], [0, 0, 0]) for value in (0.0, 0.1))
    monkeypatch.setattr(drift, "WORK", 1.0)
    [error] = losses(float_model, [off], dataset(float_model, images(9)), track)
    assert error.samples == 9
    monkeypatch.setattr(drift, "JUDGING", 1.0)
    [error] = losses(float_model, [off], dataset(float_model, images(9)), track)
    assert error.samples == 1
