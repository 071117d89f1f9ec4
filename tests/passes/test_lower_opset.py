from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest

from qcompile.core import model as models
from qcompile.core import runtime
from qcompile.core.errors import ModelError
from qcompile.passes.lower_opset import LowerOpset

Build = Callable[..., Any]
NEWEST = onnx.defs.onnx_opset_version()
knows_signed_shifts = pytest.mark.skipif(NEWEST < 28, reason="this onnx has no opset 28, where BitShift takes int8")


@pytest.fixture
def newest(model_of: Build) -> Callable[..., Any]:
    """Build a model of the newest opset and file format that the installed onnx knows."""

    def newest(text: str, **weights: Any) -> Any:
        model = model_of(text, NEWEST, **weights)
        model.ir_version = onnx.IR_VERSION
        return model

    return newest


def test_the_model_runs_and_stays_the_same_function(newest: Build, random: np.random.Generator) -> None:
    text = '(float[2,8] x) => (float[2,4] y) { h = MatMul (x, w) a = Einsum <equation = "ij->ij"> (h) y = Celu (a) }'
    w = random.standard_normal((8, 4)).astype(np.float32)
    opset, ir_version, name = runtime.newest_versions()
    model = LowerOpset(opset, ir_version, name)(newest(text, w=w)).model
    assert (models.opset(model), model.ir_version) == (opset, ir_version)
    x = random.standard_normal((2, 8)).astype(np.float32)
    found, h = runtime.Session(model).run({"x": x})["y"], x @ w
    np.testing.assert_allclose(found, np.where(h > 0, h, np.exp(h) - 1), rtol=1e-5, atol=1e-6)


def test_a_second_application_changes_nothing(newest: Build) -> None:
    rule = LowerOpset(22, 10, "it")
    result = rule(newest("(float[2] x) => (float[2] y) { y = Celu (x) }"))
    assert result.modified
    once = models.serialize(result.model)
    assert not rule(result.model).modified and models.serialize(result.model) == once


def test_what_the_runtime_takes_stays(model_of: Build) -> None:
    model = model_of("(float[2] x) => (float[2] y) { y = Celu (x) }", 17)
    before = models.serialize(model)
    assert not LowerOpset(22, 10, "it")(model).modified and models.serialize(model) == before


def test_weights_and_a_value_that_is_read_twice_and_an_output(newest: Build, random: np.random.Generator) -> None:
    text = """(float[2,600] x) => (float[2,600] h, float[2,600] y) {
        h = Celu (x)
        a = Mul (h, w)
        y = Add (h, a)
    }"""
    w = random.standard_normal(600).astype(np.float32)
    model = LowerOpset(*runtime.newest_versions())(newest(text, w=w)).model
    x = random.standard_normal((2, 600)).astype(np.float32)
    outputs = runtime.Session(model).run({"x": x})
    np.testing.assert_allclose(outputs["y"], outputs["h"] * (1 + w), rtol=1e-5, atol=1e-6)


@knows_signed_shifts
def test_functions_are_looked_into() -> None:
    text = f"""<ir_version: {onnx.IR_VERSION}, opset_import: ["": {NEWEST}, "local": 1]>
    g (int8[2] x) => (int8[2] y) {{ y = local.shift (x) }}
    <domain: "local", opset_import: ["": {NEWEST}]> shift (a) => (b) {{ b = BitShift <direction = "LEFT"> (a, a) }}"""
    with pytest.raises(ModelError, match="BitShift"):
        LowerOpset(26, 13, "it")(models.from_proto(onnx.parser.parse_model(text)))


@knows_signed_shifts
def test_mod_of_floats_keeps_the_sign_that_it_has(newest: Build) -> None:
    text = "(float[2] x, float[2] u) => (float[2] y) { y = Mod <fmod = %d> (x, u) }"
    assert LowerOpset(26, 13, "it")(newest(text % 1)).modified
    with pytest.raises(ModelError, match="Mod of floats that rounds down"):
        LowerOpset(26, 13, "it")(newest(text % 0))


