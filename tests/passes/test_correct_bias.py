from __future__ import annotations

import importlib.resources
from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import onnx.parser
import onnx_ir as ir
import pytest

from qcompile.calib.collect import collect
from qcompile.calib.data import Dataset, input_specs
from qcompile.calib.drift import measure_drift
from qcompile.calib.observers import Observer
from qcompile.core import runtime
from qcompile.core.contract import Refusal
from qcompile.core.plan import QuantPlan
from qcompile.core.target import Target
from qcompile.passes import structure
from qcompile.passes.allocate_bits import allocate_bits
from qcompile.passes.correct_bias import CorrectBias, correctable
from qcompile.passes.insert_qdq import InsertQdq, bias_scale
from qcompile.passes.place import place

ORT = importlib.resources.files("qcompile.backends.ort")
CPU = Target.from_toml(ORT / "targets" / "cpu.toml", ORT / "costs")
#: The CPU target, but for its opinion that the few weights of a test are not worth quantizing.
TARGET = replace(CPU, ops={op_type: replace(rule, fewest_weights=0) for op_type, rule in CPU.ops.items()})
CONV = """f (float[1,2,6,6] x) => (float[1,3,6,6] y)
<float[3,2,1,1] w = {1,-2,0.5,3,-1,0.25}, float[3] b = {0.5,-0.25,1}> { y = Conv(x, w, b) }"""
BARE_CONV = CONV.replace(", b)", ")").replace(", float[3] b = {0.5,-0.25,1}", "")
GEMM = """f (float[1,4] x) => (float[1,2] y) <float[4,2] w = {1,-2,0.5,3,-1,0.25,2,1}> { y = Gemm <ALPHA> (x, w) }"""
MATMUL = """f (float[1,3,4] x) => (float[1,3,2] y)
<float[4,2] w = {1,-2,0.5,3,-1,0.25,2,1}, float[2] b = {0.5,-0.25}> { m = MatMul(x, w) y = Add(m, b) }"""


def track(items: Iterable, count: int, what: str) -> Iterable:
    return items


def parse(body: str) -> ir.Model:
    model = ir.from_proto(onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 21]> {body}'))
    for index, node in enumerate(model.graph):
        node.name = f"{node.op_type}{index}"
    for value in ir.convenience.create_value_mapping(model.graph).values():
        value.dtype = value.dtype or ir.DataType.FLOAT
    return model


def samples(model: ir.Model, count: int = 8) -> list[dict[str, np.ndarray]]:
    generator = np.random.default_rng(3)
    shapes = {value.name: [int(dim) for dim in value.shape] for value in model.graph.inputs}
    return [{k: generator.uniform(-1, 2, s).astype(np.float32) for k, s in shapes.items()} for _ in range(count)]


def quantize(body: str) -> tuple[ir.Model, ir.Model, QuantPlan, Dataset]:
    """Return the float model, the QDQ model, the plan and the data."""
    model, quantized = parse(body), parse(body)
    data = Dataset("test", lambda: iter(samples(model)), input_specs(model))
    placement = place(model, TARGET, True, True)
    plan = allocate_bits(
        model,
        placement,
        collect(model, placement.activations, data, track),
        TARGET,
        dict.fromkeys(placement.activations, Observer.MINMAX),
    )
    InsertQdq(plan)(quantized)
    return model, quantized, plan, data


def node(model: ir.Model, name: str) -> ir.Node:
    return next(node for node in model.graph if node.name == name)


def mean_shift(before: ir.Model, after: ir.Model, value: str, axis: int) -> np.ndarray:
    """Return the mean of what changed at a value, per channel."""
    sessions = [runtime.Session(runtime.with_outputs(m, [value]), optimize=False) for m in (before, after)]
    old, new = (np.concatenate([s.run(f)[value] for f in samples(before)]) for s in sessions)
    return np.asarray(np.mean(new - old, axis=tuple(a for a in range(old.ndim) if a != axis % old.ndim)))


def only(refusals: tuple[Refusal, ...], *words: str) -> None:
    assert len(refusals) == 1, refusals
    assert all(word in refusals[0].reason for word in words), refusals[0].reason


