"""Operators in float, one by one: what their expressions compute is what ONNX Runtime does, or they are refused."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from island_models import FLOATS, WEIGHTS, agree, model_of

from qcompile.backends.integer import expressions
from qcompile.backends.integer.lower import lower
from qcompile.core.errors import TargetError

MORE = (*FLOATS, *expressions.FUNCTIONS, *expressions.PAIRS, "Expand", "ReduceMax", "ReduceSum", "RMSNormalization")
#: Codes of x, and what makes codes of `v`.
CODES = """
    s = Constant<value = float {0.03125}>()  z = Constant<value = int8 {0}>()
    qx = QuantizeLinear(x, s, z)  dx = DequantizeLinear(qx, s, z)
    sw = Constant<value = float {0.02}>()  dw = DequantizeLinear(w, sw)
"""
KEYS = "t = Transpose<perm = [0, 2, 1]>(x)  qt = QuantizeLinear(t, s, z)  k = DequantizeLinear(qt, s, z)"
BEHIND = "q = QuantizeLinear(v, s, z)  y = DequantizeLinear(q, s, z)"


def x(shape=(1, 4, 8), low=-3.0):
    return {"x": np.random.default_rng(1).uniform(low, 3.0, shape).astype(np.float32)}


#: Those whose attributes matter, and those that are not defined everywhere.
FUNCTIONS = {name: (f"{name}(x)", -3.0) for name in expressions.FUNCTIONS if name != "Not"} | {
    "Sqrt": ("Sqrt(x)", 0.1),
    "Reciprocal": ("Reciprocal(x)", 0.1),
    "Gelu by tanh": ('Gelu<approximate = "tanh">(x)', -3.0),
    "HardSigmoid, given": ("HardSigmoid<alpha = 0.3, beta = 0.25>(x)", -3.0),
    "LeakyRelu, given": ("LeakyRelu<alpha = 0.3>(x)", -3.0),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_of_one_value(name):
    node, low = FUNCTIONS[name]
    agree(model_of(f"y = {node}"), x(low=low), 2e-6, MORE)


BODIES = {
    "Max": "y = Max(x, h)",
    "Min of three": "t = Neg(x)  y = Min(x, h, t)",
    "Div by a number": "k = Constant<value = float {-3.0}>()  y = Div(x, k)",
    "Div by nothing that has an inverse": "k = Constant<value = float {1e-39}>()  p = Abs(x)  t = Div(p, k)"
    "  y = Min(t, h)",
    "Div by a tensor": "y = Div(x, h)",
    "where less": "c = Less(x, h)  y = Where(c, x, h)",
    "where equal, turned": "c = Equal(x, x)  n = Not(c)  y = Where(n, h, x)",
    "Cast to truth and back": "p = Relu(x)  c = Cast<to = 9>(p)  f = Cast<to = 1>(c)  y = Add(f, h)",
    "Clip": "a = Sigmoid(x)  k = Constant<value = float {0.2}>()  o = Constant<value = float {0.7}>()"
    "  y = Clip(a, k, o)",
    "Clip from below": "a = Neg(x)  k = Constant<value = float {0.2}>()  y = Clip(a, k)",
    "Clip from above": "a = Neg(x)  o = Constant<value = float {0.7}>()  y = Clip(a, , o)",
    "Pow 2": "two = Constant<value = float {2.0}>()  y = Pow(x, two)",
    "Pow 0.5": "a = Abs(x)  half = Constant<value = float {0.5}>()  y = Pow(a, half)",
    "Expand": "m = ReduceMax<keepdims = 1>(x)  e = Constant<value = int64[3] {1, 4, 8}>()  y = Expand(m, e)",
    "RMSNormalization": "y = LayerNormalization<axis = -1>(x, g)",
    "Softmax over rows": "y = Softmax<axis = 1>(x)",
    "sums of all": "m = ReduceSum<keepdims = 1>(x)  y = Add(x, m)",
    "norm": "two = Constant<value = int64[1] {2}>()  m = ReduceL2(x, two)  y = Div(x, m)",
    "a product of floats": "t = Transpose<perm = [0, 2, 1]>(x)  a = MatMul(x, t)  two = Constant<value = float {2.0}>()"
    "  b = Div(a, two)  y = MatMul(b, x)",
    "a float product that is rounded": f"{CODES} a = Sigmoid(x)  v = MatMul(a, dw)  y = Identity(v)",
    "read twice": f"{CODES} m = MatMul(dx, dw)  r = Relu(m)  e = Neg(m)  y = Add(r, e)",
}


@pytest.mark.parametrize("name", BODIES)
def test_operators_of_several_values(name):
    generator = np.random.default_rng(5)
    constants = {"h": generator.uniform(0.5, 2.0, (4, 8)).astype(np.float32), "g": generator.normal(1, 0.2, 8)}
    model = model_of(BODIES[name], h=constants["h"], g=constants["g"].astype(np.float32))
    agree(model, x(), 0.03 if "Dequantize" in BODIES[name] else 5e-6, MORE)


def test_a_product_of_two_activations_leaves_as_codes_or_in_float():
    codes = "so = Constant<value = float {0.25}>()  q = QuantizeLinear(v, so, z)  y = DequantizeLinear(q, so, z)"
    for body in (codes, "two = Constant<value = float {2.0}>()  y = Div(v, two)"):
        text = f"{CODES} {KEYS} v = MatMul(dx, k)  {body}"
        agree(model_of(text, outputs="float[1,4,4] y"), x(), 1e-6 if "Div" in body else 2e-2)


ROWS = {"table": np.arange(-20, 20, dtype=np.int8).reshape(5, 8), "scale": np.full(8, 0.5, np.float32)}
#: Body, inputs, outputs, constants, the operator that is named and what is said of it.
X, Y, IDS = "float[1,4,8] x", "float[1,4,8] y", "int64[1,4] ids"
REFUSED = {
    "codes of a table": (
        "r = Gather(table, ids)  y = Relu(r)",
        IDS,
        "int8[1,4,8] y",
        ROWS,
        "Relu",
        "reads codes of a table as floats",
    ),
    "codes of a table that leave": (
        "y = Gather(table, ids)",
        IDS,
        "int8[1,4,8] y",
        ROWS,
        "Gather",
        "leaves the model as codes of a table",
    ),
    "scales by row": (
        "r = Gather(table, ids)  y = DequantizeLinear<axis = 1>(r, t)",
        IDS,
        Y,
        ROWS | {"t": np.ones(4, np.float32)},
        "DequantizeLinear",
        "or scales by row",
    ),
    "a table of uint8": (
        "r = Gather(table, ids)  y = DequantizeLinear(r, s)",
        IDS,
        Y,
        {"table": np.zeros((5, 8), np.uint8), "s": np.float32(1)},
        "Gather",
        "has a table of uint8",
    ),
    "what is no table": (
        "y = Gather(x, ids)",
        "float[1,4,8] x, int64[2] ids",
        "float[2,4,8] y",
        {},
        "Gather",
        "picks from what is no table",
    ),
    "computed indices": (
        "i = Add(ids, ids)  y = Gather(t, i)",
        IDS,
        Y,
        {"t": np.ones((5, 8), np.float32)},
        "Gather",
        "picks what is computed",
    ),
    "half floats": ("y = Cast<to = 10>(x)", X, "float16[1,4,8] y", {}, "Cast", "casts FLOAT to FLOAT16"),
    "integers of floats": ("y = Cast<to = 7>(x)", X, "int64[1,4,8] y", {}, "Cast", "makes integers of floats"),
    "a cube": ("k = Constant<value = float {3.0}>()  y = Pow(x, k)", X, Y, {}, "Pow", "has an exponent other than"),
    "several axes": (
        "y = LayerNormalization<axis = 1>(x, g)",
        X,
        Y,
        {"g": np.ones((4, 8), np.float32)},
        "LayerNormalization",
        "goes over several axes",
    ),
    "codes behind bounds": (
        f"{CODES} n = Softmax(x)  v = Relu(n)  {BEHIND}",
        X,
        Y,
        {},
        "Softmax",
        "has a Relu or Clip behind it",
    ),
    "floats behind bounds": ("n = Softmax(x)  y = Relu(n)", X, Y, {}, "Softmax", "has a Relu or Clip behind it"),
    "blocks with codes behind bounds": (
        f"{CODES} a = Sigmoid(x)  m = MatMul(a, dw)  v = Relu(m)  {BEHIND}",
        X,
        Y,
        {},
        "MatMul",
        "computes in float, and has a Relu",
    ),
    "a convolution of floats": (
        f"{CODES} a = Sigmoid(x)  c = Reshape(w, h)  d = DequantizeLinear(f, sw)  y = Conv(a, d)",
        X,
        "float[1,2,6] y",
        {"h": np.array([8, 8]), "f": np.ones((2, 4, 3), np.int8)},
        "Conv",
        "reads floats, and has no kernel",
    ),
    "a turned matrix": (
        f"{CODES} a = Sigmoid(x)  y = Gemm<transA = 1>(a, dw)",
        "float[8,4] x",
        "float[4,8] y",
        {},
        "Gemm",
        "transposes its first matrix",
    ),
    "a vector": (
        f"{CODES} f = Reshape(x, h)  qf = QuantizeLinear(f, s, z)  df = DequantizeLinear(qf, s, z)  y = MatMul(dx, df)",
        "float[1,1,8] x",
        "float[1,1] y",
        {"h": np.array([8])},
        "MatMul",
        "multiplies by a vector",
    ),
    "sixteen bits": (
        CODES.replace("int8", "int16").replace("dw = DequantizeLinear(w, sw)", "")
        + "t = Transpose<perm = [0, 2, 1]>(x)  qt = QuantizeLinear(t, s, z)"
        "  k = DequantizeLinear(qt, s, z)  y = MatMul(dx, k)",
        X,
        "float[1,4,4] y",
        {},
        "MatMul",
        "multiplies int16 by int16",
    ),
    "many products": (
        f"{CODES} {KEYS} y = MatMul(dx, k)",
        "float[1,1,70000] x",
        "float[1,1,1] y",
        {},
        "MatMul",
        "adds up 70000 products",
    ),
    "a scale that is computed": (
        f"{CODES} a = Sigmoid(x)  b = Identity(bias)  y = Gemm(a, dw, b)",
        "float[4,8] x",
        "float[4,8] y",
        {"bias": np.ones(8, np.float32)},
        "Gemm",
        "which is no constant",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_form_in_float_is_refused_by_name(name):
    body, inputs, outputs, constants, guilty, fact = REFUSED[name]
    model = ir.from_proto(model_of(body, inputs, outputs, **constants))
    with pytest.raises(TargetError) as caught:
        lower(model, (*MORE, "Gemm", "Reshape"))
    assert caught.value.place.startswith(guilty) and fact in caught.value.fact, caught.value
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint16"])
@pytest.mark.parametrize("told", ["zero point", "type"])
def test_codes_stand_for_what_onnx_says(dtype, told):
    """Also where QuantizeLinear names their type and there is no zero point."""
    kind = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    zero, given = (", z", "") if told == "zero point" else ("", f"<output_dtype = {kind}>")
    body = f"q = QuantizeLinear{given}(x, s{zero})  y = DequantizeLinear(q, s{zero})"
    agree(model_of(body, s=np.float32(0.05), z=np.array(3, dtype)), x(), 1e-6, ())


def test_a_program_describes_itself_in_json():
    body = f"{CODES} m = MatMul(dx, dw)  b = Add(m, h)  n = LayerNormalization(b, g)  y = Softmax(n)"
    model = model_of(body, h=np.ones(8, np.float32), g=np.ones(8, np.float32))
    program = lower(ir.from_proto(model), FLOATS)
    told = json.loads(json.dumps(program.as_json()))
    assert [entry["kind"] for entry in told["operations"]] == [type(each).__name__ for each in program.operations]
    assert {entry["name"] for entry in told["tensors"]} == set(program.tensors)
    weights = next(entry for entry in told["operations"] if entry["kind"] == "FloatDense")["weights"]
    digest = hashlib.sha256(np.ascontiguousarray(WEIGHTS.T).tobytes()).hexdigest()
    assert weights == {"shape": [8, 8], "dtype": "int8", "sha256": digest}


def test_shapes_that_constants_tell_are_found():
    body = f"""{CODES} h = Shape(dx)  k = Div(h, ones)  f = Reshape(dx, k)
        e = Identity(first)  c = Slice(f, e, last, first)  y = MatMul(c, dw)"""
    constants = {"ones": np.ones(3, np.int64), "first": np.array([1]), "last": np.array([3])}
    agree(model_of(body, outputs="float[1,2,8] y", **constants), x(), 2e-2)
