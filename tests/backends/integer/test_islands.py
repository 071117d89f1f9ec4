"""What stays in float is lowered beside integers where a target allows it, and refused by name where not."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from island_models import FLOATS, agree, model_of

from qcompile.backends.integer import float_operations as ops
from qcompile.backends.integer.lower import lower
from qcompile.backends.integer.operations import Concat, Dense, Slice
from qcompile.core.errors import TargetError

#: Codes of x (scale 1/32) and a dense layer of it.
LAYER = """
    s = Constant<value = float {0.03125}>()  z = Constant<value = int8 {0}>()
    qx = QuantizeLinear(x, s, z)  dx = DequantizeLinear(qx, s, z)
    sw = Constant<value = float {0.02}>()
    dw = DequantizeLinear(w, sw)
    m = MatMul(dx, dw)
"""


def x(shape=(1, 4, 8)):
    return {"x": np.random.default_rng(1).normal(size=shape).astype(np.float32)}


def kinds(program):
    return [type(operation) for operation in program.operations]


def test_a_dense_layer_leaves_in_float_with_bias_and_factor_folded():
    bias = np.random.default_rng(2).normal(size=8).astype(np.float32)
    body = LAYER + "b = Add(m, bias)  two = Constant<value = float {2.0}>()  y = Div(b, two)"
    program = agree(model_of(body, bias=bias), x(), 1e-4)
    assert kinds(program) == [ops.FloatDense]


def test_a_residual_and_a_norm_are_one_operation_and_codes_are_made_of_floats_at_once():
    gamma, beta = np.random.default_rng(3).normal(1, 0.2, (2, 8)).astype(np.float32)
    body = LAYER + (
        "r = Add(m, x)  n = LayerNormalization<axis = -1, epsilon = 0.00001>(r, gamma, beta)\n"
        "so = Constant<value = float {0.05}>()  q = QuantizeLinear(n, so, z)  d = DequantizeLinear(q, so, z)\n"
        "m2 = MatMul(d, dw)  y = Add(m2, n)"
    )
    program = agree(model_of(body, gamma=gamma, beta=beta), x(), 2e-2)
    assert kinds(program) == [
        ops.Pointwise,
        ops.FloatDense,
        ops.Normalize,
        ops.Pointwise,
        ops.FloatDense,
        ops.Pointwise,
    ]


def test_gelu_is_written_as_codes():
    body = LAYER + (
        "r = Constant<value = float {1.41421356}>()  one = Constant<value = float {1.0}>()\n"
        "h = Div(m, r)  e = Erf(h)  p = Add(e, one)  g = Mul(m, p)\n"
        "so = Constant<value = float {0.05}>()  q = QuantizeLinear(g, so, z)  d = DequantizeLinear(q, so, z)\n"
        "y = MatMul(d, dw)"
    )
    program = agree(model_of(body), x(), 2e-2)
    assert kinds(program)[-2:] == [ops.Pointwise, ops.FloatDense]
    assert program.tensors[program.operations[-2].output].dtype == "int8"


ATTENTION = """
    s = Constant<value = float {0.03125}>()  z = Constant<value = int8 {0}>()  low = Constant<value = int8 {-128}>()
    qx = QuantizeLinear(x, s, z)  dx = DequantizeLinear(qx, s, z)
    sw = Constant<value = float {0.02}>()  dw = DequantizeLinear(w, sw)
    sk = Constant<value = float {0.08}>()
    shape = Constant<value = int64[4] {1, 4, 2, 4}>()  flat = Constant<value = int64[3] {1, 4, 8}>()
    k0 = MatMul(dx, dw)  k1 = Reshape(k0, shape)  k2 = Transpose<perm = [0, 2, 3, 1]>(k1)
    kq = QuantizeLinear(k2, sk, ZERO)  k = DequantizeLinear(kq, sk, ZERO)
    v0 = Reshape(dx, shape)  v1 = Transpose<perm = [0, 2, 1, 3]>(v0)  v2 = QuantizeLinear(v1, s, z)
    v = DequantizeLinear(v2, s, z)
    a0 = MatMul(v, k)  half = Constant<value = float {0.5}>()  a1 = Mul(a0, half)
    f = Cast<to = 1>(mask)  one = Constant<value = float {1.0}>()  far = Constant<value = float {-10000.0}>()
    g = Sub(one, f)  u = Mul(g, far)  a2 = Add(a1, u)
    p = Softmax<axis = -1>(a2)
    sp = Constant<value = float {0.00392157}>()  pq = QuantizeLinear(p, sp, low)  pd = DequantizeLinear(pq, sp, low)
    c = MatMul(pd, v)  c1 = Transpose<perm = [0, 2, 1, 3]>(c)  y = Reshape(c1, flat)
