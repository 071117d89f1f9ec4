from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from qcompile.core import model as models
from qcompile.core import runtime
from qcompile.passes.canonicalize.infer_shapes import InferShapes

Build = Callable[..., Any]


def shapes(model: ir.Model) -> dict[str | None, list[object]]:
    return {
        output.name: None if output.shape is None else [d if isinstance(d, int) else str(d) for d in output.shape]
        for node in model.graph
        for output in node.outputs
    }


def test_every_value_gets_type_and_shape(model_of: Build, rewritten: Build) -> None:
    text = """(float[N,3,8,8] x) => (float[N,4] y) {
        c = Conv <pads = [1,1,1,1], strides = [2,2]> (x, w)
        p = GlobalAveragePool (c)
        y = Flatten (p)
    }"""
    model, _ = rewritten(InferShapes(), model_of(text, w=np.ones((4, 3, 3, 3), np.float32)))
    assert shapes(model) == {"c": ["N", 4, 4, 4], "p": ["N", 4, 1, 1], "y": ["N", 4]}
    assert all(output.dtype is ir.DataType.FLOAT for node in model.graph for output in node.outputs)


def test_shapes_that_are_computed_are_followed(model_of: Build, rewritten: Build) -> None:
    text = """(float[2,3,4] x) => (float[A,B] y) {
        s = Shape (x)
        n = Gather (s, zero)
        u = Unsqueeze (n, axes)
        shape = Concat <axis = 0> (u, rest)
        t = Reshape (x, shape)
        y = Relu (t)
    }"""
    weights = {"zero": np.int64(0), "axes": np.int64([0]), "rest": np.int64([-1])}
    model, _ = rewritten(InferShapes(), model_of(text, **weights))
    assert shapes(model)["t"] == [2, 12]


def test_an_operator_without_inference_does_not_stop_it(proto_of: Build) -> None:
    proto = proto_of("(float[2,3] x) => (float[2,3] y) { a = Relu (x) b = Relu (a) c = Relu (x) y = Add (b, c) }")
    proto.opset_import.append(onnx.helper.make_opsetid("com.example", 1))
    proto.graph.node[1].domain, proto.graph.node[1].op_type = "com.example", "Odd"
    model = models.from_proto(proto)
    InferShapes()(model)
    assert shapes(model)["a"] == shapes(model)["c"] == [2, 3]


def test_values_inside_a_subgraph_stay(model_of: Build, rewritten: Build) -> None:
    text = """(bool c, float[2] x) => (float[2] y) {
        y = If (c) <then_branch = t () => (float[2] a) { a = Exp (x) },
                    else_branch = e () => (float[2] b) { b = Neg (x) }>
    }"""
    rewritten(InferShapes(), model_of(text))


@pytest.mark.parametrize("opset", [9, 11, 13, 21])
def test_opsets(opset: int, model_of: Build, rewritten: Build) -> None:
    model, _ = rewritten(
        InferShapes(), model_of("(float[2,3] x) => (float[3,2] y) { a = Exp (x) y = Transpose (a) }", opset)
    )
    assert shapes(model)["a"] == [2, 3]


def test_a_sequence_is_not_mistaken_for_its_elements(model_of: Build) -> None:
    text = "(float[2] x) => (float[N] y) { s = SequenceConstruct (x, x) y = ConcatFromSequence <axis = 0> (s) }"
    model = model_of(text)
    InferShapes()(model)
    sequence = next(node.outputs[0] for node in model.graph if node.op_type == "SequenceConstruct")
    assert not isinstance(sequence.type, ir.TensorType)
    assert runtime.Session(model).run({"x": np.float32([1, 2])})["y"].shape == (4,)
