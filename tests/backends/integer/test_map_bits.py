"""Which maps have four bits: the integer program against every choice there is, and arenas that really fit."""

from __future__ import annotations

from dataclasses import replace
from itertools import chain, combinations
from typing import Any

import numpy as np
import pytest
from random_graphs import mlperf_tiny
from random_graphs.quantized import quantized, random_samples
from random_programs import in_halves, random_maps

from qcompile.backends.integer import operations as ops
from qcompile.backends.integer.arena import run_in_arena
from qcompile.backends.integer.interpret import interpret
from qcompile.backends.integer.lower import lower
from qcompile.backends.integer.map_bits import Groups, _Steps, fit, in_four_bits, least, narrowable
from qcompile.backends.integer.memory import Layout
from qcompile.backends.integer.program import Program, Strips
from qcompile.backends.integer.strips import schedules
from qcompile.core import model as models


@pytest.fixture(scope="module")
def resnet8() -> Program:
    model = models.from_proto(mlperf_tiny.resnet8())
    return lower(quantized(model, random_samples(model, 1)))


def each(program: Program) -> dict[str, str]:
    return {name: name for name in program.tensors}


def random_losses(groups: Groups, seed: int) -> dict[str, float]:
    random = np.random.default_rng(seed)
    return {name: float(random.exponential()) for name in groups}


def subsets(names: Groups) -> list[tuple[str, ...]]:
    return list(chain.from_iterable(combinations(names, count) for count in range(len(names) + 1)))


def needed(program: Program, groups: Groups, chosen: tuple[str, ...]) -> int:
    return Layout(in_four_bits(program, [name for group in chosen for name in groups[group]])).bound()[0]


@pytest.mark.parametrize("seed", range(40))
def test_the_choice_is_the_best_of_all(seed: int) -> None:
    program = random_maps(seed).program()
    groups = narrowable(program, each(program))
    losses = random_losses(groups, seed)
    steps = _Steps(program, groups)
    every = {chosen: needed(program, groups, chosen) for chosen in subsets(groups)}
    lonely = not any(isinstance(operation, ops.Add) for operation in program.operations)
    for limit in sorted({*every.values(), min(every.values()) - 1}):
        fitting = [sum(losses[name] for name in chosen) for chosen, size in every.items() if size <= limit]
        found = steps.choose(losses, limit)
        if found is None:
            # Where an output may lie on one of two inputs, the program counts with one of them.
            assert not fitting or not lonely
            continue
        assert every[found] <= limit
        loss = sum(losses[name] for name in found)
        assert loss >= min(fitting) - 1e-12 and (not lonely or loss == pytest.approx(min(fitting), abs=1e-12))
        assert steps.least_loss(losses, limit) <= loss + 1e-12


def test_a_network_fits_what_strips_of_eight_bits_do_not(resnet8: Program) -> None:
    groups = narrowable(resnet8, each(resnet8))
    losses = random_losses(groups, 1)
    before = 0.0
    for budget in (22528, 22000, 18000, 15000, 13000):
        found = fit(resnet8, groups, losses, budget)
        assert found is not None and found.plan.arena_bytes <= budget
        assert bool(found.narrow) == (budget < 22528) and found.loss >= before
        assert found.loss == pytest.approx(sum(losses[name] for name in found.narrow))
        before = found.loss


def test_what_is_said_to_be_the_least_is_reached_and_no_less(resnet8: Program) -> None:
    groups = narrowable(resnet8, each(resnet8))
    losses = random_losses(groups, 2)
    bytes_ = least(resnet8, groups).arena_bytes
    assert bytes_ == 11264  # half of what strips of eight bits take
    found = fit(resnet8, groups, losses, bytes_)
    assert found is not None and found.plan.arena_bytes == bytes_
    assert fit(resnet8, groups, losses, bytes_ - 1) is None


@pytest.mark.parametrize("budget", [18000, 12000])
def test_strips_of_four_bits_compute_what_whole_maps_do(resnet8: Program, budget: int) -> None:
    """Numbers are those of eight bits, which half as many hold only in part: what matters is that both do the same."""
    groups = narrowable(resnet8, each(resnet8))
    found = fit(resnet8, groups, random_losses(groups, 3), budget)
    assert found is not None
    random = np.random.default_rng(4)
    plan = found.plan
    (port,) = plan.program.inputs
    tensor = plan.program.tensors[port.tensor]
    codes = {port.name: random.integers(-8, 8, tensor.shape).astype(np.int8)}
    halved = {name: tensor.bits for name, tensor in plan.program.tensors.items()}
    assert {halved[name] for group in found.narrow for name in groups[group]} == {4}
    narrow = clamped(plan.program)
    expected = interpret(narrow, codes)
    made = run_in_arena(type(plan)(narrow, plan.arena_bytes, plan.offsets, plan.bound, plan.disjoint_bound), codes)
    assert all(np.array_equal(made[name], expected[name]) for name in expected)


def clamped(program: Program) -> Program:
    """Return a program whose operations make no code that their output has no room for."""

    def one(part: Any) -> Any:
        if isinstance(part, Strips):
            return replace(part, operations=tuple(one(each) for each in part.operations))
        return in_halves(part) if program.tensors[part.output].bits == 4 else part

    return replace(program, operations=tuple(one(part) for part in program.operations))


def test_what_has_no_kernel_keeps_its_bits(resnet8: Program) -> None:
    groups = narrowable(resnet8, each(resnet8))
    last = next(part for part in resnet8.operations if isinstance(part, ops.AveragePool))
    assert last.inputs[0] in groups and last.output not in groups, "a reshape reads the mean"
    assert not {port.tensor for port in resnet8.outputs} & set(groups)
    assert resnet8.inputs[0].tensor in groups


def test_what_shares_a_scale_shares_its_bits(resnet8: Program) -> None:
    names = [part.output for part in resnet8.operations if isinstance(part, ops.Conv)][:2]
    together = narrowable(resnet8, dict.fromkeys(names, "both"))
    assert together == {"both": tuple(names)}
    (port,) = resnet8.outputs
    assert narrowable(resnet8, {names[0]: "both", port.tensor: "both"}) == {}
    found = fit(resnet8, together, {"both": 1.0}, 22000)
    assert found is None or found.narrow == ("both",)


def test_schedules_begin_with_whole_maps(resnet8: Program) -> None:
    ways = list(schedules(resnet8))
    assert ways[0].depth == 0 and ways[0].program is resnet8
    assert [way.macs for way in ways[1:]] == sorted(way.macs for way in ways[1:])
