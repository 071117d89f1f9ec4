from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from qcompile.core import model as models
from qcompile.core import numerics, runtime, validate
from qcompile.passes.canonicalize import Canonicalize
from qcompile.passes.canonicalize.infer_shapes import InferShapes
from qcompile.passes.canonicalize.widen_float16 import WidenFloat16, computes_in_float16
from qcompile.verify import CLOSE_BOUND

Build = Callable[..., Any]
F16, F32 = ir.DataType.FLOAT16, ir.DataType.FLOAT
#: onnx's parser takes float16 as bits: 15360 is 1, 16384 is 2, 16896 is 3.


def same(before: ir.Model, after: ir.Model, **feeds: Any) -> None:
    """Hold interface and outputs against each other within the bound of float16."""
    for old, new in ((before.graph.inputs, after.graph.inputs), (before.graph.outputs, after.graph.outputs)):
        assert [(v.name, v.dtype) for v in new] == [(v.name, v.dtype) for v in old]
    for seed in range(3):
        sample = runtime.synthetic_feeds(before, seed) | feeds
        expected = runtime.Session(before, optimize=False).run(sample)
        found = runtime.Session(after, optimize=False).run(sample)
        for name, y in expected.items():
            assert found[name].dtype == y.dtype and found[name].shape == y.shape
            assert numerics.relative_error(y, found[name]) <= CLOSE_BOUND[2]
            assert np.any(y != 0), "an output of zeros proves nothing"


@pytest.fixture
def widened() -> Callable[..., ir.Model]:
    """Widen a copy, hold it to the contract, and return it."""

    def widened(model: ir.Model, **feeds: Any) -> ir.Model:
        InferShapes()(model)
        copy, before = model.clone(), models.serialize(model)
        result = WidenFloat16()(copy)
        assert result.modified and not result.refusals and len(result.notes) == 1
        assert models.serialize(model) == before, "a copy shares nothing that the rule changes"
        validate.check_model(copy, "widened")
        same(model, copy, **feeds)
        once = models.serialize(copy)
        again = WidenFloat16()(copy)
        assert not again.modified and not again.notes and models.serialize(copy) == once
        InferShapes()(copy)
        assert not computes_in_float16(copy)
        ends = {value for node in copy.graph if node.op_type == "Cast" for value in (*node.inputs, *node.outputs)}
        halves = [v for node in copy.graph.all_nodes() for v in (*node.inputs, *node.outputs) if v and v.dtype is F16]
        assert set(halves) <= ends
        return copy

    return widened


@pytest.fixture
def refused() -> Callable[[ir.Model], str]:
    """Return why a model stays as it is."""

    def refused(model: ir.Model) -> str:
        InferShapes()(model)
        before = models.serialize(model)
        result = WidenFloat16()(model)
        assert not result.modified and models.serialize(model) == before
        [refusal] = result.refusals
        return refusal.reason

    return refused


def half(random: np.random.Generator, *shape: int) -> np.ndarray:
    return random.standard_normal(shape).astype(np.float16)


@pytest.mark.parametrize("opset", [9, 13, 17, 21])
def test_a_network_keeps_its_interface(
    opset: int, model_of: Build, widened: Build, types: Build, random: np.random.Generator
) -> None:
    text = """(float16[2,3,6,6] x) => (float16[2,5] y) {
        c = Conv (x, w) r = Relu (c) p = GlobalAveragePool (r) f = Flatten (p) y = Gemm (f, g, b)
    }"""
    w = half(random, 4, 3, 3, 3)
    model = widened(model_of(text, opset, w=w, g=half(random, 4, 5), b=half(random, 5)))
    assert types(model) == ["Cast", "Conv", "Relu", "GlobalAveragePool", "Flatten", "Gemm", "Cast"]
    [array] = [v.const_value.numpy() for v in model.graph.initializers.values() if v.name == "w"]
    assert array.dtype == np.float32
    np.testing.assert_array_equal(array, w)


def test_a_model_without_float16_stays(model_of: Build) -> None:
    model = model_of("(float[2] x) => (float[2] y) { y = Exp (x) }")
    before = models.serialize(model)
    result = WidenFloat16()(model)
    assert not result.modified and not result.notes and models.serialize(model) == before


def test_an_output_that_is_read_and_one_value_read_twice(model_of: Build, widened: Build, types: Build) -> None:
    text = "(float16[2,3] x) => (float16[2,3] h, float16[2,3] y) { h = Exp (x) m = Mul (h, x) y = Add (m, h) }"
    assert types(widened(model_of(text))) == ["Cast", "Exp", "Mul", "Add", "Cast", "Cast"]


def test_an_output_that_is_an_input_or_a_constant(
    model_of: Build, widened: Build, types: Build, random: np.random.Generator
) -> None:
    text = "(float16[2,3] x) => (float16[2,3] x, float16[3] w, float16[2,3] y) { y = Mul (x, w) }"
    model = widened(model_of(text, w=half(random, 3)))
    assert types(model) == ["Cast", "Cast", "Mul", "Cast"]


def test_casts_inside_dissolve(model_of: Build, types: Build, random: np.random.Generator) -> None:
    text = """(float[2,3] x) => (float[2,5] y) {
        h = Cast <to = 10> (x) m = MatMul (h, w) f = Cast <to = 1> (m) e = Exp (f) k = Cast <to = 10> (e)
        n = Relu (k) y = Cast <to = 1> (n)
    }"""
    model = model_of(text, w=half(random, 3, 5))
    original = model.clone()
    Canonicalize(21, widen=True)(model)
    assert types(model) == ["MatMul", "Exp", "Relu"]
    same(original, model)


