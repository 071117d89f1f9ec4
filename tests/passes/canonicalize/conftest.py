"""What every rule is held to: the interface and the function stay, and a second application changes nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from qcompile import verify
from qcompile.core import model as models
from qcompile.core import numerics, runtime, validate
from qcompile.core.contract import Effect, Refusal, Rewritten

Rule = ir.passes.PassBase
Feeds = Mapping[str, np.ndarray[Any, np.dtype[Any]]]


def same_interface(before: ir.Model, after: ir.Model) -> None:
    """Hold names, types and shapes against each other; inference may only find out what an output's open axis is."""
    assert [(v.name, v.dtype, v.shape) for v in after.graph.inputs] == [
        (v.name, v.dtype, v.shape) for v in before.graph.inputs
    ]
    assert [(v.name, v.dtype) for v in after.graph.outputs] == [(v.name, v.dtype) for v in before.graph.outputs]
    for old, new in zip(before.graph.outputs, after.graph.outputs, strict=True):
        if old.shape is not None:
            assert new.shape is not None
            for was, became in zip(old.shape, new.shape, strict=True):
                assert became == was or not isinstance(was, int)


def same_function(before: ir.Model, after: ir.Model, effect: Effect, feeds: Feeds) -> None:
    expected = runtime.Session(before, optimize=False).run(feeds)
    outputs = runtime.Session(after, optimize=False).run(feeds)
    assert list(outputs) == list(expected)
    for name, reference in expected.items():
        assert outputs[name].dtype == reference.dtype and outputs[name].shape == reference.shape
        if effect is Effect.EXACT or reference.dtype.kind != "f":
            np.testing.assert_array_equal(outputs[name], reference)
        else:
            assert numerics.relative_error(reference, outputs[name]) <= verify.CLOSE_BOUND[reference.itemsize]
            assert np.any(reference != 0), "an output of zeros proves nothing"


@pytest.fixture
def rewritten() -> Callable[..., tuple[ir.Model, tuple[Refusal, ...]]]:
    """Apply a rule to a copy, hold it to its contract, and return the copy and the refusals."""

    def rewritten(rule: Rule, model: ir.Model, feeds: Feeds | None = None) -> tuple[ir.Model, tuple[Refusal, ...]]:
        copy = model.clone()
        result = rule(copy)
        assert result.model is copy
        once = models.serialize(copy)
        validate.check_model(copy, "rewritten")
        same_interface(model, copy)
        for seed in range(3):
            sample = runtime.synthetic_feeds(model, seed) | dict(feeds or {})
            same_function(model, copy, rule.effect, sample)  # type: ignore[attr-defined]
        again = rule(copy)
        assert models.serialize(copy) == once, "a second application changes nothing"
        refusals = result.refusals if isinstance(result, Rewritten) else ()
        assert (again.refusals if isinstance(again, Rewritten) else ()) == refusals
        return copy, refusals

    return rewritten


@pytest.fixture
def types() -> Callable[[ir.Model], list[str]]:
    """Return the operator types of a model in their order, subgraphs included."""
    return lambda model: [node.op_type for node in model.graph.all_nodes()]