@knows_signed_shifts
def test_a_type_that_the_old_operator_does_not_take(newest: Build) -> None:
    with pytest.raises(ModelError) as caught:
        LowerOpset(26, 13, "it")(newest('(int8[2] x) => (int8[2] y) { y = BitShift <direction = "LEFT"> (x, x) }'))
    line = f"model: has opset {NEWEST}; it takes 26 at most, which cannot express its BitShift of int8; "
    assert str(caught.value).startswith(line)


def lowered(model: Any, opset: int, rewritten: Build) -> Any:
    """Lower with the file format that belongs to the opset; the full checker must be content."""
    result, _ = rewritten(LowerOpset.for_target(opset, "toy"), model)
    assert models.opset(result) == opset
    onnx.checker.check_model(onnx.ModelProto.FromString(models.serialize(result)), full_check=True)
    return result


@pytest.fixture
def rewritten() -> Build:
    """Apply a rule to a copy: outputs stay to the last bit, and a second application changes nothing."""

    def rewritten(rule: LowerOpset, model: Any) -> tuple[Any, tuple[()]]:
        copy = model.clone()
        assert rule(copy).modified
        for seed in range(3):
            feeds = runtime.synthetic_feeds(model, seed)
            expected = runtime.Session(model, optimize=False).run(feeds)
            found = runtime.Session(copy, optimize=False).run(feeds)
            for name, y in expected.items():
                np.testing.assert_array_equal(found[name], y)
        once = models.serialize(copy)
        assert not rule(copy).modified and models.serialize(copy) == once
        return copy, ()

    return rewritten


QDQ = """(float[2,3,4,4] x) => (float[2,6,4,4] y) {
    q = QuantizeLinear (x, s, z) d = DequantizeLinear (q, s, z)
    k = DequantizeLinear <axis = 0> (w, t) y = Conv <pads = [1, 1, 1, 1]> (d, k)
}"""


@pytest.fixture
def qdq(model_of: Build, random: np.random.Generator) -> Any:
    """Return a quantized Conv whose weights have a scale per channel."""
    w = random.integers(-127, 127, (6, 3, 3, 3)).astype(np.int8)
    scales = random.random(6).astype(np.float32) + 0.1
    return model_of(QDQ, 21, w=w, t=scales, s=np.float32(0.05), z=np.uint8(128))


@pytest.mark.parametrize(("opset", "ir_version"), [(13, 7), (17, 8), (20, 9)])
def test_q_and_dq(opset: int, ir_version: int, qdq: Any, rewritten: Build) -> None:
    result = lowered(qdq, opset, rewritten)
    assert result.ir_version == ir_version


def test_scales_per_channel_need_opset_13(qdq: Any) -> None:
    with pytest.raises(ModelError) as caught:
        LowerOpset.for_target(12, "toy")(qdq)
    assert str(caught.value) == (
        "model: has opset 21; target toy takes 12 at most, which cannot express its DequantizeLinear with a scale per "
        "channel; choose a target that reads newer ones, or quantize less"
    )


@pytest.mark.parametrize(
    ("nodes", "opset", "op_type", "attributes"),
    [
        ("y = ReduceMean <keepdims = 0> (x, i)", 17, "ReduceMean", {"axes": (1,), "keepdims": 0}),
        ("y = ReduceSum (x, i)", 12, "ReduceSum", {"axes": (1,)}),
        ("y = Unsqueeze (x, i)", 12, "Unsqueeze", {"axes": (1,)}),
        ("y = Clip (x, low, high)", 10, "Clip", {"min": -0.5, "max": 0.5}),
        ("y, z = Split <axis = 1, num_outputs = 2> (x)", 17, "Split", {"axis": 1}),
        ("h = Reshape <allowzero = 0> (x, two) y = Abs (h)", 13, "Reshape", {}),
        ("s = Shape <start = 0> (x) y = Reshape (x, s)", 13, "Shape", {}),
        ('y = Pad <mode = "reflect"> (x, pads)', 13, "Pad", {"mode": "reflect"}),
        ("y = Concat <axis = 0> (x, x, x, x)", 12, "Concat", {"axis": 0}),
    ],
)
def test_other_signatures(
    nodes: str, opset: int, op_type: str, attributes: dict[str, Any], model_of: Build, rewritten: Build
) -> None:
    constants = {
        "i": np.int64([1]), "low": np.float32(-0.5), "high": np.float32(0.5), "two": np.int64([4, -1]),
        "pads": np.int64([1, 1, 0, 0]),
    }  # fmt: skip
    used = {name: array for name, array in constants.items() if f", {name}" in nodes}
    rank = "P,Q" if "Unsqueeze" not in nodes else "P,Q,R"
    rank = "P" if "keepdims = 0" in nodes else rank
    model = lowered(model_of(f"(float[2,6] x) => (float[{rank}] y) {{ {nodes} }}", 21, **used), opset, rewritten)
    [node] = [node for node in model.graph if node.op_type == op_type]
    assert {name: attribute.value for name, attribute in node.attributes.items()} == attributes


