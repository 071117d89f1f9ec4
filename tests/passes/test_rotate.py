from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcompile.core import model as models
from qcompile.core import numerics, runtime, validate
from qcompile.core.contract import Refusal, Rewritten
from qcompile.core.execution import execute
from qcompile.core.orthogonal import Orthogonal
from qcompile.core.rotation import Place, Rotation, Site
from qcompile.passes.canonicalize import Canonicalize
from qcompile.passes.rotate import Rotate, spread_evenly
from qcompile.passes.rotations import rotatable
from qcompile.passes.structure import constant, is_standard

EXPORTS = Path(__file__).parent / "exports"
Array = np.ndarray[Any, np.dtype[Any]]


def load(name: str) -> ir.Model:
    model = models.load(EXPORTS / f"{name}.onnx")
    Canonicalize(21)(model)
    return model


def weights(model: ir.Model) -> dict[str, Array]:
    """Return the weights of every linear operator by its name."""
    found = {}
    for node in model.graph:
        array = constant(node.inputs[1]) if is_standard(node, "MatMul", "Gemm", "Conv") else None
        if array is not None:
            found[str(node.name)] = array
    return found


def error(model: ir.Model, rotated: ir.Model) -> float:
    """Return the largest relative error of the outputs over three random inputs."""
    validate.check_model(rotated, "rotated")
    errors = []
    for seed in range(3):
        feeds = runtime.synthetic_feeds(model, seed, open_axis=2)
        before, after = (runtime.Session(x, optimize=False).run(feeds) for x in (model, rotated))
        errors += [numerics.relative_error(before[name], after[name]) for name in before]
        assert all(np.ptp(array) > 1e-3 for array in before.values()), "a constant output proves nothing"
    return max(errors)


def rotated(model: ir.Model, *sites: Site, seed: int = 3) -> tuple[ir.Model, Rewritten]:
    copy, places = model.clone(), rotatable(model.graph).places
    before = models.serialize(model)
    result = Rotate(spread_evenly((place for place in places if place.site in sites), seed))(copy)
    assert models.serialize(model) == before, "what copies share stays as it was"
    assert isinstance(result, Rewritten)
    return copy, result


@pytest.mark.parametrize("exporter", ["script14", "dynamo20"])
@pytest.mark.parametrize("name", ["pre_norm", "llama", "vit", "bottlenecks"])
def test_streams(name: str, exporter: str) -> None:
    """LayerNorm and RMSNorm with γ and β, a class token, positions, tables, Convs: one function, as few nodes."""
    model = load(f"{name}.{exporter}")
    result, told = rotated(model, Site.STREAM)
    assert error(model, result) < 1e-5
    assert told.modified and told.refusals == () and told.notes == ()
    # A norm of several nodes keeps them, γ or not: without, the runtime would not run it as one kernel.
    assert [node.op_type for node in result.graph] == [node.op_type for node in model.graph]
    feeds = runtime.synthetic_feeds(model, 1, open_axis=4)
    kernels = [[[kernel.op_type for kernel in run] for run in execute(m, [feeds])] for m in (model, result)]
    assert [sorted(run) for run in kernels[0]] == [sorted(run) for run in kernels[1]]
    old, new = weights(model), weights(result)
    changed = {name for name in old if not np.allclose(old[name], new[name], atol=1e-3)}
    around = {"pre_norm": 7, "vit": 6, "llama": 8, "bottlenecks": 6}
    assert len(changed) == around[name], "all operators around a stream, and no other"


@pytest.mark.parametrize(
    "name",
    ["mha_by_hand.script17", "mha_by_hand.dynamo18", "mha_fused.script11", "mha_fused.dynamo18", "mha_module.script14",
     "sdpa.script17", "sdpa.dynamo20", "gqa_rope.script17", "gqa_rope.dynamo18", "post_norm.script14"],
)  # fmt: skip
def test_values_of_attentions(name: str) -> None:
    """Separate and fused projections with biases, heads that share values, exports of every kind."""
    model = load(name)
    result, told = rotated(model, Site.VALUES)
    assert error(model, result) < 1e-5
    assert told.modified and told.refusals == () and len(result.graph) == len(model.graph)
    old, new = weights(model), weights(result)
    changed = [name for name in old if not np.allclose(old[name], new[name], atol=1e-3)]
    assert len(changed) == 2, "the values' projection and the output operator"


