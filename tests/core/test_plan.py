import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcompile.core.errors import UsageError
from qcompile.core.plan import SCHEMA_VERSION, OpPlan, Precision, QuantPlan, Role, TensorQuant

names = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=12)
scales = st.floats(2.0**-100, 2.0**100, width=32)


@st.composite
def tensor_quants(draw: st.DrawFn) -> TensorQuant:
    dtype = draw(st.sampled_from(["uint8", "int8", "uint16", "int16"]))
    info = np.iinfo(dtype)
    axis = draw(st.none() | st.integers(0, 3))
    channels = 1 if axis is None else draw(st.integers(1, 4))
    if draw(st.booleans()):
        return TensorQuant(Role.ACTIVATION, "uint8", (), ())
    return TensorQuant(
        role=draw(st.sampled_from(Role)),
        dtype=dtype,
        scale=tuple(draw(scales) for _ in range(channels)),
        zero_point=tuple(draw(st.integers(int(info.min), int(info.max))) for _ in range(channels)),
        axis=axis,
    )


op_plans = st.builds(OpPlan, op_type=names, precision=st.sampled_from(Precision), reason=st.text(), output=st.text())
plans = st.builds(QuantPlan, tensors=st.dictionaries(names, tensor_quants()), ops=st.dictionaries(names, op_plans))


@given(plan=plans)
def test_json_round_trip(plan: QuantPlan) -> None:
    text = plan.to_json()
    again = QuantPlan.from_json(text)
    assert again == plan
    assert list(again.ops) == list(plan.ops), "operators keep the graph's order"
    assert again.to_json() == text


def test_guesses_are_told_and_plans_of_earlier_releases_have_none() -> None:
    guessed = QuantPlan({"x": activation()}, guessed=True)
    assert QuantPlan.from_json(guessed.to_json()) == guessed
    assert not QuantPlan.from_json(guessed.to_json().replace(' "guessed": true,\n', "")).guessed


@given(plan=plans)
def test_scales_survive_as_float32(plan: QuantPlan) -> None:
    again = QuantPlan.from_json(plan.to_json())
    for name, quant in plan.tensors.items():
        assert again.tensors[name].scales.tobytes() == quant.scales.tobytes()


def activation(scale: float = 0.5, zero_point: int = 3) -> TensorQuant:
    return TensorQuant(Role.ACTIVATION, "uint8", (scale,), (zero_point,))


def test_bytes_do_not_depend_on_the_order_of_tensors() -> None:
    first = QuantPlan({"a": activation(1.0), "b": activation(2.0)})
    second = QuantPlan({"b": activation(2.0), "a": activation(1.0)})
    assert first.to_json() == second.to_json()


def test_the_text_of_a_plan_is_fixed() -> None:
    plan = QuantPlan({"x": activation()}, {"conv": OpPlan("Conv", Precision.INTEGER, output="é")})
    assert plan.to_json() == (
        '{\n "schema_version": 1,\n "options": {},\n "guessed": false,\n "allocation": {},\n "maps": {},\n'
        ' "rotation": {\n  "folded": [],\n  "inputs": [],\n  "refused": []\n },\n "smoothing": {},\n'
        ' "tensors": {\n  "x": {\n'
        '   "role": "activation",\n   "dtype": "uint8",\n'
        '   "scale": [\n    0.5\n   ],\n   "zero_point": [\n    3\n   ],\n   "axis": null,\n'
        '   "block_size": 0\n  }\n },\n'
        ' "ops": {\n  "conv": {\n   "op_type": "Conv",\n   "precision": "integer",\n   "reason": "",\n'
        '   "output": "é"\n  }\n }\n}\n'
    )


def test_count() -> None:
    ops = {
        "a": OpPlan("Conv", Precision.INTEGER),
        "b": OpPlan("Relu", Precision.INTEGER),
        "c": OpPlan("Softmax", Precision.FLOAT),
    }
    plan = QuantPlan({}, ops)
    assert [plan.count(p) for p in (Precision.INTEGER, Precision.WEIGHT_ONLY, Precision.FLOAT)] == [2, 0, 1]


def test_weights_never_get_the_lowest_code_and_activations_may() -> None:
    x = np.float32([-128.0, 127.0])
    weight = TensorQuant(Role.WEIGHT, "int8", (1.0,), (0,))
    signed = TensorQuant(Role.ACTIVATION, "int8", (1.0,), (0,))
    assert weight.quantize(x).tolist() == [-127, 127]
    assert signed.quantize(x).tolist() == [-128, 127]


def test_quantize_and_dequantize_along_the_axis() -> None:
    quant = TensorQuant(Role.WEIGHT, "int8", (1.0, 0.5), (0, 0), axis=1)
    x = np.float32([[3.0, 3.0], [-4.0, 1.25]])
    codes = quant.quantize(x)
    assert codes.tolist() == [[3, 6], [-4, 2]]
    assert quant.dequantize(codes).tolist() == [[3.0, 3.0], [-4.0, 1.0]]
    assert quant.bits == 8 and TensorQuant(Role.ACTIVATION, "uint16", (1.0,), (0,)).bits == 16