def test_a_branch_is_lowered_and_looked_into(model_of: Build, rewritten: Build) -> None:
    text = """(float[2,6] x, bool c) => (float[2,1] y) {
        y = If (c) <then_branch = t () => (float[2,1] a) { a = ReduceMean (x, i) },
                    else_branch = e () => (float[2,1] b) { b = ReduceMax (x, i) }>
    }"""
    model = lowered(model_of(text, 21, i=np.int64([1])), 13, rewritten)
    assert not model.graph.initializers
    with pytest.raises(ModelError, match="express its Mish;"):
        LowerOpset.for_target(17, "toy")(
            model_of(text.replace("b = ReduceMax (x, i)", "m = Mish (x) b = ReduceMax (m, i)"), 21, i=np.int64([1]))
        )


@pytest.mark.parametrize(
    ("nodes", "opset", "lost"),
    [
        ("y = LayerNormalization (x, k)", 13, "LayerNormalization;"),
        ("y = Gelu (x)", 17, "Gelu;"),
        ("y = Softmax (x)", 12, "Softmax"),
        ("y = Softmax <axis = 1> (x)", 12, "Softmax"),
        ('y = Pad <mode = "wrap"> (x, pads)', 18, "Pad in mode 'wrap'"),
        ("m = Abs (pads) y = Pad (x, m)", 10, "Pad with 'pads'"),
        ("y, z, u, v = Split <axis = 1, num_outputs = 4> (x)", 17, "Split with 'num_outputs'"),
        ("s = Shape <start = 1> (x) y = Expand (x, s)", 13, "Shape with 'start'"),
        ("q = QuantizeLinear <axis = 1, block_size = 3> (x, blocks) y = Cast <to = 1> (q)", 20,
         "QuantizeLinear with 'block_size'"),
        ("c = Cast <to = 21> (x) y = Cast <to = 1> (c)", 20, "Cast of uint4"),
        ("q = DequantizeLinear (short, k0) y = Add (x, q)", 13, "DequantizeLinear of int16"),
    ],
)  # fmt: skip
def test_what_an_older_opset_lacks(nodes: str, opset: int, lost: str, model_of: Build) -> None:
    constants = {
        "k": np.ones(6, np.float32), "pads": np.int64([1, 1, 0, 0]), "blocks": np.ones((2, 2), np.float32),
        "short": np.int16([3]), "k0": np.float32(2),
    }  # fmt: skip
    used = {name: array for name, array in constants.items() if f", {name})" in nodes or f"({name}" in nodes}
    model = model_of(f"(float[2,6] x) => (float[P,Q] y) {{ {nodes} }}", 21, **used)
    before = models.serialize(model)
    with pytest.raises(ModelError) as caught:
        LowerOpset.for_target(opset, "toy")(model.clone())
    assert str(caught.value).startswith(f"model: has opset 21; target toy takes {opset} at most")
    assert lost in str(caught.value) and models.serialize(model) == before


def test_an_operator_of_the_runtime_is_of_no_opset(proto_of: Build) -> None:
    proto = proto_of("(float[2,4] x) => (float[2,4] y) { h = com.microsoft.Gelu (x) y = Abs (h) }", 21)
    proto.opset_import.add(domain="com.microsoft", version=1)
    model = models.from_proto(proto)
    assert LowerOpset.for_target(13, "toy")(model).modified
    assert model.opset_imports == {"": 13, "com.microsoft": 1}