"""
WITH_MASK = "float[1,4,8] x, int64[1,1,1,4] mask"


def test_an_attention_multiplies_codes_and_moves_nothing():
    feeds = x() | {"mask": np.array([[[[1, 1, 1, 0]]]])}
    program = agree(model_of(ATTENTION.replace("ZERO", "z"), WITH_MASK), feeds, 2e-2)
    assert ops.FloatSoftmax in kinds(program)
    assert kinds(program).count(ops.MatMul) == 2
    assert "Transpose" not in {kind.__name__ for kind in kinds(program)}
    assert Dense in kinds(program), "the keys leave their layer as codes"
    assert [program.tensors[port.tensor].dtype for port in program.inputs] == ["int8", "int64"]


def test_a_second_matrix_with_a_zero_point_is_refused():
    with pytest.raises(TargetError, match="zero point"):
        lower(ir.from_proto(model_of(ATTENTION.replace("ZERO", "low"), WITH_MASK)), FLOATS)


def test_rows_of_a_table_are_dequantized_by_the_lookup():
    table, scale = np.random.default_rng(4).integers(-127, 128, (50, 8)).astype(np.int8), np.full(8, 0.02, np.float32)
    body = "r = Gather(table, ids)  d = DequantizeLinear<axis = 2>(r, scale)  y = Mul(d, d)"
    program = agree(
        model_of(body, "int64[1,4] ids", table=table, scale=scale), {"ids": np.array([[0, 49, 7, 7]])}, 1e-6
    )
    assert kinds(program) == [ops.Gather, ops.Pointwise]


@pytest.mark.parametrize("keep", [0, 1])
@pytest.mark.parametrize(("kind", "axes"), [("ReduceMean", "1"), ("ReduceL2", "2"), ("ReduceMean", "0, 1, 2")])
def test_reductions_keep_or_drop_their_axes(kind, axes, keep):
    gone = [int(axis) for axis in axes.split(", ")]
    shape = [1 if axis in gone else n for axis, n in enumerate((1, 4, 8)) if keep or axis not in gone]
    body = f"a = Constant<value = int64[{len(gone)}] {{{axes}}}>()  y = {kind}<keepdims = {keep}>(x, a)"
    agree(model_of(body, outputs=f"float[{','.join(map(str, shape))}] y"), x(), 1e-6)


def test_what_has_no_kernel_in_float_is_refused_by_name():
    model = model_of("y = Elu(x)")
    with pytest.raises(TargetError, match="Elu"):
        lower(ir.from_proto(model), FLOATS)
    with pytest.raises(TargetError, match="Softmax"):
        lower(ir.from_proto(model_of("y = Softmax(x)")), ("Add",))


def test_products_in_float_are_a_target_s_that_has_floats():
    model = model_of("t = Transpose<perm = [0, 2, 1]>(x)  y = MatMul(x, t)", outputs="float[1,4,4] y")
    assert kinds(agree(model, x(), 1e-6)) == [ops.FloatMatMul]
    with pytest.raises(TargetError, match=r"MatMul.*float"):
        lower(ir.from_proto(model))


def test_a_target_without_floats_goes_on_refusing_them():
    body = LAYER + "n = Softmax(m)  y = Add(n, m)"
    with pytest.raises(TargetError):
        lower(ir.from_proto(model_of(body)))


def test_what_depends_on_one_code_alone_is_a_table():
    body = (
        "s = Constant<value = float {0.03125}>()  z = Constant<value = int8 {0}>()\n"
        "qx = QuantizeLinear(x, s, z)  dx = DequantizeLinear(qx, s, z)\n"
        "r = Constant<value = float {1.41421356}>()  one = Constant<value = float {1.0}>()\n"
        "h = Div(dx, r)  e = Erf(h)  p = Add(e, one)  g = Mul(dx, p)\n"
        "so = Constant<value = float {0.02}>()  q = QuantizeLinear(g, so, z)  y = DequantizeLinear(q, so, z)"
    )
    program = agree(model_of(body), x(), 1e-6)
    assert [kind.__name__ for kind in kinds(program)] == ["Lookup"]


def test_floats_are_joined_as_they_are_and_never_with_codes():
    model = model_of("a = Sigmoid (x) b = Sub (a, x) y = Concat <axis = 1> (a, b)", outputs="float[1,8,8] y")
    program = agree(model, x(), 1e-6)
    assert Concat in kinds(program)
    mixed = LAYER + "r = Sigmoid (m) one = Transpose <perm = [0, 1, 2]> (dx) y = Concat <axis = 1> (r, one)"
    with pytest.raises(TargetError, match="joins floats and codes"):
        lower(ir.from_proto(model_of(mixed, outputs="float[1,8,8] y")), FLOATS)


@pytest.mark.parametrize(("axis", "index"), [(0, 0), (1, -1), (2, 3)])
def test_one_place_of_an_activation_is_a_slice(axis, index):
    shape = [str(size) for place, size in enumerate((1, 4, 8)) if place != axis]
    body = (
        f"i = Constant <value = int64 {{{index}}}> () a = Sigmoid (x) b = Sub (a, x) y = Gather <axis = {axis}> (b, i)"
    )
    program = agree(model_of(body, outputs=f"float[{','.join(shape)}] y"), x(), 1e-6)
    assert Slice in kinds(program)
    codes = f"{LAYER} i = Constant <value = int64 {{{index}}}> () p = Gather <axis = {axis}> (dx, i) y = Sigmoid (p)"
    made = agree(model_of(codes, outputs=f"float[{','.join(shape)}] y"), x(), 1e-2)
    assert Slice in kinds(made)


def test_what_picks_several_places_is_refused():
    body = "i = Constant <value = int64[2] {0, 2}> () a = Sigmoid (x) y = Gather <axis = 1> (a, i)"
    with pytest.raises(TargetError, match="Gather"):
        lower(ir.from_proto(model_of(body, outputs="float[1,2,8] y")), FLOATS)


#: A token in front of codes of x, further away than these reach.
TOKEN = (
    "s = Constant<value = float {0.03125}>()  z = Constant<value = int8 {0}>()\n"
    "qx = QuantizeLinear(x, s, z)  dx = DequantizeLinear(qx, s, z)\n"
    "t = Transpose<perm = [0, 2, 1]>(dx)  j = Concat<axis = 2>(token, t)\n"
)
FIVE = {"token": np.linspace(-9.0, 9.0, 8).astype(np.float32).reshape(1, 8, 1)}


def test_a_constant_is_joined_in_the_codes_of_the_result():
    behind = "so = Constant<value = float {0.1}>()  q = QuantizeLinear(j, so, z)  y = DequantizeLinear(q, so, z)"
    program = agree(model_of(TOKEN + behind, outputs="float[1,8,5] y", **FIVE), x(), 1e-6)
    assert [kind.__name__ for kind in kinds(program)] == ["Pointwise", "Lookup", "Concat"]
    assert {tensor.dtype for tensor in program.tensors.values()} == {"int8"}
    assert "Transpose" not in {kind.__name__ for kind in kinds(program)}


def test_a_constant_is_joined_in_float_where_floats_read_it_or_come_in():
    read = f"{TOKEN} y = Softmax<axis = 1>(j)"
    program = agree(model_of(read, outputs="float[1,8,5] y", **FIVE), x(), 1e-6)
    assert Concat in kinds(program) and program.tensors[program.operations[-1].output].dtype == "float32"
    given = {"token": np.ones((1, 2, 8), np.float32)}
    model = model_of("a = Sigmoid (x) b = Sub (a, x) y = Concat <axis = 1> (b, token, x)",
                     outputs="float[1,10,8] y", **given)  # fmt: skip
    assert Concat in kinds(agree(model, x(), 1e-6))


def test_a_constant_with_codes_of_its_own_is_joined():
    given = {"c": np.arange(-4, 4, dtype=np.int8).reshape(1, 1, 8)}
    body = (
        "s = Constant<value = float {0.03125}>()  z = Constant<value = int8 {0}>()\n"
        "qx = QuantizeLinear(x, s, z)  dx = DequantizeLinear(qx, s, z)  dc = DequantizeLinear(c, s, z)\n"
        "j = Concat<axis = 1>(dx, dc)  q = QuantizeLinear(j, s, z)  y = DequantizeLinear(q, s, z)"
    )
    program = agree(model_of(body, outputs="float[1,5,8] y", **given), x(), 1e-6)
    assert [kind.__name__ for kind in kinds(program)] == ["Pointwise", "Concat"]


def test_bounds_behind_a_constant_that_is_joined_and_integers_are_refused():
    behind = "p = Constant<value = float {0.1}>() r = Relu(j) q = QuantizeLinear(r, p, z) y = DequantizeLinear(q, p, z)"
    with pytest.raises(TargetError, match="has a Relu or Clip behind it"):
        lower(ir.from_proto(model_of(TOKEN + behind, outputs="float[1,8,5] y", **FIVE)), FLOATS)
    ids = model_of("j = Concat<axis = 1>(first, ids)  r = Gather(table, j)  y = Mul(r, r)", "int64[1,4] ids",
                   "float[1,5,8] y", first=np.zeros((1, 1), np.int64), table=np.ones((9, 8), np.float32))  # fmt: skip
    with pytest.raises(TargetError, match="joins integers and constants"):
        lower(ir.from_proto(ids), FLOATS)
