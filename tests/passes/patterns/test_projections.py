from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from qcompile.passes.patterns import projection_at


def test_a_length_that_nobody_inferred(model_of: Callable[..., ir.Model]) -> None:
    """Shapes behind sequences stay open: then there is nothing to tell channels by."""
    text = "(float[A,4] x) => (float[A,%s] y) { y = MatMul (x, w) }"
    known, unknown = (model_of(text % last, w=np.ones((4, 5), np.float32)).graph[0] for last in ("5", "B"))
    projection = projection_at(known)
    assert projection is not None and projection.width == 5
    assert projection_at(unknown) is None
