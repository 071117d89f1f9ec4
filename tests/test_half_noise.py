"""Nodes that float16 is too coarse for: found where a model magnifies rounding, and no fault is taken for one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcompile import Options, compile, continuous
from qcompile.backends.ort import half
from qcompile.backends.ort.half import Halve, float_values
from qcompile.backends.ort.simulate_halves import simulated
from qcompile.core import runtime
from qcompile.core.errors import VerificationError
from qcompile.half_noise import coarse_nodes, fewest
from qcompile.passes.canonicalize import Canonicalize

Build = Callable[..., ir.Model]
Array = np.ndarray[Any, np.dtype[Any]]
RANDOM = np.random.default_rng(7)
W, V, U = (RANDOM.standard_normal((8, 8)).astype(np.float32) for _ in range(3))
#: Two products that nearly cancel, and a tail that magnifies nothing.
CANCELS = """(float[4,8] x) => (float[4,8] y) {
    a = MatMul (x, w) b = MatMul (x, v) d = Sub (a, b) e = MatMul (d, u) f = Relu (e) y = MatMul (f, u)
}"""
X = RANDOM.standard_normal((4, 8)).astype(np.float32)


def cancelling(model_of: Build, apart: float) -> ir.Model:
    built = model_of(CANCELS, w=W, v=(W + apart * V).astype(np.float32), u=U)
    return Canonicalize(21, {})(built).model


def everything(model: ir.Model) -> Halve:
    """Return the pass for a model whose values are all known to fit."""
    return Halve(dict.fromkeys(float_values(model), 1.0))


def test_what_is_magnified_stays_and_nothing_else(model_of: Build) -> None:
    model = cancelling(model_of, 1e-3)
    found = coarse_nodes(everything(model), model, [{"x": X}, {"x": 2 * X}])
    kept = {node.outputs[0].name for node in model.graph if node.name in found}
    assert {"a", "b"} <= kept and not {"e", "f", "y"} & kept
    assert all(moved > 0 for moved in found.values())
    chosen = Halve(dict.fromkeys(float_values(model), 1.0), coarse=dict.fromkeys(found, "coarse"))
    rewritten = chosen(model.clone()).model
    assert continuous.hold("pass Halve", model, rewritten, [{"x": X}, {"x": 2 * X}]) <= continuous.FORM_BOUND
    with pytest.raises(VerificationError, match="moves by"):
        continuous.hold("pass Halve", model, everything(model)(model.clone()).model, [{"x": X}])


def test_where_nothing_is_magnified_nothing_stays(model_of: Build) -> None:
    model = cancelling(model_of, 1.0)
    assert coarse_nodes(everything(model), model, [{"x": X}]) == {}


def test_a_fault_of_the_pass_is_no_rounding(model_of: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    model = cancelling(model_of, 1.0)
    constant = half._Writer._constant
    monkeypatch.setattr(
        half._Writer, "_constant", lambda self, array, name: constant(self, np.rint(2 * array) / 2, name)
    )
    assert coarse_nodes(everything(model), model, [{"x": X}]) == {}
    with pytest.raises(VerificationError, match="moves by"):
        continuous.hold("pass Halve", model, everything(model)(model.clone()).model, [{"x": X}])


def test_codes_that_an_operator_computes_on_hide_what_moves(model_of: Build) -> None:
    text = "(float[2] x) => (uint8[2] y) { y = QuantizeLinear (x, s, z) }"
    model = model_of(text, s=np.float32(0.1), z=np.uint8(0))
    assert coarse_nodes(everything(model), model, [{"x": X[0, :2]}]) == {}


@pytest.mark.parametrize("chosen", [{"MatMul"}, {"Relu"}, {"MatMul", "Relu"}])
def test_rounding_is_that_of_numpy(model_of: Build, chosen: set[str]) -> None:
    text = "(float[4,8] x) => (float[4,8] y, float[4,8] z) { a = MatMul (x, w) y = Relu (a) z = Neg (a) }"
    x, w = RANDOM.integers(-4000, 4000, (4, 8)), RANDOM.integers(-1, 2, (8, 8))  # sums of which are exact in float32
    model = Canonicalize(21, {})(model_of(text, w=w.astype(np.float32))).model
    names = frozenset(str(node.name) for node in model.graph if node.op_type in chosen)
    found = runtime.Session(simulated(model, names), optimize=False).run({"x": x.astype(np.float32)})

    def rounded(array: Array) -> Array:
        return array.astype(np.float16).astype(np.float32)

    a = rounded(rounded(x) @ w) if "MatMul" in chosen else (x @ w).astype(np.float32)
    assert np.array_equal(found["y"], np.maximum(rounded(a), 0))
    assert np.array_equal(found["z"], -a)
    assert not np.array_equal(a, x @ w) or "MatMul" not in chosen


@given(st.integers(1, 100), st.data())
def test_the_fewest_are_found(most: int, data: st.DataObject) -> None:
    needed = data.draw(st.integers(1, most))
    asked: list[int] = []

    def enough(count: int) -> bool:
        asked.append(count)
        return count >= needed

    assert fewest(enough, most) == needed
    assert max(asked, default=0) < most or most == 1 or needed == most
    assert len(asked) <= 2 * max(1, most.bit_length())


def test_the_report_names_what_stays(model_of: Build, tmp_path: Any) -> None:
    source = model_of(CANCELS, w=W, v=(W + 1e-3 * V).astype(np.float32), u=U)
    data = tmp_path / "data.npz"
    np.savez(data, x=np.stack([X, 2 * X, 0.5 * X, -X]))
    options = Options("cuda", data=str(data), eval=str(data), weights="none", output=tmp_path / "out")
    report = compile(source, options).report
    left = [one for one in report["refusals"] if "float16's rounding of it" in one["reason"]]
    assert left and all(one["stage"] == "Halve" for one in left)