@pytest.mark.parametrize("body", [CONV, BARE_CONV])
def test_conv_moves_by_the_correction_to_within_half_a_step(body: str) -> None:
    _, before, _, _ = quantize(body)
    after = before.clone()
    correction = (0.123, -0.4, 0.0)
    result = CorrectBias({"Conv0": correction})(after)
    assert result.modified and result.refusals == ()
    conv = node(after, "Conv0")
    step = bias_scale(conv)
    value = structure.name_of(conv.outputs[0])
    shift = mean_shift(before, after, value, 1)
    assert (np.abs(shift - correction) <= step / 2 + 1e-6).all()
    assert np.abs(shift[0]) > step[0]
    codes = conv.inputs[2].producer().inputs[0].const_value
    assert codes.dtype is ir.DataType.INT32


def test_the_model_before_keeps_its_codes() -> None:
    _, before, _, _ = quantize(CONV)
    codes = node(before, "Conv0").inputs[2].producer().inputs[0].const_value.numpy().copy()
    CorrectBias({"Conv0": (1.0, 1.0, 1.0)})(before.clone())
    np.testing.assert_array_equal(node(before, "Conv0").inputs[2].producer().inputs[0].const_value.numpy(), codes)


def test_codes_saturate_rather_than_wrap_around() -> None:
    _, model, _, _ = quantize(CONV)
    CorrectBias({"Conv0": (1e9, -1e9, 0.0)})(model)
    codes = node(model, "Conv0").inputs[2].producer().inputs[0].const_value.numpy()
    assert codes[0] == 2**31 - 1 and codes[1] == -(2**31)


def test_gemm_without_a_bias_gets_one() -> None:
    _, before, _, _ = quantize(GEMM.replace(" <ALPHA>", ""))
    after = before.clone()
    assert CorrectBias({"Gemm0": (0.5, -0.25)})(after).refusals == ()
    shift = mean_shift(before, after, "y", -1)
    assert (np.abs(shift - [0.5, -0.25]) <= bias_scale(node(after, "Gemm0")) / 2 + 1e-6).all()


def test_matmul_gives_its_correction_to_the_add_behind_it() -> None:
    _, before, plan, _ = quantize(MATMUL)
    after = before.clone()
    names, refusals = correctable(before, plan, TARGET)
    assert names == ("MatMul0",) and refusals == ()
    CorrectBias({"MatMul0": (0.5, -0.125)})(after)
    np.testing.assert_allclose(mean_shift(before, after, "y", -1), [0.5, -0.125], atol=1e-6)
    assert len(after.graph) == len(before.graph)


@pytest.mark.parametrize("body", [CONV, BARE_CONV, GEMM.replace(" <ALPHA>", "")])
def test_a_planted_error_is_measured_and_taken_back(body: str) -> None:
    model, quantized, plan, data = quantize(body)
    names, _ = correctable(quantized, plan, TARGET)
    planted = tuple(np.linspace(-0.7, 0.9, 2 if body.startswith("f (float[1,4]") else 3).tolist())
    CorrectBias({names[0]: planted})(quantized)
    drift = measure_drift(model, quantized, names, data, track)
    assert np.abs(np.add(drift[names[0]], planted)).max() < 0.1
    CorrectBias(drift)(quantized)
    rest = measure_drift(model, quantized, names, data, track)[names[0]]
    assert (np.abs(rest) <= bias_scale(node(quantized, names[0])) / 2 + 1e-5).all()


def test_what_a_matmul_lacks_is_taken_back_behind_it() -> None:
    """Read with another zero point, all activations are off by a constant, hence each channel of the result."""
    model, quantized, _, data = quantize(MATMUL)
    dequantize = node(quantized, "MatMul0").inputs[0].producer()
    zero_point = dequantize.inputs[2].const_value.numpy() - np.uint8(20)
    wrong = ir.Value(name="wrong", const_value=ir.tensor(zero_point, name="wrong"))
    quantized.graph.register_initializer(wrong)
    dequantize.replace_input_with(2, wrong)
    assert (np.abs(mean_shift(model, quantized, "y", -1)) > 0.3).all()
    CorrectBias(measure_drift(model, quantized, ("MatMul0",), data, track))(quantized)
    assert (np.abs(mean_shift(model, quantized, "y", -1)) < 0.01).all()


def test_two_readers_of_a_result_both_see_the_correction() -> None:
    body = CONV.replace("(float[1,3,6,6] y)", "(float[1,3,6,6] p, float[1,3,6,6] q)").replace(
        "y = Conv(x, w, b)", "y = Conv(x, w, b) p = Exp(y) q = Identity(y)"
    )
    _, before, _, _ = quantize(body)
    after = before.clone()
    CorrectBias({"Conv0": (0.5, 0.0, 0.0)})(after)
    assert mean_shift(before, after, "q", 1)[0] == pytest.approx(0.5, abs=0.1)
    assert mean_shift(before, after, "p", 1)[0] > 0.1