def test_types_in_attributes(model_of: Build, widened: Build) -> None:
    text = """(float16[2,3] x, int64[2] n) => (float16[2,3] y) {
        c = ConstantOfShape <value = float16[1] {16384}> (n) k = Constant <value = float16[3] {15360, 16384, 16896}> ()
        e = EyeLike <dtype = 10> (c) s = Add (e, k) y = Mul (s, x)
    }"""
    model = widened(model_of(text), n=np.array([2, 3]))
    assert {v.dtype for node in model.graph for v in node.outputs if node.op_type != "Cast"} == {F32}


def test_branches_read_the_widened_values(model_of: Build, widened: Build, random: np.random.Generator) -> None:
    text = """(float16[2,3] x, bool c) => (float16[2,3] y) {
        h = Exp (x)
        y = If (c) <then_branch = t () => (float16[2,3] a) { a = Mul (h, w) },
                    else_branch = e () => (float16[2,3] b) <float16[1] k = {16896}> { q = Add (x, k) b = Sqrt (h) }>
    }"""
    for condition in (True, False):
        model = widened(model_of(text, w=half(random, 3)), c=np.array(condition))
    for graph in model.graph.subgraphs():
        assert {v.dtype for v in (*graph.outputs, *graph.initializers.values())} == {F32}


def test_a_loop_carries_float32(model_of: Build, widened: Build) -> None:
    text = """(float16[3] x, int64 n) => (float16[3] y, float16[L,3] each) {
        t = Constant <value_int = 1> () go = Cast <to = 9> (t)
        y, each = Loop (n, go, x) <body = b (int64 i, bool g, float16[3] s) => (bool o, float16[3] r, float16[3] z) {
            o = Identity (g) h = Cast <to = 10> (i) r = Add (s, h) z = Mul (r, x)
        }>
    }"""
    model = widened(model_of(text), n=np.array(3))
    [body] = model.graph.subgraphs()
    assert [value.dtype for value in body.inputs][2] is F32
    assert [value.dtype for value in body.outputs] == [ir.DataType.BOOL, F32, F32]


def test_a_sequence_inside(model_of: Build, widened: Build) -> None:
    text = """(float16[2,4] x) => (float16[2,4] y) {
        s = SplitToSequence <axis = 1> (x) y = ConcatFromSequence <axis = 1> (s)
    }"""
    model = model_of(text)
    widened(model)


def test_a_sequence_that_is_an_output(model_of: Build, refused: Build) -> None:
    text = "(float16[2,4] x) => (seq(float16[2,1]) s) { s = SplitToSequence <axis = 1> (x) }"
    assert "'s' is no tensor" in refused(model_of(text))


def test_an_operator_of_another_domain(refused: Build, proto_of: Build) -> None:
    proto = proto_of("(float16[2,4] x) => (float16[2,4] y) { y = com.microsoft.Gelu (x) }")
    proto.opset_import.add(domain="com.microsoft", version=1)
    assert "Gelu of com.microsoft" in refused(ir.from_proto(proto))


def test_bits_that_are_read(refused: Build, proto_of: Build) -> None:
    proto = proto_of("(float16[2] x) => (int16[2] y) { y = BitCast <to = 5> (x) }", 26)
    assert "BitCast" in refused(ir.from_proto(proto))


def test_a_type_as_an_attribute(refused: Build, proto_of: Build) -> None:
    proto = proto_of("(float16[2] x) => (float16[2] y) { o = Optional (x) y = OptionalGetElement (o) }")
    kind = proto.graph.node[0].attribute.add(name="type", type=13)
    kind.tp.tensor_type.elem_type = 10
    assert "Optional has a type" in refused(ir.from_proto(proto))


@pytest.mark.parametrize(
    ("text", "rounds"),
    [
        ("(float[3] x) => (float[3] y) { f = Cast <to = 1> (w) y = Mul (x, f) }", False),
        ("(float16[3] x) => (float16[3] y) { f = Cast <to = 1> (x) e = Exp (f) y = Cast <to = 10> (e) }", False),
        ("(float[3] x) => (float[3] y) { k = Constant <value = float16[1] {15360}> () f = Cast <to = 1> (k) "
         "y = Mul (x, f) }", False),
        ("(float[3] x) => (float[3] y) { f = Cast <to = 10> (x) y = Cast <to = 1> (f) }", True),
        ("(float16[3] x) => (float16[3] y) { y = Exp (x) }", True),
        ("(float[3] x) => (float[3] y) { h = Cast <to = 10> (x) e = Exp (h) y = Cast <to = 1> (e) }", True),
        ("(int64[1] n, float[3] x) => (float[3] y) { c = ConstantOfShape <value = float16[1] {16384}> (n) "
         "f = Cast <to = 1> (c) y = Mul (f, x) }", True),
    ],
)  # fmt: skip
def test_what_rounds_to_float16(text: str, rounds: bool, model_of: Build) -> None:
    weights = {"w": np.ones(3, np.float16)} if "(w)" in text else {}
    assert computes_in_float16(model_of(text, **weights)) == rounds
