"""The arena: what lies where, how near to its bound, and in strips where it does not fit."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import onnx_ir as ir
import pytest
from random_graphs import mlperf_tiny
from random_graphs.quantized import quantized, random_samples

from qcompile.backends.integer import operations as ops
from qcompile.backends.integer.arena import run_in_arena
from qcompile.backends.integer.interpret import Array, interpret
from qcompile.backends.integer.lower import lower
from qcompile.backends.integer.memory import ALIGNMENT, Layout, MemoryPlan, assign_offsets, owners
from qcompile.backends.integer.program import Port, Program, Strips, Tensor
from qcompile.backends.integer.strips import front, in_strips, moved_bytes, plan_memory, trade_off
from qcompile.core import model as models
from qcompile.core.errors import BudgetError

Build = Callable[..., ir.Model]
NETWORKS = {"ds_cnn": mlperf_tiny.ds_cnn, "resnet8": mlperf_tiny.resnet8, "mobilenet": mlperf_tiny.mobilenet,
            "autoencoder": mlperf_tiny.autoencoder}  # fmt: skip
#: Bytes with nothing overlapping, which is what liveness asks for; and with outputs on inputs.
ARENAS = {"ds_cnn": (16000, 11840), "resnet8": (49152, 33792), "mobilenet": (55296, 37632), "autoencoder": (768, 768)}


@pytest.fixture(scope="module")
def programs() -> dict[str, Program]:
    """Return the networks as integer programs."""
    found = {}
    for name, build in NETWORKS.items():
        model = models.from_proto(build())
        found[name] = lower(quantized(model, random_samples(model, 1)))
    return found


def random_codes(program: Program) -> dict[str, Array]:
    source = np.random.default_rng(1)
    return {port.name: source.integers(-128, 128, program.tensors[port.tensor].shape).astype(np.int8)
            for port in program.inputs}  # fmt: skip


def require_equal(plan: MemoryPlan, program: Program) -> None:
    inputs = random_codes(program)
    expected, found = interpret(program, inputs), run_in_arena(plan, inputs)
    assert all(np.array_equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("name", NETWORKS)
def test_arenas_of_known_networks(programs: dict[str, Program], name: str) -> None:
    apart, over = assign_offsets(programs[name], overlap=False), assign_offsets(programs[name])
    assert (apart.arena_bytes, over.arena_bytes) == ARENAS[name]
    assert apart.bound == apart.disjoint_bound == over.disjoint_bound == ARENAS[name][0]
    assert over.bound <= over.arena_bytes
    assert apart.optimal and over.optimal
    require_equal(apart, programs[name])
    require_equal(over, programs[name])


def test_apart_means_apart(programs: dict[str, Program]) -> None:
    program = programs["resnet8"]
    plan = assign_offsets(program, overlap=False)
    owner = owners(program)
    for operation in program.operations:
        live = {owner[name] for name in (*operation.inputs, operation.output)}
        spans = sorted((plan.offsets[name], plan.offsets[name] + program.tensors[name].nbytes) for name in live)
        assert all(first[1] <= second[0] for first, second in pairwise(spans))
    assert all(offset % ALIGNMENT == 0 for offset in plan.offsets.values())


def test_the_arena_notices_a_tensor_that_is_overwritten(programs: dict[str, Program]) -> None:
    program = programs["resnet8"]
    plan = assign_offsets(program)
    moved = dict(plan.offsets)
    first, second = program.operations[1].inputs[0], program.operations[1].output
    moved[second] = moved[first]  # a convolution of three rows exactly in place
    broken = MemoryPlan(program, plan.arena_bytes, moved, plan.bound, plan.disjoint_bound)
    inputs = random_codes(program)
    expected, found = interpret(program, inputs), run_in_arena(broken, inputs)
    assert not all(np.array_equal(found[name], expected[name]) for name in expected)


def test_views_share_bytes_and_an_output_is_kept(model_of: Build) -> None:
    text = """(float[1, 4, 6] x) => (float[1, 24] y, float[1, 4, 6] z) {
        a = Relu (x)
        y = Reshape (a, shape)
        z = Sigmoid (a)
    }"""
    model = model_of(text, shape=np.array([1, 24]))
    program = lower(quantized(model, random_samples(model, 1)))
    plan = assign_offsets(program)
    ports = {port.name: port.tensor for port in program.outputs}
    owner = owners(program)
    assert plan.offsets[ports["y"]] == plan.offsets[owner[ports["y"]]]
    assert abs(plan.offsets[ports["y"]] - plan.offsets[ports["z"]]) >= 24
    require_equal(plan, program)


@pytest.mark.parametrize(("name", "budget", "most"), [("resnet8", 34 * 1024, 1.4), ("mobilenet", 44 * 1024, 1.4)])
def test_known_networks_fit_without_overlaps_in_strips(
    programs: dict[str, Program], name: str, budget: int, most: float
) -> None:
    plan = plan_memory(programs[name], budget, overlap=False)
    assert plan.arena_bytes <= budget
    [strips] = [operation for operation in plan.program.operations if isinstance(operation, Strips)]
    assert strips.recomputed == 0
    require_equal(plan, programs[name])
    again = [point for point, _ in trade_off(programs[name], overlap=False)
             if point.recomputes and point.arena_bytes <= budget]  # fmt: skip
    whole = next(trade_off(programs[name], overlap=False))[0].macs
    assert min(point.macs for point in again) <= most * whole


@pytest.mark.parametrize(("name", "budget"), [("resnet8", 22528), ("resnet8", 25600), ("ds_cnn", 10600)])
def test_known_networks_fit_in_strips(programs: dict[str, Program], name: str, budget: int) -> None:
    assert assign_offsets(programs[name]).arena_bytes > budget
    plan = plan_memory(programs[name], budget)
    assert plan.arena_bytes <= budget
    require_equal(plan, programs[name])


def test_what_fits_stays_whole(programs: dict[str, Program]) -> None:
    plan = plan_memory(programs["resnet8"], 33792)
    assert not any(isinstance(operation, Strips) for operation in plan.program.operations)
    assert plan_memory(programs["resnet8"]).arena_bytes == 33792


def test_what_does_not_fit_is_refused_with_the_operation_that_needs_most(programs: dict[str, Program]) -> None:
    with pytest.raises(
        BudgetError, match=r"--max-sram 20000: 33792 bytes .* nor 22528 in strips; .*'Conv_5' needs 33792$"
    ):
        plan_memory(programs["resnet8"], 20000)
    with pytest.raises(BudgetError, match="--max-sram 700: 768 bytes of activations do not fit"):
        plan_memory(programs["autoencoder"], 700)


def test_rows_are_kept_or_computed_again(programs: dict[str, Program]) -> None:
    program = programs["resnet8"]
    kept, again = (in_strips(program, 4, 8, recomputes).operations[0] for recomputes in (False, True))
    assert isinstance(kept, Strips) and isinstance(again, Strips)
    assert kept.recomputed == 0 < again.recomputed
    assert moved_bytes(kept, program) > 0 == moved_bytes(again, program)
    # The first of three convolutions is four rows ahead of the last: two windows of three rows.
    assert [(step.first, step.last) for step in again.strips[1]] == [(6, 18), (7, 17), (8, 16), (8, 16)]
    assert [(step.first, step.last) for step in kept.strips[1]] == [(10, 18), (9, 17), (8, 16), (8, 16)]
    assert [step.held for step in again.strips[1]] == [6, 7, 8, 8]
    # Of those that are there, the two that the second convolution has read all it needs of are given up.
    assert [step.held for step in kept.strips[1]] == [8, 7, 8, 8]


def test_the_front_has_what_nothing_beats(programs: dict[str, Program]) -> None:
    points = [point for point, _ in trade_off(programs["resnet8"])]
    best = front(points)
    assert points[0] in best
    assert min(point.arena_bytes for point in points) == min(point.arena_bytes for point in best)
    for one in best:
        assert not any(other.arena_bytes < one.arena_bytes and other.macs <= one.macs
                       and other.moved_bytes <= one.moved_bytes for other in points)  # fmt: skip


def test_strips_end_where_a_result_between_is_read_later(model_of: Build, random: np.random.Generator) -> None:
    text = """(float[1, 2, 8, 8] x) => (float[1, 2, 8, 8] y, float[1, 2, 8, 8] a) {
        a = Conv <pads = [1, 1, 1, 1]> (x, w)
        y = Conv <pads = [1, 1, 1, 1]> (a, w)
    }"""
    model = model_of(text, w=random.standard_normal((2, 2, 3, 3)).astype(np.float32))
    program = lower(quantized(model, random_samples(model, 1)))
    assert [point.depth for point, _ in trade_off(program)] == [0]


def random_joins(random: np.random.Generator, count: int) -> Program:
    """Return a program in which each tensor joins up to three of those before it."""
    tensors = {f"t{index}": Tensor(f"t{index}", (1, 4 * int(random.integers(1, 30))), "int8", 1.0, 0)
               for index in range(count)}  # fmt: skip
    joins = []
    for index in range(1, count):
        read = random.choice(index, min(index, 3), replace=False)
        joins.append(ops.Concat(f"c{index}", tuple(f"t{place}" for place in read), f"t{index}", 1))
    ports = [Port(name, name, tensors[name].shape, (0, 1)) for name in ("t0", f"t{count - 1}")]
    return Program("joins", tensors, tuple(joins), (ports[0],), (ports[1],))


@pytest.mark.parametrize(("seed", "quickly", "least"), [(31, 624, 608), (50, 840, 812)])
def test_what_is_quickly_found_may_be_improved(seed: int, quickly: int, least: int) -> None:
    program = random_joins(np.random.default_rng(seed), 18)
    quick, exact = assign_offsets(program, exact=False), assign_offsets(program)
    assert (quick.arena_bytes, exact.arena_bytes, exact.bound) == (quickly, least, least)
    assert exact.optimal and not quick.optimal
    layout = Layout(program)
    assert layout.holds({name: exact.offsets[name] for name in layout.buffers})


def test_what_breaks_a_layout_is_noticed() -> None:
    layout = Layout(random_joins(np.random.default_rng(1), 4))
    placed = assign_offsets(layout.program).offsets
    fits = {name: placed[name] for name in layout.buffers}
    assert layout.holds(fits)
    assert not layout.holds(dict.fromkeys(fits, 0))
    assert not layout.holds({name: offset + 1 for name, offset in fits.items()})
    assert not layout.holds({name: offset - 4 * 30 for name, offset in fits.items()})
