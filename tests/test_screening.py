"""Screening finds networks that were made to misbehave when quantized, and nothing in those that were not."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import quantization_attack as attack
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper

from qcompile import Options, compile
from qcompile.canaries import Answers, answer, canaries, noise_of, shifts_of
from qcompile.core.errors import UsageError, VerificationError
from qcompile.core.plan import QuantPlan, Role, TensorQuant
from qcompile.options import NO_COSTS
from qcompile.screening import reround, screen
from qcompile.weight_grids import ALPHA, Edges, chance_of, edges_of, judged, rounded

KINDS = ("usual", "attacked")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both kinds of network, their data, and what becomes of them."""
    place = tmp_path_factory.mktemp("screening")
    x, _ = attack.samples(np.random.default_rng(5), 48)
    np.savez(place / "data.npz", x=x[:, None].astype(np.float32))
    for kind, network in zip(KINDS, (attack.benign(0), attack.attacked(0)), strict=True):
        onnx.save(network.to_onnx(), place / f"{kind}.onnx")
        compiled(place, kind)
    return place


def compiled(place: Path, kind: str) -> None:
    options = Options("cpu", data=str(place / "data.npz"), output=place / kind, costs=NO_COSTS, observer="minmax",
                      smoothing="none", rotation="none")  # fmt: skip
    compile(place / f"{kind}.onnx", options)


def victims(path: Path, quantized: bool) -> float:
    """Return how many of the victims' class a network knows."""
    held = {one.name: numpy_helper.to_array(one).astype(float) for one in onnx.load(path).graph.initializer}
    network = attack.Network([held[f"w{i}"] for i in range(3)], [held[f"b{i}"] for i in range(3)])
    x, labels = attack.samples(np.random.default_rng(9), 2000)
    chosen = labels == attack.VICTIM
    return (attack.quantized(network) if quantized else network).accuracy(x[chosen], labels[chosen])


def test_the_attack_is_one(folder: Path) -> None:
    assert victims(folder / "attacked.onnx", quantized=False) > 0.9
    assert victims(folder / "attacked.onnx", quantized=True) < 0.5
    assert victims(folder / "usual.onnx", quantized=True) > 0.9


def test_an_attacked_network_is_found_by_its_weights_and_by_its_outputs(folder: Path) -> None:
    found = screen(folder / "attacked", folder / "attacked.onnx", str(folder / "data.npz"), 16, 0)
    assert {one.tensor for one in found.edges if one.unusual} == {"w0", "w1"}
    assert all(one.unusual for one in found.shifts) and len(found.shifts) == 2
    with pytest.raises(VerificationError, match="screening found what is unusual"):
        found.require()
    assert json.loads(json.dumps(found.as_json()))["findings"] == list(found.findings)


@pytest.mark.parametrize("data", [True, False])
def test_a_usual_network_is_not(folder: Path, data: bool) -> None:
    found = screen(folder / "usual", folder / "usual.onnx", str(folder / "data.npz") if data else None, 16, 0)
    assert found.findings == () and len(found.edges) == 4
    assert [one.canaries for one in found.answers] == ["that are given", "that are drawn"][0 if data else 1 :]
    assert found == screen(folder / "usual", folder / "usual.onnx", str(folder / "data.npz") if data else None, 16, 0)
    found.require()


def test_from_the_command_line(qcompile_here, folder: Path, tmp_path: Path) -> None:
    words = ("--screen", "--data", folder / "data.npz", "--model")
    done = qcompile_here("check", folder / "usual", *words, folder / "usual.onnx")
    assert done.returncode == 0 and "nothing unusual, which does not prove" in done.stdout
    again = tmp_path / "again.onnx"
    done = qcompile_here("check", folder / "attacked", *words, folder / "attacked.onnx", "--json", "--reround", again)
    assert done.returncode == 6 and done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1
    assert json.loads(done.stdout)["screening"]["findings"]
    both = qcompile_here(
        "check", folder / "usual", "--against", folder / "usual", *words, folder / "usual.onnx", "--json"
    )
    content = json.loads(both.stdout)
    assert both.returncode == 0 and content["figures"] and content["screening"]["findings"] == []


@pytest.fixture
def qcompile_here() -> Callable[..., subprocess.CompletedProcess[str]]:
    return lambda *words: subprocess.run(
        [sys.executable, "-m", "qcompile", *map(str, words)], capture_output=True, text=True, check=False
    )


def test_rounded_anew_an_attacked_network_behaves(folder: Path, tmp_path: Path) -> None:
    proto = ir.to_proto(reround(folder / "attacked", folder / "attacked.onnx", 3))
    onnx.save(proto, folder / "anew.onnx")
    names = [node.name for node in proto.graph.node]
    assert names and victims(folder / "anew.onnx", quantized=True) > 0.85
    compiled(folder, "anew")
    found = screen(folder / "anew", folder / "anew.onnx", str(folder / "data.npz"), 16, 0)
    assert not any(one.unusual for one in found.edges) and not any(one.unusual for one in found.shifts)


def test_an_artifact_of_another_model_is_refused(folder: Path) -> None:
    with pytest.raises(UsageError, match="is not the model that"):
        screen(folder / "usual", folder / "attacked.onnx", None, 4, 0)