def test_a_matrix_for_each_head() -> None:
    model = load("gqa_rope.script17")
    [place] = rotatable(model.graph).places
    assert (place.site, place.width, place.copies) == (Site.VALUES, 4, 2)
    each = tuple(Orthogonal.spreading(4, seed) for seed in (1, 2))
    result = Rotate((Rotation(place, each),))(model.clone()).model
    assert error(model, result) < 1e-5
    old, new = weights(model), weights(result)
    [name] = [name for name in old if old[name].shape == (16, 8) and not np.array_equal(old[name], new[name])]
    for head, matrix in enumerate(each):
        part = slice(4 * head, 4 * head + 4)
        np.testing.assert_allclose(new[name][:, part], old[name][:, part] @ matrix.matrix(), atol=1e-6)


@pytest.mark.parametrize("name", ["pre_norm.script14", "llama.dynamo20", "vit.script14"])
def test_streams_and_values_together_twice(name: str) -> None:
    """What was rotated can be rotated again: the structure is what it was."""
    model = load(name)
    once, _ = rotated(model, Site.STREAM, Site.VALUES)
    twice, told = rotated(once, Site.STREAM, Site.VALUES, seed=9)
    assert told.modified and told.refusals == ()
    assert error(model, twice) < 1e-5


def test_norms_lose_their_factors() -> None:
    result, _ = rotated(load("vit.script14"), Site.STREAM)
    given = [constant(x) for node in result.graph if node.op_type == "Mul" for x in node.inputs]
    assert sum(array is not None and array.size > 1 and bool(np.all(array == 1.0)) for array in given) == 3
    result, _ = rotated(load("vit.dynamo20"), Site.STREAM)
    norms = [node for node in result.graph if node.op_type == "LayerNormalization"]
    assert len(norms) == 3
    for node in norms:
        np.testing.assert_array_equal(constant(node.inputs[1]), 1.0)
        np.testing.assert_array_equal(constant(node.inputs[2]), 0.0)


STREAM = """(float[B,3,8] x) => (float[B,3,K] y) {
    e = MatMul (x, we)
    n = LayerNormalization (e, gamma, beta) b = MatMul (n, wb) %s
    o = Add (c, e) y = MatMul (o, wo)
}"""


@pytest.fixture
def stream_of(model_of: Callable[..., ir.Model], random: np.random.Generator) -> Callable[..., ir.Model]:
    """Build a pre-norm stream; γ, β and biases are drawn, names that begin with w are weights `[8, 8]`."""

    def stream_of(nodes: str = "c = Identity (b)", text: str = STREAM, **others: Array) -> ir.Model:
        text = text % nodes if "%s" in text else text
        words = text.replace(",", " ").replace(")", " ").replace("(", " ").split()
        given = {w: random.normal(size=(8, 8)) for w in words if w.startswith("w")}
        given |= {"gamma": random.normal(size=8) + 2, "beta": random.normal(size=8)}
        given |= {w: random.normal(size=8) for w in words if w.startswith("bias")}
        used = {name: np.asarray(array, np.float32) for name, array in given.items() if name in words}
        model = model_of(text, 17, **used | others)
        Canonicalize(21)(model)
        return model

    return stream_of


def test_a_shift_without_a_bias_behind_stays_in_the_norm(stream_of: Callable[..., ir.Model]) -> None:
    model = stream_of()
    result, told = rotated(model, Site.STREAM)
    assert told.modified and error(model, result) < 1e-5
    assert [node.op_type for node in result.graph] == [node.op_type for node in model.graph]
    [norm] = [node for node in result.graph if node.op_type == "LayerNormalization"]
    beta = constant(norm.inputs[2])
    assert beta is not None and np.abs(beta).max() > 0.01


