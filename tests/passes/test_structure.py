from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from qcompile.passes import structure

Build = Callable[..., Any]
CONV = "(float[1,3,6,6] x) => (float[1,4,6,6] y%s) { c = Conv <pads = [1,1,1,1]> (x, w) %s }"
W = np.ones((4, 3, 3, 3), np.float32)
FUSES = frozenset({"Relu", "Clip"})


def value(model: ir.Model, name: str) -> ir.Value:
    return ir.convenience.create_value_mapping(model.graph)[name]


def test_a_constant_is_an_initializer_that_no_caller_can_replace(model_of: Build) -> None:
    model = model_of(
        "(float[2] x, float[2] d) => (float[2] y) { a = Add (x, w) y = Mul (a, d) }", w=W[:2, 0, 0, 0], d=W[:2, 0, 0, 0]
    )
    array = structure.constant(value(model, "w"))
    assert array is not None and array.tolist() == [1, 1]
    assert structure.constant(value(model, "d")) is None, "a default of an input"
    assert structure.constant(value(model, "x")) is None
    assert structure.constant(value(model, "a")) is None
    assert structure.constant(None) is None


def test_a_tensor_is_not_read_to_see_that_it_is_constant(model_of: Build) -> None:
    model = model_of("(float[2] x) => (float[2] y) { y = Add (x, w) }", w=np.float32([1, 2]))

    def read() -> None:
        raise AssertionError("read")

    value(model, "w").const_value = ir.LazyTensor(read, dtype=ir.DataType.FLOAT, shape=ir.Shape([2]), name="w")
    assert structure.constant_tensor(value(model, "w")) is not None


@pytest.mark.parametrize(("domain", "expected"), [("", True), ("ai.onnx", True), ("com.example", False)])
def test_standard_operators_are_those_of_the_default_domain(domain: str, expected: bool) -> None:
    node = ir.node("Relu", [ir.Value(name="x")], domain=domain)
    assert structure.is_standard(node, "Clip", "Relu") is expected
    assert not structure.is_standard(node, "Clip")


def test_float32_alone_is_float32(model_of: Build) -> None:
    model = model_of("(float[2] x, float16[2] h, int64[2] i) => (float[2] y) { y = Relu (x) }")
    assert structure.is_float32(value(model, "x"))
    assert not structure.is_float32(value(model, "h")) and not structure.is_float32(value(model, "i"))
    assert not structure.is_float32(ir.Value(name="unknown")) and not structure.is_float32(None)


def test_readers_are_counted_once_and_inside_subgraphs(model_of: Build) -> None:
    text = """(bool c, float[2] x) => (float[2] y, float[2] z) {
        z = Add (x, x)
        y = If (c) <then_branch = t () => (float[2] a) { a = Exp (x) },
                    else_branch = e () => (float[2] b) { b = Neg (z) }>
    }"""
    model = model_of(text)
    assert [node.op_type for node in structure.readers(value(model, "x"))] == ["Add", "Exp"]
    assert [node.op_type for node in structure.readers(value(model, "z"))] == ["Neg"]
    assert structure.readers(value(model, "y")) == []


def test_activation_inputs_are_float_and_not_constant(model_of: Build) -> None:
    text = "(float[1,3] x, float[3,2] v, float[2] bias) => (float[1,2] y) { y = Gemm (x, v, bias) }"
    model = model_of(text, bias=np.ones(2, np.float32))
    assert [v.name for v in structure.activation_inputs(model.graph[0])] == ["x", "v", "bias"], "all are inputs"
    model = model_of(text.replace(", float[2] bias", ""), bias=np.ones(2, np.float32))
    assert [v.name for v in structure.activation_inputs(model.graph[0])] == ["x", "v"]
    reshape = model_of("(float[4] x) => (float[2,2] y) { y = Reshape (x, s) }", s=np.int64([2, 2]))
    assert [v.name for v in structure.activation_inputs(reshape.graph[0])] == ["x"]


