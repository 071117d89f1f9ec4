from __future__ import annotations

from collections.abc import Callable
from math import erf

import numpy as np
import onnx_ir as ir
import pytest

from qcompile.core import model as models
from qcompile.core import runtime
from qcompile.core.plan import ChannelFactors, How
from qcompile.passes.canonicalize import Canonicalize
from qcompile.passes.split import Split

Build = Callable[..., ir.Model]
GELU = "d = Mul(h, root) e = Erf(d) f = Add(e, one) g = Mul(h, f)"
X = "(float[B,8] x) => (float[B,4] y) "
BODY = f"{X}{{ m = MatMul(x, w) h = Add(m, b) {GELU} y = MatMul(g, v) }}"
SILU = f"{X}{{ h = Gemm(x, w, b) s = Sigmoid(h) g = Mul(h, s) y = Gemm <transB: int = 1> (g, u, c) }}"
#: Channel 3 has two more pieces, channel 0 one that is twice as steep. In BODY the ½ of GELU stands in `v`.
SPLIT = ChannelFactors(How.SPLIT, (0.0, 0.0, 1.0), channels=(3, 3, 0), high=5.0)
SHAPES = {"w": (8, 5), "b": (5,), "v": (5, 4), "u": (4, 5), "c": (4,), "k": (7, 5, 1, 1), "table": (5, 5)}


@pytest.fixture
def built(model_of: Build, random: np.random.Generator) -> Build:
    def build(text: str) -> ir.Model:
        weights = {name: random.normal(size=shape) for name, shape in SHAPES.items()}
        weights |= {"root": np.array(0.5**0.5), "one": np.array(1.0)}
        named = {name: array.astype(np.float32) for name, array in weights.items()
                 if any(f"{before}{name}{behind}" in text for before in " (" for behind in ",)")}  # fmt: skip
        model = model_of(text, 17, **named)
        Canonicalize(21)(model)
        return model

    return build


def outputs(model: ir.Model, x: np.ndarray, *more: str) -> dict[str, np.ndarray]:
    return runtime.Session(runtime.with_outputs(model, ["y", *more])).run({"x": x})


def bounded(model: ir.Model) -> str:
    [name] = [node.outputs[0].name for node in model.graph if node.op_type == "Min"]
    assert name is not None
    return name


@pytest.mark.parametrize(
    ("text", "function", "factor"),
    [(BODY, lambda t: t * (1.0 + erf(t / 2**0.5)), 2.0), (SILU, lambda t: t / (1.0 + np.exp(-t)), 1.0)],
)
def test_the_sum_is_the_formula(
    built: Build, random: np.random.Generator, text: str, function: Callable[[float], float], factor: float
) -> None:
    """In float64, by its definition: Σ min(f(c · (x - t)), T) / c, and none of what is read exceeds T."""
    model, f = built(text), np.vectorize(function)
    x = random.normal(size=(512, 8)).astype(np.float32) * 3.0
    result = Split({"g": SPLIT})(model.clone())
    assert result.modified and not result.refusals
    found = outputs(result.model, x, bounded(result.model))
    assert found[bounded(result.model)].shape == (512, 8) and found[bounded(result.model)].max() == 5.0
    h, part = np.asarray(outputs(model, x, "h")["h"], np.float64), 5.0 / factor
    pieces = np.minimum(f(h), 5.0)
    pieces[:, 3] += np.minimum(f(h[:, 3] - part), 5.0) + np.minimum(f(h[:, 3] - 2 * part), 5.0)
    pieces[:, 0] += np.minimum(f(2.0 * (h[:, 0] - part)), 5.0) / 2.0
    weights = {name: value.const_value.numpy().astype(np.float64) for name, value in model.graph.initializers.items()}
    expected = pieces @ weights["v"] if "v" in weights else pieces @ weights["u"].T + weights["c"]
    np.testing.assert_allclose(found["y"], expected, rtol=1e-4, atol=1e-4)


