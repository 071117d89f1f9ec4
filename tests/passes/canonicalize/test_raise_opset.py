from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest

from qcompile.core import model as models
from qcompile.core.errors import ModelError
from qcompile.passes.canonicalize.raise_opset import RaiseOpset

Build = Callable[..., Any]
UNARY = "(float[2,3,4] x) => (float[A,B,C] y) { %s }"


def squeeze(op: str) -> str:
    return f"(float[2,1,4] x) => (float[2,4] y) {{ {op} }}"


@pytest.mark.parametrize(
    ("opset", "text", "weights"),
    [
        (7, UNARY % "y = Relu (x)", {}),
        (7, UNARY % "y = Dropout <ratio = 0.5> (x)", {}),
        (7, UNARY % "y = Sum (x, x, x)", {}),
        (7, UNARY % "y = PRelu (x, a)", {"a": np.float32([[0.2]])}),
        (8, UNARY % "e = Expand (x, s) y = Max (x, e)", {"s": np.int64([2, 3, 4])}),
        (9, UNARY % "y = Relu (x)", {}),
        (9, UNARY % "y = Clip <min = -0.5, max = 0.5> (x)", {}),
        (9, UNARY % "y = Dropout <ratio = 0.5> (x)", {}),
        (9, UNARY % "y = Slice <axes = [2], starts = [1], ends = [3]> (x)", {}),
        (9, UNARY % 'y = Pad <mode = "constant", pads = [0,0,1,0,0,2], value = 3.0> (x)', {}),
        (9, UNARY % "y = ReduceMean <axes = [1]> (x)", {}),
        (9, UNARY % "y = ReduceSum <axes = [1]> (x)", {}),
        (9, UNARY % "y, i = TopK <axis = 2, k = 2> (x)", {}),
        (11, UNARY % "y = Clip (x, low, high)", {"low": np.float32(-0.5), "high": np.float32(0.5)}),
        (11, UNARY % "y = Softmax <axis = 2> (x)", {}),
        (9, UNARY % "y = Softmax <axis = 1> (x)", {}),
        (11, UNARY % "y = Softmax (x)", {}),
        (11, UNARY % "y = LogSoftmax <axis = 1> (x)", {}),
        (9, squeeze("y = Squeeze <axes = [1]> (x)"), {}),
        (11, squeeze("y = Squeeze <axes = [1]> (x)"), {}),
        (11, UNARY.replace("A,B,C", "A,B,C,D") % "y = Unsqueeze <axes = [0]> (x)", {}),
        (13, UNARY % "y = ReduceMean <axes = [1,2]> (x)", {}),
        (13, UNARY % "a, b = Split <axis = 2> (x, s) y = Sub (a, b)", {"s": np.int64([2, 2])}),
        (11, UNARY % "a, b = Split <axis = 2, split = [2,2]> (x) y = Sub (a, b)", {}),
        (17, UNARY % "a, b = Split <axis = 2> (x) y = Sub (a, b)", {}),
        (17, UNARY % "y = ReduceMax <axes = [1], keepdims = 1> (x)", {}),
        (17, UNARY % "y = Cast <to = 1> (x)", {}),
    ],
)
def test_the_function_survives(
    opset: int, text: str, weights: dict[str, np.ndarray], model_of: Build, rewritten: Build
) -> None:
    model, refusals = rewritten(RaiseOpset(21), model_of(text, opset, **weights))
    assert refusals == ()
    assert models.opset(model) == 21


@pytest.mark.parametrize("opset", [9, 11, 13, 17])
def test_a_normalized_conv(opset: int, model_of: Build, rewritten: Build, random: np.random.Generator) -> None:
    text = """(float[1,3,6,6] x) => (float[1,4,6,6] y) {
        c = Conv <pads = [1,1,1,1]> (x, w)
        n = BatchNormalization (c, gamma, beta, mean, var)
        p = MaxPool <kernel_shape = [3,3], pads = [1,1,1,1]> (n)
        y = Add (p, n)
    }"""
    channels = {name: random.random(4).astype(np.float32) for name in ("gamma", "beta", "mean", "var")}
    model = model_of(text, opset, w=random.standard_normal((4, 3, 3, 3)).astype(np.float32), **channels)
    assert models.opset(rewritten(RaiseOpset(21), model)[0]) == 21


@pytest.mark.parametrize("opset", [9, 10, 11])
def test_an_upsampling(opset: int, model_of: Build, rewritten: Build) -> None:
    call = {
        9: 'y = Upsample <mode = "nearest"> (x, s)',
        10: 'y = Resize <mode = "nearest"> (x, s)',
        11: 'y = Resize <nearest_mode = "floor", coordinate_transformation_mode = "asymmetric"> (x, roi, s)',
    }[opset]
    text = f"(float[1,1,2,3] x) => (float[A,B,C,D] y) {{ {call} }}"
    model = model_of(text, opset, s=np.float32([1, 1, 2, 2]), roi=np.zeros(0, np.float32))
    rewritten(RaiseOpset(21), model)


