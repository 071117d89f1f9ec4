"""Without data: ranges by what BatchNormalization remembers, said first; weights alone where it tells nothing."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import numpy as np
import onnx
import onnx.parser
import pytest

ROOT = Path(__file__).parents[2]
GUESSED, WEIGHTS = "warning: No calibration data: the ranges", "warning: No calibration data: weights"
NORMALIZED = """
<ir_version: 10, opset_import: ["": 21]>
normalized (float[1, 3, 8, 8] x) => (float[1, 4, 8, 8] y)
<float[4, 3, 3, 3] w, float[4, 4, 1, 1] v, float[4] gamma, float[4] beta, float[4] mean, float[4] variance>
{
    conv = Conv <pads = [1, 1, 1, 1]> (x, w)
    norm = BatchNormalization (conv, gamma, beta, mean, variance)
    relu = Relu (norm)
    behind = Conv (relu, v)
    y = Abs (behind)
}
"""


def normalized(variance: float, text: str = NORMALIZED) -> onnx.ModelProto:
    """Build a model whose normalization remembers a mean of 0 and a variance that need not be that of its input."""
    generator = np.random.default_rng(11)
    proto = onnx.parser.parse_model(text)
    arrays = {"w": generator.normal(size=(4, 3, 3, 3)), "v": generator.normal(size=(4, 4, 1, 1))}
    arrays |= {"gamma": np.ones(4), "beta": np.zeros(4), "mean": np.zeros(4)}
    arrays["variance"] = variance * np.square(arrays["w"]).sum(axis=(1, 2, 3))
    for name, array in arrays.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array.astype(np.float32), name))
    return proto


def report(folder: Path) -> dict:
    return json.loads((folder / "report.json").read_text())


def reasons(folder: Path) -> dict[str, tuple[str, str]]:
    ops = json.loads((folder / "plan.json").read_text())["ops"]
    return {op["op_type"]: (op["precision"], op["reason"]) for op in ops.values()}


def test_resnet8_is_quantized_and_the_first_line_says_on_what(qcompile, resnet8, tmp_path):
    model, _, evaluation = resnet8
    done = qcompile(model, "--target", "cpu", "--eval", evaluation, "-o", tmp_path / "out")
    assert done.code == 0 and done.out.startswith(GUESSED)
    found, plan = report(tmp_path / "out"), json.loads((tmp_path / "out/plan.json").read_text())
    assert "GUESSED" in found["data"]["caveat"] and "one random input" not in found["data"]["caveat"]
    assert found["precision"] == {"integer": 18, "weight_only": 0, "float": 6}
    # Weights alone leave 39 dB, measured ranges 36: a guess of the right size does not lose the decisions.
    measures = found["fidelity"]["outputs"]["probabilities"]
    assert measures["sqnr"] > 20 and measures["top1"] >= 0.95
    assert {"stage": "CorrectBias", "node": "model"}.items() <= found["refusals"][-1].items()
    assert plan["guessed"] is True
    jsonschema.validate(plan, json.loads((ROOT / "docs/schemas/plan.schema.json").read_text()))


def test_the_artifact_is_the_same_bytes_whatever_the_seed_of_the_random_input(qcompile, small):
    model = small.save(normalized(1.0))
    for seed in ("0", "9"):
        assert qcompile(model, "--target", "cpu", "--seed", seed, "-o", small.folder / seed).code == 0
    for name in ("model.onnx", "plan.json"):
        assert (small.folder / "0" / name).read_bytes() == (small.folder / "9" / name).read_bytes()
    assert "one random input" in report(small.folder / "0")["data"]["caveat"]


def test_data_that_come_later_do_not_make_a_guess_a_measurement(qcompile, small):
    model, plan = small.save(normalized(1.0)), small.folder / "p.json"
    assert qcompile(model, "--target", "cpu", "-o", small.folder / "first").code == 0
    (small.folder / "first/plan.json").rename(plan)
    done = qcompile("apply", model, "--plan", plan, "--data", small.data, "-o", small.folder / "out")
    assert done.code == 0 and done.out.startswith("warning: The plan's ranges of activations are GUESSED")


@pytest.mark.parametrize(("observer", "same"), [("minmax", True), ("mse", False)])
def test_the_observer_that_is_asked_for_serves(qcompile, small, observer, same):
    model = small.save(normalized(1.0))
    for name, words in (("a", ()), ("b", ("--observer", observer))):
        assert qcompile(model, "--target", "cpu", *words, "-o", small.folder / name).code == 0
    plans = [json.loads((small.folder / name / "plan.json").read_text())["tensors"] for name in "ab"]
    assert (plans[0] == plans[1]) is same


def test_without_a_normalization_weights_alone(qcompile, small):
    done = qcompile(small.model, "--target", "cpu", "-o", small.folder / "out")
    assert done.code == 0 and done.out.startswith(WEIGHTS)
    assert report(small.folder / "out")["precision"]["integer"] == 0


def test_what_no_normalization_tells_of_stays_float_and_the_plan_says_why(qcompile, small):
    text = NORMALIZED.replace("conv = Conv", "s = Sinh (x) conv = Conv").replace("(x, w)", "(s, w)")
    text = text.replace("y = Abs (behind)", "z = Conv (behind, v) y = Abs (z)")
    done = qcompile(small.save(normalized(1.0, text)), "--target", "cpu", "-o", small.folder / "out")
    assert done.code == 0 and done.out.startswith(GUESSED)
    ops = json.loads((small.folder / "out/plan.json").read_text())["ops"]
    convs = [(op["precision"], op["reason"]) for op in ops.values() if op["op_type"] == "Conv"]
    assert convs[0] == (
        "weight_only",
        "no data, and neither BatchNormalization nor a run's own values tell the ranges that it needs",
    )
    assert convs[1:] == [("integer", ""), ("integer", "")]


def test_integers_asked_for_where_nothing_tells_the_range_leave_weights_alone(qcompile, small):
    text = NORMALIZED.replace("conv = Conv", "s = Sinh (x) conv = Conv").replace("(x, w)", "(s, w)")
    recipe = small.folder / "r.toml"
    recipe.write_text("[[override]]\nop_type = 'Conv'\nweights = 'int8'\n")
    words = ("--target", "cpu", "--recipe", recipe, "-o", small.folder / "out")
    done = qcompile(small.save(normalized(1.0, text)), *words)
    assert done.code == 0 and done.out.startswith(WEIGHTS)


def test_a_guess_that_ruins_the_outputs_is_given_up_and_the_plan_says_why(qcompile, small):
    # It remembers values a thousand times those that come: all of them round to zero.
    model = small.save(normalized(1e8))
    done = qcompile(model, "--target", "cpu", "--eval", small.data, "-o", small.folder / "out")
    assert done.code == 0 and done.out.startswith(WEIGHTS)
    precision, reason = reasons(small.folder / "out")["Conv"]
    assert precision == "weight_only" and "further from float's than zeros" in reason and "guessed" in reason
    assert report(small.folder / "out")["fidelity"]["outputs"]["y"]["sqnr"] > 25


PRODUCTS = """
<ir_version: 10, opset_import: ["": 21]>
products (float[1, rows, 64] x) => (float[1, rows, 64] y)
<float[64, 64] w, float[64] b>
{ e = Exp (x) m = MatMul (e, w) s = Add (m, b) t = Tanh (s) y = MatMul (t, w) }
"""


def products(factor: float = 0.1) -> onnx.ModelProto:
    proto, generator = onnx.parser.parse_model(PRODUCTS), np.random.default_rng(3)
    for name, shape in (("w", (64, 64)), ("b", (64,))):
        array = (factor * generator.normal(size=shape)).astype(np.float32)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return proto


def test_products_take_the_range_of_each_run(qcompile, small):
    model = small.save(products())
    done = qcompile(model, "--target", "cpu", "-o", small.folder / "out", costs=None)
    assert done.code == 0, done.err
    assert done.out.startswith("warning: No calibration data: activations take the range that their values have")
    found = report(small.folder / "out")
    assert found["activation_ranges"] == {"static": 0, "dynamic": 2}
    kernels = [op["kernel"] for op in found["operators"] if op["op_type"] == "MatMul"]
    assert kernels == ["DynamicQuantizeMatMul"] * 2 and found["fidelity"]["outputs"]["y"]["sqnr"] > 30
    plan = json.loads((small.folder / "out/plan.json").read_text())
    jsonschema.validate(plan, json.loads((ROOT / "docs/schemas/plan.schema.json").read_text()))
    jsonschema.validate(found, json.loads((ROOT / "docs/schemas/report.schema.json").read_text()))


def test_in_stages_it_is_the_same(qcompile, small):
    model, c, p = small.save(products()), small.folder / "c.npz", small.folder / "p.json"
    assert qcompile(model, "--target", "cpu", "-o", small.folder / "whole", costs=None).code == 0
    done = qcompile("calibrate", model, "--target", "cpu", "-o", c, costs=None)
    assert done.code == 0 and "take the range that their values have" in done.out
    assert qcompile("plan", model, "--calibration", c, "-o", p, costs=None).code == 0
    assert qcompile("apply", model, "--plan", p, "-o", small.folder / "parts", costs=None).code == 0
    for name in ("model.onnx", "plan.json"):
        assert (small.folder / "whole" / name).read_bytes() == (small.folder / "parts" / name).read_bytes()


def test_an_observer_that_measures_leaves_weights_alone(qcompile, small):
    words = ("--target", "cpu", "--observer", "minmax", "-o", small.folder / "out")
    done = qcompile(small.save(products()), *words, costs=None)
    assert done.code == 0 and done.out.startswith(WEIGHTS)
