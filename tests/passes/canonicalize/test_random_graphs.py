"""Every rule on random graphs: the function stays, a second application changes nothing, the checker is content."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnx.reference
import onnx_ir as ir
import pytest
import random_graphs
from hypothesis import HealthCheck, Phase, given, note, settings

from qcompile import verify
from qcompile.core import model as models
from qcompile.core import runtime
from qcompile.core.contract import Effect
from qcompile.passes.canonicalize import Canonicalize

Sample = dict[str, np.ndarray[Any, np.dtype[Any]]]
#: Shrinking runs every rule hundreds of times for a graph that reads no better: a failure prints its text.
PHASES = (Phase.explicit, Phase.generate)


def _samples(model: ir.Model) -> list[Sample]:
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


def _is_half(model: ir.Model) -> bool:
    return any(value.dtype is ir.DataType.FLOAT16 for value in model.graph.inputs)


def _outputs(model: ir.Model, samples: Sequence[Sample]) -> list[runtime.Outputs]:
    """Run a model on the samples.

    Float16 runs through onnx's reference operators: the runtime has no kernels for most of it, puts Casts around those
    operators and drops the pairs between two of them, so that any node between them adds a rounding or takes it away.
    """
    if not _is_half(model):
        return verify.outputs_of(model, samples)
    names = [str(value.name) for value in model.graph.outputs]
    return [{name: values[name] for name in names} for values in _values(model, samples)]


def _values(model: ir.Model, samples: Sequence[Sample]) -> list[Sample]:
    """Return all values of a model by onnx's reference operators."""
    reference = onnx.reference.ReferenceEvaluator(ir.to_proto(model))
    with np.errstate(all="ignore"):
        return [reference.run(None, feeds, intermediate=True) for feeds in samples]


def _hold(
    name: str,
    effect: Effect,
    before: ir.Model,
    samples: Sequence[Sample],
    expected: Sequence[runtime.Outputs],
    found: Sequence[runtime.Outputs],
) -> None:
    if effect is Effect.CLOSE and _is_half(before):
        _hold_half(name, before, samples, found)
    else:
        verify.check_equivalence(name, effect, expected, found)


def _hold_half(name: str, model: ir.Model, samples: Sequence[Sample], after: Sequence[runtime.Outputs]) -> None:
    """Hold a CLOSE rule on float16 to its bound in terms of the largest value on the way.

    Eleven bits do not survive that two values of like size are subtracted; an output may be mostly rounding then.
    """
    for values, new in zip(_values(model, samples), after, strict=True):
        floats = [value for value in values.values() if value is not None and value.dtype.kind == "f"]
        peak = max(float(np.max(np.abs(value[np.isfinite(value)]), initial=0.0)) for value in floats)
        for output, z in new.items():
            y = values[output]
            assert y.shape == z.shape and y.dtype == z.dtype
            np.testing.assert_allclose(z, y, rtol=0, atol=verify.CLOSE_BOUND[2] * peak, err_msg=f"{name} {output}")


def _reloaded(content: bytes) -> ir.Model:
    return ir.from_proto(onnx.ModelProto.FromString(content))


def hold_rules(proto: onnx.ModelProto) -> None:
    """Run all rules in their order and hold each to its contract."""
    model = models.from_proto(proto)
    samples = _samples(model)
    content, outputs = models.serialize(model), _outputs(model, samples)
    before = model.clone()
    for rule in Canonicalize(21).rules():
        name = type(rule).__name__
        rule(model)
        after = models.serialize(model)
        if after == content:
            continue
        again = _reloaded(after)
        rule(again)
        assert models.serialize(again) == after, f"{name} changes its own result"
        onnx.checker.check_model(onnx.ModelProto.FromString(after), full_check=True)
        found = _outputs(model, samples)
        _hold(name, rule.effect, before, samples, outputs, found)  # type: ignore[attr-defined]
        content, outputs, before = after, found, again


def hold_whole(proto: onnx.ModelProto) -> None:
    """Canonicalize, write, read and canonicalize again: the second time changes nothing, notes on shapes included."""
    model = models.from_proto(proto)
    before, samples = model.clone(), _samples(model)
    Canonicalize(21)(model)
    _hold("Canonicalize", Effect.CLOSE, before, samples, _outputs(before, samples), _outputs(model, samples))
    once = models.serialize(model)
    again = _reloaded(once)
    Canonicalize(21)(again)
    assert models.serialize(again) == once
    assert [value.name for value in model.graph.outputs] == [value.name for value in proto.graph.output]


def hold(proto: onnx.ModelProto) -> None:
    """Hold the rules one by one and all together to what they promise."""
    note(onnx.printer.to_text(proto))
    hold_rules(proto)
    hold_whole(proto)


@given(random_graphs.models())
@settings(max_examples=100, derandomize=True, database=None, deadline=None, phases=PHASES)
def test_rules_keep_their_contracts(proto: onnx.ModelProto) -> None:
    hold(proto)


@pytest.mark.slow
@given(random_graphs.models())
@settings(
    max_examples=2000,
    derandomize=True,
    database=None,
    deadline=None,
    phases=PHASES,
    suppress_health_check=list(HealthCheck),
)
def test_rules_keep_their_contracts_on_two_thousand_graphs(proto: onnx.ModelProto) -> None:
    hold(proto)