@pytest.mark.parametrize(
    ("op_type", "attributes", "axis"),
    [
        ("Conv", {}, 0),
        ("ConvTranspose", {}, 1),
        ("MatMul", {}, 1),
        ("Gemm", {}, 1),
        ("Gemm", {"transB": 0}, 1),
        ("Gemm", {"transB": 1}, 0),
    ],
)
def test_weight_axis(op_type: str, attributes: dict[str, int], axis: int) -> None:
    node = ir.node(op_type, [ir.Value(name="x"), ir.Value(name="w")], attributes)
    assert structure.weight_axis(node) == axis


@pytest.mark.parametrize(
    ("behind", "weights"),
    [
        ("y = Relu (c)", {}),
        ("y = Clip (c, low, high)", {"low": np.float32(0), "high": np.float32(6)}),
        ("y = Clip (c, low)", {"low": np.float32(0)}),
    ],
)
def test_activations_that_saturation_can_do_are_absorbed(
    behind: str, weights: dict[str, np.ndarray], model_of: Build
) -> None:
    model = model_of(CONV % ("", behind), w=W, **weights)
    assert structure.absorbed_activation(model.graph[0], FUSES) is model.graph[1]


@pytest.mark.parametrize(
    ("outputs", "behind", "weights"),
    [
        ("", "y = Clip (c, low, high)", {"low": np.float32(-1), "high": np.float32(1)}),
        ("", "y = Clip (c, low, high)", {"low": np.float32(1), "high": np.float32(6)}),
        ("", "y = Clip (c, , high)", {"high": np.float32(6)}),
        ("", "y = Clip (c)", {}),
        ("", "y = Sigmoid (c)", {}),
        (", float[1,4,6,6] c", "y = Relu (c)", {}),
        (", float[1,4,6,6] z", "y = Relu (c) z = Exp (c)", {}),
        (", float[1,4,6,6] z", "y = Relu (c) z = Relu (c)", {}),
    ],
)
def test_other_activations_are_not_absorbed(
    outputs: str, behind: str, weights: dict[str, np.ndarray], model_of: Build
) -> None:
    model = model_of(CONV % (outputs, behind), w=W, **weights)
    assert structure.absorbed_activation(model.graph[0], FUSES) is None


@pytest.mark.parametrize("bound", ["low", "high"])
def test_a_clip_whose_bounds_are_inputs_is_not_absorbed(bound: str, model_of: Build) -> None:
    text = (CONV % ("", "y = Clip (c, low, high)")).replace("x)", f"x, float {bound})", 1)
    constants = {"low": np.float32(0), "high": np.float32(6)}
    del constants[bound]
    model = model_of(text, w=W, **constants)
    assert structure.absorbed_activation(model.graph[0], FUSES) is None


def test_only_what_the_kernel_fuses_is_absorbed(model_of: Build) -> None:
    model = model_of(CONV % ("", "y = Relu (c)"), w=W)
    assert structure.absorbed_activation(model.graph[0], frozenset({"Clip"})) is None


def test_an_activation_inside_a_subgraph_is_not_absorbed(model_of: Build) -> None:
    text = """(bool b, float[1,3,6,6] x) => (float[1,4,6,6] y) {
        c = Conv <pads = [1,1,1,1]> (x, w)
        y = If (b) <then_branch = t () => (float[1,4,6,6] p) { p = Relu (c) },
                    else_branch = e () => (float[1,4,6,6] q) { q = ConstantOfShape (s) }>
    }"""
    model = model_of(text, w=W, s=np.int64([1, 4, 6, 6]))
    assert structure.absorbed_activation(model.graph[0], FUSES) is None


def test_names_are_those_of_nodes_and_values(model_of: Build) -> None:
    model = model_of("(float[2] x) => (float[2] y) { [act] y = Relu (x) }")
    assert structure.node_name(model.graph[0]) == "act"
    assert structure.name_of(model.graph[0].outputs[0]) == "y"