def test_a_shift_goes_into_the_bias_behind(stream_of: Callable[..., ir.Model]) -> None:
    model = stream_of("c = Add (b, bias)")
    result, told = rotated(model, Site.STREAM)
    assert told.modified and error(model, result) < 1e-5
    [norm] = [node for node in result.graph if node.op_type == "LayerNormalization"]
    np.testing.assert_array_equal(constant(norm.inputs[2]), 0.0)


def test_a_factor_of_zero_is_no_obstacle_where_a_bias_takes_the_shift(stream_of: Callable[..., ir.Model]) -> None:
    model = stream_of("c = Add (b, bias)", gamma=np.float32([0, 1, 2, 3, 4, 5, 6, 7]))
    result, told = rotated(model, Site.STREAM)
    assert told.modified and error(model, result) < 1e-5


def test_a_norm_in_another_layout(model_of: Callable[..., ir.Model], random: np.random.Generator) -> None:
    """ConvNeXt has its LayerNorm over the channels of images, and reads them by convolutions."""
    text = """(float[1,4,6,6] x) => (float[1,4,6,6] y) {
        e = Conv (x, p)
        mean = ReduceMean <keepdims = 1> (e, axes) d = Sub (e, mean) q = Mul (d, d)
        v = ReduceMean <keepdims = 1> (q, axes) ve = Add (v, eps) root = Sqrt (ve) z = Div (d, root)
        g = Mul (z, gamma) n = Add (g, beta)
        b = Conv <pads = [1,1,1,1]> (n, k, bias) o = Add (b, e) y = Conv (o, last)
    }"""
    given = {
        "p": (4, 4, 1, 1),
        "k": (4, 4, 3, 3),
        "last": (4, 4, 1, 1),
        "gamma": (4, 1, 1),
        "beta": (4, 1, 1),
        "bias": 4,
    }
    arrays = {name: random.normal(size=shape).astype(np.float32) for name, shape in given.items()}
    model = model_of(text, 18, axes=np.int64([1]), eps=np.float32(1e-5), **arrays)
    Canonicalize(21)(model)
    result, told = rotated(model, Site.STREAM)
    assert told.modified and told.refusals == ()
    # β cannot go into the bias, which zero padding would be short of: it stays in the norm.
    assert error(model, result) < 1e-5
    [scaled] = [node for node in result.graph if node.outputs[0].name == "g"]
    np.testing.assert_array_equal(constant(scaled.inputs[1]), 1.0)


def test_a_layer_scale_that_folded_is_no_obstacle(stream_of: Callable[..., ir.Model]) -> None:
    model = stream_of("d = Add (b, bias) c = Mul (d, bias2)")
    result, told = rotated(model, Site.STREAM)
    assert told.modified and error(model, result) < 1e-5 and len(result.graph) == len(model.graph)


TIED = """(int64[B,T] x) => (float[B,T,64] y) {
    e = Gather (table, x)
    n = LayerNormalization (e, gamma) b = MatMul (n, wb) o = Add (b, e)
    f = LayerNormalization (o, gamma) r = Reshape (f, rows) l = Gemm <transB = 1> (r, table)
    y = Reshape (l, tokens)
}"""


def test_tied_weights_are_untied_with_a_note(stream_of: Callable[..., ir.Model], random: np.random.Generator) -> None:
    table = random.normal(size=(64, 8)).astype(np.float32)
    model = stream_of(text=TIED, table=table, rows=np.int64([-1, 8]), tokens=np.int64([1, -1, 64]))
    result, told = rotated(model, Site.STREAM)
    assert told.refusals == ()
    assert told.notes == ("rotation makes the float model 0.0 MB larger: the readers of 'table' share it no more",)
    assert "table" not in result.graph.initializers
    feeds = {"x": np.arange(5)[None]}
    before, after = (runtime.Session(m, optimize=False).run(feeds)["y"] for m in (model, result))
    assert numerics.relative_error(before, after) < 1e-5


