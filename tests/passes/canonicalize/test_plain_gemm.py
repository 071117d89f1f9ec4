from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from qcompile.passes.canonicalize.plain_gemm import PlainGemm

Build = Callable[..., Any]
TEXT = "(%s[2,3] x) => (%s[2,4] y) { y = Gemm <%s> (x, w%s) }"
TYPES = {"float": np.float32, "float16": np.float16, "double": np.float64}


@pytest.fixture
def w(random: np.random.Generator) -> np.ndarray:
    return random.standard_normal((3, 4)).astype(np.float32)


def gemm_of(model: Any) -> tuple[float, float, tuple[int, ...] | None]:
    """Return alpha, beta and the shape of the bias."""
    [node] = [node for node in model.graph if node.op_type == "Gemm"]
    bias = tuple(node.inputs[2].const_value.shape) if len(node.inputs) > 2 else None
    return node.attributes.get_float("alpha", 1.0), node.attributes.get_float("beta", 1.0), bias


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("attributes", ["alpha = 0.5, beta = 2.0", "alpha = 0.5, transB = 1", "beta = 0.0, transB = 1"])
@pytest.mark.parametrize("shape", [(), (1,), (4,), (1, 1), (1, 4)])
def test_factors_fold_and_the_bias_has_one_number_a_channel(
    shape: tuple[int, ...], attributes: str, kind: str, w: np.ndarray, model_of: Build, rewritten: Build
) -> None:
    b = np.linspace(1, 2, int(np.prod(shape))).reshape(shape).astype(TYPES[kind])
    weights = (w.T if "transB" in attributes else w).astype(TYPES[kind])
    model, _ = rewritten(PlainGemm(), model_of(TEXT % (kind, kind, attributes, ", b"), 21, w=weights, b=b))
    assert gemm_of(model) == (1.0, 1.0, (4,))


def test_without_a_bias(w: np.ndarray, model_of: Build, rewritten: Build) -> None:
    model, _ = rewritten(PlainGemm(), model_of(TEXT % ("float", "float", "alpha = 0.5", ""), 21, w=w))
    assert gemm_of(model) == (1.0, 1.0, None)


def test_a_plain_one_stays(w: np.ndarray, model_of: Build) -> None:
    model = model_of(TEXT % ("float", "float", "alpha = 1.0", ", b"), 21, w=w, b=np.ones(4, np.float32))
    assert not PlainGemm()(model).modified


@pytest.mark.parametrize("shape", [(2, 1), (2, 4)])
def test_a_bias_per_row_stays(shape: tuple[int, int], w: np.ndarray, model_of: Build, rewritten: Build) -> None:
    b = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    model, _ = rewritten(PlainGemm(), model_of(TEXT % ("float", "float", "beta = 2.0", ", b"), 21, w=w, b=b))
    assert gemm_of(model) == (1.0, 2.0, shape)


def test_operands_that_are_no_constants_stay(w: np.ndarray, model_of: Build, rewritten: Build) -> None:
    weights = "(float[2,3] x, float[3,4] w) => (float[2,4] y) { y = Gemm <alpha = 0.5> (x, w, b) }"
    model, _ = rewritten(PlainGemm(), model_of(weights, 21, b=np.ones(1, np.float32)))
    assert gemm_of(model) == (0.5, 1.0, (1,))
    bias = "(float[2,3] x, float[4] b) => (float[2,4] y) { y = Gemm <beta = 0.5> (x, w, b) }"
    model, _ = rewritten(PlainGemm(), model_of(bias, 21, w=w))
    assert model.graph[0].attributes.get_float("beta", 1.0) == 0.5


def test_integers_stay(model_of: Build) -> None:
    text = TEXT % ("int32", "int32", "alpha = 2.0, beta = 2.0", ", b")
    model = model_of(text, 21, w=np.ones((3, 4), np.int32), b=np.ones(1, np.int32))
    assert not PlainGemm()(model).modified


@pytest.mark.parametrize("factor", [1e8, 1e-7])
def test_what_a_type_cannot_hold_stays(factor: float, w: np.ndarray, model_of: Build) -> None:
    text = TEXT % ("float16", "float16", f"alpha = {factor}, beta = {factor}", ", b")
    model = model_of(text, 21, w=w.astype(np.float16), b=np.ones(1, np.float16))
    assert not PlainGemm()(model).modified


def test_constants_that_others_read_keep_their_numbers(w: np.ndarray, model_of: Build, rewritten: Build) -> None:
    text = """(float[2,3] x) => (float[2,4] y, float[2,4] z) {
        y = Gemm <alpha = 0.5, beta = 3.0> (x, w, b) z = Gemm (x, w, b) }"""
    model, _ = rewritten(PlainGemm(), model_of(text, 21, w=w, b=np.ones(4, np.float32)))
    first, second = model.graph
    assert first.attributes.get_float("alpha", 1.0) == 0.5 and first.inputs[1] is second.inputs[1]
    assert first.attributes.get_float("beta", 1.0) == 1.0 and first.inputs[2] is not second.inputs[2]
