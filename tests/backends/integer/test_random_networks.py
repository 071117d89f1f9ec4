"""Random networks in integers: the interpreter against the QDQ model, and the arena against the interpreter."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from hypothesis import given, settings
from random_graphs import models as random_models
from random_graphs.integer import networks
from random_graphs.quantized import quantized, random_samples

from qcompile.backends.integer.arena import run_in_arena
from qcompile.backends.integer.interpret import dequantize_output, interpret, quantize_input
from qcompile.backends.integer.lower import lower
from qcompile.backends.integer.memory import assign_offsets
from qcompile.backends.integer.program import Program
from qcompile.backends.integer.strips import trade_off
from qcompile.core import model as models
from qcompile.core import numerics, runtime
from qcompile.core.errors import QcompileError, TargetError


def inputs_of(program: Program, feeds: dict[str, Any]) -> dict[str, Any]:
    return {port.name: quantize_input(program, port, feeds[port.name]) for port in program.inputs}


@settings(max_examples=300)
@given(networks())
def test_a_program_computes_what_its_qdq_model_does(proto: onnx.ModelProto) -> None:
    model = models.from_proto(proto)
    samples = random_samples(model, 3)
    expected = runtime.Session(model).run(samples[0])
    qdq = quantized(model, samples)
    program = lower(qdq)
    simulated = runtime.Session(qdq, optimize=False).run(samples[0])
    inputs = inputs_of(program, samples[0])
    found = interpret(program, inputs)
    for port in program.outputs:
        real = dequantize_output(program, port, found[port.name])
        assert real.shape == simulated[port.name].shape
        step = program.tensors[port.tensor].scale
        noise = float(np.mean((simulated[port.name] - expected[port.name]) ** 2))
        added = float(np.mean((simulated[port.name] - real) ** 2))
        assert added <= max(noise, step**2), (port.name, numerics.sqnr(simulated[port.name], real))
    for overlap in (False, True):
        plan = assign_offsets(program, overlap)
        placed = run_in_arena(plan, inputs)
        assert all(np.array_equal(placed[name], found[name]) for name in found), overlap
        assert plan.bound <= plan.arena_bytes


@settings(max_examples=60)
@given(networks())
def test_strips_compute_what_whole_maps_do(proto: onnx.ModelProto) -> None:
    model = models.from_proto(proto)
    samples = random_samples(model, 1)
    program = lower(quantized(model, samples))
    inputs = inputs_of(program, samples[0])
    found = interpret(program, inputs)
    for point, plan in trade_off(program):
        placed = run_in_arena(plan, inputs)
        assert all(np.array_equal(placed[name], found[name]) for name in found), point


@given(random_models())
def test_any_model_is_lowered_or_refused_in_one_line(proto: onnx.ModelProto) -> None:
    model = models.from_proto(proto)
    samples = random_samples(model, 2)
    try:
        qdq = quantized(model, samples)
    except QcompileError:
        return  # what cannot be measured is not what this is about
    try:
        program = lower(qdq)
    except TargetError as error:
        assert len(str(error).splitlines()) == 1
        return
    simulated = runtime.Session(qdq, optimize=False).run(samples[0])
    found = interpret(program, inputs_of(program, samples[0]))
    for port in program.outputs:
        assert dequantize_output(program, port, found[port.name]).shape == simulated[port.name].shape
