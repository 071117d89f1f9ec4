"""Tensors that a Concat may not bring to one scale."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from qcompile.calib.collect import Statistics
from qcompile.calib.observers import Histogram
from qcompile.core.plan import Precision
from qcompile.core.target import Target
from qcompile.passes.canonicalize import Canonicalize
from qcompile.passes.place import Placement, place
from qcompile.passes.share_scales import MOST_APART, unlike_ranges

Build = Callable[..., Any]
HEADS = """(float[1,4,6,6] x) => (float[1,4,6,6] y) {
    [boxes] b = Conv (x, w) [scores] s = Conv (x, u) [join] j = Concat <axis = 1> (b, s) [behind] y = Conv (j, v) }"""


@pytest.fixture
def heads(model_of: Build) -> ir.Model:
    model = model_of(
        HEADS,
        21,
        w=np.ones((4, 4, 1, 1), np.float32),
        u=np.full((4, 4, 1, 1), 2, np.float32),
        v=np.ones((4, 8, 1, 1), np.float32),
    )
    Canonicalize(21)(model)
    return model


@pytest.fixture
def placement(heads: ir.Model, cpu: Target) -> Placement:
    return place(heads, replace(cpu, costs=None), True, True)


def seen(**ranges: tuple[float, float]) -> Statistics:
    histograms = {}
    for name, (low, high) in ranges.items():
        histograms[name] = Histogram()
        histograms[name].add(np.linspace(low, high, 100, dtype=np.float32))
    return Statistics(histograms, 1)


def test_boxes_and_scores_do_not_share_a_scale(heads: ir.Model, placement: Placement, cpu: Target) -> None:
    assert placement.ops["join"].precision is Precision.INTEGER
    wishes = unlike_ranges(heads, placement, seen(b=(0, 320), s=(0, 1), j=(0, 320)))
    assert set(wishes) == {"join"} and "320-fold" in wishes["join"].reason
    again = place(heads, replace(cpu, costs=None), True, True, wishes)
    assert again.ops["join"].precision is Precision.FLOAT and again.ops["join"].reason == wishes["join"].reason


@pytest.mark.parametrize("high", [1.0, MOST_APART - 0.1])
def test_ranges_that_are_alike_do(high: float, heads: ir.Model, placement: Placement) -> None:
    assert unlike_ranges(heads, placement, seen(b=(0, high), s=(0, 1), j=(0, high))) == {}


def test_a_tensor_that_is_constant_has_no_range_to_lose(heads: ir.Model, placement: Placement) -> None:
    assert unlike_ranges(heads, placement, seen(b=(0, 320), s=(0, 0), j=(0, 320))) == {}
