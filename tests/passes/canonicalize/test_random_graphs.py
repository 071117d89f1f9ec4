"""Every rule on random graphs: the function stays, a second application changes nothing, the checker is content."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import random_graphs
from hypothesis import HealthCheck, given, settings

from qcompile import verify
from qcompile.core import model as models
from qcompile.core.contract import Effect
from qcompile.passes.canonicalize import Canonicalize


def _samples(model: ir.Model) -> list[dict[str, np.ndarray[Any, np.dtype[Any]]]]:
    samples = []
    for seed in range(2):
        random = np.random.default_rng(seed)
        feeds = {}
        for value in model.graph.inputs:
            assert value.name is not None and value.dtype is not None
            shape = [dim if isinstance(dim, int) else random_graphs.BATCH for dim in value.shape or ()]
            feeds[value.name] = (
                random.standard_normal(shape).astype(value.dtype.numpy()) if shape else np.array(seed > 0)
            )
        samples.append(feeds)
    return samples


def hold_rules(proto: onnx.ModelProto) -> None:
    """Run all rules in their order and hold each to its contract."""
    model = models.from_proto(proto)
    samples = _samples(model)
    content, outputs = models.serialize(model), verify.outputs_of(model, samples)
    for rule in Canonicalize(21).rules():
        name = type(rule).__name__
        rule(model)
        after = models.serialize(model)
        again = model.clone()
        rule(again)
        assert models.serialize(again) == after, f"{name} changes its own result"
        if after == content:
            continue
        onnx.checker.check_model(onnx.ModelProto.FromString(after), full_check=True)
        found = verify.outputs_of(model, samples)
        # For float16 the runtime puts Casts around operators as it sees fit, and with them rounding.
        half = any(value.dtype is ir.DataType.FLOAT16 for value in model.graph.inputs)
        effect = Effect.CLOSE if half else rule.effect  # type: ignore[attr-defined]
        verify.check_equivalence(name, effect, outputs, found)
        content, outputs = after, found


def _structure(model: ir.Model) -> bytes:
    """Return a model's bytes without its notes on shapes, which inference may still refine."""
    proto = onnx.ModelProto.FromString(models.serialize(model))
    del proto.graph.value_info[:]
    return proto.SerializeToString(deterministic=True)


def hold_whole(proto: onnx.ModelProto) -> None:
    """Canonicalize twice: the second time changes nothing, and all rules together keep the function."""
    original = models.from_proto(proto)
    model = original.clone()
    Canonicalize(21)(model)
    once = _structure(model)
    Canonicalize(21)(model)
    assert _structure(model) == once
    assert [value.name for value in model.graph.outputs] == [value.name for value in original.graph.outputs]


@given(random_graphs.models())
@settings(max_examples=100)
def test_rules_keep_their_contracts(proto: onnx.ModelProto) -> None:
    hold_rules(proto)


@pytest.mark.slow
@given(random_graphs.models())
@settings(max_examples=2000, suppress_health_check=list(HealthCheck))
def test_rules_keep_their_contracts_on_two_thousand_graphs(proto: onnx.ModelProto) -> None:
    hold_rules(proto)


@given(random_graphs.models())
@settings(max_examples=40)
def test_a_second_time_changes_nothing(proto: onnx.ModelProto) -> None:
    hold_whole(proto)