def test_what_is_lost_is_what_the_function_is_below_zero(built: Build) -> None:
    """At most 0.17 / c times the weights, twice that for the ½ in them; nothing where no piece begins near by."""
    model = built(BODY)
    w = model.graph.initializers["w"].const_value.numpy()
    # Only the first channel moves: all others see what is at right angles to their weights.
    direction = np.linalg.pinv(w)[0]
    x = (np.linspace(-30, 30, 4001)[:, None] * direction).astype(np.float32)
    expected = outputs(model, x, "h")
    v = np.abs(model.graph.initializers["v"].const_value.numpy())
    losses = []
    for log2 in (0.0, 1.0):
        chosen = ChannelFactors(How.SPLIT, (log2,), channels=(0,), high=40.0)
        lost = np.abs(outputs(Split({"g": chosen})(model.clone()).model, x)["y"] - expected["y"])
        inside = expected["h"][:, 0] < 25.0
        near = inside & (np.abs(expected["h"][:, 0] - 20.0) < 7.0)
        assert near.any() and (lost[inside & ~near] <= 1e-3).all()
        assert (lost[near] <= 2 * 0.17 / 2**log2 * v[0] + 1e-3).all()
        losses.append(lost[near].max())
    assert 1.9 < losses[0] / losses[1] < 2.1


def test_the_model_given_stays_as_it_was_and_a_second_time_nothing_changes(built: Build) -> None:
    model = built(BODY)
    before = models.serialize(model)
    once = Split({"g": SPLIT})(model.clone()).model
    assert models.serialize(model) == before
    again = Split({"g": SPLIT})(once.clone())
    assert [refusal.reason for refusal in again.refusals] == [
        "another operator than MatMul and Gemm with constant weights reads it"
    ]
    assert models.serialize(again.model) == models.serialize(once)


def test_all_readers_read_the_pieces_and_shared_weights_stay(built: Build, random: np.random.Generator) -> None:
    text = BODY.replace("y = MatMul(g, v)", "p = MatMul(g, v) r = MatMul(g, table) q = MatMul(r, v) y = Add(p, q)")
    model = built(text)
    x = random.normal(size=(64, 8)).astype(np.float32)
    result = Split({"g": ChannelFactors(How.SPLIT, (0.0,), channels=(2,), high=60.0)})(model.clone())
    np.testing.assert_allclose(outputs(result.model, x)["y"], outputs(model, x)["y"], rtol=1e-4, atol=1e-4)
    weights = [node.inputs[1].const_value for node in result.model.graph if node.op_type in ("MatMul", "Gemm")]
    assert sorted(tuple(weight.shape.numpy()) for weight in weights) == [(5, 4), (6, 4), (6, 5), (8, 6)]


OTHER = "it has 5 channels, not those that are to be split"
READ = "p = MatMul(g, v) z = ReduceMax <keepdims: int = 1> (%s) y = Add(p, z)"
TANH = f"{X}{{ h = MatMul(x, w) g = Tanh(h) y = MatMul(g, v) }}"
BARE = f"{X}{{ m = MatMul(x, w) {GELU.replace('h', 'm')} y = MatMul(g, v) }}"
FED = f"(float[B,5] h) => (float[B,4] y) {{ {GELU} y = MatMul(g, v) }}"
ELSE = "another operator than MatMul and Gemm with constant weights reads it"
FRONT = "others read what stands in front of the activation"


@pytest.mark.parametrize(
    ("text", "chosen", "reason"),
    [
        (TANH, SPLIT, "no activation that tends to identity makes it"),
        (BARE, SPLIT, "it has no bias of one number per channel"),
        (FED, SPLIT, "no MatMul or Gemm with constant weights makes it"),
        (BODY.replace("y = MatMul(g, v)", READ % "g"), SPLIT, ELSE),
        (BODY.replace("y)", "y, float[B,5] g)", 1), SPLIT, ELSE),
        (BODY.replace("y = MatMul(g, v)", READ % "h"), SPLIT, FRONT),
        (BODY.replace("y)", "y, float[B,5] h)", 1), SPLIT, FRONT),
        (BODY, ChannelFactors(How.SPLIT, (0.0,), channels=(5,), high=1.0), OTHER),
        (BODY, ChannelFactors(How.SPLIT, (), channels=(1,), high=1.0), OTHER),
        (BODY, ChannelFactors(How.SPLIT, (0.0,), channels=(1,)), OTHER),
        (BODY.replace("g", "other"), SPLIT, "no operator makes it"),
    ],
)
def test_what_cannot_be_split_is_refused(built: Build, text: str, chosen: ChannelFactors, reason: str) -> None:
    model = built(text)
    before = models.serialize(model)
    result = Split({"g": chosen})(model)
    assert [refusal.reason for refusal in result.refusals] == [reason]
    assert not result.modified and models.serialize(model) == before
