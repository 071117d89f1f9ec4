from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict

import numpy as np
import onnx.parser
import onnx_ir as ir
import pytest

from qcompile.calib import sensitivity
from qcompile.calib.collect import collect
from qcompile.calib.data import Dataset, input_specs
from qcompile.calib.observers import Observer
from qcompile.calib.output_error import QUIET, OutputError, gain
from qcompile.calib.sections import Section, at_scores, live_values, typed
from qcompile.calib.sensitivity import DYNAMIC, OWN, Choice, choose_observers, spread
from qcompile.calib.trials import Trials
from qcompile.calib.workers import Workers
from qcompile.core import runtime


def parse(body: str, domains: str = "") -> ir.Model:
    model = ir.from_proto(onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 21{domains}]> {body}'))
    for index, node in enumerate(model.graph):
        node.name = node.name or f"node{index}"
    return model


def track(items: Iterable, count: int, what: str) -> Iterable:
    return items


def dataset(model: ir.Model, samples: list[dict[str, np.ndarray]]) -> Dataset:
    return Dataset("test", lambda: iter(samples), input_specs(model))


def weigh(
    model: ir.Model,
    names: list[str],
    samples: list[dict[str, np.ndarray]],
    threads: int = 1,
    readers: dict[str, set[str]] | None = None,
) -> Choice:
    data = dataset(model, samples)
    statistics = collect(model, names, data, track)
    return choose_observers(
        model, model, statistics, readers or {}, tuple(Observer), "uint8", data, track, Workers(threads)
    )


def choose(model: ir.Model, names: list[str], samples: list[dict[str, np.ndarray]], threads: int = 1) -> dict:
    return dict(weigh(model, names, samples, threads).observers)


def with_outliers() -> list[dict[str, np.ndarray]]:
    """Values in [0, 1], and one in a thousand at 60: clipping those makes the steps of all others much finer."""
    generator = np.random.default_rng(0)
    samples = []
    for _ in range(4):
        x = generator.uniform(0, 1, (1, 20000)).astype(np.float32)
        x[0, 0] = 60.0
        samples.append({"x": x})
    return samples


IGNORES_OUTLIERS = "y = Clip(h, zero, one)"
NEEDS_OUTLIERS = "z = Mul(h, h)"
CONSTANTS = "<float zero = {0}, float one = {1}>"


def test_outliers_are_clipped_where_the_output_ignores_them() -> None:
    model = parse(f"f (float[1,20000] x) => (float[1,20000] y) {CONSTANTS} {{ h = Identity(x) {IGNORES_OUTLIERS} }}")
    assert choose(model, ["h"], with_outliers())["h"] is not Observer.MINMAX


def test_outliers_are_kept_where_the_output_hangs_on_them() -> None:
    model = parse(f"f (float[1,20000] x) => (float[1,20000] z) {{ h = Identity(x) {NEEDS_OUTLIERS} }}")
    assert choose(model, ["h"], with_outliers()) == {"h": Observer.MINMAX}


@pytest.mark.parametrize("body", [f"{IGNORES_OUTLIERS} {NEEDS_OUTLIERS}", f"{NEEDS_OUTLIERS} {IGNORES_OUTLIERS}"])
def test_every_reader_sees_the_quantized_value(body: str) -> None:
    """Losing the outliers costs output z everything, coarse steps cost y little: only both together give minmax."""
    model = parse(
        f"f (float[1,20000] x) => (float[1,20000] y, float[1,20000] z) {CONSTANTS} {{ h = Identity(x) {body} }}"
    )
    assert choose(model, ["h"], with_outliers()) == {"h": Observer.MINMAX}


def test_inputs_and_outputs_of_the_model_are_tensors_like_others() -> None:
    model = parse("f (float[1,20000] x) => (float[1,20000] h) { h = Identity(x) }")
    # The output is the tensor itself, so the least squared error of the tensor is the least of the output.
    assert choose(model, ["x", "h"], with_outliers()) == {"x": Observer.MSE, "h": Observer.MSE}


