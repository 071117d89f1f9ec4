"""Which input is an attention's mask."""

from __future__ import annotations

import onnx
import onnx.parser
import onnx_ir as ir
import pytest

from qcompile.passes.patterns.masks import attention_mask

MODEL = """
<ir_version: 10, opset_import: ["": 21]>
g (float[1,T,T] scores, int64[1,T] mask, float[1,T] other) => (float[1,T,T] y) {{
  one = Constant <value_float = 1.0> ()
  far = Constant <value_float = -10000.0> ()
  axes = Constant <value_ints = [1]> ()
  {body}
}}
"""
ADDED = """
  real = Cast <to = 1> (mask)
  inverse = Sub (one, real)
  bias = Mul (inverse, far)
  wide = Unsqueeze (bias, axes)
  eighth = Div (scores, one)
  masked = Add (eighth, wide)
  {rest}
"""
CHOSEN = """
  bits = Cast <to = 9> (mask)
  size = Shape (scores)
  wide = Unsqueeze (bits, axes)
  expanded = Expand (wide, size)
  masked = Where (expanded, scores, far)
  {rest}
"""


def found(body):
    model = ir.from_proto(onnx.parser.parse_model(MODEL.format(body=body)))
    mask = attention_mask(model.graph)
    return mask and mask.name


PRODUCT = "s = MatMul (scores, scores)\n"
REAL = PRODUCT + "r = Cast <to = 1> (mask)\n"


@pytest.mark.parametrize("body", [ADDED, CHOSEN], ids=["added", "chosen"])
def test_a_mask_is_what_is_added_to_scores_or_chooses_among_them(body):
    made = PRODUCT + body.replace("(scores, one)", "(s, one)").replace("(expanded, scores", "(expanded, s")
    assert found(made.format(rest="y = Softmax (masked)")) == "mask"


def test_every_layer_has_the_same_one():
    # The scores of a second layer are made of everything.
    second = "a = Softmax (masked)\n b = MatMul (a, s)\n c = Add (b, wide)\n y = Softmax (c)"
    assert found(PRODUCT + ADDED.replace("(scores, one)", "(s, one)").format(rest=second)) == "mask"


@pytest.mark.parametrize(
    "body",
    [
        "y = Softmax (scores)",
        PRODUCT + "y = Add (s, s)",
        # Another input scores the mask first, or one Softmax is not masked.
        REAL + "m = Mul (r, other)\n n = Add (s, m)\n y = Softmax (n)",
        REAL + "n = Add (s, r)\n a = Softmax (n)\n y = Softmax (s)",
        # Two inputs are added, and nothing tells which one masks.
        REAL + "m = Add (s, r)\n n = Add (m, other)\n y = Softmax (n)",
        # What is multiplied with scores keeps nothing out.
        REAL + "n = Mul (s, r)\n y = Softmax (n)",
    ],
)
def test_what_is_none_or_not_the_only_one_is_not_taken_for_it(body):
    assert found(body) is None
