from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from qcompile.passes.canonicalize.fold_batch_norm import FoldBatchNorm

Build = Callable[..., Any]

CONV = """(float[1,3,6,6] x) => (float[1,4,6,6] y) {
    [conv] c = Conv <pads = [1,1,1,1]> (x, w%s)
    y = BatchNormalization <epsilon = 0.01> (c, gamma, beta, mean, var)
}"""


def statistics(channels: int, random: np.random.Generator) -> dict[str, np.ndarray]:
    return {
        "gamma": random.standard_normal(channels).astype(np.float32),
        "beta": random.standard_normal(channels).astype(np.float32),
        "mean": random.standard_normal(channels).astype(np.float32),
        "var": random.random(channels).astype(np.float32),
    }


def weights(random: np.random.Generator, *shape: int) -> np.ndarray:
    return random.standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("bias", [False, True])
def test_it_folds_into_a_conv(
    bias: bool, model_of: Build, rewritten: Build, types: Build, random: np.random.Generator
) -> None:
    parameters = {"w": weights(random, 4, 3, 3, 3), **statistics(4, random)}
    if bias:
        parameters["b"] = weights(random, 4)
    model, refusals = rewritten(FoldBatchNorm(), model_of(CONV % (", b" if bias else ""), **parameters))
    assert types(model) == ["Conv"]
    assert model.graph[0].name == "conv", "overrides and reports know it by its name"
    assert refusals == ()


def test_it_folds_into_a_depthwise_conv(
    model_of: Build, rewritten: Build, types: Build, random: np.random.Generator
) -> None:
    text = CONV.replace("float[1,3,6,6]", "float[1,4,6,6]").replace("<pads", "<group = 4, pads") % ""
    model, _ = rewritten(FoldBatchNorm(), model_of(text, w=weights(random, 4, 1, 3, 3), **statistics(4, random)))
    assert types(model) == ["Conv"]


def test_it_folds_into_a_dilated_conv_of_one_dimension(
    model_of: Build, rewritten: Build, types: Build, random: np.random.Generator
) -> None:
    text = """(float[1,3,16] x) => (float[1,4,N] y) {
        c = Conv <dilations = [2]> (x, w)
        y = BatchNormalization (c, gamma, beta, mean, var)
    }"""
    model, _ = rewritten(FoldBatchNorm(), model_of(text, w=weights(random, 4, 3, 3), **statistics(4, random)))
    assert types(model) == ["Conv"]


