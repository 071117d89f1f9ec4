"""QDQ models with operators in float, and what holds their programs to ONNX Runtime."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import onnxruntime

from qcompile.backends.integer.interpret import dequantize_output, interpret, quantize_input
from qcompile.backends.integer.lower import lower

FLOATS = (
    "Add", "Cast", "Clip", "Div", "Equal", "Erf", "Gather", "LayerNormalization", "Mul", "Pow", "ReduceL2",
    "ReduceMean", "Relu", "Sigmoid", "Softmax", "Sqrt", "Sub", "Where",
)  # fmt: skip
HEAD = '<ir_version: 10, opset_import: ["": 21]>\n'
WEIGHTS = np.random.default_rng(0).integers(-127, 128, (8, 8)).astype(np.int8)


def model_of(body, inputs="float[1,4,8] x", outputs="float[1,4,8] y", **constants):
    text = f"{HEAD} g ({inputs}) => ({outputs}) {{ {body} }}"
    model = onnx.parser.parse_model(text)
    given = {"w": WEIGHTS} | constants
    read = {name for node in model.graph.node for name in node.input}
    model.graph.initializer.extend(onnx.numpy_helper.from_array(v, k) for k, v in given.items() if k in read)
    _lift(model.graph)
    return onnx.shape_inference.infer_shapes(model, strict_mode=True)


def _lift(graph):
    """Make initializers of constants, as canonicalizing does."""
    for node in [node for node in graph.node if node.op_type == "Constant"]:
        (given,) = node.attribute
        array = onnx.numpy_helper.to_array(given.t) if given.HasField("t") else np.float32(given.f)
        graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(array), node.output[0]))
        graph.node.remove(node)


def agree(model, feeds, tolerance, floats=FLOATS):
    """Hold the interpreter's outputs to ONNX Runtime's without optimizations, and return the program."""
    program = lower(ir.from_proto(model), floats)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    expected = onnxruntime.InferenceSession(model.SerializeToString(), options).run(None, feeds)
    found = interpret(program, {p.name: quantize_input(program, p, feeds[p.name]) for p in program.inputs})
    for port, wanted in zip(program.outputs, expected, strict=True):
        assert np.abs(wanted).max() > 0.0
        real = dequantize_output(program, port, found[port.name])
        np.testing.assert_allclose(real, wanted, atol=tolerance * np.abs(wanted).max())
    return program