def test_activations_may_have_four_bits() -> None:
    quant = TensorQuant(Role.ACTIVATION, "uint4", (0.5,), (3,))
    assert quant.bits == 4
    codes = quant.quantize(np.float32([-9.0, -1.5, 0.0, 0.3, 9.0]))
    assert codes.tolist() == [0, 0, 3, 4, 15] and str(codes.dtype) == "uint4"
    assert quant.dequantize(codes).tolist() == [-1.5, -1.5, 0.0, 0.5, 6.0]
    plan = QuantPlan({"a": quant}, maps={"bits": {"a": 4}, "sqnr": 20.0, "sqnr_of_eight": 30.0})
    assert QuantPlan.from_json(plan.to_json()) == plan


def content() -> dict[str, Any]:
    plan = QuantPlan(
        {"x": activation(), "w": TensorQuant(Role.WEIGHT, "int8", (1.0, 2.0), (0, 0), 0)},
        {"conv": OpPlan("Conv", Precision.INTEGER, output="y")},
    )
    parsed: dict[str, Any] = json.loads(plan.to_json())
    return parsed


def without(*path: str) -> Callable[[dict[str, Any]], None]:
    def edit(plan: dict[str, Any]) -> None:
        for key in path[:-1]:
            plan = plan[key]
        del plan[path[-1]]

    return edit


def changed(value: Any, *path: str) -> Callable[[dict[str, Any]], None]:
    def edit(plan: dict[str, Any]) -> None:
        for key in path[:-1]:
            plan = plan[key]
        plan[path[-1]] = value

    return edit


@pytest.mark.parametrize(
    "edit",
    [
        without("schema_version"),
        without("tensors"),
        without("ops"),
        without("tensors", "x", "role"),
        without("tensors", "x", "dtype"),
        without("tensors", "x", "scale"),
        without("tensors", "x", "zero_point"),
        without("tensors", "x", "axis"),
        without("ops", "conv", "op_type"),
        without("ops", "conv", "precision"),
        changed([], "tensors"),
        changed(None, "ops"),
        changed("bias", "tensors", "x", "role"),
        changed("int9", "tensors", "x", "dtype"),
        changed("float32", "tensors", "x", "dtype"),
        changed(0.5, "tensors", "x", "scale"),
        changed([], "tensors", "x", "scale"),
        changed([0.5, 0.5], "tensors", "x", "scale"),
        changed([0.0], "tensors", "x", "scale"),
        changed([-1.0], "tensors", "x", "scale"),
        changed([float("nan")], "tensors", "x", "scale"),
        changed([float("inf")], "tensors", "x", "scale"),
        changed(["a"], "tensors", "x", "scale"),
        changed([None], "tensors", "x", "zero_point"),
        changed([0, 0], "tensors", "x", "zero_point"),
        changed([256], "tensors", "x", "zero_point"),
        changed([-1], "tensors", "x", "zero_point"),
        changed("0", "tensors", "w", "axis"),
        changed(None, "tensors", "w", "axis"),
        changed("int4", "ops", "conv", "precision"),
        changed(1, "ops", "conv", "surprise"),
        changed("Conv", "ops", "conv"),
        changed(7, "tensors", "x"),
    ],
)
def test_a_malformed_plan_is_a_usage_error(edit: Callable[[dict[str, Any]], None]) -> None:
    plan = content()
    QuantPlan.from_json(json.dumps(plan))
    edit(plan)
    with pytest.raises(UsageError, match=r"^my plan: is not a quantization plan .*; write it again$"):
        QuantPlan.from_json(json.dumps(plan), "my plan")


SPLIT = {"how": "split", "log2": [2.0], "reason": "", "channels": [3], "low": 0.0, "high": 1.5}


@pytest.mark.parametrize(
    ("entry", "fact"),
    [
        (SPLIT | {"shift": [0.5, 0.0]}, "what is split is not shifted"),
        (SPLIT | {"how": "aside", "shift": [float("inf")]}, "a shift is a number"),
        (SPLIT | {"log2": [0.3]}, "factors are powers of 2 by eighths"),
        (SPLIT | {"high": float("inf")}, "bounds"),
    ],
)
def test_what_no_search_chooses_for_channels_is_refused(entry: dict[str, Any], fact: str) -> None:
    plan = content()
    QuantPlan.from_json(json.dumps(plan | {"smoothing": {"x": SPLIT}}))
    with pytest.raises(UsageError, match=fact):
        QuantPlan.from_json(json.dumps(plan | {"smoothing": {"x": entry}}))


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "3", '"plan"', '{"schema_version": 1'])
def test_text_that_is_no_plan_is_a_usage_error(text: str) -> None:
    with pytest.raises(UsageError, match=r"^plan\.json: is not a quantization plan"):
        QuantPlan.from_json(text)


@pytest.mark.parametrize("version", [0, SCHEMA_VERSION + 1, "1", None])
def test_another_schema_version_is_named(version: object) -> None:
    with pytest.raises(UsageError, match=f"has schema version {version}, this release reads {SCHEMA_VERSION}"):
        QuantPlan.from_json(json.dumps(content() | {"schema_version": version}))