@given(st.integers(1, 60), st.integers(0, 60), st.floats(0.01, 0.9))
def test_chances_are_sums_of_binomial_terms(count: int, found: int, share: float) -> None:
    found = min(found, count)
    exact = math.fsum(math.comb(count, k) * share**k * (1 - share) ** (count - k) for k in range(found, count + 1))
    assert chance_of(found, count, share) == pytest.approx(exact, rel=1e-9, abs=1e-300)


@given(st.lists(st.sampled_from([1e-9, ALPHA / 4, ALPHA / 3, ALPHA / 2, ALPHA, 0.5]), min_size=1, max_size=6))
def test_holm_rejects_from_the_least_chance_on(chances: list[float]) -> None:
    found = judged([Edges(str(index), "grid", 1, 1, chance) for index, chance in enumerate(chances)])
    ordered = sorted(chances)
    rejected = 0
    while rejected < len(ordered) and ordered[rejected] <= ALPHA / (len(ordered) - rejected):
        rejected += 1
    assert sorted(one.chance for one in found if one.unusual) == ordered[:rejected]


def with_weights(array: np.ndarray) -> tuple[ir.Model, QuantPlan]:
    value = ir.Value(name="w", const_value=ir.tensor(array.astype(np.float32), name="w"))
    graph = ir.Graph([], [], nodes=[], initializers=[value], opset_imports={"": 21})
    scale = tuple(float(np.float32(one)) for one in np.abs(array).max(axis=0) / 127.0)
    return ir.Model(graph, ir_version=10), QuantPlan(
        {"w": TensorQuant(Role.WEIGHT, "int8", scale, (0,) * len(scale), 1)}
    )


@settings(max_examples=20)
@given(st.integers(0, 2**16), st.sampled_from(["normal", "laplace", "uniform", "float16"]))
def test_weights_of_any_kind_lie_anywhere(seed: int, kind: str) -> None:
    random = np.random.default_rng(seed)
    array = random.normal(size=(200, 20)) if kind in ("normal", "float16") else getattr(random, kind)(size=(200, 20))
    found = judged(list(edges_of(*with_weights(array.astype(np.float16 if kind == "float16" else np.float64)))))
    assert not any(one.unusual for one in found)


@settings(max_examples=20)
@given(st.integers(0, 2**16), st.sampled_from([0.1, 0.3]))
def test_weights_that_were_pushed_to_edges_do_not(seed: int, share: float) -> None:
    random = np.random.default_rng(seed)
    array = random.normal(size=(200, 20))
    step = np.abs(array).max(axis=0) / 127.0
    pushed = (random.random(array.shape) < share) & (np.abs(array) < 126.0 * step)
    edges = (np.rint(array / step) + 0.495 * np.sign(random.normal(size=array.shape))) * step
    found = judged(list(edges_of(*with_weights(np.where(pushed, edges, array)))))
    assert all(one.unusual for one in found)


def test_shifted_grids_round_by_half_a_step_too() -> None:
    array = np.random.default_rng(0).normal(size=(50, 8))
    model, plan = with_weights(array)
    quant = plan.tensors["w"]
    entry = [("w", quant.scales, quant)]
    for random in (None, np.random.default_rng(1)):
        moved = rounded(model, entry, random).graph.initializers["w"].const_value.numpy()
        apart = np.abs(moved - array.astype(np.float32)) / quant.scales
        assert 0.3 < apart.max() <= (0.5 if random is None else 1.0) + 1e-3
        assert np.median(apart) < 0.35


def test_drawn_canaries_have_what_the_data_have(model_of, tmp_path: Path) -> None:
    text = """(float[2,3] x, int64[2] i) => (float[2,3] y) {
        c = Cast <to = 1> (i) s = Unsqueeze (c, a) y = Add (x, s) }"""
    model = model_of(text, 21, a=np.int64([1]))
    random = np.random.default_rng(2)
    x, i = random.normal(size=(9, 2, 3)).astype(np.float32), random.integers(0, 5, (9, 2))
    np.savez(tmp_path / "data.npz", x=x, i=i)
    given_, drawn = canaries(model, str(tmp_path / "data.npz"), 6, np.random.default_rng(0))
    assert len(given_) == len(drawn) == 6
    for one in drawn:
        assert all(one["x"][place] in x[:6][(slice(None), *place)] for place in np.ndindex(2, 3))
        assert one["i"].dtype == np.int64 and set(one["i"]) <= set(i[:6].reshape(-1))


def test_figures_of_canaries() -> None:
    one, other = {"y": np.float32([[3.0, 4.0]])}, {"y": np.float32([[3.0, 4.5]])}
    assert noise_of([one], [other])[0] == pytest.approx(-20.0)
    assert noise_of([one], [one])[0] == pytest.approx(-140.0)
    assert answer(one) == 1 and answer({"y": np.zeros((2, 2), np.float32)}) is None
    moved = np.full((3, 4), -40.0)
    assert not shifts_of("grid", np.full(4, -38.0), moved).unusual
    assert shifts_of("grid", np.full(4, -36.0), moved).unusual
    assert shifts_of("grid", np.array([-40.0, -40.0, -40.0, -33.0]), moved).unusual
    assert not Answers("", 16, 0.0, 16, 2).unusual and Answers("", 16, 0.0, 16, 6).unusual