def test_weights_that_others_read_stay_theirs(stream_of: Callable[..., ir.Model]) -> None:
    text = """(float[B,3,8] x, float[B,3,8] z) => (float[B,3,8] y, float[B,3,8] other) {
        e = MatMul (x, we) b = MatMul (e, we) o = Add (b, e) s = Add (o, bias)
        y = MatMul (s, wo) r = Relu (z) t = Add (r, bias) other = MatMul (t, wo)
    }"""
    model = stream_of(text=text)
    result, told = rotated(model, Site.STREAM)
    assert told.modified and error(model, result) < 1e-5


def test_a_place_that_is_gone_is_a_refusal(stream_of: Callable[..., ir.Model]) -> None:
    model = stream_of()
    [place] = rotatable(model.graph).places
    other = Place(place.site, place.node, 4, keeps_ones=True)
    result = Rotate(spread_evenly([other]))(model.clone())
    assert isinstance(result, Rewritten) and not result.modified
    assert [refusal.node for refusal in result.refusals] == [place.node]
    with pytest.raises(ir.passes.PreconditionError, match="names node 'absent'"):
        Rotate(spread_evenly([Place(Site.STREAM, "absent", 8)]))(model.clone())


def test_nothing_is_done_where_nothing_is_asked(stream_of: Callable[..., ir.Model]) -> None:
    model = stream_of()
    refused = (Refusal("n", "why"),)
    result = Rotate(refused=refused)(model)
    assert isinstance(result, Rewritten) and not result.modified and result.refusals == refused


def test_matrices_must_fit_their_place() -> None:
    place = Place(Site.STREAM, "n", 8, keeps_ones=True)
    with pytest.raises(ValueError, match="does not fit"):
        Rotation(place, (Orthogonal.spreading(8),))
    with pytest.raises(ValueError, match="does not fit"):
        Rotation(place, (Orthogonal.spreading(4, keeps_ones=True),))
    with pytest.raises(ValueError, match="2 matrices for 1 copies"):
        Rotation(place, (Orthogonal.spreading(8, keeps_ones=True),) * 2)


def test_json_and_back() -> None:
    rotations = spread_evenly(rotatable(load("vit.script14").graph).places, 5)
    text = json.dumps([rotation.to_json() for rotation in rotations])
    assert tuple(Rotation.from_json(entry) for entry in json.loads(text)) == rotations
    assert len(text) < 600


@given(st.integers(0, 99), st.booleans(), st.sampled_from([1, 3]))
def test_the_formulas_in_float64(seed: int, centre: bool, tokens: int) -> None:
    """Writers W R, readers Rᵀ diag(γ) W and b + βW are the same block of a transformer, in NumPy alone."""
    random = np.random.default_rng(seed)
    x, a, b, c = (random.normal(size=shape) for shape in ((tokens, 6), (6, 8), (8, 8), (8, 5)))
    (gamma, beta), (bias_a, bias_b) = random.normal(size=(2, 8)), random.normal(size=(2, 8))

    def normalized(x: Array) -> Array:
        x = x - x.mean(axis=1, keepdims=True) * centre
        return x / np.sqrt((x**2).mean(axis=1, keepdims=True) + 1e-5)

    stream = x @ a + bias_a
    stream = stream + (normalized(stream) * gamma + beta) @ b + bias_b
    expected = (normalized(stream) * gamma + beta) @ c
    r = Orthogonal.spreading(8, seed, keeps_ones=centre).matrix()
    stream = x @ (a @ r) + bias_a @ r
    stream = stream + normalized(stream) @ (r.T * gamma @ b @ r) + (beta @ b + bias_b) @ r
    np.testing.assert_allclose(normalized(stream) @ (r.T * gamma @ c) + beta @ c, expected, atol=1e-10)
    # Without a bias behind it: (β / γ) R in the norm.
    kept = normalized(stream) + beta / gamma @ r
    np.testing.assert_allclose(kept @ (r.T * gamma @ c), expected, atol=1e-8)
