from __future__ import annotations

import numpy as np
import onnx.parser
import onnx_ir as ir

from qcompile.calib.work import PER_ELEMENT, Cost


def cost(body: str, **feeds: tuple[int, ...]) -> Cost:
    model = ir.from_proto(onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 21]> {body}'))
    return Cost.of(model, {name: np.zeros(shape, np.float32) for name, shape in feeds.items()})


def test_linear_operators_count_their_multiplications_whatever_the_open_axes() -> None:
    body = """f (float[N,4,8,8] x) => (float[N,6,4,4] y) <float[6,2,3,3] w = {0}> {
        y = Conv <group = 2, strides = [2, 2], pads = [1, 1, 1, 1]> (x, w) }"""
    body = body.replace("{0}", "{" + ",".join(["0"] * 108) + "}")
    assert cost(body, x=(3, 4, 8, 8)).work == (3 * 6 * 4 * 4 * 2 * 3 * 3,)


def test_matrix_products_count_the_axis_that_is_summed_over() -> None:
    body = """f (float[N,5] a, float[5,7] b) => (float[N,7] y, float[5,N] t, float[N,N] g) {
        y = MatMul(a, b) t = Transpose <perm = [1, 0]> (a) g = Gemm <transA = 1> (t, t) }"""
    assert cost(body, a=(3, 5), b=(5, 7)).work == (3 * 7 * 5, PER_ELEMENT * 15, 3 * 3 * 5)


def test_the_peak_is_what_is_alive_at_once() -> None:
    body = "f (float[N] x) => (float[N] z) { a = Neg(x) b = Concat <axis = 0> (a, a) c = Exp(b) z = Slice(c, s, e) }"
    body = body.replace("=> (float[N] z)", "=> (float[N] z) <int64[1] s = {0}, int64[1] e = {10}>")
    # Twenty floats between the nodes, b or c: nothing holds both at once, nor x or a any more.
    assert cost(body, x=(10,)).peak_bytes == 4 * 20


def test_an_output_stays_alive_to_the_end() -> None:
    body = "f (float[N] x) => (float[N] a, float[N] z) { a = Neg(x) b = Exp(a) c = Neg(b) z = Exp(c) }"
    assert cost(body, x=(10,)).peak_bytes == 4 * 20


def test_codes_of_four_bits_have_the_shape_of_what_they_were_made_of() -> None:
    """The runtime has no Shape for them."""
    body = """f (float[N,4] x) => (float[N,4] y) <float s = {0.5}> {
        q = QuantizeLinear <output_dtype = 22> (x, s) y = DequantizeLinear (q, s) }"""
    assert cost(body, x=(3, 4)).work == (PER_ELEMENT * 12, PER_ELEMENT * 12)
