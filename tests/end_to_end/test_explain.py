"""`qcompile explain`: why an operator has the precision it has, in words."""

from __future__ import annotations

import json
import re
import shutil

import pytest

from qcompile.core import packing
from qcompile.core.plan import ChannelFactors, How, QuantPlan, TensorQuant


@pytest.fixture
def compiled(small_artifact, tmp_path):
    return shutil.copytree(small_artifact, tmp_path / "out")


def test_an_operator_is_told_with_all_that_it_reads(qcompile, compiled):
    done = qcompile("explain", compiled, "--layer", "Conv_0", "--json")
    assert done.code == 0
    [conv] = json.loads(done.out)
    told, plan = " ".join(conv["facts"]), QuantPlan.from_json((compiled / "plan.json").read_text())
    weight = plan.tensors["w"]
    assert conv["op_type"] == "Conv" and "runs in integers" in told
    assert f"'w' is int8 with 4 scales along axis 0, from {min(weight.scale):.3g} to {max(weight.scale):.3g}" in told
    activation = plan.tensors["x"]
    low = activation.scale[0] * -activation.zero_point[0]
    assert f"'x' as uint8 in steps of {activation.scale[0]:.3g}, which is the range {low:.4g} to" in told
    [report] = [op for op in json.loads((compiled / "report.json").read_text())["operators"] if op["name"] == "Conv_0"]
    assert report["reads"] == ["x", "w"] and f"{report['sqnr']:.1f} dB" in told


def test_without_a_name_those_that_lose_most_come_first(qcompile, compiled):
    done = qcompile("explain", compiled, "--json")
    operators = {op["name"]: op["sqnr"] for op in json.loads((compiled / "report.json").read_text())["operators"]}
    told = [operators[one["name"]] for one in json.loads(done.out)]
    assert told == sorted(number for number in operators.values() if number is not None)[:5] and told
    assert re.findall("number ([0-9]+) from below", qcompile("explain", compiled).out)[0] == "1"


def test_names_may_be_patterns(qcompile, compiled):
    done = qcompile("explain", compiled, "--layer", "C*", "--layer", "Relu_1", "--json")
    assert [one["name"] for one in json.loads(done.out)] == ["Conv_0", "Relu_1"]


def test_a_name_that_there_is_not_is_refused_with_the_nearest(qcompile, compiled):
    done = qcompile("explain", compiled, "--layer", "Conv0")
    assert done.code == 2 and done.err.endswith("has no operator 'Conv0'; did you mean 'Conv_0'?\n") and not done.out
    assert "--ops" in qcompile("explain", compiled, "--layer", "q0*").err
    assert qcompile("explain", compiled.parent).code == 2


@pytest.mark.parametrize(
    ("tensor", "chosen", "words"),
    [
        (
            {"dtype": "int8", "block_size": packing.BLOCK},
            None,
            f"int8 in blocks of {packing.BLOCK}; 4 bits were chosen for it by the integer",
        ),
        ({"scale": (0.25,), "zero_point": (0,), "axis": None}, None, "int8 with one scale, 0.25;"),
        ({}, ChannelFactors(How.FOLD, (1.0, -1.0)), "divided by factors from 0.5 to 2, which constants around it take"),
        ({}, ChannelFactors(How.BRANCH, (1.0,), shift=(0.5,)), "are shifted, then divided by factors from 2 to 2, by"),
        ({}, ChannelFactors(How.ASIDE, channels=(3, 4)), "integers but for 2, which reach far"),
        ({}, ChannelFactors(How.SPLIT, (2.0,), channels=(3,), high=1.0), "split: 1 more share the range"),
        ({}, ChannelFactors(How.NONE, reason="it is even"), "As to the channels of 'w': it is even."),
    ],
)
def test_every_form_of_a_tensor_has_its_words(qcompile, compiled, tensor, chosen, words):
    from dataclasses import replace

    plan = QuantPlan.from_json((compiled / "plan.json").read_text())
    weight: TensorQuant = replace(plan.tensors["w"], **tensor)
    plan = replace(
        plan,
        tensors={**plan.tensors, "w": weight},
        smoothing={"w": chosen} if chosen else {},
        allocation={"bits": {"w": 4}},
    )
    (compiled / "plan.json").write_text(plan.to_json())
    assert words in qcompile("explain", compiled, "--layer", "Conv_0").out