@pytest.mark.parametrize(("opset", "wanted"), [(17, 17), (21, 17), (21, 13)])
def test_a_new_enough_model_stays(opset: int, wanted: int, model_of: Build, rewritten: Build) -> None:
    original = model_of(UNARY % "y = Relu (x)", opset)
    before = models.serialize(original)
    assert not RaiseOpset(wanted)(original.clone()).modified
    model, refusals = rewritten(RaiseOpset(wanted), original)
    assert models.serialize(model) == before and refusals == ()


def test_a_value_that_is_read_twice_and_a_graph_output(model_of: Build, rewritten: Build) -> None:
    text = """(float[2,1,4] x) => (float[2,4] s, float[2,4] y, float[2,4] z) {
        s = Squeeze <axes = [1]> (x) y = Exp (s) z = Neg (s)
    }"""
    model, _ = rewritten(RaiseOpset(21), model_of(text, 11))
    assert [value.name for value in model.graph.outputs] == ["s", "y", "z"]


def test_a_subgraph_is_raised_too(model_of: Build, rewritten: Build) -> None:
    text = """(bool c, float[2,1,4] x) => (float[2,4] y) {
        y = If (c) <then_branch = t () => (float[2,4] a) { a = Squeeze <axes = [1]> (x) },
                    else_branch = e () => (float[2,4] b) { s = Squeeze <axes = [1]> (x) b = Exp (s) }>
    }"""
    for branch in (True, False):
        rewritten(RaiseOpset(21), model_of(text, 11), {"c": np.array(branch)})


def test_weights_survive_to_the_last_bit(model_of: Build, random: np.random.Generator) -> None:
    w = random.standard_normal((64, 64)).astype(np.float32)
    model = model_of("(float[1,64] x) => (float[1,64] y) { y = MatMul (x, w) }", 9, w=w)
    RaiseOpset(21)(model)
    np.testing.assert_array_equal(model.graph.initializers["w"].const_value.numpy(), w)


def with_foreign_node(proto_of: Build, opset: int) -> Any:
    proto = proto_of("(float[2,3] x) => (float[2,3] y) { a = Relu (x) y = Neg (a) }", opset)
    proto.opset_import.append(onnx.helper.make_opsetid("com.example", 1))
    proto.graph.node[1].domain, proto.graph.node[1].op_type = "com.example", "Odd"
    return models.from_proto(proto)


def test_an_operator_of_another_domain_does_not_stop_it(proto_of: Build) -> None:
    model = with_foreign_node(proto_of, 17)
    result = RaiseOpset(21)(model)
    assert models.opset(model) == 21 or [refusal.node for refusal in result.refusals] == ["model"]


def broken(model: Any, reason: str) -> None:
    raise RuntimeError(reason)


def test_an_opset_that_stays_is_a_refusal_with_its_reason(model_of: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "qcompile.passes.canonicalize.raise_opset.ConvertVersionPass",
        lambda *_, **__: lambda model: broken(model, "no adapter for Odd"),
    )
    model = model_of(UNARY % "y = Relu (x)", 13)
    [refusal] = RaiseOpset(21)(model).refusals
    assert refusal.reason == "opset 13 stays, onnx cannot raise it: no adapter for Odd"
    with pytest.raises(ModelError, match=r"^model: opset 11 cannot be raised to 21 \(no adapter for Odd\); export it"):
        RaiseOpset(21)(model_of(UNARY % "y = Relu (x)", 11))


def test_the_format_is_one_that_knows_the_opset(model_of: Build, rewritten: Build) -> None:
    model = model_of(UNARY % "y = Relu (x)", 9)
    model.ir_version = 4
    raised, _ = rewritten(RaiseOpset(21), model)
    assert raised.ir_version == 10
    newer = model_of(UNARY % "y = Relu (x)", 9)
    newer.ir_version = 11
    assert rewritten(RaiseOpset(21), newer)[0].ir_version == 11


def test_a_model_of_another_domain_only_gets_the_opset() -> None:
    text = '<ir_version: 10, opset_import: ["ai.onnx.ml": 3]> g (float[2] x) => (float[2] y) '
    text += "{ y = ai.onnx.ml.Scaler <offset = [1.0], scale = [2.0]> (x) }"
    model = models.from_proto(onnx.parser.parse_model(text))
    assert RaiseOpset(21)(model).modified and models.opset(model) == 21
    assert not RaiseOpset(21)(model).modified


def test_a_scan_of_opset_8_is_refused_as_what_it_is(proto_of: Build) -> None:
    body = onnx.parser.parse_graph(
        "b (float[2] a, float[2] n) => (float[2] s, float[2] t) { s = Add (a, n) t = Identity (s) }"
    )
    proto = proto_of("(float[1,2] x, float[1,3,2] y) => (float[1,2] s, float[1,3,2] t) { }", 8)
    node = onnx.helper.make_node("Scan", ["", "x", "y"], ["s", "t"], num_scan_inputs=1, body=body)
    proto.graph.node.append(node)
    with pytest.raises(ModelError, match=r"has a Scan of opset 8, .*; export it with opset 9 or newer"):
        RaiseOpset(21)(models.from_proto(proto))
