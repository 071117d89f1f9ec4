from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from qcompile.passes.canonicalize.fold_pad import FoldPad
from qcompile.passes.canonicalize.infer_shapes import InferShapes

Build = Callable[..., Any]

PADDED = """(float[1,3,6,6] x) => (float[1,4,N,M] y) {
    [pad] p = Pad %s (x, pads%s)
    [conv] y = Conv %s (p, w)
}"""
STAYS = "Pad stays in front of its Conv: not a constant zero padding of spatial axes only"
SPATIAL = np.int64([0, 0, 1, 2, 0, 0, 3, 0])


@pytest.fixture
def w(random: np.random.Generator) -> np.ndarray:
    return random.standard_normal((4, 3, 3, 3)).astype(np.float32)


@pytest.mark.parametrize(
    ("attributes", "conv"),
    [("", ""), ('<mode = "constant">', "<pads = [1,0,1,2]>"), ("", "<strides = [2,1]>"), ("", "<dilations = [2,1]>")],
)
def test_zeros_over_spatial_axes_are_folded(
    attributes: str, conv: str, w: np.ndarray, model_of: Build, rewritten: Build, types: Build
) -> None:
    model, refusals = rewritten(FoldPad(), model_of(PADDED % (attributes, "", conv), pads=SPATIAL, w=w))
    assert types(model) == ["Conv"]
    assert refusals == ()
    assert model.graph[0].name == "conv", "overrides and reports know it by its name"
    added = np.add(SPATIAL[[2, 3, 6, 7]], [1, 0, 1, 2] if "pads" in conv else 0)
    assert list(model.graph[0].attributes.get_ints("pads")) == added.tolist()


def test_a_spelled_out_zero_is_folded(w: np.ndarray, model_of: Build, rewritten: Build, types: Build) -> None:
    model = model_of(PADDED % ("", ", zero", ""), pads=SPATIAL, zero=np.float32(0), w=w)
    assert types(rewritten(FoldPad(), model)[0]) == ["Conv"]


def test_chosen_axes_are_folded(w: np.ndarray, model_of: Build, rewritten: Build) -> None:
    parameters = {"pads": np.int64([1, 2, 3, 4]), "axes": np.int64([3, 2]), "w": w}
    rewritten(FoldPad(), model_of(PADDED % ("", ", , axes", ""), 18, **parameters))


@pytest.mark.parametrize(
    ("attributes", "value", "pads"),
    [
        ("", ", one", SPATIAL),
        ('<mode = "reflect">', "", SPATIAL),
        ('<mode = "edge">', "", SPATIAL),
        ("", "", np.int64([0, 1, 1, 1, 0, 0, 1, 1])),
        ("", "", np.int64([0, 0, -1, 0, 0, 0, -1, 0])),
    ],
)
def test_any_other_padding_stays(
    attributes: str, value: str, pads: np.ndarray, w: np.ndarray, model_of: Build, rewritten: Build, types: Build
) -> None:
    if pads[1]:
        w = np.concatenate([w, w[:, :1]], axis=1)
    parameters = {"pads": pads, "w": w} | ({"one": np.float32(1)} if value else {})
    model, refusals = rewritten(FoldPad(), model_of(PADDED % (attributes, value, ""), **parameters))
    assert types(model) == ["Pad", "Conv"]
    assert [(refusal.node, refusal.reason) for refusal in refusals] == [("pad", STAYS)]


def test_padding_that_is_not_constant_stays(w: np.ndarray, model_of: Build, rewritten: Build) -> None:
    text = PADDED.replace("x)", "x, int64[8] pads)", 1) % ("", "", "")
    _, [refusal] = rewritten(FoldPad(), model_of(text, w=w), {"pads": SPATIAL})
    assert refusal.reason == STAYS


def test_a_pad_that_is_read_twice(w: np.ndarray, model_of: Build, rewritten: Build, types: Build) -> None:
    text = """(float[1,3,6,6] x) => (float[1,4,N,M] y, float[1,3,N,M] z) {
        p = Pad (x, pads)
        y = Conv (p, w)
        z = Relu (p)
    }"""
    model, _ = rewritten(FoldPad(), model_of(text, pads=SPATIAL, w=w))
    assert "Pad" in types(model)


def test_a_pad_that_is_a_graph_output(w: np.ndarray, model_of: Build, rewritten: Build, types: Build) -> None:
    text = """(float[1,3,6,6] x) => (float[1,4,N,M] y, float[1,3,N,M] p) {
        p = Pad (x, pads)
        y = Conv (p, w)
    }"""
    model, _ = rewritten(FoldPad(), model_of(text, pads=SPATIAL, w=w))
    assert "Pad" in types(model)


def test_a_pad_in_front_of_something_else_is_no_refusal(model_of: Build, rewritten: Build) -> None:
    text = "(float[1,3,6,6] x) => (float[1,3,N,M] y) { p = Pad (x, pads) y = Relu (p) }"
    assert rewritten(FoldPad(), model_of(text, pads=SPATIAL))[1] == ()


@pytest.mark.parametrize("auto_pad", ["SAME_UPPER", "SAME_LOWER", "VALID"])
@pytest.mark.parametrize("strides", ["[1,1]", "[2,3]", "[3,1]"])
def test_automatic_padding_is_spelled_out(
    auto_pad: str, strides: str, w: np.ndarray, model_of: Build, rewritten: Build
) -> None:
    text = f"""(float[1,3,7,8] x) => (float[1,4,N,M] y) {{
        c = Conv <auto_pad = "{auto_pad}", strides = {strides}> (x, w)
        y = Relu (c)
    }}"""
    model = model_of(text, w=w)
    InferShapes()(model)
    model, _ = rewritten(FoldPad(), model)
    assert model.graph[0].attributes.get_string("auto_pad", "NOTSET") == "NOTSET"


@pytest.mark.parametrize("auto_pad", ["SAME_UPPER", "VALID"])
def test_a_pad_in_front_of_automatic_padding_keeps_its_function(
    auto_pad: str, w: np.ndarray, model_of: Build, rewritten: Build
) -> None:
    conv = f'<auto_pad = "{auto_pad}", strides = [2,2]>'
    rewritten(FoldPad(), model_of(PADDED % ("", "", conv), pads=SPATIAL, w=w))


def test_automatic_padding_of_an_open_axis_keeps_its_function(w: np.ndarray, model_of: Build, rewritten: Build) -> None:
    text = '(float[1,3,H,W] x) => (float[1,4,N,M] y) { y = Conv <auto_pad = "SAME_UPPER", strides = [2,2]> (x, w) }'
    rewritten(FoldPad(), model_of(text, w=w), {"x": np.ones((1, 3, 7, 8), np.float32)})


@pytest.mark.parametrize("opset", [11, 13])
def test_older_opsets(opset: int, w: np.ndarray, model_of: Build, rewritten: Build, types: Build) -> None:
    model, _ = rewritten(FoldPad(), model_of(PADDED % ("", "", ""), opset, pads=SPATIAL, w=w))
    assert types(model) == ["Conv"]
