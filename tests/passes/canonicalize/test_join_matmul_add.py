from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from qcompile.passes.canonicalize.infer_shapes import InferShapes
from qcompile.passes.canonicalize.join_matmul_add import JoinMatMulAdd

Build = Callable[..., Any]
W = np.arange(12, dtype=np.float32).reshape(3, 4)


@pytest.mark.parametrize("shape", [(4,), (1, 4)])
@pytest.mark.parametrize("operands", ["m, b", "b, m"])
def test_a_bias_per_column_is_joined(
    shape: tuple[int, ...], operands: str, model_of: Build, rewritten: Build, types: Build
) -> None:
    bias = np.linspace(-1, 1, 4, dtype=np.float32).reshape(shape)
    model = model_of(f"(float[N,3] x) => (float[N,4] y) {{ m = MatMul (x, w) y = Add ({operands}) }}", w=W, b=bias)
    joined, _ = rewritten(JoinMatMulAdd(), model)
    assert types(joined) == ["Gemm"]


@pytest.mark.parametrize(
    ("body", "bias"),
    [
        ("(float[2,N,3] x) => (float[2,N,4] y) { m = MatMul (x, w) y = Add (m, b) }", [1.0, 2, 3, 4]),
        ("(float[N,3] x) => (float[N,4] y) { m = MatMul (x, w) y = Add (m, b) }", 1.0),
        ("(float[2,3] x) => (float[2,4] y) { m = MatMul (x, w) y = Add (m, b) }", [[1.0] * 4, [2.0] * 4]),
        ("(float[N,3] x) => (float[N,4] y) { m = MatMul (x, w) y = Add (m, b) }", [1.0, -np.inf, 3, 4]),
        ("(float[N,3] x) => (float[N,4] y, float[N,4] m) { m = MatMul (x, w) y = Add (m, b) }", [1.0, 2, 3, 4]),
        ("(float[N,3] x) => (float[N,4] y) { m = MatMul (x, w) y = Add (m, m) }", [1.0, 2, 3, 4]),
        ("(float[N,3] x, float[3,4] v) => (float[N,4] y) { m = MatMul (x, v) y = Add (m, b) }", [1.0, 2, 3, 4]),
    ],
    ids=["rank 3", "scalar", "per row", "a mask", "an output", "added to itself", "weights that vary"],
)
def test_what_is_no_bias_of_a_matrix_stays(
    body: str, bias: object, model_of: Build, rewritten: Build, types: Build
) -> None:
    model = model_of(body, w=W, b=np.float32(bias))
    InferShapes()(model)
    kept, _ = rewritten(JoinMatMulAdd(), model)
    assert types(kept) == ["MatMul", "Add"]