def test_only_the_named_tensor_is_quantized(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other branch, cut off behind the tensor, carries exact float values to its output."""
    model = parse(
        f"f (float[1,20000] x) => (float[1,20000] y, float[1,20000] w) {CONSTANTS}"
        f"{{ g = Neg(x) h = Identity(x) {IGNORES_OUTLIERS} w = Mul(g, g) }}"
    )
    seen: list[float] = []
    add = OutputError.add

    def spy(self: OutputError, reference: runtime.Outputs, *candidates: runtime.Outputs) -> None:
        add(self, reference, *candidates)
        seen.extend(self.noise["w"])

    monkeypatch.setattr(OutputError, "add", spy)
    assert choose(model, ["h"], with_outliers())["h"] is not Observer.MINMAX
    assert seen and not any(seen)


def test_equal_candidates_are_run_once_and_the_last_observer_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = []
    run = Section.run
    monkeypatch.setattr(Section, "run", lambda self, values: runs.append(self) or run(self, values))
    monkeypatch.setattr(sensitivity, "REPEATS", 1)
    model = parse("f (float[1,256] x) => (float[1,256] y) { h = Identity(x) y = Relu(h) }")
    x = np.arange(256, dtype=np.float32).reshape(1, 256)  # every code exactly: no observer has a better range
    assert choose(model, ["h"], [{"x": x}]) == {"h": Observer.MSE}
    assert len(runs) == 2, "one in front of the tensor and one behind it"


def test_a_tensor_that_reaches_no_output_gets_the_last_observer() -> None:
    model = parse("f (float[1,20000] x) => (float[1,20000] y) { y = Relu(x) h = Neg(x) }")
    assert choose(model, ["h"], with_outliers()) == {"h": Observer.MSE}


def test_the_result_does_not_depend_on_threads() -> None:
    body = " ".join(f"h{i + 1} = Sigmoid(s{i}) s{i + 1} = Mul(h{i + 1}, x)" for i in range(6))
    model = parse(f"f (float[1,20000] x) => (float[1,20000] y) {{ s0 = Identity(x) {body} y = Identity(s6) }}")
    names = [f"s{i}" for i in range(7)] + [f"h{i}" for i in range(1, 7)]
    one, four = (choose(model, names, with_outliers(), threads) for threads in (1, 4))
    assert one == four and list(one) == names
    assert len(set(one.values())) > 1


def test_a_value_without_a_known_type_can_be_cut() -> None:
    model = parse(
        "f (float[1,20000] x) => (float[1,20000] y, float[1,20000] z) <float zero = {0}, float one = {1}>"
        "{ g = com.microsoft.Gelu(x) h = Identity(x) z = Mul(h, h) y = Identity(g) }",
        ', "com.microsoft" : 1',
    )
    assert ir.convenience.create_value_mapping(model.graph)["g"].dtype is None
    assert choose(model, ["h"], with_outliers()) == {"h": Observer.MINMAX}
    known = typed(model, with_outliers()[0])
    assert ir.convenience.create_value_mapping(known.graph)["g"].dtype is ir.DataType.FLOAT
    assert ir.convenience.create_value_mapping(model.graph)["g"].dtype is None


def test_only_those_that_read_codes_see_the_quantized_value() -> None:
    """What must not lose the outliers reads float values: they may be clipped."""
    model = parse(
        "f (float[1,20000] x) => (float[1,20000] y, float[1,20000] z) "
        f"{CONSTANTS} {{ h = Identity(x) {IGNORES_OUTLIERS} {NEEDS_OUTLIERS} }}"
    )
    reader = next(node for node in model.graph if node.op_type == "Clip")
    readers = {"h": {str(reader.name)}}
    assert weigh(model, ["h"], with_outliers()).observers == {"h": Observer.MINMAX}
    assert weigh(model, ["h"], with_outliers(), readers=readers).observers["h"] is not Observer.MINMAX


def test_the_choice_says_what_led_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sensitivity, "REPEATS", 1)  # an outlier that a code stands for exactly is off it in a repeat
    model = parse(
        "f (float[1,20000] x) => (float[1,20000] y, float[1,20000] z)"
        f"{CONSTANTS} {{ g = Identity(x) y = Clip(g, zero, one) h = Identity(x) {NEEDS_OUTLIERS} }}"
    )
    choice = weigh(model, ["g", "h"], with_outliers())
    assert choice.observers["g"] is not Observer.MINMAX and choice.observers["h"] is Observer.MINMAX
    for_all = {*Observer} - {Observer.DYNAMIC}
    assert set(choice.together) == {*for_all, OWN} and min(choice.together, key=choice.together.__getitem__) == OWN
    # One tensor each: quantized together they err as each does alone, on samples that are alike.
    assert sum(choice.alone.values()) == pytest.approx(choice.together[OWN], rel=0.1)


def test_ranges_are_judged_on_samples_that_they_were_not_measured_on() -> None:
    """On its own samples minmax loses none of the outliers that the output hangs on; on the others it loses all."""
    model = parse(f"f (float[1,20000] x) => (float[1,20000] z) {{ h = Identity(x) {NEEDS_OUTLIERS} }}")
    alike = weigh(model, ["h"], samples := with_outliers())
    for sample in samples[1::2]:
        sample["x"][0, 0] = 0.5
    assert alike.together["minmax"] < 1e-3 < 0.05 < weigh(model, ["h"], samples).together["minmax"]


def test_of_a_single_sample_one_observer_serves_all() -> None:
    model = parse(
        f"f (float[1,20000] x) => (float[1,20000] y) {CONSTANTS} {{ g = Mul(x, x) h = Sqrt(g) {IGNORES_OUTLIERS} }}"
    )
    assert len(set(choose(model, ["g", "h"], with_outliers()[:1]).values())) == 1


def error_of(*noise: float) -> OutputError:
    error = OutputError()
    for power in noise:
        error.add({"y": np.array([1.0, -1.0])}, {"y": np.array([1.0 + power**0.5, -1.0 - power**0.5])})
    return error


@pytest.mark.parametrize(
    ("own", "best"),
    [
        ((0.9e-3, 0.9e-3, 0.9e-3, 1e-2), OWN),  # one sample happens to do badly
        ((0.9e-3, 0.8e-3, 0.9e-3, 0.8e-3), OWN),
        ((2e-3, 2e-3, 2e-3, 1.9e-3), "mse"),
        ((0.0, 0.0, 0.0, 0.0), OWN),
        ((np.nan, 1e-9, 1e-9, 1e-9), "mse"),
    ],
)
def test_each_its_own_gives_way_to_what_is_better_by_more_than_chance(own: tuple[float, ...], best: str) -> None:
    errors = {"mse": error_of(1e-3, 1e-3, 1e-3, 1e-3), "entropy": error_of(1.0, 1.0, 1.0, 1.0), OWN: error_of(*own)}
    assert sensitivity._decide(errors) == best


def test_mse_gives_way_to_an_observer_that_is_surely_better() -> None:
    mse = error_of(1e-3, 1e-3, 1e-3, 1e-3)
    lucky, better = error_of(1.2e-3, 1.2e-3, 1.1e-3, 1e-4), error_of(0.9e-3, 0.8e-3, 0.9e-3, 0.8e-3)
    assert sensitivity._decide({"minmax": lucky, "mse": mse}) == "mse"
    assert sensitivity._decide({"minmax": better, "entropy": mse, "mse": mse, OWN: mse}) == "minmax"


def test_each_its_own_is_taken_where_every_observer_alone_fails() -> None:
    errors = {"mse": error_of(np.nan, 1.0), OWN: error_of(0.1, 0.1)}
    assert sensitivity._decide(errors) == OWN


def test_repeats_are_averaged_and_differ_by_their_roundings_alone() -> None:
    model = parse("f (float[1,200] x) => (float[1,200] y) { h = Identity(x) y = Neg(h) }")
    sample = {"x": np.random.default_rng(0).uniform(0, 1, (1, 200)).astype(np.float32)}
    trials = Trials(model, model, ["h"], "uint8", {}, sample)
    parameters = {"all": {"h": (np.asarray(1 / 255, np.float32), np.asarray(0, np.uint8))}}
    once, often = (trials.together([sample], parameters, repeats, track, 1)["all"] for repeats in (1, 8))
    assert len(once.noise["y"]) == len(often.noise["y"]) == 1
    assert once.value != often.value and often.value == pytest.approx(once.value, rel=0.1)


def test_what_samples_come_to_in_float_may_be_known() -> None:
    model = parse("f (float[1,200] x) => (float[1,200] y) { h = Identity(x) y = Neg(h) }")
    sample = {"x": np.random.default_rng(0).uniform(0, 1, (1, 200)).astype(np.float32)}
    trials = Trials(model, model, ["h"], "uint8", {}, sample)
    parameters = {"all": {"h": (np.asarray(1 / 255, np.float32), np.asarray(0, np.uint8))}}
    known, twice = trials.expected([sample]), [{"y": 2.0 * trials.expected([sample])[0]["y"]}]
    measured, given, other = (
        trials.together([sample], parameters, 1, track, 1, expected)["all"] for expected in (None, known, twice)
    )
    assert measured == given and other.value > 100.0 * given.value


def test_a_model_of_much_work_gets_one_observer_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    model = parse(f"f (float[1,20000] x) => (float[1,20000] z) {{ h = Identity(x) {NEEDS_OUTLIERS} }}")
    monkeypatch.setattr(sensitivity, "ALONE", 1.0)
    choice = weigh(model, ["h"], with_outliers())
    assert choice.observers == {"h": Observer.MINMAX}
    assert not choice.alone and set(choice.together) == set(Observer) - {Observer.DYNAMIC}


def test_errors_are_those_of_the_scores_in_front_of_a_softmax() -> None:
    model = parse("f (float[1,4] x) => (float[1,4] y, float[1,4] z) { h = Neg(x) y = Softmax(h) z = Relu(x) }")
    assert [value.name for value in at_scores(model).graph.outputs] == ["h", "z"]
    assert [value.name for value in model.graph.outputs] == ["y", "z"]


def test_the_model_is_left_as_it_is() -> None:
    model = parse("f (float[1,20000] x) => (float[1,20000] y) { h = Identity(x) y = Relu(h) }")
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    choose(model, ["x", "h", "y"], with_outliers())
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before


def test_output_error_sums_outputs_each_relative_to_its_signal() -> None:
    error = OutputError()
    error.add({"a": np.array([3.0, 4.0]), "b": np.array([100.0])}, {"a": np.array([3.0, 5.0]), "b": np.array([90.0])})
    assert error.value == pytest.approx(1 / 25 + 100 / 10000, rel=2 * QUIET)


def test_output_error_lets_each_sample_count_alike() -> None:
    error = OutputError()
    for noise in (1e-4, 1e-4, 1e2):
        error.add({"y": np.array([1.0, -1.0])}, {"y": np.array([1.0 + noise**0.5, -1.0 - noise**0.5])})
    assert error.value == pytest.approx(1e-2, rel=0.01)
    assert error.total == pytest.approx((1e-4 + 1e-4 + 1e2) / 3, rel=0.01)


def test_output_error_in_decibels_is_the_mean_of_what_each_sample_says() -> None:
    error = error_of(1e-4, 1e-3, 1e-2)
    assert error.decibels == pytest.approx([40.0, 30.0, 20.0], abs=0.02)
    two = OutputError()
    for noise in (1e-4, 1e-2):
        two.add({"a": np.ones(2), "b": np.ones(2)}, {"a": np.ones(2) + noise**0.5, "b": np.ones(2) + 0.01})
    assert two.decibels.mean() == pytest.approx(-10 * np.log10(two.value))
    assert two.decibels[0] > two.decibels[1]


def test_the_gain_between_errors_is_paired_by_sample() -> None:
    better, uncertain = gain(error_of(1e-5, 1e-3, 1e-1), error_of(2e-5, 2e-3, 2e-1))
    assert better == pytest.approx(10 * np.log10(2), abs=0.01) and uncertain < 0.01
    better, uncertain = gain(error_of(1e-5, 1e-3, 1e-1), error_of(2e-1, 2e-3, 2e-5))
    assert better == pytest.approx(10 * np.log10(2), abs=0.1) and uncertain > 10
    assert gain(error_of(1e-3), error_of(1e-2))[1] == np.inf


def test_an_output_error_over_both_samples() -> None:
    joined = error_of(1e-4) + error_of(1e-2)
    assert joined.value == pytest.approx(error_of(1e-4, 1e-2).value)
    assert joined.noise["y"] == pytest.approx([1e-4, 1e-2])


def test_output_error_judges_a_silent_sample_by_the_others() -> None:
    error = OutputError()
    error.add({"y": np.array([0.0, 0.0])}, {"y": np.array([0.0, 0.001])})
    error.add({"y": np.array([1.0, 1.0])}, {"y": np.array([1.0, 1.001])})
    assert 0 < error.value < 1e-3


@pytest.mark.parametrize(
    ("reference", "candidate", "value"),
    [
        ([1.0, -np.inf], [1.0, -np.inf], 0.0),
        ([1.0, 2.0], [1.0, np.nan], np.inf),
        ([0.0, 0.0], [0.0, 0.1], np.inf),
        ([0.0, 0.0], [0.0, 0.0], 0.0),
    ],
)
def test_output_error_at_the_edges(reference: list[float], candidate: list[float], value: float) -> None:
    error = OutputError()
    error.add({"y": np.array(reference)}, {"y": np.array(candidate)})
    assert error.value == error.total == value


def test_live_values_are_what_later_nodes_read_subgraphs_included() -> None:
    model = parse(
        "f (float[1] x, bool b, float[1] unread) => (float[1] y) <float[1] w = {2}>"
        "{ p = Neg(x) q = Exp(p) r = Abs(q)"
        "  y = If (b) <then_branch = t () => (float[1] s) { s = Add(p, w) }, else_branch = e () => (float[1] u)"
        "  { u = Neg(r) }> }"
    )
    graph = model.graph
    assert set(live_values(graph, 0)) == {"x", "b"}
    assert set(live_values(graph, 2)) == {"p", "q", "b"}
    assert set(live_values(graph, 2, 3)) == {"q"}
    assert set(live_values(graph, 3)) == {"p", "r", "b"}


def test_samples_are_spread_evenly_within_count_and_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    model = parse("f (float[1] x) => (float[1] y) { y = Neg(x) }")
    data = dataset(model, [{"x": np.array([i], np.float32)} for i in range(201)])
    chosen = [int(feeds["x"][0]) for feeds in spread(data, 4, 64)]
    assert len(chosen) == 64 and chosen[0] == 0 and chosen[-1] == 200
    assert set(np.diff(chosen)) <= {3, 4}
    monkeypatch.setattr(sensitivity, "MEMORY", 12)
    assert [int(feeds["x"][0]) for feeds in spread(data, 4, 64)] == [0, 100, 200]
    assert len(spread(data, 10**9, 64)) == 1


def test_a_choice_survives_json() -> None:
    model = parse("f (float[1,20000] x) => (float[1,20000] y) { h = Identity(x) y = Relu(h) }")
    choice = weigh(model, ["h", "x"], with_outliers())
    assert Choice.from_json(json.loads(json.dumps(asdict(choice)))) == choice


def test_a_range_of_each_run_serves_samples_of_different_size_if_it_is_worth_its_price() -> None:
    model = parse("f (float[1,2000] x) => (float[1,2000] y) { h = Identity(x) y = Neg(h) }")
    generator = np.random.default_rng(0)
    samples = [{"x": (10.0**size * generator.normal(size=(1, 2000))).astype(np.float32)} for size in (-2, 0) * 8]
    data = dataset(model, samples)
    statistics = collect(model, ["h"], data, track)

    def weighed(dynamic: dict[str, float]) -> Choice:
        return choose_observers(
            model, model, statistics, {}, tuple(Observer), "uint8", data, track, Workers(1), dynamic
        )

    cheap, dear, impossible = weighed({"h": 0.0}), weighed({"h": 1.0}), weighed({})
    assert cheap.dynamic == {"h"} and cheap.together[DYNAMIC] < cheap.together[OWN] / 10
    assert not dear.dynamic and dear.together[DYNAMIC] == dear.together[OWN]
    assert not impossible.dynamic and DYNAMIC not in impossible.together


def test_a_single_observer_may_be_the_dynamic_one() -> None:
    model = parse("f (float[1,2000] x) => (float[1,2000] y) { h = Identity(x) y = Neg(h) }")
    data = dataset(model, normal_samples())
    statistics = collect(model, ["h"], data, track)
    among = (Observer.DYNAMIC,)
    choice = choose_observers(model, model, statistics, {}, among, "uint8", data, track, Workers(1), {"h": 0.5})
    assert choice.dynamic == {"h"} and 0.0 < choice.alone["h"] < 1e-3


def normal_samples() -> list[dict[str, np.ndarray]]:
    return [{"x": np.random.default_rng(seed).normal(size=(1, 2000)).astype(np.float32)} for seed in range(4)]
