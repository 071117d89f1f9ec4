"""What a plan says and what stands in the model are held to each other, on random models."""

from __future__ import annotations

from dataclasses import replace

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
import random_graphs
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from qcompile.calib.collect import collect
from qcompile.calib.data import Dataset, input_specs
from qcompile.calib.observers import Observer
from qcompile.continuous import hold, without_rounding
from qcompile.core import model as models
from qcompile.core import numerics, runtime
from qcompile.core.errors import VerificationError
from qcompile.core.plan import QuantPlan
from qcompile.core.target import Target
from qcompile.passes.allocate_bits import allocate_bits, round_to_codes
from qcompile.passes.canonicalize import Canonicalize
from qcompile.passes.correct_bias import CorrectBias, correctable
from qcompile.passes.insert_qdq import InsertQdq
from qcompile.passes.place import place
from qcompile.passes.round_weights import RoundWeights
from qcompile.translation import validate

TEXT = """(float[1,3,8,8] x) => (float[1,4,8,8] y) {
    c = Conv <pads = [1, 1, 1, 1]> (x, w, b)
    r = Relu (c)
    d = Conv <pads = [1, 1, 1, 1]> (r, v)
    y = Add (d, r) }"""


def planned(canonical: ir.Model, target: Target, count: int = 3) -> tuple[QuantPlan, list[dict[str, np.ndarray]]]:
    samples = [dict(runtime.synthetic_feeds(canonical, seed)) for seed in range(count)]
    placement = place(canonical, target, True, True)
    data = Dataset("samples", lambda: samples, input_specs(canonical))
    seen = collect(canonical, placement.activations, data, lambda items, *_: items)
    return allocate_bits(
        canonical, placement, seen, target, dict.fromkeys(placement.activations, Observer.MINMAX)
    ), samples


@pytest.fixture(scope="module")
def eager(cpu: Target) -> Target:
    return replace(cpu, ops={op_type: replace(rule, fewest_weights=0) for op_type, rule in cpu.ops.items()})