def test_the_graph_stays_sorted_and_loads_into_the_runtime() -> None:
    _, model, _, _ = quantize(BARE_CONV)
    CorrectBias({"Conv0": (0.5, 0.0, 0.0)})(model)
    nodes = list(model.graph)
    conv = node(model, "Conv0")
    assert nodes.index(conv.inputs[2].producer()) < nodes.index(conv)
    runtime.Session(model).run(samples(model)[0])


def test_a_correction_for_another_graph_is_refused_at_once() -> None:
    _, model, _, _ = quantize(CONV)
    with pytest.raises(ir.passes.PreconditionError, match="'elsewhere'"):
        CorrectBias({"elsewhere": (1.0,)})(model)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (MATMUL.replace("y = Add(m, b)", "y = Identity(m)").replace(", float[2] b = {0.5,-0.25}", ""), ["one Add"]),
        (MATMUL.replace("y = Add(m, b)", "y = Sub(m, b)"), ["one Add"]),
        (MATMUL.replace("y = Add(m, b)", "z = Add(m, b) y = Mul(z, m)"), ["one Add"]),
        (MATMUL.replace("y = Add(m, b)", "y = Add(m, m)"), ["one Add"]),
        (MATMUL.replace("=> (", "=> (float[1,3,2] m, "), ["one Add"]),
        (MATMUL.replace("float[2] b = {0.5,-0.25}", "float[1] b = {0.5}"), ["per channel"]),
        (MATMUL.replace("y = Add(m, b)", "z = Add(m, b) y = Mul(z, b)"), ["'b'", "shared"]),
    ],
)
def test_matmul_refuses_where_the_correction_has_no_place(body: str, words: list[str]) -> None:
    _, model, plan, _ = quantize(body)
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    result = CorrectBias({"MatMul0": (1.0, 1.0)})(model)
    assert not result.modified
    only(result.refusals, *words)
    assert correctable(model, plan, TARGET) == ((), result.refusals)
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before


def test_an_addend_on_the_left_is_found_too() -> None:
    _, before, _, _ = quantize(MATMUL.replace("Add(m, b)", "Add(b, m)"))
    after = before.clone()
    assert CorrectBias({"MatMul0": (1.0, 2.0)})(after).refusals == ()
    np.testing.assert_allclose(mean_shift(before, after, "y", -1), [1, 2], atol=1e-6)


def test_an_operator_that_does_not_read_codes_is_refused() -> None:
    model = parse(CONV)
    only(CorrectBias({"Conv0": (1.0, 1.0, 1.0)})(model).refusals, "does not read codes")


def test_an_operator_without_weights_is_refused() -> None:
    model = parse("f (float[2] x) => (float[2] y) { y = Relu(x) }")
    only(CorrectBias({"Relu0": (1.0, 1.0)})(model).refusals, "Relu is no linear operator")


def test_gemm_with_beta_is_refused() -> None:
    _, model, _, _ = quantize(GEMM.replace("ALPHA", "beta = 0.5"))
    only(CorrectBias({"Gemm0": (1.0, 1.0)})(model).refusals, "beta")


def test_a_float_bias_is_refused() -> None:
    _, model, _, _ = quantize(BARE_CONV)
    bias = ir.Value(name="bias", const_value=ir.tensor(np.zeros(3, np.float32), name="bias"))
    model.graph.register_initializer(bias)
    conv = node(model, "Conv0")
    conv.resize_inputs(3)
    conv.replace_input_with(2, bias)
    only(CorrectBias({"Conv0": (1.0, 1.0, 1.0)})(model).refusals, "not stored as int32")


def test_a_shared_bias_is_refused() -> None:
    _, model, _, _ = quantize(CONV)
    bias = node(model, "Conv0").inputs[2]
    model.graph.append(ir.node("Neg", [bias], name="other"))
    only(CorrectBias({"Conv0": (1.0, 1.0, 1.0)})(model).refusals, "shared")


def test_operators_in_float_are_not_correctable() -> None:
    """Both operands of the second MatMul are activations."""
    body = MATMUL.replace("y = Add(m, b)", "z = Add(m, b) t = Transpose <perm = [0, 2, 1]> (z) y = MatMul(z, t)")
    _, model, plan, _ = quantize(body.replace("=> (float[1,3,2] y)", "=> (float[1,3,3] y)"))
    assert correctable(model, plan, TARGET) == (("MatMul0",), ())