@pytest.mark.parametrize("group", [1, 2])
def test_it_keeps_the_function_of_a_transposed_conv(
    group: int, model_of: Build, rewritten: Build, types: Build, random: np.random.Generator
) -> None:
    text = f"""(float[1,4,5,5] x) => (float[1,6,N,M] y) {{
        c = ConvTranspose <group = {group}, strides = [2,2]> (x, w)
        y = BatchNormalization (c, gamma, beta, mean, var)
    }}"""
    w = weights(random, 4, 6 // group, 3, 3)
    model, refusals = rewritten(FoldBatchNorm(), model_of(text, w=w, **statistics(6, random)))
    assert types(model) == ["ConvTranspose"] or [refusal.reason for refusal in refusals]
    assert group == 2 or types(model) == ["ConvTranspose"]


@pytest.mark.parametrize("attributes", ["", "<alpha = 0.5, beta = 2.0>", "<transB = 1>"])
@pytest.mark.parametrize("bias", [False, True])
def test_it_keeps_the_function_of_a_gemm(
    attributes: str, bias: bool, model_of: Build, rewritten: Build, random: np.random.Generator
) -> None:
    text = f"""(float[5,3] x) => (float[5,4] y) {{
        c = Gemm {attributes} (x, w{", b" if bias else ""})
        y = BatchNormalization (c, gamma, beta, mean, var)
    }}"""
    w = weights(random, 4, 3) if "transB" in attributes else weights(random, 3, 4)
    parameters = statistics(4, random) | ({"b": weights(random, 4)} if bias else {})
    rewritten(FoldBatchNorm(), model_of(text, w=w, **parameters))


def test_a_plain_gemm_takes_it_in(model_of: Build, rewritten: Build, types: Build, random: np.random.Generator) -> None:
    text = """(float[5,3] x) => (float[5,4] y) {
        c = Gemm (x, w, b)
        y = BatchNormalization (c, gamma, beta, mean, var)
    }"""
    parameters = {"w": weights(random, 3, 4), "b": weights(random, 4), **statistics(4, random)}
    model, refusals = rewritten(FoldBatchNorm(), model_of(text, **parameters))
    assert types(model) == ["Gemm"] and refusals == ()


def test_a_conv_that_is_read_twice_is_left_alone(
    model_of: Build, rewritten: Build, types: Build, random: np.random.Generator
) -> None:
    text = """(float[1,3,6,6] x) => (float[1,4,6,6] y, float[1,4,6,6] z) {
        [conv] c = Conv <pads = [1,1,1,1]> (x, w)
        [norm] y = BatchNormalization (c, gamma, beta, mean, var)
        z = Relu (c)
    }"""
    model, [refusal] = rewritten(
        FoldBatchNorm(), model_of(text, w=weights(random, 4, 3, 3, 3), **statistics(4, random))
    )
    assert types(model) == ["Conv", "BatchNormalization", "Relu"]
    assert refusal.node == "norm"
    assert refusal.reason == "BatchNormalization stays: the result of Conv 'conv' is also read elsewhere"


def test_a_conv_that_is_a_graph_output_is_left_alone(
    model_of: Build, rewritten: Build, types: Build, random: np.random.Generator
) -> None:
    text = """(float[1,3,6,6] x) => (float[1,4,6,6] y, float[1,4,6,6] c) {
        [conv] c = Conv <pads = [1,1,1,1]> (x, w)
        [norm] y = BatchNormalization (c, gamma, beta, mean, var)
    }"""
    model, [refusal] = rewritten(
        FoldBatchNorm(), model_of(text, w=weights(random, 4, 3, 3, 3), **statistics(4, random))
    )
    assert types(model) == ["Conv", "BatchNormalization"]
    assert refusal.reason == "BatchNormalization stays: the result of Conv 'conv' is also read elsewhere"


def test_behind_another_operator_it_stays(
    model_of: Build, rewritten: Build, types: Build, random: np.random.Generator
) -> None:
    text = """(float[1,4,6,6] x) => (float[1,4,6,6] y) {
        [pool] p = MaxPool <kernel_shape = [3,3], pads = [1,1,1,1]> (x)
        [norm] y = BatchNormalization (p, gamma, beta, mean, var)
    }"""
    model, [refusal] = rewritten(FoldBatchNorm(), model_of(text, **statistics(4, random)))
    assert types(model) == ["MaxPool", "BatchNormalization"]
    expected = "BatchNormalization stays: it follows MaxPool 'pool', which has no weights to fold it into"
    assert refusal.reason == expected


def test_at_an_input_it_stays(model_of: Build, rewritten: Build, random: np.random.Generator) -> None:
    text = "(float[1,4,6,6] x) => (float[1,4,6,6] y) { y = BatchNormalization (x, gamma, beta, mean, var) }"
    _, [refusal] = rewritten(FoldBatchNorm(), model_of(text, **statistics(4, random)))
    assert refusal.reason == "BatchNormalization stays: it stands at an input of the model"


def test_weights_that_are_computed_are_left_alone(
    model_of: Build, rewritten: Build, random: np.random.Generator
) -> None:
    text = """(float[1,3,6,6] x, float[4,3,3,3] w) => (float[1,4,6,6] y) {
        [conv] c = Conv <pads = [1,1,1,1]> (x, w)
        y = BatchNormalization (c, gamma, beta, mean, var)
    }"""
    _, [refusal] = rewritten(FoldBatchNorm(), model_of(text, **statistics(4, random)))
    assert refusal.reason == "BatchNormalization stays: weights of Conv 'conv' are shared or not constant"


def test_weights_that_a_caller_may_replace_are_left_alone(model_of: Build, rewritten: Build) -> None:
    random = np.random.default_rng(0)
    text = """(float[1,3,6,6] x, float[4,3,3,3] w) => (float[1,4,6,6] y) {
        [conv] c = Conv <pads = [1,1,1,1]> (x, w)
        y = BatchNormalization (c, gamma, beta, mean, var)
    }"""
    model = model_of(text, w=weights(random, 4, 3, 3, 3), **statistics(4, random))
    _, [refusal] = rewritten(FoldBatchNorm(), model, {"w": weights(random, 4, 3, 3, 3)})
    assert refusal.reason == "BatchNormalization stays: weights of Conv 'conv' are shared or not constant"


def test_weights_shared_by_two_convs(model_of: Build, rewritten: Build, random: np.random.Generator) -> None:
    text = """(float[1,3,6,6] x, float[1,3,6,6] u) => (float[1,4,6,6] y, float[1,4,6,6] z) {
        c = Conv <pads = [1,1,1,1]> (x, w)
        d = Conv <pads = [1,1,1,1]> (u, w)
        y = BatchNormalization (c, gamma, beta, mean, var)
        z = BatchNormalization (d, gamma2, beta, mean, var)
    }"""
    parameters = statistics(4, random) | {"w": weights(random, 4, 3, 3, 3), "gamma2": weights(random, 4)}
    rewritten(FoldBatchNorm(), model_of(text, **parameters))


def test_statistics_shared_by_two_normalizations(
    model_of: Build, rewritten: Build, types: Build, random: np.random.Generator
) -> None:
    text = """(float[1,3,6,6] x) => (float[1,3,6,6] y) {
        c = Conv <pads = [1,1,1,1]> (x, w)
        n = BatchNormalization (c, gamma, beta, mean, var)
        d = Conv <pads = [1,1,1,1]> (n, w2)
        y = BatchNormalization (d, gamma, beta, mean, var)
    }"""
    parameters = {"w": weights(random, 3, 3, 3, 3), "w2": weights(random, 3, 3, 3, 3), **statistics(3, random)}
    model, _ = rewritten(FoldBatchNorm(), model_of(text, **parameters))
    assert types(model) == ["Conv", "Conv"]


def test_a_channel_without_variance(
    model_of: Build, rewritten: Build, types: Build, random: np.random.Generator
) -> None:
    parameters = {"w": weights(random, 4, 3, 3, 3), **statistics(4, random)}
    parameters["var"][1], parameters["gamma"][2] = 0.0, 0.0
    model, _ = rewritten(FoldBatchNorm(), model_of(CONV % "", **parameters))
    assert types(model) == ["Conv"]


def test_inside_a_subgraph_nothing_breaks(model_of: Build, rewritten: Build, random: np.random.Generator) -> None:
    text = """(bool t, float[1,3,6,6] x) => (float[1,4,6,6] y) {
        y = If (t) <
            then_branch = a () => (float[1,4,6,6] p) {
                c = Conv <pads = [1,1,1,1]> (x, w)
                p = BatchNormalization (c, gamma, beta, mean, var)
            },
            else_branch = b () => (float[1,4,6,6] q) { q = Conv <pads = [1,1,1,1]> (x, w) }
        >
    }"""
    model = model_of(text, w=weights(random, 4, 3, 3, 3), **statistics(4, random))
    for branch in (True, False):
        rewritten(FoldBatchNorm(), model, {"t": np.array(branch)})


@pytest.mark.parametrize("opset", [9, 11, 13, 15])
def test_older_opsets(opset: int, model_of: Build, rewritten: Build, types: Build, random: np.random.Generator) -> None:
    model: ir.Model = model_of(CONV % "", opset, w=weights(random, 4, 3, 3, 3), **statistics(4, random))
    model, _ = rewritten(FoldBatchNorm(), model)
    assert types(model) == ["Conv"]
