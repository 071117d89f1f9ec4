"""Which operators gain from integers: the linear program against all choices tried one by one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import product
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcompile.core.target import Target
from qcompile.passes import structure
from qcompile.passes.canonicalize import Canonicalize
from qcompile.passes.place import Placement, place
from qcompile.passes.place_by_cost import Conversion, Prices, Source, cheapest_in_float, quietest_in_float

Build = Callable[..., Any]

#: A chain of Convs with a Relu, a pool, a branch that meets again, and an operator that is float in any case.
NETWORK = """(float[1,4,6,6] x) => (float[1,4,6,6] y) {
    [a] a = Conv (x, w) [r] r = Relu (a) [b] b = Conv (r, w) [s] s = Add (b, r) [c] c = Conv (s, w)
    [e] e = Exp (c) [g] g = Conv (e, w) [p] p = MaxPool <kernel_shape = [1, 1]> (g) [d] y = Conv (p, w) }"""
FREE = ("a", "b", "s", "c", "g", "p", "d")


@pytest.fixture(scope="module")
def network(model_of: Build) -> ir.Model:
    model = model_of(NETWORK, 21, w=np.ones((4, 4, 1, 1), np.float32))
    Canonicalize(21)(model)
    return model


@pytest.fixture(scope="module")
def placement(network: ir.Model, request: pytest.FixtureRequest) -> Placement:
    return place(network, request.getfixturevalue("eager"), True, True)


@pytest.fixture(scope="module")
def eager() -> Target:
    import importlib.resources

    folder = importlib.resources.files("qcompile.backends.ort")
    return Target.from_toml(folder / "targets" / "cpu.toml", folder / "costs")


def spent(model: ir.Model, prices: Prices, integer: Mapping[str, bool]) -> float:
    """Reckon what a choice takes, by going through the model once: no variables, no inequalities."""
    owner = {"r": "a"}
    total = 0.0

    def form(node: ir.Node | None) -> str:
        name = "" if node is None else structure.node_name(node)
        if integer.get(owner.get(name, name), False):
            return "codes"
        return "blocks" if name in prices.blocked else "plain"

    for node in model.graph:
        name = structure.node_name(node)
        free = owner.get(name, name) in integer
        makers = [value.producer() for value in structure.activation_inputs(node)]
        paid_by_maker = not free and any(form(maker) == "codes" for maker in makers[:1])
        on_codes = form(node) == "codes" or paid_by_maker
        total += (prices.as_integer if on_codes else prices.as_float).get(name, 0.0)
    for value in (*model.graph.inputs, *(value for node in model.graph for value in node.outputs)):
        made, conversion = form(value.producer()), prices.conversions[structure.name_of(value)]
        same = value.producer() is not None and structure.node_name(value.producer()) == "a"  # type: ignore[arg-type]
        read = {form(node) for node in structure.readers(value)} | ({"plain"} if value.is_graph_output() else set())
        if same:
            continue  # between a Conv and the Relu that it absorbs
        total += conversion.quantize * (made != "codes" and "codes" in read)
        total += conversion.dequantize * (made == "codes" and bool(read - {"codes"}))
        total += conversion.unblock * (made == "blocks" and bool(read - {"blocks"}))
        total += conversion.block * (made != "blocks" and "blocks" in read)
    return total


def allowed(integer: Mapping[str, bool]) -> bool:
    """Tell whether an operator without weights finds codes where it is to read them."""
    return (not integer["s"] or (integer["a"] and integer["b"])) and (not integer["p"] or integer["g"])


TIMES = st.floats(0, 20).map(lambda number: round(number, 2))


@given(data=st.data())
def test_no_choice_is_cheaper(data: st.DataObject, network: ir.Model, placement: Placement) -> None:
    names = [structure.node_name(node) for node in network.graph]
    values = [*(v.name for v in network.graph.inputs), *(v.name for node in network.graph for v in node.outputs)]
    blocked = data.draw(st.sets(st.sampled_from(names)))
    prices = Prices(
        {name: data.draw(TIMES) for name in names},
        {name: data.draw(TIMES) for name in names},
        {str(value): Conversion(*(data.draw(TIMES) for _ in range(4))) for value in values},
        blocked - {"r"} | ({"r"} if "a" in blocked else set()),
    )
    found = cheapest_in_float(network, placement, prices)
    chosen = {name: name not in found for name in FREE}
    assert allowed(chosen)
    choices = [dict(zip(FREE, bits, strict=True)) for bits in product((False, True), repeat=len(FREE))]
    least = min(spent(network, prices, choice) for choice in choices if allowed(choice))
    assert spent(network, prices, chosen) == pytest.approx(least, abs=0.02)


@given(data=st.data())
def test_within_a_budget_no_choice_is_quieter(data: st.DataObject, network: ir.Model, placement: Placement) -> None:
    names = [structure.node_name(node) for node in network.graph]
    values = [*(v.name for v in network.graph.inputs), *(v.name for node in network.graph for v in node.outputs)]
    prices = Prices(
        {name: data.draw(TIMES) for name in names},
        {name: data.draw(TIMES) for name in names},
        {str(value): Conversion(data.draw(TIMES), data.draw(TIMES)) for value in values},
    )
    some = st.lists(st.sampled_from(FREE), min_size=1, max_size=3, unique=True).map(tuple)
    sources = [Source(data.draw(st.floats(0.01, 1.0)), data.draw(some)) for _ in range(5)]
    choices = [dict(zip(FREE, bits, strict=True)) for bits in product((False, True), repeat=len(FREE))]
    everything_in_float = spent(network, prices, dict.fromkeys(FREE, False))
    # What the program pays for a choice that does not depend on it is not in its budget.
    times = {index: spent(network, prices, one) - everything_in_float for index, one in enumerate(choices)}

    def noise(choice: Mapping[str, bool]) -> float:
        return sum(source.noise for source in sources if any(choice[name] for name in source.operators))

    budget = data.draw(st.floats(-60.0, 20.0)) + 0.005  # no sum of rounded prices is as near to it as tolerances are
    fitting = [one for index, one in enumerate(choices) if allowed(one) and times[index] <= budget]
    found = quietest_in_float(network, placement, prices, sources, budget)
    if not fitting:
        assert found is None
        return
    assert found is not None
    chosen = {name: name not in found for name in FREE}
    assert allowed(chosen) and times[choices.index(chosen)] <= budget + 0.01
    assert noise(chosen) <= min(map(noise, fitting)) + 1e-3


def free_of_conversions(network: ir.Model, as_float: float, as_integer: float) -> Prices:
    names = [structure.node_name(node) for node in network.graph]
    values = [*network.graph.inputs, *(value for node in network.graph for value in node.outputs)]
    nothing = {structure.name_of(value): Conversion(0.0, 0.0) for value in values}
    return Prices(dict.fromkeys(names, as_float), dict.fromkeys(names, as_integer), nothing)


def test_an_operator_that_becomes_free_is_quantized_and_one_that_becomes_dear_is_not(
    network: ir.Model, placement: Placement
) -> None:
    assert cheapest_in_float(network, placement, free_of_conversions(network, 1.0, 0.0)) == set()
    assert cheapest_in_float(network, placement, free_of_conversions(network, 1.0, 2.0)) == set(FREE)


def test_what_gains_nothing_stays_in_float(network: ir.Model, placement: Placement) -> None:
    assert cheapest_in_float(network, placement, free_of_conversions(network, 1.0, 1.0)) == set(FREE)


def test_nothing_to_choose_is_no_problem(model_of: Build, eager: Target) -> None:
    model = model_of("(float[2] x) => (float[2] y) { [n] y = Exp (x) }", 21)
    Canonicalize(21)(model)
    assert cheapest_in_float(model, place(model, eager, True, True), Prices({}, {}, {})) == set()