@pytest.fixture
def canonical(model_of) -> ir.Model:
    random = np.random.default_rng(0)
    shapes = {"w": (4, 3, 3, 3), "b": (4,), "v": (4, 4, 3, 3)}
    arrays = {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    model = model_of(TEXT, 21, **arrays)
    Canonicalize(21)(model)
    return model


def inserted(canonical: ir.Model, plan: QuantPlan) -> ir.Model:
    return InsertQdq(plan)(canonical.clone()).model


def codes_of(model: ir.Model) -> list[ir.Value]:
    """Return the initializers that a DequantizeLinear reads as codes."""
    nodes = [node for node in model.graph if node.op_type == "DequantizeLinear"]
    values = [node.inputs[0] for node in nodes if node.inputs[0] is not None]
    return [value for value in dict.fromkeys(values) if value.is_initializer()]


def numbers(value: ir.Value | None) -> np.ndarray:
    assert value is not None and value.const_value is not None
    return value.const_value.numpy()


@settings(max_examples=15)
@given(proto=random_graphs.models(), seed=st.integers(0, 1000))
def test_what_is_inserted_holds_and_two_steps_more_do_not(eager, proto, seed):
    model = models.from_proto(proto)
    Canonicalize(21, widen=True)(model)
    plan, _ = planned(model, eager)
    assume(plan.tensors)
    after = inserted(model, plan)
    validate(InsertQdq(plan), model, after)
    before = models.serialize(after)
    without_rounding(after)
    assert models.serialize(after) == before, "what is copied stays as it was"
    choices = codes_of(after)
    assume(choices)
    value = choices[seed % len(choices)]
    array = numbers(value).copy()
    flat = array.reshape(-1)
    flat[seed % flat.size] = flat[seed % flat.size] + (2 if flat[seed % flat.size] < 0 else -2)
    value.const_value = ir.tensor(array, name=value.name)
    with pytest.raises(VerificationError, match="steps from their numbers"):
        validate(InsertQdq(plan), model, after)


@settings(max_examples=15)
@given(proto=random_graphs.models())
def test_without_rounding_a_model_is_its_float_model_with_rounded_weights(eager, proto):
    model = models.from_proto(proto)
    Canonicalize(21, widen=True)(model)
    plan, samples = planned(model, eager)
    assume(plan.tensors)
    smooth = without_rounding(inserted(model, plan))
    assert smooth is not None
    expected = runtime.Session(round_to_codes(model, plan), optimize=False).run(samples[0])
    found = runtime.Session(smooth, optimize=False).run(samples[0])
    for name, y in expected.items():
        if np.isfinite(y).all():
            # Ranges hold what was seen but for half a step, by which they move so that zero has a code.
            assert numerics.relative_error(y, found[name]) < 0.02


def test_operators_and_what_they_read(canonical, eager):
    plan, _ = planned(canonical, eager)
    after = inserted(canonical, plan)
    validate(InsertQdq(plan), canonical, after)
    add = next(node for node in after.graph if node.op_type == "Add")
    add.replace_input_with(0, add.inputs[1])
    with pytest.raises(VerificationError, match="input 0 is"):
        validate(InsertQdq(plan), canonical, after)
    left = inserted(canonical, plan)
    relu = next(node for node in left.graph if node.op_type == "Relu")
    ir.convenience.replace_all_uses_with(relu.outputs[0], relu.inputs[0])
    left.graph.remove(relu, safe=True)
    with pytest.raises(VerificationError, match="the operator was left out"):
        validate(InsertQdq(plan), canonical, left)
    other = inserted(canonical, plan)
    conv = next(node for node in other.graph if node.op_type == "Conv")
    conv.attributes["pads"] = ir.AttrInt64s("pads", [0, 2, 2, 0])
    with pytest.raises(VerificationError, match="another operator"):
        validate(InsertQdq(plan), canonical, other)


def test_a_pair_that_dequantizes_by_other_parameters(canonical, eager):
    plan, _ = planned(canonical, eager)
    after = inserted(canonical, plan)
    node = next(
        node for node in after.graph if node.op_type == "DequantizeLinear" and not node.inputs[0].is_initializer()
    )
    scale = ir.Value(name="other", const_value=ir.tensor(np.float32(0.5), name="other"))
    after.graph.register_initializer(scale)
    node.replace_input_with(1, scale)
    with pytest.raises(VerificationError, match="and dequantizes it by"):
        validate(InsertQdq(plan), canonical, after)


def test_codes_that_were_chosen_are_those_that_are_there(canonical, eager):
    plan, _ = planned(canonical, eager)
    before = inserted(canonical, plan)
    value = codes_of(before)[0]
    near = numbers(value).astype(np.int64)
    moved = np.clip(near + np.random.default_rng(1).integers(-2, 3, near.shape), -127, 127).astype(numbers(value).dtype)
    pass_ = RoundWeights({str(value.name): moved})
    after = pass_(before.clone()).model
    validate(pass_, before, after)
    after.graph.initializers[str(value.name)].const_value = ir.tensor(-moved, name=value.name)
    with pytest.raises(VerificationError, match="other codes than were chosen"):
        validate(pass_, before, after)
    upside_down = RoundWeights({str(value.name): (-near).astype(moved.dtype)})
    with pytest.raises(VerificationError, match="further from their numbers than zeros"):
        validate(upside_down, before, upside_down(before.clone()).model)


def test_corrections_arrive_where_they_are_meant_and_nowhere_else(canonical, eager):
    plan, _ = planned(canonical, eager)
    before = inserted(canonical, plan)
    names, _ = correctable(before, plan, eager)
    assert len(names) == 2, "one with a bias, one without"
    pass_ = CorrectBias(dict.fromkeys(names, (0.25, -0.5, 0.125, 1.0)))
    after = pass_(before.clone()).model
    validate(pass_, before, after)
    with pytest.raises(VerificationError, match="not what it was with its correction"):
        validate(CorrectBias(dict.fromkeys(names, (0.25, -0.5, 0.125, 1.5))), before, after)
    with pytest.raises(VerificationError, match="input 2"):
        validate(CorrectBias({names[0]: pass_.corrections[names[0]]}), before, after)
    validate(pass_, before, after, refused=())
    untouched = {name: pass_.corrections[name] for name in names}
    validate(CorrectBias(untouched), before, before.clone(), refused=set(names))


def test_another_form_is_held_to_the_first(canonical, eager):
    plan, samples = planned(canonical, eager)
    model = inserted(canonical, plan)
    assert hold("form", model, model.clone(), samples) == 0.0
    other = model.clone()
    value = codes_of(other)[0]
    value.const_value = ir.tensor(numbers(value)[::-1].copy(), name=value.name)
    with pytest.raises(VerificationError, match="where nothing is rounded"):
        hold("form", model, other, samples)


def test_what_computes_on_codes_keeps_its_rounding(proto_of):
    parameters = {"s": np.float32(0.1), "z": np.uint8(3), "w": np.ones((4, 4), np.uint8)}
    text = "(float[1,4] x) => (int32[1,4] y) { q = QuantizeLinear (x, s, z) y = MatMulInteger (q, w) }"
    model = ir.from_proto(proto_of(text, 21, **parameters))
    assert without_rounding(model) is None
    assert hold("form", model, model, []) is None


def test_padding_between_codes_is_padding_with_what_the_code_stands_for(model_of):
    parameters = {"s": np.float32(0.5), "z": np.uint8(3), "p": np.int64([0, 1, 0, 1]), "c": np.uint8(7)}
    model = model_of(
        """(float[1,4] x) => (float[1,6] y) {
        q = QuantizeLinear (x, s, z) m = Pad (q, p, c) y = DequantizeLinear (m, s, z) }""",
        21,
        **parameters,
    )
    smooth = without_rounding(model)
    assert smooth is not None
    y = runtime.Session(smooth, optimize=False).run({"x": np.float32([[0.1, 0.2, -9.0, 500.0]])})["y"]
    np.testing.assert_allclose(y, [[2.0, 0.1, 0.2, -1.5, 126.0, 2.0]], rtol=1e-5)


def test_weights_of_few_bits_may_be_clipped_and_no_others(canonical, eager):
    plan, _ = planned(canonical, eager)
    name = next(name for name, quant in plan.tensors.items() if quant.axis is not None)
    weights = numbers(canonical.graph.initializers[name])
    scale = np.abs(weights).max(axis=(1, 2, 3)) / 2.0 / 7.0
    few = replace(plan.tensors[name], dtype=np.dtype(ml_dtypes.int4).name, scale=tuple(map(float, np.float32(scale))))
    short = replace(plan, tensors={**plan.tensors, name: few})
    validate(InsertQdq(short), canonical, inserted(canonical, short))
    half = tuple(float(np.float32(one / 2.0)) for one in plan.tensors[name].scale)
    clipped = replace(plan, tensors={**plan.tensors, name: replace(plan.tensors[name], scale=half)})
    with pytest.raises(VerificationError, match="steps from their numbers"):
        validate(InsertQdq(clipped), canonical, inserted(canonical, clipped))
