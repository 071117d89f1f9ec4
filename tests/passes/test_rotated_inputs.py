"""What operators read behind a place that can be rotated: values, weights and what a norm goes on adding."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from qcompile.core import model as models
from qcompile.core import runtime
from qcompile.passes.canonicalize import Canonicalize
from qcompile.passes.rotated_inputs import rotated_inputs, weights_by_input
from qcompile.passes.rotations import rotatable
from qcompile.passes.structure import is_linear, node_name

Build = Callable[..., Any]
EXPORTS = Path(__file__).parent / "exports"


def load(name: str) -> ir.Model:
    model = models.load(EXPORTS / f"{name}.onnx")
    Canonicalize(21)(model)
    return model


def linear(model: ir.Model) -> set[str]:
    return {node_name(node) for node in model.graph if is_linear(node)}


@pytest.mark.parametrize("name", ["pre_norm.script14", "vit.dynamo20", "llama.dynamo20", "bottlenecks.script17"])
def test_what_readers_see(name: str) -> None:
    """Rows times weights are what the operators make, whatever norm, γ, β or layout stands between."""
    model = load(name)
    feeds = runtime.synthetic_feeds(model, 2, open_axis=2)
    found = rotatable(model.graph)
    checked = 0
    for site in (*found.streams, *found.values):
        for part in rotated_inputs(site, linear(model)):
            names = [str(part.value.name), *(str(node.outputs[0].name) for node in part.readers)]
            values = runtime.Session(runtime.with_outputs(model, names), optimize=False).run(feeds)
            rows = np.moveaxis({**feeds, **values}[names[0]], part.axis, -1).astype(np.float64)
            rows = rows.reshape(-1, rows.shape[-1])
            if part.norm is not None:
                rows = rows - rows.mean(axis=1, keepdims=True) * (part.norm.kind == "layer")
                rows /= np.sqrt((rows**2).mean(axis=1, keepdims=True) + part.norm.epsilon)
            made, at = rows[:, part.channels] @ part.weights(), 0
            for node in part.readers:
                seen = np.moveaxis(values[str(node.outputs[0].name)], part.axis, -1)
                flat = seen.reshape(-1, seen.shape[-1])
                at += flat.shape[1]
                if len(flat) == len(rows):
                    # A Gemm or Conv has its bias, a norm its β: both are constants.
                    difference = flat - made[:, at - flat.shape[1] : at]
                    assert np.ptp(difference, axis=0).max() < 1e-4 * np.ptp(flat)
                    checked += 1
    # The head of the vision transformer reads one token of several.
    assert checked == {"pre_norm": 6, "vit": 3, "llama": 7, "bottlenecks": 3}[name.partition(".")[0]]


@pytest.mark.parametrize("name", ["pre_norm.dynamo20", "llama.dynamo20"])
def test_operators_in_float_do_not_mind(name: str) -> None:
    model = load(name)
    found = rotatable(model.graph)
    sites = (*found.streams, *found.values)
    assert sites and all(rotated_inputs(site, ()) == () for site in sites)
    [kept] = [part for site in found.streams for part in rotated_inputs(site, linear(model))][:1]
    alone = node_name(kept.readers[0])
    parts = [part for site in sites for part in rotated_inputs(site, {alone})]
    assert [[node_name(node) for node in part.readers] for part in parts] == [[alone]]


@pytest.mark.parametrize("gamma", [True, False])
@pytest.mark.parametrize("biased", [True, False])
def test_what_a_norm_goes_on_adding(gamma: bool, biased: bool, model_of: Build, random: np.random.Generator) -> None:
    """β goes into biases behind the norm where all have one; else it stays, and is what is added before γ."""
    scale = np.linspace(1, 2, 8, dtype=np.float32) if gamma else np.ones(8, np.float32)
    scale[2], beta = (0.0 if gamma else 1.0), random.normal(size=8).astype(np.float32)
    beta[2] = 0.0
    weights = {name: random.normal(size=(8, 8)).astype(np.float32) for name in ("we", "wb", "wo")}
    reader = "r = MatMul (n, wb) b = Add (r, bias)" if biased else "b = MatMul (n, wb)"
    text = f"""(float[B,3,8] x) => (float[B,3,8] y) {{
        e = MatMul (x, we) n = LayerNormalization (e, gamma, beta) {reader} o = Add (b, e) y = MatMul (o, wo) }}"""
    more = {"bias": np.ones(8, np.float32)} if biased else {}
    model = model_of(text, 17, **weights, **more, gamma=scale, beta=beta)
    Canonicalize(21)(model)
    [site] = rotatable(model.graph).streams
    [behind] = [part for part in rotated_inputs(site, linear(model)) if part.norm is not None]
    if biased:
        assert behind.shift is None
    else:
        assert behind.shift is not None
        np.testing.assert_allclose(behind.shift * scale, beta, rtol=1e-6)
    np.testing.assert_allclose(behind.weights(), weights["wb"].astype(np.float64) * scale[:, None], rtol=1e-6)


def test_a_kernels_places_are_columns_of_their_own(model_of: Build, random: np.random.Generator) -> None:
    kernel = random.normal(size=(5, 3, 2, 2)).astype(np.float32)
    model = model_of("(float[1,3,4,4] x) => (float[1,5,3,3] y) { y = Conv (x, k) }", k=kernel)
    [node] = model.graph
    patch = random.normal(size=(3, 2, 2))
    columns = weights_by_input(node)
    assert columns.shape == (3, 20)
    # A patch that is the same in all places: sums over the columns of an output are what the kernel makes of it.
    flat = np.broadcast_to(patch[:, :1, :1], (3, 2, 2))
    made = (flat[:, 0, 0] @ columns).reshape(5, 4).sum(axis=1)
    np.testing.assert_allclose(made, np.einsum("oihw,ihw->o", kernel.astype(np.float64), flat))
